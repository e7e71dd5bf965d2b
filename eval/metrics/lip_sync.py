"""Sync-C, Sync-D and offset as SyncNet's pipeline defines them (syncnet_python), without its lossy steps.

Pictures at 25 fps are cropped around ONE box a clip, in memory; sound at 16 kHz becomes cepstra; a network gives one
feature a window to each. Its published weights make the scores comparable with papers; the arithmetic here holds for
any two towers.
"""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor
from torch.nn import functional as F

from eval.metrics.frechet import mean_with_error
from eval.metrics.mfcc import mfcc, to_int16
from eval.networks.syncnet import FPS, crop_faces, windows_of
from teachers.errors import UserError

MAX_LAG = 15  # frames; the published command's --vshift. Its function's own default is 10
RESAMPLING = ("duplicate", "nearest", "blend")


@runtime_checkable
class Towers(Protocol):
    """Two networks that put what is seen and what is heard into one space; `eval.networks.syncnet.SyncNet` is one."""

    def features(
        self, faces: UInt8[Tensor, "t 3 224 224"], mfcc: Float[Tensor, "f 13"], num_windows: int
    ) -> tuple[Tensor, Tensor]:
        """-> lip and audio features [V, d] of windows of 5 frames and 20 rows, one a frame."""
        ...


@dataclasses.dataclass(frozen=True)
class LipSync:
    """One clip's scores. A constant offset up to the largest lag is forgiven in the first two, so read them with the others."""

    sync_c: float  # LSE-C, confidence: median over lags of the mean distance, less its minimum; more is better
    sync_d: float  # LSE-D: minimum over lags of the mean distance; less is better
    offset_frames: int  # at that minimum; positive: the sound leads the picture
    distance_at_zero: float  # mean distance without shifting anything
    curve: tuple[
        float, ...
    ]  # 2 max_lag + 1 mean distances; entry j sets the sound of window v + j - max_lag to the lips of v
    num_windows: int


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
    if max_lag < 1:
        raise UserError(f"max_lag must be at least 1 frame: got {max_lag}; the published value is {MAX_LAG}")
    return from_curve(lag_distances(lip, audio, max_lag).mean(0).double().cpu(), max_lag, len(lip))


def from_curve(curve: Tensor, max_lag: int, num_windows: int) -> LipSync:
    """Scores from the mean distance at every lag [2 max_lag + 1]."""
    least, best = float(curve.min()), int(curve.argmin())
    return LipSync(
        sync_c=float(curve.median()) - least,
        sync_d=least,
        offset_frames=max_lag - best,
        distance_at_zero=float(curve[max_lag]),
        curve=tuple(curve.tolist()),
        num_windows=num_windows,
    )


def resample_frames(
    frames: UInt8[Tensor, "t 3 h w"], fps: Fraction, how: str, target: Fraction = Fraction(FPS)
) -> UInt8[Tensor, "u 3 h w"]:
    """Pictures at `fps` -> those at 25 fps (or `target`), U = floor(T target / fps).

    At time u / target, `duplicate` shows the frame that a player shows, `nearest` the one whose start is closest, and
    `blend` the linear mix of the two around it. 16 fps become 25 with 9 of 25 frames shown twice, which costs sync:
    score the ground truth alike.
    """
    if how not in RESAMPLING:
        raise UserError(f"unknown resampling {how!r}; choose one of {', '.join(RESAMPLING)}")
    if fps <= 0:
        raise UserError(f"a frame rate must be positive: got {fps}; look at the file")
    if fps == target:
        return frames
    places = [index * fps / target for index in range(int(len(frames) * target / fps))]
    before = torch.tensor([math.floor(place) for place in places], dtype=torch.long)
    if how == "duplicate":
        return frames[before]
    share = torch.tensor([float(place % 1) for place in places])
    after = (before + 1).clamp_max(len(frames) - 1)
    if how == "nearest":
        return frames[torch.where(share >= 0.5, after, before)]
    pairs = zip(before.tolist(), after.tolist(), share.tolist(), strict=True)
    mixed = [torch.lerp(frames[i].float(), frames[j].float(), weight).round() for i, j, weight in pairs]
    return torch.stack(mixed).to(torch.uint8)


def score_clip(
    network: Towers,
    frames: UInt8[Tensor, "t 3 h w"],
    fps: Fraction,
    box: Float[Tensor, "4"],
    samples: Shaped[Tensor, " s"],
    max_lag: int = MAX_LAG,
    how: str = "duplicate",
) -> LipSync:
    """Scores of RGB pictures and mono 16 kHz sound (int16, or in [-1, 1]) around one face box: left, top, right,
    bottom.

    Take the ground truth's box for the generated clip too: two boxes for one face move every score. Raises UserError
    for a box off the picture and for clips of fewer than 6 frames.
    """
    pictures = resample_frames(frames, fps, how)
    num_windows = windows_of(len(pictures), len(samples))
    heard = samples if samples.dtype == torch.int16 else to_int16(samples)
    return sync_scores(*network.features(crop_faces(pictures, box), mfcc(heard), num_windows), max_lag)


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
