"""`distill report compare`: scores beside each other where they are of one scale, and a clear line where they are not."""

import json
from pathlib import Path

import pytest
import yaml

from distill.cli import main
from eval.report.run_report import write_report
from tests.eval.report.test_report import small_report

NOT = "NOT COMPARABLE: b with a: "


def a_run(folder: Path, recipe: dict, change=lambda report: None) -> Path:
    """A finished run as `distill run` leaves it, its report changed before it is written."""
    (folder / "samples").mkdir(parents=True)
    videos = {"nods": {name: folder / "samples" / f"{name}.mp4" for name in ("real", "student")}}
    for name, file in videos["nods"].items():
        file.write_text(f"{folder.name} {name}")
    report = small_report()
    change(report)
    write_report(report, {}, {}, videos, folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"run_dir": str(folder), "reuse": None, **recipe}))
    return folder


def compare(tmp_path: Path, change, capsys) -> list[str]:
    """What stdout says of a run and of one that is changed."""
    runs = [a_run(tmp_path / "a", {"seed": 0, "distill": {"steps": 4}})]
    runs.append(a_run(tmp_path / "b", {"seed": 1, "distill": {"steps": 4, "gan": None}}, change))
    assert main(["report", "compare", *map(str, runs), "--out", str(tmp_path / "out" / "page.html")]) == 0
    return capsys.readouterr().out.splitlines()


def row(lines: list[str], name: str) -> list[str]:
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith(f"| {name}")]
    return found[0][1:] if found else []


def test_runs_of_one_protocol_stand_in_one_table_and_their_videos_in_step(tmp_path, capsys):
    def faster(report):
        report["systems"]["student"]["metrics"]["fid"]["mean"] = 0.9
        report["systems"]["student"]["cost"]["seconds_per_video_second"] = 0.04
        report["protocol"]["run"]["admitted"]["sync"] = False
        report["protocol"]["sha256"] = "another"
        report["device"]["threads"] = 4

    lines = compare(tmp_path, faster, capsys)
    assert lines[0] == "Comparable: the same protocol, extractors and held-out clips."
    assert lines[1] == "Costs of b and a were measured differently: device.threads."
    assert row(lines, "FID (lower") == ["1.00 ± 0.010 (se 0.020)", "0.900 ± 0.010 (se 0.020)"]
    assert row(lines, "sync (-1") == ["0.771 ± 0.010 (se 0.020)", "not admitted"]
    assert row(lines, "seconds per video second") == ["0.0800", "0.0400"]
    assert row(lines, "seed") == ["0", "1"]
    assert row(lines, "distill.gan") == ["-", "null"]
    assert row(lines, "distill.steps") == row(lines, "run_dir") == []
    page = (tmp_path / "out" / "page.html").read_text()
    assert page.count("<video controls") == 3  # real, and the student of each
    assert "<figcaption>b</figcaption>" in page


def other_extractors(report):
    report["protocol"] |= {"probes": "b" * 64, "sha256": "another"}


def fewer_clips(report):
    report["protocol"]["run"]["counts"]["num_conditions"] = 7
    report["protocol"]["sha256"] = "another"


def other_clips(report):
    report["floor"]["fid"]["mean"] = 0.6


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (other_extractors, "other extractors (aaaaaaaaaaaa and bbbbbbbbbbbb)"),
        (fewer_clips, "another protocol (run.counts.num_conditions is 144 here and 7 there)"),
        (other_clips, "other real clips (the floor's FID is 0.500 and 0.600)"),
    ],
)
def test_runs_of_two_scales_are_named_as_such(change, why, tmp_path, capsys):
    lines = compare(tmp_path, change, capsys)
    assert lines[0] == f"{NOT}{why}; compare each with its own teacher only."
    page = (tmp_path / "out" / "page.html").read_text()
    assert NOT in page
    assert "<video" not in page


def test_what_is_no_pair_of_finished_runs_is_refused(tmp_path, capsys):
    run = a_run(tmp_path / "a", {})
    (tmp_path / "empty").mkdir()
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "report.json").write_text(json.dumps({"systems": {}}))
    for others, words in {
        (): "one run is no comparison",
        ("a",): "a run is given twice",
        ("empty",): "no finished run",
        ("eval",): "no report of a run",
    }.items():
        assert main(["report", "compare", str(run), *(str(tmp_path / name) for name in others)]) == 2
        assert words in capsys.readouterr().err
    assert not Path("compare.html").exists()
