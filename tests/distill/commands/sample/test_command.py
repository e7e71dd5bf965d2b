"""`distill sample`: the film is as long as its sound, memory does not follow its length, bad input is one line."""

import os
import signal
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
import torch

from distill.cli import main
from distill.commands.sample import command
from teachers import media
from teachers.errors import UserError
from tests.distill.commands.sample.fakes import (
    FPS,
    NUM_SAMPLES,
    RATE,
    FakeBundle,
    FakeSpec,
    LoudSession,
    ShortSession,
    film,
    parse,
    speech,
)
from tests.support.media.sounds import decoded, loudest_hertz, write_sound
from tests.support.tiny import some_sound
from tests.teachers.media.test_media import encode_audio, tone


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
    audio, rate = decoded(inputs["out"])
    assert rate == RATE
    onset = int((audio.abs() > 0.2).nonzero()[0]) / rate
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
    message = capsys.readouterr().err
    assert "audio track 2 of 2 was taken, the default one" in message
    assert "it is silent" in message


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_half_written(inputs, loud, number):
    class Ended(LoudSession):
        def step(self):
            if self.frames_given:
                os.kill(os.getpid(), number)
            return super().step()

    loud(Ended)
    before = signal.signal(number, signal.SIG_DFL)  # nohup ignores it, and so would the command
    words = [word for name, path in inputs.items() for word in (f"--{name}", str(path))]
    try:
        with pytest.raises(SystemExit) as ended:
            main(["sample", *words, "--text", "smiles and nods", "--seed", "7"])
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert ended.value.code == 128 + number
    assert os.listdir(inputs["out"].parent) == []


def test_equal_films_are_equal_files(inputs, loud):
    """x264 with its macroblock tree differs now and then, with several threads above all: the file says that it had neither."""
    t, y, x, colour = torch.meshgrid(*map(torch.arange, (15, 32, 32, 3)), indexing="ij")
    waves = torch.sin(0.3 * x + 0.2 * y * (colour + 1) + 0.5 * t + 0.02 * t * y)
    frames = (128 + 100 * waves).round().byte()
    found = set()
    for _ in range(3):
        media.write_video(inputs["out"], frames, FPS, some_sound(16_000), upscale=6, smooth=True)
        found.add(inputs["out"].read_bytes())
    (film,) = found
    assert b" mbtree=0 " in film
    assert b" threads=1 " in film


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


@pytest.mark.slow
def test_memory_does_not_follow_the_length(inputs, loud):
    """13 minutes are 25 MB of float samples and 22 MB of frames; the index of the mp4 is 1 MB."""
    resident, process = [], psutil.Process()

    class Measured(LoudSession):
        def push(self, audio, rate):
            super().push(audio, rate)
            resident.append(process.memory_info().rss)

    loud(Measured, FakeSpec(Fraction(1), 96, 96))
    second = np.pad(tone(0.1, 8000) * 32767, (0, 7200)).astype(np.int16).tobytes()
    for seconds in (60, 800):
        with wave.open(str(inputs["audio"]), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", "none"))
            for _ in range(seconds):
                file.writeframesraw(second)
        film(inputs)
    assert len(resident) == 860
    assert max(resident[60:]) - max(resident[:60]) < 12e6
    with av.open(str(inputs["out"])) as container:
        assert container.streams.video[0].frames == 800


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


def test_guidance_is_one_number_or_one_for_each_name(inputs, capsys):
    for words, found in (("2", 2.0), ("text=2,audio=1.5", {"text": 2.0, "audio": 1.5}), ("audio=3", {"audio": 3.0})):
        assert parse(inputs, "--guidance", words).guidance == found
    for words in ("loud", "text=", "text=2;audio=3", "text=1,text=2", ""):
        with pytest.raises(SystemExit):
            parse(inputs, "--guidance", words)
        assert "give a number, or text=W,audio=W" in capsys.readouterr().err
