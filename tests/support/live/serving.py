"""A server on a free port in this process, and a student whose mouth is the loudness of its sound."""

import atexit
import functools
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor, nn

from distill.commands.serving import read_portraits
from distill.live import server
from distill.live.apart import Decoders
from distill.live.scheduler import Engine
from distill.live.talkers import Echo
from students.weights.checkpoint import Bundle
from tests.support import tiny

MOUTH = slice(10, 14)  # rows of the puppet's mouth


class SharedDecoders(Decoders):
    """Processes that outlive a server: it takes seconds to start one."""

    def close(self) -> None:
        pass


@functools.cache
def shared_decoders() -> Decoders:
    """Those of all servers of this process."""
    decoders = SharedDecoders()
    atexit.register(Decoders.close, decoders)
    return decoders


@contextmanager
def running(*given):
    """`distill.live.server.running` with the shared decoders."""
    with mock.patch.object(server, "Decoders", shared_decoders), server.running(*given) as address:
        yield address


@contextmanager
def serving(bundle: Bundle | None = None, talker=None, viewers: int | None = 4, lead: int = 2, options=None):
    """Yields (address "127.0.0.1:port", engine)."""
    bundle = bundle or tiny.a_bundle()
    engine = Engine(bundle, talker or Echo(), viewers, lead)
    portraits = read_portraits([], (bundle.spec.height, bundle.spec.width))
    engine.warm_up(portraits[0])
    with running(engine, portraits, options) as address:
        yield address, engine
    assert not engine.thread.is_alive()


def eventually(condition, seconds: float) -> float:
    """Seconds until `condition` holds; fails after `seconds`."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not after {seconds} s"
        time.sleep(0.01)
    return time.monotonic() - began


@dataclass(frozen=True)
class Puppet:
    """State of the puppet: how many chunks it drew."""

    chunk: int = 0
    flight: tuple = ()


class PuppetStudent(nn.Module):
    """x0: channel 0 and 1 the loudness of the two pixel frames of a latent frame, 2 the noise, 3 the text."""

    one_by_one = "a puppet"

    def __init__(self, spec):
        super().__init__()
        self.spec, self.net = spec, nn.Linear(1, 1)

    def open(self, text: Tensor, cache: str = "value") -> Puppet:
        return Puppet()

    def plan(self, state, conditions, grad=False):
        return None

    def denoise(self, state, plan, x, sigma, conditions, step=0):
        loud = conditions.audio.mean(-1)[0]  # [n, 2] of log-mel rows, about -1.4 in silence and 0.5 in speech
        x0 = 0.2 * x.clone()
        x0[0, 0], x0[0, 1] = loud[:, :1, None], loud[:, 1:, None]
        x0[0, 3] = conditions.text.sum(-1).sin().mean()
        return x0, None

    def commit(self, state, x0, conditions, steps=(), plan=None):
        return replace(state, chunk=state.chunk + 1)

    def set_text(self, state, text):
        return state

    def recommit(self, text, seen, chunk, cache="value"):
        return Puppet(chunk)


class PuppetCodec(nn.Module):
    """The puppet's picture: a wall whose grey is the text's, some noise at the top, a mouth that is white when it is loud."""

    def __init__(self, spec):
        super().__init__()
        self.spec = spec

    def encode(self, pixels: Tensor) -> Tensor:
        return torch.zeros(1, *self.spec.latent_size[:1], 1, *self.spec.latent_size[1:])

    def decode_chunk(self, x0: Tensor, state) -> tuple[Tensor, int]:
        loud = x0[0, :2].mean((-1, -2)).T.flatten()  # [2 n]
        loud = loud[1:] if state is None else loud
        picture = x0[0, 3].mean().clamp(-0.6, 0.6).expand(1, 3, len(loud), self.spec.height, self.spec.width).clone()
        picture[..., :2, :2] += x0[0, 2, 0, :2, :2]
        picture[..., MOUTH, 4:12] = (loud[:, None, None] + 0.5).clamp(-1, 1)
        return picture.clamp(-1, 1), 1


def a_puppet(**changes) -> Bundle:
    """`changes` of its spec, such as height and width."""
    spec = tiny.make_spec(**changes)
    return Bundle(PuppetStudent(spec), PuppetCodec(spec), spec.audio.load(spec.samples_per_frame), tiny.text_encoder())
