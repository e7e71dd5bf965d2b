"""Small builders that the tests share: a 2-layer network with random weights, its spec, conditions and bundle."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor, nn

from distill.data.latents import TrainSet
from distill.training.config import EngineConfig
from distill.training.engines.engine import Engine
from distill.training.role import Kind
from students.history import History
from students.networks.causal_wan import CausalWan
from students.networks.midas_net import MidasConfig
from students.spec import Spec
from students.weights.checkpoint import Bundle, make_student
from teachers.codecs.linear import CodecConfig, EigenCodec
from teachers.conditions import FEATURES, Conditions, Feature, declare
from teachers.encoders.small import AudioConfig, TextConfig, TextEncoder
from teachers.flow import sigma_grid
from teachers.networks.kind import AvatarTeacher
from teachers.networks.wan import NetworkConfig, build_network

STRIDE, CHANNELS, SIDE, AUDIO, TOKENS, TEXT = 2, 4, 4, 20, 5, 16
NETWORK = {"num_layers": 2, "num_heads": 2, "head_dim": 16, "ffn_dim": 48, "freq_dim": 32, "audio_hidden": 8}


MIDAS = MidasConfig(
    num_layers=2,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    ffn_dim=48,
    head_layers=2,
    head_width=24,
    head_heads=2,
    head_ffn_dim=48,
    text_tokens=2,
    freq_dim=32,
    patch=2,
    prediction="reference",
)


def rng(*keys: int) -> torch.Generator:
    """A generator seeded by small numbers."""
    return torch.Generator().manual_seed(sum(key * 1009**i for i, key in enumerate(keys)))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng(seed))


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0, scale: float = 0.5):
    """Random non-zero weights, the output layer and the gates included; matrices keep the size of their input."""
    generator = rng(seed, 7)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        noise = torch.randn(parameter.shape, generator=generator) * scale
        parameter.copy_(noise / fan_in**0.5 if parameter.ndim > 1 else 1 + 0.3 * noise)
    return module


def make_spec(history: History | None = None, prediction: str = "velocity", **changes) -> Spec:
    """16 x 16 pixels, chunks of 2 latent frames, 3 steps, clips of 4 chunks."""
    facts = {
        "height": SIDE * 4,
        "width": SIDE * 4,
        "fps": Fraction(25, 2),
        "chunk_frames": 2,
        "sigmas": sigma_grid(3, 3.0)[:-1],
        "horizon_frames": 8,
        "history": history or History(sinks=1, window=2),
        "network": NetworkConfig(**NETWORK, audio_blocks=(1,), prediction=prediction),
        "codec": CodecConfig(stride=STRIDE, patch=4, channels=CHANNELS),
        "audio": AudioConfig(num_mels=AUDIO // 4),
        "text": TextConfig(dim=TEXT, max_tokens=TOKENS, num_layers=1, num_heads=2, vocab_size=300),
    }
    return Spec(**(facts | changes))


def make_net(seed: int = 0, prediction: str = "velocity", **changes):
    config = NetworkConfig(**(NETWORK | {"audio_blocks": (1,), "prediction": prediction} | changes))
    net = build_network(config, latent_channels=CHANNELS, stride=STRIDE, text_dim=TEXT, audio_dim=AUDIO)
    return randomise(net, seed)


def a_teacher(seed: int = 0, prediction: str = "velocity") -> AvatarTeacher:
    return AvatarTeacher(make_net(seed, prediction))


def a_student(history: History | None = None, seed: int = 0, prediction: str = "velocity", **changes) -> CausalWan:
    student = make_student(make_spec(history, prediction, **changes))
    randomise(student.net, seed)
    return student


def some_conditions(batch: int = 2, frames: int = 8, seed: int = 0, side: int = SIDE) -> Conditions:
    """Random non-zero text, audio and reference."""
    return Conditions(
        text=randn(batch, TOKENS, TEXT, seed=seed + 1),
        audio=randn(batch, frames, STRIDE, AUDIO, seed=seed + 2),
        reference=randn(batch, CHANNELS, 1, side, side, seed=seed + 3),
    )


def some_latents(batch: int = 2, frames: int = 8, seed: int = 0) -> Tensor:
    return randn(batch, CHANNELS, frames, SIDE, SIDE, seed=seed + 11)


def a_train_set(num: int = 12, frames: int = 8, seed: int = 0) -> TrainSet:
    given = some_conditions(num, frames, seed)
    return TrainSet(some_latents(num, frames, seed).half(), given.stored)


@lru_cache(maxsize=1)
def text_encoder() -> TextEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = make_spec().text
        return TextEncoder.build(config, ["a person nods", "someone smiles"]).eval().requires_grad_(False)


@lru_cache(maxsize=1)
def fitted_codec() -> EigenCodec:
    spec = make_spec()
    video = 0.3 * randn(32, 3, 7, spec.height, spec.width, seed=5)
    return EigenCodec(spec.codec, spec.height, spec.width).fit(video)


def a_bundle(history: History | None = None, seed: int = 0, prediction: str = "reference", **changes) -> Bundle:
    """A student with codec, ears and text encoder, ready for a session."""
    student = a_student(history, seed, prediction, **changes).eval().requires_grad_(False)
    spec = student.spec
    return Bundle(student, fitted_codec(), spec.audio.load(spec.samples_per_frame), text_encoder())


def a_portrait(seed: int = 0) -> Tensor:
    spec = make_spec()
    return (0.3 * randn(3, spec.height, spec.width, seed=seed + 17)).clamp(-1, 1)


def some_sound(num_samples: int, seed: int = 0) -> Tensor:
    """Noise with a loudness that changes from frame to frame, [S]."""
    loud = randn(num_samples // 640 + 1, seed=seed + 23).mul(0.2).repeat_interleave(640)[:num_samples]
    return (loud * randn(num_samples, seed=seed + 29)).clamp(-1, 1)


@dataclass
class Ranks:
    """An engine of one process that may claim another rank; its generators are the engine's own."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    is_main: bool = True
    kind: Kind = "ddp"
    config: EngineConfig = field(default_factory=lambda: EngineConfig(precision="fp32", keep_checkpoints=1))
    is_group_main: bool = True
    looked: dict[str, list[int]] | None = None
    generator = Engine.generator

    @property
    def data_rank(self) -> int:
        return self.rank

    @property
    def data_ranks(self) -> int:
        return self.world_size

    def split(self, net):
        return net

    def apart(self):
        return nullcontext()

    def sharing_branches(self, guidance):
        return nullcontext(guidance)

    def missing(self, files, apart=False):
        found = [i for i, file in enumerate(files) if not file.is_file()]
        if self.looked is not None:  # ranks that take turns, as if they had looked together
            found = self.looked.setdefault(str(files), found)
        return found[self.rank :: self.world_size]

    def autocast(self):
        return nullcontext()

    def all_reduce_mean(self, tensors) -> None:
        """One process: nothing to reduce."""

    def from_main(self, value):
        return value

    def in_turns(self, own, num: int):
        assert len(own) == num
        return list(own)

    def share(self, num: int):
        return torch.arange(num)

    def all_rows(self, own, num: int):
        return own

    def barrier(self) -> None:
        """One process: nothing to wait for."""


FRAME_LABELS = (
    "mouth_open",
    "mouth_width",
    "blink",
    "gaze",
    "head_x",
    "head_y",
    "tilt",
    "light",
    "smile",
    "frown",
    "surprised",
)
"""Labels of every frame of the embedded world, in the order of the tests' probes."""
MOOD = (
    Feature(name="mood", clock="stream", size=(7,)),
    Feature(name="mood_track", clock="latent", size=(3,)),
    Feature(name="scenery", clock="grid", size=(2, SIDE, SIDE)),
    Feature(name="idol", clock="anchor", size=(CHANNELS, 1, SIDE, SIDE)),
)
"""Conditions that the package does not know, one on every clock."""


@contextmanager
def declared(*features: Feature) -> Iterator[None]:
    """The features are in the table inside."""
    for feature in features:
        declare(feature)
    try:
        yield
    finally:
        for feature in features:
            FEATURES.pop(feature.name, None)


def some_mood(batch: int, frames: int, seed: int = 0) -> dict[str, Tensor]:
    """Random values of `MOOD`."""
    return {
        "mood": randn(batch, 7, seed=seed + 31),
        "mood_track": randn(batch, frames, 3, seed=seed + 32),
        "scenery": randn(batch, 2, frames, SIDE, SIDE, seed=seed + 33),
        "idol": randn(batch, CHANNELS, 1, SIDE, SIDE, seed=seed + 34),
    }
