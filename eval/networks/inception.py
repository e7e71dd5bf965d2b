"""FID's Inception: the TensorFlow graph of 2015-12-05, features of its last pooling (Heusel et al. 1706.08500).

It is torchvision's Inception v3 (Szegedy et al. 1512.00567) with three differences that move every FID: average pools do not count
the padding, Mixed_7c pools with the maximum, and there are 1008 classes.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from eval.networks.weights import check_frames, exact, load_network
from teachers.errors import UserError

DIM = 2048
SIDE = 299
Variant = Literal["tf1", "pytorch_fid"]


class Inception(nn.Module):
    """Images [N, 3, 299, 299] as `preprocess` makes them -> features [N, 2048]."""

    fc: nn.Linear  # features -> logits of the 1008 classes of 2015

    def __init__(self):
        from torchvision.models import Inception3

        super().__init__()
        for name, block in Inception3(1008, aux_logits=False, init_weights=False).named_children():
            if name in ("avgpool", "dropout"):
                continue
            if "branch_pool" in dict(block.named_children()):
                _pool_as_in_2015(block, largest=name == "Mixed_7c")
            self.add_module(name, block)
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: Path | None = None, device: torch.device | str = "cpu") -> "Inception":
        """With the published weights in `folder`; raises UserError as `eval.networks.weights.locate` does."""
        return load_network("inception", cls(), folder).to(device)

    def forward(self, x: Float[Tensor, "n 3 299 299"]) -> Float[Tensor, "n 2048"]:
        for name, block in self.named_children():
            x = x if name == "fc" else block(x)
        return x.mean(dim=(2, 3))

    def features(
        self, frames: UInt8[Tensor, "n 3 h w"], batch_size: int = 32, variant: Variant = "tf1"
    ) -> Float[Tensor, "n 2048"]:
        """RGB frames of any size -> features, fp32 on the CPU."""
        device = self.fc.weight.device
        with exact():
            found = [self(preprocess(part.to(device), variant)).float().cpu() for part in frames.split(batch_size)]
        return torch.cat(found)


def _pool_as_in_2015(block: Any, largest: bool) -> None:
    """Give a block of torchvision, whose last branch is the pooled one, the pool of the published graph."""
    theirs = block._forward

    def forward(x: Tensor) -> list[Tensor]:
        *branches, _ = theirs(x)
        pooled = F.max_pool2d(x, 3, 1, 1) if largest else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return [*branches, block.branch_pool(pooled)]

    block._forward = forward


def preprocess(frames: UInt8[Tensor, "n 3 h w"], variant: Variant = "tf1") -> Float[Tensor, "n 3 299 299"]:
    """RGB frames -> what the network sees. The two conventions are different metrics by design.

    tf1          TensorFlow 1's bilinear resize, (x - 128) / 128: TF's FID, torch-fidelity, torchmetrics with antialias=False
    pytorch_fid  torch's bilinear resize of x / 255 with half-pixel centres, 2x - 1: pytorch-fid
    Neither antialiases. Raises UserError for anything but uint8 [N, 3, H, W].
    """
    check_frames(frames, "Inception")
    if variant == "tf1":
        return (resize_tf1(frames.float(), SIDE, SIDE) - 128) / 128
    if variant == "pytorch_fid":
        return 2 * F.interpolate(frames.float() / 255, (SIDE, SIDE), mode="bilinear", align_corners=False) - 1
    raise UserError(f"unknown preprocessing of Inception: {variant}; use tf1 or pytorch_fid")


def resize_tf1(images: Float[Tensor, "n c h w"], height: int, width: int) -> Float[Tensor, "n c y x"]:
    """tf.image.resize_bilinear of TensorFlow 1, align_corners=False: x_in = x_out * (w_in / w_out), no half-pixel, no antialias."""
    for dim, size in ((3, width), (2, height)):
        last = images.shape[dim] - 1
        place = torch.arange(size, dtype=torch.float32) * torch.tensor((last + 1) / size, dtype=torch.float32)
        low = place.long().clamp(max=last)
        share = (place - low).to(images.device).unflatten(0, (-1, *[1] * (3 - dim)))
        low = low.to(images.device)
        left, right = images.index_select(dim, low), images.index_select(dim, (low + 1).clamp(max=last))
        images = left + (right - left) * share
    return images
