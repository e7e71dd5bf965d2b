"""StableAvatar (2508.08248): Wan2.1-Fun-1.3B-InP whose audio tokens are made of the sound, the noisy latents and the time.

    tokens of a frame   u += gate (LN(u) (1 + scale) + shift), u += attention(u, patch tokens of the frame), u += MLP, twice; a head
    cross-attention     o(attention(q, text) + attention(q, image) + attention(q, tokens of the frame))       one query for all

so they are made anew in every step, of each latent frame by itself: nothing of the sound but its windows is read ahead, and the
network is as causal as its sound. These are FantasyTalking's, wav2vec2's states 8 i - 11 .. 8 i + 5; states outside the clip are
zeros that take part, as in the published sampler. Dropped sound is tokens of zeros, whose keys and values are the biases.
B = batch, F = latent frames, S = tokens a frame, E = numbers of a state, D = width, M = heads, d = head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor, nn
from torch.nn import functional as F

from teachers.errors import UserError
from teachers.networks.echomimic import A_FRAME, ROW, STATES, windows
from teachers.networks.fantasytalking import AudioInput, FantasyTalkingBlock, inside
from teachers.networks.image_to_video import ImageToVideoKind
from teachers.networks.kind import Dims, NetworkKind
from teachers.networks.wan import AvatarTransformer, Time, WanKind

HEADS, DEPTH = 8, 2
"""Of the blocks that make the audio tokens, and how many of these there are."""


@dataclass(frozen=True, kw_only=True)
class StableAvatarConfig(ImageToVideoKind):
    """Its sizes; the defaults are the published ones. Rows come from `data.audio: {states: last, rate: 50, window: [5, 5]}`."""

    first_frames: ClassVar = 2  # latents 0 and 1 reach before the sound
    source: ClassVar = "StableAvatar-1.3B/transformer3d-square.pt of FrancisRing/StableAvatar from the Hugging Face hub"
    rows: ClassVar[str] = """
        vocal_projector.proj_model.proj.weight             | vocal_projector.proj.weight                 | D E
        vocal_projector.proj_model.norm.*                  | vocal_projector.norm.*                      | D
        vocal_projector.blocks.{}.modulation               | vocal_projector.blocks.{}.scale_shift_table | 1 6 D
        vocal_projector.blocks.{}.norm3.*                  | vocal_projector.blocks.{}.norm3.*           | D
        vocal_projector.blocks.{}.cross_attn.q.*           | vocal_projector.blocks.{}.attn.to_q.*       | D D
        vocal_projector.blocks.{}.cross_attn.k.*           | vocal_projector.blocks.{}.attn.to_k.*       | D D
        vocal_projector.blocks.{}.cross_attn.v.*           | vocal_projector.blocks.{}.attn.to_v.*       | D D
        vocal_projector.blocks.{}.cross_attn.o.*           | vocal_projector.blocks.{}.attn.to_out.0.*   | D D
        vocal_projector.blocks.{}.cross_attn.norm_q.weight | vocal_projector.blocks.{}.attn.norm_q.weight | D
        vocal_projector.blocks.{}.cross_attn.norm_k.weight | vocal_projector.blocks.{}.attn.norm_k.weight | D
        vocal_projector.blocks.{}.ffn.0.*                  | vocal_projector.blocks.{}.ffn.net.0.proj.*  | wide D
        vocal_projector.blocks.{}.ffn.2.*                  | vocal_projector.blocks.{}.ffn.net.2.*       | D wide
        vocal_projector.final_head.modulation              | vocal_projector.scale_shift_table           | 1 2 D
        vocal_projector.final_head.final_proj.*            | vocal_projector.proj_out.*                  | D D
        blocks.{}.cross_attn.k_vocal.*                     | blocks.{}.attn2.to_k_vocal.*                | D D
        blocks.{}.cross_attn.v_vocal.*                     | blocks.{}.attn2.to_v_vocal.*                | D D
    """
    audio_row: ClassVar = ("E", ROW)

    @classmethod
    def module_class(cls) -> type[AvatarTransformer]:
        return StableAvatar

    def build(self, dims: Dims) -> Any:
        if 2 * dims.stride != A_FRAME or dims.audio_dim % ROW or not dims.audio_dim:
            raise UserError(
                f"network: StableAvatar reads {ROW} states a row and {A_FRAME // 2} pixel frames a latent frame: got rows of "
                f"{dims.audio_dim} numbers and codec.stride={dims.stride}; give data.audio states: last, rate: 50, window: [5, 5]"
            )
        return super().build(dims)

    def check(self) -> None:
        super().check()
        if self.num_heads * self.head_dim % HEADS:
            raise UserError(
                f"width {self.num_heads * self.head_dim}: network stableavatar; audio tokens have {HEADS} heads, give a multiple"
            )

    def check_sequence(self, ranks: int, tokens: int) -> None:
        """Refused: audio tokens are made of all tokens of a frame, which ranks would share."""
        NetworkKind.check_sequence(self, ranks, tokens)

    @property
    def lora_targets(self) -> tuple[str, ...]:
        return (*super().lora_targets, "to_k_vocal", "to_v_vocal", "add_k_proj", "add_v_proj")


class ProjectedStates(NamedTuple):
    """What the sound alone decides: projected states [B, F, 17, D] of each latent frame's window, zeros outside the clip, and
    whether the frame has any sound [B, F, 1, 1]."""

    tokens: Tensor
    present: Tensor


class FrameAttention(nn.Module):
    """Attention of audio tokens to the patch tokens of their own frame."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q, self.norm_k = (nn.RMSNorm(width, eps=eps) for _ in range(2))

    def forward(self, x: Tensor, frame: Tensor) -> Tensor:
        """x [B, F, 17, D], frame [B, F, S, D] -> [B, F, 17, D]."""
        parts = self.norm_q(self.to_q(x)).type_as(x), self.norm_k(self.to_k(frame)).type_as(x), self.to_v(frame)
        query, key, value = (part.flatten(0, 1).unflatten(2, (HEADS, -1)).transpose(1, 2) for part in parts)
        return self.to_out[0](F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape))


class TokenBlock(nn.Module):
    """A block of the audio tokens, modulated as Wan's; where Wan has self-attention it has nothing but the modulation."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, width) / width**0.5)
        self.norm3 = FP32LayerNorm(width, eps)
        self.attn, self.eps = FrameAttention(width, eps), eps
        self.ffn = FeedForward(width, inner_dim=2 * width, activation_fn="gelu-approximate")

    def forward(self, x: Tensor, modulation: Tensor, frame: Tensor) -> Tensor:
        """x [B, F, 17, D], modulation [B, F or 1, 6, D] in fp32, patch tokens of the frames [B, F, S, D] -> [B, F, 17, D]."""
        shift, scale, gate, shift2, scale2, gate2 = (self.scale_shift_table + modulation).unsqueeze(3).unbind(2)
        x = (x.float() + gate * (plain_norm(x, self.eps) * (1 + scale) + shift)).type_as(x)
        x = x + self.attn(self.norm3(x.float()).type_as(x), frame)
        normed = (plain_norm(x, self.eps) * (1 + scale2) + shift2).type_as(x)
        return (x.float() + gate2 * self.ffn(normed).float()).type_as(x)


class VocalProjector(nn.Module):
    """States of the sound, patch tokens and time -> audio tokens."""

    def __init__(self, states: int, width: int, eps: float):
        super().__init__()
        self.proj = nn.Linear(states, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(TokenBlock(width, eps) for _ in range(DEPTH))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, width) / width**0.5)
        self.proj_out, self.eps = nn.Linear(width, width), eps

    def forward(self, tokens: Tensor, frame: Tensor, time: Tensor, modulation: Tensor) -> Tensor:
        """Projected states [B, F, 17, D], patch tokens [B, F, S, D], time [B, F or 1, D] and its projection [B, F or 1, 6, D] ->
        audio tokens [B, F, 17, D]."""
        for block in self.blocks:
            tokens = block(tokens, modulation, frame)
        shift, scale = (self.scale_shift_table + time.float().unsqueeze(2)).unsqueeze(3).unbind(2)
        return self.proj_out((plain_norm(tokens, self.eps) * (1 + scale) + shift).type_as(tokens))


class StableAvatarBlock(FantasyTalkingBlock):
    """FantasyTalking's block, whose keys and values of the sound have biases."""

    maps = ("to_k_vocal", "to_v_vocal")
    biased = True


class StableAvatar(AvatarTransformer):
    """The module, under diffusers' names of Wan."""

    block_class = StableAvatarBlock
    _no_split_modules = ["StableAvatarBlock"]  # noqa: RUF012

    def make_kind(self) -> WanKind:
        return StableAvatarConfig.of(self.config)

    def add_audio(self, audio_dim: int) -> None:
        config, width = self.config, self.config.num_heads * self.config.head_dim
        self.audio_at = tuple(range(config.num_layers))
        self.vocal_projector = VocalProjector(audio_dim // ROW, width, config.eps)
        for block in self.blocks:
            cast(StableAvatarBlock, block).add_audio(width, width)

    def audio_inputs(
        self,
        audio: Tensor,
        numbers: Sequence[int] | None = None,
        regions: Tensor | None = None,  # noqa: ARG002
    ) -> tuple[ProjectedStates, ...]:
        """The projected states of the rows [B, F, 4, 11 E]: what there is of the sound before latents and time are known."""
        own = self.vocal_projector
        tokens = own.norm(own.proj(windows(audio).to(self.compute_dtype)))
        kept = [[t in part for t in range(STATES)] for part in inside(numbers, audio.shape[1])]
        present = audio.flatten(2).any(2)[..., None, None].to(tokens)
        return (ProjectedStates(tokens * torch.tensor(kept).to(tokens).unsqueeze(-1), present),) * len(self.blocks)

    def with_latents(self, audio: Any, x: Tensor, time: Time) -> tuple[AudioInput, ...]:
        states, embedder = audio[0], self.condition_embedder
        projected = embedder.time_proj(embedder.act_fn(time[0]).to(embedder.time_proj.weight.dtype))
        frame = x.unflatten(1, (states.tokens.shape[1], -1))
        tokens = self.vocal_projector(states.tokens, frame, time[0], projected.unflatten(2, (6, -1)).float())
        return (AudioInput(tokens * states.present),) * len(self.blocks)


def plain_norm(x: Tensor, eps: float) -> Tensor:
    """Layer norm without gain and offset, in fp32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps)
