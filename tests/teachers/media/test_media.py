import math
import os
import resource
import sys
import wave
import weakref
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from teachers import media
from teachers.errors import UserError
from tests.support.media.sounds import decoded

FPS = Fraction(25, 2)
RATE = 16000


def tone(seconds: float, rate: int, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def encode_audio(path: Path, codec: str, sample_format: str, rate: int, channels: list[np.ndarray]) -> Path:
    """Write `channels` (each float32 [S]) with a codec; the container follows the suffix."""
    layout = {1: "mono", 2: "stereo"}[len(channels)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout, format=sample_format)
        frame = av.AudioFrame.from_ndarray(np.stack(channels), format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def save_image(path: Path, pixels: np.ndarray, codec: str, pixel_format: str) -> Path:
    source = {3: "rgb24", 4: "rgba"}[pixels.shape[2]]
    context = av.CodecContext.create(codec, "w")
    context.width, context.height, context.pix_fmt = pixels.shape[1], pixels.shape[0], pixel_format
    context.time_base = Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=source)
    frame = frame.reformat(format=pixel_format)
    frame.pts = 0
    path.write_bytes(b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)]))
    return path


def ramp_picture(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([255 * rows / height, 255 * columns / width, 128 + 0 * rows], -1).astype(np.uint8)


def durations(path: Path) -> dict[str, Fraction]:
    with av.open(str(path)) as container:
        return {stream.type: stream.duration * stream.time_base for stream in container.streams}


@pytest.mark.parametrize(
    ("name", "codec", "sample_format", "rate"),
    [
        ("a.wav", "pcm_s16le", "s16", 16000),
        ("b.wav", "pcm_f32le", "flt", 24000),
        ("c.wav", "pcm_u8", "u8", 8000),
        ("d.wav", "pcm_s32le", "s32", 44100),
        ("e.mp3", "mp3", "fltp", 44100),
        ("f.m4a", "aac", "fltp", 48000),
    ],
)
@pytest.mark.parametrize("num_channels", [1, 2])
def test_any_sound_becomes_16_khz_mono(tmp_path, name, codec, sample_format, rate, num_channels):
    left = tone(0.7, rate)
    channels = [left, np.zeros_like(left)][:num_channels]
    samples = media.read_audio(encode_audio(tmp_path / name, codec, sample_format, rate, channels))
    expected = tone(0.7, RATE) / num_channels
    assert samples.dtype == torch.float32
    assert len(samples) == len(expected)
    middle = slice(2000, 9000)
    errors = [np.abs(np.roll(samples.numpy(), lag)[middle] - expected[middle]).mean() for lag in (-1, 0, 1)]
    assert np.argmin(errors) == 1
    assert errors[1] < {"mp3": 0.03, "aac": 0.03, "pcm_u8": 0.01}.get(codec, 0.001)


def test_resample_keeps_time_and_length():
    for source, target in [(24000, 16000), (16000, 44100), (44100, 16000)]:
        samples = torch.from_numpy(tone(2.3, source))
        output = media.resample(samples, source, target)
        assert len(output) == math.ceil(len(samples) * target / source)
        expected = tone(2.3, target)
        np.testing.assert_allclose(output.numpy()[1000:-1000], expected[1000:-1000], atol=2e-3)


def test_unreadable_sound_is_one_line(tmp_path):
    def message(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            media.read_audio(path)
        text = str(caught.value)
        assert "\n" not in text
        assert str(path) in text
        return text

    assert "not found" in message(tmp_path / "none.wav")
    assert "not a file" in message(tmp_path)
    empty = tmp_path / "empty.wav"
    empty.touch()
    assert "0 bytes" in message(empty)
    silent = tmp_path / "zero.wav"
    with wave.open(str(silent), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", "none"))
    assert "0 seconds" in message(silent)
    contents = ["hello, this is no sound\n" * 40, "1\n00:00:01,000 --> 00:00:02,000\nhi\n", "{}"]
    for number, content in enumerate(contents):
        text = tmp_path / f"text{number}.wav"
        text.write_text(content)
        message(text)
    playlist = tmp_path / "list.wav"
    playlist.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n")
    message(playlist)
    broken = tone(0.5, RATE)
    broken[100] = np.nan
    assert "not finite, first at 100" in message(encode_audio(tmp_path / "nan.wav", "pcm_f32le", "flt", RATE, [broken]))
    integers = encode_audio(tmp_path / "loud.wav", "pcm_f32le", "flt", RATE, [tone(0.5, RATE) * 32768])
    assert "peak" in message(integers)
    mute = tmp_path / "mute.mp4"
    media.write_video(mute, torch.zeros(3, 16, 16, 3, dtype=torch.uint8), FPS)
    assert "no audio track" in message(mute)
    picture = save_image(tmp_path / "p.wav", ramp_picture(16, 16), "png", "rgb24")
    assert "no audio track" in message(picture)


@pytest.mark.parametrize(("starts", "codec"), [(0.5, "aac"), (2.5, "aac"), (-0.32, "pcm_s16le")])
def test_track_of_a_film_starts_with_its_pictures(tmp_path, starts, codec):
    """Silence is put before a late track; what comes before the pictures is left out."""
    path = film_with_track(tmp_path / f"film.{'mp4' if codec == 'aac' else 'mkv'}", codec, starts)
    samples = media.read_audio(path)
    first = int((samples.abs() > 0.2).nonzero()[0])
    assert abs(first - round((starts if starts > 0 else 0.6 + starts) * RATE)) < 200
    assert abs(len(samples) - round((1.0 + starts) * RATE)) < 1200


def test_track_before_the_pictures_is_refused(tmp_path):
    with pytest.raises(UserError, match="ends before the video starts"):
        media.AudioReader(film_with_track(tmp_path / "film.mkv", "pcm_s16le", -1.2))


def film_with_track(path: Path, codec: str, starts: float) -> Path:
    """Two seconds of pictures and one of sound (0.1 s, a pause, from 0.6 s on), which starts so many seconds after them."""
    sound = np.concatenate([tone(0.1, RATE), np.zeros(RATE // 2, np.float32), tone(0.4, RATE)])
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=FPS)
        video.width = video.height = 32
        video.pix_fmt = "yuv420p"
        track = container.add_stream(codec, rate=RATE, layout="mono")
        for number in range(25):
            picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            picture.pts, picture.time_base = round(max(-starts, 0.0) * 1000) + 80 * number, Fraction(1, 1000)
            container.mux(video.encode(picture))
        frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, round(max(starts, 0.0) * RATE), Fraction(1, RATE)
        container.mux(track.encode(frame))
        container.mux(video.encode(None))
        container.mux(track.encode(None))
    return path


def test_sound_is_read_as_it_is_needed(tmp_path):
    """Blocks of a second at most; a fault far behind is raised when it is reached, and the file can be let go before."""
    broken = tone(20.0, RATE)
    broken[15 * RATE] = np.inf
    path = encode_audio(tmp_path / "a.wav", "pcm_f32le", "flt", RATE, [broken])
    reader = media.AudioReader(path)
    assert (reader.rate, reader.seconds) == (RATE, 20.0)
    lengths = []
    with pytest.raises(UserError, match=rf"^audio holds samples that are not finite, first at {15 * RATE}: "):
        lengths.extend(len(block) for block in reader)
    assert max(lengths) <= RATE
    assert 14 * RATE < sum(lengths) <= 15 * RATE
    if sys.platform == "linux":
        reader = media.AudioReader(path)
        assert is_open(path)
        reader.close()
        assert not is_open(path)


def is_open(path: Path) -> bool:
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return any(os.readlink(link) == str(path) for link in links if link.is_symlink())


@pytest.mark.parametrize("fps", [FPS, Fraction(25), Fraction(30000, 1001), Fraction(16)])
@pytest.mark.parametrize("num_frames", [1, 2, 37])
def test_written_video_has_exact_frames_and_duration(tmp_path, fps, num_frames):
    path = tmp_path / "v.mp4"
    generator = (np.full((16, 24, 3), 6 * number, np.uint8) for number in range(num_frames))
    assert media.write_video(path, generator, fps, torch.from_numpy(tone(1.0, RATE)), RATE, upscale=3) == num_frames
    length = durations(path)
    assert length["video"] == num_frames / fps
    assert abs(length["audio"] - num_frames / fps) <= Fraction(1, RATE)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.height, stream.width, stream.frames) == (48, 72, num_frames)
        times = [frame.pts * frame.time_base for frame in container.decode(stream)]
    assert times == [number / fps for number in range(num_frames)]
    frames, rate = media.read_video(path)
    assert rate == fps
    assert frames.shape == (num_frames, 48, 72, 3)
    levels = frames.float().mean((1, 2, 3)).numpy()
    np.testing.assert_allclose(levels, 6.0 * np.arange(num_frames), atol=2.5)
    assert sorted(os.listdir(tmp_path)) == ["v.mp4"]


@pytest.mark.parametrize("sample_rate", [16000, 24000, 44100, 22000])
def test_sound_stays_with_its_picture(tmp_path, sample_rate):
    flash, num_frames = 20, 40
    frames = torch.zeros(num_frames, 32, 32, 3, dtype=torch.uint8)
    frames[flash] = 255
    audio = torch.zeros(round(num_frames / FPS * sample_rate))
    start = round(flash / FPS * sample_rate)
    audio[start : start + sample_rate // 100] = torch.from_numpy(tone(0.01, sample_rate, 1500.0))
    path = tmp_path / "sync.mp4"
    media.write_video(path, frames, FPS, audio, sample_rate, upscale=4)
    seen = int(media.read_video(path)[0].float().mean((1, 2, 3)).argmax())
    heard = int((media.read_audio(path).abs() > 0.15).nonzero()[0])
    assert seen == flash
    assert abs(heard - flash / FPS * RATE) < 0.004 * RATE
    assert len(media.read_audio(path)) == round(num_frames / FPS * RATE)


@pytest.mark.parametrize("seconds", [0.0, 0.3, 9.0])
def test_sound_is_cut_or_padded_to_the_pictures(tmp_path, seconds):
    path = tmp_path / "v.mp4"
    media.write_video(path, torch.zeros(25, 16, 16, 3, dtype=torch.uint8), FPS, torch.from_numpy(tone(seconds, RATE)))
    assert durations(path) == {"video": Fraction(2), "audio": Fraction(2)}
    samples = media.read_audio(path)
    assert len(samples) == 2 * RATE
    assert samples[round(seconds * RATE) + 2048 :].abs().sum() < 1


@pytest.mark.parametrize("sample_rate", [16000, 22000])
def test_sound_may_come_in_any_pieces(tmp_path, sample_rate):
    """Before its pictures or long after them, the same film."""
    sound = torch.from_numpy(tone(2.1, sample_rate))
    frames = torch.arange(25, dtype=torch.uint8)[:, None, None, None].expand(25, 16, 16, 3) * 9
    media.write_video(tmp_path / "whole.mp4", frames, FPS, sound, sample_rate)
    for name, ahead in [("ahead.mp4", 0.3), ("behind.mp4", -1.0)]:
        heard = 0
        with media.VideoWriter(tmp_path / name, FPS, sample_rate) as writer:
            for number, frame in enumerate(frames):
                until = max(heard, round((number / FPS + ahead) * sample_rate))
                for piece in sound[heard:until].split(777):
                    writer.write_audio(piece)
                heard = until
                writer.write(frame)
            writer.write_audio(sound[heard:])
        assert durations(tmp_path / name) == durations(tmp_path / "whole.mp4")
        whole, pieces = decoded(tmp_path / "whole.mp4")[0], decoded(tmp_path / name)[0]
        assert torch.equal(whole, pieces)
        assert torch.equal(media.read_video(tmp_path / "whole.mp4")[0], media.read_video(tmp_path / name)[0])
    with media.VideoWriter(tmp_path / "mute.mp4", FPS) as writer:
        writer.write(frames[0])
        with pytest.raises(ValueError, match="with a sample rate"):
            writer.write_audio(sound)
    assert list(durations(tmp_path / "mute.mp4")) == ["video"]


def test_colours_and_pixels_survive(tmp_path):
    path = tmp_path / "c.mp4"
    colours = torch.tensor([[200, 30, 60], [20, 180, 90], [40, 60, 220], [128, 128, 128]], dtype=torch.uint8)
    frame = colours.reshape(2, 2, 3).repeat_interleave(4, 0).repeat_interleave(4, 1)
    for smooth in (False, True):
        media.write_video(path, frame[None].repeat(5, 1, 1, 1), FPS, upscale=8, smooth=smooth)
        frames = media.read_video(path)[0]
        assert frames.shape == (5, 64, 64, 3)
        corners = frames[2][[8, 8, 56, 56], [8, 56, 8, 56]].int()
        assert (corners - colours.int()).abs().max() <= 6
    assert media.read_video(path, size=(16, 32))[0].shape == (5, 16, 32, 3)


def test_odd_sizes_are_made_even(tmp_path):
    media.write_video(tmp_path / "o.mp4", np.full((2, 31, 33, 3), 90, np.uint8), FPS)
    assert media.read_video(tmp_path / "o.mp4")[0].shape == (2, 32, 34, 3)


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "v.mp4"
    media.write_video(path, torch.zeros(2, 16, 16, 3, dtype=torch.uint8), FPS)
    before = path.read_bytes()

    def failing():
        yield torch.zeros(16, 16, 3, dtype=torch.uint8)
        raise RuntimeError("the student stopped")

    with pytest.raises(RuntimeError, match="the student stopped"):
        media.write_video(path, failing(), FPS, torch.zeros(16000))
    with pytest.raises(ValueError, match="at least one frame"):
        media.write_video(path, [], FPS)
    with pytest.raises(ValueError, match="uint8"):
        media.write_video(path, [torch.zeros(16, 16, 3)], FPS)
    with pytest.raises(ValueError, match="one size"):
        media.write_video(path, [np.zeros((16, 16, 3), np.uint8), np.zeros((16, 18, 3), np.uint8)], FPS)
    with pytest.raises(UserError, match="not finite"):
        media.write_video(path, [np.zeros((16, 16, 3), np.uint8)], FPS, torch.full((10,), torch.nan))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["v.mp4"]


def test_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    frames = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    (tmp_path / "dir.mp4").mkdir()
    for name in ("none/v.mp4", "file/v.mp4", "v.avi", "dir.mp4"):
        with pytest.raises(UserError, match="output"):
            media.write_video(tmp_path / name, frames, FPS)
    if sys.platform == "linux":
        with pytest.raises(UserError, match="not writable"):
            media.check_output(Path("/proc/v.mp4"))
    assert sorted(os.listdir(tmp_path)) == ["dir.mp4", "file"]


def test_full_disk_is_one_line(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3)).astype(np.uint8)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot be written \(File too large\)"):
            media.write_video(tmp_path / "v.mp4", noise, FPS, torch.zeros(16000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_frames_are_not_kept(tmp_path):
    alive = weakref.WeakSet()

    class Frame(np.ndarray):
        __hash__ = object.__hash__

    def frames():
        for number in range(60):
            frame = np.full((16, 16, 3), number, np.uint8).view(Frame)
            alive.add(frame)
            most_alive.append(len(alive))
            yield frame

    most_alive: list[int] = []
    media.write_video(tmp_path / "v.mp4", frames(), FPS)
    assert max(most_alive) <= 3
