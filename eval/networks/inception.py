"""FID's Inception: the TensorFlow graph of 2015-12-05, features of its last pooling (Heusel et al. 1706.08500).

It is Inception v3 (Szegedy et al. 1512.00567) as torchvision names it, with three differences that move every FID: average pools do
not count the padding, Mixed_7c pools with the maximum, and there are 1008 classes.
"""

from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from eval.networks.weights import exact, load_network
from teachers.errors import UserError

DIM = 2048
SIDE = 299
Variant = Literal["tf1", "pytorch_fid"]

# A branch is steps of `name:width:kernel`, "/2" for stride 2 without padding, " " between steps, "|" between the two halves of one;
# `avg` and `max` pool 3 x 3 in place, `shrink` is the maximum at stride 2 without padding. Branches are joined by channels.
STEM = "Conv2d_1a_3x3:32:3/2 Conv2d_2a_3x3:32:3/1 Conv2d_2b_3x3:64:3 shrink Conv2d_3b_1x1:80:1 Conv2d_4a_3x3:192:3/1 shrink"


def _block_a(pooled: int) -> tuple[str, ...]:
    return (
        "branch1x1:64:1",
        "branch5x5_1:48:1 branch5x5_2:64:5",
        "branch3x3dbl_1:64:1 branch3x3dbl_2:96:3 branch3x3dbl_3:96:3",
        f"avg branch_pool:{pooled}:1",
    )


def _block_c(width: int) -> tuple[str, ...]:
    return (
        "branch1x1:192:1",
        f"branch7x7_1:{width}:1 branch7x7_2:{width}:1x7 branch7x7_3:192:7x1",
        f"branch7x7dbl_1:{width}:1 branch7x7dbl_2:{width}:7x1 branch7x7dbl_3:{width}:1x7 branch7x7dbl_4:{width}:7x1 "
        "branch7x7dbl_5:192:1x7",
        "avg branch_pool:192:1",
    )


def _block_e(pool: str) -> tuple[str, ...]:
    return (
        "branch1x1:320:1",
        "branch3x3_1:384:1 branch3x3_2a:384:1x3|branch3x3_2b:384:3x1",
        "branch3x3dbl_1:448:1 branch3x3dbl_2:384:3 branch3x3dbl_3a:384:1x3|branch3x3dbl_3b:384:3x1",
        f"{pool} branch_pool:192:1",
    )


MIXED = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": (
        "branch3x3:384:3/2",
        "branch3x3dbl_1:64:1 branch3x3dbl_2:96:3 branch3x3dbl_3:96:3/2",
        "shrink",
    ),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": (
        "branch3x3_1:192:1 branch3x3_2:320:3/2",
        "branch7x7x3_1:192:1 branch7x7x3_2:192:1x7 branch7x7x3_3:192:7x1 branch7x7x3_4:192:3/2",
        "shrink",
    ),
    "Mixed_7b": _block_e("avg"),
    "Mixed_7c": _block_e("max"),
}
POOLS = {
    "avg": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "max": lambda x: F.max_pool2d(x, 3, 1, 1),
    "shrink": lambda x: F.max_pool2d(x, 3, 2),
}


class Conv(nn.Module):
    """Convolution without bias, batch norm with eps 0.001, ReLU."""

    def __init__(self, inputs: int, outputs: int, size: str):
        super().__init__()
        shape, _, stride = size.partition("/")
        kernel = [int(side) for side in shape.split("x")] * (1 if "x" in shape else 2)
        padding = (0, 0) if stride else (kernel[0] // 2, kernel[1] // 2)
        self.conv = nn.Conv2d(inputs, outputs, (kernel[0], kernel[1]), int(stride or 1), padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side; `width` is the number of channels that come out."""

    def __init__(self, inputs: int, branches: tuple[str, ...]):
        super().__init__()
        self.branches, self.width = branches, 0
        for branch in branches:
            width = inputs
            for step in branch.split():
                if step in POOLS:
                    continue
                parts = [part.split(":") for part in step.split("|")]
                for name, outputs, size in parts:
                    self.add_module(name, Conv(width, int(outputs), size))
                width = sum(int(outputs) for _, outputs, _ in parts)
            self.width += width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._branch(branch, x) for branch in self.branches], dim=1)

    def _branch(self, branch: str, x: Tensor) -> Tensor:
        for step in branch.split():
            if step in POOLS:
                x = POOLS[step](x)
            else:
                x = torch.cat([getattr(self, part.split(":")[0])(x) for part in step.split("|")], dim=1)
        return x


class Inception(Mixed):
    """Images [N, 3, 299, 299] as `preprocess` makes them -> features [N, 2048]."""

    def __init__(self):
        super().__init__(3, (STEM,))
        for name, branches in MIXED.items():
            block = Mixed(self.width, branches)
            self.add_module(name, block)
            self.width = block.width
        self.fc = nn.Linear(DIM, 1008)
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: Path | None = None, device: torch.device | str = "cpu") -> "Inception":
        """With the published weights in `folder`; raises UserError as `eval.networks.weights.locate` does."""
        network = cls()
        load_network("inception", network, folder)
        return network.to(device)

    def forward(self, x: Float[Tensor, "n 3 299 299"]) -> Float[Tensor, "n 2048"]:
        x = super().forward(x)
        for name in MIXED:
            x = getattr(self, name)(x)
        return x.mean(dim=(2, 3))

    def logits(self, features: Float[Tensor, "n 2048"]) -> Float[Tensor, "n 1008"]:
        """Of the 1008 classes of 2015."""
        return self.fc(features)

    def features(
        self, frames: UInt8[Tensor, "n 3 h w"], batch_size: int = 32, variant: Variant = "tf1"
    ) -> Float[Tensor, "n 2048"]:
        """RGB frames of any size -> features, fp32 on the CPU."""
        device = self.fc.weight.device
        with exact():
            found = [self(preprocess(part.to(device), variant)).float().cpu() for part in frames.split(batch_size)]
        return torch.cat(found)


def preprocess(frames: UInt8[Tensor, "n 3 h w"], variant: Variant = "tf1") -> Float[Tensor, "n 3 299 299"]:
    """RGB frames -> what the network sees. The two conventions are different metrics by design.

    tf1          TensorFlow 1's bilinear resize, (x - 128) / 128: TF's FID, torch-fidelity, torchmetrics with antialias=False
    pytorch_fid  torch's bilinear resize of x / 255 with half-pixel centres, 2x - 1: pytorch-fid
    Neither antialiases. Raises UserError for anything but uint8 [N, 3, H, W].
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3:
        raise UserError(
            f"Inception sees uint8 frames [N, 3, H, W]: got {frames.dtype} {tuple(frames.shape)}; convert the frames"
        )
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
