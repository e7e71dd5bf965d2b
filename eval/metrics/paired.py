"""PSNR, SSIM and LPIPS of clips frame by frame: a reconstruction or a re-enactment against the real clip, student against teacher.

The first two are torchmetrics', LPIPS is the package of its authors (Zhang et al. 1801.03924, v0.1, AlexNet) with its linear heads;
the backbone is read from the weights folder and never downloaded.
"""

import hashlib
import importlib
import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from eval.networks.weights import exact, fill, read, refused
from teachers.errors import UserError

LEAST_SIDE = 12  # SSIM's window of 11 pixels must fit
LPIPS_LEAST_SIDE = 64  # AlexNet's five layers
HEADS_SHA256 = "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"


def psnr(a: UInt8[Tensor, "3 t h w"], b: UInt8[Tensor, "3 t h w"]) -> Float[Tensor, " t"]:
    """10 log10(255^2 / mean squared error) of each frame, in dB; infinite where the two are equal."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    parts = [
        peak_signal_noise_ratio(x, y, data_range=255.0, reduction="none", dim=(1, 2, 3)).reshape(-1)
        for x, y in _frames(a, b)
    ]
    return torch.cat(parts).cpu()


def ssim(a: UInt8[Tensor, "3 t h w"], b: UInt8[Tensor, "3 t h w"]) -> Float[Tensor, " t"]:
    """Structural similarity of each frame: Gaussian window of 11 pixels, sigma 1.5, edges reflected, mean over RGB.

    Wang et al. 2004, whose own code leaves the edges out instead.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(a.shape[2:]) < LEAST_SIDE:
        raise UserError(f"SSIM needs frames of at least {LEAST_SIDE} pixels: got {tuple(a.shape[2:])}; leave it out")
    parts: list[Any] = [
        structural_similarity_index_measure(x, y, data_range=255.0, sigma=1.5, kernel_size=11, reduction="none")
        for x, y in _frames(a, b)
    ]
    return torch.cat([part.reshape(-1) for part in parts]).cpu()


class Lpips:
    """LPIPS v0.1 with AlexNet; 0 is equal."""

    def __init__(self, network: nn.Module):
        self.network = network.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: Path | None = None, device: torch.device | str = "cpu") -> "Lpips":
        """With the backbone in `folder`; raises UserError as `eval.networks.weights.locate` does. Nothing is downloaded."""
        content = read("alexnet", folder)
        try:
            state = torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a reader of archives may raise
            raise refused("alexnet", f"its file cannot be read ({type(error).__name__})") from error
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
        if min(a.shape[2:]) < LPIPS_LEAST_SIDE:
            raise UserError(
                f"LPIPS needs frames of at least {LPIPS_LEAST_SIDE} pixels: got {tuple(a.shape[2:])}; leave it out"
            )
        device = next(self.network.parameters()).device
        with exact():
            parts = [
                self.network(x.to(device) / 127.5 - 1, y.to(device) / 127.5 - 1).flatten().cpu()
                for x, y in _frames(a, b, batch_size)
            ]
        return torch.cat(parts)


def _frames(a: Tensor, b: Tensor, size: int = 16):
    """Both clips as pairs of fp32 batches [n, 3, h, w]; UserError unless they are of one shape."""
    if a.shape != b.shape or a.dtype != torch.uint8 or b.dtype != torch.uint8 or a.ndim != 4 or a.shape[0] != 3:
        raise UserError(
            f"frames are compared in pairs, uint8 [3, T, H, W]: got {a.dtype} {tuple(a.shape)} and {b.dtype} "
            f"{tuple(b.shape)}; bring both to one size and length"
        )
    pairs = zip(a.transpose(0, 1).split(size), b.transpose(0, 1).split(size), strict=True)
    return [(x.float(), y.float()) for x, y in pairs]


def _untrained() -> nn.Module:
    """The published module with its heads and a random backbone."""
    lpips: Any = importlib.import_module("lpips")
    heads = Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth"
    if hashlib.sha256(heads.read_bytes()).hexdigest() != HEADS_SHA256:
        raise UserError(f"LPIPS refused: its heads are another file: {heads}; pip install lpips==0.1.4 again")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The parameter 'pretrained'|Arguments other than a weight enum")
        return lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
