"""Ranks that compute a guidance's branches side by side: the clips of one rank, bit by bit, in half of the passes."""

from pathlib import Path

import torch

from distill.pipeline.generate import solve_states
from distill.training.config import EngineConfig
from distill.training.engines.engine import Engine
from teachers.files import load_tensors, save_tensors
from teachers.guidance import AnyGuidance, EmbeddedGuidance, Guidance
from tests.support.processes import run_ranks
from tests.support.tiny import a_teacher, some_conditions, some_latents

GRID = (1.0, 0.7, 0.4, 0.0)
CASES: dict[str, AnyGuidance] = {
    "both": Guidance(text=3.0, audio=3.0),
    "text first": Guidance(text=3.0, audio=2.0),  # three branches
    "batched": Guidance(text=2.0, audio=2.0, batched=True),
    "drawn": EmbeddedGuidance(torch.tensor([[1.5], [2.5]])),
    "drawn apart": EmbeddedGuidance(torch.tensor([[1.5, 3.0], [2.5, 1.0]])),  # three branches
}


def solved(guidance: AnyGuidance) -> tuple[torch.Tensor, int]:
    """The states of a solution, and how often the network was called."""
    teacher, calls = a_teacher().eval(), []
    teacher.net.register_forward_pre_hook(lambda *_: calls.append(1))
    states = solve_states(teacher, some_conditions(frames=4), some_latents(frames=4), GRID, range(4), guidance)
    return states, len(calls)


def worker(folder: Path) -> None:
    """One of two ranks, or of three."""
    engine = Engine(EngineConfig(kind="ddp", precision="fp32"))
    found = {}
    for name, guidance in CASES.items():
        with engine.sharing_branches(guidance) as shared:
            states, calls = solved(shared)
            place = (engine.data_rank, engine.data_ranks, int(engine.is_group_main))
        assert (engine.data_rank, engine.data_ranks, engine.is_group_main) == (engine.rank, engine.world_size, True)
        found |= {f"{name}/states": states, f"{name}/facts": torch.tensor([calls, *place])}
    save_tensors(folder / f"rank{engine.rank}.safetensors", found)
    engine.close()


def facts(folder: Path, count: int) -> dict[str, list[list[int]]]:
    """Calls, group, number of groups, and who writes, of every rank; the states are those of one process."""
    ranks = [load_tensors(folder / f"rank{rank}.safetensors") for rank in range(count)]
    for name, guidance in CASES.items():
        alone, _ = solved(guidance)
        for rank in ranks:
            if name == "batched":  # whose branches are alone here
                torch.testing.assert_close(rank[f"{name}/states"], alone)
            else:
                assert torch.equal(rank[f"{name}/states"], alone), name
    return {name: [rank[f"{name}/facts"].tolist() for rank in ranks] for name in CASES}


def test_two_ranks_make_a_clip_together(tmp_path):
    run_ranks(__file__, tmp_path, 2)
    shared, apart = [[3, 0, 1, 1], [3, 0, 1, 0]], [[9, 0, 2, 1], [9, 1, 2, 1]]
    drawn = {"drawn": shared, "drawn apart": apart}
    assert facts(tmp_path, 2) == {"both": shared, "text first": apart, "batched": shared, **drawn}


def test_three_ranks_make_one_of_three_branches(tmp_path):
    run_ranks(__file__, tmp_path, 3)
    found = facts(tmp_path, 3)
    assert found["text first"] == found["drawn apart"] == [[3, 0, 1, 1], [3, 0, 1, 0], [3, 0, 1, 0]]
    assert found["both"] == [[6, rank, 3, 1] for rank in range(3)]
