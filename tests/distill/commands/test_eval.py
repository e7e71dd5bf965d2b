"""`distill eval`: one command from clips to a table, resumed, the same for any order, batch and number of processes."""

import math
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from distill.cli import main
from distill.pipeline.health import seam_frames
from distill.scoring import scoring
from distill.scoring.clip_sets import facts_of, open_set, read_clip, write_clip
from distill.scoring.generate import GenerateJob
from eval.cards import load_card
from eval.embedded.extractors import Probes
from students.weights.checkpoint import load_student
from tests.support.eval_sets import FPS, a_clip, a_run, a_set, evaluated, numbers, refused_in_one_line, report_of
from tests.support.films import numbered, write_film
from tests.support.tiny import some_sound


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    return a_run(tmp_path_factory.mktemp("run"))


def test_a_student_is_drawn_scored_told_and_resumed(run_folder, tmp_path, capsys, monkeypatch):
    real, out = a_set(tmp_path / "real"), tmp_path / "out"
    words = ("--student", run_folder / "student", "--real", real, "--protocol", "embedded")
    first = evaluated(out, *words)
    shown = capsys.readouterr()
    assert "student on real" in shown.out
    assert "draw" in shown.err
    assert first["n"] == 5
    assert first["clips"] == ["a", "b", "c", "d", "e"]
    assert set(first["rows"]) == {"ground_truth", "floor", "student"}
    assert first["rows"]["floor"]["n"] == 2
    ours = first["rows"]["student"]["metrics"]
    assert {"fid", "kid", "fvd", "identity", "motion_energy"} <= set(ours)
    assert all(score["error"] >= 0 for name, score in ours.items() if name in ("fid", "fvd", "kid"))
    assert "sync" not in ours
    assert first["refused"] == {"sync": "sync refused: the run's extractors did not rank known cases right"}
    card = first["card"]
    assert card["fid"]["sha256"] == Probes.load(run_folder / "stages" / "extractors").sha256
    assert f"embedded {card['sha256'][:12]}" in shown.out
    html = (out / "eval.html").read_text()
    assert html.count("<table>") == 2
    assert "data:image/png;base64," in html
    assert card["sha256"] in html

    starts = " ".join(map(str, seam_frames(load_student(run_folder / "student").spec)))
    assert starts
    assert {facts_of(path)["chunks"] for path in (out / "drawn").glob("*")} == {starts}
    assert ours["seam"]["mean"] > 0
    drawn = {path: path.stat().st_mtime_ns for path in (out / "drawn").glob("*")}
    features = {path: path.stat().st_mtime_ns for path in (out / "features").glob("*")}
    assert len(drawn) == 5
    assert len(features) == 2 * 5 * 3  # probes, quality, shape
    lost, half = sorted(features)[0], sorted(drawn)[0]
    lost.unlink()
    half.unlink()
    (out / "eval.json").unlink()
    assert numbers(evaluated(out, *words)) == numbers(first)
    again = {path: path.stat().st_mtime_ns for path in (*drawn, *features)}
    assert {path for path, time in again.items() if time != (drawn | features)[path]} == {lost, half}

    shutil.copytree(real, tmp_path / "not" / "drawn")
    assert "was not drawn by distill eval" in refused_in_one_line(capsys, tmp_path / "not", *words)
    assert evaluated(tmp_path / "other", *words, "--seed", 1)["rows"]["student"] != first["rows"]["student"]


def test_order_batch_and_processes_change_nothing(run_folder, tmp_path):
    real, ours = a_set(tmp_path / "real"), a_set(tmp_path / "ours", seed=50)
    words = ("--protocol", "embedded", "--extractors", run_folder / "stages" / "extractors", "--name", "x")
    base = numbers(evaluated(tmp_path / "one", "--generated", ours, "--real", real, *words))
    assert len(base) > 15
    renamed = {}
    for folder in (real, ours):
        renamed[folder] = tmp_path / f"{folder.name}-renamed"
        renamed[folder].mkdir()
        for old, new in zip("abcde", ("z", "y", "x", "w", "v"), strict=True):
            shutil.copy(folder / f"{old}.safetensors", renamed[folder] / f"{new}.safetensors")
    again = evaluated(
        tmp_path / "two", "--generated", renamed[ours], "--real", renamed[real], *words, "--batch-size", 1
    )
    assert sorted(again["clips"]) == again["clips"] == ["v", "w", "x", "y", "z"]
    many = evaluated(tmp_path / "three", "--generated", ours, "--real", real, *words, "--processes", 2)
    for other in (numbers(again), numbers(many)):
        floor = {key for key in base if key[0] == "floor"}  # its halves are drawn by place
        for key in base.keys() - floor:
            assert other[key] == pytest.approx(base[key], rel=1e-6, abs=1e-6), key
    assert numbers(many) == base


def test_the_same_clips_have_distance_0(run_folder, tmp_path):
    real = a_set(tmp_path / "real")
    report = evaluated(tmp_path / "out", "--generated", real, "--real", real, "--protocol", "embedded", "--extractors",
                       run_folder / "stages" / "extractors")  # fmt: skip
    row = report["rows"]["real"]["metrics"]
    assert abs(row["fid"]["mean"]) < 1e-6
    assert abs(row["fvd"]["mean"]) < 1e-6
    assert row["kid"]["mean"] < 0
    assert row["identity"] == report["rows"]["ground_truth"]["metrics"]["identity"]


def test_the_noise_of_a_clip_is_its_names_alone(run_folder, tmp_path):
    """Equal conditions under two names are drawn differently, and alone as among others."""
    real, alone = tmp_path / "real", tmp_path / "alone"
    for folder, names in ((real, "abc"), (alone, "b")):
        folder.mkdir()
        for name in names:
            write_clip(folder / f"{name}.safetensors", a_clip(1), FPS, some_sound(19200), "a person nods")
    card = load_card("embedded")
    drawn = {}
    for folder in (real, alone):
        job = GenerateJob(run_folder / "student", 0, None, tmp_path / f"{folder.name}-drawn", "cpu")
        entries = scoring.generate_all(job, open_set(folder), card, 0)
        drawn[folder] = {name: read_clip(entry, card, True).video for name, entry in entries.items()}
    assert not torch.equal(drawn[real]["a"], drawn[real]["b"])
    assert torch.equal(drawn[real]["b"], drawn[alone]["b"])


# ---- bad input, one line each


def damaged(kind: str, ours: Path, real: Path) -> None:
    sound = some_sound(19200)
    if kind == "count":
        (ours / "e.safetensors").unlink()
    elif kind == "names":
        (ours / "e.safetensors").rename(ours / "q.safetensors")
    elif kind == "length":
        write_clip(ours / "b.safetensors", a_clip(1, 13), FPS, sound)
    elif kind == "both":
        for folder in (ours, real):
            write_clip(folder / "b.safetensors", a_clip(1, 13), FPS, sound)
    elif kind == "fps":
        write_clip(ours / "b.safetensors", a_clip(1), Fraction(25), sound)
    elif kind == "size":
        write_clip(ours / "b.safetensors", a_clip(1, side=32), FPS, sound)
    elif kind == "nan":
        video = a_clip(1).float() / 127.5 - 1
        video[0, 7, 3, 3] = math.nan
        write_clip(ours / "b.safetensors", video, FPS, sound)
    elif kind == "range":
        write_clip(ours / "b.safetensors", a_clip(1).float(), FPS, sound)
    elif kind == "shape":
        write_clip(ours / "b.safetensors", a_clip(1)[0], FPS, sound)
    elif kind == "sound":
        write_clip(ours / "b.safetensors", a_clip(1), FPS, torch.full((19200,), math.nan))
    elif kind == "corrupt":
        path = ours / "b.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "film":
        (ours / "b.safetensors").unlink()
        (ours / "b.mp4").write_bytes(b"no film at all")
    elif kind == "twice":
        write_film(ours / "b.mp4", [numbered(n) for n in range(5)], FPS)
    elif kind == "empty":
        for path in ours.iterdir():
            path.unlink()


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("count", "4 generated and 5 real clips; no generated clip for e; clips are matched by name"),
        ("names", "no generated clip for e; no real clip for q"),
        ("length", "1 of 10 clips cannot be scored: generated b: 13 frames of 16 x 16, its real clip 15 of 16 x 16"),
        ("both", "1 of 5 clips differ from a (15 frames of 16 x 16 at 12.5 fps): b: 13 frames"),
        ("fps", "b: generated 15 frames of 16 x 16 at 25 fps, real 15 frames of 16 x 16 at 12.5 fps"),
        ("size", "generated b: 15 frames of 32 x 32, its real clip 15 of 16 x 16"),
        ("nan", "generated b: frames hold NaN or infinity, first frame 7"),
        ("range", "generated b: float frames lie in [-1, 1]"),
        ("shape", "generated b: video must be [3, T, H, W]"),
        ("sound", "generated b: audio must be finite"),
        ("corrupt", "generated b: no clip of tensors"),
        ("film", "b.mp4"),
        ("twice", "two clips of one name: b"),
        ("empty", "no clips in"),
    ],
)
def test_bad_clips_are_told_in_one_line(tmp_path, capsys, kind, told):
    real, ours = a_set(tmp_path / "real"), a_set(tmp_path / "ours", seed=9)
    damaged(kind, ours, real)
    words = ("--generated", ours, "--real", real, "--protocol", "strict", "--metrics", "quality,psnr")
    assert told in refused_in_one_line(capsys, tmp_path / "out", *words)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--protocol", "strict"), "--student or --generated is missing"),
        (("--student", "ours", "--protocol", "strict"), "no student: ours has no spec.json"),
        (("--generated", "ours"), "--protocol is missing"),
        (("--generated", "ours", "--protocol", "stric"), "did you mean 'strict'?"),
        (("--generated", "ours", "--protocol", "livetalk", "--metrics", "quality"), "livetalk scores 100 clips: got 5"),
        (("--generated", "ours", "--protocol", "strict", "--metrics", "fit"), "unknown metric 'fit'"),
        (("--generated", "ours", "--protocol", "embedded"), "no extractors beside"),
        (("--generated", "ours", "--protocol", "strict", "--extractors", "ours"), "--extractors would have no effect"),
        (("--generated", "ours", "--protocol", "strict", "--processes", "-1"), "--processes from 0"),
        (("--generated", "none", "--protocol", "strict", "--metrics", "quality"), "neither a folder nor a manifest"),
        (("--generated", "ours", "--protocol", "strict", "--metrics", "fid"), "nothing can be scored: FID and KID"),
        (("--generated", "ours", "--protocol", "strict", "--device", "tpu"), "--device tpu cannot be used"),
        (("--generated", "ours", "--protocol", "strict", "--name", "floor"), "--name floor is taken"),
        (
            ("--student", "ours", "--protocol", "strict", "--metrics", "quality", "--generated", "ours"),
            "not allowed with",
        ),
    ],
)
def test_bad_options_are_told_in_one_line(tmp_path, capsys, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AVATAR_DISTILL_WEIGHTS", str(tmp_path / "weights"))
    a_set(tmp_path / "real")
    a_set(tmp_path / "ours", seed=9)
    assert told in refused_in_one_line(capsys, Path("out"), "--real", "real", *words)


def test_a_student_needs_sound_and_text(run_folder, tmp_path, capsys):
    real = a_set(tmp_path / "real")
    words = ("--student", run_folder / "student", "--real", real, "--protocol", "embedded")
    write_clip(real / "c.safetensors", a_clip(2), FPS, None, "a person nods")
    write_clip(real / "d.safetensors", a_clip(2), FPS, some_sound(19200))
    told = refused_in_one_line(capsys, tmp_path / "out", *words)
    assert "2 of 5 clips cannot be drawn: c: no sound" in told
    assert "d: no text" in told


def test_a_metric_without_weights_is_refused_and_the_others_are_scored(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("AVATAR_DISTILL_WEIGHTS", str(tmp_path / "weights"))
    real, ours = a_set(tmp_path / "real"), a_set(tmp_path / "ours", seed=9)
    words = ["--generated", ours, "--real", real, "--protocol", "strict", "--out", tmp_path / "out"]
    assert main(["eval", *map(str, words)]) == 3
    report = report_of(tmp_path / "out")
    assert set(report["refused"]) == {"fid", "kid", "fvd", "sync", "identity", "lpips"}
    assert "pt_inception-2015-12-05-6726825d.pth is not there; get" in report["refused"]["fid"]
    assert "syncnet_v2.model" in report["refused"]["sync"]
    assert {"psnr", "ssim", "motion_energy"} <= set(report["rows"]["ours"]["metrics"])
    assert "psnr" not in report["rows"]["ground_truth"]["metrics"]
    for file in ("eval.html", "eval.md"):
        assert "syncnet_v2.model" in (tmp_path / "out" / file).read_text()


def test_one_clip_has_no_distance_and_says_so(run_folder, tmp_path):
    real, ours = a_set(tmp_path / "real", "a"), a_set(tmp_path / "ours", "a", seed=9)
    report = evaluated(tmp_path / "out", "--generated", ours, "--real", real, "--protocol", "embedded", "--extractors",
                       run_folder / "stages" / "extractors")  # fmt: skip
    assert "at least 2 rows a side" in report["refused"]["fvd"]
    assert "at least 3 clips" in report["refused"]["fid"]
    assert report["rows"]["ours"]["metrics"]["motion_energy"]["error"] is None
