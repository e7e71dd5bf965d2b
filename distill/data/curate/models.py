"""Models that improve a condition: a motion-focused caption, a super-resolved reference image. Off unless a local folder is given.

Any transformers model of the class is loaded, in the layout that `save_pretrained` writes: config.json, safetensors and the files
of the processor. Nothing is downloaded, no pickle is read and no code of a folder is run.
"""

import hashlib
from pathlib import Path

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


def folder_fingerprint(folder: Path, *more: str) -> str:
    """sha256 that changes with the files of a model folder (names, sizes, config.json) and with `more`."""
    files = sorted((file.name, file.stat().st_size) for file in folder.iterdir() if file.is_file())
    config = (folder / "config.json").read_text(encoding="utf-8")
    return hashlib.sha256(canonical_json([files, config, *more]).encode()).hexdigest()


class CaptionRewriter:
    """Motion-focused captions by an image-text model (AutoModelForImageTextToText, AutoProcessor), by greedy decoding."""

    def __init__(self, folder: Path):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model, self.processor = load_local("image-text model", folder, AutoModelForImageTextToText, AutoProcessor)
        self.fingerprint = folder_fingerprint(folder, INSTRUCTION)

    @torch.inference_mode()
    def __call__(self, frame: Tensor, text: str) -> str:
        """The new caption for a frame uint8 [H, W, 3] and the old text; UserError when the model's answer is empty."""
        prompt = INSTRUCTION.format(text=text or "none")
        content = [{"type": "image", "image": Image.fromarray(frame.numpy())}, {"type": "text", "text": prompt}]
        caption = " ".join(ask(self.model, self.processor, content, MAX_NEW_TOKENS).split())
        if not caption:
            raise UserError("the image-text model's answer is empty")
        return caption


class Upscaler:
    """Super-resolution by an image-to-image model (AutoModelForImageToImage and AutoImageProcessor), e.g. Swin2SR."""

    def __init__(self, folder: Path):
        from transformers import AutoImageProcessor, AutoModelForImageToImage

        self.model, self.processor = load_local(
            "super-resolution model", folder, AutoModelForImageToImage, AutoImageProcessor
        )
        self.factor = int(getattr(self.model.config, "upscale", 1))
        self.fingerprint = folder_fingerprint(folder)

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Tensor:
        """Image uint8 [H, W, 3] -> uint8 [factor H, factor W, 3]."""
        inputs = self.processor(images=Image.fromarray(image.numpy()), return_tensors="pt")
        output = self.model(**inputs.to(self.model.device, self.model.dtype)).reconstruction[0].float().cpu()
        height, width = (side * self.factor for side in image.shape[:2])
        cropped = output[:, :height, :width].permute(1, 2, 0).clamp(0, 1)  # without the processor's padding
        return (cropped * 255).round().byte().contiguous()
