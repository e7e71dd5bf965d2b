"""EchoMimicV3 preview's forward once more, in plain PyTorch, from a state dict under the published names.

Wan2.1's transformer (2503.20314) with image-to-video input, CLIP tokens and the sound inside cross-attention (2507.03905). It
shares no code with the network that it judges. `fault`: one of FAULTS is put in, which a comparison has to see.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
    "window one state early",
    "window one state short",
    "padding left out of the softmax",
    "padding of zero states before the projection",
    "no face",
    "face over text and image too",
    "sound behind the output projection",
    "sound's keys not normalised",
    "text's key norm for the sound",
    "sound of all frames together",
    "mask inverted",
    "latents before the mask",
    "no image attention",
    "tanh in the image embedding",
    "no second norm of the image embedding",
    "a text query of its own norm for the image",
)


@dataclass(frozen=True)
class EchoMimic:
    """The network of `weights`; `ends`: whether the clip ends with its last frame, as every published window does."""

    weights: dict[str, Tensor]
    num_heads: int
    ends: bool = True
    fault: str = ""
    eps: float = 1e-6

    def __call__(
        self,
        x: Tensor,
        known: Tensor,
        latents: Tensor,
        sigma: Tensor,
        text: Tensor,
        image: Tensor,
        states: Tensor,
        face: Tensor,
    ) -> Tensor:
        """x and latents of the image [B, C, F, H, W], known [B, 4, F, H, W], sigma [B], text [B, L, T], image [B, K, V], states of
        the sound [B, 8 F - 6, E] (8 F + more where the clip does not end), face [B, S] -> velocity [B, C, F, H, W]."""
        w, fault = self.weights, self.fault
        if fault == "mask inverted":
            known = 1 - known
        parts = (latents, known) if fault == "latents before the mask" else (known, latents)
        given = torch.cat([x, *parts], dim=1)
        batch, channels, frames, height, width = given.shape
        rows, columns = height // 2, width // 2
        given = given.reshape(batch, channels, frames, rows, 2, columns, 2).permute(0, 2, 3, 5, 1, 4, 6)
        h = given.reshape(batch, frames * rows * columns, -1)
        h = h @ w["patch_embedding.weight"].flatten(1).T + w["patch_embedding.bias"]
        angles = rope_angles(h.shape[-1] // self.num_heads, range(frames), rows, columns)
        time = linear(w, "time_embedding.0", sinusoids(1000 * sigma, w["time_embedding.0.weight"].shape[1]))
        time = linear(w, "time_embedding.2", silu(time))
        modulation = linear(w, "time_projection.1", silu(time)).unflatten(-1, (6, -1))
        text = linear(w, "text_embedding.2", gelu_tanh(linear(w, "text_embedding.0", text)))
        image, sound = self._image(image), self._of_latents(self._sound(states, frames), h, modulation, time)
        for i in range(1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))):
            h = self._block(i, h, modulation, angles, text, image, sound, face)
        shift, scale = (w["head.modulation"] + time.unsqueeze(1)).unbind(1)
        out = linear(w, "head.head", layer_norm(h, self.eps) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1))
        out = out.reshape(batch, frames, rows, columns, 2, 2, -1).permute(0, 6, 1, 2, 4, 3, 5)
        return out.reshape(batch, -1, frames, height, width)

    def _norm(self, x: Tensor, name: str, eps: float = 1e-5) -> Tensor:
        return layer_norm(x, eps) * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def _image(self, image: Tensor) -> Tensor:
        w = self.weights
        x = linear(w, "img_emb.proj.1", self._norm(image, "img_emb.proj.0"))
        exact = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        x = linear(w, "img_emb.proj.3", gelu_tanh(x) if self.fault == "tanh in the image embedding" else exact)
        return x if self.fault == "no second norm of the image embedding" else self._norm(x, "img_emb.proj.4")

    def _sound(self, states: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """Tokens [B, F, 17, D] of each latent frame and which of them are real [F, 17]."""
        early = self.fault == "window one state early"
        zero_states = self.fault == "padding of zero states before the projection"
        count = 8 * frames - 6 if self.ends else states.shape[1]
        tokens, real = [], []
        for i in range(frames):
            first = 8 * i - 11 - early
            at = list(range(first, first + 17))
            if self.fault == "window one state short":
                at = at[:-1]
            window = []
            for t in at:
                inside = 0 <= t < count
                state = states[:, t] if inside else torch.zeros_like(states[:, 0])
                token = self._norm(state @ self.weights["audio2token.proj.weight"].T, "audio2token.norm")
                window.append(token if inside or zero_states else torch.zeros_like(token))
            tokens.append(torch.stack(window, dim=1))
            real.append(torch.tensor([0 <= t < count for t in at]))
        return torch.stack(tokens, dim=1), torch.stack(real)

    def _of_latents(self, sound: Any, h: Tensor, modulation: Tensor, time: Tensor) -> Any:
        """The sound's tokens where they depend on patch tokens and time, for StableAvatar."""
        return sound

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def _block(self, i, h, modulation, angles, text, image, sound, face) -> Tensor:
        w, name = self.weights, f"blocks.{i}"
        shift, scale, gate, shift2, scale2, gate2 = (w[f"{name}.modulation"] + modulation).unsqueeze(2).unbind(1)
        x = layer_norm(h, self.eps) * (1 + scale) + shift
        query, key = (
            rms_norm(w, f"{name}.self_attn.norm_{p}", linear(w, f"{name}.self_attn.{p}", x), self.eps) for p in "qk"
        )
        value = self._heads(linear(w, f"{name}.self_attn.v", x))
        attended = attend(turn(self._heads(query), angles), turn(self._heads(key), angles), value)
        h = h + gate * linear(w, f"{name}.self_attn.o", attended)
        h = h + self._cross(f"{name}.cross_attn", self._norm(h, f"{name}.norm3", self.eps), text, image, sound, face)
        x = layer_norm(h, self.eps) * (1 + scale2) + shift2
        return h + gate2 * linear(w, f"{name}.ffn.2", gelu_tanh(linear(w, f"{name}.ffn.0", x)))

    def _cross(self, name, x, text, image, sound, face) -> Tensor:
        w, fault = self.weights, self.fault
        plain = linear(w, f"{name}.q", x)
        query = self._heads(rms_norm(w, f"{name}.norm_q", plain, self.eps))
        keys = rms_norm(w, f"{name}.norm_k", linear(w, f"{name}.k", text), self.eps)
        found = attend(query, self._heads(keys), self._heads(linear(w, f"{name}.v", text)))
        if fault != "no image attention":
            keys = rms_norm(w, f"{name}.norm_k_img", linear(w, f"{name}.k_img", image), self.eps)
            own = self._heads(plain) if fault == "a text query of its own norm for the image" else query
            found = found + attend(own, self._heads(keys), self._heads(linear(w, f"{name}.v_img", image)))
        from_audio = self._attend_audio(name, query, *sound)
        if fault == "face over text and image too":
            from_audio, found = from_audio + found, 0.0
        from_audio = from_audio if fault == "no face" else from_audio * face.repeat(1, sound[0].shape[1]).unsqueeze(-1)
        if fault == "sound behind the output projection":
            return linear(w, f"{name}.o", found) + from_audio
        return linear(w, f"{name}.o", found + from_audio)

    def _attend_audio(self, name: str, query: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
        w, fault, frames = self.weights, self.fault, tokens.shape[1]
        keys = tokens @ w[f"{name}.k_audio.weight"].T
        norm = f"{name}.norm_k" if fault == "text's key norm for the sound" else f"{name}.norm_k_audio"
        keys = keys if fault == "sound's keys not normalised" else rms_norm(w, norm, keys, self.eps)
        values = tokens @ w[f"{name}.v_audio.weight"].T
        if fault == "sound of all frames together":
            return attend(query, self._heads(keys.flatten(1, 2)), self._heads(values.flatten(1, 2)))
        out = []
        for i, part in enumerate(query.chunk(frames, dim=1)):
            kept = real[i] if fault == "padding left out of the softmax" else slice(None)
            out.append(attend(part, self._heads(keys[:, i, kept]), self._heads(values[:, i, kept])))
        return torch.cat(out, dim=1)
