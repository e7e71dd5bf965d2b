"""What the backbones of clips and streams share: tokens of latent frames, and spans, which say who sees whom.

A backbone is a `SpanTransformer` of blocks with a KV cache, its kind a `SpanKind`; `students.networks.causal_wan` makes a causal
student of any.
B = batch, F = latent frames, S = tokens a frame, N = F S, D = width, M = heads, d = head width.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor, nn
from torch.nn.attention import varlen

from teachers.errors import UserError
from teachers.networks.kind import KeyValue, NetworkKind, PastParts, RaggedPast
from teachers.networks.sequence import SequenceGroup, Split

MOST_TABLES = 256
"""Tables of rotary angles that are kept, the newest: absolute positions go on with a stream."""
HAS_VARLEN = "seqused_k" in inspect.signature(varlen.varlen_attn).parameters  # from torch 2.12 on
Layout = list[tuple[slice, tuple[slice, ...]]]
"""The tokens of each span, and those of the input that they see beside themselves."""


class Arranged(NamedTuple):
    """Spans as a block takes them: their layout, and the rotary table of each."""

    layout: Layout
    rotary: list[Tensor]


@dataclass(frozen=True)
class Span:
    """Query frames [start, stop) of the present input, which see these context frame ranges of it and themselves.

    Positions are relative to what is seen: context frames come first (after any cached past), then the queries; or `at` gives
    the first position of each context range and of the queries. `ahead`: how many frames ahead of the first query frame the
    anchors lie, where there are any (`NetworkKind.anchor_distance`).
    """

    start: int
    stop: int
    context: tuple[tuple[int, int], ...] = ()
    at: tuple[int, ...] | None = None
    ahead: int | None = None

    def apart(self, known: int) -> "tuple[Span, ...]":
        """The span with its first `known` frames in a span of their own, which see each other alone; positions as they were."""
        first, rest = self.start + known, self.stop - self.start - known
        if not known or not rest:
            return (self,)
        at = None if self.at is None else self.at[-1]
        own = replace(self, stop=first, context=(), at=None if at is None else (at,))
        ranges = (*self.context, (self.start, first))
        after = None if self.at is None or at is None else (*self.at, at + known)
        return own, replace(self, start=first, context=ranges, at=after)


@dataclass(frozen=True)
class BlockSpans:
    """Spans where blocks differ: of each of the `parts` its spans and the frames of its past (see `SpanTransformer.arrange`), and
    the part of each block."""

    parts: tuple[tuple[Sequence[Span], int | Sequence[int]], ...]
    part_of: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SpanKind(NetworkKind):
    """The sizes of a backbone, and what follows from them."""

    causal: ClassVar = "students.networks.causal_wan:CausalWan"
    frame_sigma: ClassVar = True
    can_checkpoint: ClassVar = True

    num_layers: int = 30
    num_heads: int = 12
    head_dim: int = 128
    ffn_dim: int = 8960
    freq_dim: int = 256
    patch: int = 2

    def check(self) -> None:
        if self.head_dim % 2 or self.head_dim < 6:
            raise UserError(f"head_dim {self.head_dim}: network; rotary positions need an even number from 6 on")

    @classmethod
    def module_class(cls) -> "type[SpanTransformer]":
        """The class of the module that `build` makes."""
        raise NotImplementedError

    def shallow(self, blocks: int = 1) -> Self:
        return self if blocks >= self.num_layers else replace(self, num_layers=blocks)

    def enable_checkpointing(self, net: "SpanTransformer", *function: Callable) -> None:
        net.enable_gradient_checkpointing(*function)

    def check_sequence(self, ranks: int, tokens: int) -> None:
        common = math.gcd(self.num_heads, tokens)
        fits = ", ".join(str(i) for i in range(1, common + 1) if common % i == 0)
        for count, what in ((self.num_heads, "heads"), (tokens, "tokens a latent frame")):
            if count % ranks:
                raise UserError(f"engine.sequence_parallel: {ranks} ranks, but {count} {what}; it can be {fits}")

    def split_sequence(self, net: "SpanTransformer", group: SequenceGroup) -> None:
        net.sequence = group

    @property
    def kv_per_token(self) -> int:
        return 2 * self.num_layers * self.num_heads * self.head_dim

    @property
    def feature_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def num_blocks(self) -> int:
        return self.num_layers

    def feature_blocks(self, net: "SpanTransformer") -> Sequence[nn.Module]:
        return list(net.blocks)

    def shared_caches(self, net: "SpanTransformer") -> tuple[dict, ...]:
        return (net._rope_cache,)


class SpanTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """A backbone. Its forward takes latents [B, C', F, H, W], sigmas [B, F], text, audio and `spans`, and keys and values of the
    `past`; what it computes of conditions ahead of a step are its `read_time`, `read_text`, `read_audio` and `read_image`. Where
    ranks share sequences (`split_of`), inputs and output are whole on each, keys and values those of its heads."""

    _supports_gradient_checkpointing = True
    config: Any  # what the constructor was given, by attribute
    image_dim = 0
    prediction = "velocity"
    sequence: SequenceGroup | None = None
    guidance_embedder: nn.Linear | None
    blocks: nn.ModuleList
    rope: WanRotaryPosEmbed
    patch: int

    def add_positions(self, head_dim: int, patch: int, max_positions: int) -> None:
        """Make the table of Wan's rotary angles, by which 22 pairs of a head of 128 turn with time and 21 with either side; no
        checkpointing and no guidance embedding yet."""
        self.rope, self.patch = WanRotaryPosEmbed(head_dim, (1, patch, patch), max_positions), patch
        self.gradient_checkpointing, self.guidance_embedder = False, None
        self._rope_cache: dict[tuple, Tensor] = {}  # few, where positions are relative to a bounded window

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of the matrices; what `_keep_in_fp32_modules` names may be wider."""
        raise NotImplementedError

    def split_of(self, frames: int) -> Split | None:
        """How sequences of so many latent frames are shared with other ranks; None where they are not."""
        return None if self.sequence is None else self.sequence.split(frames)

    @torch.compiler.assume_constant_result  # a graph that filled the cache itself would be compiled again when it is filled
    def rope_table(self, first: int, count: int, height: int, width: int) -> Tensor:
        """Unit complex numbers [1, n*h*w, 1, d/2] of frame positions first .. first + count - 1 and a height x width grid."""
        rope, last = self.rope, first + count
        key = (first, count, height, width, self.compute_dtype, rope.freqs_cos.device)
        if key in self._rope_cache:
            return self._rope_cache[key]
        if last > rope.max_seq_len:
            raise UserError(
                f"latent frame {last}: the network has positions for {rope.max_seq_len} that attend at once; shorten the window, "
                "or, where history.positions is absolute, end the stream before"
            )
        while len(self._rope_cache) >= MOST_TABLES:
            self._rope_cache.pop(next(iter(self._rope_cache)))
        grid = (count, height, width, -1)
        with torch.inference_mode(False):  # cached for training too, whoever needs it first
            cos, sin = (table[:, ::2].split([rope.t_dim // 2, rope.h_dim // 2, rope.w_dim // 2], dim=1)
                        for table in (rope.get_buffer("freqs_cos"), rope.get_buffer("freqs_sin")))  # fmt: skip
            t, y, x = (torch.complex(c, s) for c, s in zip(cos, sin, strict=True))
            parts = [
                t[first:last].view(count, 1, 1, -1).expand(grid),
                y[:height].view(1, height, 1, -1).expand(grid),
                x[:width].view(1, 1, width, -1).expand(grid),
            ]
            table = torch.cat(parts, dim=-1).reshape(1, count * height * width, 1, -1)
            self._rope_cache[key] = table if self.compute_dtype == torch.float64 else table.to(torch.complex64)
        return self._rope_cache[key]

    def rope_tables(self, first: int | Sequence[int], *rest: int) -> Tensor:
        """`rope_table`, or where every row of a batch has a first position of its own, those of the rows [B, n*h*w, 1, d/2]."""
        if isinstance(first, int):
            return self.rope_table(first, *rest)
        return torch.cat([self.rope_table(at, *rest) for at in first])

    def arrange(
        self,
        spans: Sequence[Span],
        past_frames: int | Sequence[int],
        frames: int,  # noqa: ARG002
        height: int,
        width: int,
        anchors: Any = None,  # noqa: ARG002
    ) -> Arranged:
        """What a block takes of the spans over frames of height x width tokens: query tokens and key token slices, and the table
        that rotates both, of each, behind a past of so many frames, or of so many in each row. `anchors` as `forward` has them."""
        layout, rotary, tokens = [], [], height * width
        for span in spans:
            ranges = (*span.context, (span.start, span.stop))
            sizes = [b - a for a, b in ranges]
            if span.at is None:
                rotary.append(self.rope_tables(past_frames, sum(sizes), height, width))
            else:
                tables = [self.rope_table(a, size, height, width) for a, size in zip(span.at, sizes, strict=True)]
                rotary.append(torch.cat(tables, dim=1))
            slices = [slice(a * tokens, b * tokens) for a, b in ranges]
            layout.append((slices[-1], tuple(slices[:-1])))
        return Arranged(layout, rotary)

    def arrange_blocks(
        self,
        spans: Sequence[Span] | BlockSpans | Arranged | None,
        past_frames: int | Sequence[int],
        frames: int,
        *rest: Any,
    ) -> list[Arranged]:
        """`arrange` of each block; without spans every frame sees all."""
        if isinstance(spans, BlockSpans):
            parts = [self.arrange(own, past, frames, *rest) for own, past in spans.parts]
            return [parts[part] for part in spans.part_of]
        if not isinstance(spans, Arranged):
            spans = self.arrange(spans or (Span(0, frames),), past_frames, frames, *rest)
        return [spans] * len(self.blocks)

    def run_block(self, block: Any, *inputs: Any) -> tuple[Tensor, KeyValue]:
        """block(*inputs), computed again in the backward pass where that is asked for."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return cast(Callable, self._gradient_checkpointing_func)(block, *inputs)  # of enable_gradient_checkpointing
        return block(*inputs)

    def unpatchify(self, out: Tensor, frames: int, height: int, width: int) -> Tensor:
        """Tokens [B, F h w, p p C] -> latents [B, C, F, h p, w p]."""
        out = out.unflatten(2, (self.patch, self.patch, -1)).unflatten(1, (frames, height, width))
        return out.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


def rotate(x: Tensor, rope_table: Tensor) -> Tensor:
    """Rotary embedding of x [.., n, M, d]: interleaved pairs as complex numbers times unit `rope_table` [1, n, 1, d/2]. A real
    table [1, n, 1, d/2, 2], cosines and sines, is the same without complex numbers, which an exported graph has none of."""
    if not rope_table.is_complex():
        real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = rope_table.unbind(-1)
        return torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1).flatten(-2)
    pairs = torch.view_as_complex(x.to(rope_table.real.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope_table).flatten(-2).type_as(x)


def joined(past: KeyValue | PastParts) -> KeyValue:
    """Rotated keys and values behind which a block attends: as they are, or joined from a context in parts."""
    if len(past) == 2:
        return past
    keys, values, tables = past
    parts = [rotate(key, table) for key, table in zip(keys, tables, strict=True)]
    return torch.cat(parts, dim=1), torch.cat(values, dim=1)


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, backend: Any) -> Tensor:
    """Softmax attention of [B, n, M, d] tensors by a backend of diffusers' dispatcher -> [B, n, M, d].

    `seen`: how many of the first keys each row sees [B] (None: all); whatever the backend, by torch's attention of variable length
    in half precision on CUDA, else by its own under a mask.
    """
    if seen is None:
        return dispatch_attention_fn(query, key, value, backend=backend)
    if HAS_VARLEN and query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16):
        return attend_varlen(query, key, value, seen)
    mask = torch.arange(key.shape[1], device=key.device) < seen.view(-1, 1, 1, 1)
    parts = (part.transpose(1, 2) for part in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask).transpose(1, 2)


def attend_varlen(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """`attend` by `torch.nn.attention.varlen`: rows lie one behind the other, of each the first `seen` keys are read."""
    rows, queries, keys = len(query), query.shape[1], key.shape[1]
    starts = torch.arange(rows + 1, device=query.device, dtype=torch.int32)
    flat = (query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1))
    used = seen.to(torch.int32)
    out = varlen.varlen_attn(*flat, starts * queries, starts * keys, queries, keys, seqused_k=used)
    assert isinstance(out, Tensor)
    return out.unflatten(0, (rows, queries))


def attend_spans(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    rotary: Sequence[Tensor],
    past: KeyValue | PastParts | RaggedPast | None,
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Any],
) -> list[Any]:
    """What `attend` gives of each span: its rotated queries [B, n, M, d], and the rotated keys and the values [B, m, M, d] of what
    it sees, the past first, and of a ragged past how many of them a row sees [B]."""
    seen, count = [], None
    past = past if past is None or isinstance(past, RaggedPast) else joined(past)
    for (tokens, context), rope_table in zip(layout, rotary, strict=True):
        if context:
            parts = (*context, tokens)
            k, v = (torch.cat([x[:, s] for s in parts], dim=1) for x in (key, value))
            q, k = rotate(query[:, tokens], rope_table[:, -(tokens.stop - tokens.start) :]), rotate(k, rope_table)
        else:
            q, k = rotate(torch.stack((query[:, tokens], key[:, tokens])), rope_table).unbind()
            v = value[:, tokens]
        if isinstance(past, RaggedPast):
            k, v, count = past.before(k, v)
        elif past is not None:
            k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
        seen.append(attend(q, k, v, count))
    return seen
