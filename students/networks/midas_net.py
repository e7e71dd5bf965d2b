"""MIDAS' network (2508.19320): a causal language model reads conditions and latents frame by frame, a small head denoises.

    plan:    [condition tokens of the chunk | latent tokens of the chunk before] -> Qwen2 -> hidden states, one a latent token
    denoise: noisy latent tokens, their hidden states and the noise level -> a few transformer layers -> x0

The paper says: Qwen2.5-3B, conditions projected to global tokens of each frame, PixArt-style head of about 0.5 B, 20 levels of
history noise each with its own embedding. It does not say, and we chose: tokens of one chunk see each other, hidden states are
added to the head's time embedding (adaLN), text is pooled by learned queries, the first chunk reads the reference latent.

B = batch, N = tokens, D = width of the language model, W = width of the head, M = heads, d = head width, n = frames a chunk.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from teachers import flow
from teachers.checkpoints.local_model import load_pretrained
from teachers.conditions import Conditions
from teachers.errors import UserError
from teachers.networks.kind import Dims, KeyValue, NetworkKind

Attend = Callable[
    [int, Tensor, Tensor, Tensor], Tensor
]  # layer, un-rotated query, key, value [B, N, M, d] -> [B, N, M d]


@dataclass(frozen=True, kw_only=True)
class MidasConfig(NetworkKind):
    """Sizes: of the language model (defaults: Qwen2.5-3B's, `llm` a local folder with its weights, read when training starts), of
    the head, and the condition tokens of a latent frame: `text_tokens`, one a speaker, one for pose where the student has it.
    `buckets`: embeddings of history noise, the first for none."""

    num_layers: int = 36
    width: int = 2048
    num_heads: int = 16
    num_kv_heads: int = 2
    ffn_dim: int = 11008
    head_layers: int = 12
    head_width: int = 1536
    head_heads: int = 12
    head_ffn_dim: int = 6144
    text_tokens: int = 4
    freq_dim: int = 256
    patch: int = 1
    buckets: int = 20
    prediction: Literal["velocity", "reference"] = "velocity"
    reference: bool = True
    llm: Path | None = None

    causal: ClassVar = "students.networks.midas:Midas"
    can_checkpoint: ClassVar = True

    def build(self, dims: Dims) -> "MidasNet":
        return MidasNet(
            self,
            dims.latent_channels,
            text_dim=dims.text_dim,
            audio_dim=dims.stride * dims.audio_dim,
            pose_dim=dims.stride * dims.pose_dim,
            speakers=dims.speakers,
        )

    def start(self, net: "MidasNet") -> None:
        """The language model's weights, where a folder of them is given."""
        if self.llm is not None:
            read_language_model(net, self.llm)

    def enable_checkpointing(self, net: "MidasNet", *function: Callable) -> None:
        """Each layer of the language model is run again in the backward pass."""
        net.gradient_checkpointing = True

    @property
    def kv_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.width // self.num_heads


class TextQueries(nn.Module):
    """Learned queries over text features [B, L, D_text], zero where padded -> [B, text_tokens, D]; no text is a learned token."""

    def __init__(self, text_dim: int, width: int, count: int, heads: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(count, width) * 0.02)
        self.nothing = nn.Parameter(torch.randn(1, width) * 0.02)
        self.project = nn.Linear(text_dim, width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, text: Tensor) -> Tensor:
        batch = text.shape[0]
        padded = functional.pad((text == 0).all(dim=-1), (1, 0))  # the learned token is always seen
        keys = torch.cat([self.nothing.expand(batch, 1, -1), self.project(text)], dim=1)
        queries = self.queries.expand(batch, -1, -1)
        return queries + self.attention(queries, keys, keys, key_padding_mask=padded, need_weights=False)[0]


class ConditionProjector(nn.Module):
    """Conditions -> global instruction tokens of each latent frame in the language model's space: text, the sound of each of 1 or 2
    speakers (audio_dim numbers of a latent frame in all) and pose, each by a projection of its own."""

    def __init__(self, config: MidasConfig, text_dim: int, audio_dim: int, pose_dim: int, speakers: int = 1):
        super().__init__()
        width, self.speakers = config.width, speakers
        self.text = TextQueries(text_dim, width, config.text_tokens, config.num_heads)
        self.audio = self._rows(audio_dim // speakers, width) if audio_dim else None
        self.pose = self._rows(pose_dim, width) if pose_dim else None
        self.other = self._rows(audio_dim // speakers, width) if audio_dim and speakers == 2 else None
        self.count = config.text_tokens + speakers * bool(audio_dim) + bool(pose_dim)
        self.kind = nn.Parameter(torch.randn(self.count, width) * 0.02)

    @staticmethod
    def _rows(size: int, width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, conditions: Conditions) -> Tensor:
        """Tokens [B, F, count, D]."""
        frames, dtype = conditions.num_frames, self.kind.dtype
        parts = [self.text(conditions.text.to(dtype)).unsqueeze(1).expand(-1, frames, -1, -1)]
        voices = conditions.audio.chunk(self.speakers, dim=-1)
        for project, rows in ((self.audio, voices[0]), (self.other, voices[-1]), (self.pose, conditions.pose)):
            if project is not None:
                assert rows is not None
                parts.append(project(rows.to(dtype).flatten(2)).unsqueeze(2))
        return torch.cat(parts, dim=2) + self.kind


class HeadBlock(nn.Module):
    """Attention among a chunk's tokens and a feed-forward layer, shifted, scaled and gated by each token's condition (adaLN)."""

    def __init__(self, width: int, heads: int, ffn_dim: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, width))
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        """x and its conditions `given` [B, N, W] -> [B, N, W]."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = self.modulate(given).chunk(6, dim=-1)
        query, key, value = self.qkv(self.norm1(x) * (1 + scale) + shift).unflatten(-1, (3, self.heads, -1)).unbind(2)
        seen = functional.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (query, key, value)))
        x = x + gate * self.out(seen.transpose(1, 2).flatten(2))
        return x + ffn_gate * self.ffn(self.norm2(x) * (1 + ffn_scale) + ffn_shift)


class DiffusionHead(nn.Module):
    """Noisy tokens [B, N, C p p] and their hidden states [B, N, D] at sigma [B] -> raw output [B, N, C p p]."""

    def __init__(self, config: MidasConfig, size: int):
        super().__init__()
        width = config.head_width
        self.embed, self.hidden = nn.Linear(size, width), nn.Linear(config.width, width)
        self.frequencies = Timesteps(config.freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = TimestepEmbedding(config.freq_dim, width)
        self.blocks = nn.ModuleList(
            HeadBlock(width, config.head_heads, config.head_ffn_dim) for _ in range(config.head_layers)
        )
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.project = nn.Linear(width, size)

    def forward(self, x: Tensor, sigma: Tensor, hidden: Tensor) -> Tensor:
        dtype = self.embed.weight.dtype
        time = self.time(self.frequencies(flow.network_time(sigma)).to(dtype))
        given, x = self.hidden(hidden) + time.unsqueeze(1), self.embed(x.to(dtype))
        for block in self.blocks:
            x = block(x, given)
        shift, scale = self.modulate(given).chunk(2, dim=-1)
        return self.project(self.norm(x) * (1 + scale) + shift)


class MidasNet(nn.Module):
    """Language model, condition projector and head; transformers' Qwen2 holds the language model's weights under its names.

    Its layers run here, because keys are kept un-rotated: positions are counted from the first chunk that is seen, so a stream
    has no last one. Without a past this equals transformers' Qwen2Model without its causal mask inside a chunk (tests hold it).
    """

    _keep_in_fp32_modules = ("rotary_emb",)
    _no_split_modules = ("MidasLayer", "HeadBlock")

    def __init__(
        self,
        config: MidasConfig,
        latent_channels: int,
        text_dim: int,
        audio_dim: int,
        pose_dim: int = 0,
        speakers: int = 1,
    ):
        super().__init__()
        from transformers import Qwen2Config, Qwen2Model

        from students.networks.midas_layer import MidasLayer

        self.config, size = config, latent_channels * config.patch**2
        self.llm: Any = Qwen2Model(
            Qwen2Config(
                vocab_size=1,  # it reads no words
                pad_token_id=None,
                hidden_size=config.width,
                intermediate_size=config.ffn_dim,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            )
        )
        del self.llm.embed_tokens
        for layer in self.llm.layers:
            layer.__class__ = MidasLayer  # the same weights and names, another forward
        self.conditions = ConditionProjector(config, text_dim, audio_dim, pose_dim, speakers)
        self.latents = nn.Linear(size, config.width)
        self.first = nn.Parameter(torch.randn(config.width) * 0.02)
        self.buckets = nn.Embedding(config.buckets, config.width)
        self.head = DiffusionHead(config, size)
        self.gradient_checkpointing = False
        self._rope_cache: dict[tuple, Tensor] = {}
        # Output and gates start at zero, as in PixArt; history noise starts unseen.
        still: list[Any] = [block.modulate[-1] for block in (*self.head.blocks, self.head)]  # pyright: ignore
        for layer in (*still, self.head.project):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.buckets.weight)

    @property
    def blocks(self) -> nn.ModuleList:
        """Where most weights are: the layers of the language model."""
        return self.llm.layers

    def forward(self, verb: Literal["inputs", "read", "read_clip", "head"], *given: Any) -> Any:
        """What the verb makes of what is given. Everything that reads weights passes here, where engines that keep them in shards
        gather them."""
        return getattr(self, verb)(*given)

    def compile(self, **options: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The head, which runs every step with the same shapes; the language model's context grows until it is full."""
        self.head.compile(**options)

    @property
    def dtype(self) -> torch.dtype:
        return self.latents.weight.dtype

    def tokens(self, x: Tensor) -> Tensor:
        """Latents [B, C, F, H, W] -> [B, F H/p W/p, C p p]."""
        p = self.config.patch
        x = x.unflatten(-1, (-1, p)).unflatten(-3, (-1, p))  # B C F h p w p
        return x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)

    def latents_of(self, tokens: Tensor, like: Tensor) -> Tensor:
        """The inverse, with the shape of `like`."""
        p, (_, channels, frames, height, width) = self.config.patch, like.shape
        grid = tokens.unflatten(-1, (channels, p, p)).unflatten(1, (frames, height // p, width // p))
        return grid.permute(0, 4, 1, 2, 5, 3, 6).flatten(5).flatten(3, 4)

    def inputs(self, previous: Tensor | None, conditions: Conditions, bucket: Tensor | int, size: int) -> Tensor:
        """What the language model reads for a chunk: [B, n count + size, D]. `previous` [B, C, n, H, W] is the chunk before, of
        `size` tokens (None: there is none); bucket [B] or a number: how noisy it is."""
        tokens = self.conditions(conditions).flatten(1, 2)
        if previous is None:
            read = self.first.expand(tokens.shape[0], size, -1)
        else:
            read = self.latents(self.tokens(previous).to(self.dtype))
        index = bucket if isinstance(bucket, Tensor) else torch.full((1,), bucket, device=read.device)
        return torch.cat([tokens, read + self.buckets(index.expand(read.shape[0])).unsqueeze(1)], dim=1)

    @torch.compiler.assume_constant_result  # a graph that filled the cache itself would be compiled again when it is filled
    def rope_table(self, first: int, count: int) -> Tensor:
        """cos and sin [2, n, 1, d] of positions first .. first + count - 1."""
        key = (first, count, self.dtype, self.latents.weight.device)
        if key not in self._rope_cache:
            with torch.inference_mode(False), torch.no_grad():
                like = torch.zeros((), device=key[3], dtype=torch.promote_types(self.dtype, torch.float32))
                positions = torch.arange(first, first + count, device=key[3])[None]
                cos, sin = self.llm.rotary_emb(like, positions)
                self._rope_cache[key] = torch.stack((cos[0], sin[0])).unsqueeze(2)
        return self._rope_cache[key]

    def rotate(self, x: Tensor, first: int) -> Tensor:
        """x [.., n, M, d] rotated to positions first .. first + n - 1."""
        cos, sin = self.rope_table(first, x.shape[-3]).unbind()
        wide = x.to(cos.dtype)
        one, two = wide.chunk(2, dim=-1)  # Qwen2 rotates halves, not interleaved pairs
        return (wide * cos + torch.cat([-two, one], dim=-1) * sin).to(x.dtype)

    def read(self, x: Tensor, past: Sequence[KeyValue] | None, first: int) -> tuple[Tensor, list[KeyValue]]:
        """Tokens x [B, N, D] at positions `first`.. that see the past (each layer's rotated keys and values [B, P, M, d]) and each
        other -> hidden states [B, N, D] and each layer's un-rotated keys and values."""

        def attend(i: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            q, k, v = self.rotate(query, first), self.rotate(key, first), value
            if past is not None:
                k, v = torch.cat([past[i][0], k], dim=1), torch.cat([past[i][1], v], dim=1)
            return attention(q, k, v)

        return self._run(x, attend)

    def read_clip(self, x: Tensor, see: Sequence[Sequence[int]]) -> Tensor:
        """Tokens x [B, chunks, N, D], chunk i seeing the chunks see[i] and itself -> hidden states of the same shape."""
        size = x.shape[2]

        def attend(_: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            queries, own, values = (part.unflatten(1, (-1, size)).unbind(1) for part in (query, key, value))
            seen = []
            # Once for all chunks that see it at the same place.
            rotated = functools.cache(lambda j, place: self.rotate(own[j], place * size))
            for i, others in enumerate(see):
                keys = [rotated(j, place) for place, j in enumerate((*others, i))]
                q, v = self.rotate(queries[i], len(others) * size), torch.cat([values[j] for j in (*others, i)], dim=1)
                seen.append(attention(q, torch.cat(keys, dim=1), v))
            return torch.cat(seen, dim=1)

        return self._run(x.flatten(1, 2), attend)[0].unflatten(1, (-1, size))

    def _run(self, x: Tensor, attend: Attend) -> tuple[Tensor, list[KeyValue]]:
        cached = []
        for i, layer in enumerate(self.llm.layers):
            inputs = (x, functools.partial(attend, i))
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x, own = checkpoint(layer, *inputs, use_reentrant=False)  # pyright: ignore[reportGeneralTypeIssues]
            else:
                x, own = layer(*inputs)
            cached.append(own)
        return self.llm.norm(x), cached


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of [B, n, M, d] tensors, keys and values with fewer heads -> [B, n, M d]."""
    q, k, v = (part.transpose(1, 2) for part in (query, key, value))
    return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)


def read_language_model(net: MidasNet, folder: Path) -> None:
    """The weights of a local Qwen2 folder (transformers' layout; vocabulary left out) in place of fresh ones; UserError where it
    cannot be read or is of another size."""
    from transformers import Qwen2Model

    where = "a local folder of Qwen2 for student.network.llm"
    given = load_pretrained(Qwen2Model, folder, where, net.dtype, (r"lm_head\..*",))
    sizes = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    pairs = {name: (getattr(given.config, name), getattr(net.llm.config, name)) for name in sizes}
    if wrong := [f"{name} {theirs} for {ours}" for name, (theirs, ours) in pairs.items() if theirs != ours]:
        raise UserError(f"another language model: {folder} has {', '.join(wrong)}; set student.network to its sizes")
    del given.embed_tokens
    net.llm.load_state_dict(given.state_dict())
