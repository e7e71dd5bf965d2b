"""examples/own_method from a folder outside the checkout: it runs whole, its mathematics holds, a mistake in it names its file."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

from distill.cli import main
from distill.compose import RECIPES
from tests.distill.methods.test_gaussian import AffineStudent, LearnedGaussian, frames, oracle
from tests.distill.methods.test_oracle import distil, moments
from tests.support.processes import finish
from tests.support.runs import SMALL

EXAMPLE = RECIPES.parent / "examples" / "own_method"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "mine"
    shutil.copytree(EXAMPLE, folder)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of a copy of the example, which lies beside it."""
    folder = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("outside") / "mine")
    run = folder.parent / "run"
    finish(["run", str(folder / "score_identity.yaml"), *SMALL, f"run_dir={run}"])
    return run


@pytest.mark.slow
def test_it_runs_whole(finished):
    report = json.loads((finished / "report.json").read_text())
    assert {"teacher", "init", "student"} <= set(report["systems"])
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    own = [row for row in rows if row["stage"] == "distill" and "student/sid_grad_abs" in row]
    assert len(own) == 2
    assert all(row["student/sid_grad_abs"] > 0 for row in own)
    done = json.loads((finished / "stages/distill/fingerprint.json").read_text())
    assert "score_identity.py" in json.dumps(done["config"])
    assert str(finished.parent) not in json.dumps(done["config"]["distill"]), "another folder is no other method"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("def build(", "def make(", "missing function build: {file}"),
        ("class Config:", "class Settings:", "{file}:33: NameError"),
        ("@dataclass(frozen=True, kw_only=True)", "", "{file}:Config is no frozen dataclass"),
        ("    alpha: float = 1.0\n", "", "unknown key 'distill.method.alpha' of {file}:Config"),
        ("import torch\n", "import torhc\n", "{file}:"),
    ],
)
def test_a_mistake_in_it_is_one_line_that_names_its_file(place, capsys, old, new, words):
    file = place / "score_identity.py"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    assert main(["run", str(place / "score_identity.yaml"), *SMALL, "run_dir=run"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words.format(file=file) in line
    assert not Path("run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("flow.add_noise(clip, eps, sigma)", "flow.add_noise(clip, eps[:1, :1, :1, :, :7], sigma)", "{file}:"),
        ('return Loss(value, {"loss": value.detach()})', "return value", "{file}: a method's loss must be a Loss"),
        ('trained=("student", "fake_score")', 'trained=("student", "critic")', "distill.method: no role 'critic'"),
    ],
)
def test_a_mistake_while_it_trains_is_one_line(finished, place, capsys, old, new, words):
    file = place / "score_identity.py"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    words_of = ["run", str(place / "score_identity.yaml"), *SMALL, "run_dir=run", f"reuse={finished}"]
    assert main(words_of) == 2
    lines = capsys.readouterr().err.splitlines()
    assert sum(words.format(file=file) in line for line in lines) == 1


@pytest.mark.slow
def test_sid_converges_to_the_gaussian():
    student, teacher = AffineStudent((1.0,)), oracle()
    spec = importlib.util.spec_from_file_location("score_identity_example", EXAMPLE / "score_identity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    config = module.Config(fake_updates=6, shift=1.0)
    distil(module.ScoreIdentity(config, student, teacher, LearnedGaussian()), 240)
    mean, covariance, one = moments(student, 30_000)
    assert (mean - frames(teacher.expectation(one))[0]).abs().max() < 0.04
    assert (covariance - teacher.covariance).norm() < 0.06 * teacher.covariance.norm()
