"""How Wan2.2-S2V reads audio: causal convolutions over the encoder's states, and what its injectors attend with.

B = batch, F = latent frames, D = width, M = heads, d = head width, E = width and L = number of the audio encoder's states, K =
audio tokens of a frame.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

REACH = 5
"""Audio rows before a latent frame's own that it reads."""


class AudioEncoder(nn.Module):
    """Audio rows of a clip -> `heads` tokens of each latent frame and one that is learned, and a global one. Causal, in fp32."""

    def __init__(self, states: int, audio: int, width: int, heads: int):
        super().__init__()
        quarter, half = width // 4, width // 2
        self.heads = heads
        self.weights = nn.Parameter(torch.full((1, states, 1, 1), 0.01))
        self.conv1_local = nn.Conv1d(audio, quarter * heads, 3)
        self.conv1_global = nn.Conv1d(audio, quarter, 3)
        self.conv2, self.conv3 = nn.Conv1d(quarter, half, 3, stride=2), nn.Conv1d(half, width, 3, stride=2)
        self.final_linear = nn.Linear(width, width)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, width))

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows [B, 4 F, L, E] -> tokens [B, F, heads + 1, D] and [B, F, D]. The published code repeats row 0 over 73 rows and pads
        the convolutions by copies, of which the rows and outputs that are kept reach REACH."""
        weights = F.silu(self.weights).squeeze((0, 3))
        x = (rows.to(weights) * weights).sum(dim=2) / weights.sum()
        x = F.pad(x.mT, (REACH, 0), mode="replicate")
        parts = self.conv1_local(x).unflatten(1, (self.heads, -1)).flatten(0, 1)
        own = self._packed(parts).unflatten(0, (-1, self.heads)).transpose(1, 2)
        own = torch.cat([own, self.padding_tokens.expand(*own.shape[:2], -1, -1)], dim=2)
        return own, self.final_linear(self._packed(self.conv1_global(x)))

    def _packed(self, x: Tensor) -> Tensor:
        """[B, D/4, T] behind the first convolution -> [B, F, D]."""
        for conv in (self.conv2, self.conv3):
            x = conv(_normed(x.mT).mT)
        return _normed(x.mT)


def _normed(x: Tensor) -> Tensor:
    return F.silu(F.layer_norm(x, x.shape[-1:], eps=1e-6))


class AudioInjector(nn.Module):
    """The matrices of the attention to audio behind a block, and of the AdaIN before it."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q, self.norm_k = nn.RMSNorm(width, eps=eps), nn.RMSNorm(width, eps=eps)
        self.adain = nn.Linear(width, 2 * width)


class AudioContext(NamedTuple):
    """What is added behind a block: its injector, keys and values [B, F, K, M, d], shift and scale [B, F, 1, D] of the AdaIN."""

    injector: Any
    key: Tensor
    value: Tensor
    shift: Tensor
    scale: Tensor
