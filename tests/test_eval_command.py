"""`distill eval`: one command from clips to a table, resumed, the same for any order, batch and number of processes."""

import json
import math
import shutil
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from films import number_of, numbered, write_film
from test_lip_sync import Code, coded
from tiny import a_bundle, rng, some_sound

from distill import clip_sets, eval_compare, scoring
from distill.cli import main
from distill.clip_sets import open_set, read_clip, write_clip
from distill.data.world import FRAME_LABELS
from distill.drawing import Drawing
from eval import clip_scores, golden
from eval.cards import Card, load_card
from eval.clip_scores import Extractors
from eval.extractors import ClipProbe, Ear, FrameProbe, Probes
from eval.frechet import frechet_distance
from eval.lip_sync import score_clip
from students.checkpoint import save_student
from teachers.errors import UserError
from teachers.typed import convert, to_plain

FPS = Fraction(25, 2)
FRAMES, SIDE = 15, 16


def a_clip(seed: int, frames: int = FRAMES, side: int = SIDE) -> torch.Tensor:
    """uint8 [3, T, H, W] that moves."""
    still = torch.rand(3, 1, side, side, generator=rng(seed, 1))
    moving = torch.rand(3, frames, side, side, generator=rng(seed, 2))
    return (255 * (0.7 * still + 0.3 * moving)).byte()


def a_set(folder: Path, names=("a", "b", "c", "d", "e"), seed: int = 0, frames: int = FRAMES, fps=FPS, **other) -> Path:
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        sound = some_sound(round(frames * 16000 / fps), number)
        clip = a_clip(seed + number, frames, other.get("side", SIDE))
        write_clip(folder / f"{name}.safetensors", clip, fps, sound, "a person nods")
    return folder


def a_card(path: Path, base: str = "strict", **changes) -> str:
    """A card as a file; changes are `rule__key=value`."""
    values = to_plain(load_card(base))
    for key, value in changes.items():
        rule, _, name = key.partition("__")
        if name:
            values[rule][name] = value
        else:
            values[rule] = value
    path.write_text(yaml.safe_dump(values))
    return str(path)


def probes(folder: Path) -> Path:
    """Untrained extractors as a run keeps them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        labels = len(FRAME_LABELS)
        frame, clip, ear = FrameProbe(labels, 4, 14), ClipProbe(labels, 4), Ear(80)
    scales = {"label_mean": torch.zeros(labels), "label_std": torch.ones(labels)}
    scales |= {"audio_mean": torch.zeros(80), "audio_std": torch.ones(80)}
    Probes(frame, clip, ear, tuple(FRAME_LABELS), scales).save(folder)
    return folder


def report_of(out: Path) -> dict:
    return json.loads((out / "eval.json").read_text())


def numbers(report: dict) -> dict:
    return {
        (row, name): score["mean"]
        for row, values in report["rows"].items()
        for name, score in values["metrics"].items()
        if score["mean"] is not None
    }


def evaluated(out: Path, *words) -> dict:
    assert main(["eval", "--out", str(out), *map(str, words)]) in (0, 3)
    return report_of(out)


def refused_in_one_line(capsys, out: Path, *words) -> str:
    """What is told; the exit is 2 and no report is left."""
    capsys.readouterr()
    assert main(["eval", "--out", str(out), *map(str, words)]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "distill:" in line]
    assert len(told) == 1
    assert not list(out.glob("eval.*"))
    assert "Traceback" not in told[0]
    return told[0]


# ---- the whole way


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_student(folder / "student", a_bundle(), "# card")
    probes(folder / "stages" / "extractors")
    admitted = dict.fromkeys(("fid", "kid", "fvd", "identity"), True) | {"sync": False}
    (folder / "stages" / "extractors" / "fingerprint.json").write_text(json.dumps({"metrics": {"admitted": admitted}}))
    return folder


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


# ---- what a card says reaches the numbers


class Frames(Extractors):
    """Stand-ins of the published networks: small fixed functions of what they are given."""

    seen: list = []  # noqa: RUF012

    @cached_property
    def inception(self):
        class Network:
            @staticmethod
            def features(frames, batch_size, variant):
                del batch_size
                Frames.seen.append((tuple(frames.shape), variant))
                cells = torch.nn.functional.adaptive_avg_pool2d(frames.float() / 255, 2)
                return cells.flatten(1) * (1 if variant == "tf1" else 2)

        return Network()

    @cached_property
    def i3d(self):
        class Network:
            @staticmethod
            def features(videos, batch_size, variant):
                del batch_size
                Frames.seen.append((tuple(videos.shape), variant))
                return videos.float().div(255).mean((3, 4)).std(2) * (1 if variant == "stylegan_v" else 2)

        return Network()

    @cached_property
    def syncnet(self):
        return Code()


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(scoring, "Extractors", Frames)
    monkeypatch.setattr(clip_scores, "locate", lambda name: name)
    scoring._extractors.cache_clear()
    Frames.seen.clear()
    yield Frames.seen
    scoring._extractors.cache_clear()


def test_distances_follow_the_card(stand_ins, tmp_path):
    real, ours = a_set(tmp_path / "real"), a_set(tmp_path / "ours", seed=9)
    base = ("--generated", ours, "--real", real, "--metrics", "fid,fvd")

    def score(number: int, **changes) -> dict:
        card = a_card(tmp_path / f"{number}.yaml", name=f"card {number}", **changes)
        return evaluated(tmp_path / str(number), *base, "--protocol", card)["rows"]["ours"]["metrics"]

    plain = score(0)
    rows = {}
    for name, folder in (("real", real), ("ours", ours)):
        clips = [entry for _, entry in sorted(open_set(folder).items())]
        videos = torch.stack([read_clip(entry, load_card("strict"), False).video for entry in clips])
        cells = torch.nn.functional.adaptive_avg_pool2d(videos[:, :, 1:].transpose(1, 2).flatten(0, 1).float() / 255, 2)
        rows[name] = cells.flatten(1), videos.float().div(255).mean((3, 4)).std(2)
    assert plain["fid"]["mean"] == pytest.approx(frechet_distance(rows["ours"][0], rows["real"][0]), rel=1e-6)
    assert plain["fvd"]["mean"] == pytest.approx(frechet_distance(rows["ours"][1], rows["real"][1]), rel=1e-6)
    assert {shape[0] for shape, variant in stand_ins if variant == "tf1"} == {FRAMES - 1}
    biased = score(1, fvd__ddof=0, fid__ddof=0)
    assert biased["fvd"]["mean"] == pytest.approx(frechet_distance(rows["ours"][1], rows["real"][1], 0), rel=1e-6)
    assert biased["fid"]["mean"] != plain["fid"]["mean"]
    assert score(2, fid__resize="pytorch_fid")["fid"]["mean"] == pytest.approx(4 * plain["fid"]["mean"], rel=1e-6)
    assert score(3, fvd__resize="common_metrics")["fvd"]["mean"] == pytest.approx(4 * plain["fvd"]["mean"], rel=1e-6)
    pairs = [frechet_distance(a, b) for a, b in zip(rows["ours"][0].split(14), rows["real"][0].split(14), strict=True)]
    assert score(4, fid__pooling="pair")["fid"]["mean"] == pytest.approx(sum(pairs) / 5, rel=1e-6)
    stand_ins.clear()
    score(5, fid__every=3, clips__given=0, clips__frames=12)
    assert {shape[0] for shape, variant in stand_ins if variant == "tf1"} == {4}
    assert {shape[2] for shape, variant in stand_ins if variant == "stylegan_v"} == {12}


def films_with_sound(folder: Path, delays=(0, 2, -3, 0)) -> Path:
    """Films whose brightness and sound carry one code, FFV1 and 16-bit sound beside them."""
    folder.mkdir(parents=True)
    for number, delay in enumerate(delays):
        frames, samples = coded(delay, seed=3 + number)
        wide = torch.cat((frames, torch.zeros_like(frames)), 3)
        write_clip(folder / f"f{number}.safetensors", wide.transpose(0, 1), Fraction(25), samples / 32768)
    boxes = {f"f{number}": [6, 6, 18, 18] for number in range(len(delays))}
    (folder / "faces.json").write_text(json.dumps(boxes))
    return folder


def test_sync_is_score_clip_of_the_real_box_and_follows_the_card(stand_ins, tmp_path):
    real, ours = films_with_sound(tmp_path / "real", (0, 0, 0, 0)), films_with_sound(tmp_path / "ours")
    (ours / "faces.json").unlink()  # the real clip's box is taken for both
    base = ("--generated", ours, "--real", real, "--metrics", "sync")

    def score(number: int, base_card: str = "syncnet_v2", **changes) -> dict:
        card = a_card(tmp_path / f"{number}.yaml", base_card, **changes)
        return evaluated(tmp_path / str(number), *base, "--protocol", card)["rows"]

    plain = score(0)["ours"]
    for number, delay in enumerate((0, 2, -3, 0)):
        frames, samples = coded(delay, seed=3 + number)
        wide = torch.cat((frames, torch.zeros_like(frames)), 3)
        want = score_clip(Code(), wide, Fraction(25), torch.tensor([6.0, 6, 18, 18]), samples)
        for name in ("sync_c", "sync_d", "offset_frames", "distance_at_zero"):
            assert plain["clips"][name][number] == pytest.approx(getattr(want, name), rel=1e-9), name
    assert plain["clips"]["offset_frames"] == [0, -2, 3, 0]
    assert plain["metrics"]["in_sync_rate"]["mean"] == 0.5
    narrow = score(1, sync__max_lag=2)["ours"]
    assert narrow["clips"]["offset_frames"][:2] == [0, -2]
    assert narrow["clips"]["offset_frames"][2] != 3
    assert score(2, sync__crop_scale=1.2)["ours"]["metrics"]["sync_d"] != plain["metrics"]["sync_d"]
    theirs = score(3, sync__sound="real")
    assert theirs["ours"]["metrics"]["in_sync_rate"]["mean"] == 1.0  # both films show the same code
    assert theirs["ground_truth"]["metrics"]["sync_c"] == plain["metrics"] or theirs["ground_truth"]["n"] == 4
    slow = score(4, clips__fps="25/2", clips__frames=36, sync__resample="duplicate")
    blend = score(5, clips__fps="25/2", clips__frames=36, sync__resample="blend")
    assert slow["ours"]["metrics"]["sync_c"]["mean"] < plain["metrics"]["sync_c"]["mean"]
    assert blend["ours"]["metrics"]["sync_c"] != slow["ours"]["metrics"]["sync_c"]


def test_faces_that_were_not_found_count_and_missing_boxes_are_refused(stand_ins, tmp_path, capsys):
    real, ours = films_with_sound(tmp_path / "real"), films_with_sound(tmp_path / "ours")
    base = ("--generated", ours, "--real", real, "--protocol", "syncnet_v2", "--metrics", "sync,quality")
    boxes = json.loads((real / "faces.json").read_text())
    (real / "faces.json").write_text(json.dumps({**boxes, "f3": None}))
    metrics = evaluated(tmp_path / "lost", *base)["rows"]["ours"]["metrics"]
    assert metrics["detection_rate"]["mean"] == 0.75
    assert metrics["sync_c_penalised"]["mean"] == pytest.approx(0.75 * metrics["sync_c"]["mean"])
    (real / "faces.json").write_text(json.dumps({name: box for name, box in boxes.items() if name != "f2"}))
    report = evaluated(tmp_path / "none", *base)
    assert report["refused"]["sync"] == "sync refused: no face box for f2: give faces.json beside the real clips"
    assert "sync_c" not in report["rows"]["ours"]["metrics"]
    write_clip(
        ours / "f1.safetensors",
        read_clip(open_set(ours)["f1"], load_card("syncnet_v2"), True).video,
        Fraction(25),
        None,
    )
    (real / "faces.json").write_text(json.dumps(boxes))
    assert "f1: no sound" in evaluated(tmp_path / "mute", *base)["refused"]["sync"]
    for bad in ("[1, 2", '{"f0": [1, 2, 3]}', '{"f9": null}', '{"f0": [9, 1, 3, 4]}', "[]"):
        (real / "faces.json").write_text(bad)
        assert "face" in refused_in_one_line(capsys, tmp_path / "bad", *base)


# ---- reading


def rule(**changes) -> Card:
    values = to_plain(load_card("livetalk"))
    values["clips"] |= {"num": None, "frames": None, "fps": None, "size": None, "retime": "refuse", "fit": "refuse"}
    values["clips"] |= changes
    return convert(Card, values)


def numbers_of(video: torch.Tensor) -> list[int]:
    return [number_of(frame.numpy()) for frame in video.permute(1, 2, 3, 0)]


def test_a_film_is_read_by_the_clock(tmp_path):
    """25 -> 16 fps shows picture floor(25 k / 16); a film of uneven times is seen as a player shows it."""
    pictures = [numbered(number) for number in range(50)]
    write_film(tmp_path / "even.mp4", pictures, Fraction(25), np.zeros(96000, np.float32) + 0.1)
    times = [Fraction(n, 25) + (Fraction(1, 50) if n % 3 else 0) for n in range(50)]
    write_film(tmp_path / "uneven.mp4", pictures, times)
    even, uneven = (open_set(tmp_path)[name] for name in ("even", "uneven"))
    take = read_clip(even, rule(fps=16, frames=30, retime="shown"), True)
    assert numbers_of(take.video) == [25 * k // 16 for k in range(30)]
    assert take.fps == 16
    assert len(take.sound) == 30000
    assert numbers_of(read_clip(even, rule(), True).video) == list(range(50))
    assert numbers_of(read_clip(even, rule(frames=7), True).video) == list(range(7))
    shown = numbers_of(read_clip(uneven, rule(fps=25, frames=40, retime="shown"), True).video)
    assert shown == [max(n for n in range(50) if times[n] <= Fraction(k, 25) + Fraction(1, 1000)) for k in range(40)]
    with pytest.raises(UserError, match="frame rate varies"):
        read_clip(uneven, rule(), True)
    with pytest.raises(UserError, match="25 frames a second: the protocol wants 16 and resamples nothing"):
        read_clip(even, rule(fps=16), True)
    with pytest.raises(UserError, match=r"32 frames, 2.00 s: 40 are wanted"):
        read_clip(even, rule(fps=16, frames=40, retime="shown"), True)
    whole = np.concatenate([np.full(4000, 0.5, np.float32), np.zeros(28000, np.float32)])
    write_wav(tmp_path / "even.wav", whole)
    beside = read_clip(open_set(tmp_path)["even"], rule(frames=25), True)
    assert beside.sound[:3999].min() > 0.45
    assert beside.sound[4001:].abs().max() < 0.05
    assert len(beside.sound) == 16000


def write_wav(path: Path, samples: np.ndarray) -> None:
    import wave

    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, len(samples), "NONE", ""))
        file.writeframes((samples * 32767).astype("<i2").tobytes())


def test_clips_are_scaled_and_cut_with_their_box(tmp_path):
    video = torch.zeros(3, 4, 20, 40, dtype=torch.uint8)
    video[:, :, 8:12, 18:22] = 255  # the face, in the middle
    folder = tmp_path / "set"
    folder.mkdir()
    write_clip(folder / "a.safetensors", video, FPS, None)
    (folder / "faces.json").write_text('{"a": [18, 8, 22, 12]}')
    entry = open_set(folder)["a"]
    take = read_clip(entry, rule(size=[40, 40], fit="crop"), False)
    assert take.video.shape == (3, 4, 40, 40)
    assert take.box.tolist() == [16, 16, 24, 24]
    left, top, right, bottom = (int(x) for x in take.box)
    assert take.video[:, :, top + 1 : bottom - 1, left + 1 : right - 1].min() > 200
    assert take.video[:, :, : top - 2].max() < 30
    with pytest.raises(UserError, match="40 x 20 pixels: the protocol wants 40 x 40, scales nothing"):
        read_clip(entry, rule(size=[40, 40]), False)


def test_strict_takes_lossless_clips_alone(tmp_path):
    write_film(tmp_path / "lossy.mp4", [numbered(n) for n in range(12)], Fraction(25))
    entry = open_set(tmp_path)["lossy"]
    with pytest.raises(UserError, match="h264 with yuv420p is not lossless RGB; write tensors, FFV1 or PNG"):
        read_clip(entry, load_card("strict"), True)
    assert numbers_of(read_clip(entry, load_card("strict"), False).video) == list(range(12))  # the real one is as it is
    write_ffv1(tmp_path / "exact.mkv", [numbered(n, n) for n in range(12)])
    take = read_clip(open_set(tmp_path)["exact"], load_card("strict"), True)
    assert all(np.array_equal(take.video[:, n].permute(1, 2, 0).numpy(), numbered(n, n)) for n in range(12))


def write_ffv1(path: Path, pictures: list[np.ndarray]) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "bgr0"
        for number, pixels in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_a_manifest_names_stretches_and_crops(tmp_path):
    from distill.data.manifest import Clip, Manifest

    write_film(tmp_path / "film.mp4", [numbered(n) for n in range(60)], Fraction(25), np.zeros(115200, np.float32))
    clips = (
        Clip(id="late", dataset="x", source="film.mp4", start=1.0, end=2.0, text="nods"),
        Clip(id="part", dataset="x", source="film.mp4", end=1.0, crop=(8, 0, 40, 40)),
    )
    Manifest(clips).save(tmp_path / "manifest.parquet")
    entries = open_set(tmp_path / "manifest.parquet")
    assert entries["late"].text == "nods"
    late = read_clip(entries["late"], rule(), False)
    assert numbers_of(late.video) == list(range(25, 50))
    assert len(late.sound) == 16000
    assert read_clip(entries["part"], rule(), False).video.shape == (3, 25, 40, 40)
    assert len({entry.identity for entry in entries.values()}) == 2


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
                  "--metrics", "psnr,quality")  # fmt: skip
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
    change, low, high = eval_compare.bootstrap(torch.tensor(near), torch.tensor(far))
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
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| FID", "| FVD"))]
    assert len(rows) == 2
    assert all("paired jackknife" in row for row in rows)
    shutil.rmtree(tmp_path / "out2" / "features")
    main(["eval", "compare", str(tmp_path / "out1"), str(tmp_path / "out2")])
    assert "| no values for single clips |" in capsys.readouterr().out


def test_compare_refuses_two_cards_other_clips_and_no_report(scored, tmp_path, capsys):
    def told(one: Path, two: Path) -> str:
        assert main(["eval", "compare", str(one), str(two)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "two protocols cannot be compared: clips.given is 1 here and 2 there" in told(
        scored / "near-out", scored / "card-out"
    )
    report = report_of(scored / "near-out")
    fewer = {**report, "n": 7, "clips": report["clips"][:7]}
    (tmp_path / "eval.json").write_text(json.dumps(fewer))
    assert "two sets of clips cannot be compared: 8 and 7 clips, first h" in told(scored / "near-out", tmp_path)
    assert "no scores" in told(scored / "near-out", tmp_path / "none")
    (tmp_path / "eval.json").write_text("{}")
    assert "no scores of distill eval" in told(scored / "near-out", tmp_path)


# ---- benchmark


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
    assert [column["name"] for column in hdtf_free["columns"]][:2] == ["motion", "sharpness"]
    assert len(hdtf_free["rows"]) == 3
    names = [row["name"] for row in hdtf["rows"]]
    rows = [(row["name"], row["card"]) for row in hdtf["rows"]]
    assert names[:4] == ["ground truth", "real against real", "ours", "theirs"]
    for method in ("LiveTalk", "OmniAvatar-14B", "Hallo3", "FantasyTalking", "AniPortrait"):
        assert (method, "theirs: LiveTalk") in rows
    assert ("OmniAvatar-14B", "theirs: OmniAvatar") in rows
    assert any("arXiv 2512.23576v1, table 1" in note for note in hdtf["notes"])
    assert len(mine["rows"]) == 4
    theirs = [row for row in hdtf["rows"] if row["theirs"]]
    assert all("theirs" in row["card"] for row in theirs)
    assert [row["n"] for row in hdtf["rows"]][:4] == ["5", "2", "5", "5"]
    livetalk = next(row for row in theirs if row["name"] == "LiveTalk")
    fid = [column["name"] for column in hdtf["columns"]].index("FID")
    assert livetalk["cells"][fid]["value"] == "13.68"
    assert "| LiveTalk | theirs: LiveTalk |  | 13.68 |" in shown
    assert (tmp_path / "t" / "benchmark.html").read_text().count('class="theirs"') == len(theirs)
    assert len(list((tmp_path / "t" / "features").iterdir())) == 2 * 5 * 3 * 3  # the real clips were read once


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
        eval_compare.check_same(report, two)
    for change, told in (
        ({"metric": "fid"}, "'fid' is a metric of distill eval"),
        ({"generated": {"a": 1.0}}, "has 1 clips, 8 are scored; the first that differs: b"),
        ({"made_by": ""}, "cannot be read"),
        ({"generated": {**given["generated"], "a": None}}, "no finite number"),
    ):
        path.write_text(json.dumps(given | change))
        assert told in refused_in_one_line(capsys, tmp_path / "none", *words)


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

    monkeypatch.setattr("eval.i3d.I3D.load", classmethod(lambda cls: Network()))
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
    assert (scores.offset_frames, scores.num_windows, len(scores.curve)) == (-3, 75, 31)


def test_the_report_says_what_golden_found(scored, tmp_path, monkeypatch):
    from eval.score_report import headline

    report = report_of(scored / "near-out")
    assert any("Golden SyncNet example: not run" in line for line in headline(report))
    report["golden"] = {"SyncNet example": {"expected": "3", "found": "3", "passed": True}}
    assert any("Golden SyncNet example: passed" in line for line in headline(report))


def test_world_clips_of_a_run(tmp_path, capsys):
    """The real side of the embedded protocol: exact pictures and sound of the held-out world."""
    from distill.data import avatars
    from distill.recipe import load_recipe

    recipe = load_recipe(Path("recipes/dmd_avatar.yaml"), ["preset=smoke"])
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(yaml.safe_dump(to_plain(recipe)))
    words = ["eval", "clips", "--run", str(run), "--num", "2", "--clips-out", str(tmp_path / "clips")]
    assert main(words) == 0
    entries = open_set(tmp_path / "clips")
    clips = avatars.held_out(recipe.data, 555, "test", 2)
    for number, entry in enumerate(entries.values()):
        take = read_clip(entry, load_card("embedded"), False)
        assert torch.equal(take.video, clips.video[number])
        assert torch.equal(take.sound, clips.audio[number])
        assert entry.text == clips.text[number]
    assert main(words) == 2
    assert "not empty" in capsys.readouterr().err
    assert clip_sets.TENSORS == ".safetensors"


def test_weight_free_measures_are_those_of_quality_a_few_frames_at_a_time():
    from eval.quality import quality_scores

    video = a_clip(1, frames=70)
    take = clip_scores.Take(video=video, fps=FPS, sound=None, box=None)
    found = clip_scores.clip_features("quality", take, take, load_card("strict"), Extractors())
    want = quality_scores(video[None])
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {n: x[0] for n, x in want.items()}, rel=1e-5
    )


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
        drawing = Drawing(run_folder / "student", 0, None, tmp_path / f"{folder.name}-drawn", "cpu")
        entries = scoring.draw_all(drawing, open_set(folder), card, 0)
        drawn[folder] = {name: read_clip(entry, card, True).video for name, entry in entries.items()}
    assert not torch.equal(drawn[real]["a"], drawn[real]["b"])
    assert torch.equal(drawn[real]["b"], drawn[alone]["b"])
