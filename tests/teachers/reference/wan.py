"""OmniAvatar's network once more, in plain PyTorch from the equations: Wan 2.1 (2503.20314) with the audio pack (2506.18866).

It takes a state dict under our names and shares no code with the networks that it checks. Everything is computed in the type
of its inputs. Sizes: B batch, F latent frames, S = h w tokens of a frame, N = F S, D width, M heads, d = D / M.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """W x + b over the last axis."""
    return torch.einsum("...i,oi->...o", x, weights[f"{name}.weight"]) + weights[f"{name}.bias"]


def layer_norm(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)


def rms_norm(weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    """Over the full width, before it is cut into heads."""
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weights[f"{name}.weight"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sinusoids(time: Tensor, dim: int) -> Tensor:
    """[cos | sin] of time * 10000^(-i / (dim / 2)), computed in fp64."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float64) / half)
    angles = time.double().unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(time.dtype)


def rope_angles(head_dim: int, frames: Sequence[int], height: int, width: int) -> Tensor:
    """Angle of each pair of a head's channels at each token [N, d/2], fp64: position * 10000^(-2 i / n) with the n channels of
    its axis: 2 floor(d / 6) for rows and for columns, the rest for time (44, 42, 42 of 128), time first."""
    side = 2 * (head_dim // 6)
    axes = (head_dim - 2 * side, side, side)
    table = []
    for frame in frames:
        for row in range(height):
            for column in range(width):
                angles = []
                for position, size in zip((frame, row, column), axes, strict=True):
                    angles += [position * 10000.0 ** (-2 * i / size) for i in range(size // 2)]
                table.append(angles)
    return torch.tensor(table, dtype=torch.float64)


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the pairs (x0, x1), (x2, x3) ... of [B, N, M, d] by their angles."""
    cos, sin = angles.cos().to(x.dtype).unsqueeze(1), angles.sin().to(x.dtype).unsqueeze(1)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.empty_like(x)
    turned[..., 0::2] = cos * even - sin * odd
    turned[..., 1::2] = sin * even + cos * odd
    return turned


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k / sqrt(d)) v of [B, n, M, d], the heads put together again."""
    scores = torch.einsum("bnmd,bkmd->bmnk", query, key) / math.sqrt(query.shape[-1])
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    out = torch.einsum("bmnk,bkmd->bnmd", weights / weights.sum(-1, keepdim=True), value)
    return out.flatten(2)


@dataclass(frozen=True)
class Reference:
    """The network of `weights`. `audio_at`: the blocks that audio is added before, the published ones of 30 layers 2 .. 15."""

    weights: Weights
    num_heads: int
    audio_at: tuple[int, ...]
    patch: int = 2
    stride: int = 4
    eps: float = 1e-6
    positions: Sequence[int] | None = None  # of the frames; None: 0, 1, 2 ...

    def __call__(self, x: Tensor, sigma: Tensor, text: Tensor, rows: Tensor | None = None) -> Tensor:
        """Input [B, C_in, F, H, W], sigma [B, F], text [B, L, D_text], audio rows of pixel frames [B, 1 + stride (F - 1), A] ->
        raw output [B, C, F, H, W]."""
        w, p = self.weights, self.patch
        batch, channels, frames, height, width = x.shape
        h, v = height // p, width // p
        # patches: channel, row, column within the patch, as the kernel of a convolution has them
        x = x.reshape(batch, channels, frames, h, p, v, p).permute(0, 2, 3, 5, 1, 4, 6)
        x = x.reshape(batch, frames * h * v, -1)
        x = x @ w["patch_embedding.weight"].flatten(1).T + w["patch_embedding.bias"]
        angles = rope_angles(x.shape[-1] // self.num_heads, self.positions or range(frames), h, v)

        embedder = "condition_embedder"
        freq_dim = w[f"{embedder}.time_embedder.linear_1.weight"].shape[1]
        time = linear(w, f"{embedder}.time_embedder.linear_1", sinusoids(1000 * sigma, freq_dim))
        time = linear(w, f"{embedder}.time_embedder.linear_2", silu(time))  # [B, F, D]
        modulation = linear(w, f"{embedder}.time_proj", silu(time)).unflatten(-1, (6, -1))
        text = linear(w, f"{embedder}.text_embedder.linear_1", text)
        text = linear(w, f"{embedder}.text_embedder.linear_2", gelu_tanh(text))
        context = None if rows is None else self.audio_context(rows, frames)

        num_layers = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
        for i in range(num_layers):
            if context is not None and i in self.audio_at:
                added = linear(w, f"audio_cond_projs.{self.audio_at.index(i)}", context)  # [B, F, D]
                x = x + added.repeat_interleave(h * v, dim=1)
            x = self.block(f"blocks.{i}", x, text, modulation, angles)

        shift, scale = (w["scale_shift_table"][0, i] + time for i in (0, 1))
        x = linear(w, "proj_out", self.modulate(x, shift, scale))
        x = x.reshape(batch, frames, h, v, p, p, -1)  # row, column within the patch, channel
        return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, -1, frames, height, width)

    def audio_context(self, rows: Tensor, frames: int) -> Tensor:
        """Audio pack [B, F, hidden]: latent frame i covers the pixel frames stride i - (stride - 1) .. stride i, one behind the
        other in one vector; those before the first are the first."""
        context = []
        for i in range(frames):
            covered = [max(self.stride * i - back, 0) for back in range(self.stride - 1, -1, -1)]
            context.append(torch.cat([rows[:, row] for row in covered], dim=-1))
        return self.pack(torch.stack(context, dim=1))

    def pack(self, context: Tensor) -> Tensor:
        """[B, F, stride A] -> [B, F, hidden], layer-normalised."""
        packed = layer_norm(linear(self.weights, "audio_proj.proj", context), 1e-5)
        return packed * self.weights["audio_proj.norm_out.weight"] + self.weights["audio_proj.norm_out.bias"]

    def modulate(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """norm(x) (1 + scale) + shift, with the shift and scale [B, F, D] of each token's frame."""
        tokens = x.shape[1] // shift.shape[1]
        scale, shift = scale.repeat_interleave(tokens, dim=1), shift.repeat_interleave(tokens, dim=1)
        return layer_norm(x, self.eps) * (1 + scale) + shift

    def block(self, name: str, x: Tensor, text: Tensor, modulation: Tensor, angles: Tensor) -> Tensor:
        w, eps, heads = self.weights, self.eps, (self.num_heads, -1)
        tokens = x.shape[1] // modulation.shape[1]
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (
            w[f"{name}.scale_shift_table"][0, i] + modulation[:, :, i] for i in range(6)
        )

        y = self.modulate(x, shift, scale)
        query = rms_norm(w, f"{name}.attn1.norm_q", linear(w, f"{name}.attn1.to_q", y), eps).unflatten(-1, heads)
        key = rms_norm(w, f"{name}.attn1.norm_k", linear(w, f"{name}.attn1.to_k", y), eps).unflatten(-1, heads)
        value = linear(w, f"{name}.attn1.to_v", y).unflatten(-1, heads)
        y = linear(w, f"{name}.attn1.to_out.0", attend(turn(query, angles), turn(key, angles), value))
        x = x + gate.repeat_interleave(tokens, dim=1) * y

        y = layer_norm(x, eps) * w[f"{name}.norm2.weight"] + w[f"{name}.norm2.bias"]
        query = rms_norm(w, f"{name}.attn2.norm_q", linear(w, f"{name}.attn2.to_q", y), eps).unflatten(-1, heads)
        key = rms_norm(w, f"{name}.attn2.norm_k", linear(w, f"{name}.attn2.to_k", text), eps).unflatten(-1, heads)
        value = linear(w, f"{name}.attn2.to_v", text).unflatten(-1, heads)
        x = x + linear(w, f"{name}.attn2.to_out.0", attend(query, key, value))

        y = linear(w, f"{name}.ffn.net.0.proj", self.modulate(x, ffn_shift, ffn_scale))
        y = linear(w, f"{name}.ffn.net.2", gelu_tanh(y))
        return x + ffn_gate.repeat_interleave(tokens, dim=1) * y

    def see(self, x: Tensor, image: Tensor) -> Tensor:
        """The input [noisy | reference repeated | mask, 0 = known] of noisy x [B, C, F, H, W] and the reference's latent
        [B, C, 1, H, W], frame 0 clean."""
        mask = torch.ones_like(x[:, :1])
        mask[:, :, 0] = 0
        clean = torch.cat([image, x[:, :, 1:]], dim=2)
        return torch.cat([clean, image.repeat(1, 1, x.shape[2], 1, 1), mask], dim=1)

    def sample(self, x: Tensor, sigmas: list[float], text: Tensor, rows: Tensor, image: Tensor) -> Tensor:
        """OmniAvatar's Euler sampler from noise x, unguided: the reference is written over frame 0 before every step and after
        the last; dx/dsigma is the network's velocity."""
        for sigma, following in pairwise(sigmas):
            x = torch.cat([image, x[:, :, 1:]], dim=2)
            level = x.new_full((x.shape[0], x.shape[2]), sigma)
            x = x + (following - sigma) * self(self.see(x, image), level, text, rows)
        return torch.cat([image, x[:, :, 1:]], dim=2)
