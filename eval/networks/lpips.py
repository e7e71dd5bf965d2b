"""LPIPS v0.1 with AlexNet (Zhang et al. 1801.03924): the package of its authors with its linear heads.

The backbone is read from the weights folder and never downloaded.
"""

import hashlib
import importlib
import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from eval.metrics.pairs.psnr import frame_pairs
from eval.networks.weights import exact, fill, read_state
from teachers.errors import UserError

LEAST_SIDE = 64  # AlexNet's five layers
HEADS_SHA256 = "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"


class Lpips:
    """LPIPS v0.1 with AlexNet; 0 is equal."""

    def __init__(self, network: nn.Module):
        self.network = network.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: Path | None = None, device: torch.device | str = "cpu") -> "Lpips":
        """With the backbone in `folder`; raises UserError as `eval.networks.weights.locate` does. Nothing is downloaded."""
        state = read_state("alexnet", folder)
        network: Any = _untrained()
        kept = {key: value for key, value in state.items() if key.startswith("features.")}
        places = {key: f"features.{key.partition('.')[2]}" for key in network.net.state_dict()}  # slice1.0.weight
        renamed = {key: kept.pop(place) for key, place in places.items() if place in kept}
        fill("alexnet", network.net, renamed | kept)
        return cls(network.to(device))

    def distance(
        self, a: UInt8[Tensor, "3 t h w"], b: UInt8[Tensor, "3 t h w"], batch_size: int = 16
    ) -> Float[Tensor, " t"]:
        """Of each frame, fp32 on the CPU; the network sees [-1, 1]."""
        if min(a.shape[2:]) < LEAST_SIDE:
            raise UserError(f"LPIPS needs frames of at least {LEAST_SIDE} pixels: got {tuple(a.shape[2:])}; remove it")
        device = next(self.network.parameters()).device
        with exact():
            parts = [
                self.network(x.to(device) / 127.5 - 1, y.to(device) / 127.5 - 1).flatten().cpu()
                for x, y in frame_pairs(a, b, batch_size)
            ]
        return torch.cat(parts)


def _untrained() -> nn.Module:
    """The published module with its heads and a random backbone."""
    lpips: Any = importlib.import_module("lpips")
    heads = Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth"
    if hashlib.sha256(heads.read_bytes()).hexdigest() != HEADS_SHA256:
        raise UserError(f"LPIPS refused: its heads are another file: {heads}; pip install lpips==0.1.4 again")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The parameter 'pretrained'|Arguments other than a weight enum")
        return lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
