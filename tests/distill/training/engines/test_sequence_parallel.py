"""Two ranks that share every sequence are one process: losses, gradients, streams, training; and what is refused.

`worker` is one rank. What it leaves is compared with the same code in this process.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from distill.compose import RECIPES
from distill.methods import Batch, consistency, dmd, flow_matching, forcing, ode_init
from distill.methods.critics.discriminator import build_discriminator
from distill.methods.rollout import draw_noise, rollout
from distill.pipeline.generate import stream_noise
from distill.recipe import load_recipe, spec_of
from distill.training.config import EngineConfig
from distill.training.engines.engine import Engine
from students.history import History
from students.schedule import Schedule, advance
from teachers.errors import UserError
from teachers.files import load_tensors, save_tensors
from teachers.guidance import Guidance
from teachers.networks.sequence import Split
from tests.distill.training.engines.test_engines import STEPS, differences, newest, run
from tests.students.networks.test_causal_talk import a_talk_student
from tests.students.networks.test_causal_talk import inputs as talk_inputs
from tests.support.processes import run_ranks
from tests.support.tiny import Ranks, a_student, a_teacher, randn, some_conditions, some_latents
from tests.teachers.networks import test_echomimic as echomimic
from tests.teachers.networks import test_fantasytalking as fantasytalking
from tests.teachers.networks import test_flashhead as flashhead

pytestmark = pytest.mark.slow

KINDS = ("ddp", "fsdp2", "zero2")
BOTH = {"text": 2.0, "audio": 3.0}
PATHS = {"livetalk": ["teacher.path=anywhere"]}
LOSSES = ("flow_matching", "dmd student", "dmd fake_score", "gan discriminator", "gan fake_score",
          "gan student", "ode_init", "forcing", "consistency", "diagonal", "same_level", "checkpointed")  # fmt: skip
TALKERS = ("1", "2", "face", "frames", "sound alone")


def attention(split: Split | None) -> dict[str, Tensor]:
    """Gradients of attention of 8 queries to 8 + 6 keys and values, in fp64: of what is the input's, and of the past."""
    leaves = {name: randn(2, 8, 4, 3, seed=seed).double().requires_grad_() for seed, name in enumerate("qkv")}
    leaves |= {
        name: randn(2, 6, 4, 3, seed=seed).double().requires_grad_() for seed, name in enumerate(("pk", "pv"), 5)
    }
    query, key, value, *past = leaves.values()
    if split is not None:
        ranks, rank = split.group.size, split.group.rank
        query, key, value = split.to_heads(*(split.own(split.enter(x)) for x in (query, key, value)))
        past = [split.enter(x).unflatten(2, (ranks, -1))[:, :, rank] for x in past]
    key, value = torch.cat([past[0], key], dim=1), torch.cat([past[1], value], dim=1)
    out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
    if split is not None:
        out = split.leave(split.to_tokens(out))
    (out * randn(*out.shape, seed=9)).sum().backward()
    return {"out": out.detach()} | {name: x.grad for name, x in leaves.items() if x.grad is not None}


def method_of(name: str) -> tuple[str, Any, dict[str, Any]]:
    """A method over small networks by the name of its case, the role that is updated, and the roles."""
    history, schedule = History(sinks=1, window=2), Schedule()
    if name == "diagonal":
        history, schedule = History(sinks=0, window=2), Schedule(depth=3)
    if name == "same_level":
        history = History(sinks=1, window=1, commit="same_level")
    student = a_student(history, seed=1, schedule=schedule)
    roles = {"student": student, "teacher": a_teacher(seed=2).requires_grad_(False), "fake_score": a_teacher(seed=3)}
    roles["discriminator"] = build_discriminator(student.spec.network)
    for p in roles[
        "discriminator"
    ].parameters():  # its own, whatever was drawn before; small, for logits that have a gradient
        p.data = 0.1 * randn(*p.shape, seed=p.numel())
    roles["ar_teacher"] = a_student(seed=4).requires_grad_(False)
    grid, role = (*student.spec.sigmas, 0.0), "student"
    if name == "flow_matching":
        role, made = "teacher", flow_matching.build(flow_matching.Config(), roles)
        roles["teacher"].requires_grad_(True)
    elif name in ("ode_init", "same_level"):
        made = ode_init.build(ode_init.Config(context="noisy" if name == "same_level" else "clean"), roles, grid)
    elif name == "forcing":
        made = forcing.build(forcing.Config(generated=0.9), roles)
    elif name == "consistency":
        made = consistency.build(consistency.Config(kind="continuous", anchor=0.1), roles)
    else:
        role = name.partition(" ")[2] or "student"
        gan = 0.5 if name.startswith("gan") else 0.0
        last = "last" if name == "diagonal" else "random"
        guidance = Guidance(**BOTH)
        critic = 0.5 if name == "gan fake_score" else 0.0
        made = dmd.build(dmd.Config(gan=gan, gan_critic=critic, guidance=guidance, exit_step=last), roles)
    if name == "checkpointed":
        student.net.enable_gradient_checkpointing()
    return role, made, roles


def gradients(engine: Any, name: str) -> dict[str, Tensor]:
    """`loss_gradients` of a case."""
    batch = Batch(some_conditions(2, 8), some_latents(2, 8), randn(2, 4, 4, 8, 4, 4, seed=8))
    return loss_gradients(engine, *method_of(name), batch)


def loss_gradients(engine: Any, role: str, method: Any, roles: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
    """A loss and the gradients of all parameters of its role, averaged over the ranks. In fp64, as `talkers`, but for the
    discriminator, which computes in fp32."""
    for key, net in roles.items():
        engine.split(net).to(torch.float32 if key == "discriminator" else torch.float64)
    for other, net in roles.items():
        if other != role:
            net.requires_grad_(False)
    batch = batch.map(Tensor.double)
    rng, shared = engine.generator(0, "loss", device="cpu"), engine.generator(0, "shared", shared=True, device="cpu")
    loss = method.loss(role, batch, rng, shared)
    loss.value.backward()
    found = {key: p.grad for key, p in roles[role].named_parameters() if p.grad is not None}
    assert found
    # a gap is the small difference of two means
    metrics = {f"metric/{key}": value.clone() for key, value in loss.metrics.items() if key != "gap"}
    engine.all_reduce_mean([*found.values(), *metrics.values()])
    return found | metrics


def talkers(engine: Any, name: str) -> dict[str, Tensor]:
    """`passes` of students whose tokens belong to speakers (of one or two), or to the face, or read a part of their frame's
    sound, or nothing but sound."""
    if name in ("face", "frames", "sound alone"):
        source = {"face": echomimic, "frames": fantasytalking, "sound alone": flashhead}[name]
        history, more = History(sinks=1, window=1), {} if source is flashhead else {"extra": 10}
        student, (x, given, _) = source.a_student(history), source.inputs(6, **more)
        clean, sigma = randn(*x.shape, seed=11), torch.tensor([[0.9, 0.6, 0.3], [0.5, 0.8, 0.2]])
    else:
        student, (given, x, clean, sigma) = a_talk_student(int(name), sinks=1, window=1), talk_inputs(int(name))
    return passes(engine, student, given, x, clean, sigma, "inplace")


def passes(
    engine: Any, student: Any, given: Any, x: Tensor, clean: Tensor, sigma: Tensor, cache: Any
) -> dict[str, Tensor]:
    """A masked forward of noisy x at sigma [B, chunks] beside clean latents, its gradients, and a stream of its chunks.
    In fp64: in fp32 the small gradients of keys are 5e-5 off those of fp64 in one process already."""
    student, given = engine.split(student).double().requires_grad_(True), given.to(torch.float64)
    x, clean, sigma = x.double(), clean.double(), sigma.double()
    out = student.denoise_clip(x, sigma, given, clean)
    (out * randn(*out.shape, seed=9)).sum().backward()
    found = {key: p.grad for key, p in student.named_parameters() if p.grad is not None}
    engine.all_reduce_mean(list(found.values()))
    state, n = student.open(given.text, cache), student.spec.chunk_frames
    for i in range(sigma.shape[1]):
        part, frames = given.frames(n * i, n * i + n), slice(n * i, n * i + n)
        plan = student.plan(state, part)
        with torch.no_grad():
            found[f"chunk {i}"], _ = student.denoise(state, plan, x[:, :, frames], sigma[:, i], part)
        state = student.commit(state, clean[:, :, frames], part, plan=plan)
    return found | {"out": out.detach()}


@torch.inference_mode()
def streams(engine: Any) -> tuple[dict[str, Tensor], list[int]]:
    """Chunks of a stream whose cache is in place, as it is served, and clips of rollouts; heads that the cache holds."""
    conditions = some_conditions(1, 12)
    student = engine.split(a_student(History(sinks=1, window=1), seed=5)).eval()
    noise = stream_noise(student.spec, 0, "stream")(torch.arange(1))
    state, found = student.open(conditions.text, cache="inplace"), {}
    for j in range(6):
        part = conditions.frames(2 * j, 2 * j + 2)
        x0, steps = advance(student, state, part, lambda k, i, j=j: noise(j + k, i), student.spec.sigmas)
        state, found[f"chunk {j}"] = student.commit(state, x0, part, steps), x0
    heads = [state.cached[0].keys[0].shape[3], state.kv_cache.buffers[0][0].shape[3]]
    for depth, level in ((3, "clean"), (1, "same_level")):
        history = History(sinks=0, window=2, commit=level)
        student = engine.split(a_student(history, seed=6, schedule=Schedule(depth=depth))).eval()
        found[f"{depth} {level}"] = rollout(student, conditions, draw_noise(student, 1, engine.generator(1), 6))
    return found, heads


def worker(folder: Path) -> None:
    engines = {kind: Engine(EngineConfig(kind=kind, precision="fp32", sequence_parallel=2)) for kind in KINDS}
    engine = engines["ddp"]
    assert engine.sequence is not None
    found = {f"attention/{name}": x for name, x in attention(engine.sequence.split(2)).items()}
    for name in LOSSES:
        found |= {f"{name}/{key}": x for key, x in gradients(engine, name).items()}
    for name in TALKERS:
        found |= {f"talk {name}/{key}": x for key, x in talkers(engine, name).items()}
    made, heads = streams(engine)
    found |= {f"stream/{name}": x for name, x in made.items()}
    with engine.apart():
        alone, whole = streams(engine)
    found |= {f"apart/{name}": x for name, x in alone.items()}
    for kind, own in engines.items():
        run(own, folder / kind, steps=STEPS, batch_size=8 if kind == "ddp" else 4)
    facts = {"heads": heads, "apart": whole, "share": engine.share(3).tolist(), "said": engine.description}
    facts["rows"] = engine.all_rows(torch.arange(3).unsqueeze(1) + 10 * engine.rank, 3).flatten().tolist()
    facts["missing"] = engine.missing([folder / "none", folder / "0.log", folder / "nor this"])
    facts["main"] = engine.is_group_main
    (folder / f"facts-{engine.rank}.json").write_text(json.dumps(facts))
    save_tensors(folder / f"found-{engine.rank}.safetensors", {name: x.contiguous() for name, x in found.items()})
    engine.close()


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sequence")
    run_ranks(__file__, folder, 2)
    return folder


def apart(launched: Path, prefix: str, expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative distances of what each rank left from what is expected of one process, the largest of both ranks."""
    far: dict[str, float] = {}
    for rank in range(2):
        tensors = load_tensors(launched / f"found-{rank}.safetensors")
        found = {key.partition("/")[2]: x for key, x in tensors.items() if key.startswith(f"{prefix}/")}
        assert set(found) == set(expected)
        for name, x in expected.items():
            distance = float((found[name].double() - x.double()).norm() / x.double().norm().clamp(min=1e-12))
            far[name] = max(far.get(name, 0.0), distance)
    return far


def test_gradients_where_keys_are_more_than_queries(launched):
    """Against autograd, in fp64; the gradient of diffusers' Ulysses takes keys to be as many as queries."""
    expected = attention(None)
    assert set(expected) == {"out", "q", "k", "v", "pk", "pv"}
    assert max(apart(launched, "attention", expected).values()) < 1e-13


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_those_of_one_process(launched, name):
    expected = gradients(Ranks(), name)
    if name == "gan student":
        assert expected["metric/gan_grad_abs"] > 1e-6
    far = apart(launched, name, expected)
    assert {key: distance for key, distance in far.items() if not distance < 1e-5} == {}


@pytest.mark.parametrize("name", TALKERS)
def test_speakers_and_faces_are_shared_with_their_tokens(launched, name):
    expected = talkers(Ranks(), name)
    assert {"out", "chunk 0", "chunk 2"} < set(expected)
    far = apart(launched, f"talk {name}", expected)
    assert {key: distance for key, distance in far.items() if not distance < 1e-5} == {}


def test_streams_are_those_of_one_process_with_half_of_the_heads(launched):
    expected, heads = streams(Ranks())
    assert max(apart(launched, "stream", expected).values()) < 1e-5
    assert max(apart(launched, "apart", expected).values()) == 0, "a rank by itself"
    for rank in range(2):
        facts = json.loads((launched / f"facts-{rank}.json").read_text())
        assert facts["heads"] == [1, 1]
        assert facts["apart"] == heads == [2, 2]
        assert facts["share"] == [0, 1, 2]
        assert facts["rows"] == [0, 1, 2], "of a group, the first rank's"
        assert facts["missing"] == [0, 2]
        assert facts["main"] == (rank == 0)
        assert facts["said"].startswith("2 processes, 2 a sequence, ddp, cpu")


def test_training_is_that_of_one_process(launched, tmp_path):
    run(Ranks(), tmp_path, steps=STEPS, batch_size=8)
    expected = newest(tmp_path)
    assert {kind: far for kind in KINDS if (far := differences(newest(launched / kind), expected))} == {}


def test_what_cannot_be_shared_is_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"engine.sequence_parallel: 1 processes are no multiple of 2"):
        Engine(EngineConfig(precision="fp32", sequence_parallel=2))
    with pytest.raises(UserError, match=r"engine.sequence_parallel: got 0; it must be at least 1"):
        EngineConfig(precision="fp32", sequence_parallel=0)

    def spec(name: str, ranks: int) -> None:
        spec_of(load_recipe(RECIPES / f"{name}.yaml", [f"engine.sequence_parallel={ranks}", *PATHS.get(name, ())]))

    for ranks in (2, 4):
        spec("livetalk", ranks)  # 12 heads and 40, 1024 tokens a latent frame
    with pytest.raises(UserError, match=r"sequence_parallel: 8 ranks, but 12 heads; it can be 1, 2, 4$"):
        spec("livetalk", 8)
    with pytest.raises(UserError, match=r"engine.sequence_parallel: MidasConfig cannot share a sequence among ranks"):
        spec("midas_avatar", 2)
    with pytest.raises(
        UserError, match=r"engine.sequence_parallel: 3 ranks, but 1024 tokens a latent frame; it can be 1, 2, 4"
    ):
        spec("livetalk", 3)
