"""Frechet distance and kernel distance of feature sets, in fp64, with errors over clips.

Feature sets are [N, d] (a row per clip) or [N, R, d] (R rows per clip, e.g. frames). Frames of one clip are not
independent, so every error deletes or resamples whole clips. A percentile bootstrap of ONE Frechet value misses its
own point estimate (the resampled covariance loses rank), so single values carry a jackknife error and the bootstrap
is used for differences only.
"""

import dataclasses

import torch
from torch import Tensor

from teachers.errors import UserError


@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean [d] and scatter [d, d] = sum (x - mean)(x - mean)^T in fp64; merges by Chan's update."""

    count: int
    mean: Tensor
    scatter: Tensor

    @staticmethod
    def of(rows: Tensor) -> "Moments":
        """Moments of rows [..., d]; centred before anything is squared, so a large common mean costs no digits."""
        flat = rows.detach().reshape(-1, rows.shape[-1]).double()
        if not bool(torch.isfinite(flat).all()):
            raise UserError("features are not finite: a network or a video holds NaN or infinity; look at the samples")
        mean = flat.mean(0)
        centred = flat - mean
        return Moments(len(flat), mean, centred.mT @ centred)

    def merge(self, other: "Moments") -> "Moments":
        """Moments of the union of two disjoint row sets."""
        total = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / total)
        scatter = self.scatter + other.scatter + torch.outer(delta, delta) * (self.count * other.count / total)
        return Moments(total, mean, scatter)

    def covariance(self, ddof: int = 1) -> Tensor:
        """scatter / (count - ddof). Raises UserError when there are not more rows than ddof."""
        if self.count <= ddof:
            raise UserError(f"a covariance needs more than {ddof} rows: got {self.count}; evaluate more clips")
        return self.scatter / (self.count - ddof)


def frechet_distance(a: Tensor | Moments, b: Tensor | Moments) -> float:
    """|mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^1/2 with covariances over N - 1.

    For matrices the last trace is the exact nuclear norm |A_c B_c^T|_* / sqrt((N-1)(M-1)) of the centred rows,
    computed on their QR factors, so it holds for N < d; for Moments it is the sum of sqrt eigvals of S_a^1/2 S_b
    S_a^1/2.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        mean_a, root_a = _root(a)
        mean_b, root_b = _root(b)
        cross = torch.linalg.svdvals(root_a @ root_b.mT).sum()
        traces = root_a.square().sum() + root_b.square().sum()
        return float((mean_a - mean_b).square().sum() + traces - 2 * cross)
    a = Moments.of(a) if isinstance(a, Tensor) else a
    b = Moments.of(b) if isinstance(b, Tensor) else b
    return float(_distance(a.mean, a.covariance(), b.mean, _square_root(b.covariance())))


def _root(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [d] and a factor R [min(N, d), d] with R^T R = covariance."""
    flat = rows.detach().reshape(-1, rows.shape[-1]).double()
    if len(flat) < 2:
        raise UserError(f"a Frechet distance needs at least 2 rows a side: got {len(flat)}; evaluate more clips")
    if not bool(torch.isfinite(flat).all()):
        raise UserError("features are not finite: a network or a video holds NaN or infinity; look at the samples")
    mean = flat.mean(0)
    factor = torch.linalg.qr(flat - mean, mode="r").R
    return mean, factor / (len(flat) - 1) ** 0.5


def _square_root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.mT


def _distance(mean: Tensor, covariance: Tensor, reference_mean: Tensor, reference_root: Tensor) -> Tensor:
    """Frechet distance of mean [..., d], covariance [..., d, d] from one reference given by its symmetric root."""
    inner = reference_root @ covariance @ reference_root
    cross = torch.linalg.eigvalsh((inner + inner.mT) / 2).clamp_min(0).sqrt().sum(-1)
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (mean - reference_mean).square().sum(-1) + trace + reference_root.square().sum() - 2 * cross


def _weighted(features: Tensor, weights: Tensor, reference: Moments) -> Tensor:
    """Frechet distances [K] of clip-weighted sets: features [N, R, d], weights [K, N] (how often each clip counts)."""
    origin = features.mean((0, 1))
    rows = features - origin
    sums = rows.sum(1)
    outers = torch.einsum("nrd,nre->nde", rows, rows)
    count = weights.sum(1) * features.shape[1]
    mean = weights @ sums / count[:, None]
    second = torch.einsum("kn,nde->kde", weights, outers)
    scatter = second - count[:, None, None] * mean[:, :, None] * mean[:, None, :]
    covariance = scatter / (count - 1)[:, None, None]
    return _distance(mean + origin, covariance, reference.mean, _square_root(reference.covariance()))


def _by_clip(features: Tensor) -> Tensor:
    """[N, d] or [N, R, d] -> [N, R, d] in fp64; raises UserError for fewer than 3 clips."""
    by_clip = features.detach().double().reshape(len(features), -1, features.shape[-1])
    if len(by_clip) < 3:
        raise UserError(f"an error over clips needs at least 3 clips: got {len(by_clip)}; evaluate more clips")
    return by_clip


def jackknife_error(replicates: Tensor) -> float:
    """Standard error sqrt((n-1)/n sum (theta_i - mean)^2) from n leave-one-clip-out values [n]."""
    num = len(replicates)
    centred = replicates.double() - replicates.double().mean()
    return float(((num - 1) / num * centred.square().sum()).sqrt())


def frechet_with_error(a: Tensor, reference: Tensor | Moments) -> tuple[float, float]:
    """Frechet distance of clips a ([N, d] or [N, R, d]) from a reference, and its jackknife error over them."""
    value = frechet_distance(a, reference)
    features = _by_clip(a)
    moments = Moments.of(reference) if isinstance(reference, Tensor) else reference
    leave_one_out = 1 - torch.eye(len(features), dtype=torch.float64)
    return value, jackknife_error(_weighted(features, leave_one_out, moments))


def kid_with_error(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Unbiased MMD^2, kernel (x.y/d + 1)^3 (Binkowski et al. 1801.01401), and its jackknife error over clips of a.

    a, b: [N, d] or [N, R, d]; pairs inside one clip are left out, so clips with several rows stay unbiased.
    """
    clips_a, clips_b = _by_clip(a), _by_clip(b)
    within_a, within_b = _kernel_sums(clips_a, clips_a), _kernel_sums(clips_b, clips_b)
    within_a.fill_diagonal_(0)
    within_b.fill_diagonal_(0)
    across = _kernel_sums(clips_a, clips_b)
    n, m = len(clips_a), len(clips_b)
    constant = within_b.sum() / (m * (m - 1))
    value = within_a.sum() / (n * (n - 1)) + constant - 2 * across.mean()
    left_a = (within_a.sum() - 2 * within_a.sum(1)) / ((n - 1) * (n - 2))
    left_across = (across.sum() - across.sum(1)) / ((n - 1) * m)
    return float(value), jackknife_error(left_a + constant - 2 * left_across)


def kid(a: Tensor, b: Tensor) -> float:
    """Unbiased MMD^2 of two feature sets with the cubic polynomial kernel; may be slightly negative for equal sets."""
    return kid_with_error(a, b)[0]


def _kernel_sums(a: Tensor, b: Tensor) -> Tensor:
    """Mean kernel value of every pair of clips [N, M]."""
    dim = a.shape[-1]
    gram = a.reshape(-1, dim) @ b.reshape(-1, dim).mT
    kernel = (gram / dim + 1) ** 3
    return kernel.reshape(len(a), a.shape[1], len(b), b.shape[1]).mean((1, 3))


def paired_bootstrap(
    a: Tensor, b: Tensor, reference: Tensor, rounds: int, generator: torch.Generator
) -> dict[str, float]:
    """Frechet(a, reference) - Frechet(b, reference) for two systems on the SAME clips, in the same order.

    Clips are resampled jointly. Returns `difference`, `error` (standard deviation over rounds) and the basic 95
    percent interval `low`, `high` (2 difference - percentile), which stays honest where the percentile interval is
    shifted by the bias.
    """
    clips_a, clips_b = _by_clip(a), _by_clip(b)
    if len(clips_a) != len(clips_b):
        raise UserError(
            f"a paired comparison needs the same clips: got {len(clips_a)} and {len(clips_b)}; evaluate both alike"
        )
    num = len(clips_a)
    drawn = torch.randint(num, (rounds, num), generator=generator)
    weights = torch.zeros(rounds, num, dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    moments = Moments.of(reference)
    draws = _weighted(clips_a, weights, moments) - _weighted(clips_b, weights, moments)
    difference = frechet_distance(a, reference) - frechet_distance(b, reference)
    low, high = (float(torch.quantile(draws, q)) for q in (0.975, 0.025))
    return {
        "difference": difference,
        "error": float(draws.std()),
        "low": 2 * difference - low,
        "high": 2 * difference - high,
    }
