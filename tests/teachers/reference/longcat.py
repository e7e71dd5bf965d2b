"""LongCat-Video-Avatar's network once more, in plain PyTorch from the papers' equations and the published shapes (2510.22200,
2512.13531). It shares no code with the network that it judges.

It takes a state dict under the published names and the audio rows of pixel frames, without their neighbours. Sizes as in
`reference_wan`; E width of the time embedding, P speakers, T audio tokens of each.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.teachers.reference.talk import Talk, affine_norm, turn_to
from tests.teachers.reference.wan import Weights, gelu_tanh, layer_norm, linear, rope_angles, silu, sinusoids, turn


def by_head(weights: Weights, name: str, x: Tensor) -> Tensor:
    """Root mean square norm of every head [.., M, d]."""
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * weights[f"{name}.weight"]


def attend_where(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """softmax(q k / sqrt(d)) v of [n, M, d] over the keys that are seen [n, k], heads put together again [n, M d]."""
    out = torch.empty_like(query)
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head].T / math.sqrt(query.shape[-1])
        out[:, head] = torch.softmax(scores.masked_fill(~seen, -math.inf), dim=-1) @ value[:, head]
    return out.flatten(1)


@dataclass(frozen=True)
class LongCatReference:
    """The network of `weights`. `context_tokens`: audio tokens of a speaker in a latent frame."""

    weights: Weights
    num_heads: int
    context_tokens: int
    patch: int = 2
    stride: int = 4

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        text: Tensor,
        words: list[int],
        people: Tensor,
        clean: int = 0,
        ref: int | None = None,
        skip: int = 0,
        masks: Tensor | None = None,
    ) -> Tensor:
        """Latents x [B, C, F, H, W], the first `clean` of which are condition tokens, at sigma [B, F]; text [B, L, T], of which
        each row has `words` tokens and then padding; rows of every speaker, people [B, P, T, LC]; masks [B, 3, S] of two speakers
        and the background. With `ref` the first frame is the reference image of a continuation, at that position in time, without
        audio of its own, and frames within `skip` of it do not see it. -> x0 - noise [B, C, F, H, W]."""
        w, p = self.weights, self.patch
        batch, channels, frames, height, width = x.shape
        h, v = height // p, width // p
        x = x.reshape(batch, channels, frames, h, p, v, p).permute(0, 2, 3, 5, 1, 4, 6)
        x = x.reshape(batch, frames, h * v, -1) @ w["x_embedder.proj.weight"].flatten(1).T + w["x_embedder.proj.bias"]
        at = [*range(frames)] if ref is None else [ref, *range(frames - 1)]
        angles = rope_angles(x.shape[-1] // self.num_heads, at, h, v)
        time = sinusoids(
            1000 * torch.where(torch.arange(frames) < clean, 0.0, sigma), w["t_embedder.mlp.0.weight"].shape[1]
        )
        time = silu(
            linear(w, "t_embedder.mlp.2", silu(linear(w, "t_embedder.mlp.0", time)))
        )  # SiLU of every modulation's
        words_seen = torch.stack([torch.arange(text.shape[1]) < count for count in words]).unsqueeze(-1)
        text = linear(w, "y_embedder.y_proj.2", gelu_tanh(linear(w, "y_embedder.y_proj.0", text))) * words_seen
        talk = Talk(w, self.num_heads, (), context_tokens=self.context_tokens, stride=self.stride)
        own = frames - (ref is not None)
        voices = torch.stack([talk.voice(people[:, i], own) for i in range(people.shape[1])], dim=2)  # B F P T W
        if ref is not None:
            voices = torch.cat([voices[:, :1], voices], dim=1)
        seen = self.seen(frames, clean, ref, skip).repeat_interleave(h * v, 0).repeat_interleave(h * v, 1)
        num_layers = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
        for i in range(num_layers):
            rows = []
            for b in range(batch):
                given = (text[b], voices[b], None if masks is None else masks[b])
                rows.append(self.block(f"blocks.{i}", x[b], time[b], clean, angles, seen, *given))
            x = torch.stack(rows)
        shift, scale = linear(w, "final_layer.adaLN_modulation.1", time).unsqueeze(2).chunk(2, dim=-1)
        x = linear(w, "final_layer.linear", layer_norm(x, 1e-6) * (1 + scale) + shift)
        x = x.reshape(batch, frames, h, v, p, p, -1)  # row, column within the patch, channel
        return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, -1, frames, height, width)

    def seen(self, frames: int, clean: int, ref: int | None, skip: int) -> Tensor:
        """Which frames see which [F, F]: noisy ones all; clean ones each other; the reference of a continuation itself."""
        out = torch.ones(frames, frames, dtype=torch.bool)
        out[:clean, clean:] = False
        if ref is not None:
            out[0, 1:], out[1:clean, 0] = False, False
            near = [i for i in range(frames) if abs(i - 1 - ref) <= skip]
            if skip and len(near) == 2 * skip + 1 and near[0] >= clean:
                out[near, 0] = False
        return out

    def block(
        self,
        name: str,
        x: Tensor,
        time: Tensor,
        clean: int,
        angles: Tensor,
        seen: Tensor,
        text: Tensor,
        voices: Tensor,
        masks: Tensor | None,
    ) -> Tensor:
        """x [F, S, D], time [F, E], text [L, D], voices [F, P, T, W]."""
        w, heads, width = self.weights, (self.num_heads, -1), x.shape[-1]
        frames, size = x.shape[:2]
        parts = linear(w, f"{name}.adaLN_modulation.1", time).unsqueeze(1).chunk(6, dim=-1)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = parts

        y = linear(w, f"{name}.attn.qkv", layer_norm(x, 1e-6) * (1 + scale) + shift).flatten(0, 1)
        query, key, value = (y[:, i * width : (i + 1) * width].unflatten(-1, heads) for i in range(3))
        query, key = by_head(w, f"{name}.attn.q_norm", query), by_head(w, f"{name}.attn.k_norm", key)
        query, key = turn(query[None], angles)[0], turn(key[None], angles)[0]
        y = linear(w, f"{name}.attn.proj", attend_where(query, key, value, seen)).unflatten(0, (frames, size))
        x = x + gate * y

        y = affine_norm(w, f"{name}.pre_crs_attn_norm", x, 1e-6)[clean:].flatten(0, 1)
        y = self.cross(f"{name}.cross_attn", y, text)
        x = torch.cat([x[:clean], x[clean:] + y.unflatten(0, (-1, size))])

        y = affine_norm(w, f"{name}.pre_video_crs_attn_norm", x, 1e-6)
        where = None
        if masks is not None:
            talk = Talk(w, self.num_heads, ())
            where = talk.places(query[clean * size :], key[:size], masks).unflatten(0, (-1, size))
        attended = []
        for i in range(clean, frames):
            places = None if where is None else where[i - clean]
            attended.append(self.cross(f"{name}.audio_cross_attn", y[i], voices[i].flatten(0, 1), places))
        a_shift, a_scale, a_gate = linear(w, f"{name}.audio_adaLN_modulation.1", time).unsqueeze(1).chunk(3, dim=-1)
        y = layer_norm(torch.stack(attended), 1e-6) * (1 + a_scale[clean:]) + a_shift[clean:]
        x = torch.cat([x[:clean], x[clean:] + a_gate[clean:] * y])

        y = layer_norm(x, 1e-6) * (1 + ffn_scale) + ffn_shift
        y = silu(y @ w[f"{name}.ffn.w1.weight"].T) * (y @ w[f"{name}.ffn.w3.weight"].T)
        return x + ffn_gate * (y @ w[f"{name}.ffn.w2.weight"].T)

    def cross(self, name: str, x: Tensor, given: Tensor, places: Tensor | None = None) -> Tensor:
        """Attention of tokens [n, D] to [k, W]; with places [n] queries are rotated to them, the keys of either speaker to the
        middle of its own."""
        w, heads = self.weights, (self.num_heads, -1)
        query = by_head(w, f"{name}.q_norm", linear(w, f"{name}.q_linear", x).unflatten(-1, heads))
        both = linear(w, f"{name}.kv_linear", given)
        key, value = both[:, : x.shape[-1]].unflatten(-1, heads), both[:, x.shape[-1] :].unflatten(-1, heads)
        key = by_head(w, f"{name}.k_norm", key)
        if places is not None:
            query = turn_to(query, places)
            key = turn_to(key, 2.0 + 20.0 * (torch.arange(len(key)) // self.context_tokens))
        seen = torch.ones(len(query), len(key), dtype=torch.bool)
        return linear(w, f"{name}.proj", attend_where(query, key, value, seen))
