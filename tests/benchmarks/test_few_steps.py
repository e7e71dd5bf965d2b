"""The laboratory of few steps: what each job of its sweep is, the table of its scores, and what a stream is timed by."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.lab import few_steps
from distill.commands.sweep.command import read_sweep
from distill.compose import RECIPES
from distill.pipeline.evaluation.clip_sets import StoredConditions
from distill.recipe import load_recipe
from eval.speed.latency import Streamed, Took
from teachers.errors import UserError
from teachers.guidance import EmbeddedScales, GuidanceRange
from tests.support import tiny


@pytest.mark.slow
def test_each_job_is_what_its_name_says():
    common, jobs = read_sweep(RECIPES / "lab_avatar.yaml", "lab_few_steps")
    for name, own in jobs.items():
        recipe = load_recipe(RECIPES / "lab_avatar.yaml", [*common, *own])
        init, steps, *rest = name.split("-")
        assert recipe.student.num_steps == int(steps)
        assert getattr(recipe.init.method, "kind", "ode") == init
        assert (recipe.distill.method.gan > 0) == ("gan" in rest)
        assert (recipe.student.history.commit == "same_level") == ("level" in rest)
        assert recipe.trajectories.num_steps % recipe.student.num_steps == 0


def test_jobs_are_chosen_by_name_in_the_sweeps_order():
    """An override that stands behind --jobs is no job, and is not passed over."""
    recipe = RECIPES / "lab_avatar.yaml"
    assert list(read_sweep(recipe, "lab_conditions", ["mixed", "films"])[1]) == ["films", "mixed"]
    with pytest.raises(UserError, match=r"no job of .*lab_conditions.yaml: seed=1; it has world, films, mixed"):
        read_sweep(recipe, "lab_conditions", ["films", "seed=1"])


def test_a_row_is_the_mean_and_half_range_of_its_seeds():
    found = {"a": {"0": {"fid": 1.0, "fvd": 4.0}, "1": {"fid": 2.0, "fvd": 4.0}}, "b": {"0": {"fid": 3.0}}}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in few_steps.table(found, ("fid", "fvd"))]
    assert rows[0] == ["job", "seeds", "fid", "fvd"]
    assert rows[2:] == [["a", "2", "1.500 ± 0.500", "4.000 ± 0.000"], ["b", "1", "3.000", ""]]


def test_costs_are_cpu_seconds_of_the_first_chunk_and_of_all_until_the_last_commit(monkeypatch):
    """The round before does not count, nor what the clock on the wall says."""
    rounds = iter([9.0, 1.0, 3.0, 2.0])
    spec = SimpleNamespace(num_chunks=4, nfe_per_chunk=2, pixel_frames=lambda chunk: (8 * chunk, 8 * chunk + 7))

    def stream(_bundle, _scene, num_chunks):
        cpu = next(rounds)
        return Streamed(0.0, (Took(50.0, cpu / 10),) * num_chunks, (), Took(50.0, cpu))

    monkeypatch.setattr(few_steps, "stream", stream)
    monkeypatch.setattr(few_steps, "Scene", lambda *_: None)
    monkeypatch.setattr(few_steps, "to_float", lambda x: x)
    clips = SimpleNamespace(text=["a"], voice=[torch.zeros(1)])
    test = SimpleNamespace(samples=torch.zeros(1, 3, 1, 2, 2), clips=clips)
    found = few_steps.costs({"2": SimpleNamespace(spec=spec)}, test, rounds=3)
    assert found["2"] == pytest.approx({"first_frame_ms": 200.0, "fps": 31 / 2.0, "nfe_per_chunk": 2})


def test_a_student_is_scored_at_the_scales_that_are_asked_for(monkeypatch):
    scales = EmbeddedScales(text=GuidanceRange(), audio=GuidanceRange())
    spec, asked = tiny.make_spec(guidance=scales), []
    config = SimpleNamespace(batch_size=2, condition_seed=0, num_seeds=2, diversity_seeds=1)
    artifacts = SimpleNamespace(spec=spec, recipe=SimpleNamespace(eval=config), finished_student=lambda _: None)
    artifacts.encoders = SimpleNamespace(decode=lambda x0, _: x0)

    def clips(conditions, _, *keys):
        asked.append(conditions.index(slice(None)).guidance.tolist())
        return torch.zeros(conditions.num_rows, 3, 2, 2, 2)

    monkeypatch.setattr(few_steps, "student_systems", lambda *_: {"student": clips})
    monkeypatch.setattr(few_steps.clip_sets, "scored", lambda video: video)
    scoring = object.__new__(few_steps.Scoring)
    text = tiny.some_conditions(3).text
    two, three = (StoredConditions({"text": text}, {}, torch.arange(rows), torch.device("cpu")) for rows in (2, 3))
    scoring.test, scoring.spread = SimpleNamespace(conditions=two), three
    scoring.evaluation = SimpleNamespace(score=lambda *_: {"fid": {"mean": 1.0}})
    assert scoring(artifacts, "distill", {"audio": 2.0}) == {"fid": 1.0}
    assert asked == [[[1.25, 2.0]] * rows for rows in (2, 2, 3)]
