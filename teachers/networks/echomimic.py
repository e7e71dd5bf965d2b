"""EchoMimicV3 preview (2507.03905): Wan2.1-Fun-1.3B-InP whose cross-attention reads sound and image beside the text.

    o(attention(q, text) + attention(q, image) + mask attention(q, audio of the frame))        one query for all three

Latent frame i reads the 17 states 8 i - 11 .. 8 i + 5 of wav2vec2 at 50 a second, two a pixel frame: 4 states, 80 ms, beyond its
last pixel frame. States outside the clip are tokens of zeros, which take part in the softmax (the published windows are padded and
not masked). The mask is the face, the same for all frames. A = 11 E numbers a row, the states 2 p - 5 .. 2 p + 5 of pixel frame p.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from teachers.errors import UserError
from teachers.networks.blocks.wan import AvatarBlock, keys_values
from teachers.networks.image_to_video import ImageToVideoKind
from teachers.networks.kind import Dims
from teachers.networks.wan import AvatarTransformer, WanKind

ROW, STATES, BEFORE, A_FRAME = 11, 17, 11, 8
"""States of a row and of a latent frame's window, those before 8 i, and states a latent frame."""


@dataclass(frozen=True, kw_only=True)
class EchoMimicConfig(ImageToVideoKind):
    """Its sizes; the defaults are the published ones. Rows come from `data.audio: {states: last, rate: 50, window: [5, 5]}`."""

    takes: ClassVar = ("text", "audio", "image", "beside", "regions")
    first_frames: ClassVar = 2  # latents 0 and 1 reach before the sound
    rows: ClassVar[str] = """
        audio2token.proj.weight               | audio2token.proj.weight           | D E
        audio2token.norm.*                    | audio2token.norm.*                | D
        blocks.{}.cross_attn.k_audio.weight   | blocks.{}.attn2.to_k_audio.weight | D D
        blocks.{}.cross_attn.v_audio.weight   | blocks.{}.attn2.to_v_audio.weight | D D
        blocks.{}.cross_attn.norm_k_audio.weight | blocks.{}.attn2.norm_k_audio.weight | D
    """
    audio_row: ClassVar = ("E", ROW)

    @classmethod
    def module_class(cls) -> type[AvatarTransformer]:
        return EchoMimicTransformer

    def build(self, dims: Dims) -> Any:
        if 2 * dims.stride != A_FRAME or dims.audio_dim % ROW or not dims.audio_dim:
            raise UserError(
                f"network: EchoMimicV3 reads {ROW} states a row and {A_FRAME // 2} pixel frames a latent frame: got rows of "
                f"{dims.audio_dim} numbers and codec.stride={dims.stride}; give data.audio states: last, rate: 50, window: [5, 5]"
            )
        return super().build(dims)

    @property
    def lora_targets(self) -> tuple[str, ...]:
        return (*super().lora_targets, "to_k_audio", "to_v_audio", "add_k_proj", "add_v_proj")


class AudioTokens(nn.Module):
    """States [B, .., E] -> tokens [B, .., D], layer-normalised."""

    def __init__(self, states: int, width: int):
        super().__init__()
        self.proj = nn.Linear(states, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, states: Tensor) -> Tensor:
        return self.norm(self.proj(states))


class AudioInput(NamedTuple):
    """Audio tokens [B, F, 17, D] of each latent frame, and the face [B, 1, S, 1] where they are added."""

    tokens: Tensor
    face: Tensor


class AudioContext(NamedTuple):
    """Keys and values [B, F, 17, M, d] of each latent frame's audio tokens, and the face [B, 1, S, 1]."""

    key: Tensor
    value: Tensor
    face: Tensor


class EchoMimicBlock(AvatarBlock):
    """Wan's block whose cross-attention takes each frame's audio too, in the face alone."""

    def add_audio(self, width: int, eps: float) -> None:
        """Make the keys and values of the sound."""
        attention = self.attn2
        attention.to_k_audio, attention.to_v_audio = (nn.Linear(width, width, bias=False) for _ in range(2))
        attention.norm_k_audio = nn.RMSNorm(width, eps=eps)

    def read_audio(self, audio: AudioInput | AudioContext | None) -> AudioContext | None:
        if not isinstance(audio, AudioInput):
            return audio
        attention: Any = self.attn2
        parts = attention.to_k_audio, attention.norm_k_audio, attention.to_v_audio, attention.heads
        both = keys_values(audio.tokens.flatten(0, 1), *parts)
        key, value = (x.unflatten(0, audio.tokens.shape[:2]) for x in both)
        return AudioContext(key, value, audio.face)

    def attend_conditions(self, query: Tensor, text: Any, image: Any, audio: Any) -> Tensor:
        attended = super().attend_conditions(query, text, image, None)
        if audio is None:
            return attended
        sound = self.attend_frames(query, audio.key, audio.value).unflatten(1, (audio.key.shape[1], -1))
        return attended + (sound * audio.face).flatten(1, 2)


class EchoMimicTransformer(AvatarTransformer):
    """The module, under diffusers' names of Wan and the published names of the audio path."""

    block_class = EchoMimicBlock
    _no_split_modules = ["EchoMimicBlock"]  # noqa: RUF012

    def make_kind(self) -> WanKind:
        return EchoMimicConfig.of(self.config)

    def add_audio(self, audio_dim: int) -> None:
        config, width = self.config, self.config.num_heads * self.config.head_dim
        self.audio_at = tuple(range(config.num_layers))
        self.audio2token = AudioTokens(audio_dim // ROW, width)
        for block in self.blocks:
            cast(EchoMimicBlock, block).add_audio(width, config.eps)

    def audio_inputs(
        self, audio: Tensor, numbers: Sequence[int] | None = None, regions: Tensor | None = None
    ) -> tuple[AudioInput, ...]:
        """The tokens of the rows [B, F, 4, A], and the face of regions [B, 1, H, W] (None: everywhere), of this rank's tokens where
        ranks share a frame's."""
        tokens = self.audio2token(windows(audio).to(self.compute_dtype))
        tokens = tokens * inside(numbers, audio.shape[1]).to(tokens).unsqueeze(-1)
        face = tokens.new_ones(1, 1, 1, 1)
        if regions is not None:
            face = regions[:, 0, :: self.patch, :: self.patch].flatten(1).to(tokens)
            split = self.split_of(1)
            face = (face if split is None else split.own(face))[:, None, :, None]
        return (AudioInput(tokens, face),) * len(self.blocks)

    @torch.no_grad()
    def read_audio(
        self, audio: Tensor, numbers: Sequence[int] | None = None, regions: Tensor | None = None
    ) -> tuple[AudioContext, ...]:
        given = zip(self.blocks, self.audio_inputs(audio, numbers, regions), strict=True)
        return tuple(cast(AudioContext, cast(EchoMimicBlock, block).read_audio(own)) for block, own in given)


def windows(audio: Tensor) -> Tensor:
    """Rows [B, F, 4, 11 E] of pixel frames 4 i - 3 .. 4 i -> the 17 states 8 i - 11 .. 8 i + 5 of latent frame i, [B, F, 17, E]:
    the first row's, and of the last row those from its own frame on."""
    states = audio.unflatten(-1, (ROW, -1))
    return torch.cat([states[:, :, 0], states[:, :, -1, ROW // 2 :]], dim=2)


def inside(numbers: Sequence[int] | None, frames: int) -> Tensor:
    """Which of the 17 states of each latent frame belong to the clip [1, F, 17]: none before its sound; without `numbers` the clip
    is whole, and there is none after its last pixel frame either."""
    first = torch.tensor(range(frames) if numbers is None else numbers).unsqueeze(1) * A_FRAME - BEFORE
    at = first + torch.arange(STATES)
    kept = at >= 0
    if numbers is None:
        kept &= at < A_FRAME * (frames - 1) + 2
    return kept.unsqueeze(0)
