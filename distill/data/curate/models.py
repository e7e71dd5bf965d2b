"""Models that improve a condition: a caption of motion, a reference picture of more pixels. Off unless a local folder is named.

Any transformers model of the class is read, in the layout that `save_pretrained` writes: config.json, safetensors and the files
of the processor. Nothing is downloaded, no pickle is read and no code of a folder is run.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from teachers.checkpoints.local_model import ask, load_local
from teachers.errors import UserError
from teachers.files import canonical_json

INSTRUCTION = (
    "Describe only how the person moves in this picture of a video: speech, facial expression, gaze, head, hands, posture. "
    "Leave out looks, clothes and background. One or two plain sentences in the present tense. The caption so far: {text}"
)
MAX_NEW_TOKENS = 96


def folder_mark(folder: Path, *more: str) -> str:
    """sha256 that changes with the files of a model folder (names, sizes, config.json) and with `more`."""
    files = sorted((file.name, file.stat().st_size) for file in folder.iterdir() if file.is_file())
    config = (folder / "config.json").read_text(encoding="utf-8")
    return hashlib.sha256(canonical_json([files, config, *more]).encode()).hexdigest()


class CaptionRewriter:
    """Motion-focused captions by an image-text model (AutoModelForImageTextToText, AutoProcessor), always the likeliest words."""

    def __init__(self, folder: Path):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        folder = Path(folder)
        self.model, self.processor = load_local("image-text model", folder, AutoModelForImageTextToText, AutoProcessor)
        self.mark = folder_mark(folder, INSTRUCTION)

    @torch.inference_mode()
    def __call__(self, picture: Tensor, text: str) -> str:
        """The new caption for a picture uint8 [H, W, 3] and the old text; UserError when the model says nothing."""
        asked = INSTRUCTION.format(text=text or "none")
        content = [{"type": "image", "image": Image.fromarray(picture.numpy())}, {"type": "text", "text": asked}]
        words = " ".join(ask(self.model, self.processor, content, MAX_NEW_TOKENS).split())
        if not words:
            raise UserError("the image-text model gave no words")
        return words


class Upscaler:
    """Super-resolution by an image-to-image model (AutoModelForImageToImage and AutoImageProcessor), e.g. Swin2SR."""

    def __init__(self, folder: Path):
        from transformers import AutoImageProcessor, AutoModelForImageToImage

        folder = Path(folder)
        self.model, self.processor = load_local(
            "super-resolution model", folder, AutoModelForImageToImage, AutoImageProcessor
        )
        self.factor = int(getattr(self.model.config, "upscale", 1))
        self.mark = folder_mark(folder)

    @torch.inference_mode()
    def __call__(self, picture: Tensor) -> Tensor:
        """A picture uint8 [H, W, 3] with `factor` times the pixels each way."""
        inputs = self.processor(images=Image.fromarray(picture.numpy()), return_tensors="pt")
        made = self.model(**inputs.to(self.model.device, self.model.dtype)).reconstruction[0].float().cpu()
        height, width = (
            picture.shape[0] * self.factor,
            picture.shape[1] * self.factor,
        )  # what the processor padded is cut
        whole = made[:, :height, :width].permute(1, 2, 0).clamp(0, 1)
        return torch.from_numpy(np.ascontiguousarray((whole * 255).round().byte().numpy()))
