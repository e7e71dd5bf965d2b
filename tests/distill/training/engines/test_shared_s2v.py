"""Wan2.2-S2V on two ranks that share every sequence, and the anchors behind it, is that of one process.

`worker` is one rank. What it leaves is compared with the same code in this process.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.compose import RECIPES
from distill.methods import Batch
from distill.recipe import load_recipe, spec_of
from distill.training.config import EngineConfig
from distill.training.engines.engine import Engine
from teachers.errors import UserError
from teachers.files import save_tensors
from teachers.networks.s2v import S2VConfig
from tests.distill.training.engines.test_fsdp_anchors import WINDOW, made
from tests.distill.training.engines.test_sequence_parallel import apart, loss_gradients, passes
from tests.students.networks.test_causal_s2v import CHUNKS, FRAMES, N, an_s2v_student
from tests.support.networks.s2v import an_s2v_net, s2v_conditions, s2v_latents, some_rows
from tests.support.processes import run_ranks
from tests.support.tiny import Ranks, randn

pytestmark = pytest.mark.slow

MOTIONS = (0, 7)
"""Latents before the clip: no anchors but the reference, or with motion and zeros before it."""
LOSSES = ("student rolling", "student checkpointed", "student clean", "fake_score rolling", "forcing")


def teacher(engine: Any, motion: int) -> dict[str, Tensor]:
    """The teacher's output and gradients of its weights, latents and anchors, which are tokens behind the frames; in fp64."""
    net = engine.split(an_s2v_net()).double().requires_grad_(True)
    given = s2v_conditions(some_rows(), motion, pose=True).to(torch.float64)
    leaves = {"x": s2v_latents().double(), "anchors": given.anchors}
    x, anchors = (leaf.requires_grad_(True) for leaf in leaves.values())
    composed = net.kind.compose(x, given, ())[1]
    sigma = torch.tensor([[0.6, 0.55, 1.0], [0.3, 0.72, 0.13]], dtype=torch.float64)
    out, _ = net(composed, sigma, given.text, given.audio, anchors=anchors, remember=False)
    (out * randn(*out.shape, seed=9)).sum().backward()
    found = {key: p.grad for key, p in net.named_parameters() if p.grad is not None}
    engine.all_reduce_mean(list(found.values()))
    return found | {"out": out.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def student(engine: Any, motion: int, cache: str) -> dict[str, Tensor]:
    given, x, clean = (
        s2v_conditions(some_rows(frames=FRAMES), motion),
        s2v_latents(2, FRAMES),
        s2v_latents(2, FRAMES, 1),
    )
    sigma = torch.linspace(0.95, 0.2, 2 * CHUNKS).view(2, CHUNKS)
    return passes(engine, an_s2v_student(sinks=1, window=1), given, x, clean, sigma, cache)


def losses(engine: Any, case: str) -> dict[str, Tensor]:
    """Those of `test_fsdp_anchors`, some with anchors that are made again of what a stream drew."""
    given = s2v_conditions(some_rows(1, WINDOW * N), 19)
    return loss_gradients(engine, *made(case, None), Batch(given, s2v_latents(1, WINDOW * N)))


def cases(engine: Any) -> dict[str, dict[str, Tensor]]:
    found = {f"teacher {motion}": teacher(engine, motion) for motion in MOTIONS}
    for motion, cache in zip(MOTIONS, ("value", "inplace"), strict=True):
        found[f"student {motion}"] = student(engine, motion, cache)
    return found | {case: losses(engine, case) for case in LOSSES}


def worker(folder: Path) -> None:
    engine = Engine(EngineConfig(kind="ddp", precision="fp32", sequence_parallel=2))
    found = {f"{case}/{key}": x.contiguous() for case, own in cases(engine).items() for key, x in own.items()}
    save_tensors(folder / f"found-{engine.rank}.safetensors", found)
    engine.close()


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("s2v")
    run_ranks(__file__, folder, 2)
    return folder


def test_outputs_gradients_streams_and_losses_are_those_of_one_process(launched):
    expected = cases(Ranks())
    for motion in MOTIONS:
        assert {"x", "anchors", "out"} < set(expected[f"teacher {motion}"])
        assert {"out", *(f"chunk {i}" for i in range(CHUNKS))} < set(expected[f"student {motion}"])
    far = {case: apart(launched, case, own) for case, own in expected.items()}
    assert {(case, key): x for case, own in far.items() for key, x in own.items() if not x < 1e-5} == {}


def test_ranks_that_do_not_divide_heads_and_anchors_are_refused():
    def spec(ranks: int) -> None:
        spec_of(load_recipe(RECIPES / "s2v.yaml", ["teacher.path=anywhere", f"engine.sequence_parallel={ranks}"]))

    for ranks in (2, 4, 8):
        spec(ranks)  # 40 heads, 1600 tokens a latent frame, 4000 of anchors
    with pytest.raises(
        UserError, match=r"sequence_parallel: 16 ranks, but 40 heads; it can be 1, 2, 4, 5, 8, 10, 20, 40$"
    ):
        spec(16)
    with pytest.raises(UserError, match=r"sequence_parallel: 8 ranks, but 20 tokens of anchors; take fewer$"):
        S2VConfig().check_sequence(8, 8)
