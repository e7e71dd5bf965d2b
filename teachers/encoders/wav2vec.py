"""wav2vec2, OmniAvatar's audio encoder: a whole clip as published, or a stream in bounded windows.

T = pixel frames, n = samples of one, D = wav2vec2's width, A = D * (layers + 2): the last state and every state before it.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from teachers.checkpoints.local_model import load_pretrained, model_files, require
from teachers.disk.read import read_json
from teachers.encoders.small import SAMPLE_RATE
from teachers.errors import UserError

SOURCE = "facebook/wav2vec2-base-960h from the Hugging Face hub"
OVERLAP = 13
"""Frames that a window of OmniAvatar's inference shares with the one before (its overlap_frame)."""
UNUSED = (r"lm_head\..*", r"masked_spec_embed")  # the published file has the first and lacks the second


@dataclass(frozen=True, kw_only=True)
class Wav2VecConfig:
    """wav2vec2 in the local folder `path`, whose rows have `features` numbers, and the windows of a stream in pixel frames.

    Rows come in cells of `grid_frames` frames that begin at grid_start + k grid_frames, however the stream is split. A cell is
    encoded with at least `lookback_frames` before it and `lookahead_frames` after it. With grid_start = 1 - stride, a cell of
    stride frames is one latent frame and a cell of stride * chunk_frames is one chunk; larger cells are fewer windows a second.
    The default look-back is the receptive field of wav2vec2's positional convolution.

    With `whole_clip` bidirectional networks (teacher, fake score) are conditioned on the published rows of the whole clip, after
    `prefix_frames` rows of zeros: 1 in OmniAvatar's inference, 0 in LiveTalk's training; the causal student on the windows.
    """

    path: Path | None = None
    features: int = 10752
    lookback_frames: int = 64
    lookahead_frames: int = 4
    grid_frames: int = 4
    grid_start: int = -3
    whole_clip: bool = True
    prefix_frames: int = 0

    def __post_init__(self):
        if self.grid_frames < 1 or self.lookback_frames < 0 or self.lookahead_frames < 0:
            raise UserError(
                f"wav2vec2 windows: got lookback_frames={self.lookback_frames}, lookahead_frames={self.lookahead_frames}, "
                f"grid_frames={self.grid_frames}; the first two are at least 0, the last is at least 1"
            )

    def dim(self, samples_per_frame: int) -> int:
        """Number of features of a row."""
        return self.features

    def load(self, samples_per_frame: int) -> "Wav2Vec":
        """The frozen audio encoder. UserError lists what is missing or of another shape."""
        if self.path is None:
            raise UserError(f"wav2vec2: no path; give the folder of {SOURCE}")
        audio_encoder = Wav2Vec.load(self.path, self, samples_per_frame)
        if audio_encoder.dim != self.features:
            raise UserError(
                f"wav2vec2: features={self.features}, the weights give {audio_encoder.dim}: {self.path}; use the latter"
            )
        return audio_encoder

    def write_random(self, folder: Path) -> None:
        """A small network with random weights in the layout that `load` reads, for recipes with size=tiny."""
        from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

        width = self.features // 4  # two layers: their states, the input's, and the last again
        shape = Wav2Vec2Config(
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=width,
            conv_dim=(8,) * 7,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
        )
        Wav2Vec2Model(shape).save_pretrained(folder)
        Wav2Vec2FeatureExtractor().save_pretrained(folder)


class Wav2Vec(nn.Module):
    """OmniAvatar's audio features, one row per pixel frame: `whole` for a clip, `forward` or `rows` for a stream.

    A stream's rows first..last-1, whole cells, depend on samples first*n - lookback .. last*n + lookahead and no others.

    wav2vec2's features lie `hop` samples apart (20 ms) on a grid that begins with the first sample. A window begins where the whole
    clip's grid falls on a frame, every `period` frames (8 at 16 fps, 1 at 25): off that grid the features differ completely.
    OmniAvatar makes first and last feature first and last row, so a row drifts by up to n - 400 samples over a clip (none at
    25 fps); a stream has no last row, and its rows are placed at the mean drift.
    """

    def __init__(self, model, config: Wav2VecConfig, samples_per_frame: int, normalise: bool = True):
        super().__init__()
        shape = model.config
        if shape.do_stable_layer_norm:
            raise UserError(
                "wav2vec2: do_stable_layer_norm is of a larger model than OmniAvatar's; use wav2vec2-base-960h"
            )
        reach, self.hop = 1, math.prod(shape.conv_stride)
        for kernel, stride in zip(shape.conv_kernel[::-1], shape.conv_stride[::-1], strict=True):
            reach = (reach - 1) * stride + kernel
        if samples_per_frame < reach:
            raise UserError(
                f"fps: a frame of {samples_per_frame} samples is shorter than wav2vec2's {reach}; "
                f"take at most {SAMPLE_RATE // reach} frames a second"
            )
        self.model, self.config, self.samples_per_frame, self.normalise = model, config, samples_per_frame, normalise
        self.dim = shape.hidden_size * (shape.num_hidden_layers + 2)
        self.period = self.hop // math.gcd(self.hop, samples_per_frame)
        clips = [(t, (t * samples_per_frame - reach) // self.hop) for t in range(1, self.period + 1)]
        drifts = [features - (t - 1) * samples_per_frame / self.hop for t, features in clips]
        self.offset = sum(drifts) / (2 * self.period)
        self.lookback = (config.lookback_frames + self.period - 1) * samples_per_frame
        self.lookahead = config.lookahead_frames * samples_per_frame
        self._places: dict[tuple, tuple[Tensor, Tensor]] = {}  # of rows among features

    @classmethod
    def load(cls, folder: Path, config: Wav2VecConfig, samples_per_frame: int) -> "Wav2Vec":
        """From a local Hugging Face folder, frozen, in fp32 as published. UserError lists what is missing or of another shape."""
        from transformers import Wav2Vec2Model

        require(folder, ["preprocessor_config.json", *model_files(folder)], SOURCE)
        model = load_pretrained(Wav2Vec2Model, folder, SOURCE, torch.float32, UNUSED)
        preprocessor = read_json(folder / "preprocessor_config.json")
        if (rate := preprocessor.get("sampling_rate")) != SAMPLE_RATE:
            raise UserError(
                f"sampling_rate is {rate}, not {SAMPLE_RATE}: {folder / 'preprocessor_config.json'}; get {SOURCE}"
            )
        return cls(model, config, samples_per_frame, preprocessor.get("do_normalize", True))

    def whole(
        self, audio: Float[Tensor, "*batch samples"], num_frames: int, prefix: int = 0
    ) -> Float[Tensor, "*batch {num_frames} features"]:
        """audio [.., S] at 16 kHz of a whole clip -> rows [.., num_frames, A], equal to OmniAvatar's (its scripts/inference.py).

        The sound is normalised over the clip, then truncated or padded with silence to its length, never stretched; every row
        depends on all of it and on num_frames. `prefix` rows of zeros come first and the sound is that many frames late: 1 for the
        reference frame in OmniAvatar's inference, 0 in LiveTalk's training. `conditions.pack_rows` then puts row 0 in front three
        times.
        """
        length = (num_frames - prefix) * self.samples_per_frame
        waves = self._level(self._waves(audio))[:, :length]
        features = self.model.feature_extractor(nn.functional.pad(waves, (0, length - waves.shape[1])))
        rows = self._states(
            nn.functional.interpolate(features, size=num_frames - prefix, mode="linear", align_corners=True)
        )
        return nn.functional.pad(rows, (0, 0, prefix, 0)).reshape(*audio.shape[:-1], num_frames, self.dim)

    def of_clip(
        self, audio: Float[Tensor, "*batch samples"], num_frames: int
    ) -> Float[Tensor, "*batch {num_frames} features"] | None:
        """Rows [.., num_frames, A] for bidirectional networks; None where they equal a stream's.

        Audio that is longer than the clip is encoded whole, and the first rows are taken: OmniAvatar's first window, whose sound is
        padded with silence to the end of its last window, each OVERLAP frames into the one before.
        """
        if not self.config.whole_clip:
            return None
        total, frames = num_frames, -(-audio.shape[-1] // self.samples_per_frame)
        if frames > num_frames:
            step = max(1, num_frames - OVERLAP)
            total += -(-(frames + self.config.prefix_frames - num_frames) // step) * step
        return self.whole(audio, total, self.config.prefix_frames)[..., :num_frames, :]

    def forward(
        self, audio: Float[Tensor, "*batch samples"], first: int = 0, last: int | None = None
    ) -> Float[Tensor, "*batch rows features"]:
        """audio [.., S] at 16 kHz -> rows first..last-1, [.., last - first, A], as in a stream.

        Nothing precedes sample 0, silence follows the last sample. Any split of the rows into calls gives the same bits.
        ValueError for an empty range.
        """
        n = self.samples_per_frame
        last = -(-audio.shape[-1] // n) if last is None else last
        if not 0 <= first < last:
            raise ValueError(f"rows {first}..{last - 1}: need 0 <= first < last")
        start, stop = max(self._cell(first), 0), self._cell(last - 1) + self.config.grid_frames
        begin, end = start * n - self.lookback, stop * n + self.lookahead
        samples = audio[..., max(begin, 0) : end]
        left = max(-begin, 0)
        window = nn.functional.pad(samples, (left, end - begin - left - samples.shape[-1]))
        return self.rows(window, start, stop)[..., first - start : last - start, :]

    def rows(
        self, window: Float[Tensor, "*batch samples"], first: int, last: int
    ) -> Float[Tensor, "*batch rows features"]:
        """The same rows from exactly the samples that they depend on: window [.., lookback + (last - first) n + lookahead].

        Each cell is encoded as a short clip of its own: normalised and attended to within its window, whatever other rows are
        requested, so the result does not depend on the call. UserError where first and last are no cell borders.
        """
        config, n = self.config, self.samples_per_frame
        if (first and self._cell(first) != first) or self._cell(last) != last:
            raise UserError(
                f"wav2vec2 windows: frames {first}..{last - 1} are not whole cells of grid_frames={config.grid_frames} from "
                f"grid_start={config.grid_start}; take grid_frames = the codec's stride and grid_start = 1 - stride"
            )
        waves, cells = self._waves(window), []
        for cell in range(self._cell(first), last, config.grid_frames):
            begin, stop = max(cell - config.lookback_frames, 0), cell + config.grid_frames + config.lookahead_frames
            begin -= begin % self.period
            at = (begin - first) * n + self.lookback
            features = self.model.feature_extractor(self._level(waves[:, at : at + (stop - begin) * n].clone()))
            states = self._states(self._at_frames(features, stop - begin))
            cells.append(states[:, max(cell, 0) - begin : cell + config.grid_frames - begin])
        return torch.cat(cells, dim=1).reshape(*window.shape[:-1], last - first, self.dim)

    def _cell(self, frame: int) -> int:
        """First frame of the cell of `frame`."""
        return frame - (frame - self.config.grid_start) % self.config.grid_frames

    def _waves(self, audio: Tensor) -> Tensor:
        """[.., S] -> [B, S] on the model's device and in its precision."""
        return audio.reshape(-1, audio.shape[-1]).to(next(self.model.parameters()))

    def _level(self, waves: Tensor) -> Tensor:
        """Zero mean and unit variance over all samples, as Wav2Vec2FeatureExtractor does."""
        if not self.normalise:
            return waves
        centred = waves - waves.mean(dim=1, keepdim=True)
        return centred / (centred.square().mean(dim=1, keepdim=True) + 1e-7).sqrt()

    def _at_frames(self, features: Tensor, num_rows: int) -> Tensor:
        """[B, C, L] on the 20 ms grid -> [B, C, num_rows], linear, a row every n / hop features."""
        last, device, dtype = features.shape[-1] - 1, features.device, features.dtype
        key = (num_rows, last, device, dtype)
        if key not in self._places:  # kept on the device: a copy to it would stall a stream at each cell
            with torch.inference_mode(False):
                place = torch.arange(num_rows, dtype=torch.float64) * self.samples_per_frame / self.hop + self.offset
                left = place.clamp(0, last).long()
                self._places[key] = left.to(device), (place - left).clamp(0, 1).to(device, dtype)
        left, share = self._places[key]
        return torch.lerp(features[..., left], features[..., (left + 1).clamp(max=last)], share)

    def _states(self, features: Tensor) -> Tensor:
        """Features [B, C, T] at the video rate -> every state of the transformer [B, T, A]."""
        x, _ = self.model.feature_projection(features.transpose(1, 2))
        encoder = self.model.encoder
        x = encoder.layer_norm(x + encoder.pos_conv_embed(x))
        states = [x]
        for layer in encoder.layers:
            x = layer(x)
            states.append(x)
        return torch.cat([x, *states], dim=-1)
