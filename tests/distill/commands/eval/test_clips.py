"""Sets of clips as `distill eval` reads them: films by the clock, tensors, manifests, a run's own world."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from distill.cli import main
from distill.data.datasets.manifest import Clip, Manifest
from distill.data.prepare.cutting import CutConfig
from distill.data.prepare.prepare import prepare
from distill.scoring import clip_io
from distill.scoring.clip_io import read_clip, write_clip
from distill.scoring.clip_sets import TENSORS, open_set
from distill.scoring.scoring import Job, score
from eval.cards import load_card
from teachers.config import to_plain
from teachers.errors import UserError
from tests.support.eval_sets import FPS, a_clip, evaluated, numbers_of, refused_in_one_line, rule
from tests.support.media.films import clicks, numbered, write_film
from tests.support.media.sounds import tone, write_sound
from tests.support.tiny import some_sound


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


def test_world_clips_of_a_run(tmp_path, capsys):
    """The real side of the embedded protocol: exact pictures and sound of the held-out world."""
    from distill.data.procedural.source import held_out
    from distill.recipe import load_recipe

    recipe = load_recipe(Path("recipes/scratch_avatar.yaml"), ["preset=smoke"])
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(yaml.safe_dump(to_plain(recipe)))
    words = ["eval", "clips", "--run", str(run), "--num", "2", "--clips-out", str(tmp_path / "clips")]
    assert main(words) == 0
    entries = open_set(tmp_path / "clips")
    clips = held_out(recipe.data, 555, "test", 2)
    for number, entry in enumerate(entries.values()):
        take = read_clip(entry, load_card("embedded"), False)
        assert torch.equal(take.video, clips.video[number])
        assert torch.equal(take.sound, clips.audio[number])
        assert entry.text == clips.text[number]
    assert main(words) == 2
    assert "not empty" in capsys.readouterr().err
    assert TENSORS == ".safetensors"


# ---- prepared shards


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Shards of two clips each: three stretches of one film, and a film that was refused."""
    folder = tmp_path_factory.mktemp("prepared")
    write_film(folder / "film.mp4", [numbered(n) for n in range(60)], Fraction(25), clicks(2.4, 48000))
    (folder / "text.mp4").write_text("no film")
    parts = {"a.b": (0.0, 0.8), "c": (0.8, 1.6), "d": (1.6, 2.4)}
    clips = [
        Clip(id=name, dataset="x", source="film.mp4", start=start, end=end, text=f"nods {name}")
        for name, (start, end) in parts.items()
    ]
    clips.append(Clip(id="bad", dataset="x", source="text.mp4"))
    config = CutConfig(fps=Fraction(25), min_seconds=0.5, cuts="keep")
    done = prepare(Manifest(tuple(clips)), folder, folder / "shards", "x", config, shard_clips=2)
    assert (done.num_clips, done.num_shards, len(done.refused)) == (3, 2, 1)
    return folder / "shards"


def test_prepared_shards_are_a_set_of_clips(prepared):
    entries = open_set(prepared)
    assert list(entries) == ["a_b", "c", "d"]
    assert entries["c"].text == "nods c"
    for number, name in enumerate(entries):
        take = read_clip(entries[name], rule(), False)
        assert numbers_of(take.video) == list(range(20 * number, 20 * number + 20))
        assert take.fps == 25
        want = clicks(2.4, 16000)[12800 * number : 12800 * (number + 1)]
        assert np.abs(np.flatnonzero(take.sound.abs() > 0.2) - np.flatnonzero(want)).max() <= 1
    assert len({entry.identity for entry in entries.values()}) == 3
    assert numbers_of(read_clip(entries["c"], rule(fps="25/2", frames=9, retime="shown"), False).video) == list(
        range(20, 38, 2)
    )
    with pytest.raises(UserError, match=r"H\.264 and not lossless"):
        read_clip(entries["c"], load_card("strict"), True)


def test_a_manifest_chooses_clips_of_prepared_shards(prepared, tmp_path):
    clips = Manifest.load(prepared / "manifest.parquet").clips
    Manifest(clips[1:]).save(tmp_path / "some.parquet")
    assert list(open_set(tmp_path / "some.parquet", prepared)) == ["c", "d"]
    assert list(open_set(prepared / "manifest.parquet")) == ["a_b", "c", "d"]
    Manifest((*clips, Clip(id="other", dataset="x", source="film.mp4"))).save(tmp_path / "more.parquet")
    with pytest.raises(UserError, match="clip other is in no shard"):
        open_set(tmp_path / "more.parquet", prepared)


def test_prepared_shards_are_scored_by_the_command(prepared, tmp_path, capsys):
    ours = tmp_path / "ours"
    ours.mkdir()
    for name, entry in open_set(prepared).items():
        take = read_clip(entry, rule(), False)
        write_clip(ours / f"{name.replace('_', '.')}.safetensors", take.video, take.fps, take.sound)
    words = ("--generated", ours, "--real", prepared, "--protocol", "strict")
    words += ("--metrics", "quality,motion_energy,psnr,ssim")
    report = evaluated(tmp_path / "out", *words)
    assert report["clips"] == ["a_b", "c", "d"]
    rows = report["rows"]
    assert rows["ours"]["clips"]["motion_energy"] == rows["ground_truth"]["clips"]["motion_energy"]
    assert rows["ours"]["metrics"]["ssim"]["mean"] == pytest.approx(1, abs=1e-4)
    again = evaluated(tmp_path / "other", *words, "--processes", 1)  # in another process
    assert again["rows"] == report["rows"]


def test_a_damaged_shard_is_reported_with_its_sample(prepared, tmp_path, capsys):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(prepared, broken)
    ours = tmp_path / "ours"
    ours.mkdir()
    entries = open_set(prepared)
    for name in ("c", "d"):
        take = read_clip(entries[name], rule(), False)
        write_clip(ours / f"{name}.safetensors", take.video, take.fps, None)
    Manifest(Manifest.load(prepared / "manifest.parquet").clips[1:]).save(broken / "some.parquet")
    path = broken / "x-000001.tar"
    path.write_bytes(path.read_bytes()[:2000])
    words = ("--generated", ours, "--real", broken / "some.parquet", "--protocol", "strict", "--metrics", "quality")
    line = refused_in_one_line(capsys, tmp_path / "out", *words)
    assert "2 of 4 clips cannot be scored: " in line  # the clip and the generated one that is measured against it
    assert "real d: shard is damaged" in line
    assert "generated d: shard is damaged" in line
    assert "x-000001.tar" in line
    (broken / "manifest.parquet").unlink()
    with pytest.raises(UserError, match=r"manifest\.parquet"):
        open_set(broken)


# ---- long clips


def test_a_clip_that_is_too_long_to_be_held_is_told_in_one_line(prepared, tmp_path, capsys, monkeypatch):
    """A film stops being decoded at the bound; of tensors and shards the size is known before anything is read."""
    real, ours = tmp_path / "real", tmp_path / "ours"
    for folder in (real, ours):
        folder.mkdir()
        write_clip(folder / "t.safetensors", a_clip(1, 30, 32), FPS, some_sound(38400))
    write_film(tmp_path / "film.mp4", [numbered(n) for n in range(30)], Fraction(25))
    height, width = numbered(0).shape[:2]
    monkeypatch.setattr(clip_io, "MOST_BYTES", 3 * 29 * 32 * 32)
    words = ("--generated", ours, "--real", real, "--protocol", "strict", "--metrics", "quality")
    message = refused_in_one_line(capsys, tmp_path / "out", *words)
    assert (
        "real t: a clip is held as a whole, at most 29 frames of 32 x 32: this one is longer; cut it into clips"
        in message
    )
    film = open_set(tmp_path)["film"]
    monkeypatch.setattr(clip_io, "MOST_BYTES", 3 * 20 * height * width)
    with pytest.raises(UserError, match=f"at most 20 frames of {width} x {height}"):
        read_clip(film, rule(), False)
    assert len(numbers_of(read_clip(open_set(prepared)["c"], rule(), False).video)) == 20
    monkeypatch.setattr(clip_io, "MOST_BYTES", 3 * 19 * height * width)
    with pytest.raises(UserError, match="at most 19 frames"):
        read_clip(open_set(prepared)["c"], rule(), False)


def test_which_of_several_tracks_was_taken_is_in_the_report(tmp_path):
    real, ours = tmp_path / "real", tmp_path / "ours"
    real.mkdir()
    ours.mkdir()
    voices = [tone(1.2, 16_000, hertz)[:, None] for hertz in (300.0, 700.0)]
    write_sound(real / "a.mp4", "aac", 16_000, *voices, default=1, video=30)
    write_sound(real / "b.mp4", "aac", 16_000, voices[0], video=30)
    card, entries = load_card("strict"), open_set(real)
    for name, entry in entries.items():
        clip = read_clip(entry, card, generated=False)
        write_clip(ours / f"{name}.safetensors", clip.video, clip.fps, clip.sound)
    job = Job(card=card, metrics=("motion_energy",), probes=None, device="cpu", batch_size=8, processes=0,
              cache=tmp_path / "features")  # fmt: skip
    for _ in range(2):  # made, and kept
        notes = score(job, "ours", open_set(ours), entries)["notes"]
        assert "Sound: audio track 2 of 2, the default one, was taken of real a." in notes
        assert "b" not in " ".join(note for note in notes if note.startswith("Sound: ")).split()
