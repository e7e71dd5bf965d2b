"""A sweep of two real jobs: equal stages are made once, the others differ, and the table has the reports' scores."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from distill.cli import main
from distill.commands.sweep import command
from distill.commands.sweep import table as sweep_table
from distill.pipeline import train_stages
from distill.pipeline.stages import Pipeline
from distill.recipe import load_recipe
from distill.training.engines.engine import Engine
from tests.distill.commands.sweep.test_command import RECIPE
from tests.support import processes

pytestmark = pytest.mark.slow

SMALL = """\
overrides: [preset=smoke, threads=1, data.text_steps=1, teacher.train.num_steps=1, trajectories.num_pairs=4,
  trajectories.num_steps=3, init.train.num_steps=1, distill.train.num_steps=1, distill.method.fake_updates=1,
  distill.method.warmup=0, distill.train.batch_size=4, eval.num_seeds=1, eval.probe_steps=2,
  eval.num_reference=8, eval.latency_warmup=0, eval.num_samples=1, health.num_conditions=2]
jobs:
  clean: []
  degraded: ["corruption={blur: 0.06, exposure: 1.0, shift: 0.15, static_text: true}"]
"""


def test_two_real_jobs_share_what_is_equal(tmp_path, monkeypatch):
    """Two runs, each a process, and their reports; data, extractors and teacher are made once."""
    monkeypatch.setattr(command, "_start", lambda words, output: processes.Forked(words[3:], output))
    (tmp_path / "small.yaml").write_text(SMALL)
    folder = tmp_path / "runs"
    given = ["-m", f"sweep={tmp_path / 'small.yaml'}", f"sweep_dir={folder}"]
    assert main(["run", str(RECIPE), *given]) == 0, "".join(f.read_text()[-2000:] for f in folder.glob("logs/*.log"))
    stages = {name: {s.name: s for s in (folder / name / "stages").iterdir()} for name in ("clean", "degraded")}
    for stage in ("data", "extractors", "teacher"):
        inodes = [(stages[name][stage] / "fingerprint.json").stat().st_ino for name in stages]
        assert inodes[0] == inodes[1], f"{stage} was made twice"
    for stage in ("trajectories", "init", "distill"):
        marks = [json.loads((stages[name][stage] / "fingerprint.json").read_text())["fingerprint"] for name in stages]
        assert marks[0] != marks[1]
    assert set(stages["degraded"]) - set(stages["clean"]) == {"corrupted"}
    with (folder / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["done", "done"]
    for row in rows:
        student = json.loads((folder / row["job"] / "report.json").read_text())["systems"]["student"]
        admitted = {name: score["mean"] for name, score in student["metrics"].items() if name in sweep_table.METRICS}
        assert {name: float(row[name]) for name in sweep_table.METRICS if row[name]} == admitted
    assert yaml.safe_load((folder / "degraded" / "recipe.yaml").read_text())["reuse"] == [str(folder)]
    made = [load_file(stages[name]["trajectories"] / "shard-00000.safetensors") for name in ("clean", "degraded")]
    assert not all(torch.equal(made[0][key], made[1][key]) for key in made[0])
    _check_who_sees_what(folder / "degraded", monkeypatch)


def _check_who_sees_what(run: Path, monkeypatch) -> None:
    """The teacher is trained on clean clips, the student is distilled on corrupted ones."""
    recipe = load_recipe(run / "recipe.yaml")
    engine, batches = Engine(recipe.engine), {}
    pipeline = Pipeline(recipe, engine)
    monkeypatch.setattr(
        train_stages, "run_training", lambda _, stage, *given, **more: batches.setdefault(stage, given[4]) and {}
    )
    for name in ("teacher", "distill"):
        pipeline.stages[name].run(pipeline.artifacts, run)
    engine.close()
    rows = torch.arange(4)
    for stage, source in (("teacher", "data"), ("distill", "corrupted")):
        stored = load_file(run / "stages" / source / "shard-00000.safetensors")
        seen = batches[stage](rows, "cpu").conditions
        assert torch.equal(seen.reference, stored["x0"][:4, :, :1].float())
        assert torch.equal(seen.audio, stored["audio"][:4])
