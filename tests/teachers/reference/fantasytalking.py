"""FantasyTalking's forward once more, in plain PyTorch, from a state dict under the published names (2504.04842).

What it shares with EchoMimicV3, Wan2.1's image-to-video blocks, is that reference's; the sound's windows, masks and attention are
written here from the published rule, which counts wav2vec2's states from their number and that of the pixel frames. It shares no
code with the network that it judges. `fault`: one of FAULTS is put in, which a comparison has to see.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.teachers.reference.echomimic import EchoMimic
from tests.teachers.reference.wan import attend, linear, rms_norm

FAULTS = (
    "window one state early",
    "window one state short",
    "padding takes part in the softmax",
    "padding in front",
    "first frame's window as the others'",
    "no norm of the audio tokens",
    "sound's keys normalised",
    "a query that is not normalised for the sound",
    "sound behind the output projection",
    "sound of all frames together",
    "sound at half its strength",
    "mask inverted",
    "latents before the mask",
    "no image attention",
    "tanh in the image embedding",
)
PROCESSOR = "audio_processor.{}.processor"


def ranges(states: int, pixel_frames: int, ratio: float | None = None) -> list[tuple[int, int]]:
    """First and last state of every latent frame's window, as published: `ratio` states a pixel frame (None: their quotient)."""
    ratio = states / pixel_frames if ratio is None else ratio
    half, centres = int(4 * ratio / 2), [0]
    for i in range(1, 1 + (pixel_frames - 1) // 4):
        centres.append(int((ratio * (4 * i - 3) + ratio * (4 * i + 1)) / 2) - 1)
    found = [(centre - half, centre + half) for centre in centres]
    found[0] = (found[1][0] - 2 * half, found[1][0])
    return [(first - 4, last + 4) for first, last in found]


@dataclass(frozen=True)
class FantasyTalking(EchoMimic):
    """The network of `weights`, at two states a pixel frame. A clip that `ends` has the states that there are."""

    silent: bool = False

    def _sound(self, states: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """Tokens [B, F, 17, W] of each latent frame and which of them are read [F, 17]."""
        fault, spans = self.fault, ranges(0, 4 * frames - 3, 2.0)
        if fault == "first frame's window as the others'":
            spans[0] = (-8, 8)
        tokens, real = [], []
        for first, last in spans:
            if fault == "window one state early":
                first, last = first - 1, last - 1
            if fault == "window one state short":
                last -= 1
            kept = [t for t in range(first, last + 1) if 0 <= t < states.shape[1]]
            own = states[:, kept] @ self.weights["proj_model.proj.weight"].T
            own = own if fault == "no norm of the audio tokens" else self._norm(own, "proj_model.norm")
            padding = torch.zeros_like(own[:, :1]).expand(-1, last + 1 - first - len(kept), -1)
            parts = (padding, own) if fault == "padding in front" else (own, padding)
            tokens.append(torch.cat(parts, dim=1))
            real.append(torch.arange(last + 1 - first) < len(kept))
        return torch.stack(tokens, dim=1), torch.stack(real)

    def _cross(self, name, x, text, image, sound, face) -> Tensor:
        w, fault = self.weights, self.fault
        plain = linear(w, f"{name}.q", x)
        query = self._heads(rms_norm(w, f"{name}.norm_q", plain, self.eps))
        keys = rms_norm(w, f"{name}.norm_k", linear(w, f"{name}.k", text), self.eps)
        found = attend(query, self._heads(keys), self._heads(linear(w, f"{name}.v", text)))
        if fault != "no image attention":
            keys = rms_norm(w, f"{name}.norm_k_img", linear(w, f"{name}.k_img", image), self.eps)
            found = found + attend(query, self._heads(keys), self._heads(linear(w, f"{name}.v_img", image)))
        if self.silent:
            return linear(w, f"{name}.o", found)
        own = self._heads(plain) if fault == "a query that is not normalised for the sound" else query
        attended = self._attend_audio(name, own, *sound)
        attended = attended / 2 if fault == "sound at half its strength" else attended
        if fault == "sound behind the output projection":
            return linear(w, f"{name}.o", found) + attended
        return linear(w, f"{name}.o", found + attended)

    def _attend_audio(self, name: str, query: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
        w, fault, own = self.weights, self.fault, PROCESSOR.format(name)
        keys, values = (tokens @ w[f"{own}.{part}_proj.weight"].T for part in "kv")
        if fault == "sound's keys normalised":
            keys = rms_norm(w, f"{name}.norm_k", keys, self.eps)
        if fault == "sound of all frames together":
            keys, values = keys.flatten(1, 2)[:, real.flatten()], values.flatten(1, 2)[:, real.flatten()]
            return attend(query, self._heads(keys), self._heads(values))
        out = []
        for i, part in enumerate(query.chunk(tokens.shape[1], dim=1)):
            kept = slice(None) if fault == "padding takes part in the softmax" else real[i]
            out.append(attend(part, self._heads(keys[:, i, kept]), self._heads(values[:, i, kept])))
        return torch.cat(out, dim=1)
