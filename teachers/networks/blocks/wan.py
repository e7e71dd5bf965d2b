"""A block of the avatar DiT: diffusers' Wan block with per-frame modulation, cached past and chunk-wise attention.

B = batch, F = latent frames, N = tokens, L = text tokens, D = width, M = heads, d = head width.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn

from teachers.networks.kind import KeyValue
from teachers.networks.sequence import Split
from teachers.networks.spans import attend, attend_spans


class AudioPack(nn.Module):
    """Audio rows of one latent frame -> audio_hidden, layer-normalised. [B, F, stride, A] -> [B, F, hidden]."""

    def __init__(self, in_dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(in_dim, hidden)
        self.norm_out = nn.LayerNorm(hidden)

    def forward(self, audio: Tensor) -> Tensor:
        return self.norm_out(self.proj(audio.flatten(2)))


class TimeSinusoids(nn.Module):
    """[cos | sin] of time * 10000^(-i / (dim / 2)): time [N] -> [N, dim] in its own type.

    Angles are in fp64 as in Wan's own code; diffusers' Timesteps has fp32 ones, up to 1e-4 off at times of 1000, which moves the
    output of a published network by 2e-6 to 6e-6.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.num_channels = dim

    def forward(self, time: Tensor) -> Tensor:
        half = self.num_channels // 2
        wide = torch.float32 if time.device.type == "mps" else torch.float64  # mps has no fp64
        index = torch.arange(half, dtype=wide, device=time.device)
        angles = time.to(wide).unsqueeze(-1) * torch.exp(-math.log(10000.0) * index / half)
        return torch.cat([angles.cos(), angles.sin()], dim=-1).to(time.dtype)


def keys_values(x: Tensor, to_key: Any, norm: Any, to_value: Any, heads: int) -> KeyValue:
    """Keys, normalised, and values [B, L, M, d] of x [B, L, D], both in the type of the projections: under autocast a GPU's
    rms_norm gives fp32, of which a context would hold twice as much."""
    key = to_key(x)
    return norm(key).type_as(key).unflatten(2, (heads, -1)), to_value(x).unflatten(2, (heads, -1))


def queries(x: Tensor, attention: Any) -> Tensor:
    """Queries [B, N, M, d], normalised, of x [B, N, D], in the type of their projection, as the keys: fp32 ones would make the
    context that they are joined with fp32."""
    query = attention.to_q(x)
    return attention.norm_q(query).type_as(query).unflatten(2, (attention.heads, -1))


class Modulations(NamedTuple):
    """Shifts, scales and gates of tokens of two kinds: of latent frames [B, F or 1, 6, D] and, behind these, of `num_anchors`
    tokens [B, 1, 6, D]."""

    frames: Tensor
    anchors: Tensor
    num_anchors: int


def by_frames(change: Callable[..., Tensor], temb: Tensor | Modulations, *tokens: Tensor) -> Tensor:
    """change(rows [B, F, 1, 6, D], tokens [B, F, S, D]..) of the tokens [B, N, D] of each frame, and of the anchors' -> [B, N,
    D]."""
    if isinstance(temb, Modulations):
        front, back = zip(*(x.split([x.shape[1] - temb.num_anchors, temb.num_anchors], 1) for x in tokens), strict=True)
        return torch.cat([by_frames(change, temb.frames, *front), by_frames(change, temb.anchors, *back)], dim=1)
    return change(temb.unsqueeze(2), *(x.unflatten(1, (temb.shape[1], -1)) for x in tokens)).flatten(1, 2)


def modulated(x: Tensor, temb: Tensor | Modulations, row: int) -> Tensor:
    """x (1 + scale) + shift of tokens [B, N, D], shift and scale rows `row` and `row` + 1 of the modulation."""

    def change(rows: Tensor, x: Tensor) -> Tensor:
        return torch.addcmul(rows[..., row, :], x, 1 + rows[..., row + 1, :])

    return by_frames(change, temb, x)


def gated(x: Tensor, y: Tensor, temb: Tensor | Modulations, row: int) -> Tensor:
    """x + gate y of tokens [B, N, D] in fp32, in the type of x; the gate is row `row` of the modulation."""

    def change(rows: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return torch.addcmul(x, y, rows[..., row, :])

    return by_frames(change, temb, x.float(), y.float()).type_as(x)


class AvatarBlock(WanTransformerBlock):
    """Wan's transformer block with per-frame modulation, cached past and chunk-wise spans."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None) -> Tensor:
        """Softmax attention of [B, n, M, d] tensors -> [B, n, M*d], by the backend of `set_attention_backend`; `seen` as
        `spans.attend` has it."""
        return attend(query, key, value, seen, getattr(self.attn1.processor, "_attention_backend", None)).flatten(2)

    def forward(
        self, x, text, temb, spans, rotary, past, image=None, audio=None, split: Split | None = None, anchors=None
    ):
        """x [B, N, D]; text [B, L, D], or its keys and values from `read`; temb [B, F or 1, 6, D], the table added, or
        `Modulations`; one (query tokens, key token slices) and rotary per span; past rotated keys and values, or parts of them;
        image [B, K, D], or its keys and values from `look`; `audio`: what the network's `audio_inputs` or `read_audio` gives this
        block (None: nothing), as `read_audio` makes it for `before`, `attend_conditions`, `locate`, `after_conditions` and `after`,
        which another kind of block overrides; `anchors`: un-rotated keys and values that spans may name as if they were of tokens
        behind x. With a `split` x is this rank's tokens, spans and past those of all tokens of its heads.

        Returns the new x and this input's un-rotated keys and values, of the heads that attend here.
        """
        audio = self.read_audio(audio)
        x = self.before(x, audio)
        normed = modulated(self.norm1(x.float()), temb, 0).type_as(x)
        attended, own, places = self.attend_spans(normed, spans, rotary, past, audio, split, anchors)
        x = gated(x, attended, temb, 2)
        del normed, attended

        query = queries(self.norm2(x.float()).type_as(x), self.attn2)
        x = x + self.attn2.to_out[0](self.attend_conditions(query, text, image, audio))
        del query
        x = self.after_conditions(x, audio, places)

        normed = modulated(self.norm3(x.float()), temb, 3).type_as(x)
        num_anchors = temb.num_anchors if isinstance(temb, Modulations) else 0
        return self.after(gated(x, self.ffn(normed), temb, 5), audio, num_anchors), own

    def attend_spans(
        self, normed: Tensor, spans, rotary, past, audio: Any, split: Split | None, anchors: KeyValue | None
    ) -> tuple[Tensor, KeyValue, Sequence[Any]]:
        """Self-attention of [B, N, D], as `forward` says -> its projected output [B, N, D], un-rotated keys and values, and what
        `locate` gives of each span. What it works with is let go when it returns."""
        attention = self.attn1
        query = queries(normed, attention)
        key, value = keys_values(normed, attention.to_k, attention.norm_k, attention.to_v, attention.heads)
        if split is not None:
            query, key, value = split.to_heads(query.type_as(key), key, value)
        own = key, value
        if anchors is not None:
            key, value = (torch.cat(both, dim=1) for both in zip(own, anchors, strict=True))

        def both(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> tuple[Tensor, Any]:
            return self.attend(q, k, v, seen), self.locate(q, k, audio)

        seen, places = zip(*attend_spans(query, key, value, spans, rotary, past, both), strict=True)
        attended = seen[0] if len(seen) == 1 else torch.cat(seen, dim=1)
        if split is not None:
            attended = split.to_tokens(attended.unflatten(2, (-1, key.shape[3]))).flatten(2)
        return attention.to_out[0](attended), own, places

    def read_audio(self, audio: Any) -> Any:
        """What the block's own weights make of `audio`; here, and where that is done already, `audio` itself."""
        return audio

    def before(self, x: Tensor, audio: Any) -> Tensor:
        """x [B, N, D] before the block: a tensor `audio` [B, F, 1, D] is added to every token of a frame."""
        if not isinstance(audio, Tensor):
            return x
        return (x.unflatten(1, (audio.shape[1], -1)) + audio).flatten(1, 2)

    def attend_conditions(self, query: Tensor, text: Any, image: Any, audio: Any) -> Tensor:  # noqa: ARG002
        """Cross-attention of query [B, N, M, d] to the text, and to the image where there is one, summed [B, N, D]."""
        attended = self.attend(query, *(text if isinstance(text, tuple) else self.read(text)))
        if image is None:
            return attended
        return attended + self.attend(query, *(image if isinstance(image, tuple) else self.look(image)))

    def locate(self, query: Tensor, key: Tensor, audio: Any) -> Any:
        """What `after_conditions` wants to know of a span's rotated queries and keys [B, n, M, d] of self-attention; nothing."""

    def after_conditions(self, x: Tensor, audio: Any, places: Sequence[Any]) -> Tensor:  # noqa: ARG002
        """x [B, N, D] between cross-attention and the MLP; `places` of `locate`, one a span."""
        return x

    def after(self, x: Tensor, audio: Any, num_anchors: int) -> Tensor:  # noqa: ARG002
        """x [B, N, D] behind the block, its last tokens the anchors'."""
        return x

    def attend_frames(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None) -> Tensor:
        """Attention of every frame's tokens, query [B, F S, M, d], to what belongs to that frame alone, key and value
        [B, F, K, M, d], of which a frame sees the first `seen` [F] (None: all) -> [B, F S, M d]."""
        batch, frames = key.shape[:2]
        query = query.unflatten(1, (frames, -1)).flatten(0, 1)
        seen = None if seen is None else seen.repeat(batch)
        attended = self.attend(query, key.flatten(0, 1), value.flatten(0, 1), seen)
        return attended.unflatten(0, (batch, frames)).flatten(1, 2)

    def read(self, text: Tensor) -> KeyValue:
        """Cross-attention keys and values [B, L, M, d] of embedded text [B, L, D]."""
        attention = self.attn2
        return keys_values(text, attention.to_k, attention.norm_k, attention.to_v, attention.heads)

    def look(self, image: Tensor) -> KeyValue:
        """Cross-attention keys and values [B, K, M, d] of embedded image tokens [B, K, D]."""
        attention = self.attn2
        keys = attention.add_k_proj, attention.norm_added_k
        return keys_values(image, *keys, attention.add_v_proj, attention.heads)
