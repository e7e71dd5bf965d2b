"""wav2vec2, the audio encoder of OmniAvatar and others: a whole clip as published, or a stream in bounded windows.

T = pixel frames, n = samples of one, D = wav2vec2's width, A = the numbers of a row, OmniAvatar's D * (layers + 2).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from teachers.checkpoints.local_model import load_pretrained, model_files, require
from teachers.disk.read import read_json
from teachers.encoders.loudness import low_pass, to_loudness, with_noise
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

    `states`: which states of the transformer a row has: published (OmniAvatar), the last and then every one, the embedding first;
    layers (MultiTalk, InfiniteTalk), what every layer gives; last (EchoMimicV3, StableAvatar, FantasyTalking); all, every one once.
    `rate`: states a second. null: those of the video, to which the features are interpolated before the transformer; 50:
    wav2vec2's own, and nothing is interpolated; others are multiples of the video's. `resample`: whether the features before the
    transformer are brought to that rate, or (Wan2.2-S2V, `rate` 30) the states behind it, of which a row is the one nearest to its
    frame; there no rate is a multiple, and rows of a whole clip are zeros beyond its sound. `window`: a row is the states of its
    frame's first instant with so many before and after it side by side, at the ends of the sound the first and the last one. The
    look-ahead has to hold what a window needs. A louder sound gives the same rows: it is brought to unit variance, where the
    weights' own preprocessor asks for that, so MultiTalk's normalisation to -23 LUFS changes nothing here. `loudness`, in LUFS,
    does where a `noise` floor is added then, in dB of full scale; a `low_pass` in Hz comes last (LongCat-Video-Avatar 1.0).
    `source`: where the weights are to be had, for messages.

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
    states: Literal["published", "layers", "last", "all"] = "published"
    rate: int | None = None
    resample: Literal["features", "states"] = "features"
    window: tuple[int, int] = (0, 0)
    loudness: float | None = None
    noise: float | None = None
    low_pass: float | None = None
    source: str = SOURCE

    def __post_init__(self):
        if len(self.window) != 2 or min(self.window) < 0:
            raise UserError(
                f"wav2vec2 window: got {list(self.window)}; give two counts, before and after a row, from 0"
            )
        if self.grid_frames < 1 or self.lookback_frames < 0 or self.lookahead_frames < 0:
            raise UserError(
                f"wav2vec2 windows: got lookback_frames={self.lookback_frames}, lookahead_frames={self.lookahead_frames}, "
                f"grid_frames={self.grid_frames}; the first two are at least 0, the last is at least 1"
            )

        if self.resample == "states" and (self.rate is None or self.rate < 1 or any(self.window)):
            raise UserError(
                f"wav2vec2 resample: states: got rate={self.rate}, window={list(self.window)}; give a rate, published is 30, "
                "no window"
            )

    def dim(self, samples_per_frame: int) -> int:
        """Number of features of a row."""
        return self.features

    def load(self, samples_per_frame: int) -> "Wav2Vec":
        """The frozen audio encoder. UserError lists what is missing or of another shape."""
        if self.path is None:
            raise UserError(f"wav2vec2: no path; give the folder of {self.source}")
        audio_encoder = Wav2Vec.load(self.path, self, samples_per_frame)
        if audio_encoder.dim != self.features:
            raise UserError(
                f"wav2vec2: features={self.features}, the weights give {audio_encoder.dim}: {self.path}; use the latter"
            )
        return audio_encoder

    def write_random(self, folder: Path) -> None:
        """A small network with random weights in the layout that `load` reads, for recipes with size=tiny."""
        from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

        states = {"published": 4, "layers": 2, "last": 1, "all": 3}[self.states]  # of two layers and their input
        width = self.features // (states * (1 + sum(self.window)))
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
        reach, self.hop = 1, math.prod(shape.conv_stride)
        for kernel, stride in zip(shape.conv_kernel[::-1], shape.conv_stride[::-1], strict=True):
            reach = (reach - 1) * stride + kernel
        if samples_per_frame < reach:
            raise UserError(
                f"fps: a frame of {samples_per_frame} samples is shorter than wav2vec2's {reach}; "
                f"take at most {SAMPLE_RATE // reach} frames a second"
            )
        self.model, self.config, self.samples_per_frame, self.normalise = model, config, samples_per_frame, normalise
        layers = shape.num_hidden_layers
        kept = {"published": layers + 2, "layers": layers, "last": 1, "all": layers + 1}[config.states]
        self.dim = shape.hidden_size * kept * (1 + sum(config.window))
        self.per_frame, self.samples_per_row = _rows_a_frame(config, samples_per_frame)
        self.native, self.reach = self.samples_per_row == self.hop, reach
        needed = config.window[1] + (1 if self.native else 0)  # the last state of a window's sound is not there
        if needed > config.lookahead_frames * self.per_frame:
            raise UserError(
                f"wav2vec2 window: {config.window[1]} states after a row are beyond lookahead_frames={config.lookahead_frames} of "
                f"{self.per_frame} each; raise it"
            )
        self.period = self.hop // math.gcd(self.hop, samples_per_frame)
        clips = [
            (t, (t * self.samples_per_row - reach) // self.hop) for t in range(1, self.period * self.per_frame + 1)
        ]
        drifts = [features - (t - 1) * self.samples_per_row / self.hop for t, features in clips]
        if (
            config.resample == "states"
        ):  # of sounds of all lengths, the first and the last state are the first and the last row
            native, rate = SAMPLE_RATE // self.hop, config.rate or 1
            drifts = [n - 1 - (n * rate // native - 1) * native / rate for n in range(native, 2 * native)]
        self.offset = sum(drifts) / (2 * len(drifts))
        self.lookback = (config.lookback_frames + self.period - 1) * samples_per_frame
        self.lookahead = config.lookahead_frames * samples_per_frame
        self._places: dict[tuple, tuple[Tensor, Tensor]] = {}  # of rows among features

    @classmethod
    def load(cls, folder: Path, config: Wav2VecConfig, samples_per_frame: int) -> "Wav2Vec":
        """From a local Hugging Face folder, frozen, in fp32 as published. UserError lists what is missing or of another shape."""
        from transformers import Wav2Vec2Model

        require(folder, ["preprocessor_config.json", *model_files(folder)], config.source)
        model = load_pretrained(Wav2Vec2Model, folder, config.source, torch.float32, UNUSED)
        preprocessor = read_json(folder / "preprocessor_config.json")
        if (rate := preprocessor.get("sampling_rate")) != SAMPLE_RATE:
            raise UserError(
                f"sampling_rate is {rate}, not {SAMPLE_RATE}: {folder / 'preprocessor_config.json'}; get {config.source}"
            )
        return cls(model, config, samples_per_frame, preprocessor.get("do_normalize", True))

    def whole(
        self, audio: Float[Tensor, "*batch samples"], num_frames: int, prefix: int = 0
    ) -> Float[Tensor, "*batch {num_frames} features"]:
        """audio [.., S] at 16 kHz of a whole clip -> rows [.., num_frames, A], equal to OmniAvatar's (its scripts/inference.py).

        The sound is normalised over the clip, then truncated (at wav2vec2's own rate it is not) or padded with silence to its
        length, never stretched; every row depends on all of it and on num_frames. `prefix` rows of zeros come first and the sound
        is that many frames late: 1 for the reference frame in OmniAvatar's inference, 0 in LiveTalk's training.
        `conditions.pack_rows` then puts row 0 in front three times.
        """
        frames = num_frames - prefix
        count, length = frames * self.per_frame, frames * self.samples_per_frame
        waves = self._level(self._prepared(self._waves(audio), 0))
        if self.config.resample == "states":
            waves = nn.functional.pad(waves, (0, max(0, self.reach - waves.shape[1])))
            rows = self._nearest(self._states(self.model.feature_extractor(waves)), frames)
            return nn.functional.pad(rows, (0, 0, prefix, 0)).reshape(*audio.shape[:-1], num_frames, self.dim)
        if self.native:  # all of the sound, and silence where the last row's state lies beyond it
            length = (frames - 1) * self.samples_per_frame + self.reach
        else:  # all but OmniAvatar keep what is left of a frame
            waves = waves[:, : length + (0 if self.config.states == "published" else self.samples_per_frame - 1)]
        features = self.model.feature_extractor(nn.functional.pad(waves, (0, max(0, length - waves.shape[1]))))
        if not self.native:
            features = nn.functional.interpolate(features, size=count, mode="linear", align_corners=True)
        rows = self._windows(self._states(features), 0, frames)
        return nn.functional.pad(rows, (0, 0, prefix, 0)).reshape(*audio.shape[:-1], num_frames, self.dim)

    def of_clip(
        self, audio: Float[Tensor, "*batch samples"], num_frames: int
    ) -> Float[Tensor, "*batch {num_frames} features"] | None:
        """Rows [.., num_frames, A] for bidirectional networks; None where they equal a stream's.

        Audio that is longer than the clip is encoded whole, and the first rows are taken. OmniAvatar's (states: published) is its
        first window, whose sound is padded with silence to the end of its last window, each OVERLAP frames into the one before.
        """
        if not self.config.whole_clip:
            return None
        frames, prefix = -(-audio.shape[-1] // self.samples_per_frame), self.config.prefix_frames
        total = num_frames
        if self.native:
            return self.whole(audio, num_frames)
        if self.config.states != "published":
            total = max(num_frames, audio.shape[-1] // self.samples_per_frame)
        elif frames + prefix > num_frames:
            step = max(1, num_frames - OVERLAP)
            total += -(-(frames + prefix - num_frames) // step) * step
        return self.whole(audio, total, prefix)[..., :num_frames, :]

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
            sound = self._prepared(waves[:, at : at + (stop - begin) * n].clone(), begin * n)
            if config.resample == "states":
                states = self._states(self.model.feature_extractor(self._level(sound)))
                cells.append(self._between(states, begin, range(max(cell, 0), cell + config.grid_frames)))
                continue
            states = self._encode(sound, stop - begin)
            cells.append(self._windows(states, max(cell, 0) - begin, cell + config.grid_frames - begin))
        return torch.cat(cells, dim=1).reshape(*window.shape[:-1], last - first, self.dim)

    def _encode(self, sound: Tensor, frames: int) -> Tensor:
        """The states [B, R, D'] of the sound of so many frames [B, frames n] as a clip of its own."""
        features = self.model.feature_extractor(self._level(sound))
        return self._states(features if self.native else self._at_frames(features, frames * self.per_frame))

    def _prepared(self, waves: Tensor, start: int) -> Tensor:
        """Waves [B, S] from sample number `start` of their sound on, with the config's loudness, noise floor and low-pass."""
        config = self.config
        if config.loudness is not None:
            waves = to_loudness(waves, config.loudness)
        if config.noise is not None:
            waves = with_noise(waves, config.noise, start)
        return waves if config.low_pass is None else low_pass(waves, config.low_pass)

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
        """[B, C, L] on the 20 ms grid -> [B, C, num_rows], linear, a row every samples_per_row / hop features."""
        last, device, dtype = features.shape[-1] - 1, features.device, features.dtype
        key = (num_rows, last, device, dtype)
        if key not in self._places:  # kept on the device: a copy to it would stall a stream at each cell
            with torch.inference_mode(False):
                place = torch.arange(num_rows, dtype=torch.float64) * self.samples_per_row / self.hop + self.offset
                left = place.clamp(0, last).long()
                self._places[key] = left.to(device), (place - left).clamp(0, 1).to(device, dtype)
        left, share = self._places[key]
        return torch.lerp(features[..., left], features[..., (left + 1).clamp(max=last)], share)

    def _states(self, features: Tensor) -> Tensor:
        """Features [B, C, R] -> the states of the transformer [B, R, D x those that are kept]."""
        x, _ = self.model.feature_projection(features.transpose(1, 2))
        encoder, stable = self.model.encoder, self.model.config.do_stable_layer_norm
        x = x + encoder.pos_conv_embed(x)
        states = [x if stable else encoder.layer_norm(x)]
        for layer in encoder.layers:
            states.append(layer(states[-1]))
        if stable:  # pre-norm blocks: states are raw, but for the last
            states[-1] = encoder.layer_norm(states[-1])
        kept = {"published": [states[-1], *states], "layers": states[1:], "last": states[-1:], "all": states}
        return torch.cat(kept[self.config.states], dim=-1)

    def _instants(self, frames: range) -> Tensor:
        """Of the state at `rate` that is nearest to each frame, its number [n]; the even one of two."""
        at = torch.arange(frames.start, frames.stop, dtype=torch.float64)
        return (at * self.samples_per_frame * (self.config.rate or 1) / SAMPLE_RATE).round()

    def _nearest(self, states: Tensor, num_frames: int) -> Tensor:
        """States [B, L, D'] of a whole sound -> rows [B, num_frames, D'] as Wan2.2-S2V has them: brought to `rate` from the first
        to the last, zeros beyond."""
        last, count = states.shape[1] - 1, states.shape[1] * (self.config.rate or 1) * self.hop // SAMPLE_RATE
        number = self._instants(range(num_frames))
        rows = _lerp(states, number.clamp(max=count - 1) * (last / max(count - 1, 1)))
        return rows * (number < count).to(rows).unsqueeze(1)

    def _between(self, states: Tensor, begin: int, frames: range) -> Tensor:
        """States [B, L, D'] of a window that begins with pixel frame `begin` -> rows [B, n, D'] of those frames, at the mean
        drift."""
        seconds = self._instants(frames) / (self.config.rate or 1)
        return _lerp(
            states, seconds * (SAMPLE_RATE / self.hop) + self.offset - begin * self.samples_per_frame / self.hop
        )

    def _windows(self, states: Tensor, first: int, last: int) -> Tensor:
        """States [B, R, D'] that begin with frame 0 -> rows [B, last - first, A] of these frames, each with its neighbours."""
        before, after = self.config.window
        if self.per_frame == 1 and not before and not after:
            return states[:, first:last]
        centres = torch.arange(first, last, device=states.device) * self.per_frame
        around = torch.arange(-before, after + 1, device=states.device)
        at = (centres[:, None] + around).clamp(0, states.shape[1] - 1)
        return states[:, at].flatten(2)


def _lerp(states: Tensor, place: Tensor) -> Tensor:
    """States [B, L, D] at places [n] between their numbers -> [B, n, D], linear."""
    place = place.clamp(0, states.shape[1] - 1)
    left = place.long()
    share, left = (place - left).to(states).unsqueeze(1), left.to(states.device)
    return torch.lerp(states[:, left], states[:, (left + 1).clamp(max=states.shape[1] - 1)], share)


def _rows_a_frame(config: Wav2VecConfig, samples_per_frame: int) -> tuple[int, int]:
    """States a pixel frame, and samples a state; UserError for a rate that is no multiple of the video's."""
    if config.rate is None or config.resample == "states":
        return 1, samples_per_frame
    samples = SAMPLE_RATE / config.rate
    if samples != int(samples) or samples_per_frame % int(samples):
        raise UserError(
            f"wav2vec2 rate: got {config.rate} states a second for {SAMPLE_RATE / samples_per_frame:g} frames; give a multiple"
        )
    return samples_per_frame // int(samples), int(samples)
