"""A layer of MIDAS' language model; a file of its own, since transformers is imported only where such a student is made."""

from collections.abc import Callable

from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from teachers.networks.kind import KeyValue


class MidasLayer(Qwen2DecoderLayer):
    """Qwen2's layer with the attention function as an argument. Sharding engines gather its weights at its forward."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, KeyValue]:
        """x [B, N, D], `attend` of un-rotated query, key and value [B, N, M, d] -> the new x, and un-rotated keys and values."""
        own, normed = self.self_attn, self.input_layernorm(x)
        split = (-1, own.head_dim)
        query, key, value = (project(normed).unflatten(-1, split) for project in (own.q_proj, own.k_proj, own.v_proj))
        x = x + own.o_proj(attend(query, key, value))
        return x + self.mlp(self.post_attention_layernorm(x)), (key, value)
