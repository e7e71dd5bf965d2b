"""Features of one clip under a protocol card, and scores of a set from the features of its clips.

What is kept of a clip is small and depends on nothing but the clip, the card and the extractor, so it can be stored, shared out
over processes and joined in any order.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from eval.cards import FROM_RUN, Card
from eval.embedded.extractors import Probes
from eval.metrics.frechet import (
    Moments,
    frechet_distance,
    frechet_floor,
    frechet_with_error,
    kid_floor,
    kid_with_error,
    mean_with_error,
)
from eval.metrics.identity import identity_agreement
from eval.metrics.lip_sync import LipSync, from_curve, resample_frames, summarise, sync_scores
from eval.metrics.mfcc import mfcc, to_int16
from eval.metrics.motion import ratio_with_error, sharpness_energies
from eval.metrics.quality import failure_rates, flickers, measure, slope_with_error, window_colour, window_identity
from eval.metrics.sync import mouth_sync
from eval.networks.syncnet import crop_faces, windows_of
from eval.networks.weights import locate
from teachers.encoders.small import SAMPLE_RATE, AudioConfig, LogMel
from teachers.errors import UserError

METRICS = ("fid", "kid", "fvd", "sync", "identity", "quality", "psnr", "ssim", "lpips")
RULE_OF = {"fid": "fid", "kid": "fid", "fvd": "fvd", "sync": "sync", "identity": "identity"}
RULE_OF |= {"psnr": "pairs", "ssim": "pairs", "lpips": "pairs"}
PAIRED = ("psnr", "ssim", "lpips")
"""Metrics of a generated clip and its real one; the ground truth has none."""
QUALITY = ("motion_energy", "sharpness", "flicker", "saturation", "black", "frozen", "flash")
WEIGHT_FREE = (*QUALITY, "colour_slope", "seam")
"""All of `quality`: the slope is of clips of two windows or more, seams are of clips that say where their chunks begin."""
Score = tuple[float, float]
Features = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Take:
    """A clip as the card wants it: uint8 [3, T, H, W], its rate, sound [S] at 16 kHz (None without a track), and the real clip's
    face box [4] in its pixels, None where no face was found; `seams`: frames that begin a chunk, where its maker says so."""

    video: Tensor
    fps: Fraction
    sound: Tensor | None
    box: Tensor | None
    seams: tuple[int, ...] = ()


class Extractors:
    """The networks of a card, each loaded when it is first asked for; raises UserError as `eval.networks.weights.locate` does."""

    def __init__(self, probes: Path | None = None, device: str = "cpu", batch_size: int = 32):
        self.folder, self.device, self.batch_size = probes, device, batch_size

    @cached_property
    def inception(self):
        from eval.networks.inception import Inception

        return Inception.load(device=self.device)

    @cached_property
    def i3d(self):
        from eval.networks.i3d import I3D

        return I3D.load(device=self.device)

    @cached_property
    def syncnet(self):
        from eval.networks.syncnet import SyncNet

        return SyncNet.load(device=self.device)

    @cached_property
    def dinov2(self):
        from eval.networks.dino import Dino

        return Dino.load(device=self.device)

    @cached_property
    def lpips(self):
        from eval.metrics.paired import Lpips

        return Lpips.load(device=self.device)

    @cached_property
    def probes(self) -> Probes:
        if self.folder is None:
            raise UserError(
                "the embedded protocol needs the extractors of a run: give --extractors RUN/stages/extractors"
            )
        return Probes.load(self.folder).to(self.device)


def refusals(card: Card, metrics: Sequence[str]) -> dict[str, str]:
    """Metric -> why it cannot be had: its weights are missing or wrong, or the card has no rule for it."""
    found = {}
    for metric in metrics:
        rule = getattr(card, RULE_OF[metric]) if metric in RULE_OF else card
        if rule is None:
            found[metric] = f"{metric} refused: the protocol {card.name} has no rule for it; choose another --protocol"
            continue
        extractor = "alexnet" if metric == "lpips" else getattr(rule, "extractor", FROM_RUN)
        if extractor != FROM_RUN:
            try:
                locate(extractor)
            except UserError as error:
                found[metric] = str(error)
    return found


def default_metrics(card: Card) -> tuple[str, ...]:
    """Every metric for which the card has a rule, and the weight-free measures."""
    return tuple(m for m in METRICS if m not in RULE_OF or getattr(card, RULE_OF[m]) is not None)


def group_of(metric: str, card: Card) -> str:
    """The features from which a metric is made; several may share them."""
    if metric in ("fid", "kid", "fvd", "sync", "identity") and getattr(card, RULE_OF[metric]).extractor == FROM_RUN:
        return "probes"
    return {"kid": "fid", "psnr": "pairs", "ssim": "pairs"}.get(metric, metric)


def clip_features(group: str, take: Take, real: Take, card: Card, extractors: Extractors) -> dict[str, Tensor]:
    """The features of one clip; `real` is its real clip (the same for the ground truth). Raises UserError for what has none."""
    return GROUPS[group](take, real, card, extractors)


def _fid(take: Take, real: Take, card: Card, extractors: Extractors) -> dict[str, Tensor]:
    del real
    rule = card.fid
    assert rule is not None
    assert rule.resize != "none"
    frames = take.video[:, card.clips.given :: rule.every].transpose(0, 1)
    return {"frames": extractors.inception.features(frames, extractors.batch_size, rule.resize)}


def _fvd(take: Take, real: Take, card: Card, extractors: Extractors) -> dict[str, Tensor]:
    del real
    assert card.fvd is not None
    assert card.fvd.resize != "none"
    return {"clip": extractors.i3d.features(take.video[None], 1, card.fvd.resize)[0]}


def _sync(take: Take, real: Take, card: Card, extractors: Extractors) -> dict[str, Tensor]:
    """Curve of mean distances over lags; none where the real clip has no face."""
    rule = card.sync
    assert rule is not None
    assert rule.fps is not None
    assert rule.crop_scale is not None
    sound = real.sound if rule.sound == "real" else take.sound
    if sound is None:
        raise UserError("no sound: sync needs a track in the film or NAME.wav beside it")
    if real.box is None:
        return {"curve": torch.zeros(0), "windows": torch.tensor(0)}
    pictures = resample_frames(take.video.transpose(0, 1), take.fps, rule.resample, rule.fps)
    num_windows = windows_of(len(pictures), len(sound))
    faces = crop_faces(pictures, real.box, rule.crop_scale)
    towers = extractors.syncnet.features(faces, mfcc(to_int16(sound)), num_windows)
    scores = sync_scores(*towers, rule.max_lag)
    return {"curve": torch.tensor(scores.curve, dtype=torch.float64), "windows": torch.tensor(num_windows)}


def _identity(take: Take, real: Take, card: Card, extractors: Extractors) -> dict[str, Tensor]:
    rows = extractors.dinov2.features(
        torch.cat((real.video[:, :1], take.video[:, 1:]), 1).transpose(0, 1), extractors.batch_size
    )
    cosine = F.cosine_similarity(rows[1:].double(), rows[:1].double())
    if (length := _window(take, card)) == 0:
        return {"cosine": cosine}
    windows = window_identity(rows[None, 1:], rows[:1], length)
    return {"cosine": cosine, "slope": _a_second(windows, length, take)}


def _window(take: Take, card: Card) -> int:
    """Frames of the windows over which a drift is a slope; 0 for clips of fewer than two."""
    length = round(card.window_seconds * take.fps)
    return length if 2 <= length <= (take.video.shape[1] - 1) // 2 else 0


def _a_second(windows: Tensor, length: int, take: Take) -> Tensor:
    """Slope of one clip's windows [1, W]."""
    return torch.tensor(slope_with_error(windows)[0] / float(length / take.fps), dtype=torch.float64)


def _probes(take: Take, real: Take, card: Card, extractors: Extractors) -> dict[str, Tensor]:
    probes = extractors.probes
    reading = probes.read(take.video[None], 1)
    still = probes.read(real.video[None, :, :1].expand(-1, -1, 2, -1, -1), 1)
    found = {
        "frames": reading.frame_features[0],
        "clip": reading.clip_features[0],
        "mouth": reading.mouth[0],
        "identity": reading.identity[0],
        "portrait": still.identity[0, 0],
    }
    if card.sync is None:
        return found
    sound, samples = real.sound if card.sync.sound == "real" else take.sound, SAMPLE_RATE / take.fps
    if sound is None:
        raise UserError("no sound: sync needs a track in the film or NAME.wav beside it")
    if samples.denominator != 1 or samples.numerator % 4:
        raise UserError(f"{take.fps} frames a second are not what the embedded ears hear; use clips of the run's rate")
    rows = LogMel(AudioConfig(hop=samples.numerator // 4), samples.numerator)(sound[None], 0, take.video.shape[1])
    if rows.shape[-1] != len(probes.scales["audio_mean"]):
        raise UserError(f"{take.fps} frames a second are not what the embedded ears hear; use clips of the run's rate")
    return {**found, "heard": probes.mouth_from_audio(rows)[0]}


def _quality(take: Take, real: Take, card: Card, extractors: Extractors) -> dict[str, Tensor]:
    del real, extractors
    video = take.video[None]
    frames = measure(video)
    values = {
        "motion_energy": frames.change.mean(1),
        "sharpness": _sharpness(video),
        "flicker": flickers(frames),
        "saturation": frames.saturation.mean(1),
        **failure_rates(frames),
    }
    found = {name: values[name][0] for name in QUALITY}
    if length := _window(take, card):
        found["colour_slope"] = _a_second(window_colour(frames, length), length, take)
    steps = [frame - 1 for frame in take.seams if frame < video.shape[2]]
    if 0 < len(steps) < frames.change.shape[1]:
        at = torch.zeros(frames.change.shape[1], dtype=torch.bool)
        at[steps] = True
        found |= {"at_seams": frames.change[0, at].mean(), "elsewhere": frames.change[0, ~at].mean()}
    return found


def _sharpness(video: Tensor, frames_at_once: int = 32) -> Tensor:
    """`sharpness_energies`, a few frames at a time."""
    frames = video.shape[2]
    total = torch.zeros(len(video), dtype=torch.float64)
    for start in range(0, frames - 1, frames_at_once):
        part = video[:, :, start : start + frames_at_once + 1]
        total += sharpness_energies(part) * (part.shape[2] - 1)
    return total / (frames - 1)


def _pairs(take: Take, real: Take, card: Card, extractors: Extractors) -> dict[str, Tensor]:
    del extractors
    from eval.metrics.paired import psnr, ssim

    first = card.clips.given
    a, b = take.video[:, first:], real.video[:, first:]
    return {"psnr": psnr(a, b), "ssim": ssim(a, b)}


def _lpips(take: Take, real: Take, card: Card, extractors: Extractors) -> dict[str, Tensor]:
    first = card.clips.given
    return {"lpips": extractors.lpips.distance(take.video[:, first:], real.video[:, first:], extractors.batch_size)}


GROUPS: dict[str, Callable[[Take, Take, Card, Extractors], dict[str, Tensor]]] = {
    "fid": _fid,
    "fvd": _fvd,
    "sync": _sync,
    "identity": _identity,
    "probes": _probes,
    "quality": _quality,
    "pairs": _pairs,
    "lpips": _lpips,
}


@dataclass(frozen=True)
class Scores:
    """name -> (mean, error), and name -> a value for each clip, in the order of the clips, where the score is a mean over clips."""

    metrics: dict[str, Score]
    clips: dict[str, list[float]]


def set_scores(metric: str, clips: Sequence[Features], real: Sequence[Features] | None, card: Card) -> Scores:
    """Scores of a set from the features of its clips; `real` are those of the real clips, None for the ground truth itself.

    Raises UserError where the set is too small and where a feature is not finite.
    """
    if metric in ("fid", "kid", "fvd"):
        if real is None:
            return Scores({}, {})
        return _distances(metric, clips, real, card)
    if metric == "sync":
        return _embedded_sync(clips, card) if group_of("sync", card) == "probes" else _lip_sync(clips, card)
    if metric == "identity" and group_of("identity", card) == "probes":
        faces, portraits = (torch.stack([clip[name] for clip in clips]) for name in ("identity", "portrait"))
        return Scores({"identity": identity_agreement(faces, portraits)}, {})
    if metric == "identity":
        found = {"identity": [float(clip["cosine"].mean()) for clip in clips]}
        if all("slope" in clip for clip in clips):
            found["identity_slope"] = [float(clip["slope"]) for clip in clips]
        return _means(found)
    if metric == "quality":
        return _quality_scores(clips)
    return _means({metric: [float(clip[metric].double().mean()) for clip in clips]})


def floor_scores(metric: str, real: Sequence[Features], card: Card) -> tuple[Score, int] | None:
    """(mean, spread) of the distance between random halves of the real clips, and the clips in a half; None without a floor."""
    rule = {"fid": card.fid, "kid": card.fid, "fvd": card.fvd}.get(metric)
    if rule is None or len(real) < (6 if metric == "kid" else 4):
        return None
    if metric == "fid" and card.fid is not None and card.fid.pooling == "pair":
        return None
    rows, generator = _rows(metric, real, card), torch.Generator().manual_seed(0)
    if metric == "kid":
        value, spread, num = kid_floor(rows, generator, card.floor_splits)
    else:
        value, spread, num = frechet_floor(rows, generator, card.floor_splits, rule.ddof)
    return (value, spread), num


def _rows(metric: str, clips: Sequence[Features], card: Card) -> Tensor:
    """Features [N, R, d] of frames or [N, d] of clips."""
    if metric == "fvd":
        return torch.stack([clip["clip"] for clip in clips])
    assert card.fid is not None
    if group_of("fid", card) == "probes":
        return torch.stack([clip["frames"][card.clips.given :: card.fid.every] for clip in clips])
    return torch.stack([clip["frames"] for clip in clips])


def _distances(metric: str, clips: Sequence[Features], real: Sequence[Features], card: Card) -> Scores:
    ours, theirs = _rows(metric, clips, card), _rows(metric, real, card)
    if metric == "kid":
        return Scores({"kid": kid_with_error(ours, theirs)}, {})
    rule = card.fid if metric == "fid" else card.fvd
    assert rule is not None
    if metric == "fid" and card.fid is not None and card.fid.pooling == "pair":
        return _means({"fid": [frechet_distance(a, b, rule.ddof) for a, b in zip(ours, theirs, strict=True)]})
    reference = Moments.of(theirs) if metric == "fid" else theirs
    return Scores({metric: frechet_with_error(ours, reference, rule.ddof)}, {})


def _lip_sync(clips: Sequence[Features], card: Card) -> Scores:
    assert card.sync is not None
    found = [_from_curve(clip, card.sync.max_lag) for clip in clips]
    table = summarise(found)
    values = {
        name: [math.nan if clip is None else float(getattr(clip, name)) for clip in found]
        for name in ("sync_c", "sync_d", "distance_at_zero", "offset_frames")
    }
    return Scores(table, values)


def _from_curve(clip: Features, max_lag: int) -> LipSync | None:
    curve = clip["curve"]
    if len(curve) == 0:
        return None
    return from_curve(curve, max_lag, int(clip["windows"]))


def _quality_scores(clips: Sequence[Features]) -> Scores:
    names = [name for name in (*QUALITY, "colour_slope") if all(name in clip for clip in clips)]
    scores = _means({name: [float(clip[name]) for clip in clips] for name in names})
    if all("at_seams" in clip for clip in clips):
        at, elsewhere = (torch.stack([clip[name] for clip in clips]) for name in ("at_seams", "elsewhere"))
        if bool(elsewhere.any()):  # clips that stand still between their seams have no ratio
            scores.metrics["seam"] = ratio_with_error(at, elsewhere)
    return scores


def _embedded_sync(clips: Sequence[Features], card: Card) -> Scores:
    assert card.sync is not None
    seen, heard = (torch.stack([clip[name] for clip in clips]) for name in ("mouth", "heard"))
    found = mouth_sync(seen, heard, card.sync.max_lag)
    scores = {"sync": (found["sync"], found["error"]), "sync_offset_frames": (found["sync_offset_frames"], math.nan)}
    return Scores(scores, {})


def _means(values: Mapping[str, list[float]]) -> Scores:
    for name, numbers in values.items():
        if any(math.isnan(number) for number in numbers):
            raise UserError(f"{name} refused: a clip's value is not a number; look at the clips")
    means = {name: mean_with_error(torch.tensor(x, dtype=torch.float64)) for name, x in values.items()}
    return Scores(means, dict(values))
