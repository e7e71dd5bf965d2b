"""MIDAS' student (2508.19320): a language model plans a chunk, a small diffusion head denoises it, the next plan reads the result.

One chunk is one latent frame in the paper; more are planned and denoised together. What a chunk sees of the past are the
plans of the chunks that its History names: each holds that chunk's conditions and the latents before it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from students.kv_cache import CachedChunk
from students.networks.midas_net import MidasNet
from students.spec import Spec
from students.student import CacheKind, Finished, State, Student, refuse_cycle, refuse_published, stacked
from teachers.conditions import Conditions
from teachers.errors import UserError
from teachers.networks.kind import to_x0, write_reference


@dataclass(frozen=True)
class Plan:
    """Hidden states [B, tokens, D] of a chunk, and its place in the context once it is finished."""

    hidden: Tensor
    entry: CachedChunk


class Midas(Student):
    """`plan` is one pass of the language model, `denoise` one of the head, `commit` what the next plan begins with."""

    def __init__(self, net: MidasNet, spec: Spec):
        super().__init__()
        history, depth = spec.history, spec.schedule.depth
        if history.commit != "clean" or history.level or history.window == 0 or depth > 1:
            raise UserError(
                f"student.history, student.schedule: got commit={history.commit}, level={history.level}, "
                f"window={history.window}, depth={depth}; a MIDAS student reads clean latents, one chunk after the other: "
                "commit: clean, level: 0.0, a window from 1, depth: 1"
            )
        refuse_published(spec, "a MIDAS student")
        refuse_cycle(spec, "a MIDAS student")
        if spec.history_noise is not None and spec.history_noise.buckets > net.config.buckets:
            raise UserError(
                f"student.history_noise.buckets: got {spec.history_noise.buckets}; "
                f"the network has {net.config.buckets} embeddings (student.network.buckets)"
            )
        self.net, self.spec = net, spec

    @property
    def _size(self) -> int:
        """Positions of a chunk: its condition tokens, and the latent tokens of the chunk before."""
        return self.spec.chunk_frames * self.net.conditions.count + self._tokens

    @property
    def _tokens(self) -> int:
        """Latent tokens of a chunk."""
        return self.spec.chunk_frames * math.prod(self.spec.token_grid)

    def rotate_keys(self, keys: Tensor, place: int) -> Tensor:
        return self.net.rotate(keys, place * self._size)

    def plan(self, state: State, conditions: Conditions, grad: bool = False) -> Plan:
        """The language model's pass over the chunk's conditions and the chunk before it, which is `pending`."""
        with torch.set_grad_enabled(grad):
            inputs = self.net("inputs", self._before(state, conditions), conditions, 0, self._tokens)
            hidden, cached = self.net("read", inputs, self.past(state), len(state.cached) * self._size)
            keys, values = stacked(cached)
        return Plan(hidden[:, -self._tokens :], CachedChunk(state.chunk, (keys,), (values,)))

    def _before(self, state: State, conditions: Conditions) -> Tensor | None:
        """The latents that a chunk's plan reads: of the chunk before, in the beginning of the reference."""
        if state.pending is not None:
            return state.pending.x0
        if conditions.reference is None:
            return None
        return conditions.reference.expand(-1, -1, self.spec.chunk_frames, -1, -1)

    def denoise(
        self, state: State, plan: Plan, x: Tensor, sigma: Tensor | float, conditions: Conditions, step: int = 0
    ) -> tuple[Tensor, CachedChunk]:
        level = self.level(x, sigma)
        known = conditions.known if state.chunk == 0 else ()
        x = write_reference(x, conditions, known)
        out = self.net.latents_of(self.net("head", self.net.tokens(x), level, plan.hidden), x)
        return to_x0(out, x, level, conditions, self.net.config.prediction, known), plan.entry  # of every step the same

    @torch.no_grad()
    def commit(
        self,
        state: State,
        x0: Tensor,
        conditions: Conditions,
        steps: Sequence[CachedChunk] = (),
        plan: Plan | None = None,
    ) -> State:
        """The chunk's plan enters the context, its latents wait for the next plan. Without plan and steps it is planned anew."""
        entry = steps[-1] if steps else (self.plan(state, conditions) if plan is None else plan).entry
        pending = Finished(state.chunk, x0.detach(), conditions)
        return self.resume(replace(state, pending=pending), (*state.cached, entry), state.chunk + 1)

    def recommit(self, text: Tensor, seen: Sequence[Finished], chunk: int, cache: CacheKind = "value") -> State:
        """As every student's; a chunk whose predecessor is forgotten cannot be planned again, and is left out of the context."""
        state, last = self.open(text, cache), -1
        for past in seen:
            if past.chunk in (0, last + 1):
                state = self.commit(replace(state, chunk=past.chunk), past.x0, replace(past.conditions, text=text))
            else:
                state = replace(state, pending=past)
            last = past.chunk
        return self.resume(state, state.cached, chunk)

    def denoise_clip(
        self, x: Tensor, sigma: Tensor, conditions: Conditions, clean: Tensor | None = None, level: Tensor | None = None
    ) -> Tensor:
        """All chunks of a clip: plans under the mask of the History, then the head on all of them at once. `clean` is what the
        plans read (teacher forcing), `level` [B, num_chunks] its noise, which picks the embedding of its bucket."""
        n, chunks = self.spec.chunk_frames, x.shape[2] // self.spec.chunk_frames
        if clean is None:
            raise ValueError("a MIDAS plan reads finished latents: give clean")
        x = write_reference(x, conditions, conditions.known)
        hidden = self._plans(write_reference(clean, conditions, conditions.known), conditions, level)
        tokens = self.net.tokens(x).unflatten(1, (chunks, -1)).flatten(0, 1)
        out = self.net("head", tokens, sigma.flatten(), hidden.flatten(0, 1)).unflatten(0, (-1, chunks)).flatten(1, 2)
        shown = sigma.repeat_interleave(n, dim=1)
        out = self.net.latents_of(out, x)
        return to_x0(out, x, shown, conditions, self.net.config.prediction, conditions.known)

    def _plans(self, clean: Tensor, conditions: Conditions, level: Tensor | None) -> Tensor:
        """Hidden states [B, num_chunks, tokens, D] of a clip whose chunks were `clean`."""
        n, inputs = self.spec.chunk_frames, []
        chunks = clean.shape[2] // n
        for i in range(chunks):
            given = conditions.frames(i * n, (i + 1) * n)
            before = clean[:, :, (i - 1) * n : i * n] if i else self._before(State(), given)
            inputs.append(self.net("inputs", before, given, self._bucket(level, i, clean), self._tokens))
        see = [self.spec.history.visible(i) for i in range(chunks)]
        hidden = self.net("read_clip", torch.stack(inputs, dim=1), see)
        return hidden[:, :, -self._tokens :]

    def _bucket(self, level: Tensor | None, chunk: int, clean: Tensor) -> Tensor | int:
        """The noise bucket of the chunk before number `chunk`; the reference, and a clip without noise, is clean."""
        noise = self.spec.history_noise
        if level is None or noise is None or chunk == 0:
            return 0
        return noise.bucket(level[:, chunk - 1]).to(clean.device)
