"""StableAvatar's forward once more, in plain PyTorch, from a state dict under the published names (2508.08248).

Wan2.1's image-to-video blocks are EchoMimicV3's reference's, the windows FantasyTalking's; how audio tokens come of sound, patch
tokens and time is written here, frame by frame. It shares no code with the network that it judges. `fault`: one of FAULTS.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.teachers.reference.fantasytalking import FantasyTalking, ranges
from tests.teachers.reference.wan import attend, gelu_tanh, layer_norm, linear, rms_norm

FAULTS = (
    "window one state early",
    "window one state short",
    "padding left out of the softmax",
    "padding before the projection",
    "nothing in the place of self-attention",
    "one block of two",
    "blocks exchanged",
    "patch tokens of all frames together",
    "no norm before the patch tokens",
    "queries not normalised",
    "as many heads as the network",
    "exact GELU in the MLP",
    "no gate behind the MLP",
    "head without time",
    "values of the sound without bias",
    "sound's keys normalised",
    "sound behind the output projection",
    "latents before the mask",
)
OWN = "vocal_projector"


@dataclass(frozen=True)
class StableAvatar(FantasyTalking):
    """The network of `weights`; `mute`: tokens of zeros in the place of the sound's."""

    mute: bool = False

    def _sound(self, states: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        fault, tokens, real = self.fault, [], []
        for first, last in ranges(0, 4 * frames - 3, 2.0):
            shift = fault == "window one state early"
            at = range(first - shift, last - shift + (fault != "window one state short"))
            window = []
            for t in at:
                inside = 0 <= t < states.shape[1]
                state = states[:, t] if inside else torch.zeros_like(states[:, 0])
                token = self._norm(state @ self.weights[f"{OWN}.proj_model.proj.weight"].T, f"{OWN}.proj_model.norm")
                kept = inside or fault == "padding before the projection"
                window.append(token if kept else torch.zeros_like(token))
            tokens.append(torch.stack(window, dim=1))
            real.append(torch.tensor([0 <= t < states.shape[1] for t in at]))
        return torch.stack(tokens, dim=1), torch.stack(real)

    def _of_latents(self, sound, h: Tensor, modulation: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        w, fault, (tokens, real) = self.weights, self.fault, sound
        frames, made = tokens.shape[1], []
        order = {"one block of two": (0,), "blocks exchanged": (1, 0)}.get(fault, (0, 1))
        head = w[f"{OWN}.final_head.modulation"] + (0 if fault == "head without time" else time.unsqueeze(1))
        for i, patches in enumerate(h.chunk(frames, dim=1)):
            u = tokens[:, i]
            for block in order:
                u = self._token_block(block, u, modulation, h if "all frames together" in fault else patches)
            u = layer_norm(u, self.eps) * (1 + head[:, 1:]) + head[:, :1]
            made.append(linear(w, f"{OWN}.final_head.final_proj", u))
        made = torch.stack(made, dim=1)
        return torch.zeros_like(made) if self.mute else made, real

    def _token_block(self, block: int, u: Tensor, modulation: Tensor, patches: Tensor) -> Tensor:
        w, fault, name = self.weights, self.fault, f"{OWN}.blocks.{block}"
        rows = w[f"{name}.modulation"] + modulation
        shift, scale, gate, shift2, scale2, gate2 = rows.unsqueeze(2).unbind(1)
        if fault != "nothing in the place of self-attention":
            u = u + gate * (layer_norm(u, self.eps) * (1 + scale) + shift)
        own = f"{name}.cross_attn"
        normed = u if fault == "no norm before the patch tokens" else self._norm(u, f"{name}.norm3", self.eps)
        query, key = (
            linear(w, f"{own}.q", normed),
            rms_norm(w, f"{own}.norm_k", linear(w, f"{own}.k", patches), self.eps),
        )
        query = query if fault == "queries not normalised" else rms_norm(w, f"{own}.norm_q", query, self.eps)
        count = self.num_heads if fault == "as many heads as the network" else 8
        parts = (x.unflatten(-1, (count, -1)) for x in (query, key, linear(w, f"{own}.v", patches)))
        u = u + linear(w, f"{own}.o", attend(*parts))
        hidden = linear(w, f"{name}.ffn.0", layer_norm(u, self.eps) * (1 + scale2) + shift2)
        exact = fault == "exact GELU in the MLP"
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))) if exact else gelu_tanh(hidden)
        return u + (1 if fault == "no gate behind the MLP" else gate2) * linear(w, f"{name}.ffn.2", hidden)

    def _attend_audio(self, name: str, query: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
        w, fault = self.weights, self.fault
        keys, values = (linear(w, f"{name}.{part}_vocal", tokens) for part in "kv")
        if fault == "values of the sound without bias":
            values = values - w[f"{name}.v_vocal.bias"]
        if fault == "sound's keys normalised":
            keys = rms_norm(w, f"{name}.norm_k", keys, self.eps)
        out = []
        for i, part in enumerate(query.chunk(tokens.shape[1], dim=1)):
            kept = real[i] if fault == "padding left out of the softmax" else slice(None)
            out.append(attend(part, self._heads(keys[:, i, kept]), self._heads(values[:, i, kept])))
        return torch.cat(out, dim=1)
