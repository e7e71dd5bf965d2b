"""A block of LongCat-Video-Avatar (2512.13531): self-attention over spans, attention to text and to a frame's audio, a gated MLP.

B = batch, F = latent frames, S = tokens a frame, N = F S, D = width, E = width of the time embedding, M = heads, d = head width,
L = text tokens, P = speakers, K = P audio tokens of a frame, W = width of one.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor, nn
from torch.nn import functional as F

from teachers.networks.blocks.wan import gated, modulated
from teachers.networks.infinitetalk import PLACES, AudioContext, turns
from teachers.networks.kind import KeyValue, PastParts, RaggedPast
from teachers.networks.sequence import Split
from teachers.networks.spans import Layout, attend, attend_spans, rotate

EPS = 1e-6


class AudioInput(NamedTuple):
    """Audio tokens [B, F, K, W] of latent frames, and with two speakers where they are: regions [B, P + 1, S] and the split, both
    as `AudioContext` has them."""

    tokens: Tensor
    speakers: int = 1
    regions: Tensor | None = None
    split: Split | None = None


class SelfAttention(nn.Module):
    """Queries, keys and values by one matrix, the first two normalised by head."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.RMSNorm(head_dim, eps=EPS), nn.RMSNorm(head_dim, eps=EPS)

    def read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, N, M, d] of x [B, N, D]."""
        query, key, value = self.qkv(x).unflatten(-1, (3, -1, self.q_norm.weight.shape[0])).unbind(2)
        return self.q_norm(query).type_as(value), self.k_norm(key).type_as(value), value


class CrossAttention(nn.Module):
    """Attention to tokens of another width, queries and keys normalised by head."""

    def __init__(self, dim: int, head_dim: int, width: int):
        super().__init__()
        self.q_linear, self.kv_linear, self.proj = nn.Linear(dim, dim), nn.Linear(width, 2 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.RMSNorm(head_dim, eps=EPS), nn.RMSNorm(head_dim, eps=EPS)

    def query(self, x: Tensor) -> Tensor:
        """Queries [.., n, M, d] of x [.., n, D]."""
        query = self.q_linear(x).unflatten(-1, (-1, self.q_norm.weight.shape[0]))
        return self.q_norm(query).type_as(query)

    def read(self, given: Tensor) -> KeyValue:
        """Keys and values [.., L, M, d] of what is attended to [.., L, W]."""
        key, value = self.kv_linear(given).unflatten(-1, (2, -1, self.q_norm.weight.shape[0])).unbind(-3)
        return self.k_norm(key).type_as(value), value


class GatedMLP(nn.Module):
    """w2(silu(w1 x) w3 x)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class LongCatBlock(nn.Module):
    """Every part but self-attention and the MLP is left out of frames that are condition tokens."""

    backend: AttentionBackendName | None

    def __init__(self, dim: int, head_dim: int, ffn_dim: int, time_dim: int, audio_width: int):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, 6 * dim))
        self.audio_adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, 3 * dim))
        self.norm = FP32LayerNorm(dim, EPS, elementwise_affine=False)
        self.pre_crs_attn_norm, self.pre_video_crs_attn_norm = FP32LayerNorm(dim, EPS), FP32LayerNorm(dim, EPS)
        self.attn = SelfAttention(dim, head_dim)
        self.cross_attn = CrossAttention(dim, head_dim, dim)
        self.audio_cross_attn = CrossAttention(dim, head_dim, audio_width)
        self.ffn = GatedMLP(dim, ffn_dim)
        self.dim, self.backend = dim, None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None) -> Tensor:
        """Softmax attention of [B, n, M, d] tensors -> [B, n, M d]; `seen` as `spans.attend` has it."""
        return attend(query, key, value, seen, self.backend).flatten(2)

    def read_time(self, embedding: Tensor) -> Tensor:
        """Modulation [B, F, 9, D] of a time embedding [B, F, E]: shift, scale and gate of self-attention, of the MLP, of audio."""
        maps = self.adaLN_modulation, self.audio_adaLN_modulation
        embedding = embedding.to(cast(nn.Linear, self.adaLN_modulation[1]).weight.dtype)
        return torch.cat([to_parts(embedding).unflatten(2, (-1, self.dim)) for to_parts in maps], dim=2).float()

    def read(self, text: Tensor) -> KeyValue:
        """Keys and values [B, L, M, d] of embedded text [B, L, D]."""
        return self.cross_attn.read(text)

    def read_audio(self, audio: AudioInput) -> AudioContext:
        """Keys and values [B, F, K, M, d] of audio, with two speakers the keys rotated to the middle of their speaker's places."""
        key, value = self.audio_cross_attn.read(audio.tokens)
        if audio.regions is None:
            return AudioContext(key, value)
        centres = key.new_tensor([sum(ends) / 2 for ends in PLACES], dtype=torch.float32)
        at = centres.repeat_interleave(key.shape[2] // audio.speakers).repeat(key.shape[1])
        turned = rotate(key.flatten(1, 2), turns(at.expand(len(key), -1), key.shape[-1])).view_as(key)
        return AudioContext(turned, value, regions=audio.regions, split=audio.split)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        noisy: Tensor,
        text: Tensor | KeyValue,
        audio: AudioInput | AudioContext,
        layout: Layout,
        rotary: Sequence[Tensor],
        past: KeyValue | PastParts | RaggedPast | None = None,
        split: Split | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """x [B, N, D]; time, the embedding [B, F, E] or `read_time` of it; noisy [B, F, 1], 0 where neither text nor audio is
        taken; embedded text [B, L, D] or `read` of it; audio, or `read_audio` of it; layout, rotary and past of `attend_spans`.
        With a `split` x is this rank's tokens, layout and past those of all tokens of its heads.

        Returns the new x and this input's un-rotated keys and values, of the heads that attend here.
        """
        temb, noisy = time if time.ndim == 4 else self.read_time(time), noisy.unsqueeze(2)
        audio = self.read_audio(audio) if isinstance(audio, AudioInput) else audio
        normed = modulated(self.norm(x.float()), temb, 0).type_as(x)
        attended, cached, places = self.attend_spans(normed, layout, rotary, past, audio, split)
        x = gated(x, attended, temb, 2)
        del normed, attended

        own = self.cross_attn
        query = own.query(self.pre_crs_attn_norm(x.float()).type_as(x))
        x = gated(x, own.proj(self.attend(query, *(text if isinstance(text, tuple) else self.read(text)))), noisy, 0)

        own, frames = self.audio_cross_attn, audio.key.shape[1]
        query = own.query(self.pre_video_crs_attn_norm(x.float()).type_as(x))
        if audio.regions is not None:
            query = rotate(query, turns(audio.own(places), query.shape[-1]))
        per_frame = (part.flatten(0, 1) for part in (query.unflatten(1, (frames, -1)), audio.key, audio.value))
        y = own.proj(self.attend(*per_frame).unflatten(0, (-1, frames)).flatten(1, 2))
        x = gated(x, modulated(self.norm(y.float()), temb, 6), temb[:, :, 8:] * noisy, 0)

        return gated(x, self.ffn(modulated(self.norm(x.float()), temb, 3).type_as(x)), temb, 5), cached

    def attend_spans(
        self, normed: Tensor, layout: Layout, rotary: Sequence[Tensor], past, audio: AudioContext, split: Split | None
    ) -> tuple[Tensor, KeyValue, Sequence[Tensor | None]]:
        """Self-attention of [B, N, D], as `forward` says -> its projected output [B, N, D], un-rotated keys and values, and what
        `locate` gives of each span."""
        query, key, value = self.attn.read(normed)
        if split is not None:
            query, key, value = split.to_heads(query, key, value)

        def both(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor | None]:
            return self.attend(q, k, v, seen), self.locate(q, k, audio)

        seen, places = zip(*attend_spans(query, key, value, layout, rotary, past, both), strict=True)
        attended = torch.cat(seen, dim=1)
        if split is not None:
            attended = split.to_tokens(attended.unflatten(2, key.shape[2:])).flatten(2)
        return self.attn.proj(attended), (key, value), places

    @torch.no_grad()
    def locate(self, query: Tensor, key: Tensor, audio: AudioContext) -> Tensor | None:
        """The positions [B, n] of query tokens [B, n, M, d] by where they look in frame 0, whose keys are first; None with one
        speaker."""
        return None if audio.regions is None else audio.places(query, key, self.attend)


class FinalLayer(nn.Module):
    """The modulated output."""

    def __init__(self, dim: int, time_dim: int, out: int):
        super().__init__()
        self.norm = FP32LayerNorm(dim, EPS, elementwise_affine=False)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, 2 * dim))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [B, N, D], time embedding [B, F, E] -> [B, N, p p C], x0 - noise."""
        temb = self.adaLN_modulation(embedding.to(self.linear.weight.dtype)).float().unflatten(2, (2, -1))
        return self.linear(modulated(self.norm(x.float()), temb, 0).to(self.linear.weight.dtype))
