"""The avatar DiT: diffusers' Wan transformer with reference and mask channels and OmniAvatar's audio pack.

One network serves teacher, fake score and student: the attention mask is an argument (`spans`, `past`), not a subclass. Weights
keep the names of diffusers' WanTransformer3DModel; without audio and spans its output equals that class, text- and image-to-video
(tests hold it).
B = batch, F = latent frames, h w = latent tokens per side, S = h*w tokens a frame, N = F*S, D = width, M = heads, d = head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, cast

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanTimeTextImageEmbedding
from torch import Tensor, nn

from teachers import flow
from teachers.conditions import Conditions
from teachers.networks.blocks.wan import AudioPack, AvatarBlock, TimeSinusoids
from teachers.networks.kind import Dims, KeyValue, PastParts, RaggedPast, write_reference
from teachers.networks.sequence import Split
from teachers.networks.spans import Arranged, BlockSpans, Span, SpanKind, SpanTransformer

GUIDANCE_TIME = 10.0  # of a scale of 1 on time's sinusoids, whose fastest then turns 1.6 times: a smooth embedding
Time = tuple[Tensor, tuple[Tensor, ...]]  # embedding [B, F, D] and each block's modulation [B, F, 6, D]; B, F may be 1


@dataclass(frozen=True, kw_only=True)
class WanKind(SpanKind):
    """What every network of Wan's shape shares: the names of its parts."""

    def run(
        self,
        net: "AvatarTransformer",
        inputs: Tensor,
        sigma: Tensor,
        conditions: Conditions,
        numbers: Sequence[int] | None = None,
        known: Sequence[int] = (),  # noqa: ARG002
    ) -> Tensor:
        audio = conditions.audio if conditions.clip_audio is None else conditions.clip_audio
        given = {"pose": conditions.pose, "remember": False, "guidance": conditions.guidance, "numbers": numbers}
        given |= {"image": conditions.image if net.image_dim else None, "regions": conditions.regions}
        return net(inputs, sigma, conditions.text, audio, **given)[0]

    @classmethod
    def module_class(cls) -> "type[AvatarTransformer]":
        return AvatarTransformer

    def set_attention(self, net: "AvatarTransformer", backend: str) -> None:
        # the context's end undoes what diffusers changes beside this network's: the backend of all others
        with attention_backend():
            net.set_attention_backend(backend)

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """OmniAvatar's q, k, v, o, ffn.0, ffn.2: every matrix of both attentions and of the MLP."""
        return ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(WanKind):
    """Size of the avatar DiT. `audio_blocks` null is the published rule: before blocks 2 .. num_layers // 2 (OmniAvatar).

    `prediction`: what the last layer gives. velocity (Wan); or x0 as a difference to the reference latent, which a few million
    parameters learn sooner. `reference` false: plain text-to-video, no frame is given. `guidance`: so many scales are embedded.
    """

    layouts: ClassVar = ("wan", "diffusers", "omniavatar", "self-forcing")

    audio_hidden: int = 32
    audio_blocks: tuple[int, ...] | None = None
    prediction: Literal["velocity", "reference"] = "velocity"
    reference: bool = True
    guidance: int = 0

    def build(self, dims: Dims) -> "AvatarTransformer":
        sizes = {k: v for k, v in vars(dims).items() if k not in ("speakers", "image_dim")}
        return build_network(self, **sizes)

    def compose(self, x: Tensor, conditions: Conditions, known: Sequence[int]) -> tuple[Tensor, Tensor]:
        return with_reference(x, conditions, known)

    def shallow(self, blocks: int = 1) -> "NetworkConfig":
        return self if blocks >= self.num_layers else replace(self, num_layers=blocks, audio_blocks=self.audio_at)

    @property
    def audio_at(self) -> tuple[int, ...]:
        """The blocks that audio is added before."""
        return tuple(range(2, self.num_layers // 2 + 1)) if self.audio_blocks is None else tuple(self.audio_blocks)

    def with_guidance(self, scales: int) -> "NetworkConfig":
        return replace(self, guidance=scales)


class AvatarTransformer(SpanTransformer):
    """Wan's transformer over [noisy | reference | mask] channels, audio added before chosen blocks.

    `audio_dim` 0 and `reference` false make it plain Wan 2.1 text-to-video (2503.20314), which has the noisy channels alone.
    `image_dim` is the width of CLIP's image features, 1280 for Wan 2.1 image-to-video: every block attends to them beside the
    text, and the input is [noisy | mask of `stride` channels, 1 = known | latent of the image], 16 + 4 + 16 channels.
    `guidance`: so many guidance scales are embedded beside the time, sinusoids and a layer that starts at zero (2210.03142, 3.1).
    """

    block_class: type[AvatarBlock] = AvatarBlock
    _no_split_modules = ["AvatarBlock"]  # noqa: RUF012
    _keep_in_fp32_modules = [  # noqa: RUF012
        *("rope", "time_embedder", "guidance_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
    ]

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
        freq_dim: int = 256,
        patch: int = 2,
        audio_hidden: int = 32,
        audio_blocks: tuple[int, ...] | None = None,  # noqa: ARG002  # read from the config
        prediction: Literal["velocity", "reference"] = "velocity",
        reference: bool = True,
        pose_dim: int = 0,
        image_dim: int = 0,
        eps: float = 1e-6,
        max_positions: int = 1024,
        guidance: int = 0,
    ):
        super().__init__()
        width = num_heads * head_dim
        in_channels = 2 * latent_channels + (stride if image_dim else 1) if reference else latent_channels
        size = (1, patch, patch)
        added = width if image_dim else None
        self.add_positions(head_dim, patch, max_positions)
        self.patch_embedding = nn.Conv3d(in_channels, width, kernel_size=size, stride=size)
        self.condition_embedder = WanTimeTextImageEmbedding(width, freq_dim, width * 6, text_dim, image_dim or None)
        self.condition_embedder.timesteps_proj = cast(Any, TimeSinusoids(freq_dim))
        self.blocks = nn.ModuleList(
            self.block_class(width, ffn_dim, num_heads, cross_attn_norm=True, eps=eps, added_kv_proj_dim=added)
            for _ in range(num_layers)
        )
        self.norm_out = FP32LayerNorm(width, eps, elementwise_affine=False)
        self.proj_out = nn.Linear(width, latent_channels * patch * patch)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, width) / width**0.5)
        self.audio_at: tuple[int, ...] = ()
        if audio_dim:
            self.add_audio(audio_dim)
        if pose_dim:
            self.pose_proj = AudioPack(stride * pose_dim, audio_hidden)
            self.pose_cond_proj = nn.Linear(audio_hidden, width)
        self.prediction, self.pose_dim, self.image_dim = prediction, pose_dim, image_dim
        self.kind = self.make_kind()
        if guidance:
            self.add_guidance(guidance)

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def make_kind(self) -> "WanKind":
        """The kind that this network was made by, from its config."""
        return NetworkConfig(**{f.name: self.config[f.name] for f in fields(NetworkConfig)})

    def add_audio(self, audio_dim: int) -> None:
        """Make the modules that read audio rows of so many numbers, and name in `audio_at` the blocks that take what they read."""
        config = self.config
        self.audio_at = NetworkConfig(num_layers=config.num_layers, audio_blocks=config.audio_blocks).audio_at
        self.audio_proj = AudioPack(config.stride * audio_dim, config.audio_hidden)
        width = config.num_heads * config.head_dim
        self.audio_cond_projs = nn.ModuleList(nn.Linear(config.audio_hidden, width) for _ in self.audio_at)

    def add_guidance(self, scales: int) -> None:
        """Add the embedding of so many guidance scales; its layer is zero, so that at first it changes nothing."""
        weight = self.scale_shift_table
        width = scales * self.condition_embedder.timesteps_proj.num_channels
        self.guidance_embedder = nn.Linear(width, weight.shape[-1])
        for parameter in self.guidance_embedder.parameters():
            nn.init.zeros_(parameter)
        self.guidance_embedder.to(weight.device, weight.dtype)
        self.register_to_config(guidance=scales)
        self.kind = self.kind.with_guidance(scales)

    def read_time(self, levels: Tensor, guidance: Tensor | None = None) -> Time:
        """Time embedding and modulation of sigmas [B, F], and of the guidance scales [B, M] where they are embedded; the network's
        time is 1000 sigma."""
        embedder = self.condition_embedder
        projected = embedder.timesteps_proj(flow.network_time(levels).flatten()).unflatten(0, levels.shape)
        time = embedder.time_embedder(projected.to(embedder.time_embedder.linear_1.weight.dtype))
        if self.guidance_embedder is not None:
            if guidance is None:
                raise ValueError("this network embeds guidance scales: pass guidance [B, M]")
            scales = embedder.timesteps_proj(GUIDANCE_TIME * guidance.flatten()).view(len(guidance), -1)
            time = time + self.guidance_embedder(scales.to(self.guidance_embedder.weight.dtype)).unsqueeze(1).to(
                time.dtype
            )
        modulation = embedder.time_proj(embedder.act_fn(time).to(embedder.time_proj.weight.dtype))
        modulation = modulation.unflatten(2, (6, -1)).float()
        return time, tuple(block.get_parameter("scale_shift_table") + modulation for block in self.blocks)

    @torch.no_grad()
    def read_text(self, text: Tensor) -> tuple[KeyValue, ...]:
        """Each block's keys and values of text features [B, L, D_text], to be given to `forward` in place of the features."""
        embedded = self.condition_embedder.text_embedder(text.to(self.compute_dtype))
        return tuple(cast(AvatarBlock, block).read(embedded) for block in self.blocks)

    @torch.no_grad()
    def read_image(self, image: Tensor) -> tuple[KeyValue, ...]:
        """Each block's keys and values of image features [B, K, image_dim], to be given to `forward` in their place."""
        embedded = cast(nn.Module, self.condition_embedder.image_embedder)(image.to(self.compute_dtype))
        return tuple(cast(AvatarBlock, block).look(embedded) for block in self.blocks)

    def audio_inputs(
        self,
        audio: Tensor,
        numbers: Sequence[int] | None = None,  # noqa: ARG002
        regions: Tensor | None = None,  # noqa: ARG002
    ) -> tuple[Any, ...]:
        """What each block of `audio_at` is given of audio [B, F, stride, A], without the weights of the blocks; here what is added
        to the tokens of a frame before the block, [B, F, 1, D]. `numbers`: of the frames in their stream, no larger than the kind's
        `first_frames` (None: those of a whole clip, which begins and ends); regions [B, P, H, W]."""
        if not self.audio_at:
            return ()
        packed = self.audio_proj(audio.to(self.compute_dtype))
        return tuple(project(packed).unsqueeze(2) for project in self.audio_cond_projs)

    def with_latents(self, audio: Sequence[Any], x: Tensor, time: Time) -> Sequence[Any]:  # noqa: ARG002
        """What each block of `audio_at` is given of audio that was read, with the patch tokens x [B, N, D] and the time: the
        same, where it depends on neither."""
        return audio

    @torch.no_grad()
    def read_audio(
        self, audio: Tensor, numbers: Sequence[int] | None = None, regions: Tensor | None = None
    ) -> tuple[Any, ...]:
        """What each block of `audio_at` takes of audio, to be given to `forward` in its place; arguments as `audio_inputs`'."""
        return self.audio_inputs(audio, numbers, regions)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | Time,
        text: Tensor | Sequence[KeyValue],
        audio: Tensor | Sequence[Any] | None = None,
        spans: Sequence[Span] | BlockSpans | Arranged | None = None,
        past: Sequence[KeyValue | PastParts | RaggedPast | None] | None = None,
        past_frames: int | Sequence[int] = 0,
        pose: Tensor | None = None,
        image: Tensor | Sequence[KeyValue] | None = None,
        remember: bool = True,
        guidance: Tensor | None = None,
        numbers: Sequence[int] | None = None,
        regions: Tensor | None = None,
        anchors: Tensor | Sequence[KeyValue] | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """x [B, C_in, F, H, W]; sigma [B], [B, F] or `read_time` of it; text [B, L, D_text] or `read_text` of it; audio
        [B, F, stride, A] or `read_audio` of it, with numbers and regions; pose [B, F, stride, P] where there is pose_dim, image
        [B, K, image_dim] or `read_image` of it where there is image_dim; guidance [B, M] where scales are embedded (a network
        without one does not read it); anchors [B, C, R, H, W], or each block's un-rotated keys and values of them, for a network
        that takes them.

        Returns the raw output [B, C, F, H, W] and, with `remember`, the un-rotated keys and values of each block. ValueError for
        an image that is missing or not taken. Where ranks share sequences, inputs and output are whole on each, the keys and
        values (`past` too) those of its heads.
        """
        if (image is None) == bool(self.image_dim):
            wrong = "given, image_dim is 0: remove them" if image is not None else "missing: give [B, K, image_dim]"
            raise ValueError(f"image features {wrong}")
        frames, patch = x.shape[2], self.patch
        height, width = x.shape[3] // patch, x.shape[4] // patch
        arranged = self.arrange_blocks(spans, past_frames, frames, height, width, anchors)
        dtype, split = self.compute_dtype, self.split_of(frames)
        x = self.embed((x if split is None else split.enter(x)).to(dtype)).flatten(2).transpose(1, 2)
        x = x.contiguous() if split is None else split.own(x)
        if self.pose_dim:
            assert pose is not None
            moved = self.pose_cond_proj(self.pose_proj(pose.to(dtype)))
            x = (x.unflatten(1, (frames, -1)) + moved.unsqueeze(2)).flatten(1, 2)
        if isinstance(sigma, Tensor):
            sigma = self.read_time(sigma if sigma.ndim == 2 else sigma.unsqueeze(1), guidance)
        time, temb = sigma
        if isinstance(text, Tensor):
            text = [self.condition_embedder.text_embedder(text.to(dtype))] * len(self.blocks)
        if isinstance(image, Tensor):
            embedded = cast(nn.Module, self.condition_embedder.image_embedder)(image.to(dtype))
            image = [embedded] * len(self.blocks)
        given = self.audio_inputs(audio, numbers, regions) if isinstance(audio, Tensor) else audio
        given = self.with_latents(given, x, sigma) if given else ()
        by_block = dict(zip(self.audio_at, given, strict=True))
        cache, count = [], x.shape[1]
        x, temb, anchors, shared = self.with_anchors(x, temb, anchors, split)
        for i, block in enumerate(self.blocks):
            seen = past[i] if past is not None else None, image[i] if image is not None else None
            own = () if anchors is None else (anchors[i],)
            x, kv = self.run_block(block, x, text[i], temb[i], *arranged[i], *seen, by_block.get(i), shared, *own)
            if remember:
                cache.append(kv)
            del kv  # or it would be alive while the next block computes
        x = x[:, :count]  # without anchors
        shift, scale = (self.scale_shift_table + time.float().unsqueeze(2)).chunk(2, dim=2)
        normed = self.norm_out(x.float()).unflatten(1, (time.shape[1], -1))
        out = self.proj_out((normed * (1 + scale) + shift).flatten(1, 2).type_as(x))
        out = out if split is None else split.leave(out)
        return self.unpatchify(out, frames, height, width), cache

    def embed(self, x: Tensor) -> Tensor:
        """Tokens [B, D, F, h, w] of the input [B, C_in, F, H, W]."""
        return self.patch_embedding(x)

    def with_anchors(
        self, x: Tensor, temb: Sequence[Any], anchors: Any, split: Split | None
    ) -> tuple[Tensor, Sequence[Any], Any, Split | None]:
        """(tokens [B, N, D] with the anchors' behind them where they are given as latents, the blocks' modulations, the anchors'
        keys and values by block where they were read, how ranks share all these tokens)."""
        if anchors is not None:
            raise ValueError("anchors given, this network takes none: remove them")
        return x, temb, None, split


def with_reference(x: Tensor, conditions: Conditions, known: Sequence[int] = (0,)) -> tuple[Tensor, Tensor]:
    """Write the clean reference over the known frames; return (x, network input [noisy | reference | mask], 0 = known).

    Without a reference (plain text-to-video) the input is x alone.
    """
    if conditions.reference is None:
        return x, x
    x, frames = write_reference(x, conditions, known), x.shape[2]
    mask = x.new_ones(x.shape[0], 1, frames, *x.shape[3:])
    for frame in known:
        mask[:, :, frame] = 0.0
    return x, torch.cat([x, conditions.reference.to(x).expand(-1, -1, frames, -1, -1), mask], dim=1)


def build_network(config: NetworkConfig, **dims: int) -> AvatarTransformer:
    """A freshly initialised AvatarTransformer (Wan's initialisation; output and gates start at zero). dims: latent_channels,
    stride, text_dim, audio_dim and, where it is steered, pose_dim; image_dim for image-to-video."""
    return initialise(AvatarTransformer(**dims, **vars(config)))


def initialise(net: Any) -> Any:
    """Wan's initialisation; the output, and what embeds a guidance scale, start at zero."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.zeros_(net.proj_out.weight)
    if net.guidance_embedder is not None:
        nn.init.zeros_(net.guidance_embedder.weight)
    return net
