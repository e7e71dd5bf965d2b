import argparse
import fcntl
import json
import os
from fractions import Fraction

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from distill.data.curate import curate, scores
from distill.data.curate.candidates import read_candidates, read_faces
from distill.data.curate.curate import NOT_SCORED, apply_thresholds, read_thresholds
from distill.data.curate.models import CaptionRewriter, Upscaler
from distill.data.curate.scores import score
from distill.data.datasets import folder
from distill.data.datasets.manifest import Clip, Manifest
from distill.data.prepare.cutting import CutConfig
from distill.data.prepare.prepare import prepare
from teachers.errors import UserError
from teachers.media.crop import Box
from tests.support.media import talking
from tests.support.media.films import write_film
from tests.support.tiny_adapters import WORDS, save_image_text, save_super_resolution

SECONDS = 5.0


@pytest.fixture(scope="module")
def sound():
    return talking.speech(SECONDS)


@pytest.fixture(scope="module")
def frames(sound):
    return talking.film(sound)


@pytest.fixture(scope="module")
def original(frames, sound):
    return score(frames, talking.FPS, sound, "a man with brown hair talks")[0]


DAMAGES = {
    "sharpness": lambda frames, sound: ([talking.blurred(frame) for frame in frames], sound),
    "exposure": lambda frames, sound: ([frame * 0 for frame in frames], sound),
    "cleanness": lambda frames, sound: ([talking.jpeg(frame) for frame in frames], sound),
    "face_centring": lambda frames, sound: (talking.film(sound, across=46), sound),
    "speech": lambda frames, sound: (frames, sound * 0),
    "sync": lambda frames, sound: (frames, talking.shifted(sound, 0.36)),
}


@pytest.mark.parametrize("column", DAMAGES)
def test_a_damaged_copy_scores_below_its_original_in_the_right_column(column, frames, sound, original):
    damaged, _ = score(*(lambda pair: (pair[0], talking.FPS, pair[1], ""))(DAMAGES[column](frames, sound)))
    assert damaged[column] < 0.75 * original[column]
    thresholds = read_thresholds(None)
    row = {**dict.fromkeys(curate.NAMES), **damaged, "problem": None}
    apply_thresholds(row, thresholds)
    if column != "sync":  # it has no threshold: short clips are not decided by it
        assert any(reason.startswith(f"{column} ") for reason in row["reasons"])
    row.update(original)
    apply_thresholds(row, thresholds)
    assert row["kept"], row["reasons"]


def test_scores_follow_the_strength_of_a_damage(frames):
    picture = frames[0]
    light = scores.luma(torch.from_numpy(picture))
    softer = torch.nn.functional.avg_pool2d(light[None, None], 3, 1, 1)[0, 0]
    assert scores.sharpness(light) > scores.sharpness(softer) > scores.sharpness(torch.full_like(light, 90.0)) == 0
    grids = [blocks_of(talking.jpeg(picture, quality)) for quality in (95, 50, 10)]
    assert grids == sorted(grids)
    assert blocks_of(picture) < 0.1 < grids[-1]
    lights = [scores.exposure(light * factor) for factor in (1.0, 0.4, 0.1)]
    assert lights == sorted(lights, reverse=True)


def blocks_of(picture: np.ndarray, period: float = 8.0) -> float:
    return scores.blockiness(scores.differences(scores.luma(torch.from_numpy(picture))), period)


def test_a_grid_that_was_scaled_with_its_picture_is_found_at_its_own_period():
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(40, 200, (37, 47, 3), dtype=np.uint8))
    picture = np.array(coarse.resize((640, 520), Image.Resampling.BICUBIC))
    clean, damaged = (
        np.array(Image.fromarray(x).resize((384, 312), Image.Resampling.BICUBIC))
        for x in (picture, talking.jpeg(picture))
    )
    assert blocks_of(damaged, 8 * 0.6) > max(0.2, 4 * blocks_of(clean, 8 * 0.6))
    known, unknown = (
        score([damaged] * 3, talking.FPS, None, "", scale)[0] for scale in ((Fraction(3, 5),) * 2, (Fraction(1),) * 2)
    )
    assert known["cleanness"] < unknown["cleanness"]
    assert score([damaged], talking.FPS, None, "", (Fraction(4, 2), Fraction(5, 2)))[0]["resolution"] == 0.4
    tiled = np.tile(np.arange(6) * 20.0, 100)
    profile = torch.from_numpy(np.abs(np.diff(tiled)))
    assert scores.blockiness(profile, 6) > 0.5 > 0.05 > scores.blockiness(profile, 8.5)


def test_sound_is_told_from_silence_and_syllables_from_a_hum(sound):
    rng, rate = np.random.default_rng(1), talking.RATE
    noise = 0.1 * rng.standard_normal(10 * rate).astype(np.float32)
    half = noise * (np.arange(10 * rate) % (4 * rate) < 2 * rate)
    assert scores.speech_activity(noise) > 0.98
    assert abs(scores.speech_activity(half) - 0.6) < 0.1  # 6 of 10 s, and 0.2 s of hangover at each of two ends
    assert scores.speech_activity(noise * 5e-3) == scores.speech_activity(sound[:0]) == 0
    hum = (
        0.1 * np.sin(np.arange(10 * rate) * 0.05).astype(np.float32) * np.linspace(0.5, 1, 10 * rate, dtype=np.float32)
    )
    assert scores.speech_rhythm(sound) > 0.4 > 0.2 > scores.speech_rhythm(hum)


@pytest.mark.parametrize("late", [-0.36, 0.36])
def test_sync_tells_the_delay_with_its_sign(late, frames, sound, original):
    small = torch.stack([scores.luma(torch.from_numpy(frame)).byte() for frame in frames])
    motion = scores.mouth_motion(small, Box(*original["face_box"], confidence=1.0))
    value, offset = scores.sync(motion, talking.shifted(sound, late), talking.FPS)
    assert abs(offset + 1000 * late) <= 80  # positive when the picture lags the sound
    assert value < 0.5 * original["sync"]
    assert abs(original["sync_offset_ms"]) <= 80
    assert scores.sync(motion[:30], sound, talking.FPS) == (None, None)


def test_the_face_is_found_where_it_is_drawn(original):
    x, y, width, height = original["face_box"]
    left, top, right, bottom = (v / s for v, s in zip(talking.FACE, (160, 192) * 2, strict=True))
    both = max(0, min(x + width, right) - max(x, left)) * max(0, min(y + height, bottom) - max(y, top))
    assert both / (width * height + (right - left) * (bottom - top) - both) > 0.5


@pytest.mark.parametrize("kind", ["black", "still", "no face"])
def test_no_face_is_made_up(kind, frames, sound):
    shown = {
        "black": [f * 0 for f in frames[:60]],
        "still": [frames[0]] * 60,
        "no face": [f[120:] for f in frames[:60]],
    }
    found, _ = score(shown[kind], talking.FPS, sound, "")
    assert found["face"] < 0.1
    assert found["face_box"] is None or kind != "black"


def test_a_caption_of_motion_scores_above_one_of_looks():
    values = [
        scores.motion_text(text)
        for text in (
            "She nods, smiles and speaks slowly while waving a hand.",
            "A woman in a grey coat talks in a garden.",
            "Portrait of a tall woman with brown hair, studio lighting.",
            "",
        )
    ]
    assert values == [1.0, values[1], 0.0, 0.0]
    assert 0 < values[1] < 0.5


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Three prepared clips: a good one, a black one, a mute one; and the films they come from."""
    videos = tmp_path_factory.mktemp("films")
    sound = talking.speech(2.6)
    frames = talking.film(sound)
    rate = talking.RATE
    write_film(videos / "good.mov", frames, talking.FPS, sound, rate)
    write_film(videos / "black.mov", [frame * 0 for frame in frames], talking.FPS, sound, rate)
    write_film(videos / "mute.mov", frames, talking.FPS, sound * 0, rate)
    texts = {"good": "<script>alert(1)</script> talks & smiles", "black": "a photo", "mute": "a man nods"}
    clips = [Clip(**{**as_dict(clip), "text": texts[clip.id]}) for clip in folder.read(None, videos).clips]
    manifest = Manifest(tuple(clips))
    out = tmp_path_factory.mktemp("prepared") / "out"
    config = CutConfig(fps=talking.FPS, size=(192, 160), cuts="keep", silent=True)
    prepare(manifest, videos, out, "folder", config, shard_clips=2)
    return videos, out


def as_dict(clip: Clip) -> dict:
    return {name: getattr(clip, name) for name in Clip.__dataclass_fields__}


def words(*given) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    curate.add_arguments(parser)
    return parser.parse_args([*map(str, given), "--workers", "0"])


def rows_of(out) -> dict[str, dict]:
    return {row["id"]: row for row in pq.read_table(out / "scores.parquet").to_pylist()}


def test_the_command_keeps_the_good_clip_and_says_why_the_others_went(prepared, tmp_path, capsys):
    out = tmp_path / "out"
    assert curate.run(words(prepared[1], "--out", out)) == 0
    assert "1 of 3 clips kept, 2 removed, 0 not scored" in capsys.readouterr().out
    kept = Manifest.load(out / "manifest.parquet")
    assert [clip.id for clip in kept.clips] == ["good"]
    reasons = {row.id: row.reason for row in kept.refused}
    assert reasons["mute"] == "speech 0.000 is below 0.3; speech_rhythm 0.000 is below 0.2"
    assert "exposure 0.0" in reasons["black"]
    pages = {name: (out / f"{name}.html").read_text() for name in ("kept", "removed")}
    assert pages["kept"].count("data:image/jpeg") == 1
    assert pages["removed"].count("data:image/jpeg") == 2
    assert "speech 0.000 is below 0.3" in pages["removed"]
    for page in pages.values():
        assert not any(word in page for word in ("<script", "http:", "https:", "url(", "<link"))
    assert "&lt;script&gt;alert(1)" in pages["kept"]
    assert not (out / "scores.jsonl").exists()


def test_other_thresholds_score_nothing_again_and_another_face_only_its_clip(prepared, tmp_path, monkeypatch):
    out, done = tmp_path / "out", []
    real = curate.score_row
    monkeypatch.setattr(curate, "score_row", lambda candidate: done.append(candidate.clip.id) or real(candidate))
    assert curate.run(words(prepared[1], "--out", out)) == 0
    assert sorted(done) == ["black", "good", "mute"]
    (tmp_path / "t.yaml").write_text("exposure: {at_least: 0.2}\n")
    assert curate.run(words(prepared[1], "--out", out, "--thresholds", tmp_path / "t.yaml")) == 0
    assert len(done) == 3
    assert [clip.id for clip in Manifest.load(out / "manifest.parquet").clips] == ["good", "mute"]
    (tmp_path / "faces.csv").write_text("id,x,y,width,height\nmute,0.5,0.2,0.4,0.5\n")
    assert curate.run(words(prepared[1], "--out", out, "--faces", tmp_path / "faces.csv")) == 0
    assert done[3:] == ["mute"]
    row = rows_of(out)["mute"]
    assert (row["face"], row["face_size"], row["face_centring"]) == (1.0, 0.5, pytest.approx(0.6))


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(prepared, tmp_path, monkeypatch):
    candidates, manifest = read_candidates(prepared[1], None, {})
    thresholds = read_thresholds(None)
    curate.curate(candidates, manifest, tmp_path / "whole", thresholds)

    done, real = [], curate.score_row
    monkeypatch.setattr(curate, "score_row", lambda candidate: done.append(candidate.clip.id) or real(candidate))
    for _ in range(2):  # each ends after one more clip, in the middle of a line

        def stop(row):
            if row["id"] in done[-1:]:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            curate.curate(candidates, manifest, tmp_path / "killed", thresholds, tick=stop)
        with (tmp_path / "killed/scores.jsonl").open("a") as file:
            file.write('{"id": "torn')
        done.append("")
    curate.curate(candidates, manifest, tmp_path / "killed", thresholds)
    assert sorted(done) == ["", "", "black", "good", "mute"]
    for name in ("scores.parquet", "manifest.parquet", "manifest.refused.jsonl", "kept.html", "removed.html"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_one_bad_clip_never_stops_the_rest(prepared, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for file in prepared[1].iterdir():
        (data / file.name).write_bytes(file.read_bytes())
    index = json.loads((data / "folder-000000.json").read_text())
    row = next(row for row in index["samples"] if row["id"] == "good")
    shard = bytearray((data / "folder-000000.tar").read_bytes())
    at = shard.index(b"moov", row["offset"])
    shard[at : at + 4] = b"nope"
    (data / "folder-000000.tar").write_bytes(shard)
    assert curate.run(words(data, "--out", tmp_path / "out")) == NOT_SCORED
    assert "not scored good: " in capsys.readouterr().err
    rows = rows_of(tmp_path / "out")
    assert rows["good"]["problem"]
    assert rows["mute"]["sharpness"] > 0.5
    assert "cannot be scored" in (tmp_path / "out/removed.html").read_text()


def test_clips_of_films_are_judged_before_they_are_cut(prepared, tmp_path):
    clips = (
        Clip(id="all", dataset="folder", source="good.mov"),
        Clip(id="left", dataset="folder", source="good.mov", start=0.4, end=2.8, crop=(40, 0, 120, 192)),
        Clip(id="gone", dataset="folder", source="gone.mov"),
    )
    Manifest(clips).save(tmp_path / "manifest.parquet")
    given = (tmp_path / "manifest.parquet", "--videos", prepared[0], "--out", tmp_path / "out")
    assert curate.run(words(*given)) == NOT_SCORED
    rows, cut = rows_of(tmp_path / "out"), Fraction(40, 160)
    assert "not found" in rows["gone"]["problem"]
    middle = rows["all"]["face_box"][0] + rows["all"]["face_box"][2] / 2
    moved = rows["left"]["face_box"][0] + rows["left"]["face_box"][2] / 2
    assert moved == pytest.approx(float((middle - cut) / (1 - cut)), abs=0.05)
    assert rows["all"]["speech"] > 0.5


def test_a_range_has_two_ends():
    limits = curate.Range(at_least=0.2, at_most=0.5)
    assert (
        limits.violation("sync", 0.2) is limits.violation("sync", 0.5) is curate.Range().violation("sync", None) is None
    )
    assert limits.violation("sync", 0.6) == "sync 0.600 is above 0.5"
    assert limits.violation("sync", 0.1) == "sync 0.100 is below 0.2"
    assert limits.violation("sync", None) == "sync cannot be measured"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sharpnes: {at_least: 1}", "did you mean 'sharpness'"),
        ("sharpness: {at_lest: 1}", "sharpness"),
        ("sharpness: {at_least: high}", "sharpness.at_least"),
        ("sharpness: 3", "sharpness"),
        ("sharpness: {at_least: 2, at_most: 1}", "empty"),
        ("- sharpness", "mapping"),
        ("sharpness: {", "not YAML"),
    ],
)
def test_wrong_thresholds_are_refused_in_one_line(text, said, tmp_path):
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(UserError, match=said) as error:
        read_thresholds(tmp_path / "t.yaml")
    assert "t.yaml" in str(error.value)


def test_wrong_places_and_faces_are_refused_and_nothing_is_written(prepared, tmp_path):
    (tmp_path / "faces.csv").write_text("id,x,y,width,height\nnobody,0,0,1,1\n")
    (tmp_path / "wrong.csv").write_text("id,x,y,width,height\ngood,0,0,12,1\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    data, out = prepared[1], tmp_path / "out"
    for given, said in (
        ((tmp_path / "gone", "--out", out), "data not found"),
        ((data, "--out", out, "--videos", tmp_path), "--videos is for a manifest"),
        ((data / "manifest.parquet", "--out", out), "--videos is missing"),
        ((data, "--out", out, "--faces", tmp_path / "faces.csv"), "nobody"),
        ((data, "--out", out, "--captions", tmp_path / "no-model"), "no image-text model"),
        ((data, "--out", out, "--super-resolution", tmp_path / "no-model"), "no super-resolution model"),
    ):
        with pytest.raises(UserError, match=said):
            curate.run(words(*given))
        assert not out.exists()
    with pytest.raises(UserError, match="something else"):
        curate.run(words(data, "--out", tmp_path / "other"))
    with pytest.raises(UserError, match="fractions"):
        read_faces(tmp_path / "wrong.csv")
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["file"]
    out.mkdir()
    held = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="in use: "):
        curate.run(words(data, "--out", out))
    os.close(held)


def test_local_models_rewrite_captions_and_enlarge_references_of_kept_clips(prepared, tmp_path):
    models = [save_image_text(tmp_path / "llava"), save_super_resolution(tmp_path / "swin2sr")]
    given = (prepared[1], "--out", tmp_path / "out", "--captions", models[0], "--super-resolution", models[1])
    assert curate.run(words(*given)) == 0
    rows = rows_of(tmp_path / "out")
    caption = rows["good"]["caption"]
    assert caption
    assert set(caption.split()) <= set(WORDS)
    assert rows["mute"]["caption"] is rows["black"]["caption"] is None
    assert [clip.text for clip in Manifest.load(tmp_path / "out/manifest.parquet").clips] == [caption]
    reference = tmp_path / "out/references/good.png"
    assert [file.name for file in reference.parent.iterdir()] == ["good.png"]
    candidates, _ = read_candidates(prepared[1], None, {})
    first = next(iter(curate.opened(next(c for c in candidates if c.clip.id == "good")).frames))
    assert CaptionRewriter(models[0])(torch.from_numpy(first), "<script>alert(1)</script> talks & smiles") == caption
    wanted = Upscaler(models[1])(torch.from_numpy(first))
    assert wanted.shape == (384, 320, 3)
    assert np.array_equal(np.array(Image.open(reference)), wanted.numpy())
    before = reference.stat().st_mtime_ns
    assert curate.run(words(*given)) == 0
    assert reference.stat().st_mtime_ns == before
    assert curate.run(words(prepared[1], "--out", tmp_path / "out")) == 0
    assert "talks" in Manifest.load(tmp_path / "out/manifest.parquet").clips[0].text
    with pytest.raises(UserError, match="super-resolution model cannot be read"):
        Upscaler(models[0])
