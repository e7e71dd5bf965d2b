"""LongCat-Video-Avatar (2512.13531; the backbone is LongCat-Video's, 2510.22200): a second backbone beside Wan's.

A block modulates by the time of each frame, through a map of its own; queries and keys are normalised by head; the MLP is gated
(SwiGLU). Text, then audio are attended to between self-attention and MLP; what audio gives is layer-normalised, modulated and gated
by the time too. Clean latents are condition tokens: frames at sigma 0, which take neither text nor audio, and of which known ones
see each other alone. Names of modules are the published ones; the published output is x0 - noise, ours its negative.
B = batch, F = latent frames, E = width of the time embedding, D = width, L = text tokens, A = numbers of an audio row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, cast

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from torch import Tensor, nn

from teachers import flow
from teachers.conditions import Conditions
from teachers.errors import UserError
from teachers.networks.blocks.longcat import AudioInput, FinalLayer, LongCatBlock
from teachers.networks.blocks.wan import TimeSinusoids
from teachers.networks.infinitetalk import AudioContext, AudioProjector, read_tokens, shares
from teachers.networks.kind import Dims, KeyValue, PastParts, RaggedPast
from teachers.networks.spans import BlockSpans, Span, SpanKind, SpanTransformer


@dataclass(frozen=True, kw_only=True)
class LongCatConfig(SpanKind):
    """Size of the network. `window`: neighbouring audio rows, an odd number, that each row of the conditions has side by side;
    `row_states`: states of the audio encoder in a row, 12 layers of wav2vec2 (1.0) or 5 means of Whisper's (1.5).

    The adapters of one and of two speakers have the same shapes; how many there are is the data's `speakers`.
    """

    takes: ClassVar = ("text", "audio")
    layouts: ClassVar = ("longcat",)
    first_frames: ClassVar = 1
    clean_known: ClassVar = True
    whole: ClassVar = True
    source: ClassVar = (
        "meituan-longcat/LongCat-Video-Avatar (avatar_single/ or avatar_multi/) or meituan-longcat/LongCat-Video-Avatar-1.5 "
        "(base_model/) from the Hugging Face hub"
    )
    # E time embedding, d head; H hidden; near and later: the audio numbers of frame 0 of a clip and of every other
    rows: ClassVar[str] = """
        x_embedder.proj.*                       | = | D I p q r
        t_embedder.mlp.0.*                      | = | E Q
        t_embedder.mlp.2.*                      | = | E E
        y_embedder.y_proj.0.*                   | = | D T
        y_embedder.y_proj.2.*                   | = | D D
        blocks.{}.adaLN_modulation.1.*          | = | 6D E
        blocks.{}.audio_adaLN_modulation.1.*    | = | 3D E
        blocks.{}.pre_crs_attn_norm.*           | = | D
        blocks.{}.pre_video_crs_attn_norm.*     | = | D
        blocks.{}.attn.qkv.*                    | = | 3D D
        blocks.{}.attn.q_norm.weight            | = | d
        blocks.{}.attn.k_norm.weight            | = | d
        blocks.{}.attn.proj.*                   | = | D D
        blocks.{}.cross_attn.q_linear.*         | = | D D
        blocks.{}.cross_attn.kv_linear.*        | = | 2D D
        blocks.{}.cross_attn.q_norm.weight      | = | d
        blocks.{}.cross_attn.k_norm.weight      | = | d
        blocks.{}.cross_attn.proj.*             | = | D D
        blocks.{}.audio_cross_attn.q_linear.*   | = | D D
        blocks.{}.audio_cross_attn.kv_linear.*  | = | 2D wide
        blocks.{}.audio_cross_attn.q_norm.weight | = | d
        blocks.{}.audio_cross_attn.k_norm.weight | = | d
        blocks.{}.audio_cross_attn.proj.*       | = | D D
        blocks.{}.ffn.w1.weight                 | = | F D
        blocks.{}.ffn.w2.weight                 | = | D F
        blocks.{}.ffn.w3.weight                 | = | F D
        audio_proj.proj1.*                      | = | H near
        audio_proj.proj1_vf.*                   | = | H later
        audio_proj.proj2.*                      | = | H H
        audio_proj.proj3.*                      | = | tokens H
        audio_proj.norm.*                       | = | wide
        final_layer.linear.*                    | = | O D
        final_layer.adaLN_modulation.1.*        | = | 2D E
    """
    audio_row: ClassVar = ("near", 1)

    num_layers: int = 48
    num_heads: int = 32
    ffn_dim: int = 11008
    time_dim: int = 512
    audio_hidden: int = 512
    audio_width: int = 768
    audio_tokens: int = 32
    row_states: int = 12
    window: int = 5

    @classmethod
    def module_class(cls) -> "type[LongCat]":
        return LongCat

    @staticmethod
    def own_config(sizes: Mapping[str, int], stride: int, config: Mapping[str, Any]) -> dict[str, Any]:
        if config.get("text_tokens_zero_pad") is False:
            raise UserError(
                "config.json: text_tokens_zero_pad is false, where text padding is left out; it is not built"
            )
        speakers = config.get("speakers", 1)
        return {
            "time_dim": sizes["E"],
            "audio_dim": speakers * sizes["near"],
            "audio_width": sizes["wide"],
            "audio_tokens": sizes["tokens"] // sizes["wide"],
            "row_states": config.get("row_states", config.get("audio_block", 12)),
            "window": sizes["near"] * (stride - 1) // (sizes["later"] - sizes["near"]),
            "speakers": speakers,
        }

    @staticmethod
    def published_config(own: Mapping[str, Any]) -> dict[str, Any]:
        width, states = own["num_heads"] * own["head_dim"], own["row_states"]
        return {
            "_class_name": "LongCatVideoAvatarTransformer3DModel",
            **{"in_channels": own["latent_channels"], "out_channels": own["latent_channels"], "hidden_size": width},
            **{"depth": own["num_layers"], "num_heads": own["num_heads"], "caption_channels": own["text_dim"]},
            **{"mlp_ratio": max(1, round(1.5 * own["ffn_dim"] / width)), "adaln_tembed_dim": own["time_dim"]},
            **{"frequency_embedding_size": own["freq_dim"], "patch_size": [1, own["patch"], own["patch"]]},
            **{"text_tokens_zero_pad": True, "audio_window": own["window"], "audio_block": states},
            "audio_channel": own["audio_dim"] // (own["speakers"] * own["window"] * states),
            **{"intermediate_dim": own["audio_hidden"], "output_dim": own["audio_width"]},
            **{"context_tokens": own["audio_tokens"], "vae_scale": own["stride"], "audio_prenorm": False},
            **{"class_range": 24, "class_interval": 4},
        }

    def build(self, dims: Dims) -> "LongCat":
        sizes = {name: value for name, value in vars(dims).items() if name not in ("pose_dim", "image_dim")}
        if dims.pose_dim or not dims.audio_dim:
            raise UserError(f"network longcat: got audio rows of {dims.audio_dim} numbers and pose rows of {dims.pose_dim}; "
                            "it takes audio and no pose")  # fmt: skip
        return initialise(LongCat(**sizes, **{field.name: getattr(self, field.name) for field in OWN}))

    def run(
        self,
        net: "LongCat",
        inputs: Tensor,
        sigma: Tensor,
        conditions: Conditions,
        numbers: Sequence[int] | None = None,
        known: Sequence[int] = (),
    ) -> Tensor:
        audio = conditions.audio if conditions.clip_audio is None else conditions.clip_audio
        spans = Span(0, inputs.shape[2]).apart(len(known))
        given = {"remember": False, "numbers": numbers, "regions": conditions.regions}
        return net(inputs, sigma, conditions.text, audio, spans, **given)[0]

    def check(self) -> None:
        super().check()
        if self.window % 2 == 0 or self.window < 1:
            raise UserError(f"window {self.window}: network longcat; give an odd number of audio rows, published is 5")

    def set_attention(self, net: "LongCat", backend: str) -> None:
        with attention_backend(backend.lower()):  # refuses what is not installed
            for block in net.blocks:
                cast(LongCatBlock, block).backend = AttentionBackendName(backend.lower())

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Every matrix of the three attentions and of the MLP."""
        return (
            "qkv",
            "attn.proj",
            "q_linear",
            "kv_linear",
            "cross_attn.proj",
            "audio_cross_attn.proj",
            "w1",
            "w2",
            "w3",
        )


OWN = [field for field in fields(LongCatConfig) if field.name not in ("prediction", "reference", "guidance")]
"""The fields of the config that the module takes."""


class Time(NamedTuple):
    """Embedding [B, F, E] of sigmas; which frames are `noisy` [B, F, 1], 0 for condition tokens; where it was read ahead each
    block's modulation [B, F, 9, D]. F may be 1."""

    embedding: Tensor
    noisy: Tensor
    blocks: tuple[Tensor, ...] | None = None


class LongCat(SpanTransformer):
    """The network; `audio_dim` numbers of an audio row, `window` neighbours of all `speakers` side by side."""

    _no_split_modules = ["LongCatBlock"]  # noqa: RUF012
    _keep_in_fp32_modules = [  # noqa: RUF012
        *("rope", "t_embedder", "adaLN_modulation", "audio_adaLN_modulation", "final_layer", "norm"),
        *("pre_crs_attn_norm", "pre_video_crs_attn_norm"),
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
        speakers: int = 1,
        freq_dim: int = 256,
        patch: int = 2,
        time_dim: int = 512,
        audio_hidden: int = 512,
        audio_width: int = 768,
        audio_tokens: int = 32,
        row_states: int = 12,  # noqa: ARG002, read from the config
        window: int = 5,
        max_positions: int = 1024,
    ):
        super().__init__()
        width, size = num_heads * head_dim, (1, patch, patch)
        channels, odd = divmod(audio_dim, speakers * window)
        if odd:
            raise UserError(
                f"network longcat: an audio row has {audio_dim} numbers, not {window} neighbours of {speakers} speakers; "
                f"set data.audio.window=[{window // 2},{window // 2}]"
            )
        self.add_positions(head_dim, patch, max_positions)
        self.sinusoids = TimeSinusoids(freq_dim)
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv3d(latent_channels, width, kernel_size=size, stride=size)})
        self.t_embedder = nn.ModuleDict({"mlp": _mlp(freq_dim, time_dim, nn.SiLU())})
        self.y_embedder = nn.ModuleDict({"y_proj": _mlp(text_dim, width, nn.GELU(approximate="tanh"))})
        self.blocks = nn.ModuleList(
            LongCatBlock(width, head_dim, ffn_dim, time_dim, audio_width) for _ in range(num_layers)
        )
        self.audio_proj = AudioProjector(channels, stride, window, audio_hidden, audio_tokens, audio_width)
        self.final_layer = FinalLayer(width, time_dim, latent_channels * patch * patch)
        self.kind = LongCatConfig(**{field.name: self.config[field.name] for field in OWN})

    @property
    def compute_dtype(self) -> torch.dtype:
        return cast(nn.Conv3d, self.x_embedder["proj"]).weight.dtype

    def embed_time(self, levels: Tensor) -> Time:
        """Of sigmas [B, F]; the network's time is 1000 sigma."""
        mlp = cast(nn.Sequential, self.t_embedder["mlp"])
        angles = self.sinusoids(flow.network_time(levels).flatten()).unflatten(0, levels.shape)
        return Time(mlp(angles.to(cast(nn.Linear, mlp[0]).weight.dtype)), levels.ne(0).unsqueeze(2).float())

    def embed_text(self, text: Tensor) -> Tensor:
        """Text features [B, L, T], zero where padded -> [B, L, D], zero there too; padding is attended to, as published."""
        return self.y_embedder["y_proj"](text.to(self.compute_dtype)) * text.any(dim=2, keepdim=True)

    def audio_inputs(self, audio: Tensor, numbers: Sequence[int] | None, regions: Tensor | None) -> AudioInput:
        """Of audio [B, F, stride, A]; with two speakers regions [B, P, H, W], UserError without."""
        speakers = self.config["speakers"]
        tokens = read_tokens(self, audio, numbers, speakers)
        if speakers == 1:
            return AudioInput(tokens)
        return AudioInput(tokens, speakers, shares(regions, speakers, self.patch), self.split_of(audio.shape[1]))

    @torch.no_grad()
    def read_time(self, levels: Tensor, guidance: Tensor | None = None) -> Time:  # noqa: ARG002
        """`embed_time`, and each block's modulation, to be given to `forward` in place of the sigmas."""
        time = self.embed_time(levels)
        return time._replace(blocks=tuple(cast(LongCatBlock, block).read_time(time.embedding) for block in self.blocks))

    @torch.no_grad()
    def read_text(self, text: Tensor) -> tuple[KeyValue, ...]:
        """Each block's keys and values of text features [B, L, T], to be given to `forward` in their place."""
        embedded = self.embed_text(text)
        return tuple(cast(LongCatBlock, block).read(embedded) for block in self.blocks)

    @torch.no_grad()
    def read_audio(
        self, audio: Tensor, numbers: Sequence[int] | None = None, regions: Tensor | None = None
    ) -> tuple[AudioContext, ...]:
        """What each block attends to of audio, to be given to `forward` in its place; arguments as `audio_inputs`'s."""
        given = self.audio_inputs(audio, numbers, regions)
        return tuple(cast(LongCatBlock, block).read_audio(given) for block in self.blocks)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | Time,
        text: Tensor | Sequence[KeyValue],
        audio: Tensor | Sequence[AudioContext],
        spans: Sequence[Span] | BlockSpans | None = None,
        past: Sequence[KeyValue | PastParts | RaggedPast | None] | None = None,
        past_frames: int | Sequence[int] = 0,
        pose: Tensor | None = None,  # noqa: ARG002
        image: Tensor | None = None,  # noqa: ARG002
        remember: bool = True,
        guidance: Tensor | None = None,  # noqa: ARG002
        numbers: Sequence[int] | None = None,
        regions: Tensor | None = None,
        anchors: Tensor | None = None,  # noqa: ARG002
    ) -> tuple[Tensor, list[KeyValue]]:
        """x [B, C, F, H, W]; sigma [B], [B, F] or `read_time` of it, 0 at condition tokens; text [B, L, T] or `read_text` of it;
        audio [B, F, stride, A] or `read_audio` of it, with numbers and regions; who sees whom by `spans`.

        Returns noise - x0 [B, C, F, H, W] and, with `remember`, the un-rotated keys and values of each block. Where ranks share
        sequences, inputs and output are whole on each, the keys and values (`past` too) those of its heads.
        """
        frames, height, width = x.shape[2], x.shape[3] // self.patch, x.shape[4] // self.patch
        arranged = self.arrange_blocks(spans, past_frames, frames, height, width)
        split = self.split_of(frames)
        x = x if split is None else split.enter(x)
        x = self.x_embedder["proj"](x.to(self.compute_dtype)).flatten(2).transpose(1, 2)
        x = x.contiguous() if split is None else split.own(x)
        if isinstance(sigma, Tensor):
            sigma = self.embed_time(sigma if sigma.ndim == 2 else sigma.unsqueeze(1))
        count = len(self.blocks)
        given: Sequence[Any] = [self.embed_text(text)] * count if isinstance(text, Tensor) else text
        spoken: Any = audio
        if isinstance(audio, Tensor):
            spoken = [self.audio_inputs(audio, numbers, regions)] * count
        cache = []
        for i, block in enumerate(self.blocks):
            time = sigma.embedding if sigma.blocks is None else sigma.blocks[i]
            inputs = (x, time, sigma.noisy, given[i], spoken[i], *arranged[i], None if past is None else past[i])
            x, kv = self.run_block(block, *inputs, split)
            if remember:
                cache.append(kv)
            del kv, inputs  # or they would be alive while the next block computes
        out = self.final_layer(x, sigma.embedding)
        out = out if split is None else split.leave(out)
        return -self.unpatchify(out, frames, height, width), cache


def _mlp(wide: int, width: int, act: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(wide, width), act, nn.Linear(width, width))


def initialise(net: LongCat) -> LongCat:
    """Torch's initialisation; modulations, gates and the output start at zero."""
    for module in net.modules():
        if isinstance(module, LongCatBlock):
            zero = [module.adaLN_modulation[1], module.audio_adaLN_modulation[1]]
        else:
            zero = [module.linear, module.adaLN_modulation[1]] if isinstance(module, FinalLayer) else []
        for linear in zero:
            for parameter in linear.parameters():
                nn.init.zeros_(parameter)
    return net
