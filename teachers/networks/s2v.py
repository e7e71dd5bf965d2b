"""Wan2.2-S2V (2508.18621): Wan's text-to-video blocks, the portrait and the film before as anchor tokens, audio behind some blocks.

    tokens        [noisy frames | reference | motion], which see each other; the anchors are at time 0
    behind block  x += o(attention(q(AdaIN(x; global token)), 5 audio tokens))      the tokens of each noisy frame by themselves

The reference is one latent frame. Motion is the 19 latents before the clip, packed: the nearest as it is, two at a quarter and
sixteen at a sixteenth of the tokens; a first clip has none. A clip is 4 F pixel frames: the frame that Wan's codec gives for its
first latent is the portrait's, `lead`. Latent frame i reads the audio rows of pixel frames 4 i - 5 .. 4 i + 3 of its own clip,
before which row 0 is repeated. In a causal student a clip is a chunk, as in LiveAvatar (2512.04677), and its anchors see the text
and one another alone.
B = batch, F = latent frames, S = tokens a frame, N = F S, A = anchor tokens, D = width, M = heads, d = head width.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from teachers.conditions import Conditions, Feature, declare
from teachers.errors import UserError
from teachers.networks.blocks.s2v_audio import AudioContext, AudioEncoder, AudioInjector
from teachers.networks.blocks.wan import AvatarBlock, Modulations, keys_values
from teachers.networks.kind import Dims, KeyValue
from teachers.networks.sequence import Split
from teachers.networks.spans import MOST_TABLES, Arranged, Span
from teachers.networks.wan import AvatarTransformer, WanKind, initialise

POSE = declare(Feature(name="pose_latents", clock="grid"))
"""Latents [B, C, F, H, W] of a film of the pose, beside the noise; not given: zeros, which are no film's."""
MOTION = (16, 2, 1)
"""Latents of the motion, the farthest first, of which each group is packed more coarsely than the next."""
AHEAD = 30
"""Of the reference, before the first frame of a clip: published, and the table of positions is the same for all clips."""
SIZES = ("num_layers", "num_heads", "head_dim", "ffn_dim", "freq_dim", "inject_after", "audio_states", "audio_heads")


@dataclass(frozen=True, kw_only=True)
class S2VConfig(WanKind):
    """Its sizes; the defaults are the published ones. Audio is read behind the blocks `inject_after`, as `audio_heads` tokens of a
    latent frame and one that is learned. Rows come from `data.audio: {states: all, rate: 30, resample: states}`, `audio_states` of
    each frame; the anchors from `data.image.name: s2v`; clips have a lead, `data.lead: 1`."""

    takes: ClassVar = ("text", "audio", "anchors")
    layouts: ClassVar = ("wan",)
    source: ClassVar = "Wan-AI/Wan2.2-S2V-14B from the Hugging Face hub"
    first_frames: ClassVar = 2  # latent frames 0 and 1 read the copies of row 0
    lead: ClassVar = 1
    past: ClassVar = sum(MOTION)
    rows: ClassVar[str] = """
        casual_audio_encoder.weights                      | audio_encoder.weights          | 1 states 1 1
        casual_audio_encoder.encoder.conv1_local.conv.*   | audio_encoder.conv1_local.*    | local audio 3
        casual_audio_encoder.encoder.conv1_global.conv.*  | audio_encoder.conv1_global.*   | quarter audio 3
        casual_audio_encoder.encoder.conv2.conv.*         | audio_encoder.conv2.*          | half quarter 3
        casual_audio_encoder.encoder.conv3.conv.*         | audio_encoder.conv3.*          | D half 3
        casual_audio_encoder.encoder.final_linear.*       | audio_encoder.final_linear.*   | D D
        casual_audio_encoder.encoder.padding_tokens       | audio_encoder.padding_tokens   | 1 1 1 D
        audio_injector.injector.{}.q.*                    | audio_injector.{}.to_q.*       | D D
        audio_injector.injector.{}.k.*                    | audio_injector.{}.to_k.*       | D D
        audio_injector.injector.{}.v.*                    | audio_injector.{}.to_v.*       | D D
        audio_injector.injector.{}.o.*                    | audio_injector.{}.to_out.0.*   | D D
        audio_injector.injector.{}.norm_q.weight          | audio_injector.{}.norm_q.weight | D
        audio_injector.injector.{}.norm_k.weight          | audio_injector.{}.norm_k.weight | D
        audio_injector.injector_adain_layers.{}.linear.*  | audio_injector.{}.adain.*      | twice D
        cond_encoder.*                                    | pose_embedding.*               | D I 1 2 2
        trainable_cond_mask.weight                        | token_kind.weight              | 3 D
        frame_packer.proj.*                               | motion_embedding.near.*        | D I 1 2 2
        frame_packer.proj_2x.*                            | motion_embedding.middle.*      | D I 2 4 4
        frame_packer.proj_4x.*                            | motion_embedding.far.*         | D I 4 8 8
    """
    audio_row: ClassVar = ("audio", 1)

    num_layers: int = 40
    num_heads: int = 40
    ffn_dim: int = 13824
    reference: bool = False
    inject_after: tuple[int, ...] = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)
    audio_states: int = 25
    audio_heads: int = 4

    @classmethod
    def module_class(cls) -> type[AvatarTransformer]:
        return S2V

    @staticmethod
    def own_config(sizes: Mapping[str, int], stride: int, config: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG004
        after = config.get("inject_after", config.get("audio_inject_layers", S2VConfig.inject_after))
        if len(after) != sizes["num_audio"]:
            raise UserError(
                f"weights do not fit: {sizes['num_audio']} audio injectors, where config.json has {len(after)} "
                "audio_inject_layers; copy the config.json of these weights beside them"
            )
        return {
            "audio_dim": sizes["states"] * sizes["audio"],
            "audio_states": sizes["states"],
            "audio_heads": sizes["local"] // sizes["quarter"],
            "inject_after": list(after),
        }

    @staticmethod
    def published_config(own: Mapping[str, Any]) -> dict[str, Any]:
        fixed = {"_class_name": "WanModel_S2V", "model_type": "s2v", "cond_dim": 16, "adain_mode": "attn_norm"}
        switches = {"enable_adain": True, "zero_timestep": True, "enable_framepack": True, "enable_motioner": False}
        given = {"audio_dim": own["audio_dim"] // own["audio_states"], "num_audio_token": own["audio_heads"]}
        return fixed | switches | given | {"audio_inject_layers": own["inject_after"], "framepack_drop_mode": "padd"}

    def build(self, dims: Dims) -> "S2V":
        if dims.stride != 4 or not dims.audio_dim or dims.audio_dim % self.audio_states or dims.pose_dim:
            raise UserError(
                f"network s2v: reads {self.audio_states} states a row, 4 rows a latent frame, and no pose rows: got rows of "
                f"{dims.audio_dim} numbers, codec.stride={dims.stride} and pose_dim={dims.pose_dim}; give data.audio states: all, "
                "rate: 30, resample: states"
            )
        sizes = {name: getattr(dims, name) for name in ("latent_channels", "text_dim", "audio_dim", "stride")}
        net = initialise(S2V(**sizes, **{name: getattr(self, name) for name in SIZES}))
        zeros = (net.pose_embedding, net.token_kind, *(part.to_out[0] for part in net.audio_injector))
        for zero in zeros:  # as published
            for parameter in zero.parameters():
                nn.init.zeros_(parameter)
        return net

    def check(self) -> None:
        super().check()
        after = self.inject_after
        if (
            self.patch != 2
            or list(after) != sorted(set(after))
            or not after
            or not 0 <= after[0] <= after[-1] < self.num_layers
        ):
            raise UserError(
                f"inject_after {list(after)}, patch {self.patch}: network s2v; give ascending numbers of its "
                f"{self.num_layers} blocks, and a patch of 2"
            )

    def check_sequence(self, ranks: int, tokens: int) -> None:
        """UserError too where the anchors' tokens, with motion 2.5 times a frame's, do not divide."""
        super().check_sequence(ranks, tokens)
        if 5 * tokens % (2 * ranks):
            raise UserError(
                f"engine.sequence_parallel: {ranks} ranks, but {5 * tokens / 2:g} tokens of anchors; take fewer"
            )

    def shallow(self, blocks: int = 1) -> "S2VConfig":
        after = tuple(block for block in self.inject_after if block < blocks) or (0,)
        return self if blocks >= self.num_layers else replace(self, num_layers=blocks, inject_after=after)

    @property
    def period(self) -> int:
        """From one audio injector to the next."""
        return self.inject_after[1] - self.inject_after[0] if len(self.inject_after) > 1 else 1

    def numbered(self, numbers: Iterable[int], chunk_frames: int) -> tuple[int, ...]:
        """Counted from the start of each chunk, with which audio begins anew."""
        return tuple(min(number % chunk_frames, self.first_frames) for number in numbers)

    def anchor_distance(self, number: int, least: int) -> int:
        return max(least, AHEAD - number)

    def roll_anchors(self, anchors: Tensor, drawn: Tensor) -> Tensor:
        motion = torch.cat([anchors[:, :, 1:], drawn], dim=2)[:, :, -sum(MOTION) :]
        return torch.cat([drawn[:, :, :1], motion], dim=2) if anchors.shape[2] > 1 else drawn[:, :, :1]

    def behind(self, conditions: Conditions, past: Tensor) -> Conditions:
        check_motion(past)
        reference = conditions.anchors[:, :, :1]
        return Conditions(conditions.features, anchors=torch.cat([reference, past.to(reference)], dim=2))

    def compose(self, x: Tensor, conditions: Conditions, known: Sequence[int]) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """(x, [x | latents of the pose] or x alone)."""
        pose = conditions.pose_latents
        return x, x if pose is None else torch.cat([x, pose.to(x)], dim=1)

    def run(
        self,
        net: "S2V",
        inputs: Tensor,
        sigma: Tensor,
        conditions: Conditions,
        numbers: Sequence[int] | None = None,
        known: Sequence[int] = (),  # noqa: ARG002
    ) -> Tensor:
        audio = conditions.audio if conditions.clip_audio is None else conditions.clip_audio
        given = {"anchors": conditions.anchors, "numbers": numbers, "remember": False}
        return net(inputs, sigma, conditions.text, audio, **given)[0]


def check_motion(motion: Tensor) -> None:
    """UserError for latents [B, C, R, H, W] that cannot be packed."""
    if any(side % 8 for side in motion.shape[3:]):
        raise UserError(f"anchors: {list(motion.shape[3:])} latent rows and columns with motion; give multiples of 8")


class S2VBlock(AvatarBlock):
    """Wan's text-to-video block, behind which the tokens of the frames may attend to audio."""

    def after(self, x: Tensor, audio: AudioContext | None, num_anchors: int = 0) -> Tensor:
        if audio is None:
            return x
        own, frames = audio.injector, audio.key.shape[1]
        noisy, rest = x.split([x.shape[1] - num_anchors, num_anchors], dim=1)
        normed = F.layer_norm(noisy.float(), noisy.shape[-1:], eps=1e-5).unflatten(1, (frames, -1))
        normed = (normed * (1 + audio.scale) + audio.shift).flatten(1, 2).type_as(x)
        query = own.norm_q(own.to_q(normed)).unflatten(2, (self.attn1.heads, -1)).type_as(audio.key)
        noisy = noisy + own.to_out[0](self.attend_frames(query, audio.key, audio.value))
        return torch.cat([noisy, rest], dim=1) if num_anchors else noisy


class S2V(AvatarTransformer):
    """The module, under diffusers' names of Wan. Input [noisy] or [noisy | latents of the pose]."""

    block_class = S2VBlock
    _no_split_modules = ["S2VBlock"]  # noqa: RUF012
    _keep_in_fp32_modules = [*AvatarTransformer._keep_in_fp32_modules, "audio_encoder"]  # noqa: RUF012

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
        inject_after: Sequence[int] = S2VConfig.inject_after,
        audio_states: int = 25,
        audio_heads: int = 4,  # noqa: ARG002, read from the config
        prediction: Literal["velocity", "reference"] = "velocity",
        eps: float = 1e-6,
        max_positions: int = 1024,
    ):
        sizes = (latent_channels, num_layers, num_heads, head_dim, ffn_dim, text_dim, audio_dim, stride, freq_dim)
        super().__init__(*sizes, patch, prediction=prediction, reference=False, eps=eps, max_positions=max_positions)
        if audio_dim % audio_states:
            raise UserError(
                f"network s2v: an audio row has {audio_dim} numbers, not {audio_states} states; set audio_states"
            )
        width = num_heads * head_dim
        self.token_kind = nn.Embedding(3, width)  # of a frame, of the reference, of the motion
        self.pose_embedding = nn.Conv3d(latent_channels, width, (1, 2, 2), (1, 2, 2))
        sides = {"near": (1, 2, 2), "middle": (2, 4, 4), "far": (4, 8, 8)}
        self.motion_embedding = nn.ModuleDict({n: nn.Conv3d(latent_channels, width, s, s) for n, s in sides.items()})
        self.audio_at = tuple(inject_after)

    def make_kind(self) -> S2VConfig:
        config: Any = self.config
        given: dict[str, Any] = {name: config[name] for name in SIZES}
        given["inject_after"] = tuple(config["inject_after"])
        return S2VConfig(**given)

    def add_audio(self, audio_dim: int) -> None:
        config, width = self.config, self.config.num_heads * self.config.head_dim
        self.audio_encoder = AudioEncoder(
            config.audio_states, audio_dim // config.audio_states, width, config.audio_heads
        )
        self.audio_injector = nn.ModuleList(AudioInjector(width, config.eps) for _ in config.inject_after)

    def audio_inputs(
        self,
        audio: Tensor,
        numbers: Sequence[int] | None = None,
        regions: Tensor | None = None,  # noqa: ARG002
    ) -> tuple[AudioContext, ...]:
        """What each of the injectors takes of audio [B, F, 4, L E]; a frame of number 0 begins a clip of its own, as long as
        all."""
        clips = 1 if numbers is None else max(1, list(numbers).count(0))
        rows = audio.unflatten(1, (clips, -1)).flatten(0, 1).flatten(1, 2).unflatten(2, (self.config.audio_states, -1))
        device = audio.device.type  # a plan's has no autocast
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            tokens, summary = (x.unflatten(0, (-1, clips)).flatten(1, 2) for x in self.audio_encoder(rows))
        tokens, summary = tokens.to(self.compute_dtype), F.silu(summary.to(self.compute_dtype))
        read = []
        own: Any
        for own in self.audio_injector:
            key, value = keys_values(tokens.flatten(0, 1), own.to_k, own.norm_k, own.to_v, self.config.num_heads)
            key, value = (x.unflatten(0, tokens.shape[:2]) for x in (key, value))
            read.append(AudioContext(own, key, value, *own.adain(summary).unsqueeze(2).chunk(2, dim=3)))
        return tuple(read)

    def embed(self, x: Tensor) -> Tensor:
        channels = self.config.latent_channels
        noisy, pose = x[:, :channels], x[:, channels:]
        moved = self.pose_embedding(pose if pose.shape[1] else torch.zeros_like(noisy))
        return self.patch_embedding(noisy) + moved + self.token_kind.weight[0].view(1, -1, 1, 1, 1)

    # ---- anchors

    def anchor_tokens(self, anchors: Tensor) -> Tensor:
        """Tokens [B, A, D] of anchors [B, C, 1 + m, H, W], the reference and the last m latents before the clip: A = S without any,
        else 2.5 S, zeros before the first. UserError for sizes that cannot be packed."""
        anchors = anchors.to(self.compute_dtype)
        reference = self.patch_embedding(anchors[:, :, :1]).flatten(2).mT + self.token_kind.weight[1]
        motion = anchors[:, :, 1:][:, :, -sum(MOTION) :]
        if not motion.shape[2]:
            return reference
        check_motion(motion)
        motion = F.pad(motion, (0, 0, 0, 0, sum(MOTION) - motion.shape[2], 0))
        parts = zip(("far", "middle", "near"), motion.split(MOTION, dim=2), strict=True)
        packed = [self.motion_embedding[name](part).flatten(2).mT for name, part in parts]
        return torch.cat([reference, torch.cat(packed[::-1], dim=1) + self.token_kind.weight[2]], dim=1)

    @torch.compiler.assume_constant_result  # as rope_table
    def anchor_table(self, ahead: int, tokens: int, height: int, width: int) -> Tensor:
        """Unit complex numbers [1, A, 1, d/2] of as many anchor tokens: the reference at position `ahead`, the motion as far from
        it as it is where the reference is at AHEAD, on a height x width grid of tokens."""
        rope, device = self.rope, torch.device(cast(Any, self.rope.freqs_cos.device))
        key = ("anchors", ahead, tokens, height, width, self.compute_dtype, device)
        if key in self._rope_cache:
            return self._rope_cache[key]
        while len(self._rope_cache) >= MOST_TABLES:
            self._rope_cache.pop(next(iter(self._rope_cache)))
        grids = [((AHEAD,), 1)]
        if tokens > height * width:
            grids += [((-1,), 1), ((-3,), 2), ((-19, -14, -9, -4), 4)]
        with torch.inference_mode(False):
            parts = []
            for times, coarse in grids:
                rows, columns = (
                    torch.linspace(0, side - 1, side // coarse, dtype=torch.float64).floor() for side in (height, width)
                )
                places = torch.cartesian_prod(torch.tensor(times, dtype=torch.float64) + ahead - AHEAD, rows, columns)
                turned = [
                    place[:, None] * 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
                    for place, size in zip(places.unbind(1), (rope.t_dim, rope.h_dim, rope.w_dim), strict=True)
                ]
                parts.append(torch.cat(turned, dim=1))
            angles = torch.cat(parts)
            table = torch.polar(torch.ones_like(angles), angles)[None, :, None]
            table = table if self.compute_dtype == torch.float64 else table.to(torch.complex64)
            self._rope_cache[key] = table.to(device)
        return self._rope_cache[key]

    def forward(self, x: Tensor | None, sigma: Any, text: Any, *given: Any, **named: Any) -> Any:
        """As Wan's; without x (None, keys and values as `read_anchors` gives them), in a call of the whole module, which an engine
        that shards it wants."""
        if x is None:
            return None, self._read(named["anchors"], text)
        return super().forward(x, sigma, text, *given, **named)

    def read_anchors(self, anchors: Tensor, text: Tensor | Sequence[KeyValue]) -> tuple[KeyValue, ...]:
        """Each block's un-rotated keys and values [B, A, M, d] of anchors [B, C, R, H, W] that see one another and the text alone,
        to be given to `forward` in their place."""
        return self(None, None, text, anchors=anchors)[1]

    def _read(self, anchors: Tensor, text: Any) -> tuple[KeyValue, ...]:
        if isinstance(text, Tensor):
            text = [self.condition_embedder.text_embedder(text.to(self.compute_dtype))] * len(self.blocks)
        x, count, split = self._own_tokens(anchors)
        grid = (side // self.patch for side in anchors.shape[3:])
        layout, rotary = [(slice(0, count), ())], [self.anchor_table(AHEAD, count, *grid)]
        temb, read = self._at_zero(anchors)[1], []
        for i, block in enumerate(self.blocks):
            x, kv = self.run_block(block, x, text[i], temb[i], layout, rotary, None, None, None, split)
            read.append(kv)
        return tuple(read)

    def _own_tokens(self, anchors: Tensor) -> tuple[Tensor, int, Split | None]:
        """(this rank's tokens of the anchors [B, n, D], how many they are on all ranks, how these share them)."""
        split = self.split_of(1)
        tokens = self.anchor_tokens(anchors if split is None else split.enter(anchors))
        return tokens if split is None else split.own(tokens), tokens.shape[1], split

    def _at_zero(self, like: Tensor) -> Any:
        return self.read_time(
            torch.zeros(1, 1, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
        )

    def arrange(
        self,
        spans: Sequence[Span],
        past_frames: int | Sequence[int],
        frames: int,
        height: int,
        width: int,
        anchors: Any = None,
    ) -> Arranged:
        assert isinstance(past_frames, int)  # streams with anchors are drawn one by one
        layout, rotary = super().arrange(spans, past_frames, frames, height, width)
        size, first = height * width, frames * height * width
        if anchors is None:
            raise ValueError("anchors missing: give [B, C, R, H, W]")
        if isinstance(anchors, Tensor):
            if len(spans) > 1 or past_frames:
                raise ValueError("anchors that see the frames: read them for a part of the frames, or behind others")
            count = size if anchors.shape[2] == 1 else 2 * size + size // 4 + 4 * (height // 4) * (width // 4)
            table = self.anchor_table(AHEAD, count, height, width)
            return Arranged([(slice(0, first + count), ())], [torch.cat([rotary[0], table], dim=1)])
        count = anchors[0][0].shape[1]
        for i, span in enumerate(spans):
            before = sum(b - a for a, b in span.context)
            start = past_frames + before if span.at is None else span.at[-1]
            ahead = AHEAD if span.ahead is None else span.ahead
            table, (query, context) = self.anchor_table(start + ahead, count, height, width), layout[i]
            layout[i] = query, (*context, slice(first, first + count))
            rotary[i] = torch.cat([rotary[i][:, : before * size], table, rotary[i][:, before * size :]], dim=1)
        return Arranged(layout, rotary)

    def with_anchors(
        self, x: Tensor, temb: Sequence[Any], anchors: Any, split: Split | None
    ) -> tuple[Tensor, Sequence[Any], Any, Split | None]:
        if not isinstance(anchors, Tensor):
            return x, temb, anchors, split
        tokens, count, _ = self._own_tokens(anchors)
        both = zip(temb, self._at_zero(anchors)[1], strict=True)
        modulations = [Modulations(own, zero, tokens.shape[1]) for own, zero in both]
        return torch.cat([x, tokens], dim=1), modulations, None, None if split is None else replace(split, behind=count)
