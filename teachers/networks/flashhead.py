"""SoulX-FlashHead (2602.07449): Wan2.1's 1.3B transformer whose cross-attention reads sound in the place of text.

    o(attention(q, k v of the frame's audio tokens))        no text, no CLIP tokens, no mask

The input is [noisy | latents of a still video of the reference image]; frame 0 is given. Latent frame i >= 1, of s pixel frames,
reads the rows s i - s - 1 .. s i + 2 of the sound (8 in Pro, 12 in Lite), two of them, 80 ms, beyond its last pixel frame; frame 0
the rows -2 .. 2. The published files also hold an embedding of text and one of single audio states, which nothing reads; both are
kept, so that weights come out of a conversion as they went in.
B = batch, F = latent frames, D = width, K = audio tokens of a frame, A = numbers of an audio row with its neighbours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, cast

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from teachers.errors import UserError
from teachers.networks.blocks.wan import AvatarBlock
from teachers.networks.image_to_video import ImageToVideoKind
from teachers.networks.infinitetalk import AudioContext, AudioInput, AudioProjector, read_tokens
from teachers.networks.kind import Dims, KeyValue
from teachers.networks.wan import AvatarTransformer, initialise

SPATIAL = {4: 8, 8: 32}
"""Pixels of a latent's cell by its pixel frames: Wan2.1's codec (Pro), LTX-Video's (Lite)."""


@dataclass(frozen=True, kw_only=True)
class FlashHeadConfig(ImageToVideoKind):
    """Its sizes; the defaults are Pro's. Rows come from `data.audio: {states: layers, window: [2, 2]}`, the latents from
    `data.image: {name: still}`. `text_dim`, `audio_state`: widths of what the two unused embeddings would take."""

    takes: ClassVar = ("audio", "beside")
    first_frames: ClassVar = 1
    source: ClassVar = "Soul-AILab/SoulX-FlashHead-1_3B (Model_Pro or Model_Lite) from the Hugging Face hub"
    # E a single audio state; H hidden; near and later: the audio numbers of frame 0 of a clip and of every other
    rows: ClassVar[str] = """
        audio_emb.proj.1.*    | audio_emb.proj.1.*    | E E
        audio_emb.proj.0.*    | audio_emb.proj.0.*    | E
        audio_emb.proj.3.*    | audio_emb.proj.3.*    | D E
        audio_emb.proj.4.*    | audio_emb.proj.4.*    | D
        audio_proj.proj1.*    | audio_proj.proj1.*    | H near
        audio_proj.proj1_vf.* | audio_proj.proj1_vf.* | H later
        audio_proj.proj2.*    | audio_proj.proj2.*    | H H
        audio_proj.proj3.*    | audio_proj.proj3.*    | tokens H
        audio_proj.norm.*     | audio_proj.norm.*     | wide
    """
    audio_row: ClassVar = ("near", 1)

    reference: bool = True
    audio_hidden: int = 512
    audio_tokens: int = 32
    window: int = 5
    text_dim: int = 4096
    audio_state: int = 768

    @classmethod
    def module_class(cls) -> type[AvatarTransformer]:
        return FlashHead

    @staticmethod
    def input_channels(channels: int, stride: int, image_dim: int) -> tuple[int, ...]:  # noqa: ARG004
        return (2 * channels,)

    @staticmethod
    def own_config(sizes: Mapping[str, int], stride: int, config: Mapping[str, Any]) -> dict[str, Any]:
        near, later = sizes["near"], sizes["later"]
        window = near * (stride - 1) // max(1, later - near)
        if not window or near % window or near // window * (window + stride - 1) != later:
            raise UserError(
                f"weights do not fit: audio_proj reads {near} and {later} numbers, no window of rows at {stride} pixel frames a "
                "latent; copy the config.json of these weights, which has vae_stride, beside them"
            )
        return {
            "audio_tokens": sizes["tokens"] // sizes["wide"],
            "window": window,
            "audio_state": sizes["E"],
            "reference": config.get("reference", True),
        }

    @staticmethod
    def published_config(own: Mapping[str, Any]) -> dict[str, Any]:
        stride, patch = own["stride"], own["patch"]
        cell = SPATIAL.get(stride, SPATIAL[4])
        sizes = {"vae_stride": [stride, cell, cell], "patch_size": [1, patch, patch]}
        return {"_class_name": "WanModelAudioProject", "has_image_input": False, **sizes}

    def build(self, dims: Dims) -> "FlashHead":
        unread = {"text": dims.text_dim, "pose": dims.pose_dim, "image": dims.image_dim}
        if wrong := [f"{size} numbers of {name}" for name, size in unread.items() if size]:
            raise UserError(
                f"network flashhead: the data have {' and '.join(wrong)}, it reads audio alone; set data.text={{name: none}}, "
                "data.image={name: still} and pose_dim 0"
            )
        if not dims.audio_dim or dims.audio_dim % self.window or dims.speakers > 1 or dims.stride < 2:
            raise UserError(
                f"network flashhead: reads {self.window} neighbouring rows of one speaker: got rows of {dims.audio_dim} numbers of "
                f"{dims.speakers}, {dims.stride} pixel frames a latent; set data.audio states: layers, "
                f"window: [{self.window // 2}, {self.window // 2}]"
            )
        sizes = {name: getattr(dims, name) for name in ("latent_channels", "audio_dim", "stride")}
        return initialise(FlashHead(**sizes, **{field.name: getattr(self, field.name) for field in fields(self)}))

    def check(self) -> None:
        super().check()
        if self.window % 2 == 0 or self.window < 1:
            raise UserError(
                f"window {self.window}: network flashhead; give an odd number of audio rows, published is 5"
            )


class FlashHeadBlock(AvatarBlock):
    """Wan's text-to-video block whose keys and values are those of each frame's audio tokens."""

    def read_audio(self, audio: AudioInput | AudioContext) -> AudioContext:
        """Keys and values [B, F, K, M, d] of audio tokens [B, F, K, D]."""
        if not isinstance(audio, AudioInput):
            return audio
        key, value = (x.unflatten(0, audio.tokens.shape[:2]) for x in self.read(audio.tokens.flatten(0, 1)))
        return AudioContext(key, value)

    def attend_conditions(self, query: Tensor, text: Any, image: Any, audio: AudioContext) -> Tensor:  # noqa: ARG002
        return self.attend_frames(query, audio.key, audio.value)


class FlashHead(AvatarTransformer):
    """The module, under diffusers' names of Wan and the published names of the audio path. Text is not read."""

    block_class = FlashHeadBlock
    _no_split_modules = ["FlashHeadBlock"]  # noqa: RUF012
    _keep_in_fp32_modules = [*AvatarTransformer._keep_in_fp32_modules, "norm"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        latent_channels: int,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        ffn_dim: int,
        audio_dim: int,
        stride: int,
        text_dim: int = 4096,
        audio_state: int = 768,
        freq_dim: int = 256,
        patch: int = 2,
        audio_hidden: int = 512,
        audio_tokens: int = 32,  # noqa: ARG002, read from the config
        window: int = 5,  # noqa: ARG002, read from the config
        prediction: Literal["velocity", "reference"] = "velocity",
        reference: bool = True,
        eps: float = 1e-6,
        max_positions: int = 1024,
    ):
        super().__init__(
            *(latent_channels, num_layers, num_heads, head_dim, ffn_dim, text_dim, audio_dim, stride, freq_dim, patch),
            audio_hidden=audio_hidden,
            prediction=prediction,
            eps=eps,
            max_positions=max_positions,
        )
        self.register_to_config(reference=reference)
        width, size = num_heads * head_dim, (1, patch, patch)
        self.patch_embedding = nn.Conv3d(2 * latent_channels, width, kernel_size=size, stride=size)
        unused = nn.LayerNorm(audio_state), nn.Linear(audio_state, audio_state), nn.GELU()
        self.audio_emb = nn.ModuleDict(
            {"proj": nn.Sequential(*unused, nn.Linear(audio_state, width), nn.LayerNorm(width))}
        )
        self.kind = self.make_kind()

    def make_kind(self) -> FlashHeadConfig:
        return FlashHeadConfig(**{field.name: self.config[field.name] for field in fields(FlashHeadConfig)})

    def add_audio(self, audio_dim: int) -> None:
        config, width = self.config, self.config.num_heads * self.config.head_dim
        self.audio_at = tuple(range(config.num_layers))
        sizes = (config.stride, config.window, config.audio_hidden, config.audio_tokens, width)
        self.audio_proj = AudioProjector(audio_dim // config.window, *sizes)

    def audio_inputs(
        self,
        audio: Tensor,
        numbers: Sequence[int] | None = None,
        regions: Tensor | None = None,  # noqa: ARG002
    ) -> tuple[AudioInput, ...]:
        """The tokens of audio [B, F, stride, A], which all blocks share."""
        return (AudioInput(read_tokens(self, audio, numbers)),) * len(self.blocks)

    @torch.no_grad()
    def read_audio(
        self, audio: Tensor, numbers: Sequence[int] | None = None, regions: Tensor | None = None
    ) -> tuple[AudioContext, ...]:
        given = zip(self.blocks, self.audio_inputs(audio, numbers, regions), strict=True)
        return tuple(cast(FlashHeadBlock, block).read_audio(own) for block, own in given)

    def read_text(self, text: Tensor) -> tuple[KeyValue, ...]:  # noqa: ARG002
        """Nothing: text is not read."""
        return ()

    def forward(self, x: Tensor, sigma: Any, text: Any, *given: Any, **named: Any) -> Any:  # noqa: ARG002
        """As Wan's, whatever the text."""
        nothing: Any = (None,) * len(self.blocks)
        return super().forward(x, sigma, nothing, *given, **named)
