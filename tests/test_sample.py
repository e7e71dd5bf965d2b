import argparse
import os
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from test_media import encode_audio, ramp_picture, save_image, tone

from distill import sample
from teachers import media
from teachers.errors import UserError

FPS = Fraction(25, 2)


@dataclass(frozen=True)
class FakeSpec:
    fps: Fraction = FPS
    height: int = 32
    width: int = 32
    sample_rate: int = 16000
    samples_per_frame: int = 1280


@dataclass(frozen=True)
class FakeBundle:
    spec: FakeSpec = field(default_factory=FakeSpec)


@dataclass(frozen=True)
class FakeChunk:
    frames: torch.Tensor


class FakeSession:
    """Shows the reference, brightened by each frame's loudness; three frames first, then chunks of four."""

    def __init__(self, bundle: FakeBundle, reference: torch.Tensor, text: str, seed: int):
        assert reference.shape == (3, bundle.spec.height, bundle.spec.width)
        assert (text, seed) == ("smiles and nods", 7)
        self.picture = ((reference + 1) * 64).byte().permute(1, 2, 0)
        self.samples_per_frame = bundle.spec.samples_per_frame
        self.audio: torch.Tensor | None = None
        self.closed = False
        self.num_chunks = 0

    def push(self, audio: torch.Tensor) -> None:
        self.audio = audio

    def close(self) -> None:
        self.closed = True

    def frames(self):
        assert self.closed
        assert self.audio is not None
        start = 0
        while start * self.samples_per_frame < len(self.audio):
            length = 4 if start else 3
            span = self.audio[start * self.samples_per_frame : (start + length) * self.samples_per_frame]
            padded = torch.nn.functional.pad(span, (0, length * self.samples_per_frame - len(span)))
            loud = padded.reshape(length, -1).abs().amax(1) * 120
            frames = self.picture + loud.byte()[:, None, None, None]
            start += length
            self.num_chunks += 1
            yield FakeChunk(frames)


class ShortSession(FakeSession):
    def frames(self):
        yield next(iter(super().frames()))


@pytest.fixture
def inputs(tmp_path) -> dict[str, Path]:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "out").mkdir()
    sound = np.zeros(24000 * 2, np.float32)
    sound[24000 : 24000 + 480] = tone(0.02, 24000, 1000.0)
    return {
        "student": folder / "student",
        "image": save_image(folder / "face.png", ramp_picture(90, 60), "png", "rgb24"),
        "audio": encode_audio(folder / "speech.wav", "pcm_f32le", "flt", 24000, [sound[: 24000 * 2 - 700]]),
        "out": tmp_path / "out" / "film.mp4",
    }


def parse(inputs: dict[str, Path], *extra: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    sample.add_arguments(parser)
    options = [word for name, path in inputs.items() for word in (f"--{name}", str(path))]
    return parser.parse_args([*options, "--text", "smiles and nods", "--seed", "7", *extra])


def load_fake(folder: Path) -> FakeBundle:
    assert folder.name == "student"
    return FakeBundle()


def test_sample_writes_the_length_of_the_sound(inputs, capsys):
    assert sample.run(parse(inputs), load_fake, FakeSession) == 0
    frames, fps = media.read_video(inputs["out"])
    seconds = Fraction(24000 * 2 - 700, 24000)
    assert fps == FPS
    assert frames.shape == (25, 256, 256, 3)
    with av.open(str(inputs["out"])) as container:
        lengths = [stream.duration * stream.time_base for stream in container.streams]
    assert len(lengths) == 2
    assert all(0 <= length - seconds < 1 / FPS for length in lengths)
    changes = frames.float().mean((1, 2, 3)).diff()
    heard, rate = media.decode_audio(inputs["out"])
    assert rate == 24000
    onset = int((heard.abs() > 0.2).nonzero()[0]) / rate
    assert int(changes.argmax()) + 1 == int(onset * FPS) == 12
    captured = capsys.readouterr()
    assert "25 frames, 2.00 s, first frame after" in captured.out
    assert "25/25" in captured.err
    assert "first frame" in captured.err
    assert os.listdir(inputs["out"].parent) == ["film.mp4"]


def test_size_and_crop(inputs):
    sample.run(parse(inputs, "--size", "33", "--crop", "top"), load_fake, FakeSession)
    top = media.read_video(inputs["out"])[0]
    assert top.shape[1:3] == (64, 64)
    sample.run(parse(inputs, "--size", "1"), load_fake, FakeSession)
    center = media.read_video(inputs["out"])[0]
    assert center.shape[1:3] == (32, 32)
    assert top[0, :8, :, 0].float().mean() < center[0, :4, :, 0].float().mean() - 10


def test_other_rates_of_the_student(inputs):
    spec = FakeSpec(Fraction(25), 24, 40, 24000, 960)
    sample.run(parse(inputs), lambda _: FakeBundle(spec), FakeSession)
    frames, fps = media.read_video(inputs["out"])
    assert (fps, len(frames), frames.shape[1:3]) == (25, 50, (24 * 11, 40 * 11))


def test_bad_inputs_are_told_before_the_student_loads(inputs, tmp_path):
    def never(_: Path) -> FakeBundle:
        raise AssertionError("the student was loaded")

    text = tmp_path / "in" / "text.wav"
    text.write_text("this is no sound\n" * 20)
    film = tmp_path / "in" / "film.mp4"
    sound = torch.from_numpy(tone(0.5, 16000))
    media.write_video(film, torch.zeros(6, 16, 16, 3, dtype=torch.uint8), FPS, sound)
    for name, path in [
        ("audio", text),
        ("audio", tmp_path / "none.wav"),
        ("image", text),
        ("image", tmp_path / "none.png"),
        ("out", tmp_path / "none" / "film.mp4"),
        ("out", tmp_path / "out" / "film.avi"),
    ]:
        with pytest.raises(UserError, match=rf"^[^\n]*{path.parent.name}[^\n]*$"):
            sample.run(parse(inputs | {name: path}), never, FakeSession)
    with pytest.raises(UserError, match="would replace"):
        sample.run(parse(inputs | {"audio": film, "out": film}), never, FakeSession)
    for option, value in [("--seed", "-1"), ("--size", "0")]:
        with pytest.raises(UserError, match=option):
            sample.run(parse(inputs, option, value), never, FakeSession)
    assert os.listdir(tmp_path / "out") == []


def test_failures_leave_nothing(inputs):
    def refused(folder: Path) -> FakeBundle:
        raise UserError(f"student has no spec.json: {folder}; export it again")

    with pytest.raises(UserError, match=r"spec\.json"):
        sample.run(parse(inputs), refused, FakeSession)
    with pytest.raises(RuntimeError, match="22 frames before its sound, of 25"):
        sample.run(parse(inputs), load_fake, ShortSession)
    assert os.listdir(inputs["out"].parent) == []
