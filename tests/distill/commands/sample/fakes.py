"""A fake student whose pictures are its sound's loudness, a clock that stands still, and `distill sample` on them."""

import argparse
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import torch

from distill.commands.sample import command
from students.serving.session import Chunk, Starved
from tests.support.tiny import some_sound
from tests.teachers.media.test_media import encode_audio

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
        self.taken = torch.zeros(0)
        self.frames_given = self.per_frame = 0

    def push(self, audio: torch.Tensor, rate: int) -> None:
        self.per_frame = round(rate / self.spec.fps)
        self.taken = torch.cat([self.taken, audio])

    def close(self) -> None:
        self.closed = True

    def step(self) -> Chunk | Starved:
        length = 4 if self.frames_given else 3
        need = length * self.per_frame
        if len(self.taken) < max(need, 1) and not (self.closed and len(self.taken)):
            return Starved("end" if self.closed else "audio")
        span, self.taken = self.taken[:need], self.taken[need:]
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
