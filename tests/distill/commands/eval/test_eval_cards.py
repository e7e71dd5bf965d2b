"""What a protocol card says reaches the numbers of `distill eval`."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.scoring import scoring
from distill.scoring.clip_io import read_clip, write_clip
from distill.scoring.clip_sets import open_set
from eval import scores
from eval.cards import load_card
from eval.frechet import floor_of, frechet_distance
from eval.metric import Clip
from eval.metrics.distances.kid import KID
from eval.metrics.motion import motion_energies, sharpness_energies
from eval.metrics.pairs.psnr import PSNR
from eval.metrics.quality import failure_rates, flickers, measure, slope, window_colour, window_means
from eval.metrics.seam import seam_jump
from eval.networks.loaded import Networks
from tests.eval.metrics.test_lip_sync import Code, coded, score_clip
from tests.support.eval_sets import (
    FPS,
    FRAMES,
    Frames,
    a_card,
    a_clip,
    a_set,
    evaluated,
    films_with_sound,
    refused_in_one_line,
)
from tests.support.media.films import write_film
from tests.support.media.sounds import tone, write_sound
from tests.support.tiny import rng


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(scoring, "Networks", Frames)
    monkeypatch.setattr(scores, "locate", lambda name: name)
    scoring._networks.cache_clear()
    Frames.seen.clear()
    yield Frames.seen
    scoring._networks.cache_clear()


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


@pytest.mark.slow
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
    base = ("--generated", ours, "--real", real, "--protocol", "syncnet_v2", "--metrics", "sync,motion_energy")
    boxes = json.loads((real / "faces.json").read_text())
    (real / "faces.json").write_text(json.dumps({**boxes, "f3": None}))
    metrics = evaluated(tmp_path / "lost", *base)["rows"]["ours"]["metrics"]
    assert metrics["detection_rate"]["mean"] == 0.75
    assert metrics["sync_c_penalised"]["mean"] == pytest.approx(0.75 * metrics["sync_c"]["mean"])
    (real / "faces.json").write_text(json.dumps({name: box for name, box in boxes.items() if name != "f2"}))
    report = evaluated(tmp_path / "none", *base)
    assert report["refused"]["sync"] == "sync refused: f2: no face box: give faces.json beside the real clips"
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


@pytest.mark.parametrize("kind", ["silent", "none", "not finite", "antiphase", "antiphase track", "cut short"])
def test_what_is_wrong_with_the_sound_costs_the_metrics_of_sound_alone(stand_ins, tmp_path, kind):
    real = a_set(tmp_path / "real")
    boxes = {name: [2, 2, 14, 14] for name in "abcde"}
    (real / "faces.json").write_text(json.dumps(boxes))
    video = a_clip(0)
    samples = torch.zeros(19_200) if kind == "silent" else torch.full((19_200,), torch.nan)
    write_clip(real / "a.safetensors", video, FPS, None if kind == "none" else samples, "a person nods")
    if kind in ("antiphase", "antiphase track", "cut short"):
        (real / "a.safetensors").unlink()
        frames, voice = [frame.permute(1, 2, 0).numpy() for frame in video.unbind(1)], tone(1.2, 16_000)
        own = np.stack([voice, -voice], 1) if kind == "antiphase track" else None
        write_film(real / "a.mkv", frames, FPS, own, 16_000)
    if kind in ("antiphase", "cut short"):
        beside = write_sound(real / "a.wav", "pcm_s16le", 16_000, np.stack([voice, -voice], 1))
        if kind == "cut short":
            beside.write_bytes(beside.read_bytes()[:30])
    words = ("--generated", real, "--real", real, "--protocol", a_card(tmp_path / "card.yaml", clips__lossless=False))
    report = evaluated(tmp_path / "out", *words, "--metrics", "fid,fvd,sync")
    assert {"fid", "fvd"} <= set(report["rows"]["real"]["metrics"])
    why = {
        "none": "a: no sound",
        "not finite": "a: no sound: audio must be finite",
        "antiphase": "cancel each other",
        "antiphase track": "two channels of the sound cancel each other: a.mkv",
        "cut short": "a: audio file",
    }.get(kind)
    assert why is None or why in report["refused"]["sync"]


def test_weight_free_measures_are_those_of_quality_a_few_frames_at_a_time():
    video, card = a_clip(1, frames=70), load_card("strict")
    clip, frames, found = Clip(video=video, fps=FPS), measure(video[None]), {}
    for key in ("motion_energy", "sharpness", "quality"):
        features = scores.clip_features(card.metrics[key], clip, clip, Networks())
        found |= {key if name == "energy" else name: float(value) for name, value in features.items()}
    want = {"motion_energy": motion_energies(video[None]), "sharpness": sharpness_energies(video[None])}
    want |= {"flicker": flickers(frames), "saturation": frames.saturation.mean(1), **failure_rates(frames)}
    want = {name: float(value) for name, value in want.items()}
    want["colour_slope"] = slope(window_colour(frames, 12)[0].tolist()) / (12 / FPS)
    assert found == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
def test_a_box_off_the_picture_is_refused_by_name_and_a_face_that_is_cut_away_is_counted(stand_ins, tmp_path):
    real, ours = films_with_sound(tmp_path / "real"), films_with_sound(tmp_path / "ours")  # 48 x 24
    base = ("--generated", ours, "--real", real, "--metrics", "sync,motion_energy", "--protocol")
    boxes = {name: [12, 6, 24, 18] for name in ("f0", "f1", "f2", "f3")}
    (real / "faces.json").write_text(json.dumps({**boxes, "f1": [100, 6, 112, 18]}))
    report = evaluated(tmp_path / "off", *base, "syncnet_v2")
    message = "sync refused: f1: face box 100, 6, 112, 18 does not fit a frame of 48 x 24; boxes are left"
    assert report["refused"]["sync"].startswith(message)
    assert "motion_energy" in report["rows"]["ours"]["metrics"]
    card = a_card(tmp_path / "cut.yaml", "syncnet_v2", clips__size=[24, 24], clips__fit="crop")  # columns 12 to 36
    assert "sync refused: f1: face box" in evaluated(tmp_path / "off_and_cut", *base, card)["refused"]["sync"]
    (real / "faces.json").write_text(json.dumps({**boxes, "f3": [0, 6, 8, 18]}))
    assert evaluated(tmp_path / "whole", *base, "syncnet_v2")["rows"]["ours"]["metrics"]["detection_rate"]["mean"] == 1
    report = evaluated(tmp_path / "cut", *base, card)
    for row in ("ours", "ground_truth"):
        assert report["rows"][row]["metrics"]["detection_rate"]["mean"] == 0.75
        assert [value is None for value in report["rows"][row]["clips"]["sync_c"]] == [False, False, False, True]
    for file in ("eval.md", "eval.html"):
        assert "No face in 1 of 4 clips (f3): Sync-C and Sync-D" in (tmp_path / "cut" / file).read_text()
    (real / "faces.json").write_text(json.dumps(dict.fromkeys(boxes)))
    report = evaluated(tmp_path / "none", *base, "syncnet_v2")
    assert report["refused"]["sync"].startswith("sync refused: no face was found in any of 4 clips; give their boxes")
    assert "motion_energy" in report["rows"]["ours"]["metrics"]


def drifting(folder: Path, rise: float, step: float, **facts: str) -> list[torch.Tensor]:
    """3 s of little motion, whose red grows by `rise` levels a second and that are `step` brighter in their second second."""
    folder.mkdir()
    seconds, videos = torch.arange(75) / 25, []
    for number in range(4):
        video = 90 + 20 * torch.rand(3, 1, 16, 16, generator=rng(number)) + torch.rand(3, 75, 16, 16, generator=rng(9))
        video[0] += rise * seconds[:, None, None]
        video[:, 25:50] += step
        videos.append(video.round().byte())
        write_clip(folder / f"{number}.safetensors", videos[-1], Fraction(25), None, **facts)
    return videos


def test_drift_and_seams_reach_the_report(stand_ins, tmp_path):
    drifting(tmp_path / "real", 0, 0)
    videos = drifting(tmp_path / "ours", 20, 8, chunks="25 50")
    base = ("--generated", tmp_path / "ours", "--real", tmp_path / "real", "--metrics", "quality,seam,identity")
    base = (*base, "--protocol")
    report = evaluated(tmp_path / "out", *base, "strict")
    ours, real = (report["rows"][name] for name in ("ours", "ground_truth"))
    assert ours["metrics"]["colour_slope"]["mean"] == pytest.approx(20, rel=0.03)
    assert abs(real["metrics"]["colour_slope"]["mean"]) < 0.2
    assert ours["metrics"]["seam"]["mean"] == pytest.approx(
        seam_jump(measure(torch.stack(videos)), [25, 50])[0], rel=1e-9
    )
    assert ours["metrics"]["seam"]["mean"] > 5
    assert "seam" not in real["metrics"]  # no report states where it has chunks
    for number, video in enumerate(videos):
        cells = torch.nn.functional.adaptive_avg_pool2d(video.transpose(0, 1).float() / 255, 2).flatten(1)
        truth = open_set(tmp_path / "real")[str(number)]
        first = read_clip(truth, load_card("strict"), False).video[:, :1].transpose(0, 1).float() / 255
        reference = torch.nn.functional.adaptive_avg_pool2d(first, 2).flatten(1)
        cosine = torch.nn.functional.cosine_similarity(cells[1:].double(), reference.double())
        want = slope(window_means(cosine, 25).tolist())
        assert ours["clips"]["identity_slope"][number] == pytest.approx(want, rel=1e-5)
    assert ours["metrics"]["identity_slope"]["mean"] < 0
    page = (tmp_path / "out" / "eval.md").read_text()
    assert all(name in page for name in ("colour drift (levels a second, 0 is none)", "seam (1 is none)", "## Drift"))
    halved = evaluated(tmp_path / "halved", *base, a_card(tmp_path / "h.yaml", quality__window_seconds="1/2"))["rows"][
        "ours"
    ]
    assert halved["metrics"]["colour_slope"]["mean"] != ours["metrics"]["colour_slope"]["mean"]
    long = evaluated(
        tmp_path / "long", *base, a_card(tmp_path / "l.yaml", quality__window_seconds=2, identity__window_seconds=2)
    )["rows"]["ours"]["metrics"]
    assert not {"colour_slope", "identity_slope"} & set(long)
    slow = a_card(tmp_path / "s.yaml", clips__fps="25/2", clips__retime="shown")
    shown = torch.stack(videos)[:, :, ::2][:, :, :37]  # frames 25 and 50 come first at 13 and 25
    assert evaluated(tmp_path / "slow", *base, slow)["rows"]["ours"]["metrics"]["seam"]["mean"] == pytest.approx(
        seam_jump(measure(shown), [13, 25])[0], rel=1e-9
    )


def test_chunks_that_are_no_frame_numbers_are_told(tmp_path, capsys):
    drifting(tmp_path / "real", 0, 0)
    drifting(tmp_path / "ours", 0, 0, chunks="25 x")
    words = ("--generated", tmp_path / "ours", "--real", tmp_path / "real", "--protocol", "strict")
    words = (*words, "--metrics", "quality")
    assert "chunks must be frame numbers: 0.safetensors" in refused_in_one_line(capsys, tmp_path / "out", *words)


def test_kid_has_a_floor_from_6_clips_on():
    clips = [{"frames": torch.randn(3, 4, generator=rng(number))} for number in range(8)]
    card, rows = load_card("strict"), torch.stack([clip["frames"] for clip in clips])
    kid = card.metrics["kid"]
    assert isinstance(kid, KID)
    found, num = kid.floor(clips, card.floor_splits)
    assert (*found["kid"], num) == floor_of(
        rows, torch.Generator().manual_seed(0), kid.distance, card.floor_splits, least=3
    )
    assert num == 4
    assert kid.floor(clips[:5], card.floor_splits) is None
    assert PSNR().floor(clips, card.floor_splits) is None
