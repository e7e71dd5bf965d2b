"""examples/own_metric from a folder outside the checkout: scored, compared, and every mistake one line that names the file."""

import shutil
from pathlib import Path

import pytest
import torch

from distill.cli import main
from distill.scoring.clip_io import read_clip
from distill.scoring.clip_sets import open_set
from eval.cards import load_card
from tests.support.eval_sets import a_set, evaluated, refused_in_one_line, report_of

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_metric"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A copy of the example, the working directory, with two sets of clips."""
    for file in EXAMPLE.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, seed in (("real", 0), ("ours", 9), ("others", 30)):
        a_set(tmp_path / name, seed=seed)
    return tmp_path


def words(name: str = "ours") -> tuple[str, ...]:
    return ("--generated", name, "--real", "real", "--protocol", "card.yaml")


def test_it_is_scored_shown_and_compared_like_a_metric_of_the_package(folder, capsys):
    report = evaluated(folder / "one", *words())
    assert report["refused"] == {}
    card = load_card("card.yaml")
    values = []
    for name in report["clips"]:
        ours, real = (read_clip(open_set(folder / x)[name], card, False).video.float() for x in ("ours", "real"))
        change = (ours[:, 1:] - real[:, :1]).abs()
        inner = change[:, :, 2:-2, 2:-2]
        values.append(float((change.sum() - inner.sum()) / (change.numel() - inner.numel())))
    assert report["rows"]["ours"]["clips"]["border"] == pytest.approx(values, rel=1e-5)
    assert report["card"]["metrics"]["border"]["name"] == "border:Border"
    for file in ("eval.md", "eval.html"):
        assert "border" in (folder / "one" / file).read_text()
    assert "| border (grey levels) |" in (folder / "one" / "eval.md").read_text()
    again = evaluated(folder / "again", *words(), "--processes", "1")  # read from its file in another process
    assert again["rows"] == report["rows"]
    evaluated(folder / "two", *words("others"))
    capsys.readouterr()
    assert main(["eval", "compare", "one", "two"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| border |"))
    assert "paired bootstrap" in row


def test_another_code_is_another_card(folder, capsys):
    evaluated(folder / "one", *words())
    (folder / "edited").mkdir()
    shutil.copy(folder / "card.yaml", folder / "edited")
    text = (folder / "border.py").read_text()
    (folder / "edited" / "border.py").write_text(text.replace("abs()", "square()"))
    report = evaluated(folder / "two", *words()[:-1], "edited/card.yaml")
    assert report["rows"] != report_of(folder / "one")["rows"]
    assert main(["eval", "compare", "one", "two"]) == 2
    assert "metrics.border.code is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("def score(", "def scores(", "missing method score: "),
        ("import torch", "import torhc", ":5: ModuleNotFoundError: No module named 'torhc'"),
        (
            "class Border(Metric)",
            "class Border",
            "is no metric: metrics.border in card.yaml; write `from eval.metric import Metric; ",
        ),
        ("class Border", "class Edge", "no class 'Border' (metrics.border in card.yaml); known: Edge"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_it(folder, capsys, old, new, expected):
    file = folder / "border.py"
    file.write_text(file.read_text().replace(old, new))
    line = refused_in_one_line(capsys, folder / "out", *words())
    assert expected in line
    assert str(file) in line


def test_an_unknown_key_is_one_line_that_names_the_card(folder, capsys):
    card = folder / "card.yaml"
    card.write_text(card.read_text().replace("width: 2", "widht: 2"))
    line = refused_in_one_line(capsys, folder / "out", *words())
    assert (
        f"unknown key 'metrics.border.widht' of {folder / 'border.py'}:Border: card.yaml; did you mean 'width'?" in line
    )


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("real.video[:, :1]", "real.video[:, :2]", "RuntimeError: "),
        (
            '{"change": change[:, :, border].mean((0, 2))}',
            "change",
            "features of metric 'border' must be a dict of tensors",
        ),
        ('{"border": Score', '{"edge": Score', "gives a score 'edge' that is no column of it (border)"),
        ('Score.over([clip["change"].mean() for clip in features])', '"much"', "must be (mean, error)"),
    ],
)
def test_a_mistake_when_it_runs_refuses_it_by_file_and_scores_the_others(folder, old, new, expected):
    file = folder / "border.py"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    report = evaluated(folder / "out", *words())
    assert set(report["refused"]) == {"border"}
    assert expected in report["refused"]["border"]
    assert str(file) in report["refused"]["border"]
    assert {"psnr", "motion_energy"} <= set(report["rows"]["ours"]["metrics"])
    assert torch.tensor(report["rows"]["ours"]["metrics"]["psnr"]["mean"]).isfinite()
