"""The chunk-causal student: the teacher's network, its context a value.

Serving (`denoise`, `commit`) and training (`denoise_clip`) run the same blocks; who sees whom comes from one History.
A chunk's gradient never reaches earlier chunks through the context: it is made and kept without gradient.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from students.kv_cache import CachedChunk
from students.schedule import DiagonalStep
from students.spec import Spec
from students.student import Finished, State, Student, stacked
from teachers.conditions import Conditions
from teachers.errors import UserError
from teachers.networks.kind import KeyValue, to_x0
from teachers.networks.wan import AvatarTransformer, Span, rotate, with_reference

Plan = tuple[Tensor, ...] | None  # AvatarTransformer.read_audio


class CausalWan(Student):
    """The avatar DiT, chunk by chunk."""

    def __init__(self, net: AvatarTransformer, spec: Spec):
        super().__init__()
        if net.guidance_embedder is not None and spec.guidance is None:
            raise UserError(
                "network.guidance: the student has no range of scales; give student.guidance, or leave it out"
            )
        self.net, self.spec = net, spec

    @torch.no_grad()
    def open(self, text: Tensor | None = None) -> State:
        """The empty context; the reference is frame 0 of chunk 0. Text features [B, L, D] are read once for the stream."""
        device, dtype = next(self.parameters()).device, torch.promote_types(self.net.compute_dtype, torch.float32)
        levels = {*self.spec.sigmas, *self.spec.first_sigmas, self.spec.history.level}
        if self.net.guidance_embedder is not None:
            levels = set()  # the scale is told with them
        times = {s: self.net.read_time(torch.full((1, 1), s, device=device, dtype=dtype)) for s in levels}
        state = replace(self.new_state(), times=times)
        return state if text is None else self.set_text(state, text)

    def set_text(self, state: State, text: Tensor) -> State:
        """The same context under another text [B, L, D]; what was committed under the old one stays as it is."""
        return replace(state, text=self.net.read_text(text))

    def plan(self, state: State, conditions: Conditions) -> Plan:
        """What a chunk's steps without gradient share: its audio as the blocks take it. Steps with gradient read it themselves."""
        if torch.is_grad_enabled() or self.spec.schedule.depth > 1:
            return None
        return self.net.read_audio(conditions.audio)

    def scale(self, conditions: Conditions) -> Tensor | None:
        """The guidance scale [B] that the network is told: the conditions' own, or the spec's."""
        told = self.spec.guidance
        if told is None or conditions.guidance is not None:
            return conditions.guidance
        return conditions.text.new_full(conditions.text.shape[:1], told.served)

    def turn(self, keys: Tensor, place: int) -> Tensor:
        """Rotate a chunk's keys [L, B, n, M, d] to their place in time among the visible chunks."""
        n = self.spec.chunk_frames
        return rotate(keys, self.net.rope_table(place * n, n, *self.spec.token_grid))

    def forward(
        self, state: State, x: Tensor, sigma: Tensor | float, conditions: Conditions, step: int = 0, plan: Plan = None
    ):
        known = conditions.known if state.chunk == 0 else ()
        x, inputs = with_reference(x, conditions, known)
        # A step with gradient reads text and time itself: what was read without gradient would cut those layers off.
        grad = torch.is_grad_enabled()
        text = conditions.text if state.text is None or grad else state.text
        dtype = torch.promote_types(x.dtype, torch.float32)
        level = sigma if isinstance(sigma, Tensor) else torch.full((x.shape[0],), sigma, device=x.device, dtype=dtype)
        time = level if grad or isinstance(sigma, Tensor) else state.times.get(sigma, level)
        past, seen = self.past(state, step), len(state.cached) * self.spec.chunk_frames
        audio = conditions.audio if plan is None or grad else plan
        scale = self.scale(conditions)
        out, cache = self.net(
            inputs, time, text, audio, past=past, past_frames=seen, pose=conditions.pose, guidance=scale
        )
        return to_x0(out, x, level, conditions, self.net.prediction, known), cache

    def denoise(
        self, state: State, plan: Plan, x: Tensor, sigma: Tensor | float, conditions: Conditions, step: int = 0
    ) -> tuple[Tensor, KeyValue | None]:
        """x [B, C, n, H, W] of the state's chunk at sigma ([B], or one number), which is denoising step `step` -> x0, and what
        `commit` may want to know of this step; conditions are those of the chunk's frames."""
        x0, cache = self(state, x, sigma, conditions, step, plan)
        return x0, stacked(cache) if self.spec.history.commit == "same_level" else None

    @torch.no_grad()
    def commit(
        self, state: State, x0: Tensor, conditions: Conditions, steps: Sequence | DiagonalStep = (), plan: Plan = None
    ) -> State:
        """Put a finished chunk into the context and return the state of the next chunk.

        `steps`: what `denoise` told of each step; only a same_level history needs it, a clean one makes its own pass, which
        shares the chunk's `plan`.
        """
        history = self.spec.history
        if isinstance(steps, DiagonalStep):
            state = state if steps.entry is None else self.settle(state, steps.entry)
            pending = Finished(state.chunk, x0.detach(), conditions)
            return self.resume(replace(state, pending=pending, flight=steps.flight), state.cached, state.chunk + 1)
        if history.commit == "clean":
            seen = self._seen_pending(state) if self.spec.schedule.depth > 1 else state
            steps = [stacked(self(seen, x0.detach(), history.level, conditions, plan=plan)[1])]
        elif len(steps) != len(self.spec.sigmas):
            raise ValueError(f"same_level keeps every denoising step: got {len(steps)} of {len(self.spec.sigmas)}")
        keys, values = zip(*steps, strict=True)
        return self.resume(state, (*state.cached, CachedChunk(state.chunk, keys, values)), state.chunk + 1)

    def denoise_diagonal(
        self, state: State, x: Tensor, sigmas: Sequence[float], conditions: Conditions
    ) -> tuple[Tensor, CachedChunk | None]:
        """Diagonal: x [B, C, k n, H, W] of the state's chunk and those behind it, each at its own of k sigmas; they see each
        other and the context, which does not see them (FlowAct-R1's fake-causal mask) -> x0, and the pending chunk's entry."""
        n, first = self.spec.chunk_frames, state.chunk == 0
        shape, shown = x.shape, [sigma for sigma in sigmas for _ in range(n)]
        x, inputs = with_reference(x, conditions, conditions.known if first else ())
        audio, pose, spans, pending = conditions.audio, conditions.pose, None, state.pending
        level = x.new_tensor(shown, dtype=torch.promote_types(x.dtype, torch.float32)).expand(shape[0], -1)
        if pending is not None:
            own, told = pending.conditions, [self.spec.history.level] * n
            _, clean = with_reference(pending.x0, own, own.known if pending.chunk == 0 else ())
            inputs, audio = torch.cat([clean, inputs], dim=2), torch.cat([own.audio, audio], dim=1)
            if pose is not None and own.pose is not None:
                pose = torch.cat([own.pose, pose], dim=1)
            spans, shown = [Span(0, n), Span(n, inputs.shape[2], ((0, n),))], [*told, *shown]
        text = conditions.text if state.text is None or torch.is_grad_enabled() else state.text
        time = x.new_tensor(shown, dtype=level.dtype).expand(shape[0], -1)
        past, seen = self.past(state), len(state.cached) * n
        told = {"past": past, "past_frames": seen, "pose": pose, "guidance": self.scale(conditions)}
        out, cache = self.net(inputs, time, text, audio, spans=spans, **told)
        entry = None
        if pending is not None:
            out, tokens = out[:, :, n:], n * math.prod(self.spec.token_grid)
            keys, values = stacked([(key[:, :tokens], value[:, :tokens]) for key, value in cache])
            entry = CachedChunk(pending.chunk, (keys,), (values,))
        return to_x0(out, x, level, conditions, self.net.prediction, conditions.known if first else ()), entry

    def _seen_pending(self, state: State) -> State:
        """The state with that part of the context that the chunk sees once it is pending: what the next chunk sees of it."""
        return replace(self.resume(state, state.cached, state.chunk + 1), chunk=state.chunk)

    def settle(self, state: State, entry: CachedChunk) -> State:
        """The state whose pending chunk is in the context, as `entry`."""
        return self.resume(replace(state, pending=None), (*state.cached, entry), state.chunk)

    def denoise_clip(
        self, x: Tensor, sigma: Tensor, conditions: Conditions, clean: Tensor | None = None, level: Tensor | None = None
    ) -> Tensor:
        """All chunks at once, for training: x [B, C, F, H, W], sigma [B, num_chunks] -> x0.

        With `clean` each chunk sees the clean earlier chunks (teacher forcing), as a stream with a clean history does; without
        it the noisy ones (diffusion forcing), as with a same_level history where all chunks have one sigma. `level`
        [B, num_chunks]: what the clean chunks are told to be at, where that is not the history's own.
        """
        n, frames = self.spec.chunk_frames, x.shape[2]
        if frames % n:
            raise ValueError(f"a clip needs a whole number of chunks: got {frames} latent frames with chunk_frames={n}")
        chunks = frames // n
        shown = sigma.repeat_interleave(n, dim=1)
        x, inputs = with_reference(x, conditions)
        audio, pose, spans = conditions.audio, conditions.pose, []
        see = [tuple((j * n, (j + 1) * n) for j in self.spec.history.visible(i)) for i in range(chunks)]
        offset = 0
        if clean is not None:
            _, context = with_reference(clean, conditions)
            inputs = torch.cat([context, inputs], dim=2)
            audio = torch.cat([audio, audio], dim=1)
            pose = None if pose is None else torch.cat([pose, pose], dim=1)
            told = (
                torch.full_like(shown, self.spec.history.level) if level is None else level.repeat_interleave(n, dim=1)
            )
            spans = [Span(i * n, (i + 1) * n, see[i]) for i in range(chunks)]
            shown, offset = torch.cat([told, shown], dim=1), frames
        spans += [Span(offset + i * n, offset + (i + 1) * n, see[i]) for i in range(chunks)]
        out, _ = self.net(
            inputs, shown, conditions.text, audio, spans=spans, pose=pose, guidance=self.scale(conditions)
        )
        out = out[:, :, offset:]
        return to_x0(out, x, sigma.repeat_interleave(n, dim=1), conditions, self.net.prediction, conditions.known)

    def denoise_diagonal_train(
        self, x: Tensor, sigma: Tensor, conditions: Conditions, clean: Tensor, level: Tensor | None = None
    ) -> Tensor:
        """A forward of a diagonal stream in one masked pass, for training: x [B, C, k n, H, W], the last k chunks of the
        conditions' frames in flight, each at its own sigma [B, k], see each other and the clean [B, C, m n, H, W] chunks before
        them, which see those before themselves alone (FlowAct-R1's fake-causal mask) -> x0 [B, C, k n, H, W].

        It equals `denoise_diagonal` after those chunks were committed, but gradient passes through the context too. `level` [B, m]:
        what the clean chunks are told to be at, where that is not the history's own.
        """
        n, start, see = self.spec.chunk_frames, clean.shape[2], self.spec.history.visible
        front, stop = start // n, conditions.num_frames
        if start + x.shape[2] != stop or x.shape[2] != n * sigma.shape[1]:
            raise ValueError(f"{start} latent frames of context, {x.shape[2]} in flight: the conditions hear {stop}")
        known = () if front else conditions.known
        x, inputs = with_reference(x, conditions, known)
        shown, spans = sigma.repeat_interleave(n, dim=1), []
        if front:
            _, context = with_reference(clean, conditions)
            inputs = torch.cat([context.to(inputs), inputs], dim=2)
            told = shown.new_full((x.shape[0], front), self.spec.history.level) if level is None else level
            shown = torch.cat([told.repeat_interleave(n, dim=1), shown], dim=1)
            for j in range(front):
                spans.append(Span(j * n, (j + 1) * n, tuple((i * n, (i + 1) * n) for i in see(j + 1) if i < j)))
        spans.append(Span(start, stop, tuple((i * n, (i + 1) * n) for i in see(front))))
        scale = self.scale(conditions)
        out, _ = self.net(
            inputs, shown, conditions.text, conditions.audio, spans=spans, pose=conditions.pose, guidance=scale
        )
        return to_x0(out[:, :, start:], x, shown[:, start:], conditions, self.net.prediction, known)
