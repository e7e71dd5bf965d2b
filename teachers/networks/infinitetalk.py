"""InfiniteTalk (2508.14033) and MultiTalk (2505.22647): Wan 2.1 image-to-video whose blocks attend to audio before the MLP.

Each latent frame's tokens attend to `audio_tokens` of every speaker, those of that frame alone. With two speakers the keys of the
first are rotated to position 2 and those of the second to 22; a query is rotated to where its token looks in frame 0: 0 .. 4 in the
first speaker's region, 20 .. 24 in the second's, 12 in neither.
B = batch, F = latent frames, S = tokens a frame, N = F S, D = width, M = heads, d = head width, P = speakers, K = P tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor, nn
from torch.nn import functional as F

from teachers.errors import UserError
from teachers.networks.blocks.wan import AvatarBlock
from teachers.networks.image_to_video import ImageToVideoKind
from teachers.networks.kind import Dims
from teachers.networks.sequence import Split
from teachers.networks.spans import rotate
from teachers.networks.wan import AvatarTransformer, initialise

PLACES = ((0.0, 4.0), (20.0, 24.0))
"""Positions of the queries of either speaker; their keys lie in the middle. 12 is the background's."""
BACKGROUND = 12.0


@dataclass(frozen=True, kw_only=True)
class InfiniteTalkConfig(ImageToVideoKind):
    """Size of the network. `window`: neighbouring audio rows, an odd number, that each row of the conditions has side by side.

    `reference`: latent frame 0 is given and never drawn (InfiniteTalk); false: it is drawn like every other (MultiTalk). The
    adapters of one and of two speakers have the same shapes; how many there are is the data's `speakers`.
    """

    first_frames: ClassVar = 1
    source: ClassVar = (
        "MeiGen-AI/InfiniteTalk (single/ or multi/) or MeiGen-AI/MeiGen-MultiTalk, and Wan-AI/Wan2.1-I2V-14B-480P from the "
        "Hugging Face hub"
    )
    # H hidden; near and later: the audio numbers of frame 0 of a clip and of every other
    rows: ClassVar[str] = """
        audio_proj.proj1_vf.*                  | audio_proj.proj1_vf.*                  | H later
        audio_proj.proj1.*                     | audio_proj.proj1.*                     | H near
        audio_proj.proj2.*                     | audio_proj.proj2.*                     | H H
        audio_proj.proj3.*                     | audio_proj.proj3.*                     | tokens H
        audio_proj.norm.*                      | audio_proj.norm.*                      | wide
        blocks.{}.audio_cross_attn.q_linear.*  | blocks.{}.audio_cross_attn.q_linear.*  | D D
        blocks.{}.audio_cross_attn.kv_linear.* | blocks.{}.audio_cross_attn.kv_linear.* | 2D wide
        blocks.{}.audio_cross_attn.proj.*      | blocks.{}.audio_cross_attn.proj.*      | D D
        blocks.{}.norm_x.*                     | blocks.{}.norm_x.*                     | D
    """
    audio_row: ClassVar = ("near", 1)
    apart: ClassVar = True

    num_layers: int = 40
    num_heads: int = 40
    ffn_dim: int = 13824
    audio_hidden: int = 512
    audio_width: int = 768
    audio_tokens: int = 32
    window: int = 5
    reference: bool = True

    @classmethod
    def module_class(cls) -> type[AvatarTransformer]:
        return InfiniteTalk

    @staticmethod
    def own_config(sizes: Mapping[str, int], stride: int, config: Mapping[str, Any]) -> dict[str, Any]:
        speakers = config.get("speakers", 1)
        return {
            "audio_dim": speakers * sizes["near"],
            "audio_width": sizes["wide"],
            "audio_tokens": sizes["tokens"] // sizes["wide"],
            "window": sizes["near"] * (stride - 1) // (sizes["later"] - sizes["near"]),
            "speakers": speakers,
            "reference": config.get("reference", True),
        }

    def build(self, dims: Dims) -> "InfiniteTalk":
        if dims.pose_dim:
            raise UserError(
                f"network infinitetalk: takes no pose, the data have {dims.pose_dim} numbers; set pose_dim 0"
            )
        sizes = {name: value for name, value in vars(dims).items() if name != "pose_dim"}
        return initialise(InfiniteTalk(**sizes, **{field.name: getattr(self, field.name) for field in fields(self)}))

    def student(self, net: Any, spec: Any) -> Any:
        history = spec.history
        if spec.speakers > 1 and history.window is not None and not history.sinks:
            raise UserError(
                "student.history.sinks: got 0; tokens find their speaker by frame 0, which every chunk has to see; set it to 1"
            )
        return super().student(net, spec)

    def check(self) -> None:
        super().check()
        if self.window % 2 == 0 or self.window < 1:
            raise UserError(
                f"window {self.window}: network infinitetalk; give an odd number of audio rows, published is 5"
            )

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Wan's matrices, and those of the attention to audio."""
        return (*super().lora_targets, "q_linear", "kv_linear", "audio_cross_attn.proj")


class AudioInput(NamedTuple):
    """Audio tokens [B, F, K, W] of each latent frame; the rest as `AudioContext` has it."""

    tokens: Tensor
    spoken: Tensor | None = None
    regions: Tensor | None = None
    split: Split | None = None


class AudioContext(NamedTuple):
    """What a block attends to: keys and values [B, F, K, M, d] of each latent frame's audio; with two speakers `spoken` [B, F],
    0 where a frame's audio is empty, and `regions` [B, P + 1, S], which sum to 1, the last the background. With a `split` a rank
    has all tokens of its heads where it looks for places, and its own tokens where these are used."""

    key: Tensor
    value: Tensor
    spoken: Tensor | None = None
    regions: Tensor | None = None
    split: Split | None = None

    def places(self, query: Tensor, key: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """The positions [B, n] of query tokens [B, n, M, d], both rotated, the keys of frame 0 first, where there are regions."""
        assert self.regions is not None
        (count, size), width = self.regions.shape[1:], query.shape[-1]
        value = F.pad(self.regions.mT, (0, width - count)).unsqueeze(2).expand(-1, -1, query.shape[2], -1)
        seen = attend(query, key[:, :size], value.to(query))
        maps = seen.unflatten(2, (-1, width))[..., :count].mean(dim=2)
        return positions(maps if self.split is None else self.split.mean(maps))

    def own(self, places: Sequence[Tensor | None]) -> Tensor:
        """The positions [B, n] of this rank's tokens, of those that `places` gave of each span, in the order of the tokens."""
        at = torch.cat([place for place in places if place is not None], dim=1)
        return at if self.split is None else self.split.own(at)


class AudioProjector(nn.Module):
    """Audio rows of latent frames -> tokens. Frame 0 of a clip, one pixel frame, takes the `window` rows around it; every other the
    rows from `window // 2` before its first pixel frame to as many after its last."""

    def __init__(self, channels: int, stride: int, window: int, hidden: int, tokens: int, width: int):
        super().__init__()
        self.middle, self.tokens = window // 2, tokens
        self.proj1 = nn.Linear(window * channels, hidden)
        self.proj1_vf = nn.Linear((window + stride - 1) * channels, hidden)
        self.proj2 = nn.Linear(hidden, hidden)
        self.proj3 = nn.Linear(hidden, tokens * width)
        self.norm = FP32LayerNorm(width)

    def forward(self, rows: Tensor, first: Sequence[bool]) -> Tensor:
        """rows [B, F, stride, window, channels], first [F]: whether it is frame 0 of a clip -> [B, F, tokens, width]."""
        middle = self.middle
        parts = rows[:, :, 0, : middle + 1], rows[:, :, 1:-1, middle], rows[:, :, -1, middle:]
        hidden = self.proj1_vf(torch.cat(parts, dim=2).flatten(2))
        if any(first):
            own = self.proj1(rows[:, :, -1].flatten(2))
            hidden = torch.stack([(own if at_start else hidden)[:, i] for i, at_start in enumerate(first)], dim=1)
        hidden = hidden.relu()
        return self.norm(self.proj3(self.proj2(hidden).relu()).unflatten(2, (self.tokens, -1)))


class AudioAttention(nn.Module):
    """The matrices of a block's attention to audio; no norm of queries and keys, no gate."""

    def __init__(self, dim: int, audio_width: int):
        super().__init__()
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(audio_width, 2 * dim)
        self.proj = nn.Linear(dim, dim)


class InfiniteTalkBlock(AvatarBlock):
    """Wan's image-to-video block with attention to audio between the attention to text and the MLP."""

    def add_audio(self, dim: int, audio_width: int, eps: float) -> None:
        self.audio_cross_attn = AudioAttention(dim, audio_width)
        self.norm_x = FP32LayerNorm(dim, eps)

    def read_audio(self, audio: AudioInput | AudioContext | None) -> AudioContext | None:
        """Keys and values of audio tokens, with two speakers the keys rotated to the middle of their speaker's places."""
        if not isinstance(audio, AudioInput):
            return audio
        key, value = self.keys_values(audio.tokens)
        if audio.spoken is not None:
            centres = torch.tensor([sum(ends) / 2 for ends in PLACES], device=key.device)
            at = (audio.spoken.unsqueeze(-1) * centres.repeat_interleave(key.shape[2] // len(PLACES))).flatten(1)
            key = rotate(key.flatten(1, 2), turns(at, key.shape[-1])).view_as(key)
        return AudioContext(key, value, *audio[1:])

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, F, K, M, d] of audio tokens [B, F, K, W]."""
        key, value = self.audio_cross_attn.kv_linear(tokens).unflatten(-1, (2, self.attn1.heads, -1)).unbind(3)
        return key, value

    @torch.no_grad()
    def locate(self, query: Tensor, key: Tensor, audio: AudioContext | None) -> Tensor | None:
        """The positions of query tokens (`AudioContext.places`); None with one speaker."""
        return None if audio is None or audio.regions is None else audio.places(query, key, self.attend)

    def after_conditions(self, x: Tensor, audio: AudioContext | None, places: Sequence[Tensor | None] = ()) -> Tensor:
        """x [B, N, D] with what each token takes of its frame's audio added; `places` of `locate`, in the order of the tokens."""
        if audio is None:
            return x
        own = self.audio_cross_attn
        query = own.q_linear(self.norm_x(x.float()).type_as(x)).unflatten(2, (self.attn1.heads, -1))
        if audio.spoken is not None:
            at = audio.own(places).unflatten(1, (audio.spoken.shape[1], -1)) * audio.spoken.unsqueeze(-1)
            query = rotate(query, turns(at.flatten(1), query.shape[-1]))
        return x + own.proj(self.attend_frames(query, audio.key, audio.value))


class InfiniteTalk(AvatarTransformer):
    """Wan 2.1 image-to-video, input [noisy | mask | latents of the image and grey frames], with audio.

    `audio_dim` numbers of an audio row, `window` neighbours of all `speakers` side by side.
    """

    block_class = InfiniteTalkBlock
    _no_split_modules = ["InfiniteTalkBlock"]  # noqa: RUF012
    _keep_in_fp32_modules = [*AvatarTransformer._keep_in_fp32_modules, "norm_x", "norm"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        latent_channels: int,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        ffn_dim: int,
        text_dim: int,
        audio_dim: int,
        stride: int,
        image_dim: int,
        speakers: int = 1,  # noqa: ARG002, read from the config
        freq_dim: int = 256,
        patch: int = 2,
        audio_hidden: int = 512,
        audio_width: int = 768,  # noqa: ARG002, read from the config
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
            image_dim=image_dim,
            eps=eps,
            max_positions=max_positions,
        )
        self.register_to_config(reference=reference)  # the base's says how many channels there are
        self.kind = self.make_kind()

    def make_kind(self) -> InfiniteTalkConfig:
        names = [field.name for field in fields(InfiniteTalkConfig)]
        return InfiniteTalkConfig(**{name: self.config[name] for name in names})

    def add_audio(self, audio_dim: int) -> None:
        config = self.config
        neighbours = config.speakers * config.window
        if audio_dim % neighbours:
            raise UserError(
                f"network infinitetalk: an audio row has {audio_dim} numbers, not {config.window} neighbours of "
                f"{config.speakers} speakers; set data.audio.window=[{config.window // 2},{config.window // 2}]"
            )
        sizes = (config.stride, config.window, config.audio_hidden, config.audio_tokens, config.audio_width)
        self.audio_proj = AudioProjector(audio_dim // neighbours, *sizes)
        self.audio_at = tuple(range(config.num_layers))
        for block in self.blocks:
            cast(InfiniteTalkBlock, block).add_audio(config.num_heads * config.head_dim, config.audio_width, config.eps)

    def audio_inputs(
        self, audio: Tensor, numbers: Sequence[int] | None = None, regions: Tensor | None = None
    ) -> tuple[AudioInput, ...]:
        """The tokens of audio [B, F, stride, A]; regions [B, P, H, W], with two speakers. UserError without."""
        speakers = self.config.speakers
        tokens = read_tokens(self, audio, numbers, speakers)
        if speakers == 1:
            return (AudioInput(tokens),) * len(self.blocks)
        spoken = audio.flatten(2).any(dim=2).float()
        known = spoken, shares(regions, speakers, self.patch), self.split_of(audio.shape[1])
        return (AudioInput(tokens, *known),) * len(self.blocks)

    @torch.no_grad()
    def read_audio(
        self, audio: Tensor, numbers: Sequence[int] | None = None, regions: Tensor | None = None
    ) -> tuple[AudioContext, ...]:
        given = zip(self.blocks, self.audio_inputs(audio, numbers, regions), strict=True)
        return tuple(cast(AudioContext, cast(InfiniteTalkBlock, block).read_audio(own)) for block, own in given)


def read_tokens(net: Any, audio: Tensor, numbers: Sequence[int] | None, speakers: int = 1) -> Tensor:
    """Tokens [B, F, K, W] of audio [B, F, stride, A] by the network's `audio_proj`, those of every speaker side by side, in
    its type of computing; numbers as `read_audio` has them."""
    first = [number == 0 for number in (range(audio.shape[1]) if numbers is None else numbers)]
    rows = audio.to(net.compute_dtype).unflatten(-1, (speakers, net.config.window, -1))
    tokens = torch.cat([net.audio_proj(rows[:, :, :, i], first) for i in range(speakers)], dim=2)
    return tokens.to(net.compute_dtype)


def turns(at: Tensor, head_dim: int) -> Tensor:
    """Unit complex numbers [B, n, 1, d/2] of positions [B, n], over the whole head, theta 10000."""
    index = torch.arange(0, head_dim, 2, device=at.device, dtype=at.dtype)
    angles = at.unsqueeze(-1) * 10000.0 ** (-index / head_dim)
    return torch.polar(torch.ones_like(angles), angles).unsqueeze(2)


def positions(maps: Tensor) -> Tensor:
    """Positions [B, n] of tokens by how much each attends to the regions of two speakers and the background, maps [B, n, 3]: of
    the region that it attends to most, there by its share between the least and the most of the tokens."""
    least, most = maps.amin(dim=1, keepdim=True), maps.amax(dim=1, keepdim=True)
    share = (maps - least) / (most - least + 1e-8)
    own = [low + share[..., i] * (high - low) for i, (low, high) in enumerate(PLACES)]
    at = torch.stack([*own, torch.full_like(own[0], BACKGROUND)], dim=-1)
    return at.gather(-1, maps.argmax(dim=-1, keepdim=True)).squeeze(-1).float()


def shares(regions: Tensor | None, speakers: int, patch: int) -> Tensor:
    """Regions [B, P, H, W] on the latent grid -> [B, P + 1, S], the tokens of each with an equal share of 1, the background last.
    UserError where a speaker has none."""
    if regions is None or regions.shape[1] != speakers:
        raise UserError(
            f"regions: {'none' if regions is None else regions.shape[1]} for {speakers} speakers; "
            "set data.image.name=wan_speakers, or give one for each"
        )
    masks = regions[..., ::patch, ::patch].gt(0).float()  # the nearest cell, as published
    masks = torch.cat([masks, 1 - masks.amax(dim=1, keepdim=True)], dim=1).flatten(2)
    return masks / masks.sum(dim=-1, keepdim=True).clamp(min=1)
