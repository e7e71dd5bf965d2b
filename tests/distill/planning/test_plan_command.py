"""`distill plan`: its table, its JSON and one-line errors."""

import json

import pytest

from distill.cli import Parser
from distill.commands import plan as command
from distill.compose import RECIPES
from distill.planning import batches, report
from distill.planning.estimate import ENGINES, GIB
from distill.planning.job import job_of
from distill.planning.outlook import Rates
from distill.recipe import load_recipe
from teachers.errors import UserError
from tests.distill.planning.test_estimate import a_plan

# The command ----------------------------------------------------------------------------------------------------------


def run_plan(*words) -> int:
    parser = Parser(prog="distill plan")
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


SMOKE = (RECIPES / "scratch_avatar.yaml", "preset=smoke")


def test_the_embedded_recipe(tmp_path, capsys):
    assert run_plan(*SMOKE, "--gpus", "4,1", "--engines", ",".join(ENGINES), "--json", tmp_path / "plan.json") == 0
    text = capsys.readouterr().out
    numbers = json.loads((tmp_path / "plan.json").read_text())
    assert list(numbers["ranks"]) == ["1", "4"]
    assert set(numbers["ranks"]["1"]) == set(ENGINES)
    assert numbers["forwards_per_step"]["teacher"] == {"teacher": 1.0}
    assert numbers["forwards_per_step"]["distill"] == {"student": 3 * (4 * 3 + 3), "teacher": 2.0, "fake_score": 3.0}
    assert f"{numbers['parameters']['student']:,} parameters" in text
    assert "1 GPU, GiB a rank" in text
    assert "4 GPUs, GiB a rank" in text
    assert text.count("  fits into 80 GiB\n") == 10
    whole, shared = (numbers["ranks"][n]["fsdp2"]["distill.student"]["plain"]["student moments"] for n in ("1", "4"))
    assert whole == 4 * shared == 8 * numbers["parameters"]["student"]


@pytest.mark.slow
def test_chunks_in_flight_are_counted(tmp_path):
    """Four chunks, three in flight: six forwards a rollout; the teacher is guided by a scale for each clip."""
    words = ("preset=smoke", "--gpus", "1", "--json", tmp_path / "plan.json")
    assert run_plan(RECIPES / "flowact_full.yaml", *words) == 0
    dmd = json.loads((tmp_path / "plan.json").read_text())["forwards_per_step"]["distill"]
    assert dmd == {"student": 3 * (3 + 3), "teacher": 2.0, "fake_score": 3.0}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recovery_avatar", pytest.param("preference_avatar", marks=pytest.mark.slow)])
def test_a_teacher_that_nothing_is_learnt_from_is_planned(name, tmp_path, capsys):
    """Its clips are in the report and in the health panel."""
    words = ("--gpus", "1", "--engines", "ddp", "--json", tmp_path / "plan.json", "base.path=anywhere")
    assert run_plan(RECIPES / f"{name}.yaml", *words) == 0
    assert "fits as shipped" in capsys.readouterr().out
    assert json.loads((tmp_path / "plan.json").read_text())["parameters"]["teacher"] > 5_000_000


def test_what_does_not_fit_is_named_with_what_mends_it():
    plan = a_plan(((0, 40 * GIB),), count=GIB)
    lines = report.as_text(plan, "name", [1], ["ddp", "fsdp2"], 64.0).splitlines()
    assert lines[-2] == "DDP     does not fit into 64 GiB: distill.student 100.0; fits with checkpointing"
    assert lines[-1].startswith("FSDP2   does not fit into 64 GiB: distill.student 105.2; ")
    for gib, words in (
        (64, "fits into 64 GiB with checkpointing, which the recipe has"),
        (
            41,
            "does not fit into 41 GiB with checkpointing, which the recipe has: distill.student 64.0; "
            "fits with offload of teacher too",
        ),
    ):
        assert list(report._table(plan, 1, ["ddp"], gib, ("checkpointing",)))[-1] == f"DDP     {words}"
    lines = report.as_text(plan, "name", [64], ["ddp", "fsdp2"], 5.8).splitlines()
    assert lines[-2].endswith("; take more GPUs, smaller batches or networks")
    assert (
        lines[-1]
        == "FSDP2   does not fit into 5.8 GiB: distill.student 46.1; fits with checkpointing + offload of teacher"
    )


def test_counts_that_do_not_divide_come_with_overrides():
    """8 clips a step: ranks that share each clip, where the network can, or larger batches."""
    plan = a_plan(batch=8)
    shipped = report.Shipped((), Rates(), "ddp", (), (2, 4))
    found = {count: batches.whole_batches(plan, (2, 4), count) for count in (16, 12, 64)}
    assert found == {
        16: ["engine.sequence_parallel=2", "distill.train.global_batch=16"],
        12: ["distill.train.global_batch=12"],
        64: ["distill.train.global_batch=64"],
    }
    text = report.as_text(plan, "name", [16], [], 80.0, shipped)
    assert "8 is no multiple of 16, 16 processes of batch_size 1; change one of the three" in text
    assert "it does with engine.sequence_parallel=2" in text
    larger = a_plan(batch=16)
    assert [u.micro_steps(16) for u in larger.updates] == [1]


def test_who_can_share_a_clip():
    """12 heads and 40 divide by 4, longcat's 32 by all of these; midas cannot share at all."""
    found, given = {}, ["teacher.path=anywhere"]
    for name, words in (("livetalk", given), ("longcat", given), ("midas_avatar", [])):
        found[name] = batches.sharing(job_of(load_recipe(RECIPES / f"{name}.yaml", words)))
    assert found == {"livetalk": (2, 4), "longcat": (2, 4, 8, 16, 32), "midas_avatar": ()}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--gpus", "0"], "--gpus takes counts from 1 on, such as 1,8: got '0'"),
        (["--gpus", "1,,2"], "--gpus takes counts from 1 on"),
        (["--gpus", "two"], "--gpus takes counts from 1 on"),
        (["--engines", "fsdp"], "unknown engine 'fsdp': --engines; did you mean 'fsdp2'"),
        (["--gib-per-gpu", "-1"], "--gib-per-gpu must be above 0: got -1.0"),
        (["--gib-per-gpu", "nan"], "--gib-per-gpu must be above 0: got nan"),
        (["--json", "/nowhere/plan.json"], "--json cannot be written: /nowhere/plan.json"),
        (["trajectories.num_steps=7"], "is not on the teacher's grid"),
        (["data.codec.channles=3"], "unknown key 'data.codec.channles'"),
        (["student.chunk_frames=3"], "student.chunk_frames"),
        (["teacher.network.patch=2"], "is no multiple of 64"),
        (["teacher.network.head_dim=7"], "head_dim 7"),
        (
            ["distill.method.exit_step=random", "init.method.context=noisy", "student.history.commit=same_level"],
            "dmd.exit_step",
        ),
    ],
)
def test_a_mistake_is_one_line(words, line, tmp_path):
    target = tmp_path / "plan.json"
    extra = [] if "--json" in words else ["--json", target]
    with pytest.raises(UserError) as error:
        run_plan(*SMOKE, *words, *extra)
    assert line in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
