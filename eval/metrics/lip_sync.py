"""Sync-C, Sync-D and offset as SyncNet's pipeline defines them (syncnet_python), without its lossy steps.

Frames at 25 fps are cropped around ONE box a clip, in memory; sound at 16 kHz becomes cepstra; a network gives one
feature a window to each. Its published weights make the scores comparable with papers; the arithmetic here holds for
any two towers.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal

import torch
from jaxtyping import Float, Num
from torch import Tensor
from torch.nn import functional as F

from eval.frechet import mean_with_error
from eval.metric import Clip, Column, Features, Metric, Score
from eval.mfcc import mfcc, to_int16
from eval.networks.syncnet import FPS, FRAMES, crop_faces, crop_faces_float, lip_windows, windows_of
from teachers.checkpoints.strict import listed
from teachers.errors import UserError

MAX_LAG = 15  # frames; the published command's --vshift. Its function's own default is 10
Resampling = Literal["duplicate", "nearest", "blend"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyncNetSync(Metric):
    """Frames at 25 fps (BGR, 0..255) around one face box a clip, the real clip's, for both; missing sound is zeros.

    resample: how a clip comes to 25 fps; crop_scale: of the box around the face; sound: a generated clip's own, or the real clip's
    """

    resample: Resampling
    max_lag: int
    crop_scale: float
    sound: Literal["own", "real"]

    name, label, needs = "lip_sync", "Sync-C", ("syncnet", "sound", "box")
    with_gradient = ("sync_c", "sync_d", "distance_at_zero")

    def __post_init__(self):
        if self.max_lag < 1:
            raise ValueError(f"max_lag must be at least 1 frame: got {self.max_lag}; the published value is {MAX_LAG}")

    @property
    def columns(self) -> dict[str, Column]:
        detail = {"table": "Sync in detail"}
        return {
            "sync_c": self.column("Sync-C", "higher"),
            "sync_d": self.column("Sync-D", "lower"),
            "offset_frames": self.column("offset", 0.0, **detail),
            "distance_at_zero": self.column("D at lag 0", "lower", **detail),
            "in_sync_rate": self.column("within 1 frame", "higher", **detail),
            "detection_rate": self.column("faces found", 1.0, "1 is all", **detail),
            "sync_c_penalised": self.column("Sync-C, lost faces 0", "higher", **detail),
        }

    def features(self, clip: Clip, real: Clip, networks) -> dict[str, Tensor]:
        """Curve of mean distances over lags; empty where the real clip has no face."""
        if not real.has_box:
            raise UserError("no face box: give faces.json beside the real clips")
        sound = (real if self.sound == "real" else clip).voice()
        if real.box is None:
            return {"curve": torch.zeros(0)}
        frames = resample_frames(clip.video.transpose(0, 1), clip.fps, self.resample)
        num_windows = windows_of(len(frames), len(sound))
        faces = crop_faces(frames, real.box, self.crop_scale)
        lips, voice = networks.syncnet.features(faces, mfcc(to_int16(sound)), num_windows)
        return {"curve": torch.tensor(sync_scores(lips, voice, self.max_lag).curve, dtype=torch.float64)}

    def differentiable(self, video: Tensor, clip: Clip, networks) -> dict[str, Tensor]:
        if clip.box is None:
            raise UserError("no face box: lip_sync has no gradient without one")
        frames = resample_frames((video.transpose(0, 1) + 1) * 127.5, clip.fps, self.resample)
        sound = clip.voice()
        num_windows = windows_of(len(frames), len(sound))
        faces = crop_faces_float(frames[: num_windows + FRAMES - 1], clip.box, self.crop_scale)
        voice = networks.syncnet.voice(mfcc(to_int16(sound)), num_windows).to(video.device)
        lips = networks.syncnet.lip(lip_windows(faces).contiguous()).float()
        curve = lag_distances(lips, voice, self.max_lag).mean(0).double()
        return {
            "sync_c": curve.median() - curve.min(),
            "sync_d": curve.min(),
            "distance_at_zero": curve[self.max_lag],
        }

    def score(self, features: Sequence[Features], reference: Sequence[Features] | None) -> dict[str, Score]:
        curves = [clip["curve"] for clip in features]
        clips = [from_curve(curve, self.max_lag) if len(curve) else None for curve in curves]
        values = {
            name: [math.nan if clip is None else float(getattr(clip, name)) for clip in clips]
            for name in ("sync_c", "sync_d", "distance_at_zero", "offset_frames")
        }
        return {name: Score(*score, clips=values.get(name)) for name, score in summarise(clips).items()}

    def notes(self, clips: Sequence[str], truth: Mapping[str, Score]) -> list[str]:
        lines = [
            "Sync-C above the ground truth's is a warning and no victory: read sync beside identity and the faces that were found."
        ]
        lost = [name for name, value in zip(clips, truth["sync_c"].clips or (), strict=True) if math.isnan(value)]
        if lost:
            some = f"{len(lost)} of {len(clips)} clips ({listed(lost, 5)})"
            lines.append(f"No face in {some}: Sync-C and Sync-D are means without them.")
        return lines


@dataclasses.dataclass(frozen=True)
class LipSync:
    """One clip's scores. A constant offset up to the largest lag does not count in the first two, so read them with the others."""

    sync_c: float  # LSE-C, confidence: median over lags of the mean distance, less its minimum; more is better
    sync_d: float  # LSE-D: minimum over lags of the mean distance; less is better
    offset_frames: int  # at that minimum; positive: the sound leads the video
    distance_at_zero: float  # mean distance without shifting anything
    curve: tuple[
        float, ...
    ]  # 2 max_lag + 1 mean distances; entry j sets the sound of window v + j - max_lag to the lips of v


def lag_distances(
    lip: Float[Tensor, "v d"], audio: Float[Tensor, "v d"], max_lag: int = MAX_LAG
) -> Float[Tensor, "v l"]:
    """|lip[v] - audio[v + k] + 1e-6| for lags k = -max_lag .. max_lag, with zero vectors where no sound is.

    The zeros are the published ones: of V windows k are compared with nothing at lag k, which biases short clips.
    """
    if lip.shape != audio.shape or lip.ndim != 2 or len(lip) == 0:
        raise UserError(
            f"sync needs one lip and one audio feature a window: got {tuple(lip.shape)} and {tuple(audio.shape)}"
        )
    if not bool(torch.isfinite(lip).all() and torch.isfinite(audio).all()):
        raise UserError("sync features are not finite: the clip or its sound holds NaN or infinity; look at the clip")
    padded = F.pad(audio, (0, 0, max_lag, max_lag))
    return torch.stack([F.pairwise_distance(lip, part) for part in padded.unfold(0, len(lip), 1).mT.unbind()], dim=1)


def sync_scores(lip: Float[Tensor, "v d"], audio: Float[Tensor, "v d"], max_lag: int = MAX_LAG) -> LipSync:
    """Scores from the features of one clip. Silent windows count like others."""
    return from_curve(lag_distances(lip, audio, max_lag).mean(0).double().cpu(), max_lag)


def from_curve(curve: Tensor, max_lag: int) -> LipSync:
    """Scores from the mean distance at every lag [2 max_lag + 1]."""
    least, best = float(curve.min()), int(curve.argmin())
    return LipSync(
        sync_c=float(curve.median()) - least,
        sync_d=least,
        offset_frames=max_lag - best,
        distance_at_zero=float(curve[max_lag]),
        curve=tuple(curve.tolist()),
    )


def resample_frames(frames: Num[Tensor, "t 3 h w"], fps: Fraction, how: Resampling) -> Num[Tensor, "u 3 h w"]:
    """Frames at `fps`, uint8 or floats with their gradient -> those at 25 fps, U = floor(25 T / fps).

    At time u / 25, `duplicate` shows the frame that a player shows, `nearest` the one whose start is closest, and
    `blend` the linear mix of the two around it. 16 fps become 25 with 9 of 25 frames shown twice, which costs sync:
    score the ground truth alike.
    """
    if fps == FPS:
        return frames
    places = [index * fps / FPS for index in range(int(len(frames) * FPS / fps))]
    before = torch.tensor([math.floor(place) for place in places], dtype=torch.long)
    if how == "duplicate":
        return frames[before]
    share = torch.tensor([float(place % 1) for place in places])
    after = (before + 1).clamp_max(len(frames) - 1)
    if how == "nearest":
        return frames[torch.where(share >= 0.5, after, before)]
    pairs = zip(before.tolist(), after.tolist(), share.tolist(), strict=True)
    mixed = torch.stack([torch.lerp(frames[i].float(), frames[j].float(), weight) for i, j, weight in pairs])
    return mixed if frames.is_floating_point() else mixed.round().to(torch.uint8)


def summarise(clips: Sequence[LipSync | None]) -> dict[str, tuple[float, float]]:
    """Means over clips with their jackknife errors, name -> (mean, error); None is a clip in which no face was found.

    Scores are means over the clips that have one, as published, so a system that loses its faces can gain:
    `detection_rate` says how many are left, and `sync_c_penalised` counts the lost ones as 0. `in_sync_rate` is the
    share of clips within one frame of offset 0.
    """
    found = [clip for clip in clips if clip is not None]
    if not found:
        raise UserError(f"no face was found in any of {len(clips)} clips; give their boxes in the manifest")
    values = {
        "sync_c": [clip.sync_c for clip in found],
        "sync_d": [clip.sync_d for clip in found],
        "distance_at_zero": [clip.distance_at_zero for clip in found],
        "offset_frames": [float(clip.offset_frames) for clip in found],
        "in_sync_rate": [float(abs(clip.offset_frames) <= 1) for clip in found],
        "detection_rate": [float(clip is not None) for clip in clips],
        "sync_c_penalised": [0.0 if clip is None else clip.sync_c for clip in clips],
    }
    return {name: mean_with_error(torch.tensor(x, dtype=torch.float64)) for name, x in values.items()}
