"""FantasyTalking (2504.04842): Wan2.1 image-to-video 14B whose cross-attention reads sound beside text and image.

    o(attention(q, text) + attention(q, image) + attention(q, audio of the frame))        one query for all three

The keys of the sound are not normalised. Latent frame i reads the 17 states 8 i - 11 .. 8 i + 5 of wav2vec2 at 50 a second, two a
pixel frame: 4 states, 80 ms, beyond its last pixel frame. States outside the clip are masked: the published windows are padded at
their right and read up to a length. Dropped sound is no token at all. B = batch, F = latent frames, E = numbers of a state,
W = width of a token, M = heads, d = head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from teachers.errors import UserError
from teachers.networks.blocks.wan import AvatarBlock
from teachers.networks.echomimic import A_FRAME, BEFORE, ROW, STATES, AudioTokens, windows
from teachers.networks.image_to_video import SIZES, ImageToVideoKind
from teachers.networks.kind import Dims
from teachers.networks.wan import AvatarTransformer, initialise


@dataclass(frozen=True, kw_only=True)
class FantasyTalkingConfig(ImageToVideoKind):
    """Its sizes; the defaults are the published ones. Rows come from `data.audio: {states: last, rate: 50, window: [5, 5]}`, audio
    tokens have `audio_hidden` numbers."""

    first_frames: ClassVar = 2  # latents 0 and 1 reach before the sound
    source: ClassVar = (
        "fantasytalking_model.ckpt of acvlab/FantasyTalking and Wan-AI/Wan2.1-I2V-14B-720P from the Hugging Face hub"
    )
    apart: ClassVar = True
    entries: ClassVar = ("proj_model", "audio_processor")
    rows: ClassVar[str] = """
        proj_model.proj.weight | proj_model.proj.weight | H E
        proj_model.norm.*      | proj_model.norm.*      | H
        audio_processor.blocks.{}.cross_attn.processor.k_proj.weight | blocks.{}.attn2.audio_k_proj.weight | D H
        audio_processor.blocks.{}.cross_attn.processor.v_proj.weight | blocks.{}.attn2.audio_v_proj.weight | D H
    """
    audio_row: ClassVar = ("E", ROW)

    num_layers: int = 40
    num_heads: int = 40
    ffn_dim: int = 13824
    audio_hidden: int = 2048

    @classmethod
    def module_class(cls) -> type[AvatarTransformer]:
        return FantasyTalking

    def build(self, dims: Dims) -> "FantasyTalking":
        if 2 * dims.stride != A_FRAME or dims.audio_dim % ROW or not dims.audio_dim:
            raise UserError(
                f"network: FantasyTalking reads {ROW} states a row and {A_FRAME // 2} pixel frames a latent frame: got rows of "
                f"{dims.audio_dim} numbers and codec.stride={dims.stride}; give data.audio states: last, rate: 50, window: [5, 5]"
            )
        sizes = {name: size for name, size in vars(dims).items() if name not in ("speakers", "pose_dim")}
        sizes |= {name: getattr(self, name) for name in (*SIZES, "audio_hidden")}
        return initialise(FantasyTalking(**sizes))

    @property
    def lora_targets(self) -> tuple[str, ...]:
        return (*super().lora_targets, "audio_k_proj", "audio_v_proj", "add_k_proj", "add_v_proj")


class AudioInput(NamedTuple):
    """Audio tokens [B, F, 17, W] of each latent frame, of which the first `seen` [F] are read (None: all)."""

    tokens: Tensor
    seen: Tensor | None = None


class AudioContext(NamedTuple):
    """Keys and values [B, F, 17, M, d] of each latent frame's audio tokens, `seen` as `AudioInput` has it."""

    key: Tensor
    value: Tensor
    seen: Tensor | None = None


class FantasyTalkingBlock(AvatarBlock):
    """Wan's block whose cross-attention takes each frame's audio too."""

    maps: ClassVar = ("audio_k_proj", "audio_v_proj")
    biased: ClassVar = False

    def add_audio(self, width: int, audio_width: int) -> None:
        """Make the maps of audio tokens to keys and to values."""
        for name in self.maps:
            setattr(self.attn2, name, nn.Linear(audio_width, width, bias=self.biased))

    def read_audio(self, audio: AudioInput | AudioContext | None) -> AudioContext | None:
        if not isinstance(audio, AudioInput):
            return audio
        attention: Any = self.attn2
        key, value = (getattr(attention, name)(audio.tokens).unflatten(-1, (attention.heads, -1)) for name in self.maps)
        return AudioContext(key, value, audio.seen)

    def attend_conditions(self, query: Tensor, text: Any, image: Any, audio: AudioContext | None) -> Tensor:
        attended = super().attend_conditions(query, text, image, None)
        return attended if audio is None else attended + self.attend_frames(query, audio.key, audio.value, audio.seen)


class FantasyTalking(AvatarTransformer):
    """The module, under diffusers' names of Wan."""

    block_class = FantasyTalkingBlock
    _no_split_modules = ["FantasyTalkingBlock"]  # noqa: RUF012

    def make_kind(self) -> FantasyTalkingConfig:
        config: Any = self.config
        return FantasyTalkingConfig(**{name: config[name] for name in (*SIZES, "audio_hidden")})

    def add_audio(self, audio_dim: int) -> None:
        config = self.config
        self.audio_at = tuple(range(config.num_layers))
        self.proj_model = AudioTokens(audio_dim // ROW, config.audio_hidden)
        for block in self.blocks:
            cast(FantasyTalkingBlock, block).add_audio(config.num_heads * config.head_dim, config.audio_hidden)

    def audio_inputs(
        self,
        audio: Tensor,
        numbers: Sequence[int] | None = None,
        regions: Tensor | None = None,  # noqa: ARG002
    ) -> tuple[AudioInput, ...]:
        """The tokens of the rows [B, F, 4, 11 E], those of the clip first; zeros where a frame's rows are."""
        tokens = self.proj_model(windows(audio).to(self.compute_dtype))
        tokens = tokens * audio.flatten(2).any(2)[..., None, None].to(tokens)
        parts, seen = inside(numbers, audio.shape[1]), None
        if any(len(part) < STATES for part in parts):
            order = torch.tensor([[*part, *(t for t in range(STATES) if t not in part)] for part in parts])
            tokens = tokens.gather(2, order.to(tokens.device)[None, ..., None].expand_as(tokens))
            seen = torch.tensor([len(part) for part in parts], device=tokens.device)
        return (AudioInput(tokens, seen),) * len(self.blocks)

    @torch.no_grad()
    def read_audio(
        self, audio: Tensor, numbers: Sequence[int] | None = None, regions: Tensor | None = None
    ) -> tuple[AudioContext, ...]:
        given = zip(self.blocks, self.audio_inputs(audio, numbers, regions), strict=True)
        return tuple(cast(AudioContext, cast(FantasyTalkingBlock, block).read_audio(own)) for block, own in given)


def inside(numbers: Sequence[int] | None, frames: int) -> list[range]:
    """Which of the 17 states of each latent frame belong to the clip: none before its sound; without `numbers` the clip is whole,
    and there is none after those that wav2vec2 makes of its sound, one less than two a pixel frame."""
    end = float("inf") if numbers is not None else A_FRAME * (frames - 1) + 1
    first = (A_FRAME * number - BEFORE for number in (range(frames) if numbers is None else numbers))
    return [range(max(0, -at), int(min(STATES, end - at))) for at in first]
