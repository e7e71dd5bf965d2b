"""What Wan's image-to-video networks take of the reference image: CLIP's tokens, channels beside the noise, where the face is.

CLIP is the vision half of open-clip's xlm-roberta-large ViT-H/14 (Wan 2.1, 2503.20314): 257 tokens x 1280 after 31 of 32 layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from teachers.checkpoints.local_model import load_pretrained, model_files, require
from teachers.checkpoints.strict import check_shapes, load_strict
from teachers.checkpoints.weights import read_tensors
from teachers.encoders.still import film_latents
from teachers.errors import UserError
from teachers.media import face

FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
ORIGINAL = f"{FILE} of Wan-AI/Wan2.1-I2V-14B-480P or alibaba-pai/Wan2.1-Fun-V1.1-1.3B-InP from the Hugging Face hub"
DIFFUSERS = "image_encoder/ of Wan-AI/Wan2.1-I2V-14B-480P-Diffusers from the Hugging Face hub"
UNUSED = r"(vision_model\.)?post_layernorm\..*"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HEAD_WIDTH = 80
PREFIX = "visual."
NAMES = {
    "cls_embedding": "embeddings.class_embedding",
    "patch_embedding.weight": "embeddings.patch_embedding.weight",
    "pos_embedding": "embeddings.position_embedding.weight",
    "pre_norm.*": "pre_layrnorm.*",
    "transformer.N.norm1.*": "encoder.layers.N.layer_norm1.*",
    "transformer.N.attn.proj.*": "encoder.layers.N.self_attn.out_proj.*",
    "transformer.N.norm2.*": "encoder.layers.N.layer_norm2.*",
    "transformer.N.mlp.0.*": "encoder.layers.N.mlp.fc1.*",
    "transformer.N.mlp.2.*": "encoder.layers.N.mlp.fc2.*",
}
"""Weights of Wan's own file, after `visual.` -> of transformers' CLIPVisionModel; N is the layer, * weight and bias. attn.to_qkv is
q_proj, k_proj and v_proj in one."""


@dataclass(frozen=True, kw_only=True)
class WanImageConfig:
    """CLIP in `path`: Wan's own folder with its .pth file, or a diffusers folder with image_encoder/. `dim` numbers a token,
    `tokens` of them. `face`: box gives `regions` too, the face found in the image (teachers.media.face; everywhere where there is
    none), cut to whole tokens of `cell` x `cell` cells of the latent grid."""

    path: Path | None = None
    dim: int = 1280
    tokens: int = 257
    face: Literal["none", "box"] = "none"
    cell: int = 2

    @property
    def gives(self) -> tuple[str, ...]:
        """The features that it makes of an image."""
        return ("image", "beside", *(("regions",) if self.face == "box" else ()))

    def sizes(self, stride: int, channels: int, frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """The shapes of those features without a batch, for latents [channels, frames, height, width] of a codec of `stride`."""
        shapes = {
            "image": (self.tokens, self.dim),
            "beside": (stride + channels, frames, height, width),
            "regions": (1, height, width),
        }
        return {name: shapes[name] for name in self.gives}

    def load(self) -> "WanImage":
        """The frozen encoder in fp32. UserError lists what is missing or of another shape."""
        if self.path is None:
            raise UserError(f"CLIP image encoder: no path; give the folder of {ORIGINAL}, or of {DIFFUSERS}")
        if (own := self.path / FILE).is_file():
            model = from_original(read_tensors(own, f"get {ORIGINAL}"), own)
        else:
            from transformers import CLIPVisionModel

            folder = self.path / "image_encoder"
            if not folder.is_dir():
                raise UserError(f"missing {FILE}: {self.path}; get {ORIGINAL}, or {DIFFUSERS}")
            require(self.path, [f"image_encoder/{name}" for name in model_files(folder)], DIFFUSERS)
            model = load_pretrained(CLIPVisionModel, folder, DIFFUSERS, torch.float32, (UNUSED,))
            vision = _vision(model)
            vision.encoder.layers = vision.encoder.layers[:-1]
        encoder = WanImage(model, self)
        found = (encoder.size // model.config.patch_size) ** 2 + 1, model.config.hidden_size
        if found != (self.tokens, self.dim):
            raise UserError(
                f"CLIP image encoder: {self.path} gives {found[0]} tokens of {found[1]}, tokens={self.tokens} and dim={self.dim} "
                "are given; use the former"
            )
        return encoder

    def write_random(self, folder: Path) -> None:
        """A small encoder with random weights in the diffusers layout, for recipes with size=tiny."""
        from transformers import CLIPVisionConfig, CLIPVisionModel

        side = int((self.tokens - 1) ** 0.5)
        shape = CLIPVisionConfig(
            hidden_size=self.dim,
            intermediate_size=2 * self.dim,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=4 * side,
            patch_size=4,
            hidden_act="gelu",
        )
        CLIPVisionModel(shape).save_pretrained(folder / "image_encoder")


class WanImage(nn.Module):
    """The reference image -> its features, by name."""

    def __init__(self, model: Any, config: WanImageConfig):
        super().__init__()
        self.model, self.config, self.size = model, config, model.config.image_size
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, image: Float[Tensor, "n 3 h w"], codec: Any, num_frames: int) -> dict[str, Tensor]:
        """image in [-1, 1] -> image [N, K, V]; beside [N, stride + C, F, H, W], the mask (1 where the clip is given: frame 0) and
        latents of a clip that is the image and then mid-grey, F = num_frames; regions [N, 1, H, W] where the config has it."""
        found = {"image": self.tokens(image), "beside": beside(image, codec, num_frames)}
        if self.config.face == "box":
            height, width = found["beside"].shape[-2:]
            masks = [face_mask(one, height, width, self.config.cell) for one in image]
            found["regions"] = torch.stack(masks).unsqueeze(1).to(image)
        return found

    def tokens(self, image: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n tokens dim"]:
        """CLIP's tokens of an image in [-1, 1], which is resized to a square (bicubic, without antialiasing, as published)."""
        small = F.interpolate(image, (self.size, self.size), mode="bicubic", align_corners=False)
        pixels = (small * 0.5 + 0.5 - self.get_buffer("mean")) / self.get_buffer("std")
        return self.model(pixels.to(self.model.dtype)).last_hidden_state


def beside(
    image: Float[Tensor, "n 3 h w"], codec: Any, num_frames: int
) -> Float[Tensor, "n channels {num_frames} y x"]:
    """[mask of `stride` channels | latents] of a clip whose frame 0 is the image and whose other frames are mid-grey."""
    stride = codec.config.stride
    latents = film_latents(image, codec, num_frames, grey=True)
    mask = latents.new_zeros(len(latents), stride, *latents.shape[2:])
    mask[:, :, 0] = 1.0
    return torch.cat([mask, latents], dim=1)


def face_mask(image: Float[Tensor, "3 h w"], height: int, width: int, cell: int) -> Tensor:
    """1 in the box of the largest face of an image in [-1, 1], 0 elsewhere, on a height x width grid, the box cut down to whole
    cells; 1 everywhere where no face is found."""
    pixels = ((image.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous()
    found = face.find_faces(pixels)
    if not found:
        return torch.ones(height, width)
    box, rows, columns = found[0], height // cell, width // cell
    top, bottom = int(max(0.0, box.y) * rows), int(min(1.0, box.y + box.height) * rows)
    left, right = int(max(0.0, box.x) * columns), int(min(1.0, box.x + box.width) * columns)
    mask = torch.zeros(height, width)
    mask[top * cell : max(bottom, top + 1) * cell, left * cell : max(right, left + 1) * cell] = 1.0
    return mask


def from_original(tensors: Mapping[str, Tensor], where: Path) -> Any:
    """The frozen CLIPVisionModel, without its last layer, of weights under Wan's own names, its size inferred from their shapes;
    the text half is ignored. UserError lists missing names and mismatched shapes."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    hint = f"get {ORIGINAL}"
    own = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
    layers = len({name.split(".")[1] for name in own if name.startswith("transformer.")}) - 1
    needed: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("patch_embedding.weight", "pos_embedding", "transformer.0.mlp.0.weight"), ()
    )
    check_shapes({name: () for name in needed if name in own}, needed, where, hint)
    width, _, patch, _ = own["patch_embedding.weight"].shape
    shape = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=own["transformer.0.mlp.0.weight"].shape[0],
        num_hidden_layers=max(1, layers),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        image_size=patch * int((own["pos_embedding"].shape[1] - 1) ** 0.5),
        patch_size=patch,
        hidden_act="gelu",
    )
    with torch.device("meta"):
        model = CLIPVisionModel(shape)
    named, wanted = {}, {}
    for theirs, ours, place in _renamed(max(1, layers)):
        wanted[theirs] = ()
        if theirs in own:
            value = own[theirs] if place is None else own[theirs].chunk(3)[place]
            one = ours.endswith(("class_embedding", "position_embedding.weight"))
            named[ours] = value.float().squeeze(0).squeeze(0) if one else value.float()
    check_shapes({name: () for name in wanted if name in own}, wanted, where, hint)
    for part in ("weight", "bias"):  # of the layer that is cut off there is nothing to read
        named[f"post_layernorm.{part}"] = torch.ones(width) if part == "weight" else torch.zeros(width)
    positions = torch.arange(own["pos_embedding"].shape[1]).expand(1, -1)
    vision = _vision(model)
    vision.embeddings.position_ids = positions
    load_strict(vision, named, where, hint, assign=True)
    return model.eval().requires_grad_(False)


def _vision(model: Any) -> Any:
    """The transformer of a CLIPVisionModel, which some versions of transformers wrap once more."""
    return getattr(model, "vision_model", model)


def _renamed(layers: int) -> list[tuple[str, str, int | None]]:
    """(Wan's name, transformers' name, which third of the rows where it is one of three) of every weight that is used."""
    rows: list[tuple[str, str, int | None]] = []
    table = [(theirs, ours, None) for theirs, ours in NAMES.items()]
    qkv = [("transformer.N.attn.to_qkv.*", f"encoder.layers.N.self_attn.{x}_proj.*", i) for i, x in enumerate("qkv")]
    for theirs, ours, place in (*table, *qkv):
        for layer in range(layers) if "N" in theirs else (0,):
            for kind in ("weight", "bias") if "*" in theirs else ("",):
                first, second = (name.replace("N", str(layer)).replace("*", kind) for name in (theirs, ours))
                rows.append((first, second, place))
    return rows
