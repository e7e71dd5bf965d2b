"""Lip-audio agreement with a run's probes: the mouth read from the video against the mouth predicted from the sound."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from eval.frechet import jackknife_error
from eval.metric import Clip, Column, Features, Metric, Score, stacked
from teachers.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sync(Metric):
    """`mouth_sync` over |lag| <= max_lag frames; it is not Sync-C. sound: a generated clip's own, or the real clip's."""

    max_lag: int
    sound: Literal["own", "real"]

    name, label, hint, plot, needs = "sync", "sync", "-1 to 1", True, ("probes", "mouth", "sound")
    with_gradient = ("sync", "sync_width")

    def __post_init__(self):
        if self.max_lag < 1:
            raise ValueError(f"max_lag must be at least 1 frame: got {self.max_lag}")

    @property
    def columns(self) -> dict[str, Column]:
        return {
            "sync": self.column(self.label, "higher", self.hint),
            "sync_offset_frames": self.column("sync offset, frames", 0.0, plot=False),
            "sync_width": self.column("sync of the width", "higher", self.hint, table=None),
        }

    def features(self, clip: Clip, real: Clip, networks) -> dict[str, Tensor]:
        audio = networks.mouth_from_audio(real if self.sound == "real" else clip)
        return {"mouth": networks.reading(clip).mouth, "audio": audio}

    def score(self, features: Sequence[Features], reference: Sequence[Features] | None) -> dict[str, Score]:
        found = mouth_sync(stacked(features, "mouth"), stacked(features, "audio"), self.max_lag)
        rest = {name: Score(found[name]) for name in ("sync_offset_frames", "sync_width")}
        left = pooled_without_each(stacked(features, "mouth"), stacked(features, "audio")).tolist()
        return {"sync": Score(found["sync"], found["error"], left=left), **rest}

    def differentiable(self, video: Tensor, clip: Clip, networks) -> dict[str, Tensor]:
        mouth, audio = networks.probes.mouth_in(video[None]), networks.mouth_from_audio(clip).to(video.device)[None]
        if mouth.shape != audio.shape:
            raise UserError(
                f"sync needs one audio row a video frame: got {audio.shape[1]} for {mouth.shape[1]}; trim one"
            )
        opening, width = _pooled(_lagged_sums(mouth[:, 1:].double(), audio[:, 1:].double(), 0).sum(0))
        return {"sync": opening, "sync_width": width}

    def admit(self, cases) -> tuple[dict[str, float], bool]:
        """In sync > shifted by 3 frames and > the sound of another clip; at the best lag shifted > swapped, and the lag is
        recovered (at lag 0 a shift by half a syllable is below a swap: the two are anti-phase)."""
        real = cases.features(self, "real")
        mouth, audio = stacked(real, "mouth"), stacked(real, "audio")
        late = torch.cat((mouth[:, :1].expand(-1, 3, -1), mouth[:, :-3]), dim=1)
        shifted, swapped = mouth_sync(late[:, 3:], audio[:, 3:]), mouth_sync(mouth, audio.roll(1, 0))
        sync = {
            "real": mouth_sync(mouth, audio)["sync"],
            "decoded": mouth_sync(stacked(cases.features(self, "decoded"), "mouth"), audio)["sync"],
            "shifted": shifted["sync"],
            "swapped": swapped["sync"],
            "shifted_at_offset": shifted["sync_at_offset"],
            "swapped_at_offset": swapped["sync_at_offset"],
            "shifted_offset": shifted["sync_offset_frames"],
        }
        return sync, (
            min(sync["real"], sync["decoded"]) > max(0.5, sync["shifted"], sync["swapped"])
            and sync["shifted_at_offset"] > sync["swapped_at_offset"] + 0.2
            and sync["shifted_offset"] == 3
        )


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson correlation of all elements; 0 if either side does not vary."""
    x, y = a.detach().double().flatten().cpu(), b.detach().double().flatten().cpu()
    x, y = x - x.mean(), y - y.mean()
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return float((x * y).sum() / scale) if float(scale) > 1e-12 else 0.0


def _lagged_sums(video: Tensor, audio: Tensor, lag: int) -> Tensor:
    """Centred products of video[t + lag] and audio[t] summed over the overlap: [N, 2, 3] (vv, aa, va)."""
    frames = video.shape[1]
    video = video[:, max(lag, 0) : frames + min(lag, 0)]
    audio = audio[:, max(-lag, 0) : frames - max(lag, 0)]
    video, audio = video - video.mean(1, keepdim=True), audio - audio.mean(1, keepdim=True)
    return torch.stack((video.square().sum(1), audio.square().sum(1), (video * audio).sum(1)), dim=2)


def _pooled(sums: Tensor) -> Tensor:
    """Correlation of pooled sums [..., 2, 3] for each mouth channel [..., 2]; a channel that never varies counts 0."""
    scale = (sums[..., 0] * sums[..., 1]).clamp_min(1e-20).sqrt()  # above 0, where a root has no gradient
    return torch.where(scale > 1e-9, sums[..., 2] / scale.clamp_min(1e-9), 0.0)


def _without_each(video: Tensor, audio: Tensor) -> Tensor:
    """r(0) of the opening without each clip [N], of frames 1.. in fp64."""
    sums = _lagged_sums(video, audio, 0)
    return _pooled(sums.sum(0) - sums)[:, 0]


def pooled_without_each(video: Float[Tensor, "n t 2"], audio: Float[Tensor, "n t 2"]) -> Float[Tensor, " n"]:
    """`mouth_sync`'s sync without each clip, of which its error is the jackknife's."""
    return _without_each(video[:, 1:].double(), audio[:, 1:].double())


def mouth_sync(video: Float[Tensor, "n t 2"], audio: Float[Tensor, "m u 2"], max_lag: int = 4) -> dict[str, float]:
    """Pooled correlation of the mouth in the video with the one of the sound, each centred within its clip, without frame 0.

    r(k) = sum_clips sum_t v[t+k] a[t] / sqrt(sum v^2 sum a^2): short clips are pooled because 15 frames alone decide
    nothing, and a still clip weighs nothing. Returns for the opening `sync` = r(0), its jackknife `error` over clips,
    and `sync_offset_frames` = argmax r(k) over |k| <= max_lag, positive when the video lags the sound (SyncNet's
    sign), with `sync_at_offset`; for the width, which small frames hardly show, `sync_width` = r(0).
    """
    if video.shape != audio.shape or video.ndim != 3:
        raise UserError(
            f"sync needs one audio row a video frame: got {tuple(video.shape)} and {tuple(audio.shape)}; trim one"
        )
    video, audio = video[:, 1:].double(), audio[:, 1:].double()
    if len(video) == 0 or video.shape[1] < max_lag + 4:
        raise UserError(
            f"sync needs clips of at least {max_lag + 5} frames: got {video.shape[1] + 1}; use a smaller max_lag"
        )
    lags = range(-max_lag, max_lag + 1)
    curve = {lag: float(_pooled(_lagged_sums(video, audio, lag).sum(0))[0]) for lag in lags}
    width = float(_pooled(_lagged_sums(video, audio, 0).sum(0))[1])
    best = max(sorted(lags, key=abs), key=lambda lag: curve[lag])
    error = jackknife_error(_without_each(video, audio)) if len(video) > 1 else float("nan")
    offset = {"sync_offset_frames": float(best), "sync_at_offset": curve[best]}
    return {"sync": curve[0], "error": error, "sync_width": width, **offset}
