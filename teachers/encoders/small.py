"""Raw signals -> features: log-mel windows for audio, a small offline T5 encoder with its own tokenizer for text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from teachers.checkpoints.local_model import load_pretrained
from teachers.checkpoints.strict import check_finite
from teachers.errors import UserError
from teachers.files import save_tensors

SAMPLE_RATE = 16_000


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """Log-mel spectrogram columns of `window` samples every `hop` samples; a pixel frame's row stacks the columns inside it."""

    num_mels: int = 20
    hop: int = 320
    window: int = 512

    def dim(self, samples_per_frame: int) -> int:
        """Number of features of a row."""
        return self.num_mels * samples_per_frame // self.hop

    def load(self, samples_per_frame: int) -> "LogMel":
        """The audio encoder, which has no weights."""
        return LogMel(self, samples_per_frame)


@dataclass(frozen=True, kw_only=True)
class NoAudioConfig:
    """No audio condition: plain text-to-video."""

    def dim(self, samples_per_frame: int) -> int:
        """Number of features of a row."""
        return 0

    def load(self, samples_per_frame: int) -> "NoAudio":
        """The audio encoder, which has no weights."""
        return NoAudio(samples_per_frame)


class Rows(nn.Module):
    """An audio encoder whose row t of [.., T, A] covers samples t*n - lookback .. (t+1)*n + lookahead, n = samples_per_frame, the
    same whole-clip or streaming."""

    dim = lookback = lookahead = 0

    def __init__(self, samples_per_frame: int):
        super().__init__()
        self.samples_per_frame = samples_per_frame

    def of_clip(self, audio: Tensor, num_frames: int) -> None:
        """None: the rows of a whole clip are the same."""

    def forward(
        self, audio: Float[Tensor, "*batch samples"], first: int = 0, last: int | None = None
    ) -> Float[Tensor, "*batch rows features"]:
        """audio [.., S] at 16 kHz -> rows first..last-1, [.., last - first, A]; samples outside the clip are silence."""
        n = self.samples_per_frame
        last = -(-audio.shape[-1] // n) if last is None else last
        start, stop = first * n - self.lookback, last * n + self.lookahead
        inner = audio[..., max(start, 0) : min(max(stop, 0), audio.shape[-1])]
        left = min(max(-start, 0), stop - start)
        return self.rows(nn.functional.pad(inner, (left, stop - start - left - inner.shape[-1])), first, last)

    def rows(
        self, window: Float[Tensor, "*batch samples"], first: int, last: int
    ) -> Float[Tensor, "*batch rows features"]:
        """The same rows from exactly the samples that they depend on: window [.., lookback + (last - first) n + lookahead]."""
        raise NotImplementedError


class NoAudio(Rows):
    """Rows [.., T, 0]: the audio determines the length only."""

    def rows(
        self, window: Float[Tensor, "*batch samples"], first: int, last: int
    ) -> Float[Tensor, "*batch rows features"]:
        return window.new_zeros(*window.shape[:-1], last - first, 0)


class LogMel(Rows):
    """Bounded-window log-mel rows. Nothing is normalised over the clip, so a stream needs no other samples."""

    bank: Tensor
    taper: Tensor

    def __init__(self, config: AudioConfig, samples_per_frame: int):
        super().__init__(samples_per_frame)
        from transformers.audio_utils import mel_filter_bank

        if samples_per_frame % config.hop:
            raise ValueError(f"data.audio.hop: {config.hop} does not divide {samples_per_frame} samples a frame")
        self.config = config
        self.columns = samples_per_frame // config.hop
        self.dim = self.columns * config.num_mels
        self.lookback = self.lookahead = (config.window - config.hop) // 2
        bank = mel_filter_bank(
            config.window // 2 + 1, config.num_mels, 60.0, 7600.0, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
        )
        self.register_buffer("bank", torch.tensor(bank, dtype=torch.float32), persistent=False)
        self.register_buffer("taper", torch.hann_window(config.window), persistent=False)

    def rows(
        self, window: Float[Tensor, "*batch samples"], first: int, last: int
    ) -> Float[Tensor, "*batch rows features"]:
        columns = window.unfold(-1, self.config.window, self.config.hop) * self.taper
        power = torch.fft.rfft(columns).abs().square() @ self.bank
        mel = (torch.log(power + 1e-7) + 8.0) / 6.0
        return mel.unflatten(-2, (last - first, self.columns)).flatten(-2)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A byte-level BPE tokenizer and a small umT5-class encoder.

    `path`: a folder whose text/ has a trained one, which the data stage takes over; without it it is trained on the clips' texts.
    """

    path: Path | None = None
    vocab_size: int = 384
    max_tokens: int = 16
    dim: int = 64
    num_layers: int = 2
    num_heads: int = 4
    fitted: ClassVar[bool] = True
    takes_over: ClassVar[bool] = True

    def load(self, folder: Path) -> "TextEncoder":
        """The frozen encoder in `folder`/text, as `TextEncoder.save` wrote it, read strictly from safetensors; UserError where it
        cannot be read, or its size is not this one's."""
        from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

        path, hint = folder / "text", "export the student again"
        model = load_pretrained(UMT5EncoderModel, path, "the whole folder: export the student again", torch.float32)
        if model.config.d_model != self.dim:
            raise UserError(
                f"text encoder of another size: {path} has dim {model.config.d_model}, not {self.dim}; {hint}"
            )
        check_finite(model.state_dict(), path, hint)
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # whatever a reader of a damaged file may raise, a panic of tokenizers among it
            raise UserError(f"unreadable tokenizer: {path} ({type(error).__name__}: {error}); {hint}") from error
        return TextEncoder(tokenizer, model, self.max_tokens)


@dataclass(frozen=True, kw_only=True)
class NoTextConfig:
    """No text condition: one token of no numbers, for networks that take none (SoulX-FlashHead)."""

    max_tokens: ClassVar[int] = 1
    dim: ClassVar[int] = 0
    fitted: ClassVar[bool] = False

    def load(self, folder: Path) -> "NoText":
        """The text encoder, which has no weights."""
        return NoText()


class NoText(nn.Module):
    """Texts -> features [B, 1, 0]."""

    def count(self, text: str) -> int:
        """None of a text is read."""
        return 0

    def forward(self, text: list[str]) -> Float[Tensor, "b 1 0"]:
        return torch.zeros(len(text), 1, 0)


class TextEncoder(nn.Module):
    """Tokenizer + UMT5 encoder; features [B, L, D] with padding zeroed after encoding, as Wan does."""

    def __init__(self, tokenizer, model, max_tokens: int):
        super().__init__()
        self.tokenizer, self.model, self.max_tokens = tokenizer, model, max_tokens

    @classmethod
    def build(cls, config: TextConfig, corpus: list[str]) -> "TextEncoder":
        """A fresh tokenizer fitted on `corpus` and an untrained encoder (initialised from the global generator)."""
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

        bpe = Tokenizer(models.BPE())
        bpe.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        vocab = max(config.vocab_size, len(alphabet) + 2)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab, special_tokens=["<pad>", "</s>"], initial_alphabet=sorted(alphabet), show_progress=False
        )
        bpe.train_from_iterator(sorted(set(corpus)), trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>")
        model = UMT5EncoderModel(
            UMT5Config(
                vocab_size=vocab,
                d_model=config.dim,
                d_kv=config.dim // config.num_heads,
                d_ff=2 * config.dim,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                dropout_rate=0.0,
            )
        )
        return cls(tokenizer, model, config.max_tokens)

    def count(self, text: str) -> int:
        """Number of tokens of a text before truncation."""
        return len(self.tokenizer(text)["input_ids"])

    def tokens(self, text: list[str]) -> tuple[Int[Tensor, "b l"], Int[Tensor, "b l"]]:
        """Token ids and mask [B, L], padded and truncated to max_tokens."""
        out = self.tokenizer(
            text, padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        return out["input_ids"], out["attention_mask"]

    def forward(self, text: list[str]) -> Float[Tensor, "b l d"]:
        """Features [B, max_tokens, D], zero where padded."""
        ids, mask = self.tokens(text)
        device = next(self.model.parameters()).device
        features = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
        return features * mask.unsqueeze(-1).to(features)

    def save(self, folder: Path) -> None:
        """The usual Hugging Face layout."""
        save_model(self.model, folder)
        self.tokenizer.save_pretrained(folder)


def save_model(model: Any, folder: Path) -> None:
    """config.json and model.safetensors of a transformers model in `folder`, for `from_pretrained`; tied weights once.

    `save_pretrained` writes the same files, but imports DeepSpeed first.
    """
    model.config.architectures, model.config.dtype = [type(model).__name__], str(model.dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    save_tensors(folder / "model.safetensors", dict(model.named_parameters()), {"format": "pt"})
