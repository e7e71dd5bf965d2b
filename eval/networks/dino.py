"""DINOv2 ViT-B/14 (Oquab et al. 2304.07193): how much two images look alike.

The network is transformers', the resize is PIL's.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from eval.networks.weights import check_frames, exact, read, refused
from teachers.checkpoints.local_model import quiet
from teachers.checkpoints.strict import describe

DIM = 768
SHORT_SIDE, SIDE = 256, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONFIG: dict[str, Any] = {
    "hidden_size": DIM,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 518,
    "patch_size": 14,
}
"""What config.json of facebook/dinov2-base says beyond the defaults of transformers.Dinov2Config."""


class Dino:
    """Frames -> the normalised class token of the last layer; compare two by their cosine."""

    def __init__(self, network: nn.Module):
        self.network = network.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: Path | None = None, device: torch.device | str = "cpu") -> "Dino":
        """With the published weights in `folder`, strictly; raises UserError as `eval.networks.weights.locate` does."""
        from transformers import Dinov2Config, Dinov2Model

        content = read("dinov2", folder)
        try:
            with quiet():
                loaded: Any = Dinov2Model.from_pretrained(
                    None,
                    config=Dinov2Config(**CONFIG),
                    state_dict=load(content.getvalue()),
                    dtype=torch.float32,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
            network, found = loaded
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise refused("dinov2", f"its file cannot be read ({type(error).__name__})") from error
        wrong = {name: (there, needed) for name, there, needed in found["mismatched_keys"]}
        if faults := describe(sorted(found["missing_keys"]), sorted(found["unexpected_keys"]), wrong):
            raise refused("dinov2", f"its file does not fit: {faults}")
        return cls(network.to(device))

    def features(self, frames: UInt8[Tensor, "n 3 h w"], batch_size: int = 32) -> Float[Tensor, "n d"]:
        """RGB frames of any size -> features, fp32 on the CPU, not normalised to length 1."""
        device = next(self.network.parameters()).device
        with exact():
            parts = [self.network(preprocess(part).to(device)).pooler_output for part in frames.split(batch_size)]
        return torch.cat([part.float().cpu() for part in parts])


def preprocess(frames: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 224 224"]:
    """Short side to 256 (PIL's bicubic, which antialiases), centre crop 224, ImageNet's mean and deviation, as published.

    Raises UserError for anything but uint8 [N, 3, H, W].
    """
    check_frames(frames, "DINOv2")
    height, width = frames.shape[-2:]
    size = [int(SHORT_SIDE * side / min(height, width)) for side in (width, height)]
    left, top = ((side - SIDE) // 2 for side in size)
    crops = []
    for frame in frames.permute(0, 2, 3, 1).cpu().numpy():
        image = Image.fromarray(frame).resize((size[0], size[1]), Image.Resampling.BICUBIC)
        crops.append(np.asarray(image.crop((left, top, left + SIDE, top + SIDE))))
    x = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
