"""What turns clips into tensors for a network: codec, and encoders of audio, text and images; read from a finished data stage."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distill.data.config import ClipsConfig
from distill.data.procedural import render
from distill.data.source import Clips
from teachers.codecs.linear import to_float, to_uint8
from teachers.conditions import BUILT_IN, Conditions, known, pack_rows, side_by_side
from teachers.errors import UserError
from teachers.machine import clips_at_once
from teachers.registry import AudioEncoder, Codec, ImageEncoder, Text

CPU = torch.device("cpu")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ConditionEncoders:
    """Everything that turns clips into tensors for a network: codec, audio encoder, text encoder (all frozen).

    They work on `device`; what they give lies on the CPU. `reference`: the first latent of a clip is given to the network;
    `negative`: the prompt in the place of a dropped text. `lead`: so many first latent frames of a clip are the portrait's and no
    part of its x0 and conditions (`NetworkKind.lead`). `mark`: which fitted files they were read from (`fitted_fingerprint`).
    `precision`: that of features of sound and text in a training set.
    """

    codec: Codec
    audio_encoder: AudioEncoder
    text: Text
    reference: bool = True
    negative: str | None = None
    device: torch.device = CPU
    mark: str = ""
    precision: torch.dtype = torch.float32
    image: ImageEncoder | None = None
    lead: int = 0

    @torch.no_grad()
    def of_image(self, image: Tensor, num_frames: int) -> dict[str, Tensor]:
        """The features of reference images [N, 3, H, W] in [-1, 1] for clips of so many latent frames; {} without an encoder."""
        if self.image is None:
            return {}
        parts = [self.image(part.to(self.device), self.codec, num_frames) for part in image.split(1)]
        return {name: torch.cat([part[name].float().cpu() for part in parts]) for name in parts[0]}

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """uint8 [N, 3, T, H, W] -> latents fp32 [N, C, F, h, w], the lead among them, a few clips at a time."""
        _, _, frames, height, width = video.shape
        parts = video.split(clips_at_once(frames, height, width, self.device.type))
        return torch.cat([self.codec.encode(to_float(part.to(self.device))).float().cpu() for part in parts])

    @torch.no_grad()
    def decode(self, latents: Tensor, lead: Tensor | None = None) -> Tensor:
        """Latents [N, C, F, h, w] behind their `lead` [N, C, 1, h, w] -> uint8 [N, 3, T, H, W], a few clips at a time."""
        latents = latents if lead is None else torch.cat([lead.to(latents), latents], dim=2)
        config, (frames, height, width) = self.codec.config, latents.shape[2:]
        pixels = (1 + config.stride * (frames - 1), height * config.patch, width * config.patch)
        size = clips_at_once(*pixels, self.device.type)
        return torch.cat([to_uint8(self.codec.decode(part.to(self.device))).cpu() for part in latents.split(size)])

    @torch.no_grad()
    def conditions(
        self,
        audio: Tensor,
        text: list[str] | None,
        reference: Tensor,
        num_frames: int,
        pose: Tensor | None = None,
        features: Mapping[str, Tensor] | None = None,
        image: Tensor | None = None,
    ) -> Conditions:
        """audio [N, S] or [N, 2, S]; text, None for conditions without; reference latents [N, C, 1, h, w]; num_frames pixel frames,
        the lead's among them; pose rows [N, T, P]; `features` as `Clips` has them; reference images [N, 3, H, W] in [-1, 1], for an
        image encoder."""
        audio = audio.to(self.device)
        rows, whole = self.audio_encoder(audio, 0, num_frames), self.audio_encoder.of_clip(audio, num_frames)
        if audio.ndim == 3:
            rows, whole = side_by_side(rows), None if whole is None else side_by_side(whole)
        packed = self._packed(rows)
        of_image = {} if image is None else self.of_image(image, packed.shape[1])
        return Conditions(
            {**of_image, **(features or {})},
            text=None if text is None else self.read(text),
            audio=packed,
            reference=reference if self.reference else None,
            lead=reference if self.lead else None,
            negative=None if text is None else self.negatives(len(text)),
            clip_audio=None if whole is None else self._packed(whole),
            pose=None if pose is None else self._packed(pose),
        )

    def _packed(self, rows: Tensor) -> Tensor:
        """Rows of pixel frames [N, T, A] -> those of the clip's latent frames [N, F, stride, A] on the CPU."""
        return pack_rows(rows.float().cpu(), self.codec.config.stride)[:, self.lead :]

    @torch.no_grad()
    def read(self, text: list[str]) -> Tensor:
        """Token features fp32 [N, L, D]."""
        return self.text(text).float().cpu()

    def negatives(self, count: int) -> Tensor | None:
        """Features [N, L, D] of the negative prompt, None without one."""
        return None if self.negative is None else self.read([self.negative]).expand(count, -1, -1)

    def of_clips(self, clips: Clips, with_text: bool = True, frames: int | None = None) -> tuple[Tensor, Conditions]:
        """Latents [N, C, F, h, w] and conditions of whole clips, those of the text only `with_text`; `frames` pixel frames long
        where the video is the portrait alone, whose latents are then those of it. UserError for features that are not declared, or
        not of as many rows or latent frames as the clips."""
        latents = self.encode(clips.video)
        x0 = latents[:, :, self.lead :]
        frames, text = frames or clips.video.shape[2], clips.text if with_text else None
        latent_frames = 1 + (frames - 1) // self.codec.config.stride - self.lead
        _check_features(clips.features, Conditions(clips.features), len(x0), latent_frames)
        image = to_float(clips.video[:, :, 0])
        return x0, self.conditions(clips.audio, text, latents[:, :, :1], frames, clips.pose, clips.features, image)


def _check_features(features: Mapping[str, Tensor], given: Conditions, num: int, frames: int) -> None:
    for name, value in features.items():
        if name in BUILT_IN and name != "regions":
            raise UserError(f"Clips.features: {name} is made by the encoders; declare a name of your own")
        counts, axis = {"clips": (value.shape[0], num)}, known(name).axis
        if name in given.timed and axis is not None:
            counts["latent frames"] = (value.shape[axis], frames)
        for what, (own, needed) in counts.items():
            if own != needed:
                raise UserError(f"Clips.features: {name} {tuple(value.shape)} has {own} {what}, the video has {needed}")


def load_encoders(
    config: ClipsConfig, folder: Path, reference: bool = True, device: torch.device = CPU
) -> ConditionEncoders:
    """Codec, audio encoder and text encoder of a finished data stage, on `device`."""
    codec = config.codec.load(folder, *config.world.size)
    audio_encoder, text = config.audio.load(render.samples_per_frame(config.world)), config.text.load(folder)
    image = None if config.image is None else config.image.load()
    for part in (codec, audio_encoder, text, *([] if image is None else [image])):
        part.to(device)
    mark, precision = fitted_fingerprint(folder), PRECISIONS[config.precision]
    given = (config.negative, device, mark, precision, image, config.lead)
    return ConditionEncoders(codec, audio_encoder, text, reference, *given)


def fitted_fingerprint(folder: Path) -> str:
    """Which fitted codec and text encoder a data stage holds: a hash of their files. Those given are in the stage's fingerprint."""
    digest = hashlib.sha256()
    for file in (folder / "codec.safetensors", *sorted((folder / "text").glob("*"))):
        if file.is_file():
            digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
