"""Whisper's encoder (2212.04356) as an audio encoder of teachers: means of its states, a whole clip in blocks of 30 s, or a stream.

T = pixel frames, n = samples of one, D = Whisper's width, G = means of states.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from teachers.checkpoints.local_model import load_pretrained, model_files, require
from teachers.disk.read import read_json
from teachers.encoders.small import SAMPLE_RATE
from teachers.encoders.wav2vec import Wav2Vec
from teachers.errors import UserError

SOURCE = "openai/whisper-large-v3 from the Hugging Face hub, or whisper-large-v3/ of meituan-longcat/LongCat-Video-Avatar-1.5"
BLOCK = 30 * SAMPLE_RATE
"""Samples that Whisper takes at once; a shorter sound is padded with silence."""
STATE, MEL_WINDOW, MEL_HOP = 320, 400, 160
"""Samples from one state to the next, and of a column of the log-mel spectrogram."""


@dataclass(frozen=True, kw_only=True)
class WhisperConfig:
    """Whisper in the local folder `path`, whose rows have `features` numbers, and the windows of a stream as `Wav2VecConfig` has
    them.

    A row is the means of `groups` equal groups of states, the embedding's among them, and the last state, interpolated from 50 a
    second to the video's rate; `window` of its neighbours side by side, at the ends of the sound the first and the last one
    (LongCat-Video-Avatar 1.5: states 0-7, 8-15, 16-23, 24-31 and 32). `loudness`: the sound is brought to so many LUFS before.
    """

    path: Path | None = None
    features: int = 32000
    groups: int = 4
    lookback_frames: int = 64
    lookahead_frames: int = 4
    grid_frames: int = 4
    grid_start: int = -3
    whole_clip: bool = True
    window: tuple[int, int] = (2, 2)
    loudness: float | None = -23.0
    source: str = SOURCE

    noise: ClassVar = None  # these of `Wav2VecConfig`
    low_pass: ClassVar = None
    resample: ClassVar = "features"

    def dim(self, samples_per_frame: int) -> int:
        """Number of features of a row."""
        return self.features

    def load(self, samples_per_frame: int) -> "Whisper":
        """The frozen audio encoder in fp32. UserError lists what is missing or of another shape."""
        from transformers import WhisperModel

        if self.path is None:
            raise UserError(f"whisper: no path; give the folder of {self.source}")
        require(self.path, ["preprocessor_config.json", *model_files(self.path)], self.source)
        model = load_pretrained(WhisperModel, self.path, self.source, torch.float32, (r"proj_out\..*",))
        rate = read_json(self.path / "preprocessor_config.json").get("sampling_rate")
        if rate != SAMPLE_RATE:
            raise UserError(f"sampling_rate is {rate}, not {SAMPLE_RATE}: {self.path}; get {self.source}")
        audio_encoder = Whisper(model.encoder, self, samples_per_frame)
        if audio_encoder.dim != self.features:
            raise UserError(
                f"whisper: features={self.features}, the weights give {audio_encoder.dim}: {self.path}; use the latter"
            )
        return audio_encoder

    def write_random(self, folder: Path) -> None:
        """A small network with random weights in the layout that `load` reads, for recipes with size=tiny."""
        from transformers import WhisperConfig as Shape
        from transformers import WhisperFeatureExtractor, WhisperModel

        width = self.features // ((self.groups + 1) * (1 + sum(self.window)))
        sizes = {"encoder_attention_heads": 1, "decoder_attention_heads": 1, "decoder_layers": 1, "vocab_size": 8}
        sizes |= {"encoder_ffn_dim": width, "decoder_ffn_dim": width, "num_mel_bins": 8}
        tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
        shape = Shape(d_model=width, encoder_layers=self.groups, **sizes, **tokens)
        WhisperModel(shape).save_pretrained(folder)
        WhisperFeatureExtractor(feature_size=8).save_pretrained(folder)


class Whisper(Wav2Vec):
    """Rows of Whisper's encoder, one a pixel frame; `whole`, `forward` and `rows` as `Wav2Vec` has them.

    In a stream a cell is a sound of its own, padded to 30 s as all of them are, so a cell costs what 30 s do.
    """

    def __init__(self, model: Any, config: WhisperConfig, samples_per_frame: int):
        from transformers.audio_utils import mel_filter_bank

        nn.Module.__init__(self)
        self.model, self.config, self.samples_per_frame = model, config, samples_per_frame
        layers, bins = len(model.layers), model.config.num_mel_bins
        if layers % config.groups:
            raise UserError(f"whisper groups: {config.groups} do not divide its {layers} states but the last")
        self.dim = model.config.d_model * (config.groups + 1) * (1 + sum(config.window))
        self.hop, self.native, self.per_frame, self.samples_per_row = STATE, False, 1, samples_per_frame
        self.period, self.offset = 1, 0.5 * (samples_per_frame / STATE - 1)  # the mean drift of a clip's rows
        if config.window[1] > config.lookahead_frames:
            raise UserError(f"whisper window: {config.window[1]} rows are beyond lookahead_frames; raise it")
        self.lookback = config.lookback_frames * samples_per_frame
        self.lookahead = config.lookahead_frames * samples_per_frame
        self._places = {}
        filters = mel_filter_bank(MEL_WINDOW // 2 + 1, bins, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, "slaney", "slaney")
        self.register_buffer("filters", torch.from_numpy(filters).float().mT, persistent=False)

    def whole(
        self, audio: Float[Tensor, "*batch samples"], num_frames: int, prefix: int = 0
    ) -> Float[Tensor, "*batch {num_frames} features"]:
        """audio [.., S] at 16 kHz of a whole clip -> rows [.., num_frames, A], as published: its loudness normalised, blocks of
        30 s apart, the states of num_frames interpolated to their number. It is truncated or padded with silence to its length."""
        if prefix:
            raise UserError("whisper: there are no rows in front of a clip; set prefix_frames to 0")
        n = self.samples_per_frame
        waves = self._prepared(self._waves(audio), 0)[:, : num_frames * n + n - 1]
        waves = F.pad(waves, (0, max(0, num_frames * n - waves.shape[1])))
        states = torch.cat([self._block(block) for block in waves.split(BLOCK, dim=1)], dim=1)
        states = states[:, : num_frames * n // STATE].mT
        rows = F.interpolate(states, size=num_frames, mode="linear", align_corners=True).mT
        return self._windows(rows, 0, num_frames).reshape(*audio.shape[:-1], num_frames, self.dim)

    def of_clip(
        self, audio: Float[Tensor, "*batch samples"], num_frames: int
    ) -> Float[Tensor, "*batch {num_frames} features"] | None:
        """Rows [.., num_frames, A] for bidirectional networks; None where they equal a stream's. Audio that is longer than the clip
        is encoded whole, and the first rows are taken."""
        if not self.config.whole_clip:
            return None
        return self.whole(audio, max(num_frames, audio.shape[-1] // self.samples_per_frame))[..., :num_frames, :]

    def _encode(self, sound: Tensor, frames: int) -> Tensor:
        return self._at_frames(self._block(sound).mT, frames).mT

    def _block(self, waves: Tensor) -> Tensor:
        """States [B, S / 320, G + 1 means of D] of at most 30 s of sound [B, S], silence in the place of the rest."""
        encoder = self.model
        count = min(-(-waves.shape[1] // STATE), BLOCK // STATE)
        x = F.gelu(encoder.conv1(self.log_mel(F.pad(waves, (0, BLOCK - waves.shape[1])))))
        x = F.gelu(encoder.conv2(x)).mT + encoder.embed_positions.weight
        states = [x[:, :count]]
        for layer in encoder.layers:
            x = layer(x, None)
            states.append(x[:, :count])
        last = encoder.layer_norm(x)[:, :count]
        size = len(encoder.layers) // self.config.groups
        means = [torch.stack(states[i : i + size]).mean(dim=0) for i in range(0, len(encoder.layers), size)]
        return torch.cat([*means, last], dim=2)

    def log_mel(self, waves: Tensor) -> Tensor:
        """Whisper's log-mel spectrogram [B, bins, S / 160] of [B, S]: eight decades below its maximum, scaled to about -1 .. 1."""
        window = torch.hann_window(MEL_WINDOW, device=waves.device, dtype=waves.dtype)
        spectrum = torch.stft(waves, MEL_WINDOW, MEL_HOP, window=window, return_complex=True)[..., :-1].abs().square()
        mel = (self.get_buffer("filters") @ spectrum).clamp(min=1e-10).log10()
        return (torch.maximum(mel, mel.amax(dim=(1, 2), keepdim=True) - 8.0) + 4.0) / 4.0
