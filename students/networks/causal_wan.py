"""The chunk-causal student: the teacher's network, its context a value.

Every forward is one call of `_run` over segments, packed side by side under one attention mask:

    denoise (serving, rollouts)   noisy chunk                                       behind the KV cache
    commit                        clean chunk                                       behind the KV cache
    denoise_diagonal              [pending clean chunk |] chunks in flight          behind the KV cache
    denoise_clip                  [clean clip |] noisy clip                         no cache, gradient throughout
    denoise_diagonal_train        [clean chunks |] chunks in flight                 no cache, gradient throughout

Who sees whom comes from one History. A chunk's gradient never reaches earlier chunks through the cache: it is made and kept
without gradient.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from students.kv_cache import CachedChunk, by_block, of_part, unrotated
from students.schedule import DiagonalStep
from students.spec import Spec
from students.student import CacheKind, Finished, Joined, Past, ReadAhead, State, Student, stacked
from teachers.conditions import Conditions, taken
from teachers.errors import UserError
from teachers.networks.kind import KeyValue, PastParts, to_x0
from teachers.networks.spans import BlockSpans, Span, SpanTransformer, rotate

Groups = Sequence[Sequence[int]]
ALONE: tuple[Groups] = (((),),)
"""One group that sees itself."""


@dataclass(frozen=True)
class Segment:
    """Latents x [B, C, f, H, W] at sigma [B, 1] or [B, f], the conditions of their frames, and of these the `known` ones.

    `sees`: of each part of the history (or of all alike) one entry for each of as many equal groups of the segment's frames, the
    chunks of the whole input that the group sees beside itself, in order of time. `first`: the number of its first chunk in the
    stream, for absolute positions.
    """

    x: Tensor
    sigma: Tensor
    conditions: Conditions
    known: tuple[int, ...] = ()
    sees: Sequence[Groups] = ALONE
    first: int = 0


class CausalWan(Student):
    """The avatar DiT, chunk by chunk."""

    has_context_gradient = True

    def __init__(self, net: SpanTransformer, spec: Spec):
        super().__init__()
        embedded, ranges = net.kind.guidance, 0 if spec.guidance is None else len(spec.guidance.names)
        if embedded and embedded != ranges:
            raise UserError(
                f"network.guidance: the network embeds {embedded} guidance scale(s), student.guidance has {ranges}; make them equal"
            )
        self.net, self.spec = net, spec
        spec.history.part_of(len(net.blocks))  # a cycle of windows fits
        self.one_by_one = ""
        if spec.schedule.depth > 1:
            self.one_by_one = "a diagonal schedule, whose chunks in flight enter and leave one by one"
        elif "anchors" in taken(net.kind):
            self.one_by_one = "a network with anchors, which each stream keeps for itself"

    def batch_key(self, chunk: int) -> Hashable:
        n = self.spec.chunk_frames
        absolute = self.spec.history.positions == "absolute"
        numbers = self.net.kind.numbered(range(chunk * n, chunk * n + n), n)
        return chunk == 0, numbers, chunk if absolute else None

    def join(self, states: Sequence[State]) -> Joined:
        blocks = zip(*(state.read.text or () for state in states), strict=True)
        text = tuple((torch.cat([kv[0] for kv in block]), torch.cat([kv[1] for kv in block])) for block in blocks)
        read = ReadAhead(text=text, times=states[0].read.times)
        return Joined(chunk=states[0].chunk, read=read, rows=tuple(states))

    @torch.no_grad()
    def open(self, text: Tensor | None = None, cache: CacheKind = "value") -> State:
        """The empty context; the reference is frame 0 of chunk 0. Text features [B, L, D] are read once for the stream, without
        gradient: steps use that by way of a `plan`."""
        device, dtype = next(self.parameters()).device, torch.promote_types(self.net.compute_dtype, torch.float32)
        levels = {*self.spec.sigmas, *self.spec.first_sigmas, self.spec.history.level}
        if self.net.guidance_embedder is not None:
            levels = set()  # the scale is embedded with them
        times = {
            s: self.net.read_time(self.spec.conditioned(torch.full((1, 1), s, device=device, dtype=dtype)))
            for s in levels
        }
        state = replace(super().open(cache=cache), read=ReadAhead(times=times))
        return state if text is None else self.set_text(state, text)

    def set_text(self, state: State, text: Tensor) -> State:
        return replace(
            state, read=replace(state.read, text=self.net.read_text(text), anchors=None)
        )  # these read the text

    def plan(self, state: State, conditions: Conditions, grad: bool = False) -> ReadAhead | None:
        """The stream's text and sigmas and the chunk's audio as the blocks take them, read without gradient. With `grad` nothing:
        a step with gradient reads its conditions itself, or those layers would get none."""
        if grad:
            return None
        if self.spec.schedule.depth > 1:  # chunks enter and leave between forwards, and their audio with them
            return replace(state.read, anchors=self._anchors(state.read, conditions))
        n, image = self.spec.chunk_frames, self._image(conditions)
        frames = 0 if conditions.audio is None else conditions.audio.shape[1]
        numbers = self.net.kind.numbered(range(state.chunk * n, state.chunk * n + frames), n)
        with torch.no_grad():
            audio = self.net.read_audio(conditions.audio, numbers, conditions.regions)
        image = None if image is None else self.net.read_image(image)
        return replace(state.read, audio=audio, image=image, anchors=self._anchors(state.read, conditions))

    def _image(self, conditions: Conditions) -> Tensor | None:
        """The image features, for a network that reads them."""
        return conditions.image if self.net.image_dim else None

    def _anchors(self, read: ReadAhead, conditions: Conditions) -> tuple[Tensor, tuple[KeyValue, ...]] | None:
        """The anchors' keys and values, read without gradient where others were read before, or none; None without any."""
        given = conditions.anchors if "anchors" in taken(self.net.kind) else None
        given = given if read.rolled is None else read.rolled
        if given is None or (read.anchors is not None and read.anchors[0] is given):
            return None if given is None else read.anchors
        with torch.no_grad():
            return given, self.net.read_anchors(given, conditions.text if read.text is None else read.text)

    def _rolled(self, state: State, x0: Tensor, anchors: Tensor) -> State:
        """The state with a chunk x0 more of what the anchors [B, C, R, H, W] are to be made of, or, with the last one, those."""
        read = state.read
        drawn = x0.clone() if read.drawn is None else torch.cat([read.drawn, x0], dim=2)
        if drawn.shape[2] < self.spec.history.anchors_roll:
            return replace(state, read=replace(read, drawn=drawn))
        rolled = self.net.kind.roll_anchors(anchors, drawn.to(anchors))
        return replace(state, read=replace(read, drawn=None, rolled=rolled, anchors=None))

    def rotate_keys(self, keys: Tensor, place: int) -> Tensor:
        """Rotate a chunk's keys [L, B, n, M, d] to their place in time (History.place)."""
        n = self.spec.chunk_frames
        return rotate(keys, self.net.rope_table(place * n, n, *self.spec.token_grid))

    def _run(
        self,
        segments: Sequence[Segment],
        state: State | None = None,
        read: ReadAhead | None = None,
        sigma: float | None = None,
        step: int = 0,
        keep: bool = True,
    ) -> tuple[Tensor, list[KeyValue]]:
        """One masked forward: the segments side by side, behind the context of `state` -> x0 of the last segment in fp32, and, to
        `keep` them, the un-rotated keys and values of all of them.

        `read` in the place of the conditions, as far as it goes; its time embedding only where `sigma` says that all frames are
        at that one level.
        """
        last, n = segments[-1], self.spec.chunk_frames
        composed = [self.net.kind.compose(part.x, self._referred(part), part.known) for part in segments]
        parts = [inputs.to(composed[-1][1]) for _, inputs in composed]
        read = read or ReadAhead()
        given = (
            last.conditions if len(segments) == 1 else Conditions.join_frames([part.conditions for part in segments])
        )
        text = last.conditions.text if read.text is None else read.text
        anchors: Any = None if read.anchors is None else read.anchors[1]
        if anchors is None and "anchors" in taken(self.net.kind):
            rolled = None if state is None else state.read.rolled
            anchors = self.net.read_anchors(last.conditions.anchors if rolled is None else rolled, text)
        audio: Any = given.audio if read.audio is None else read.audio
        kind = self.net.kind
        levels = [kind.levels(part.sigma, part.x.shape[2], part.known) for part in segments]
        level: Any = self.spec.conditioned(joined(levels, 1))
        if sigma is not None and sigma in read.times and levels[0] is last.sigma:
            level = read.times[sigma]
        out, cache = self.net(
            joined(parts, 2),
            level,
            text,
            audio,
            **self._seen(segments, state),
            past=None if state is None else self._past(state, step),
            pose=given.pose,
            image=self._image(last.conditions) if read.image is None else read.image,
            remember=keep,
            guidance=self.scale(last.conditions),
            numbers=self.net.kind.numbered(_numbers(segments, n), n),
            regions=last.conditions.regions,
            anchors=anchors,
        )
        x, _ = composed[-1]
        out = out[:, :, out.shape[2] - x.shape[2] :]
        return to_x0(out, x, last.sigma, self._referred(last), self.net.prediction, last.known), cache

    def _referred(self, part: Segment) -> Conditions:
        """A segment's conditions, the reference [B, C, f, H, W] of each frame its own where not all chunks are given it."""
        conditions, first = part.conditions, self.spec.history.reference_chunks
        if first is None or conditions.reference is None:
            return conditions
        n = self.spec.chunk_frames
        given = torch.tensor(_numbers([part], n), device=part.x.device) < first * n
        return replace(conditions, reference=conditions.reference * given.view(-1, 1, 1).to(conditions.reference))

    def _seen(self, segments: Sequence[Segment], state: State | None) -> dict[str, Any]:
        """The network's arguments for who sees whom: the spans, and how many frames are before them."""
        parts = [
            (self._spans(segments, i), 0 if state is None else self._past_frames(state, i))
            for i in range(len(self.spec.history.parts))
        ]
        if len(parts) > 1:
            return {"spans": BlockSpans(tuple(parts), self.part_of)}
        return {"spans": parts[0][0], "past_frames": parts[0][1]}

    def _spans(self, segments: Sequence[Segment], which: int) -> list[Span]:
        """Which frames see which in a part of the history, over the segments side by side; with absolute positions, those of the
        stream. Known frames, which come first, apart where they are clean tokens."""
        n, history, spans, start = self.spec.chunk_frames, self.spec.history, [], 0
        numbers = _numbers(segments, n)
        for part in segments:
            sees = part.sees[which if len(part.sees) > 1 else 0]
            size = part.x.shape[2] // len(sees)
            for group, seen in enumerate(sees):
                context = tuple((j * n, (j + 1) * n) for j in seen)
                at = None
                if history.positions == "absolute":
                    at = tuple(numbers[first] for first, _ in (*context, (start, start + size)))
                ahead = self.net.kind.anchor_distance(numbers[start], history.anchors_ahead)
                clean = len(part.known) if self.net.kind.clean_known and not group else 0
                spans += Span(start, start + size, context, at, ahead).apart(clean)
                start += size
        return spans

    def _past_frames(self, state: State, part: int) -> int | tuple[int, ...]:
        """Latent frames of a part's context; of streams of different ages those of each."""
        if not isinstance(state, Joined):
            return len(of_part(state.cached, part)) * self.spec.chunk_frames
        counts = tuple(len(of_part(row.cached, part)) * self.spec.chunk_frames for row in state.rows)
        return counts if len(set(counts)) > 1 else counts[0]

    def _past(self, state: State, step: int) -> Past | Sequence[PastParts | None] | None:
        """The context of a step; in parts where blocks are computed again in the backward pass, which would keep it until then."""
        if not (state.cached and self.net.gradient_checkpointing and torch.is_grad_enabled()):
            return self.past(state, step)
        n, grid = self.spec.chunk_frames, self.spec.token_grid
        which = step if len(state.cached[0].keys) > 1 else 0
        parts = [
            unrotated(own, state.chunk, part, lambda at: self.net.rope_table(at * n, n, *grid), which)
            if (own := of_part(state.cached, i))
            else None
            for i, part in enumerate(self.spec.history.parts)
        ]
        return parts[0] if len(parts) == 1 else by_block(parts, self.part_of)

    def _chunk(
        self,
        state: State,
        x: Tensor,
        sigma: Tensor | float,
        conditions: Conditions,
        step: int,
        plan: ReadAhead | None,
        keep: bool,
    ) -> tuple[Tensor, list[KeyValue]]:
        """`_run` of the state's chunk x [B, C, n, H, W] alone, at one sigma."""
        number, level = None if isinstance(sigma, Tensor) else sigma, self.level(x, sigma)
        known = conditions.known if state.chunk == 0 else ()
        return self._run(
            [Segment(x, level.unsqueeze(1), conditions, known, first=state.chunk)], state, plan, number, step, keep
        )

    def denoise(
        self,
        state: State,
        plan: ReadAhead | None,
        x: Tensor,
        sigma: Tensor | float,
        conditions: Conditions,
        step: int = 0,
        keep: bool = False,
    ) -> tuple[Tensor, KeyValue | None]:
        """As every student's; `keep`: the second part has the chunk's keys and values with their gradient."""
        needed = keep or self.spec.history.commit == "same_level"
        x0, cache = self._chunk(state, x, sigma, conditions, step, plan, needed)
        return x0, stacked(cache, grad=keep) if needed else None

    def with_context_gradient(self, state: State, exit_kv: KeyValue) -> State:
        last, (keys, values) = state.chunk - 1, exit_kv
        exits = {entry.part: entry for entry in CachedChunk(last, (keys,), (values,)).split(self.part_of)}

        def linked(kept: CachedChunk) -> CachedChunk:
            own, (key, value) = exits[kept.part], (kept.keys[0], kept.values[0])
            key, value = (a + (b - b.detach()) for a, b in ((key, own.keys[0]), (value, own.values[0])))
            return replace(kept, keys=(key,), values=(value,))

        if not any(entry.chunk == last for entry in state.cached):
            return state
        cached = [linked(entry) if entry.chunk == last else entry for entry in state.cached]
        return self.resume(state, cached, state.chunk)

    @torch.no_grad()
    def commit(
        self,
        state: State,
        x0: Tensor,
        conditions: Conditions,
        steps: Sequence | DiagonalStep = (),
        plan: ReadAhead | None = None,
    ) -> State:
        """As every student's. Only a same_level history needs `steps`; a clean one makes its own pass, which shares the chunk's
        `plan` (made where none is given)."""
        history = self.spec.history
        if plan is not None and plan.anchors is not None:
            state = replace(state, read=replace(state.read, anchors=plan.anchors))
        if state.chunk * self.spec.chunk_frames < history.anchors_roll:
            state = self._rolled(state, x0.detach(), conditions.anchors)
        if isinstance(steps, DiagonalStep):
            state = state if steps.entry is None else self.settle(state, steps.entry)
            pending = Finished(state.chunk, x0.detach(), conditions)
            return self.resume(replace(state, pending=pending, flight=steps.flight), state.cached, state.chunk + 1)
        if history.commit == "clean":
            seen = self._seen_pending(state) if self.spec.schedule.depth > 1 else state
            plan = self.plan(state, conditions) if plan is None else plan
            steps = [stacked(self._chunk(seen, x0.detach(), history.level, conditions, 0, plan, True)[1])]
        elif len(steps) != len(self.spec.sigmas):
            raise ValueError(f"same_level keeps every denoising step: got {len(steps)} of {len(self.spec.sigmas)}")
        keys, values = zip(*steps, strict=True)
        if not isinstance(state, Joined):
            return self._behind(state, CachedChunk(state.chunk, keys, values), state.chunk + 1)
        rows = []
        for i, row in enumerate(state.rows):  # copies, which do not keep the other rows' memory
            key, value = (tuple(part[:, i : i + 1].clone() for part in parts) for parts in (keys, values))
            rows.append(self._behind(row, CachedChunk(row.chunk, key, value), row.chunk + 1))
        return Joined(chunk=state.chunk + 1, rows=tuple(rows))

    def denoise_diagonal(
        self, state: State, plan: ReadAhead | None, x: Tensor, sigmas: Sequence[float], conditions: Conditions
    ) -> tuple[Tensor, CachedChunk | None]:
        n, pending = self.spec.chunk_frames, state.pending
        dtype = torch.promote_types(x.dtype, torch.float32)

        def levels(values: Sequence[float]) -> Tensor:
            return torch.cat([x.new_full((n,), s, dtype=dtype) for s in values]).expand(x.shape[0], -1)

        known = conditions.known if state.chunk == 0 else ()
        flight = Segment(x, levels(sigmas), conditions, known, first=state.chunk)
        if pending is None:
            return self._run([flight], state, plan, keep=False)[0], None
        own = pending.conditions
        known = own.known if pending.chunk == 0 else ()
        clean = Segment(pending.x0, levels([self.spec.history.level]), own, known, first=pending.chunk)
        x0, cache = self._run([clean, replace(flight, sees=(((0,),),))], state, plan)
        tokens = n * math.prod(self.spec.token_grid)
        keys, values = stacked([(key[:, :tokens], value[:, :tokens]) for key, value in cache])
        return x0, CachedChunk(pending.chunk, (keys,), (values,))

    def _seen_pending(self, state: State) -> State:
        """The state with that part of the context that the chunk sees once it is pending: what the next chunk sees of it."""
        return replace(self.resume(state, state.cached, state.chunk + 1), chunk=state.chunk)

    def settle(self, state: State, entry: CachedChunk) -> State:
        return self._behind(replace(state, pending=None), entry, state.chunk)

    def _behind(self, state: State, entry: CachedChunk, chunk: int) -> State:
        """The state before chunk number `chunk` with an entry of all blocks more."""
        return self.resume(state, (*state.cached, *entry.split(self.part_of)), chunk)

    def denoise_clip(
        self, x: Tensor, sigma: Tensor, conditions: Conditions, clean: Tensor | None = None, level: Tensor | None = None
    ) -> Tensor:
        """All chunks at once, for training: x [B, C, F, H, W], sigma [B, num_chunks] -> x0.

        With `clean` each chunk sees the clean earlier chunks (teacher forcing), as a stream with a clean history does; without
        it the noisy ones (diffusion forcing), as with a same_level history where all chunks have one sigma. `level`
        [B, num_chunks]: the clean chunks' own, where that is not the history's.
        """
        n, frames = self.spec.chunk_frames, x.shape[2]
        if frames % n:
            raise ValueError(f"a clip needs a whole number of chunks: got {frames} latent frames with chunk_frames={n}")
        sees = [[part.visible(i) for i in range(frames // n)] for part in self.spec.history.parts]
        sigma = sigma.repeat_interleave(n, dim=1)
        noisy = Segment(x, sigma, conditions, conditions.known, sees)
        if clean is None:
            return self._run([noisy], keep=False)[0]
        return self._run([self._clean(clean, sigma, conditions, level, sees), noisy], keep=False)[0]

    def denoise_diagonal_train(
        self, x: Tensor, sigma: Tensor, conditions: Conditions, clean: Tensor, level: Tensor | None = None
    ) -> Tensor:
        n, start, parts = self.spec.chunk_frames, clean.shape[2], self.spec.history.parts
        front, stop = start // n, conditions.num_frames
        if start + x.shape[2] != stop or x.shape[2] != n * sigma.shape[1]:
            raise ValueError(f"{start} latent frames of context, {x.shape[2]} in flight: the conditions have {stop}")
        sigma = sigma.repeat_interleave(n, dim=1)
        if not front:
            return self._run([Segment(x, sigma, conditions, conditions.known)], keep=False)[0]
        sees = [[tuple(i for i in part.visible(j + 1) if i < j) for j in range(front)] for part in parts]
        context = self._clean(clean, sigma, conditions.frames(0, start), level, sees)
        behind = [(part.visible(front),) for part in parts]
        flight = Segment(x, sigma, conditions.frames(start, stop), (), behind, front)
        return self._run([context, flight], keep=False)[0]

    def _clean(
        self, clean: Tensor, like: Tensor, conditions: Conditions, level: Tensor | None, sees: Sequence[Groups]
    ) -> Segment:
        """Finished chunks at their own `level` [B, chunks], by default the history's, in the type of the sigmas `like`."""
        n, shape = self.spec.chunk_frames, (clean.shape[0], clean.shape[2])
        own = like.new_full(shape, self.spec.history.level) if level is None else level.repeat_interleave(n, dim=1)
        return Segment(clean, own, conditions, conditions.known, sees)


def _numbers(segments: Sequence[Segment], n: int) -> list[int]:
    """Of the latent frames of all segments, in their stream."""
    return [part.first * n + i for part in segments for i in range(part.x.shape[2])]


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """The parts along an axis; one alone as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)
