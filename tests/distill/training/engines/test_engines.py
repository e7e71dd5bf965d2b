"""Every engine does one arithmetic: N processes x accumulation == one process; checkpoints cross; resume is exact.

`worker` is one rank; the tests compare what two ranks left with one process.
"""

import errno
import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from distill.data.order import batch_rows
from distill.methods import Batch, Loss, losses
from distill.methods.rollout import rollout
from distill.training import checkpoint
from distill.training.config import EngineConfig, OptimizerConfig, TrainConfig
from distill.training.engines import fsdp, zero
from distill.training.engines.engine import Engine
from distill.training.loop import train
from distill.training.metrics_log import MetricsLog
from distill.training.trainer import Trainer
from teachers import files, flow
from teachers.errors import UserError
from teachers.networks.kind import AvatarTeacher
from tests.support.processes import run_ranks
from tests.support.tiny import MIDAS, Ranks, a_student, make_net, make_spec, randn, some_conditions, some_latents

pytestmark = pytest.mark.slow

KINDS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
ROWS, STEPS = 16, 2
CHAIN = ("zero3", "fsdp2", "zero2", "ddp", "zero1")  # of which the first link is the first step of the run of its kind
NARROW, OFFLOADED = ("fsdp2", "zero1"), ("fsdp2", "zero3")
KEEPING = "fsdp2-gather-once"
WITH_OWN = ("zero2", "fsdp2")  # engines for a student with a network of its own
SMALL = {"horizon_frames": 4, "sigmas": (1.0,)}


def a_score(seed: int) -> AvatarTeacher:
    """A teacher or fake score of one block, for time; the student has two."""
    return AvatarTeacher(make_net(seed, num_layers=1, audio_blocks=(0,)))


class KeyedDMD:
    """DMD whose noise belongs to the row, not to the rank: the same numbers however the rows are shared out."""

    def __init__(self, student, teacher, fake_score):
        self.student, self.teacher, self.fake_score = student, teacher, fake_score

    def roles_to_update(self, step: int) -> tuple[str, ...]:
        return ("fake_score", "student")

    def loss(self, role, batch, rng, shared) -> Loss:
        with torch.set_grad_enabled(role == "student"):
            x0 = rollout(self.student, batch.conditions, lambda j, i: batch.states[:, j, i])
        sigma = torch.full((len(x0),), 0.6)
        x = flow.add_noise(x0.detach(), batch.x0, sigma)
        if role == "fake_score":
            value = (self.fake_score.denoise(x, sigma, batch.conditions) - x0).square().mean()
            return Loss(value, {"loss": value.detach()})
        with torch.no_grad():
            real, fake = (net.denoise(x, sigma, batch.conditions) for net in (self.teacher, self.fake_score))
            gradient = losses.dmd_gradient(x0, real, fake)
        return Loss(losses.surrogate(x0, gradient), {"dmd_grad_abs": gradient.abs().mean()})


def batch_of(rows) -> Batch:
    conditions = some_conditions(ROWS, 4).index(rows)
    spec = make_spec(**SMALL)
    channels, height, width = spec.latent_size
    shape = (spec.num_chunks, len(spec.sigmas), channels, spec.chunk_frames, height, width)
    noise = torch.stack([randn(*shape, seed=100 + int(row)) for row in rows])
    return Batch(conditions=conditions, x0=some_latents(ROWS, 4, seed=5)[rows], states=noise)


def run(
    engine, folder: Path, *, steps: int, batch_size: int, every: int = 0, stopped_at: int | None = None, network=None
) -> Trainer:
    """Train student and fake score to `steps`, from the newest checkpoint in `folder`; rank 1 gets a SIGTERM at batch `stopped_at`.
    `network`: that of a student with one of its own. A run to STEPS validates in the end, and a fresh one before as well:
    nothing that a pass in inference mode leaves behind may be in the way of training."""
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = OptimizerConfig(lr=2e-3, weight_decay=0.01, warmup=2, final=1.0)
    config = TrainConfig(
        num_steps=steps,
        batch_size=batch_size,
        global_batch=8,
        log_every=1,
        checkpoint_every=every,
        validate_every=steps,
        ema_decay=0.8,
        optimizers=dict.fromkeys(("student", "fake_score"), optimizer),
    )
    own = {} if network is None else {"network": network}
    student, fake_score = a_student(seed=1, **SMALL, **own), a_score(seed=2)
    teacher = a_score(seed=3).requires_grad_(False)
    frozen = engine.freeze(teacher) if isinstance(engine, Engine) else teacher
    for net in (student, fake_score, frozen):
        engine.split(net)
    trainer = Trainer(engine, config, {"student": student, "fake_score": fake_score}, "student", folder)

    def batches(position: int) -> Batch:
        if position == stopped_at and engine.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_of(batch_rows(ROWS, batch_size, position, 0, engine.data_rank, engine.data_ranks))

    @torch.inference_mode()
    def validate() -> dict[str, float]:
        given = batch_of(torch.arange(4))
        x0 = rollout(student, given.conditions, lambda j, i: given.states[:, j, i])
        return {"score": float(x0.square().mean())}

    if steps == STEPS and not checkpoint.saved(folder):
        with engine.autocast():
            validate()
    method = KeyedDMD(student, frozen, fake_score)
    log = MetricsLog(folder / "metrics.jsonl", engine.is_main)
    scored = validate if steps == STEPS else None
    train(trainer, method, batches, stage="dmd", seed=0, log=log, validate=scored)
    return trainer


def newest(folder: Path) -> dict:
    """Every tensor of the newest checkpoint."""
    return checkpoint.Reader(checkpoint.saved(folder)[-1]).tensors("")


def facts_of(engine: Engine, trainer: Trainer) -> dict:
    """Elements that this rank keeps of a frozen and of the trained networks, and what a micro-step says to the other rank."""
    frozen = engine.freeze(a_score(seed=3).requires_grad_(False))
    kept = sum(getattr(p, "ds_tensor", fsdp.local(p)).numel() for p in frozen.parameters())
    held, said = trainer.held["fake_score"], []
    net, given = trainer.roles["fake_score"], batch_of(torch.arange(2))
    trainer._require_grad("fake_score")
    for last in (False, True):
        value = held.forward(lambda: net.denoise(given.x0, torch.full((2,), 0.5), given.conditions).square().mean())
        with CommDebugMode() as debug:
            held.backward(value, last)
        said.append(sum(n for op, n in debug.get_comm_counts().items() if "reduce" in str(op)))
    held.step(0.0)
    return {"frozen": kept, "trained": sum(p.numel() for _, p in held.named_parameters()), "reductions": said}


class Gathers(TorchDispatchMode):
    """Counts all-gathers."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "allgather" in func.name()
        return func(*args, **(kwargs or {}))


def gathers(trainer: Trainer) -> int:
    """All-gathers of a rollout of the student without gradient in a micro-step of the fake score."""
    student, given = trainer.roles["student"], batch_of(torch.arange(2))
    trainer.held["student"].release()
    with Gathers() as gathers, torch.no_grad():
        rollout(student, given.conditions, lambda j, i: given.states[:, j, i])
    trainer.held["student"].release()
    assert all(isinstance(p, DTensor) for p in trainer.trained["student"].values() if p.ndim == 2)
    return gathers.count


def timeouts() -> list[float]:
    """Minutes of each process group of this process, whoever made it."""
    groups = dist.distributed_c10d._world.pg_map
    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    return [backend.options._timeout.total_seconds() / 60 for backend in backends]


def stops(engine: Engine, folder: Path) -> list:
    """How this rank leaves a run that rank 1 is signalled to stop, and one for which rank 0 finds no room."""
    with pytest.raises(SystemExit) as stopped:
        run(engine, folder / "stopped", steps=STEPS, batch_size=2, stopped_at=1)
    if engine.is_main:
        files.save_file = no_room
    with pytest.raises(UserError) as full:
        run(engine, folder / "stopped", steps=STEPS, batch_size=2)
    return [stopped.value.code, str(full.value)]


def no_room(tensors, path, metadata=None):
    raise OSError(errno.ENOSPC, "No space left on device")


def worker(folder: Path) -> None:
    """One of two ranks: each kind alone, each resumed, a chain of all kinds, bf16 and offload."""
    zero.PERSISTENT = 200  # tiny matrices are partitioned too
    made = {kind: Engine(EngineConfig(kind=kind, precision="fp32", timeout_minutes=7), threads=1) for kind in KINDS}
    facts = {}
    for kind, engine in made.items():
        run(engine, folder / kind, steps=STEPS, batch_size=2, every=1)
        if engine.is_main:
            shutil.copytree(folder / kind / "checkpoint-00000001", folder / f"{kind}-cut" / "checkpoint-00000001")
        engine.barrier()
        trainer = run(engine, folder / f"{kind}-cut", steps=STEPS, batch_size=2)
        given = folder / f"{kind}.safetensors"
        trainer.hand_on(given, partial(files.save_tensors, given))
        facts[kind] = facts_of(engine, trainer)
        if kind == "fsdp2":
            facts["gathers"] = [gathers(trainer)]
    if made["ddp"].is_main:
        shutil.copytree(folder / CHAIN[0] / "checkpoint-00000001", folder / "chain" / "checkpoint-00000001")
    made["ddp"].barrier()
    for step, kind in enumerate(CHAIN[1:], start=2):
        run(made[kind], folder / "chain", steps=step, batch_size=2)
    for kind in NARROW:
        trainer = run(Engine(EngineConfig(kind=kind, precision="bf16")), folder / f"{kind}-bf16", steps=1, batch_size=2)
        if kind == "fsdp2":
            block = trainer.roles["student"].net.blocks[0]
            block.unshard()
            facts["gathered"] = str(block.ffn.net[2].weight.dtype)
    for kind in OFFLOADED:
        engine = Engine(EngineConfig(kind=kind, precision="fp32", offload=("student", "fake_score")))
        run(engine, folder / f"{kind}-offload", steps=1, batch_size=2)
    engine = Engine(EngineConfig(kind="fsdp2", precision="fp32", gather_once=True))
    facts["gathers"] += [gathers(run(engine, folder / KEEPING, steps=STEPS, batch_size=2))]
    fsdp.mesh_of(Engine(EngineConfig(kind="fsdp2", precision="fp32", timeout_minutes=7, shard_ranks=1)))
    facts["timeouts"] = timeouts()
    facts["from_main"] = engine.from_main({"rank": engine.rank})
    for kind in WITH_OWN:
        run(made[kind], folder / f"{kind}-midas", steps=1, batch_size=2, network=MIDAS)
    run(made["fsdp2"], folder / "from-one", steps=STEPS, batch_size=2)
    facts["stops"] = stops(made["ddp"], folder)
    (folder / f"facts-{made['ddp'].rank}.json").write_text(json.dumps(facts))
    made["ddp"].close()


@pytest.fixture(scope="module")
def launched(tmp_path_factory, alone) -> Path:
    """What two processes left."""
    folder = tmp_path_factory.mktemp("launched")
    shutil.copytree(alone[2], folder / "from-one" / alone[2].name)
    run_ranks(__file__, folder, 2)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[dict[int, dict], list[dict], Path]:
    """One process with a batch of 8: every tensor after step 1, STEPS and the chain's last, its log, and the first's checkpoint."""
    folder = tmp_path_factory.mktemp("alone")
    states = {}
    for steps in (1, STEPS, len(CHAIN)):
        run(Ranks(), folder, steps=steps, batch_size=8)
        states[steps] = newest(folder)
        if steps == 1:
            first = shutil.copytree(folder / "checkpoint-00000001", folder.parent / "first" / "checkpoint-00000001")
    return states, MetricsLog(folder / "metrics.jsonl").rows(), first


def differences(ours: dict, theirs: dict, kinds: tuple[str, ...] = ("weight", "ema")) -> dict[str, float]:
    """Relative distance of the tensors that are further apart than 1e-5."""
    assert set(ours) == set(theirs)
    apart = {}
    for name, x in ours.items():
        if any(f"{kind}/" in name for kind in kinds):
            apart[name] = float((x.double() - theirs[name].double()).norm() / theirs[name].double().norm())
    assert apart
    return {name: distance for name, distance in apart.items() if not distance < 1e-5}


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_times_two_micro_steps_of_two_are_one_batch_of_eight(launched, alone, kind):
    states, log, _ = alone
    assert not differences(newest(launched / kind), states[STEPS])
    rows = [without(row, "stage") for row in MetricsLog(launched / kind / "metrics.jsonl").rows()]
    expected = [without(row, "stage") for row in log if row["step"] <= STEPS]
    assert len(rows) == len(expected) == STEPS + 1
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-5)


def without(row: dict, key: str) -> dict:
    return {name: value for name, value in row.items() if name != key}


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_is_never_stopped_bit_for_bit(launched, kind):
    ours, theirs = newest(launched / f"{kind}-cut"), newest(launched / kind)
    assert set(ours) == set(theirs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_handed_on_is_the_best_average_of_all_ranks(launched, kind):
    given, stored = files.load_tensors(launched / f"{kind}.safetensors"), newest(launched / kind)
    assert {f"ema/{name}" for name in given} == {name for name in stored if name.startswith("ema/")}
    assert all(torch.equal(x, stored[f"ema/{name}"]) for name, x in given.items())


def test_a_chain_of_engines_each_resuming_the_one_before_is_one_run(launched, alone):
    written = [checkpoint.Reader(path).metadata["engine"] for path in checkpoint.saved(launched / "chain")]
    assert written == [{"kind": kind, "processes": 2} for kind in CHAIN[-2:]], "the last two are kept"
    assert not differences(newest(launched / "chain"), alone[0][len(CHAIN)])


def test_one_process_resumes_what_two_wrote(launched, alone, tmp_path):
    shutil.copytree(launched / "zero3-cut", tmp_path / "run")
    run(Ranks(), tmp_path / "run", steps=len(CHAIN), batch_size=8)
    assert not differences(newest(tmp_path / "run"), alone[0][len(CHAIN)])


def test_two_processes_resume_in_shards_what_one_wrote(launched, alone):
    assert not differences(newest(launched / "from-one"), alone[0][STEPS])


def test_one_process_alone_may_shard(alone, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    engine = Engine(EngineConfig(kind="fsdp2", precision="fp32"), threads=1)
    try:
        run(engine, tmp_path, steps=STEPS, batch_size=4)
    finally:
        engine.close()
    assert not differences(newest(tmp_path), alone[0][STEPS])
    assert "LOCAL_RANK" not in os.environ


def test_gathered_once_a_rollout_changes_no_number(launched, alone):
    """A rollout calls the student for every step of every chunk, and gathers each block once."""
    assert not differences(newest(launched / KEEPING), alone[0][STEPS])
    for rank in range(2):
        facts = json.loads((launched / f"facts-{rank}.json").read_text())
        spec, (each, once) = make_spec(**SMALL), facts["gathers"]
        assert once <= 1 + len(a_student(seed=1, **SMALL).net.blocks)
        assert each >= (once - 1) * spec.num_chunks * spec.nfe_per_chunk
        assert facts["from_main"] == {"rank": 0}


@pytest.mark.parametrize("kind", OFFLOADED)
def test_offload_changes_no_number(launched, alone, kind):
    assert not differences(newest(launched / f"{kind}-offload"), alone[0][1])


@pytest.mark.parametrize("kind", WITH_OWN)
def test_a_language_model_as_student_is_trained_in_parts_as_whole(launched, tmp_path, kind):
    """But for what has no gradient: the token of a clip without a reference, which ZeRO-2 steps all the same, and the bias of the
    head's keys, which softmax takes out, so that Adam steps along its rounding."""
    run(Ranks(), tmp_path, steps=1, batch_size=8, network=MIDAS)
    without_gradient = ("net.first", "qkv.bias")
    ours, theirs = (
        {name: x for name, x in newest(folder).items() if not name.endswith(without_gradient)}
        for folder in (launched / f"{kind}-midas", tmp_path)
    )
    assert not differences(ours, theirs)


@pytest.mark.parametrize("kind", NARROW)
def test_bf16_computes_in_bf16_and_keeps_fp32(launched, alone, kind):
    ours, theirs = newest(launched / f"{kind}-bf16"), alone[0][1]
    assert all(x.dtype == torch.float32 for x in ours.values())
    moments = differences(ours, theirs, ("exp_avg",))
    assert 1e-4 < sum(moments.values()) / len(moments) < 0.1


def test_one_rank_told_to_stop_or_without_room_stops_both(launched):
    rows = [json.loads((launched / f"facts-{rank}.json").read_text())["stops"] for rank in range(2)]
    assert [row[0] for row in rows] == [143, 143]
    assert rows[0][1].startswith("the disk is full: ")
    assert "another rank has failed at" in rows[1][1]
    assert [path.name for path in checkpoint.saved(launched / "stopped")] == ["checkpoint-00000000-01"]


def test_every_process_group_waits_as_long(launched):
    """Those of a mesh of replicas, and of DeepSpeed, too."""
    for rank in range(2):
        found = json.loads((launched / f"facts-{rank}.json").read_text())["timeouts"]
        assert len(found) > 2
        assert set(found) == {7.0}


def test_shards_are_halves_and_engines_of_whole_gradients_reduce_in_the_last_micro_step(launched):
    """fsdp2, zero2 and zero3 hold shards of gradients alone, and so reduce in every micro-step."""
    total = sum(p.numel() for p in a_score(0).parameters())
    for rank in range(2):
        facts = json.loads((launched / f"facts-{rank}.json").read_text())
        assert facts["gathered"] == "torch.bfloat16"
        facts = {kind: facts[kind] for kind in KINDS}
        for kind, fact in facts.items():
            assert (fact["trained"] < 0.6 * total) == (kind != "ddp"), kind
            assert (fact["frozen"] < 0.6 * total) == (kind in ("fsdp2", "zero3")), kind
        assert [fact["reductions"][0] > 0 for fact in facts.values()] == [False, True, False, True, True]
        assert [fact["reductions"][1] > 0 for fact in facts.values()] == [False, True, True, True, True]
