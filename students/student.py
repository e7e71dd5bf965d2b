"""The student contract: a stream's context is a value, a step is a function of it. What kinds of student share is here."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from students.kv_cache import CachedChunk, ContextKV, CycledKVCache, InplaceKVCache, LazyContext, concatenate
from students.schedule import InFlight
from students.spec import Spec
from teachers.conditions import Conditions
from teachers.errors import UserError
from teachers.networks.kind import KeyValue, RaggedPast

CacheKind = Literal["value", "inplace"]
Past = Sequence[KeyValue | RaggedPast | None]
"""Of each block, rotated keys and values; None where it sees nothing."""


@dataclass(frozen=True)
class Finished:
    """A finished chunk x0 [B, C, n, H, W] and its conditions: what is needed to put it into a context, now or again."""

    chunk: int
    x0: Tensor
    conditions: Conditions


@dataclass(frozen=True)
class ReadAhead:
    """Conditions as the network's blocks take them, read once without gradient: cross-attention keys and values of the `text` of
    each block and of the `image`, embeddings of sigmas (`times`), a chunk's `audio`, and the keys and values of the `anchors` with
    the latents that they are of. What is missing is read in the step."""

    text: tuple[KeyValue, ...] | None = None
    times: Mapping[float, Any] = field(default_factory=dict)  # of the spec's sigmas and the history's level
    audio: tuple[Any, ...] | None = None
    image: tuple[KeyValue, ...] | None = None
    anchors: tuple[Tensor, tuple[KeyValue, ...]] | None = None
    drawn: Tensor | None = (
        None  # latents [B, C, f, H, W] from the start of a stream, until its anchors are made again of them
    )
    rolled: Tensor | None = None  # those anchors, in the place of the conditions'


@dataclass(frozen=True)
class State:
    """The context of a stream before chunk number `chunk`: what is `cached` of the visible chunks, and the same made `context_kv`
    for attention, or written to a `kv_cache` in place. `read`: the text that `open` was given and the sigmas, read once; steps
    use it by way of a `plan`, and then whatever text their conditions have.

    The `pending` chunk before this one enters the context with the next forward (a diagonal schedule, MIDAS); with a diagonal
    schedule the chunks in `flight` are behind this one."""

    chunk: int = 0
    cached: tuple[CachedChunk, ...] = ()
    context_kv: ContextKV = ()
    kv_cache: InplaceKVCache | CycledKVCache | None = None
    read: ReadAhead = field(default_factory=ReadAhead)
    window: tuple[Finished, ...] = ()  # of a windowed student: the visible chunks themselves
    flight: tuple[InFlight, ...] = ()
    pending: Finished | None = None


@dataclass(frozen=True)
class Joined(State):
    """The states of several streams, a row of a batch each, for `plan`, `denoise` and `commit` in the place of one stream's."""

    rows: tuple[State, ...] = ()
    contexts: dict[int, Past | None] = field(default_factory=dict)  # by denoising step


class Student(nn.Module):
    """open -> State; plan, denoise and commit make the next chunk's of it; denoise_clip is the same under masks, for training.

    A chunk's gradient never reaches earlier chunks through the context: it is made and kept without gradient. A kind of student
    has a network `net` and rotates its keys to their positions (`rotate_keys`).
    """

    net: Any
    spec: Spec
    one_by_one: str = "this kind of student"  # why its streams cannot be rows of one batch; empty: they can be joined
    has_context_gradient = False  # whether `with_context_gradient` is there, and `denoise` takes `keep`

    def open(self, text: Tensor | None = None, cache: CacheKind = "value") -> State:
        """The empty context of a stream under text features [B, L, D].

        `cache` value: every state holds its own keys and values (training folds them, a branch of a stream may go on from any).
        inplace: buffers of fixed size that the states of one stream share, without gradient, for serving; a diagonal schedule,
        which moves its context within a step, has values all the same.
        """
        if cache != "inplace" or self.spec.schedule.depth > 1:
            return State()
        history = self.spec.history
        if len(history.parts) == 1:
            return State(kv_cache=InplaceKVCache(history.parts[0]))
        return State(kv_cache=CycledKVCache(history, self.part_of))

    @property
    def part_of(self) -> tuple[int, ...]:
        """Of each block the part of the history that it has."""
        history = self.spec.history
        return (0,) if len(history.parts) == 1 else history.part_of(len(self.net.blocks))

    def set_text(self, state: State, text: Tensor) -> State:
        """The same context under another text [B, L, D]; what was committed under the old one stays as it is. Nothing to do for
        students that read it with every chunk."""
        return state

    def batch_key(self, chunk: int) -> Hashable:
        """What streams whose next chunk is number `chunk` have in common with those that they can be joined with."""
        raise NotImplementedError

    def join(self, states: Sequence[State]) -> Joined:
        """The states of streams of one `batch_key`, of any ages, as rows of a batch; `commit` gives their next ones as `rows`."""
        raise NotImplementedError

    def plan(self, state: State, conditions: Conditions, grad: bool = False) -> Any:
        """What the denoising steps of the state's chunk share, read once, without gradient. With `grad` what a step with gradient
        may be given: a plan with gradient, or None where such a step reads its conditions itself."""
        raise NotImplementedError

    def denoise(
        self, state: State, plan: Any, x: Tensor, sigma: Tensor | float, conditions: Conditions, step: int = 0
    ) -> tuple[Tensor, Any]:
        """x [B, C, n, H, W] of the state's chunk at sigma ([B], or one number), which is denoising step `step` -> x0, and what
        `commit` may want to know of this step; conditions are those of the chunk's frames. With gradient the plan must be one
        that was made with it."""
        raise NotImplementedError

    def commit(self, state: State, x0: Tensor, conditions: Conditions, steps: Any = (), plan: Any = None) -> State:
        """Put a finished chunk into the context and return the state of the next chunk. `steps`: what `denoise` gave."""
        raise NotImplementedError

    def with_context_gradient(self, state: State, exit_kv: KeyValue) -> State:
        """The state after `commit` whose newest chunk has the gradient of `exit_kv` (of `denoise` with `keep`), its numbers as they
        are: Self Forcing's published leak, for ablation alone."""
        raise NotImplementedError

    def denoise_clip(
        self, x: Tensor, sigma: Tensor, conditions: Conditions, clean: Tensor | None = None, level: Tensor | None = None
    ) -> Tensor:
        """All chunks at once: x [B, C, F, H, W], sigma [B, num_chunks] -> x0. With `clean` each chunk sees those earlier chunks,
        which are at `level` [B, num_chunks] (default: the history's)."""
        raise NotImplementedError

    def denoise_diagonal(
        self, state: State, plan: Any, x: Tensor, sigmas: Sequence[float], conditions: Conditions
    ) -> tuple[Tensor, CachedChunk | None]:
        """Of students with a diagonal schedule: x [B, C, k n, H, W] of the state's chunk and those behind it, each at its own of k
        sigmas; they see each other and the context, which does not see them (FlowAct-R1's fake-causal mask) -> x0, and the
        pending chunk's entry."""
        raise NotImplementedError

    def denoise_diagonal_train(
        self, x: Tensor, sigma: Tensor, conditions: Conditions, clean: Tensor, level: Tensor | None = None
    ) -> Tensor:
        """A forward of a diagonal stream in one masked pass, for training: x [B, C, k n, H, W], the last k chunks of the
        conditions' frames in flight, each at its own sigma [B, k], see each other and the clean [B, C, m n, H, W] chunks before
        them, which see those before themselves alone -> x0 [B, C, k n, H, W].

        It equals `denoise_diagonal` after those chunks were committed, but gradient passes through the context too. `level` [B, m]:
        the clean chunks' own, where that is not the history's.
        """
        raise NotImplementedError

    def settle(self, state: State, entry: CachedChunk) -> State:
        """The state whose pending chunk is in the context, as `entry`; of students with a diagonal schedule."""
        raise NotImplementedError

    def rotate_keys(self, keys: Tensor, place: int) -> Tensor:
        """A chunk's keys [L, B, n, M, d], rotated (RoPE) to their place in time (History.place)."""
        raise NotImplementedError

    @staticmethod
    def level(x: Tensor, sigma: Tensor | float) -> Tensor:
        """sigma [B] of x [B, ..]; one number stands for all rows, in fp32 or better."""
        if isinstance(sigma, Tensor):
            return sigma
        return torch.full((x.shape[0],), sigma, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))

    def past(self, state: State, step: int = 0) -> Past | None:
        """Each block's rotated keys and values that a step of the state's chunk sees (None: nothing)."""
        if isinstance(state, Joined):
            if step not in state.contexts:
                state.contexts[step] = join_pasts([self.past(row, step) for row in state.rows])
            return state.contexts[step]
        if not state.cached:
            return None
        context_kv = (
            state.context_kv
            if state.kv_cache is None
            else state.kv_cache.context_kv(state.cached, state.chunk, self.rotate_keys)
        )
        return context_kv[step if len(context_kv) > 1 else 0]

    def resume(self, state: State, cached: Sequence[CachedChunk], chunk: int) -> State:
        """The state before chunk number `chunk` with those of `cached` that it sees, made ready."""
        see = [part.visible(chunk) for part in self.spec.history.parts]
        cached = tuple(entry for entry in cached if entry.chunk in see[entry.part])
        context_kv: ContextKV = ()
        if cached and state.kv_cache is not None:
            state.kv_cache.context_kv(cached, chunk, self.rotate_keys)
        elif cached:
            make = partial(concatenate, cached, chunk, self.spec.history, self.rotate_keys, self.part_of)
            with_gradient = any(
                key.requires_grad for entry in cached for key in entry.keys
            )  # a step without has none to give
            context_kv = make() if with_gradient else LazyContext(make, len(cached[0].keys))
        return replace(state, chunk=chunk, cached=cached, context_kv=context_kv)

    def restore(self, state: State, cached: Sequence[CachedChunk], seen: Sequence[Finished], chunk: int) -> State:
        """The state before chunk number `chunk` of a saved stream: its KV cache, and the finished chunks that it sees."""
        return self.resume(state, cached, chunk)

    def scale(self, conditions: Conditions) -> Tensor | None:
        """The guidance scales [B, M] that are embedded: the conditions' own, or the spec's."""
        guidance = self.spec.guidance
        if guidance is None or conditions.guidance is not None:
            return conditions.guidance
        rows = conditions.text.shape[:1]
        return torch.stack([conditions.text.new_full(rows, scale) for scale in guidance.served.values()], dim=1)

    def recommit(self, text: Tensor, seen: Sequence[Finished], chunk: int, cache: CacheKind = "value") -> State:
        """The state before chunk number `chunk` of a stream under `text` that has only these chunks behind it, in order of
        time."""
        state = self.open(text, cache)
        for past in seen:
            state = self.commit(replace(state, chunk=past.chunk), past.x0, replace(past.conditions, text=text))
        return self.resume(state, state.cached, chunk)


def refuse_published(spec: Spec, who: str) -> None:
    """UserError where a spec has what only published weights of a causal Wan want."""
    if spec.times or spec.history.positions != "relative":
        raise UserError(
            f"student.times, student.history.positions: {who} is conditioned on 1000 sigma and counts positions over what it sees; "
            "remove them"
        )


def stacked(cache: Sequence[KeyValue], grad: bool = False) -> KeyValue:
    """Keys and values of all blocks [L, B, n, M, d], copied: a CUDA graph writes its next output over them. Without their gradient
    unless `grad`."""
    keys, values = (torch.stack(part) for part in zip(*cache, strict=True))
    return (keys, values) if grad else (keys.detach(), values.detach())


def refuse_cycle(spec: Spec, who: str) -> None:
    """UserError where blocks have windows of their own."""
    if len(spec.history.parts) > 1:
        assert isinstance(spec.history.window, tuple)
        raise UserError(
            f"student.history.window: got {list(spec.history.window)}; {who} has one window for all its blocks: give one number"
        )


def join_pasts(pasts: Sequence[Past | None]) -> Past | None:
    """Each block's keys and values of several streams [1, N, M, d] (None: nothing is seen) as rows of a batch, padded to the
    longest."""
    like = next((past for past in pasts if past is not None), None)
    if like is None:
        return None
    counts: dict[tuple[int, ...], Tensor] = {}  # blocks of one window share them
    return [_joined_past([None if past is None else past[i] for past in pasts], counts) for i in range(len(like))]


def _joined_past(
    rows: Sequence[KeyValue | RaggedPast | None], counts: dict[tuple[int, ...], Tensor]
) -> KeyValue | RaggedPast | None:
    """A block's part of `join_pasts`."""
    like = next((row for row in rows if row is not None), None)
    if like is None:
        return None
    empty = like[0][:, :0], like[1][:, :0]
    keys, values = ([(empty if row is None else row)[part] for row in rows] for part in (0, 1))
    lengths = tuple(key.shape[1] for key in keys)
    if len(set(lengths)) == 1:
        return torch.cat(keys), torch.cat(values)
    if lengths not in counts:
        counts[lengths] = torch.tensor(lengths, device=like[0].device)
    return RaggedPast(_padded(keys, max(lengths)), _padded(values, max(lengths)), counts[lengths])


def _padded(parts: Sequence[Tensor], length: int) -> Tensor:
    """Rows [1, n, M, d] of a batch [B, length, M, d], zeros behind them."""
    whole = parts[0].new_zeros(len(parts), length, *parts[0].shape[2:])
    for row, part in zip(whole, parts, strict=True):
        row[: part.shape[1]] = part[0]
    return whole
