"""umT5-xxl, Wan's text encoder, with Wan's text cleaning: 512 tokens, padding zeroed after encoding."""

import html
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from teachers.checkpoints.local_model import load_pretrained, model_files, require
from teachers.checkpoints.strict import check_shapes, load_strict, shapes_of
from teachers.checkpoints.weights import read_tensors
from teachers.encoders.small import TextEncoder, save_model
from teachers.errors import UserError

DIFFUSERS = "text_encoder/ and tokenizer/ of Wan-AI/Wan2.1-T2V-1.3B-Diffusers from the Hugging Face hub"
ORIGINAL = "models_t5_umt5-xxl-enc-bf16.pth and google/umt5-xxl/ of Wan-AI/Wan2.1-T2V-1.3B from the Hugging Face hub"
TINY_WORDS = ("a", "person", "someone", "the", "and", "nods", "smiles", "talks", "head", "shakes", "still", "looks")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
PLAIN = re.compile(r"(?!.*&\w+;)[ -~\t\n\r\f]*", re.DOTALL)  # what ftfy does not change, entities resolved

NAMES = {
    "token_embedding": "shared",
    "blocks.N.norm1": "encoder.block.N.layer.0.layer_norm",
    "blocks.N.attn.q": "encoder.block.N.layer.0.SelfAttention.q",
    "blocks.N.attn.k": "encoder.block.N.layer.0.SelfAttention.k",
    "blocks.N.attn.v": "encoder.block.N.layer.0.SelfAttention.v",
    "blocks.N.attn.o": "encoder.block.N.layer.0.SelfAttention.o",
    "blocks.N.pos_embedding.embedding": "encoder.block.N.layer.0.SelfAttention.relative_attention_bias",
    "blocks.N.norm2": "encoder.block.N.layer.1.layer_norm",
    "blocks.N.ffn.gate.0": "encoder.block.N.layer.1.DenseReluDense.wi_0",
    "blocks.N.ffn.fc1": "encoder.block.N.layer.1.DenseReluDense.wi_1",
    "blocks.N.ffn.fc2": "encoder.block.N.layer.1.DenseReluDense.wo",
    "norm": "encoder.final_layer_norm",
}
"""Weights of Wan's own umT5 file -> weights of transformers' UMT5EncoderModel; N is the layer."""


def clean(text: str) -> str:
    """Wan's text cleaning: ftfy, HTML entities unescaped twice, runs of white space replaced by one blank.

    ftfy changes curly quotes and full-width signs among others (Wan's own negative prompt has them); diffusers
    silently skips it where it is not installed. Here that is a UserError, unless the text is plain ASCII, which needs no ftfy.
    """
    try:
        from ftfy import fix_text  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        if not PLAIN.fullmatch(html.unescape(html.unescape(text))):
            raise UserError(f"text beyond ASCII is cleaned with ftfy: {text[:40]!r}; pip install ftfy") from error
    else:
        text = fix_text(text)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()


@dataclass(frozen=True, kw_only=True)
class UMT5Config:
    """umT5 in `path`: a diffusers folder of Wan (text_encoder/, tokenizer/), or Wan's own with models_t5_umt5-xxl-enc-bf16.pth."""

    path: Path
    max_tokens: int = 512
    dim: int = 4096
    fitted: ClassVar[bool] = False

    def load(self, folder: Path) -> "UMT5":
        """The frozen encoder in bf16, as published. UserError lists what is missing or of another shape."""
        if (own := self.path / "models_t5_umt5-xxl-enc-bf16.pth").is_file():
            encoder = UMT5.load_original(own, self.path / "google" / "umt5-xxl", self.max_tokens)
        else:
            encoder = UMT5.load(self.path, self.max_tokens)
        if (width := encoder.model.config.d_model) != self.dim:
            raise UserError(f"umt5: dim={self.dim}, the weights have {width}: {self.path}; use the latter")
        return encoder

    def write_random(self, folder: Path) -> None:
        """A small encoder with random weights in the layout that `load` reads, for recipes with size=tiny."""
        from transformers import T5Tokenizer, UMT5EncoderModel
        from transformers import UMT5Config as Shape

        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -3.0)]
        pieces += [(f"▁{word}", -1.0) for word in TINY_WORDS]
        shape = Shape(vocab_size=len(pieces), d_model=self.dim, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        save_model(UMT5EncoderModel(shape), folder / "text_encoder")
        T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder / "tokenizer")


class UMT5(TextEncoder):
    """Tokenizer + UMT5EncoderModel; features [B, 512, D] of cleaned text in the model's precision, zero where padded."""

    def count(self, text: str) -> int:
        """Number of tokens of a cleaned text before truncation."""
        return super().count(clean(text))

    def tokens(self, text: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask [B, L] of the cleaned text, padded and truncated to max_tokens."""
        return super().tokens([clean(one) for one in text])

    def save(self, folder: Path) -> None:
        """Wan's diffusers layout: text_encoder/ and tokenizer/."""
        save_model(self.model, folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")

    @classmethod
    def load(cls, folder: Path, max_tokens: int = 512, dtype: torch.dtype = torch.bfloat16) -> "UMT5":
        """From text_encoder/ and tokenizer/ of a local diffusers folder of Wan. UserError lists missing or mismatched tensors."""
        from transformers import UMT5EncoderModel

        encoder = [f"text_encoder/{name}" for name in model_files(folder / "text_encoder")]
        require(folder, [*encoder, *(f"tokenizer/{name}" for name in TOKENIZER)], DIFFUSERS)
        model = load_pretrained(UMT5EncoderModel, folder / "text_encoder", DIFFUSERS, dtype)
        return cls(_tokenizer(folder / "tokenizer", model, DIFFUSERS), model, max_tokens)

    @classmethod
    def load_original(
        cls, weights: Path, tokenizer: Path, max_tokens: int = 512, dtype: torch.dtype = torch.bfloat16
    ) -> "UMT5":
        """From Wan's own files: models_t5_umt5-xxl-enc-bf16.pth and the folder google/umt5-xxl beside it."""
        require(weights.parent, [weights.name], ORIGINAL)
        require(tokenizer, TOKENIZER, ORIGINAL)
        model = from_original(read_tensors(weights, f"get {ORIGINAL}"), weights, dtype)
        return cls(_tokenizer(tokenizer, model, ORIGINAL), model, max_tokens)


def from_original(tensors: Mapping[str, Tensor], where: Path, dtype: torch.dtype):
    """The frozen UMT5EncoderModel of weights with Wan's own names, its size inferred from their shapes.

    Nothing that has `dtype` already is copied. UserError lists missing and unexpected names and mismatched shapes.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    num_layers = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    names = {
        f"{wan}.weight".replace("N", str(i)): f"{ours}.weight".replace("N", str(i))
        for i in range(max(1, num_layers))
        for wan, ours in NAMES.items()
    }
    check_shapes(dict.fromkeys(tensors, ()), dict.fromkeys(names, ()), where, f"get {ORIGINAL}")  # the names alone
    vocabulary, width = tensors["token_embedding.weight"].shape
    buckets, heads = tensors["blocks.0.pos_embedding.embedding.weight"].shape
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=tensors["blocks.0.attn.q.weight"].shape[0] // heads,
        d_ff=tensors["blocks.0.ffn.fc1.weight"].shape[0],
        num_layers=num_layers,
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    own = model.state_dict()
    check_shapes(shapes_of(tensors), {name: own[names[name]].shape for name in names}, where, f"get {ORIGINAL}")
    named = {names[name]: tensor.to(dtype) for name, tensor in tensors.items()}
    tied = {"encoder.embed_tokens.weight": named["shared.weight"]}
    load_strict(model, named | tied, where, f"get {ORIGINAL}", assign=True)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def _tokenizer(folder: Path, model, source: str):
    """The tokenizer of a local folder; UserError if it is unreadable or has more tokens than the model."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever a reader of a damaged file may raise, a panic of tokenizers among it
        raise UserError(f"unreadable tokenizer: {folder} ({type(error).__name__}: {error}); get {source}") from error
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"tokenizer of another model: {folder} has {len(tokenizer)} tokens, the encoder {model.config.vocab_size}; "
            f"get {source}"
        )
    return tokenizer
