"""LongCat-Video-Avatar on two ranks that share every sequence is that of one process: the teacher, the causal student, training.

`worker` is one rank. What it leaves is compared with the same code in this process.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.compose import RECIPES
from distill.methods import Batch, dmd, ode_init
from distill.recipe import load_recipe, spec_of
from distill.training.config import EngineConfig, OptimizerConfig, TrainConfig
from distill.training.engines.engine import Engine
from distill.training.loop import train
from distill.training.metrics_log import MetricsLog
from distill.training.trainer import Trainer
from teachers.errors import UserError
from teachers.files import save_tensors
from teachers.guidance import Guidance
from teachers.networks.kind import AvatarTeacher
from teachers.networks.longcat import LongCatConfig
from teachers.networks.spans import Span
from tests.distill.training.engines.test_engines import differences, newest
from tests.distill.training.engines.test_sequence_parallel import apart, loss_gradients, passes
from tests.students.networks.test_causal_longcat import CHUNKS, FRAMES, N, a_longcat_student, inputs
from tests.support.networks.longcat import a_longcat, longcat_conditions
from tests.support.networks.talk import CHANNELS, HEIGHT, WIDTH, audio_of, some_people, some_regions, talk_latents
from tests.support.processes import run_ranks
from tests.support.tiny import Ranks, randn

pytestmark = pytest.mark.slow

STUDENTS = {
    "one speaker": (1, {"sinks": 1, "window": 1}, "value"),
    "in place": (1, {"window": 1, "level": 0.1}, "inplace"),
    "absolute": (2, {"window": 2, "positions": "absolute"}, "value"),
    "two speakers": (2, {"sinks": 1, "window": 1}, "inplace"),
}
"""Speakers, history and cache."""
LOSSES = ("ode_init", "dmd student", "dmd fake_score", "checkpointed")
TRAINED, KINDS = ("ode_init", "dmd"), ("ddp", "fsdp2")


def students(engine: Any, name: str) -> dict[str, Tensor]:
    speakers, history, cache = STUDENTS[name]
    given, x, clean, sigma = inputs(speakers)
    return passes(engine, a_longcat_student(speakers, **history), given, x, clean, sigma, cache)


def continuation(engine: Any, speakers: int) -> dict[str, Tensor]:
    """The teacher over the published window, in fp64, and gradients of its weights and latents: the reference at a place of its own
    in time, clean frames, noisy frames, of which those near the reference's place do not see it; a time of each frame."""
    frames, clean, ref = 8, 3, 4
    a, b = ref, ref + 2
    spans = [
        *(Span(0, 1, at=(ref,)), Span(1, clean, at=(0,))),
        Span(clean, a, ((0, 1), (1, clean), (a, frames)), at=(ref, 0, a - 1, clean - 1)),
        Span(a, b, ((1, a), (b, frames)), at=(0, b - 1, a - 1)),
        Span(b, frames, ((0, 1), (1, b)), at=(ref, 0, b - 1)),
    ]
    net, people = engine.split(a_longcat(speakers)).double().requires_grad_(True), some_people(2, speakers, 7)
    text = longcat_conditions(people).text.double()
    rows = audio_of(people).double()
    rows, numbers = torch.cat([rows[:, :1], rows], dim=1), [0, 0, *[1] * (frames - 2)]
    sigma = torch.linspace(0.95, 0.2, 2 * frames, dtype=torch.float64).view(2, frames)
    sigma[:, :clean] = 0.0
    regions = some_regions().double() if speakers == 2 else None
    x = talk_latents(2, frames).double().requires_grad_(True)
    out, _ = net(x, sigma, text, rows, spans, numbers=numbers, regions=regions)
    (out * randn(*out.shape, seed=9)).sum().backward()
    found = {key: p.grad for key, p in net.named_parameters() if p.grad is not None}
    engine.all_reduce_mean(list(found.values()))
    assert x.grad is not None
    return found | {"out": out.detach(), "x": x.grad}


def some_roles() -> dict[str, Any]:
    roles = {"student": a_longcat_student(sinks=1, window=1), "teacher": AvatarTeacher(a_longcat(seed=4))}
    return roles | {"fake_score": AvatarTeacher(a_longcat(seed=5))}


def a_batch() -> Batch:
    states = randn(2, 5, CHANNELS, FRAMES, HEIGHT, WIDTH, seed=8)
    return Batch(inputs()[0], talk_latents(2, FRAMES, seed=1), states)


def a_method(name: str, roles: dict[str, Any]) -> Any:
    if name == "ode_init":
        return ode_init.build(ode_init.Config(), roles, (*roles["student"].spec.sigmas, 0.0))
    return dmd.build(dmd.Config(guidance=Guidance(text=2.0, audio=3.0), fake_updates=1, warmup=0), roles)


def losses(engine: Any, name: str) -> dict[str, Tensor]:
    roles, role = some_roles(), name.partition(" ")[2] or "student"
    if name == "checkpointed":
        roles["student"].net.enable_gradient_checkpointing()
    return loss_gradients(engine, role, a_method(name, roles), roles, a_batch())


def trained(engine: Any, name: str, folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint after a step of teacher forcing, or of DMD with its fake score."""
    folder.mkdir(exist_ok=True)
    roles, own = some_roles(), ("student",) if name == "ode_init" else ("student", "fake_score")
    for role, net in roles.items():
        frozen = role not in own and isinstance(engine, Engine)
        roles[role] = engine.split(engine.freeze(net.double().requires_grad_(False)) if frozen else net.double())
    method = a_method(name, roles)
    roles["teacher"].requires_grad_(False)
    optimizers = {role: OptimizerConfig(lr=2e-3, final=1.0) for role in own}
    config = TrainConfig(num_steps=1, batch_size=2, global_batch=2, log_every=1, optimizers=optimizers)
    trainer = Trainer(engine, config, {role: roles[role] for role in own}, "student", folder)
    log = MetricsLog(folder / "metrics.jsonl", engine.is_main)
    train(trainer, method, lambda _: a_batch().map(Tensor.double), stage=name, seed=0, log=log)
    return newest(folder)


def worker(folder: Path) -> None:
    engines = {kind: Engine(EngineConfig(kind=kind, precision="fp32", sequence_parallel=2)) for kind in KINDS}
    engine, found = engines["ddp"], dict[str, Tensor]()
    for name in STUDENTS:
        found |= {f"{name}/{key}": x for key, x in students(engine, name).items()}
    for speakers in (1, 2):
        found |= {f"continuation {speakers}/{key}": x for key, x in continuation(engine, speakers).items()}
    for name in LOSSES:
        found |= {f"{name}/{key}": x for key, x in losses(engine, name).items()}
    for kind, own in engines.items():
        for name in TRAINED:
            trained(own, name, folder / f"{kind}-{name}")
    student, given = engine.split(a_longcat_student(window=1)), inputs()[0]
    state = student.commit(student.open(given.text), talk_latents(2, N), given.frames(0, N))
    (folder / f"heads-{engine.rank}.json").write_text(json.dumps(state.cached[0].keys[0].shape[3]))
    save_tensors(folder / f"found-{engine.rank}.safetensors", {name: x.contiguous() for name, x in found.items()})
    engine.close()


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("longcat")
    run_ranks(__file__, folder, 2)
    return folder


def agree(launched: Path, prefix: str, expected: dict[str, Tensor]) -> None:
    far = apart(launched, prefix, expected)
    assert {key: distance for key, distance in far.items() if not distance < 1e-5} == {}


@pytest.mark.parametrize("name", STUDENTS)
def test_masked_forwards_gradients_and_streams_are_those_of_one_process(launched, name):
    expected = students(Ranks(), name)
    assert {"out", *(f"chunk {i}" for i in range(CHUNKS))} < set(expected)
    agree(launched, name, expected)


@pytest.mark.parametrize("speakers", [1, 2])
def test_a_reference_at_a_place_of_its_own_is_that_of_one_process(launched, speakers):
    agree(launched, f"continuation {speakers}", continuation(Ranks(), speakers))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_those_of_one_process(launched, name):
    agree(launched, name, losses(Ranks(), name))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TRAINED)
def test_a_training_step_is_that_of_one_process(launched, name, kind, tmp_path):
    expected, start = trained(Ranks(), name, tmp_path), some_roles()["student"].state_dict()
    assert differences(newest(launched / f"{kind}-{name}"), expected) == {}
    moved = [key for key, x in start.items() if not torch.equal(x.double(), expected[f"student/weight/{key}"])]
    assert len(moved) > len(start) // 2


def test_a_rank_keeps_half_of_the_heads(launched):
    assert [json.loads((launched / f"heads-{rank}.json").read_text()) for rank in range(2)] == [1, 1]


def test_ranks_that_do_not_divide_heads_and_tokens_are_refused():
    def spec(ranks: int) -> None:
        words = ["teacher.path=anywhere", f"engine.sequence_parallel={ranks}"]
        spec_of(load_recipe(RECIPES / "longcat.yaml", words))

    for ranks in (2, 4, 8, 16, 32):
        spec(ranks)  # 32 heads, 1600 tokens a latent frame
    with pytest.raises(UserError, match=r"sequence_parallel: 5 ranks, but 32 heads; it can be 1, 2, 4, 8, 16, 32$"):
        spec(5)
    with pytest.raises(UserError, match=r"sequence_parallel: 64 ranks, but 32 heads; it can be 1, 2, 4, 8, 16, 32$"):
        spec(64)
    with pytest.raises(UserError, match=r"sequence_parallel: 4 ranks, but 6 tokens a latent frame; it can be 1, 2$"):
        LongCatConfig().check_sequence(4, 6)
