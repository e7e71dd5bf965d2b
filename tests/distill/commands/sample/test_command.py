"""`distill sample`: any split of the sound gives the same film, memory does not follow its length, realtime keeps the clock."""

import argparse
import os
import signal
import wave
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
import torch

from distill.cli import main
from distill.commands.sample import command
from students.serving.session import Chunk, Session, Starved
from students.weights.checkpoint import load_student, save_student
from teachers import media
from teachers.errors import UserError
from tests.support.sounds import decoded, loudest_hertz, write_sound
from tests.support.tiny import a_bundle, some_sound
from tests.teachers.media.test_media import encode_audio, ramp_picture, save_image, tone

FPS = Fraction(25, 2)
RATE, NUM_SAMPLES = 24000, 24000 * 2 - 700  # 25 frames: 3, and then chunks of 4


@dataclass(frozen=True)
class FakeSpec:
    fps: Fraction = FPS
    height: int = 32
    width: int = 32


@dataclass(frozen=True)
class FakeBundle:
    spec: FakeSpec = field(default_factory=FakeSpec)
    unlike = staticmethod(lambda *_: [])


class LoudSession:
    """Shows the reference, brightened by each frame's loudness; three frames first, then chunks of four."""

    def __init__(self, bundle: FakeBundle, reference: torch.Tensor, text: str, seed: int, **_: object):
        assert reference.shape == (3, bundle.spec.height, bundle.spec.width)
        assert (text, seed) == ("smiles and nods", 7)
        self.picture = ((reference + 1) * 64).byte().permute(1, 2, 0)
        self.spec, self.closed = bundle.spec, False
        self.heard = torch.zeros(0)
        self.frames_given = self.per_frame = 0

    def push(self, audio: torch.Tensor, rate: int) -> None:
        self.per_frame = round(rate / self.spec.fps)
        self.heard = torch.cat([self.heard, audio])

    def close(self) -> None:
        self.closed = True

    def step(self) -> Chunk | Starved:
        length = 4 if self.frames_given else 3
        need = length * self.per_frame
        if len(self.heard) < max(need, 1) and not (self.closed and len(self.heard)):
            return Starved("end" if self.closed else "audio")
        span, self.heard = self.heard[:need], self.heard[need:]
        padded = torch.nn.functional.pad(span, (0, need - len(span)))
        loud = padded.reshape(length, -1).abs().amax(1) * 120
        self.frames_given += length
        frames = self.picture + loud.byte()[:, None, None, None]
        return Chunk(0, self.frames_given - length, frames, padded, {})


class ShortSession(LoudSession):
    def step(self):
        return Starved("audio") if self.frames_given else super().step()


class Clock:
    """Stands for the module `time`: it passes by sleeping and by what a session's work is said to cost."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    save_student(folder, a_bundle(), "a card")
    return folder


@pytest.fixture
def inputs(tmp_path, student) -> dict[str, Path]:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "out").mkdir()
    return {
        "student": student,
        "image": save_image(folder / "face.png", ramp_picture(90, 60), "png", "rgb24"),
        "audio": speech(folder / "speech.wav", NUM_SAMPLES),
        "out": tmp_path / "out" / "film.mp4",
    }


@pytest.fixture
def loud(monkeypatch):
    """`distill sample` with a fake student whose pictures show how loud it is; the function sets session and spec."""

    def use(session: type = LoudSession, spec: FakeSpec | None = None) -> None:
        monkeypatch.setattr("students.weights.checkpoint.load_student", lambda _: FakeBundle(spec or FakeSpec()))
        monkeypatch.setattr("students.serving.session.Session", session)
        monkeypatch.setattr("students.serving.optimize.prepare", lambda bundle, *_: bundle)

    return use


@pytest.fixture
def noted(monkeypatch):
    """`distill sample` with a clock of our own, and a real session and a film that note what goes in and out, and when."""

    class Noted(Session):
        clock = Clock()
        cost = staticmethod(lambda index: 1e-6)  # seconds of chunk number `index`
        pushed: list[tuple[float, int]]
        drawn: list[tuple[float, Chunk]]
        held: list[int]
        shown: list[torch.Tensor]  # what the film got
        heard: list[torch.Tensor]

        def __init__(self, *given, **options):
            super().__init__(*given, **options)
            Noted.pushed, Noted.drawn, Noted.held = [], [], []

        def push(self, audio=None, pose=None, rate=16000):
            super().push(audio, pose, rate)
            Noted.pushed.append((Noted.clock.now, len(audio)))
            Noted.held.append(self.inputs.audio.end - self.inputs.audio.start)

        def step(self):
            chunk = super().step()
            if isinstance(chunk, Chunk):
                Noted.clock.now += Noted.cost(chunk.index)
                Noted.drawn.append((Noted.clock.now, chunk))
            return chunk

    class Film(media.VideoWriter):
        def __init__(self, *given, **options):
            super().__init__(*given, **options)
            Noted.shown, Noted.heard = [], []

        def write(self, frame):
            super().write(frame)
            Noted.shown.append(frame)

        def write_audio(self, samples):
            super().write_audio(samples)
            Noted.heard.append(samples)

    monkeypatch.setattr("students.serving.session.Session", Noted)
    monkeypatch.setattr(media, "VideoWriter", Film)
    monkeypatch.setattr(command, "time", Noted.clock)
    return Noted


def speech(
    path: Path, num_samples: int, rate: int = RATE, codec: str = "pcm_f32le", sample_format: str = "flt"
) -> Path:
    return encode_audio(path, codec, sample_format, rate, [some_sound(num_samples).numpy()])


def parse(inputs: dict[str, Path], *extra: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    options = [word for name, path in inputs.items() for word in (f"--{name}", str(path))]
    return parser.parse_args([*options, "--text", "smiles and nods", "--seed", "7", *extra])


def film(inputs: dict[str, Path], *extra: str) -> None:
    assert command.run(parse(inputs, "--size", "16", *extra)) == 0


def test_sample_writes_the_length_of_the_sound(inputs, loud, capsys):
    loud()
    sound = np.zeros(NUM_SAMPLES, np.float32)
    sound[RATE : RATE + 480] = tone(0.02, RATE, 1000.0)
    encode_audio(inputs["audio"], "pcm_f32le", "flt", RATE, [sound])
    assert command.run(parse(inputs)) == 0
    frames, fps = media.read_video(inputs["out"])
    seconds = Fraction(NUM_SAMPLES, RATE)
    assert fps == FPS
    assert frames.shape == (25, 256, 256, 3)
    with av.open(str(inputs["out"])) as container:
        lengths = [stream.duration * stream.time_base for stream in container.streams]
    assert len(lengths) == 2
    assert all(0 <= length - seconds < 1 / FPS for length in lengths)
    changes = frames.float().mean((1, 2, 3)).diff()
    heard, rate = decoded(inputs["out"])
    assert rate == RATE
    onset = int((heard.abs() > 0.2).nonzero()[0]) / rate
    assert int(changes.argmax()) + 1 == int(onset * FPS) == 12
    captured = capsys.readouterr()
    assert "25 frames, 2.00 s, first frame after" in captured.out
    assert "stalls" not in captured.out
    assert "25/25" in captured.err
    assert "first frame" in captured.err
    assert os.listdir(inputs["out"].parent) == ["film.mp4"]


@pytest.mark.parametrize(("rate", "channels"), [(44_100, 2), (48_000, 8)])
def test_the_film_keeps_rate_and_channels_of_the_sound(inputs, loud, rate, channels):
    loud()
    rows = np.stack([tone(2.0, rate, 300.0), *(channels - 1) * [tone(2.0, rate, 700.0)]], axis=1)
    write_sound(inputs["audio"], "pcm_s16le", rate, rows)
    film(inputs)
    given, written = (torch.cat(list(media.AudioReader(inputs[n], mono=False))) for n in ("audio", "out"))
    assert written.shape == given.shape == (2 * rate, 2)
    part = slice(rate // 2, rate)
    for own, kept in zip(given[part].T.numpy(), written[part].T.numpy(), strict=True):
        assert loudest_hertz(kept, rate) == pytest.approx(loudest_hertz(own, rate), abs=5)
        assert float(kept.std()) == pytest.approx(float(own.std()), rel=0.1)


def test_which_track_was_taken_is_printed_and_that_it_is_silent(inputs, loud, capsys):
    loud()
    voice = tone(2.0, 48_000)[:, None]
    inputs["audio"] = write_sound(inputs["audio"].with_suffix(".mka"), "pcm_s16le", 48_000, voice, 0 * voice, default=1)
    film(inputs)
    told = capsys.readouterr().err
    assert "audio track 2 of 2 was taken, the default one" in told
    assert "it is silent" in told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_half_written(inputs, loud, number):
    class Ended(LoudSession):
        def step(self):
            if self.frames_given:
                os.kill(os.getpid(), number)
            return super().step()

    loud(Ended)
    before = signal.getsignal(number)
    words = [word for name, path in inputs.items() for word in (f"--{name}", str(path))]
    with pytest.raises(SystemExit) as ended:
        main(["sample", *words, "--text", "smiles and nods", "--seed", "7"])
    assert ended.value.code == 128 + number
    assert os.listdir(inputs["out"].parent) == []
    assert signal.getsignal(number) is before


def test_equal_films_are_equal_files(inputs, loud):
    """x264 with its macroblock tree differs now and then, with several threads above all."""
    t, y, x, colour = torch.meshgrid(*map(torch.arange, (15, 32, 32, 3)), indexing="ij")
    waves = torch.sin(0.3 * x + 0.2 * y * (colour + 1) + 0.5 * t + 0.02 * t * y)
    frames = (128 + 100 * waves).round().byte()
    found = set()
    for _ in range(10):
        media.write_video(inputs["out"], frames, FPS, some_sound(16_000), upscale=6, smooth=True)
        found.add(inputs["out"].read_bytes())
    assert len(found) == 1


def test_size_and_crop(inputs, loud):
    loud()
    command.run(parse(inputs, "--size", "33", "--crop", "top"))
    top = media.read_video(inputs["out"])[0]
    assert top.shape[1:3] == (64, 64)
    command.run(parse(inputs, "--size", "1", "--crop", "center"))
    center = media.read_video(inputs["out"])[0]
    assert center.shape[1:3] == (32, 32)
    assert top[0, :8, :, 0].float().mean() < center[0, :4, :, 0].float().mean() - 10


def test_another_student(inputs, loud):
    loud(spec=FakeSpec(Fraction(25), 24, 40))
    command.run(parse(inputs))
    frames, fps = media.read_video(inputs["out"])
    assert (fps, len(frames), frames.shape[1:3]) == (25, 50, (24 * 11, 40 * 11))


def test_any_split_of_the_sound_gives_the_same_film(inputs, noted):
    sound = some_sound(NUM_SAMPLES)
    whole = Session(
        load_student(inputs["student"]),
        media.fit_image(media.decode_image(inputs["image"]), (16, 16), "top"),
        "smiles and nods",
        7,
    )
    whole.push(sound, rate=RATE)
    whole.close()
    frames = torch.cat([chunk.frames for chunk in whole.frames()])
    assert len(frames) == 27
    assert frames.float().std(0).mean() > 1
    for push_ms in (20, 333, 100_000, None):
        film(inputs, *(() if push_ms is None else ("--push-ms", str(push_ms))))
        assert torch.equal(torch.stack(noted.shown), frames[:25])
        assert torch.equal(torch.cat(noted.heard), sound)
        step = RATE * (push_ms or 1000) // 1000
        ends = np.cumsum([samples for _, samples in noted.pushed])
        assert ends.tolist() == [*range(step, NUM_SAMPLES, step), NUM_SAMPLES]
        if push_ms == 20:
            assert max(noted.held) < 16000  # of 31533
    written = media.read_video(inputs["out"])[0]
    assert written.shape == (25, 16, 16, 3)
    assert (written.float().mean((1, 2, 3)) - frames[:25].float().mean((1, 2, 3))).abs().max() < 3


def test_pieces_keep_the_clock_at_any_rate():
    """20 ms at 11025 Hz are 220.5 samples; the sound arrives in whatever blocks the file has."""
    sound = torch.arange(11_025 * 3 + 5.0)
    pieces = list(command._pieces(sound.split(1024), 11_025, 20))
    assert [len(piece) for piece in pieces[:4]] == [220, 221, 220, 221]
    assert len(pieces[:150]) == 150
    assert sum(map(len, pieces[:150])) == 3 * 11_025
    assert torch.equal(torch.cat(pieces), sound)


@pytest.mark.parametrize(
    ("rate", "num_samples", "num_frames"),
    [(44100, 5 * 3528, 5), (44100, 5 * 3528 + 1, 6), (8000, 3 * 640, 3), (22000, 1, 1)],
)
def test_every_sample_has_its_frame(inputs, rate, num_samples, num_frames):
    speech(inputs["audio"], num_samples, rate)
    film(inputs, "--push-ms", "7")
    assert len(media.read_video(inputs["out"])[0]) == num_frames


def test_a_student_that_takes_pose_streams_without(inputs, noted, monkeypatch):
    monkeypatch.setattr("students.weights.checkpoint.load_student", lambda _: a_bundle(pose_dim=2))
    film(inputs, "--push-ms", "20")
    assert len(noted.drawn) == 7
    assert max(noted.held) < 16000


def test_memory_does_not_follow_the_length(inputs, loud):
    """20 minutes are 38 MB of float samples and 33 MB of frames; the index of the mp4 is 1 MB."""
    resident, process = [], psutil.Process()

    class Measured(LoudSession):
        def push(self, audio, rate):
            super().push(audio, rate)
            resident.append(process.memory_info().rss)

    loud(Measured, FakeSpec(Fraction(1), 96, 96))
    second = np.pad(tone(0.1, 8000) * 32767, (0, 7200)).astype(np.int16).tobytes()
    for seconds in (60, 1200):
        with wave.open(str(inputs["audio"]), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", "none"))
            for _ in range(seconds):
                file.writeframesraw(second)
        film(inputs)
    assert len(resident) == 1260
    assert max(resident[60:]) - max(resident[:60]) < 12e6
    with av.open(str(inputs["out"])) as container:
        assert container.streams.video[0].frames == 1200


def test_realtime_keeps_the_clock(inputs, noted, capsys):
    film(inputs)
    plain = torch.stack(noted.shown)
    assert noted.pushed[-1][0] < 0.01
    noted.cost = staticmethod(lambda index: 0.02 - 0.001 * index)
    film(inputs, "--realtime")
    assert torch.equal(torch.stack(noted.shown), plain)
    times, sizes = zip(*noted.pushed, strict=True)
    assert set(sizes[:-1]) == {480}
    spoken = np.cumsum(sizes) / RATE
    late = np.array(times) - spoken
    assert late.min() > -1e-6
    assert late.max() < 0.021
    # Only the second chunk is late: it is one frame longer than the first, which the viewer began to watch at once.
    assert "stalls: 1 (0.08 s)" in capsys.readouterr().out


def test_a_slow_student_stalls(inputs, noted, capsys):
    """The first chunk can be drawn when 0.26 s were spoken; each takes 0.5 s and lasts 0.24 s, then 0.32 s."""
    noted.cost = staticmethod(lambda index: 0.5)
    film(inputs, "--realtime")
    assert [now for now, _ in noted.drawn] == pytest.approx([0.26 + 0.5 * (k + 1) for k in range(7)])
    assert f"stalls: 6 ({0.26 + 5 * 0.18:.2f} s)" in capsys.readouterr().out


def test_realtime_draws_two_chunks_ahead_at_most(inputs, noted, capsys):
    film(inputs, "--realtime", "--push-ms", "5000")
    times = [now for now, _ in noted.drawn]
    assert times[:2] == pytest.approx([NUM_SAMPLES / RATE] * 2, abs=1e-4)
    for index in range(2, 7):
        last = times[0] + float((2 + 4 * (index - 2)) / FPS)  # the last frame of the chunk before the last is shown
        assert last - 1e-4 < times[index] < last + float(1 / FPS) + 1e-4
    assert "stalls: 0 (0.00 s)" in capsys.readouterr().out


def test_bad_inputs_are_told_before_the_student_loads(inputs, tmp_path, monkeypatch):
    def never(_: Path) -> FakeBundle:
        raise AssertionError("the student was loaded")

    monkeypatch.setattr("students.weights.checkpoint.load_student", never)
    text = tmp_path / "in" / "text.wav"
    text.write_text("this is no sound\n" * 20)
    film = tmp_path / "in" / "film.mp4"
    sound = torch.from_numpy(tone(0.5, 16000))
    media.write_video(film, torch.zeros(6, 16, 16, 3, dtype=torch.uint8), FPS, sound)
    broken = some_sound(RATE).numpy()
    broken[100] = np.nan
    for name, path in [
        ("audio", text),
        ("audio", tmp_path / "none.wav"),
        ("audio", encode_audio(tmp_path / "in" / "nan.wav", "pcm_f32le", "flt", RATE, [broken])),
        ("image", text),
        ("image", tmp_path / "none.png"),
        ("out", tmp_path / "none" / "film.mp4"),
        ("out", tmp_path / "out" / "film.avi"),
    ]:
        with pytest.raises(UserError, match=rf"^[^\n]*{path.parent.name}[^\n]*$"):
            command.run(parse(inputs | {name: path}))
    with pytest.raises(UserError, match="would replace"):
        command.run(parse(inputs | {"audio": film, "out": film}))
    for option, value in [("--seed", "-1"), ("--size", "0"), ("--push-ms", "0")]:
        with pytest.raises(UserError, match=option):
            command.run(parse(inputs, option, value))
    with pytest.raises(AssertionError, match="was loaded"):
        command.run(parse(inputs))
    assert os.listdir(tmp_path / "out") == []


def test_sound_that_breaks_off_leaves_no_film(inputs, noted):
    film(inputs)
    before = inputs["out"].read_bytes()
    broken = some_sound(NUM_SAMPLES).numpy()
    broken[40_000] = np.nan
    encode_audio(inputs["audio"], "pcm_f32le", "flt", RATE, [broken])
    with pytest.raises(UserError, match=r"^[^\n]*not finite, first at 40000: [^\n]*speech\.wav[^\n]*$"):
        film(inputs, "--push-ms", "20")
    assert len(noted.drawn) == 5  # 1.52 s of 1.67
    flac = speech(inputs["audio"].with_name("speech.flac"), 4 * RATE, codec="flac", sample_format="s16")
    data = bytearray(flac.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    flac.write_bytes(data)
    with pytest.raises(UserError, match=r"^audio file cannot be read [^\n]*speech\.flac[^\n]*$"):
        film(inputs | {"audio": flac}, "--push-ms", "20")
    assert noted.drawn
    assert inputs["out"].read_bytes() == before
    assert os.listdir(inputs["out"].parent) == ["film.mp4"]


def test_failures_leave_nothing(inputs, loud, tmp_path):
    with pytest.raises(UserError, match=r"^[^\n]*spec\.json[^\n]*$"):
        film(inputs | {"student": tmp_path})
    loud(ShortSession)
    with pytest.raises(RuntimeError, match="22 frames before its sound"):
        film(inputs)
    assert os.listdir(inputs["out"].parent) == []
