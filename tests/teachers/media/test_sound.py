"""Sound as it comes: many channels, holes, clocks, changes within a stream, headers that are wrong, several tracks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from av.audio.layout import AudioLayout

from distill.live import uploads
from teachers import media
from teachers.errors import UserError
from teachers.media import sound
from teachers.media.channels import channel_names, downmix
from teachers.media.sound import read_sound
from tests.support.media.sounds import decoded, joined, loudest_hertz, set_sound_length, tone, write_sound

RATE = 16_000


def rms(samples: torch.Tensor) -> float:
    return float(samples.double().square().mean().sqrt())


@pytest.mark.parametrize(
    ("layout", "shares"),
    [
        ("mono", [1]),
        ("stereo", [0.5, 0.5]),
        ("2.1", [0.5, 0.5, 0]),
        ("5.1", [0.2071, 0.2071, 0.2929, 0, 0.1464, 0.1464]),
        ("7.1", [0.1602, 0.1602, 0.2265, 0, 0.1133, 0.1133, 0.1133, 0.1133]),
        ("ambisonic 1", [1, 0, 0, 0]),
        ("9 channels", [1 / 9] * 9),
        ("LFE", [1]),
    ],
)
def test_channels_are_mixed_by_their_layout(layout, shares):
    """ITU-R BS.775 by hand: front 1, centre and surround 0.7071 on each side, no LFE, divided by the sum."""
    mixed = downmix(channel_names(AudioLayout(layout))).mean(axis=1)
    np.testing.assert_allclose(mixed, shares, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "codec", "channels"),
    [
        ("a.flac", "flac", 8),
        ("a.m4a", "aac", 8),
        ("a.mkv", "pcm_s16le", 8),
        ("a.mkv", "pcm_s16le", 16),
        ("a.wav", "pcm_s16le", 12),
        ("a.aiff", "pcm_s16be", 8),  # in an order of its own, which PyAV frees twice
        ("a.ogg", "libopus", 8),
        ("a.ac3", "ac3", 6),
        ("a.m4a", "aac", 6),
    ],
)
def test_a_voice_in_any_number_of_channels_is_read(tmp_path, name, codec, channels):
    """Eight or more ended the process."""
    rows = np.repeat(tone(1.0, 48_000)[:, None], channels, axis=1)
    everywhere = media.read_audio(write_sound(tmp_path / name, codec, 48_000, rows))
    assert rms(everywhere[2000:14000]) == pytest.approx(0.5 / 2**0.5, rel=0.03)
    if channels in (6, 8):
        rows[:, [0, 1, 3, *range(4, channels)]] = 0
        centre = media.read_audio(write_sound(tmp_path / name, codec, 48_000, rows))
        share = {6: 0.2929, 8: 0.2265}[channels]
        assert rms(centre[2000:14000]) == pytest.approx(share * 0.5 / 2**0.5, rel=0.03)
    uploaded = uploads.decode_file((tmp_path / name).read_bytes()) if name != "a.ac3" else None
    assert uploaded is None or torch.equal(uploaded, media.read_audio(tmp_path / name))


@pytest.mark.parametrize(
    ("suffix", "codec", "rates", "channels"),
    [
        ("mp3", "mp3", (44_100, 48_000), (1, 1)),
        ("mp3", "mp3", (24_000, 16_000), (1, 1)),
        ("mp3", "mp3", (44_100, 44_100), (1, 2)),
        ("aac", "aac", (44_100, 48_000), (1, 1)),
        ("aac", "aac", (48_000, 48_000), (2, 1)),
    ],
)
def test_a_rate_or_layout_that_changes_keeps_the_speed(tmp_path, suffix, codec, rates, channels):
    parts = [
        write_sound(tmp_path / f"{n}.{suffix}", codec, rate, np.repeat(tone(1.5, rate)[:, None], count, axis=1))
        for n, (rate, count) in enumerate(zip(rates, channels, strict=True))
    ]
    samples, rate = decoded(joined(tmp_path / f"a.{suffix}", *parts))
    assert rate == rates[0]
    assert len(samples) / rate == pytest.approx(3.0, abs=0.15)
    for begin in (0.4, 2.1):
        part = samples[round(begin * rate) : round((begin + 0.5) * rate)]
        assert loudest_hertz(part.numpy(), rate) == pytest.approx(440, abs=3)
        assert rms(part) == pytest.approx(0.5 / 2**0.5, rel=0.06)


@pytest.mark.parametrize(
    ("name", "codec", "video"),
    [
        ("a.webm", "libopus", 0),
        ("a.webm", "libopus", 75),
        ("a.ogg", "libopus", 0),
        ("a.mka", "aac", 0),
        ("a.m4a", "aac", 0),
        ("a.mkv", "pcm_s16le", 75),
    ],
)
def test_a_hole_stays_where_it_is(tmp_path, name, codec, video):
    rows = tone(3.0, 48_000)[:, None]
    path = write_sound(tmp_path / name, codec, 48_000, rows, hole=(1.0, 2.0), video=video)
    whole = media.read_audio(path)
    assert len(whole) / RATE == pytest.approx(3.0, abs=0.05)
    assert rms(whole[round(1.1 * RATE) : round(1.95 * RATE)]) < 1e-3
    assert rms(whole[round(2.1 * RATE) : round(2.9 * RATE)]) == pytest.approx(0.5 / 2**0.5, rel=0.03)
    assert torch.equal(uploads.decode_file(path.read_bytes()), whole)
    if video:
        for first in (0, 20_000, 33_000):
            stretch = read_sound(path, first, 12_000)
            np.testing.assert_allclose(stretch.samples.numpy(), whole[first : first + 12_000].numpy(), atol=1e-3)
        assert read_sound(path, 0, 48_000).hole == pytest.approx(RATE, abs=1500)


@pytest.mark.parametrize(
    ("name", "codec", "rate", "seeks"),
    [
        ("a.wav", "pcm_s16le", 44_100, True),
        ("a.wav", "pcm_s16le", 16_000, True),
        ("a.w64", "pcm_s16le", 16_000, True),
        ("a.aiff", "pcm_s16be", 48_000, True),
        ("a.flac", "flac", 16_000, True),
        ("a.m4a", "aac", 48_000, True),
        ("a.ogg", "libopus", 48_000, True),
        ("a.mka", "aac", 44_100, False),
        ("a.mp3", "mp3", 44_100, False),
    ],
)
def test_a_stretch_of_sound_alone_is_that_of_the_whole_and_the_start_is_not_decoded(
    name, codec, rate, seeks, tmp_path, monkeypatch
):
    """An hour of a podcast is not decoded for each of its stretches; where times are rounded or guessed, it has to be."""
    times = np.arange(12 * rate) / rate
    chirp = (0.4 * np.sin(2 * np.pi * (200 * times + 40 * times**2))).astype(np.float32)[:, None]
    path = write_sound(tmp_path / name, codec, rate, chirp)
    whole, decode, frames = media.read_audio(path), sound.decoded_sound, []

    def counted(container, stream):
        for frame in decode(container, stream):
            frames.append(frame.samples / rate)
            yield frame

    monkeypatch.setattr(sound, "decoded_sound", counted)
    for first in (0, 20_001, 120_000, 159_999):
        frames.clear()
        stretch = read_sound(path, first, 16_000)
        assert (stretch.late, stretch.early, stretch.hole) == (0, 0, 0)
        np.testing.assert_allclose(stretch.samples.numpy(), whole[first : first + 16_000].numpy(), atol=1e-3)
    assert (sum(frames) < 5) == seeks  # seconds, of more than ten before the stretch's end


@pytest.mark.parametrize(
    ("suffix", "codec", "video"),
    [("webm", "libopus", 50), ("webm", "libopus", 0), ("mka", "pcm_s16le", 0), ("mkv", "aac", 50), ("ts", "aac", 50)],
)
def test_a_clock_that_starts_anew_is_refused_with_its_time(tmp_path, suffix, codec, video):
    part = write_sound(tmp_path / f"b.{suffix}", codec, 48_000, tone(2.0, 48_000)[:, None], video=video)
    path = joined(tmp_path / f"a.{suffix}", part, part)
    with pytest.raises(UserError, match=r"times of the sound jump back at (1\.9|2\.0)\d s"):
        media.read_audio(path)
    if suffix != "ts":
        with pytest.raises(UserError, match="times of the sound jump back at"):
            uploads.decode_file(path.read_bytes())
    if video:
        with pytest.raises(UserError, match=r"times jump back at (1\.9|2\.0)\d s"):
            media.read_video(path)


@pytest.mark.parametrize("seconds", [0.0, 0.1, 2.0])
@pytest.mark.parametrize(
    ("name", "codec", "video"), [("a.m4a", "aac", 0), ("a.mp4", "aac", 75), ("a.mov", "pcm_s16le", 75)]
)
def test_a_header_that_says_too_little_is_not_believed(tmp_path, name, codec, video, seconds):
    path = write_sound(tmp_path / name, codec, 48_000, tone(3.0, 48_000)[:, None], video=video)
    right = media.read_audio(path)
    set_sound_length(path, seconds)
    found = media.read_audio(path)
    assert abs(len(found) - len(right)) < 1100
    assert rms(found[-8000:-1000]) > 0.3
    if video:
        assert read_sound(path, 40_000, 7000).early == 0
        np.testing.assert_allclose(read_sound(path, 40_000, 7000).samples, right[40_000:47_000], atol=1e-2)


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "aac"), ("a.mkv", "pcm_s16le"), ("a.mov", "pcm_s16le"), ("a.webm", "libopus")]
)
@pytest.mark.parametrize("default", [0, 1])
def test_the_default_track_is_taken_and_said(tmp_path, name, codec, default):
    voices = [tone(2.0, 48_000, hertz)[:, None] for hertz in (300.0, 700.0)]
    path = write_sound(tmp_path / name, codec, 48_000, *voices, default=default, video=50)
    reader = media.AudioReader(path)
    samples = torch.cat(list(reader))
    assert reader.track == f"{default + 1} of 2"
    assert loudest_hertz(samples[10_000:80_000].numpy(), reader.rate) == pytest.approx((300, 700)[default], abs=3)
    assert read_sound(path, 0, 16_000).track == reader.track


@pytest.mark.parametrize(
    ("name", "codec"), [("a.wav", "pcm_s16le"), ("a.m4a", "aac"), ("a.webm", "libopus"), ("a.mp3", "mp3")]
)
def test_channels_that_cancel_each_other_are_told(tmp_path, name, codec):
    voice = sum(tone(3.0, 48_000, 130.0 * n) / 2 / n for n in range(1, 20))
    path = write_sound(tmp_path / name, codec, 48_000, np.stack([voice, -voice], 1))
    with pytest.raises(UserError, match="channels of the sound cancel each other"):
        media.read_audio(path)
    write_sound(path, codec, 48_000, np.stack([voice, 0 * voice], 1))
    assert rms(media.read_audio(path)) > 0.03


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [("a.mp3", "mp3", 24_000), ("a.mp3", "mp3", 8_000), ("a.aac", "aac", 24_000), ("a.m4a", "aac", 16_000),
     ("a.ogg", "libopus", 48_000), ("a.webm", "libopus", 48_000), ("a.flac", "flac", 22_050), ("a.wav", "pcm_s16le", 8_000)],
)  # fmt: skip
def test_a_page_may_send_what_sample_reads(tmp_path, name, codec, rate):
    path = write_sound(tmp_path / name, codec, rate, tone(1.0, rate)[:, None])
    found = uploads.decode_file(path.read_bytes())
    assert torch.equal(found, media.read_audio(path))
    assert loudest_hertz(found[2000:14_000].numpy(), RATE) == pytest.approx(440, abs=3)


def test_two_channels_are_given_as_they_are_and_their_mean_is_the_mono_sound(tmp_path):
    rows = np.stack([tone(1.0, 44_100, 300.0), tone(1.0, 44_100, 500.0)], 1)
    path = write_sound(tmp_path / "a.wav", "pcm_s16le", 44_100, rows)
    given = torch.cat(list(media.AudioReader(path, mono=False)))
    np.testing.assert_allclose(given.numpy(), rows, atol=1e-4)
    assert torch.equal(given.mean(dim=1), decoded(path)[0])


@pytest.mark.parametrize("rate", [1, 3_999, 2_000_000])
def test_a_sample_rate_that_no_sound_has_is_refused(tmp_path, rate):
    data = bytearray(write_sound(tmp_path / "a.wav", "pcm_s16le", 8_000, tone(0.5, 8_000)[:, None]).read_bytes())
    at = data.index(b"fmt ") + 12
    data[at : at + 4] = rate.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(data)
    with pytest.raises(UserError, match=f"sample rate of {rate} Hz"):
        media.read_audio(tmp_path / "a.wav")


def test_a_hole_of_hours_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sound, "LONGEST_HOLE", 0.5)
    path: Path = write_sound(tmp_path / "a.mka", "pcm_s16le", 48_000, tone(3.0, 48_000)[:, None], hole=(1.0, 2.0))
    with pytest.raises(UserError, match=r"hole of 1 s at (0\.9|1\.0)\d s"):
        media.read_audio(path)
