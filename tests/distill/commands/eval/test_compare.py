"""Reports of `distill eval` side by side: compare, benchmark, scores of other programs, golden numbers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.cli import main
from distill.commands.eval import compare
from distill.scoring.clip_io import read_clip, write_clip
from distill.scoring.clip_sets import open_set
from eval import golden
from eval.cards import load_card
from teachers.errors import UserError
from tests.eval.metrics.test_lip_sync import Code, coded
from tests.support.eval_sets import FPS, a_card, a_run, a_set, evaluated, refused_in_one_line, report_of
from tests.support.tiny import rng


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    return a_run(tmp_path_factory.mktemp("run"))


# ---- comparing


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Path:
    """Three systems on the same clips: near, far and far again; and near under another card."""
    folder = tmp_path_factory.mktemp("scored")
    real = a_set(folder / "HDTF", "abcdefgh", frames=12)
    for name, noise in (("near", 4), ("far", 40)):
        (folder / name).mkdir()
        for path in sorted(real.glob("*.safetensors")):
            take = read_clip(open_set(real)[path.stem], load_card("strict"), False)
            moved = take.video + torch.randn(take.video.shape, generator=rng(noise, ord(path.stem))) * noise
            write_clip(folder / name / path.name, moved.clamp(0, 255).byte(), FPS, take.sound)
        evaluated(folder / f"{name}-out", "--generated", folder / name, "--real", real, "--protocol", "strict",
                  "--metrics", "psnr,quality,motion_energy")  # fmt: skip
    other = a_card(folder / "other.yaml", clips__given=2)
    evaluated(
        folder / "card-out", "--generated", folder / "near", "--real", real, "--protocol", other, "--metrics", "psnr"
    )
    return folder


def test_compare_prints_paired_differences(scored, capsys):
    assert main(["eval", "compare", str(scored / "near-out" / "eval.json"), str(scored / "far-out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("| PSNR"))
    near, far = (report_of(scored / f"{name}-out")["rows"][name]["clips"]["psnr"] for name in ("near", "far"))
    change, low, high = compare.bootstrap(torch.tensor(near), torch.tensor(far))
    assert change == pytest.approx(np.mean(np.array(near) - np.array(far)))
    assert 0 < low < change < high
    error = np.std(np.array(near) - np.array(far), ddof=1) / 8**0.5
    assert (high - low) / 2 == pytest.approx(1.96 * error * (7 / 8) ** 0.5, rel=0.1)
    assert f"+{change:.1f}" in row
    assert "paired bootstrap" in row
    assert lines[0].startswith("protocol strict ")


def test_compare_of_distances_uses_the_kept_features(run_folder, tmp_path, capsys):
    real = a_set(tmp_path / "real")
    words = ("--real", real, "--protocol", "embedded", "--extractors", run_folder / "stages" / "extractors")
    for number in (1, 2):
        ours = a_set(tmp_path / f"x{number}", seed=30 * number)
        evaluated(tmp_path / f"out{number}", "--generated", ours, *words)
    assert main(["eval", "compare", str(tmp_path / "out1"), str(tmp_path / "out2")]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| FID", "| KID", "| FVD"))]
    assert len(rows) == 3
    assert all("paired jackknife" in row for row in rows)
    shutil.rmtree(tmp_path / "out2" / "features")
    main(["eval", "compare", str(tmp_path / "out1"), str(tmp_path / "out2")])
    assert "| no values for single clips |" in capsys.readouterr().out


def test_compare_refuses_two_cards_other_clips_and_no_report(scored, tmp_path, capsys):
    def refusal(one: Path, two: Path) -> str:
        assert main(["eval", "compare", str(one), str(two)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "two protocols cannot be compared: clips.given is 1 here and 2 there" in refusal(
        scored / "near-out", scored / "card-out"
    )
    report = report_of(scored / "near-out")
    fewer = {**report, "n": 7, "clips": report["clips"][:7]}
    (tmp_path / "eval.json").write_text(json.dumps(fewer))
    assert "two sets of clips cannot be compared: 8 and 7 clips, first h" in refusal(scored / "near-out", tmp_path)
    assert "no scores" in refusal(scored / "near-out", tmp_path / "none")
    (tmp_path / "eval.json").write_text("{}")
    assert "no scores of distill eval" in refusal(scored / "near-out", tmp_path)


# ---- benchmark


@pytest.mark.slow
def test_benchmark_is_one_table_with_the_papers_rows_marked_theirs(run_folder, tmp_path, capsys):
    sets = [a_set(tmp_path / name, seed=seed) for name, seed in (("HDTF", 0), ("mine", 70))]
    folder = tmp_path / "films"
    for number, real in enumerate(sets):
        a_set(folder / real.name, seed=20 + 10 * number)
    words = [
        "--students",
        f"ours={run_folder / 'student'}",
        f"theirs={folder}",
        "--data",
        *(f"{x.name}={x}" for x in sets),
    ]
    words += [
        "--protocol",
        "embedded",
        "--extractors",
        str(run_folder / "stages" / "extractors"),
        "--table",
        str(tmp_path / "t"),
    ]
    assert main(["eval", "benchmark", *words]) == 3  # sync was not admitted
    shown = capsys.readouterr().out
    table = json.loads((tmp_path / "t" / "benchmark.json").read_text())
    assert {name: list(rows) for name, rows in table["data"].items()} == {
        "HDTF": ["ours", "theirs"],
        "mine": ["ours", "theirs"],
    }
    hdtf, hdtf_free, mine, _ = table["tables"]
    assert [column["name"] for column in hdtf_free["columns"]][:2] == ["motion energy", "sharpness"]
    assert len(hdtf_free["rows"]) == 3
    names = [row["name"] for row in hdtf["rows"]]
    rows = [(row["name"], row["card"]) for row in hdtf["rows"]]
    assert names[:4] == ["ground truth", "real against real", "ours", "theirs"]
    for method in ("LiveTalk", "OmniAvatar-14B", "Hallo3", "FantasyTalking", "AniPortrait"):
        assert (method, "theirs: LiveTalk") in rows
    assert ("OmniAvatar-14B", "theirs: OmniAvatar") in rows
    assert any("arXiv 2512.23576v1, table 1" in note for note in hdtf["notes"])
    assert len(mine["rows"]) == 4
    theirs = [row for row in hdtf["rows"] if row["kind"] == "theirs"]
    assert all("theirs" in row["card"] for row in theirs)
    assert [row["n"] for row in hdtf["rows"]][:4] == ["5", "2", "5", "5"]
    livetalk = next(row for row in theirs if row["name"] == "LiveTalk")
    fid = [column["name"] for column in hdtf["columns"]].index("FID")
    assert livetalk["cells"][fid]["value"] == "13.68"
    assert "| LiveTalk | theirs: LiveTalk |  | 13.68 |" in shown
    assert (tmp_path / "t" / "benchmark.html").read_text().count('class="theirs"') == len(theirs)
    assert len(list((tmp_path / "t" / "features").iterdir())) == 2 * 5 * 9 * 3  # the real clips were read once


def test_rows_of_another_n_or_card_are_refused(scored, tmp_path, capsys):
    near, far, other = (report_of(scored / f"{name}-out") for name in ("near", "far", "card"))
    far = {**far, "n": 7, "clips": far["clips"][:7]}
    paths = []
    for number, report in enumerate(
        (near, far, {**other, "name": "x", "rows": {**other["rows"], "x": other["rows"]["near"]}})
    ):
        paths.append(str(tmp_path / f"{number}.json"))
        Path(paths[-1]).write_text(json.dumps(report))
    words = ["eval", "benchmark", "--reports", *paths, "--table", str(tmp_path / "t"), "--no-published"]
    assert main(words) == 3
    table = json.loads((tmp_path / "t" / "benchmark.json").read_text())
    assert list(table["data"]["HDTF"]) == ["near"]
    assert "N differs, 7 clips and 8" in table["refused"]["far on HDTF"]
    assert "another protocol, clips.given is 1 here and 2 there" in table["refused"]["x on HDTF"]
    assert main(["eval", "benchmark", "--students", "x", "--data", f"HDTF={scored}", "--table", str(tmp_path)]) == 2
    assert "--students takes NAME=DIR" in capsys.readouterr().err


# ---- other programs, golden numbers


def test_scores_of_another_program_stand_apart(scored, tmp_path, capsys):
    clips = report_of(scored / "near-out")["clips"]
    given = {
        "metric": "iqa",
        "made_by": "a program",
        "generated": dict.fromkeys(clips, 3.5),
        "real": dict.fromkeys(clips, 4.0),
    }
    given["generated"]["a"] = 4.3
    path = tmp_path / "iqa.json"
    path.write_text(json.dumps(given))
    words = (
        "--generated",
        scored / "near",
        "--real",
        scored / "HDTF",
        "--protocol",
        "strict",
        "--metrics",
        "psnr",
        "--scores",
        path,
    )
    report = evaluated(tmp_path / "out", *words)
    assert report["rows"]["near"]["metrics"]["iqa"]["mean"] == pytest.approx(3.6)
    assert report["rows"]["ground_truth"]["metrics"]["iqa"] == {"mean": 4.0, "error": 0.0}
    assert "iqa was made by a program." in capsys.readouterr().out
    two = {**report, "adapters": {"iqa": "another"}}
    with pytest.raises(UserError, match="'iqa' was made by a program here and by another there"):
        compare.check_same(report, two)
    for change, message in (
        ({"metric": "fid"}, "'fid' is a metric of distill eval"),
        ({"generated": {"a": 1.0}}, "has 1 clips, 8 are scored; the first that differs: b"),
        ({"made_by": ""}, "cannot be read"),
        ({"generated": {**given["generated"], "a": None}}, "no finite number"),
    ):
        path.write_text(json.dumps(given | change))
        assert message in refused_in_one_line(capsys, tmp_path / "none", *words)


def test_golden_names_what_is_missing_and_remembers_what_passed(tmp_path, monkeypatch):
    monkeypatch.setenv("AVATAR_DISTILL_WEIGHTS", str(tmp_path))
    results = golden.run()
    assert [result.passed for result in results] == [None, None]
    assert "syncnet_v2.model is not there" in results[0].found
    assert "i3d_torchscript.pt is not there" in results[1].found
    assert golden.remembered() == {}
    monkeypatch.setattr(golden, "locate", lambda name: tmp_path / name)
    monkeypatch.setattr(golden, "_syncnet", lambda: ("3 / 5.353 / 10.021", "3 / 5.350 / 10.020", True))
    monkeypatch.setattr(golden, "_fvd", lambda: ("151.256", "12.000", False))
    assert [result.passed for result in golden.run()] == [True, False]
    assert {name: row["passed"] for name, row in golden.remembered().items()} == {
        "SyncNet example": True,
        "FVD vector": False,
    }
    rows = json.loads((tmp_path / "golden.json").read_text())
    rows[0]["sha256"][0] = "0" * 64
    (tmp_path / "golden.json").write_text(json.dumps(rows))
    assert list(golden.remembered()) == ["FVD vector"]


def test_golden_measures_what_the_authors_measured(tmp_path, monkeypatch):
    """The vector: zeros against ones, 8 x 30 x 64 x 64, common_metrics, N - 1; the example: whole frames, JPEG, lags to 15."""
    asked = {}

    class Network:
        def features(self, videos, variant):
            asked[int(videos.max())] = (tuple(videos.shape), variant, int(videos.min()))
            return torch.full((8, 400), float(videos.float().mean()) / 255 * 0.615)  # 400 * 0.615^2 = 151.29

    monkeypatch.setattr("eval.networks.i3d.I3D.load", classmethod(lambda cls: Network()))
    _, found, passed = golden._fvd()
    assert asked == {0: ((8, 3, 30, 64, 64), "common_metrics", 0), 255: ((8, 3, 30, 64, 64), "common_metrics", 255)}
    assert passed
    assert float(found) == pytest.approx(151.29, abs=1e-3)
    frames, samples = coded(3)
    big = frames.permute(0, 2, 3, 1).repeat(1, 10, 10, 1)[:, :224, :224].contiguous()
    jpeg = golden.through_jpeg(big)
    assert jpeg.shape == big.shape
    assert 0 < (jpeg.float() - big.float()).abs().mean() < 20
    scores = golden._sync_of(Code(), big, samples)
    assert (scores.offset_frames, len(scores.curve)) == (-3, 31)


def test_the_report_says_what_golden_found(scored, tmp_path, monkeypatch):
    from eval.report.clip_report import headline

    report = report_of(scored / "near-out")
    assert any("Golden SyncNet example: not run" in line for line in headline(report))
    report["golden"] = {"SyncNet example": {"expected": "3", "found": "3", "passed": True}}
    assert any("Golden SyncNet example: passed" in line for line in headline(report))
