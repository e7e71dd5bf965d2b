"""InfiniteTalk's network once more, in plain PyTorch from the paper's equations and the published shapes: Wan 2.1 image-to-video
with attention to audio, of one or two speakers. It shares no code with the network that it judges.

It takes a state dict under our names and the audio rows of pixel frames, without their neighbours: it finds those itself. Sizes as
in `reference_wan`; P speakers, T audio tokens of each.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.teachers.reference.wan import Reference, attend, gelu_tanh, layer_norm, linear, rms_norm, turn


def affine_norm(weights: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    return layer_norm(x, eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def turn_to(x: Tensor, at: Tensor) -> Tensor:
    """Rotate the pairs of [n, M, d] to positions [n], pair j by position * 10000^(-2 j / d)."""
    width = x.shape[-1]
    out = torch.empty_like(x)
    for j in range(width // 2):
        angle = at * 10000.0 ** (-2 * j / width)
        cos, sin = angle.cos()[:, None].to(x.dtype), angle.sin()[:, None].to(x.dtype)
        even, odd = x[..., 2 * j], x[..., 2 * j + 1]
        out[..., 2 * j], out[..., 2 * j + 1] = cos * even - sin * odd, sin * even + cos * odd
    return out


@dataclass(frozen=True)
class Talk(Reference):
    """`window` rows around frame 0, `context_tokens` of each speaker in a latent frame; `given` by `run`."""

    window: int = 5
    context_tokens: int = 32
    given: tuple = ()

    def run(
        self,
        x: Tensor,
        sigma: Tensor,
        text: Tensor,
        image: Tensor,
        people: Tensor,
        masks: Tensor | None = None,
    ) -> Tensor:
        """[noisy | mask | y] [B, C', F, H, W], sigma [B, F], text [B, L, D_text], image [B, K, V]; rows of every speaker, people
        [B, P, 1 + stride (F - 1), L C]; the regions of two and the background, masks [B, 3, S] -> velocity [B, C, F, H, W]."""
        w, e = self.weights, "condition_embedder.image_embedder"
        pictured = affine_norm(w, f"{e}.norm1", image, 1e-5)
        pictured = linear(w, f"{e}.ff.net.2", gelu(linear(w, f"{e}.ff.net.0.proj", pictured)))
        pictured = affine_norm(w, f"{e}.norm2", pictured, 1e-5)
        frames = x.shape[2]
        voices = torch.stack([self.voice(people[:, p], frames) for p in range(people.shape[1])], dim=2)  # B F P T W
        silent = torch.stack(
            [(self.near(people, i) == 0).all(dim=-1).all(dim=-1).all(dim=-1) for i in range(frames)], dim=1
        )
        return replace(self, given=(pictured, voices, silent, masks, frames))(x, sigma, text)

    def near(self, people: Tensor, frame: int) -> Tensor:
        """The rows [.., n, LC] that latent frame `frame` is made of, beyond both ends those there."""
        last, half = people.shape[-2] - 1, self.window // 2
        first = self.stride * frame - self.stride + 1 if frame else 0
        rows = range(first - half, self.stride * frame + half + 1)
        return people[..., [min(max(row, 0), last) for row in rows], :]

    def voice(self, rows: Tensor, frames: int) -> Tensor:
        """Audio tokens [B, F, T, W] of one speaker's rows."""
        out = []
        for i in range(frames):
            name = "audio_proj.proj1" if i == 0 else "audio_proj.proj1_vf"
            hidden = linear(self.weights, name, self.near(rows, i).flatten(1)).clamp(min=0)
            hidden = linear(self.weights, "audio_proj.proj2", hidden).clamp(min=0)
            out.append(linear(self.weights, "audio_proj.proj3", hidden).unflatten(-1, (self.context_tokens, -1)))
        return affine_norm(self.weights, "audio_proj.norm", torch.stack(out, dim=1), 1e-5)

    def block(self, name: str, x: Tensor, text: Tensor, modulation: Tensor, angles: Tensor) -> Tensor:
        pictured, voices, silent, masks, frames = self.given
        w, eps, heads = self.weights, self.eps, (self.num_heads, -1)
        tokens = x.shape[1] // modulation.shape[1]
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (
            w[f"{name}.scale_shift_table"][0, i] + modulation[:, :, i] for i in range(6)
        )
        y = self.modulate(x, shift, scale)
        query = rms_norm(w, f"{name}.attn1.norm_q", linear(w, f"{name}.attn1.to_q", y), eps).unflatten(-1, heads)
        key = rms_norm(w, f"{name}.attn1.norm_k", linear(w, f"{name}.attn1.to_k", y), eps).unflatten(-1, heads)
        value = linear(w, f"{name}.attn1.to_v", y).unflatten(-1, heads)
        query, key = turn(query, angles), turn(key, angles)
        y = linear(w, f"{name}.attn1.to_out.0", attend(query, key, value))
        x = x + gate.repeat_interleave(tokens, dim=1) * y

        y = affine_norm(w, f"{name}.norm2", x, eps)
        q = rms_norm(w, f"{name}.attn2.norm_q", linear(w, f"{name}.attn2.to_q", y), eps).unflatten(-1, heads)
        both = 0
        for given, to_key, norm, to_value in (
            (text, "to_k", "norm_k", "to_v"),
            (pictured, "add_k_proj", "norm_added_k", "add_v_proj"),
        ):
            k = rms_norm(w, f"{name}.attn2.{norm}", linear(w, f"{name}.attn2.{to_key}", given), eps)
            v = linear(w, f"{name}.attn2.{to_value}", given)
            both = both + attend(q, k.unflatten(-1, heads), v.unflatten(-1, heads))
        x = x + linear(w, f"{name}.attn2.to_out.0", both)

        size = x.shape[1] // frames
        y = affine_norm(w, f"{name}.norm_x", x, eps)
        q = linear(w, f"{name}.audio_cross_attn.q_linear", y).unflatten(-1, heads)
        from_audio = torch.empty_like(x)
        for b in range(x.shape[0]):
            at = None if voices.shape[2] == 1 else self.places(query[b], key[b, :size], masks[b])
            for i in range(frames):
                own, part = slice(i * size, (i + 1) * size), voices[b, i]
                alone = voices.shape[2] == 1 or bool(silent[b, i])  # published: one track of zeros, nothing is rotated
                both = linear(w, f"{name}.audio_cross_attn.kv_linear", part[0] if alone else part.flatten(0, 1))
                k, v = both[:, : x.shape[-1]].unflatten(-1, heads), both[:, x.shape[-1] :].unflatten(-1, heads)
                mine = q[b, own]
                if not alone:
                    person = torch.arange(len(both)) // self.context_tokens
                    k, mine = turn_to(k, 2.0 + 20.0 * person), turn_to(mine, at[own])
                from_audio[b, own] = attend(mine[None], k[None], v[None])[0]
        x = x + linear(w, f"{name}.audio_cross_attn.proj", from_audio)

        y = linear(w, f"{name}.ffn.net.0.proj", self.modulate(x, ffn_shift, ffn_scale))
        y = linear(w, f"{name}.ffn.net.2", gelu_tanh(y))
        return x + ffn_gate.repeat_interleave(tokens, dim=1) * y

    def places(self, query: Tensor, key: Tensor, masks: Tensor) -> Tensor:
        """Position [N] of each token, query [N, M, d] against the keys [S, M, d] of frame 0: where it looks most."""
        maps = torch.zeros(3, len(query), dtype=query.dtype)
        for head in range(self.num_heads):
            share = torch.softmax(query[:, head] @ key[:, head].T / math.sqrt(query.shape[-1]), dim=-1)
            for region in range(3):
                mask = masks[region]
                maps[region] += (share * mask).sum(-1) / max(float(mask.sum()), 1.0) / self.num_heads
        at = torch.empty(len(query), dtype=query.dtype)
        for n in range(len(query)):
            best = int(maps[:, n].argmax())
            if best == 2:
                at[n] = 12.0
                continue
            own = maps[best]
            at[n] = 20.0 * best + 4.0 * (own[n] - own.min()) / (own.max() - own.min() + 1e-8)
        return at
