"""The causal student of any bidirectional denoiser: no KV cache, each step reads the window of finished latents again.

    x0 of chunk k, step i = denoise([x0 of the visible chunks | x_k], [level | sigma_i])[of chunk k]

The context is the stored x0 latents and conditions of the chunks that the History names, so it needs nothing of the network: no
mask, no cache, no positions. The price is attention (or convolution) over the whole window in every step. Weights and their names
are the teacher's. A network whose kind takes no `frame_sigma` is given one sigma for all frames, the chunk's, as it was with the
reference frame in training.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from students.spec import Spec
from students.student import CacheKind, Finished, State, Student, refuse_cycle, refuse_published
from teachers.conditions import Conditions
from teachers.errors import UserError
from teachers.networks.kind import NETWORKS, Dims, NetworkKind, write_reference


def _inner(name: str) -> Any:
    """A property: what the wrapped network says."""
    return property(lambda self: getattr(self.network, name))


@dataclass(frozen=True, kw_only=True)
class WindowedConfig(NetworkKind):
    """`network`: the teacher's (null: filled in from the recipe's teacher, or base)."""

    network: Any = field(default=None, metadata={"kinds": NETWORKS})

    causal: ClassVar = "students.networks.windowed:Windowed"
    over_teacher: ClassVar = True
    context_pass: ClassVar = False

    def over(self, network: NetworkKind) -> "WindowedConfig":
        """The same around the network that it starts from; UserError for another one."""
        if self.network not in (None, network):
            raise UserError("student.network.network: a windowed student has the teacher's network; remove it")
        return replace(self, network=network)

    def build(self, dims: Dims) -> Any:
        return self.network.new(dims)

    takes = _inner("takes")
    prediction = _inner("prediction")
    reference = _inner("reference")
    lead = _inner("lead")
    patch = _inner("patch")
    guidance = _inner("guidance")
    feature_width = _inner("feature_width")
    num_blocks = _inner("num_blocks")

    def check(self) -> None:
        self.network.check()

    def check_sequence(self, ranks: int, tokens: int) -> None:
        self.network.check_sequence(ranks, tokens)

    def shallow(self, blocks: int = 1) -> "WindowedConfig":
        return replace(self, network=self.network.shallow(blocks))

    def with_guidance(self, scales: int) -> "WindowedConfig":
        return replace(self, network=self.network.with_guidance(scales))


@dataclass(frozen=True)
class Window:
    """What a chunk's steps share: visible latents [B, C, m n, H, W] (None: there are none), the conditions of their frames and the
    chunk's, and the known frames of all of them."""

    latents: Tensor | None
    conditions: Conditions
    known: tuple[int, ...]
    numbers: tuple[int, ...] | None = None  # of all its frames in the stream, as the network's kind wants them


class Windowed(Student):
    """`State.window` is the context; `commit` runs no network."""

    def __init__(self, net: Any, spec: Spec):
        super().__init__()
        history, depth = spec.history, spec.schedule.depth
        if history.commit != "clean" or depth > 1:
            raise UserError(
                f"student.history, student.schedule: got commit={history.commit}, depth={depth}; a windowed student keeps clean "
                "latents, one chunk after the other: commit: clean, depth: 1"
            )
        refuse_published(spec, "a windowed student")
        refuse_cycle(spec, "a windowed student")
        self.net, self.spec = net, spec

    def open(self, text: Tensor | None = None, cache: CacheKind = "value") -> State:
        """The empty context; all conditions are read in every step."""
        return State()

    def plan(self, state: State, conditions: Conditions, grad: bool = False) -> Window:
        """The chunk's window. Nothing of a network is in it, so steps with and without gradient share it."""
        return self._window(state.window, conditions, state.chunk)

    def _window(self, past: Sequence[Finished], conditions: Conditions, chunk: int) -> Window:
        known = conditions.known if chunk == 0 or (past and past[0].chunk == 0) else ()
        latents = torch.cat([part.x0 for part in past], dim=2) if past else None
        given = Conditions.join_frames([*(part.conditions for part in past), conditions])
        now = given.timed
        if (scale := self.scale(conditions)) is not None:
            now["guidance"] = scale
        n, chunks = self.spec.chunk_frames, (*(part.chunk for part in past), chunk)
        numbers = self.net.kind.numbered((k * n + i for k in chunks for i in range(n)), n)
        # what a bidirectional network takes of a whole clip no stream has
        return Window(latents, Conditions(conditions.features, **now | {"clip_audio": None}), known, numbers)

    def denoise(
        self, state: State, plan: Window | None, x: Tensor, sigma: Tensor | float, conditions: Conditions, step: int = 0
    ) -> tuple[Tensor, None]:
        window = self.plan(state, conditions) if plan is None else plan
        return self._step(window, x, self.level(x, sigma), None), None

    def _step(self, window: Window, x: Tensor, sigma: Tensor, past_sigma: Tensor | None) -> Tensor:
        """x [B, C, n, H, W] at sigma [B] behind its window, at past_sigma [B, m n] (None: the history's level) -> x0."""
        frames, past = x.shape[2], window.latents
        if past is not None:
            x = torch.cat([past.to(x), x], dim=2)
        level = sigma
        if self.net.kind.frame_sigma:
            level = sigma.unsqueeze(1).expand(-1, frames)
            if past is not None:
                own = level.new_full((len(sigma), past.shape[2]), self.spec.history.level)
                level = torch.cat([own if past_sigma is None else past_sigma, level], dim=1)
        given = (window.conditions, window.known, window.numbers)
        return self.net.kind.denoise(self.net, x, level, *given)[:, :, -frames:]

    @torch.no_grad()
    def commit(self, state: State, x0: Tensor, conditions: Conditions, steps: Any = (), plan: Any = None) -> State:
        """The chunk's latents and conditions enter the window."""
        return self._moved(state, (*state.window, Finished(state.chunk, x0.detach(), conditions)), state.chunk + 1)

    def _moved(self, state: State, past: Sequence[Finished], chunk: int) -> State:
        see = self.spec.history.visible(chunk)
        return replace(state, chunk=chunk, window=tuple(part for part in past if part.chunk in see))

    def restore(self, state: State, cached: Sequence, seen: Sequence[Finished], chunk: int) -> State:
        return self._moved(state, seen, chunk)

    def recommit(self, text: Tensor, seen: Sequence[Finished], chunk: int, cache: CacheKind = "value") -> State:
        return self._moved(self.open(text, cache), seen, chunk)

    def denoise_clip(
        self, x: Tensor, sigma: Tensor, conditions: Conditions, clean: Tensor | None = None, level: Tensor | None = None
    ) -> Tensor:
        """Chunk by chunk, each behind the window of `clean` chunks that a stream would have, or without them of the noisy ones."""
        n, out = self.spec.chunk_frames, []
        if x.shape[2] % n:
            raise ValueError(
                f"a clip needs a whole number of chunks: got {x.shape[2]} latent frames with chunk_frames={n}"
            )
        source = x if clean is None else clean
        chunks = [
            Finished(j, part, conditions.frames(j * n, (j + 1) * n))
            for j, part in enumerate(write_reference(source, conditions, conditions.known).split(n, dim=2))
        ]
        own = sigma if clean is None else level
        for j, part in enumerate(x.split(n, dim=2)):
            see = self.spec.history.visible(j)
            window = self._window([chunks[i] for i in see], chunks[j].conditions, j)
            past = own[:, list(see)].repeat_interleave(n, dim=1) if own is not None and see else None
            out.append(self._step(window, part, sigma[:, j], past))
        return torch.cat(out, dim=2)
