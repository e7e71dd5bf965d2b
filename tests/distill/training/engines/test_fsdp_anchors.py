"""Anchors in FSDP2 shards: two ranks that hold halves of Wan2.2-S2V's weights are one process, also where a stream's anchors are
made again of what it drew (LiveAvatar's rolling reference).

`worker` is one rank. Each has a batch and noise of its own; what both leave is compared with the mean of the same in this process.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.distributed.tensor import DTensor

from distill.methods import Batch, dmd, forcing
from distill.training.config import EngineConfig
from distill.training.engines.engine import Engine
from distill.training.engines.fsdp import shard
from students.history import History
from teachers.files import load_tensors, save_tensors
from teachers.guidance import Guidance
from teachers.networks.kind import AvatarTeacher
from tests.students.networks.test_causal_s2v import LIVE, N, a_spec
from tests.support.networks.s2v import SMALL, an_s2v_net, s2v_conditions, s2v_latents, some_rows
from tests.support.processes import run_ranks
from tests.support.tiny import Ranks

pytestmark = pytest.mark.slow

RANKS, WINDOW = 2, 2
"""Chunks of a training clip, behind which the anchors are made again."""
CASES = ("student rolling", "student checkpointed", "student clean", "fake_score rolling", "forcing")


def a_student(history: History) -> Any:
    spec = replace(a_spec(), horizon_frames=WINDOW * N, sigmas=(1.0, 0.6), history=history)
    return SMALL.student(an_s2v_net(), spec)


def made(case: str, engine: Any) -> tuple[str, Any, dict[str, Any]]:
    """The role that is updated, the method and the roles of a case; in shards where the engine has any."""
    clean = History(sinks=1, window=1, anchors_ahead=27)
    rolling = History(**LIVE, anchors_ahead=18, anchors_roll=WINDOW * N)
    roles: dict[str, Any] = {"student": a_student(clean if case in ("student clean", "forcing") else rolling)}
    roles |= {name: AvatarTeacher(an_s2v_net(seed)) for seed, name in ((5, "teacher"), (6, "fake_score"))}
    role = case.split()[0] if case != "forcing" else "student"
    for name, net in roles.items():
        net.requires_grad_(name == role)
        if "checkpointed" in case:
            net.net.enable_gradient_checkpointing()
        if isinstance(engine, Engine):
            shard(engine, net)
    if case == "forcing":
        return role, forcing.build(forcing.Config(), roles), roles
    config = dmd.Config(guidance=Guidance(text=2.0, audio=2.0), exit_step="last", rollout_chunks=WINDOW + 1)
    return role, dmd.build(config, roles), roles


def gradients(engine: Any, case: str) -> dict[str, Tensor]:
    """The gradients of the role's parameters, and metrics, of a batch that is the rank's own; the mean over all ranks."""
    role, method, roles = made(case, engine)
    given = s2v_conditions(some_rows(1, WINDOW * N, seed=20 * engine.rank), 19, seed=30 * engine.rank)
    batch = Batch(given, s2v_latents(1, WINDOW * N, seed=40 * engine.rank))
    rng, shared = engine.generator(0, "loss", device="cpu"), engine.generator(2, "shared", shared=True, device="cpu")
    loss = method.loss(role, batch, rng, shared)
    loss.value.backward()
    found = {name: p.grad for name, p in roles[role].named_parameters() if p.grad is not None}
    whole = {name: grad.full_tensor() for name, grad in found.items() if isinstance(grad, DTensor)}
    metrics = {f"metric/{name}": value.float().clone() for name, value in loss.metrics.items()}
    engine.all_reduce_mean([*(grad for name, grad in found.items() if name not in whole), *metrics.values()])
    return found | whole | metrics


def worker(folder: Path) -> None:
    engine = Engine(EngineConfig(kind="fsdp2", precision="fp32"), threads=1)
    found = {f"{case}/{name}": x for case in CASES for name, x in gradients(engine, case).items()}
    save_tensors(folder / f"found-{engine.rank}.safetensors", {name: x.contiguous() for name, x in found.items()})
    engine.close()


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("anchors")
    run_ranks(__file__, folder, RANKS)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_anchors_in_shards_are_those_of_one_process(launched, case):
    apart = [gradients(Ranks(rank=rank, world_size=RANKS), case) for rank in range(RANKS)]
    expected = {name: sum(part[name] for part in apart) / RANKS for name in apart[0]}
    assert any("motion_embedding" in name and x.norm() > 1e-6 for name, x in expected.items())
    largest = max(float(x.norm()) for name, x in expected.items() if "metric" not in name)
    for rank in range(RANKS):
        tensors = load_tensors(launched / f"found-{rank}.safetensors")
        found = {key.partition("/")[2]: x for key, x in tensors.items() if key.startswith(f"{case}/")}
        assert found.keys() == expected.keys()
        far = {key: float((found[key] - x).norm() / x.norm().clamp(min=1e-4 * largest)) for key, x in expected.items()}
        assert {key: distance for key, distance in far.items() if not distance < 1e-4} == {}
