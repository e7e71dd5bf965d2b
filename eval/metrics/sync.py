"""Lip-audio agreement without ground truth: the mouth seen in the video against the mouth heard in the sound."""

import torch
from jaxtyping import Float
from torch import Tensor

from eval.metrics.frechet import jackknife_error
from teachers.errors import UserError


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson correlation of all elements; 0 if either side does not vary."""
    x, y = a.detach().double().flatten().cpu(), b.detach().double().flatten().cpu()
    x, y = x - x.mean(), y - y.mean()
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return float((x * y).sum() / scale) if float(scale) > 1e-12 else 0.0


def _lagged_sums(seen: Tensor, heard: Tensor, lag: int) -> Tensor:
    """Centred products of seen[t + lag] and heard[t] summed over the overlap: [N, 2, 3] (ss, hh, sh)."""
    frames = seen.shape[1]
    seen = seen[:, max(lag, 0) : frames + min(lag, 0)]
    heard = heard[:, max(-lag, 0) : frames - max(lag, 0)]
    seen, heard = seen - seen.mean(1, keepdim=True), heard - heard.mean(1, keepdim=True)
    return torch.stack((seen.square().sum(1), heard.square().sum(1), (seen * heard).sum(1)), dim=2)


def _pooled(sums: Tensor) -> Tensor:
    """Correlation of pooled sums [..., 2, 3] for each mouth channel [..., 2]; a channel that never varies counts 0."""
    scale = (sums[..., 0] * sums[..., 1]).clamp_min(0).sqrt()
    return torch.where(scale > 1e-9, sums[..., 2] / scale.clamp_min(1e-9), 0.0)


def mouth_sync(
    seen: Float[Tensor, "n t 2"], heard: Float[Tensor, "m u 2"], max_lag: int = 4, segment: int | None = None
) -> dict[str, float]:
    """Pooled correlation of the seen and the heard mouth, each centred within its clip, frame 0 left out.

    r(k) = sum_clips sum_t s[t+k] h[t] / sqrt(sum s^2 sum h^2): short clips are pooled because 15 frames alone decide
    nothing, and a still clip weighs nothing. Returns for the opening `sync` = r(0), its jackknife `error` over clips,
    and `sync_offset_frames` = argmax r(k) over |k| <= max_lag, positive when the picture lags the sound (SyncNet's
    sign), with `sync_at_offset`; for the width, which small pictures hardly show, `sync_width` = r(0). `segment` cuts
    long clips into pieces of that many frames, so that one long clip has an error too.
    """
    if seen.shape != heard.shape or seen.ndim != 3:
        raise UserError(
            f"sync needs one heard row a seen frame: got {tuple(seen.shape)} and {tuple(heard.shape)}; trim one"
        )
    seen, heard = seen[:, 1:].double(), heard[:, 1:].double()
    if segment is not None:
        keep = seen.shape[1] // segment * segment
        seen, heard = (x[:, :keep].reshape(-1, segment, x.shape[2]) for x in (seen, heard))
    if len(seen) == 0 or seen.shape[1] < max_lag + 4:
        raise UserError(
            f"sync needs clips of at least {max_lag + 5} frames: got {seen.shape[1] + 1}; use a smaller max_lag"
        )
    lags = range(-max_lag, max_lag + 1)
    curve = {lag: float(_pooled(_lagged_sums(seen, heard, lag).sum(0))[0]) for lag in lags}
    sums = _lagged_sums(seen, heard, 0)
    replicates = _pooled(sums.sum(0) - sums)[:, 0]
    width = float(_pooled(sums.sum(0))[1])
    best = max(sorted(lags, key=abs), key=lambda lag: curve[lag])
    error = jackknife_error(replicates) if len(replicates) > 1 else float("nan")
    offset = {"sync_offset_frames": float(best), "sync_at_offset": curve[best]}
    return {"sync": curve[0], "error": error, "sync_width": width, **offset}


def envelope_sync(opening: Float[Tensor, " t"], audio: Float[Tensor, " s"], samples_per_frame: int) -> dict[str, float]:
    """Correlation of the seen mouth opening with the loudness (log RMS a frame), for speech without labels.

    Returns `envelope` at lag 0 and `envelope_offset_frames`, the lag in -4..4 with the largest correlation (positive:
    the picture lags).
    """
    frames = min(len(opening), len(audio) // samples_per_frame)
    if frames < 10:
        raise UserError(f"the loudness envelope needs at least 10 frames of sound: got {frames}; give a longer sound")
    rms = audio[: frames * samples_per_frame].double().reshape(frames, -1).square().mean(1).sqrt()
    loudness = (rms + 1e-3).log()
    opening = opening[:frames].double()

    def at(lag: int) -> float:
        return correlation(opening[max(lag, 0) : frames + min(lag, 0)], loudness[max(-lag, 0) : frames - max(lag, 0)])

    best = max(sorted(range(-4, 5), key=abs), key=at)
    return {"envelope": at(0), "envelope_offset_frames": float(best)}
