from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch

from distill.data.datasets.manifest import Clip
from distill.data.prepare import cutting
from distill.data.prepare.cutting import CutConfig, cut, encode_flac
from distill.data.prepare.framing import crop_box
from teachers import media
from teachers.errors import UserError
from teachers.media import container, film, sound
from teachers.media.container import upright
from teachers.media.film import read_frames
from teachers.media.sound import read_sound
from tests.support.media.films import (
    HEIGHT,
    WIDTH,
    clicks,
    counting_film,
    frames_of,
    number_of,
    numbered,
    sound_of,
    turn,
    write_film,
)
from tests.support.media.sounds import tone, write_sound

RATE = 16000
LOOSE = CutConfig(fps=Fraction(25), min_seconds=0.2)


def clip(**fields) -> Clip:
    return Clip(id="a", dataset="test", source="a.mp4", **fields)


def nearest_number(times: list[Fraction], wanted: Fraction) -> int:
    return min(range(len(times)), key=lambda number: (abs(times[number] - wanted), number))


def expected_clicks(start: Fraction, count: int) -> list[int]:
    at = [round((Fraction(n, 4) + Fraction(1, 10) - start) * RATE) for n in range(100)]
    return [place for place in at if 20 <= place < count - 20]


def detected_clicks(sound: np.ndarray) -> list[int]:
    return [n for n in range(20, len(sound) - 20) if sound[n] > 0.1 and sound[n] == sound[n - 20 : n + 21].max()]


@pytest.mark.parametrize("fps", [Fraction(25), Fraction(16), Fraction(30), Fraction(30000, 1001)])
@pytest.mark.parametrize("start", [0.0, 1.03, 2.347])
@pytest.mark.parametrize(("suffix", "rate"), [("mov", 48000), ("mkv", 44100)])
def test_frames_and_sound_lie_as_in_the_film(tmp_path, fps, start, suffix, rate):
    path = counting_film(tmp_path / f"a.{suffix}", rate=rate)
    piece = cut(clip(start=start, end=start + 1.4), path, replace(LOOSE, fps=fps), tmp_path / "out.mp4")
    times = [Fraction(number, 25) for number in range(100)]
    origin = times[nearest_number(times, Fraction(start).limit_denominator(1000))]
    count = int(Fraction(7, 5) * fps)
    assert piece.num_frames == count
    assert piece.metadata["start"] == pytest.approx(float(origin))
    found = [number_of(frame) for frame in frames_of(tmp_path / "out.mp4")]
    assert found == [nearest_number(times, origin + k / fps) for k in range(count)]
    assert len(piece.sound) == round(count * RATE / fps)
    places = expected_clicks(origin, len(piece.sound))
    detected = detected_clicks(piece.sound.numpy())
    assert len(places) >= 5
    assert len(detected) == len(places)
    assert max(abs(a - b) for a, b in zip(detected, places, strict=True)) <= 1


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [
        ("a.mp4", "aac", 44100),
        ("a.mp4", "aac", 48000),
        ("a.mov", "pcm_s16le", 22050),
        ("a.mkv", "pcm_s16le", 44100),
        ("a.mkv", "libopus", 48000),
    ],
)
def test_sound_of_a_stretch_is_that_of_the_whole_film(tmp_path, name, codec, rate):
    rng = np.random.default_rng(0)
    window = np.hanning(30 if codec == "aac" else 6)  # AAC replaces much noise by random numbers of the decoder
    noise = rng.standard_normal(round(4.0 * rate))
    sound = 0.4 * np.convolve(noise, window / window.sum(), "same").astype(np.float32)
    shown = [numbered(number) for number in range(100)]
    path = write_film(tmp_path / name, shown, Fraction(25), sound, rate, codec)
    whole = media.read_audio(path)
    tolerance = {"aac": 1e-2, "libopus": 1e-3, "pcm_s16le": 0.0}[codec]
    for first, count in ((0, 4000), (777, 8000), (30001, 16000), (47999, 12345)):
        stretch = read_sound(path, first, count)
        assert (stretch.late, stretch.hole, stretch.early) == (0, 0, 0)
        np.testing.assert_allclose(stretch.samples.numpy(), whole[first : first + count].numpy(), atol=tolerance)


@pytest.mark.parametrize("late", [0.8, 9.0])
def test_a_seek_that_lands_too_late_is_not_trusted(tmp_path, monkeypatch, late):
    path = counting_film(tmp_path / "a.mov", 4.0, g="10")
    for module in (film, sound):
        sought = lambda *given: container.seek(*given[:2], given[2] + Fraction(late))  # noqa: E731
        monkeypatch.setattr(module, "seek", sought)
    piece = cut(clip(start=2.0, end=3.0), path, LOOSE, tmp_path / "out.mp4")
    assert [number_of(frame) for frame in frames_of(tmp_path / "out.mp4")] == list(range(50, 75))
    assert detected_clicks(piece.sound.numpy()) == pytest.approx(expected_clicks(Fraction(2), 16000), abs=1)


def test_variable_frame_rate_goes_by_the_times(tmp_path):
    steps = [0.02, 0.06, 0.04, 0.1, 0.03, 0.05, 0.12] * 9
    times = [Fraction(round(t * 1000), 1000) for t in np.cumsum([0.0, *steps[:-1]])]
    path = write_film(
        tmp_path / "a.mp4", [numbered(n) for n in range(len(times))], times, clicks(4, 48000), 48000, "aac"
    )
    piece = cut(clip(start=1.0, end=3.0), path, replace(LOOSE, fps=Fraction(16)), tmp_path / "out.mp4")
    origin = Fraction(piece.metadata["start"]).limit_denominator(1000)
    found = [number_of(frame) for frame in frames_of(tmp_path / "out.mp4")]
    assert found == [nearest_number(times, origin + Fraction(k, 16)) for k in range(32)]
    assert piece.metadata["variable_frame_rate"]
    assert 50 < piece.metadata["resampling"]["largest_shift_ms"] <= 60
    skipped = found[-1] - found[0] + 1 - len(set(found))
    assert piece.metadata["resampling"]["source_frames_skipped"] == skipped > 0
    assert piece.metadata["resampling"]["frames_repeated"] == 32 - len(set(found)) > 0


def test_a_constant_rate_is_not_called_variable(tmp_path):
    piece = cut(clip(), counting_film(tmp_path / "a.mkv", 2.0, 30), LOOSE, tmp_path / "out.mp4")
    assert not piece.metadata["variable_frame_rate"]
    assert piece.metadata["source_fps"] == "30"


def test_a_phone_film_is_turned_upright_before_it_is_cropped(tmp_path):
    lying = [np.rot90(numbered(number)) for number in range(30)]
    path = write_film(tmp_path / "a.mp4", lying, Fraction(25))
    turn(path)
    silent = replace(LOOSE, silent=True)
    piece = cut(clip(), path, silent, tmp_path / "out.mp4")
    frames = frames_of(tmp_path / "out.mp4")
    assert frames.shape[1:3] == (HEIGHT, WIDTH)
    assert [number_of(frame) for frame in frames] == list(range(30))
    assert piece.metadata["source_size"] == [WIDTH, HEIGHT]
    assert abs(piece.metadata["rotation"]) == 90


def test_lossless_frames_are_the_source_pictures_to_the_bit(tmp_path):
    path = counting_film(tmp_path / "a.mov", 1.0)
    source = [upright(picture.frame) for picture in read_frames(path)]
    cut(clip(crop=(8, 4, 40, 52)), path, replace(LOOSE, crf=0), tmp_path / "out.mp4")
    np.testing.assert_array_equal(frames_of(tmp_path / "out.mp4"), np.stack(source)[:, 4:56, 8:48])


def test_default_quality_is_near_the_source_in_colour_too(tmp_path):
    shown = [numbered(number) // np.array([1, 2, 4], np.uint8) for number in range(25)]
    path = write_film(tmp_path / "a.mov", shown, Fraction(25), clicks(1.0, 48000))
    source = np.stack([upright(picture.frame) for picture in read_frames(path)])
    cut(clip(), path, LOOSE, tmp_path / "out.mp4")
    error = frames_of(tmp_path / "out.mp4").astype(float) - source
    assert np.abs(error.mean(axis=(0, 1, 2))).max() < 1
    assert 10 * np.log10(255**2 / (error**2).mean()) > 42


def test_size_is_a_centred_crop_of_the_crop_then_antialiased(tmp_path):
    path = counting_film(tmp_path / "a.mov", 1.0)
    piece = cut(clip(), path, replace(LOOSE, crf=0, size=(32, 32)), tmp_path / "out.mp4")
    assert piece.metadata["crop"] == [8, 0, 64, 64]
    first = next(read_frames(path)).frame
    expected = media.fit_image(torch.from_numpy(upright(first).copy()), (32, 32))
    expected = ((expected + 1) * 127.5).round().permute(1, 2, 0)
    np.testing.assert_allclose(frames_of(tmp_path / "out.mp4")[0], expected.numpy(), atol=3)


@pytest.mark.parametrize(
    ("crop", "crop_size", "size", "box"),
    [
        (None, None, None, (0, 0, 80, 64)),
        ((1, 2, 33, 35), None, None, (1, 2, 32, 34)),
        ((10, 10, 40, 40), (160, 128), None, (5, 5, 20, 20)),
        ((0, 0, 160, 128), (160, 128), (32, 32), (8, 0, 64, 64)),
        (None, None, (64, 32), (24, 0, 32, 64)),
    ],
)
def test_crop_box(crop, crop_size, size, box):
    assert crop_box(clip(crop=crop, crop_size=crop_size), (80, 64), size) == box


@pytest.mark.parametrize(
    ("crop", "crop_size", "words"),
    [
        ((50, 0, 40, 40), None, "outside the frame"),
        ((0, 0, 1, 1), None, "smaller than 2 x 2"),
        ((0, 0, 40, 40), (64, 64), "another shape"),
    ],
)
def test_a_crop_that_does_not_fit_is_refused(crop, crop_size, words):
    with pytest.raises(UserError, match=words):
        crop_box(clip(crop=crop, crop_size=crop_size), (80, 64), None)


def test_a_thin_video_is_refused_by_every_reader(tmp_path):
    path = write_film(tmp_path / "a.mp4", [np.zeros((16, 192, 3), np.uint8)] * 30, Fraction(25))
    for read in (lambda: next(read_frames(path)), lambda: media.read_video(path)):
        with pytest.raises(UserError, match=r"^192 x 16 pixels: .*; its sides may differ 10 to 1 at most"):
            read()


def test_a_zero_crop_is_refused_even_when_the_manifest_let_it_pass():
    zero = clip(crop=(0, 0, 2, 2), crop_size=(8000, 6400))
    with pytest.raises(UserError, match="outside the frame"):
        crop_box(zero, (80, 64), None)


def refusal(path, tmp_path, config=LOOSE, **fields) -> str:
    with pytest.raises(UserError) as error:
        cut(clip(**fields), path, config, tmp_path / "out.mp4")
    return str(error.value)


def test_clips_that_the_film_does_not_cover_are_refused(tmp_path):
    path = counting_film(tmp_path / "a.mov", 2.0)
    assert "video ends at 2.00 s" in refusal(path, tmp_path, start=1.0, end=2.5)
    assert "no frame at 7.00 s" in refusal(path, tmp_path, start=7.0, end=9.0)
    assert "too short: 1 frames" in refusal(path, tmp_path, start=1.0, end=1.04)
    assert "too short: 0 frames" in refusal(path, tmp_path, start=1.0, end=1.01)
    assert cut(clip(start=1.0, end=2.05), path, LOOSE, tmp_path / "out.mp4").num_frames == 25


@pytest.mark.parametrize(
    ("seconds", "start", "words"),
    [
        (1.5, 0.0, "sound ends 0.5 s before"),
        (2.0, 0.3, "sound starts 0.3 s after"),
        (0.5, 0.0, "sound ends 1.5 s before"),
    ],
)
def test_sound_that_does_not_cover_the_pictures_is_refused(tmp_path, seconds, start, words):
    shown = [numbered(number) for number in range(50)]
    path = write_film(
        tmp_path / "a.mkv", shown, Fraction(25), clicks(seconds, 48000), 48000, "pcm_s16le", sound_start=start
    )
    assert words in refusal(path, tmp_path)


def test_a_little_missing_sound_becomes_silence(tmp_path):
    shown = [numbered(number) for number in range(50)]
    path = write_film(tmp_path / "a.mov", shown, Fraction(25), clicks(1.95, 48000) + 0.1, 48000)
    piece = cut(clip(), path, LOOSE, tmp_path / "out.mp4")
    assert piece.metadata["silence_added"] == 800
    assert len(piece.sound) == 32000
    assert piece.sound[-700:].abs().max() < 1e-3
    assert piece.sound[-2000:-900].min() > 0.05


def test_sound_with_a_hole_keeps_its_times(tmp_path):
    path = counting_film(tmp_path / "a.mkv", 3.0, audio_codec="pcm_s16le", sound_hole=(1.0, 1.5))
    piece = cut(clip(), path, LOOSE, tmp_path / "out.mp4")
    places = [place for place in expected_clicks(Fraction(0), 48000) if not 15000 < place < 25500]
    assert piece.metadata["silence_added"] == pytest.approx(8000, abs=800)
    assert [n for n in detected_clicks(piece.sound.numpy()) if not 15000 < n < 25500] == pytest.approx(places, abs=1)


def test_no_sound_track(tmp_path):
    path = write_film(tmp_path / "a.mp4", [numbered(number) for number in range(30)], Fraction(25))
    assert "no audio track" in refusal(path, tmp_path)
    piece = cut(clip(), path, replace(LOOSE, silent=True), tmp_path / "out.mp4")
    assert piece.sound is None
    assert piece.metadata["samples"] == 0


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "pcm_s16le"), ("a.mp4", "aac"), ("a.webm", "libopus")])
@pytest.mark.parametrize("kind", ["zeros", "antiphase", "zeros in the default track"])
def test_silence_is_refused_unless_it_is_asked_for(tmp_path, name, codec, kind):
    voice = sum(tone(2.0, 48_000, 130.0 * n) / 2 / n for n in range(1, 20))
    tracks = {
        "zeros": [0 * voice[:, None]],
        "antiphase": [np.stack([voice, -voice], 1)],
        "zeros in the default track": [voice[:, None], 0 * voice[:, None]],
    }[kind]
    path = write_sound(tmp_path / name, codec, 48_000, *tracks, default=len(tracks) - 1, video=50)
    words = "cancel each other" if kind == "antiphase" else f"audio track {len(tracks)} of {len(tracks)}"
    message = refusal(path, tmp_path)
    assert "sound is silent throughout" in message
    assert words in message
    piece = cut(clip(), path, replace(LOOSE, silent=True), tmp_path / "out.mp4")
    assert piece.metadata["audio_track"] == f"{len(tracks)} of {len(tracks)}"
    if len(tracks) == 2:
        write_sound(path, codec, 48_000, *tracks, default=0, video=50)
        assert cut(clip(), path, LOOSE, tmp_path / "out.mp4").metadata["audio_track"] == "1 of 2"


@pytest.mark.parametrize("part", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("flags", ["", "faststart"])
def test_a_truncated_film_is_refused(tmp_path, part, flags):
    noise = np.random.default_rng(0).integers(0, 255, (60, 8, 80, 3)).astype(np.uint8)
    shown = [np.concatenate([numbered(number)[:56], noise[number]]) for number in range(60)]
    sound = clicks(2.4, 48000)
    write_film(tmp_path / "b.mp4", shown, Fraction(25), sound, 48000, "aac", movflags=flags)
    data = (tmp_path / "b.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: int(part * len(data))])
    assert refusal(tmp_path / "a.mp4", tmp_path, end=2.4)


def two_shots(path, change: int = 40):
    shown = [numbered(n) if n < change else 255 - numbered(n) for n in range(100)]
    return write_film(path, shown, Fraction(25), clicks(4.0, 48000))


def test_scene_cut_is_refused_cut_away_or_kept(tmp_path):
    path = two_shots(tmp_path / "a.mov")
    assert "scene cut at 1.60 s" in refusal(path, tmp_path)
    kept = cut(clip(), path, replace(LOOSE, cuts="keep"), tmp_path / "out.mp4")
    assert kept.metadata["scene_cut_frames"] == [40]
    assert kept.num_frames == 100
    longest = cut(clip(), path, replace(LOOSE, cuts="longest"), tmp_path / "out.mp4")
    assert (longest.metadata["start"], longest.metadata["end"]) == (1.6, 4.0)
    assert longest.metadata["shot_of"] == [0.0, 4.0]
    assert [number_of(255 - frame) for frame in frames_of(tmp_path / "out.mp4")] == list(range(40, 100))
    assert detected_clicks(longest.sound.numpy()) == pytest.approx(
        expected_clicks(Fraction(8, 5), len(longest.sound)), abs=1
    )


@pytest.mark.parametrize("fps", [Fraction(16), Fraction(24), Fraction(12)])
def test_the_longest_shot_has_no_frame_of_another(tmp_path, fps):
    path = two_shots(tmp_path / "a.mov", 41)
    piece = cut(clip(), path, replace(LOOSE, cuts="longest", fps=fps), tmp_path / "out.mp4")
    numbers = [number_of(255 - frame) for frame in frames_of(tmp_path / "out.mp4")]
    assert min(numbers) >= 41
    assert piece.metadata["scene_cut_frames"] == []


def test_motion_is_no_scene_cut():
    rng = np.random.default_rng(0)
    moving = [torch.from_numpy(np.roll(np.full(3072, 128.0), k) + 40 * rng.standard_normal(3072)) for k in range(20)]
    assert cutting.scene_cuts([(b - a).abs().mean().item() for a, b in pairwise(moving)])[0] == []
    assert cutting.scene_cuts([0.0, 0.0, 0.0, 16.0, 0.0, 0.0, 0.0]) == ([4], 16.0)
    assert cutting.scene_cuts([0.0, 0.0, 0.0, 14.0, 0.0, 0.0, 0.0])[0] == []


def test_a_clip_of_hours_is_refused(tmp_path, monkeypatch):
    path = counting_film(tmp_path / "a.mov", 1.2)
    monkeypatch.setattr(cutting, "LONGEST", 1)
    for end in (None, 1.2):
        with pytest.raises(UserError, match="longer than 1 s; cut it into clips"):
            cut(clip(end=end), path, LOOSE, tmp_path / "out.mp4")


def test_at_most_so_many_seconds(tmp_path):
    path = counting_film(tmp_path / "a.mov", 3.0)
    shorter = replace(LOOSE, max_seconds=1.2)
    assert cut(clip(start=1.0), path, shorter, tmp_path / "out.mp4").num_frames == 30
    assert cut(clip(start=2.4), path, shorter, tmp_path / "out.mp4").num_frames == 15
    assert cut(clip(start=1.0, end=2.0), path, shorter, tmp_path / "out.mp4").num_frames == 25


def test_flac_keeps_16_bits():
    sound = torch.linspace(-1.0, 1.0, 5001)
    expected = np.clip(np.round(sound.double().numpy() * 32768), -32768, 32767) / 32768
    np.testing.assert_array_equal(sound_of(encode_flac(sound)), expected)


def test_a_picture_is_never_far_from_its_frame(tmp_path):
    times = [Fraction(n, 25) for n in range(25)] + [Fraction(n, 25) for n in range(60, 90)]
    path = write_film(tmp_path / "a.mkv", [numbered(n) for n in range(55)], times, clicks(4.0, 48000))
    assert "no source frame within 0.5 s of a frame" in refusal(path, tmp_path)


@pytest.mark.parametrize(
    "wrong", [{"fps": Fraction(0)}, {"size": (8, 64)}, {"crf": 52}, {"max_seconds": 0.5, "min_seconds": 1.0}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(UserError):
        CutConfig(**wrong)


def test_equal_frames_give_equal_bytes(tmp_path):
    """In one process too: x264's macroblock tree made one film in four another one."""
    rng = np.random.default_rng(0)
    frames = [np.clip(numbered(n)[:56, :72].astype(int) + rng.integers(-9, 9, (56, 72, 3)), 0, 255) for n in range(40)]
    frames = torch.from_numpy(np.stack(frames).astype(np.uint8))
    pieces, films = set(), set()
    for number in range(4):
        held = np.random.bytes(10_000 * number)  # another place in memory
        with cutting._Encoder(tmp_path / "piece.mp4", CutConfig(fps=Fraction(25))) as encoder:
            for frame in frames:
                encoder.write(frame)
        media.write_video(tmp_path / "film.mp4", frames, Fraction(25), torch.zeros(25_600))
        pieces.add((tmp_path / "piece.mp4").read_bytes())
        films.add((tmp_path / "film.mp4").read_bytes())
        del held
    assert (len(pieces), len(films)) == (1, 1)
    assert all(b" mbtree=0 " in film and b" threads=1 " in film for film in (*pieces, *films))
