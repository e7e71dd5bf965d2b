"""examples/own_data from a folder outside the checkout: it runs whole, and a mistake in it is one line that names its file."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from distill.cli import main
from distill.compose import RECIPES
from distill.data.source import UNLABELLED
from distill.recipe import load_recipe
from tests.support.processes import finish
from tests.support.runs import SMALL

EXAMPLE = RECIPES.parent / "examples" / "own_data"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "mine"
    shutil.copytree(EXAMPLE, folder)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.slow
def test_it_runs_whole(place):
    run = place.parent / "run"
    finish(["run", str(place / "discs.yaml"), *SMALL, f"run_dir={run}"])
    report = json.loads((run / "report.json").read_text())
    assert report["left_out"] == dict(UNLABELLED)
    assert {"fid", "fvd"} <= {*report["systems"]["student"]["metrics"], *report["systems"]["student"]["not_admitted"]}
    assert "fid_student_over_teacher" in report["targets"]
    assert "sync_teacher" not in report["targets"]
    assert "discs that open with a sound" in (run / "student/README.md").read_text()


def test_its_clips_are_a_function_of_seed_and_name(place):
    source = load_recipe(place / "discs.yaml", SMALL).data.open()
    first, again, other = (source.draw(1, name, 4) for name in ("test", "test", "reference"))
    assert torch.equal(first.video, again.video)
    assert torch.equal(first.audio, again.audio)
    assert not torch.equal(first.video, other.video)
    (shard,) = source.train(1, [0])
    assert shard.video.shape[0] == 16


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("def clips(", "def films(", "NotImplementedError"),
        ("dim=1)\n        audio", "dim=1)[:, 1:]\n        audio", "discs.py:Config: clips(.., "),
        (".to(torch.uint8)", ".float()", "gives torch.float32 video"),
        ("class Config(ClipsConfig):", "class Config:", "{file}:Config is no data source"),
        ("def open(self)", "def opened(self)", "{file}"),
        ("torch.rand(num, frames, generator=rng) *", "torch.rand(num, 2 * frames, generator=rng) *", "{file}:"),
    ],
)
def test_a_mistake_in_it_is_one_line_that_names_its_file(place, capsys, old, new, words):
    file = place / "discs.py"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    assert main(["run", str(place / "discs.yaml"), *SMALL, "run_dir=run"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert words.format(file=file) in last
    assert "discs.py" in last
