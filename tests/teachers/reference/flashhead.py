"""SoulX-FlashHead's forward once more, in plain PyTorch, from a state dict under the published names (2602.07449).

Wan2.1's self-attention and MLP are EchoMimicV3's reference's; the sound's windows, tokens and attention are written here from the
published rule, which counts rows of pixel frames. It shares no code with the network that it judges. `fault`: one of FAULTS is put
in, which a comparison has to see.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.teachers.reference.echomimic import EchoMimic
from tests.teachers.reference.wan import (
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

FAULTS = (
    "window a row early",
    "window a row late",
    "zeros beyond the ends of the sound",
    "rows in the other order",
    "frame 0 read as every other",
    "every frame read as frame 0",
    "no bend behind the first map",
    "no bend behind the second map",
    "no norm of the audio tokens",
    "audio of all frames together",
    "audio of the frame before",
    "keys not normalised",
    "queries not normalised",
    "no norm before cross-attention",
    "text beside audio",
    "audio behind a gate",
    "the image's latents in front",
    "the image's latents of frame 0 everywhere",
    "positions of cross-attention's queries",
)


@dataclass(frozen=True)
class FlashHead(EchoMimic):
    """The network of `weights`; `stride` pixel frames a latent frame, `window` rows around a pixel frame."""

    stride: int = 4
    window: int = 5

    def __call__(self, x: Tensor, latents: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        """x with the given frame in its place and latents of the still video [B, C, F, H, W], sigma [B], rows of pixel frames
        [B, 1 + stride (F - 1), E] -> velocity [B, C, F, H, W]."""
        w, fault, patch = self.weights, self.fault, self.weights["patch_embedding.weight"].shape[-1]
        if fault == "the image's latents of frame 0 everywhere":
            latents = latents[:, :, :1].expand_as(latents)
        given = torch.cat([latents, x] if fault == "the image's latents in front" else [x, latents], dim=1)
        batch, channels, frames, height, width = given.shape
        high, wide = height // patch, width // patch
        given = given.reshape(batch, channels, frames, high, patch, wide, patch).permute(0, 2, 3, 5, 1, 4, 6)
        h = given.reshape(batch, frames * high * wide, -1)
        h = h @ w["patch_embedding.weight"].flatten(1).T + w["patch_embedding.bias"]
        angles = rope_angles(h.shape[-1] // self.num_heads, range(frames), high, wide)
        time = linear(w, "time_embedding.0", sinusoids(1000 * sigma, w["time_embedding.0.weight"].shape[1]))
        time = linear(w, "time_embedding.2", silu(time))
        modulation = linear(w, "time_projection.1", silu(time)).unflatten(-1, (6, -1))
        tokens = self._tokens(rows, frames)
        for i in range(1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))):
            h = self._block(i, h, modulation, angles, None, None, (tokens, angles), modulation)
        shift, scale = (w["head.modulation"] + time.unsqueeze(1)).unbind(1)
        out = linear(w, "head.head", layer_norm(h, self.eps) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1))
        out = out.reshape(batch, frames, high, wide, patch, patch, -1).permute(0, 6, 1, 2, 4, 3, 5)
        return out.reshape(batch, -1, frames, height, width)

    def _near(self, rows: Tensor, frame: int) -> list[Tensor]:
        """The rows of one latent frame, those beyond the ends of the sound as there."""
        fault, half, last = self.fault, self.window // 2, rows.shape[1] - 1
        first = self.stride * (frame - 1) + 1 if frame or fault == "frame 0 read as every other" else 0
        end = self.stride * frame
        if fault == "every frame read as frame 0":
            first = end
        moved = {"window a row early": -1, "window a row late": 1}.get(fault, 0)
        places = list(range(first - half + moved, end + half + 1 + moved))
        places = places[::-1] if fault == "rows in the other order" else places
        found = [rows[:, min(max(at, 0), last)] for at in places]
        if fault == "zeros beyond the ends of the sound":
            found = [row if 0 <= at <= last else 0 * row for at, row in zip(places, found, strict=True)]
        return found

    def _tokens(self, rows: Tensor, frames: int) -> Tensor:
        """Audio tokens [B, F, K, D]."""
        w, fault, out = self.weights, self.fault, []
        width = w["audio_proj.norm.weight"].shape[0]
        for i in range(frames):
            near = torch.cat(self._near(rows, i), dim=-1)
            alone = fault == "every frame read as frame 0" or (i == 0 and fault != "frame 0 read as every other")
            hidden = linear(w, "audio_proj.proj1" if alone else "audio_proj.proj1_vf", near)
            hidden = hidden if fault == "no bend behind the first map" else hidden.clamp(min=0)
            hidden = linear(w, "audio_proj.proj2", hidden)
            hidden = hidden if fault == "no bend behind the second map" else hidden.clamp(min=0)
            out.append(linear(w, "audio_proj.proj3", hidden).unflatten(-1, (-1, width)))
        tokens = torch.stack(out, dim=1)
        tokens = tokens if fault == "no norm of the audio tokens" else self._norm(tokens, "audio_proj.norm")
        return tokens.roll(1, 1) if fault == "audio of the frame before" else tokens

    def _norm(self, x: Tensor, name: str, eps: float = 1e-5) -> Tensor:
        if self.fault == "no norm before cross-attention" and name.endswith("norm3"):
            return x
        return super()._norm(x, name, eps)

    def _cross(self, name, x, text, image, sound, face) -> Tensor:
        w, fault, (tokens, angles), modulation = self.weights, self.fault, sound, face
        query, keys = linear(w, f"{name}.q", x), linear(w, f"{name}.k", tokens)
        query = query if fault == "queries not normalised" else rms_norm(w, f"{name}.norm_q", query, self.eps)
        keys = keys if fault == "keys not normalised" else rms_norm(w, f"{name}.norm_k", keys, self.eps)
        values, query = linear(w, f"{name}.v", tokens), self._heads(query)
        if fault == "positions of cross-attention's queries":
            query = turn(query, angles)
        if fault == "audio of all frames together":
            found = attend(query, self._heads(keys.flatten(1, 2)), self._heads(values.flatten(1, 2)))
        else:
            parts = enumerate(query.chunk(tokens.shape[1], dim=1))
            heads = [(part, self._heads(keys[:, i]), self._heads(values[:, i])) for i, part in parts]
            found = torch.cat([attend(*part) for part in heads], dim=1)
        if fault == "text beside audio":
            empty = torch.zeros(len(x), 1, w["text_embedding.0.weight"].shape[1], dtype=x.dtype)
            own = linear(w, "text_embedding.2", gelu_tanh(linear(w, "text_embedding.0", empty)))
            keys = rms_norm(w, f"{name}.norm_k", linear(w, f"{name}.k", own), self.eps)
            found = found + attend(query, self._heads(keys), self._heads(linear(w, f"{name}.v", own)))
        out = linear(w, f"{name}.o", found)
        return out * modulation[:, 2:3] if fault == "audio behind a gate" else out
