"""Wan2.2-S2V's network once more, in plain PyTorch from the published shapes and the order of its steps: one sequence of noisy,
reference and motion tokens, audio injected behind some blocks. It shares no code with the network that it judges.

It takes a state dict under our names, and audio rows of pixel frames. Sizes as in `reference_wan`; A anchor tokens. `groups` says
which frames see which: (own frames, frames seen beside them, how far the anchors are moved on), as LiveAvatar's causal copy has it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.teachers.reference.wan import (
    Reference,
    attend,
    gelu_tanh,
    layer_norm,
    linear,
    rms_norm,
    rope_angles,
    silu,
    sinusoids,
    turn,
)

Group = tuple[Sequence[int], Sequence[int], int]
COPIES, CUT = 73, 19  # rows in front of a clip, and latent frames that are made of them


def coarse(side: int, parts: int) -> list[int]:
    """The integer part of that many equal steps from 0 to side - 1."""
    return [int((side - 1) * i / (parts - 1)) if parts > 1 else 0 for i in range(parts)]


@dataclass(frozen=True)
class S2VReference(Reference):
    """`audio_at`: the blocks that audio is injected behind. `joint`: the anchors see the frames, as in the teacher."""

    joint: bool = True
    audio_heads: int = 4
    given: dict = field(default_factory=dict)

    def run(
        self,
        x: Tensor,
        sigma: Tensor,
        text: Tensor,
        rows: Tensor,
        anchors: Tensor,
        pose: Tensor | None = None,
        groups: Sequence[Group] | None = None,
        clips: Sequence[Sequence[int]] | None = None,
        places: Sequence[int] | None = None,
    ) -> Tensor:
        """x [B, C, F, H, W], sigma [B, F], text [B, L, D_text], rows [B, 4 F, states, E], anchors [B, C, 1 + m, H, W], pose
        [B, C, F, H, W] -> velocity. `clips`: frames whose audio is encoded by itself; `places`: positions of the frames."""
        w = self.weights
        batch, _, frames, height, width = x.shape
        h, v = height // 2, width // 2
        tokens = self.conv("patch_embedding", x)
        tokens = tokens + self.conv("pose_embedding", torch.zeros_like(x) if pose is None else pose)
        kinds = w["token_kind.weight"]
        reference = self.conv("patch_embedding", anchors[:, :, :1])
        parts, times = [tokens + kinds[0], reference + kinds[1]], [(30, h, v)]
        if anchors.shape[2] > 1:
            motion = torch.zeros(batch, anchors.shape[1], 19, height, width, dtype=x.dtype)
            seen = anchors[:, :, 1:][:, :, -19:]
            motion[:, :, 19 - seen.shape[2] :] = seen
            for name, part, place, n in (
                ("near", motion[:, :, 18:], (-1,), 1),
                ("middle", motion[:, :, 16:18], (-3,), 2),
                ("far", motion[:, :, :16], (-19, -14, -9, -4), 4),
            ):
                parts.append(self.conv(f"motion_embedding.{name}", part) + kinds[2])
                times += [(p, h // n, v // n) for p in place]
        x = torch.cat(parts, dim=1)
        angles = []
        for place, rows_, columns in times:
            table = rope_angles(x.shape[-1] // self.num_heads, [place], h, v).unflatten(0, (h, v))
            angles.append(table[coarse(h, rows_)][:, coarse(v, columns)].flatten(0, 1))
        places = list(range(frames)) if places is None else places
        own = rope_angles(x.shape[-1] // self.num_heads, places, h, v)
        every = range(frames)
        given = {
            "size": h * v, "frames": frames, "own": own, "anchors": torch.cat(angles),
            "groups": [(every, (), 0)] if groups is None else groups, "audio": self.audio(rows, clips or [every]),
        }  # fmt: skip
        net = type(self)(**{**vars(self), "given": given})

        embedder = "condition_embedder"
        freq_dim = w[f"{embedder}.time_embedder.linear_1.weight"].shape[1]
        time = linear(
            w, f"{embedder}.time_embedder.linear_1", sinusoids(1000 * torch.cat([sigma, 0 * sigma[:, :1]], 1), freq_dim)
        )
        time = linear(w, f"{embedder}.time_embedder.linear_2", silu(time))
        modulation = linear(w, f"{embedder}.time_proj", silu(time)).unflatten(-1, (6, -1))  # the last is the anchors'
        text = linear(w, f"{embedder}.text_embedder.linear_1", text)
        text = linear(w, f"{embedder}.text_embedder.linear_2", gelu_tanh(text))
        for i in range(1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))):
            x = net.block(f"blocks.{i}", x, text, modulation, own)
            if i in self.audio_at:
                x = net.inject(self.audio_at.index(i), x)
        x, time = x[:, : frames * h * v], time[:, :frames]
        shift, scale = (w["scale_shift_table"][0, i] + time for i in (0, 1))
        scale, shift = (part.repeat_interleave(h * v, dim=1) for part in (scale, shift))
        x = linear(w, "proj_out", layer_norm(x, self.eps) * (1 + scale) + shift)
        x = x.reshape(batch, frames, h, v, 2, 2, -1)
        return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, -1, frames, height, width)

    def conv(self, name: str, x: Tensor) -> Tensor:
        """Patches [B, n, D] of x [B, C, F, H, W], in the order of frame, row, column."""
        kernel = self.weights[f"{name}.weight"]
        _, _, t, p, q = kernel.shape
        batch, channels, frames, height, width = x.shape
        x = x.reshape(batch, channels, frames // t, t, height // p, p, width // q, q).permute(0, 2, 4, 6, 1, 3, 5, 7)
        return x.reshape(batch, -1, channels * t * p * q) @ kernel.flatten(1).T + self.weights[f"{name}.bias"]

    # ---- audio

    def audio(self, rows: Tensor, clips: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Tokens [B, F, heads + 1, D] and the global one [B, F, D], as published: 73 copies of a clip's first row in front, every
        convolution padded by two copies on the left, and the first 19 outputs cut off."""
        found = []
        for clip in clips:
            part = rows[:, 4 * clip[0] : 4 * clip[-1] + 4]
            part = torch.cat([part[:, :1].expand(-1, COPIES, -1, -1), part], dim=1)
            weights = silu(self.weights["audio_encoder.weights"][0, :, 0, 0])
            x = sum(part[:, :, i] * weights[i] for i in range(len(weights))) / weights.sum()
            every = self.causal("conv1_local", x, 1)  # [B, T, heads D/4], head by head
            heads = [self.packed(part) for part in every.chunk(self.audio_heads, dim=-1)]
            learned = self.weights["audio_encoder.padding_tokens"][0, 0].expand(*heads[0].shape[:2], -1)
            summary = linear(self.weights, "audio_encoder.final_linear", self.packed(self.causal("conv1_global", x, 1)))
            found.append((torch.stack([*heads, learned], dim=2)[:, CUT:], summary[:, CUT:]))
        return tuple(torch.cat(part, dim=1) for part in zip(*found, strict=True))  # pyright: ignore

    def packed(self, x: Tensor) -> Tensor:
        for name in ("conv2", "conv3"):
            x = self.causal(name, silu(layer_norm(x, 1e-6)), 2)
        return silu(layer_norm(x, 1e-6))

    def causal(self, name: str, x: Tensor, stride: int) -> Tensor:
        """A convolution of three rows [B, T, C], each with the two before it."""
        x = torch.cat([x[:, :1], x[:, :1], x], dim=1)
        weight, bias = self.weights[f"audio_encoder.{name}.weight"], self.weights[f"audio_encoder.{name}.bias"]
        last = range(2, x.shape[1], stride)
        return torch.stack([sum(x[:, t - 2 + k] @ weight[:, :, k].T for k in range(3)) + bias for t in last], dim=1)  # pyright: ignore

    def inject(self, number: int, x: Tensor) -> Tensor:
        w, name, size, heads = self.weights, f"audio_injector.{number}", self.given["size"], (self.num_heads, -1)
        tokens, summary = self.given["audio"]
        out = x.clone()
        for i in range(self.given["frames"]):
            own = slice(i * size, (i + 1) * size)
            shift, scale = linear(w, f"{name}.adain", silu(summary[:, i])).chunk(2, dim=-1)
            y = layer_norm(x[:, own], 1e-5) * (1 + scale[:, None]) + shift[:, None]
            query = rms_norm(w, f"{name}.norm_q", linear(w, f"{name}.to_q", y), self.eps).unflatten(-1, heads)
            key = rms_norm(w, f"{name}.norm_k", linear(w, f"{name}.to_k", tokens[:, i]), self.eps).unflatten(-1, heads)
            value = linear(w, f"{name}.to_v", tokens[:, i]).unflatten(-1, heads)
            out[:, own] = x[:, own] + linear(w, f"{name}.to_out.0", attend(query, key, value))
        return out

    # ---- blocks

    def modulate(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return layer_norm(x, self.eps) * (1 + self.spread(scale, x)) + self.spread(shift, x)

    def spread(self, rows: Tensor, x: Tensor) -> Tensor:
        """[B, F + 1, D] of the frames and of the anchors -> of every token."""
        size, frames = self.given["size"], self.given["frames"]
        rest = rows[:, -1:].expand(-1, x.shape[1] - size * frames, -1)
        return torch.cat([rows[:, :frames].repeat_interleave(size, dim=1), rest], dim=1)

    def block(self, name: str, x: Tensor, text: Tensor, modulation: Tensor, angles: Tensor) -> Tensor:
        w, eps, heads = self.weights, self.eps, (self.num_heads, -1)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (
            w[f"{name}.scale_shift_table"][0, i] + modulation[:, :, i] for i in range(6)
        )
        y = self.modulate(x, shift, scale)
        query = rms_norm(w, f"{name}.attn1.norm_q", linear(w, f"{name}.attn1.to_q", y), eps).unflatten(-1, heads)
        key = rms_norm(w, f"{name}.attn1.norm_k", linear(w, f"{name}.attn1.to_k", y), eps).unflatten(-1, heads)
        value = linear(w, f"{name}.attn1.to_v", y).unflatten(-1, heads)
        y = linear(w, f"{name}.attn1.to_out.0", self.see(query, key, value, angles))  # pyright: ignore
        x = x + self.spread(gate, x) * y
        y = layer_norm(x, eps) * w[f"{name}.norm2.weight"] + w[f"{name}.norm2.bias"]
        query = rms_norm(w, f"{name}.attn2.norm_q", linear(w, f"{name}.attn2.to_q", y), eps).unflatten(-1, heads)
        key = rms_norm(w, f"{name}.attn2.norm_k", linear(w, f"{name}.attn2.to_k", text), eps).unflatten(-1, heads)
        value = linear(w, f"{name}.attn2.to_v", text).unflatten(-1, heads)
        x = x + linear(w, f"{name}.attn2.to_out.0", attend(query, key, value))
        y = linear(w, f"{name}.ffn.net.0.proj", self.modulate(x, ffn_shift, ffn_scale))
        return x + self.spread(ffn_gate, x) * linear(w, f"{name}.ffn.net.2", gelu_tanh(y))

    def see(self, query: Tensor, key: Tensor, value: Tensor, angles: Tensor) -> Tensor:  # pyright: ignore
        """Self-attention by groups; the anchors' positions are moved on for each, which turns the pairs of time alone."""
        size, noisy = self.given["size"], self.given["size"] * self.given["frames"]
        still, out = self.given["anchors"], []
        time = rope_angles(query.shape[-1], [1], 1, 1)[0]
        for frames, seen, moved in self.given["groups"]:
            own = [f * size + s for f in frames for s in range(size)]
            context = [f * size + s for f in (*seen, *frames) for s in range(size)]
            k = torch.cat([turn(key[:, context], angles[context]), turn(key[:, noisy:], still + moved * time)], dim=1)
            v = torch.cat([value[:, context], value[:, noisy:]], dim=1)
            out.append(attend(turn(query[:, own], angles[own]), k, v))
        q, k, v = turn(query[:, noisy:], still), turn(key[:, noisy:], still), value[:, noisy:]
        if self.joint:
            k, v = torch.cat([turn(key[:, :noisy], angles), k], dim=1), torch.cat([value[:, :noisy], v], dim=1)
        return torch.cat([*out, attend(q, k, v)], dim=1)
