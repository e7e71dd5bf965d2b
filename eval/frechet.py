"""Frechet distance and kernel distance of feature sets, in fp64, with errors over clips.

Feature sets are [N, d] (a row per clip) or [N, R, d] (R rows per clip, e.g. frames). Frames of one clip are not
independent, so every error deletes or resamples whole clips. A percentile bootstrap of ONE Frechet value misses its
own point estimate (the resampled covariance loses rank), so values and differences carry a jackknife error. The error is
that of the value AT THIS N: the upward bias of a small N is not in it, so values are compared at equal N only and beside the
real-vs-real floor (`floor_of`).
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from teachers.errors import UserError


@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean [d] and scatter [d, d] = sum (x - mean)(x - mean)^T in fp64."""

    count: int
    mean: Tensor
    scatter: Tensor

    @staticmethod
    def of(rows: Tensor) -> "Moments":
        """Moments of rows [..., d]; centred before anything is squared, so a large common mean costs no digits."""
        flat = _flat(rows)
        mean = flat.mean(0)
        centred = flat - mean
        return Moments(len(flat), mean, centred.mT @ centred)

    def covariance(self, ddof: int = 1) -> Tensor:
        """scatter / (count - ddof). Raises UserError when there are not more rows than ddof."""
        if self.count <= ddof:
            raise UserError(f"a covariance needs more than {ddof} rows: got {self.count}; evaluate more clips")
        return self.scatter / (self.count - ddof)


def frechet_distance(a: Tensor | Moments, b: Tensor | Moments, ddof: int = 1) -> float:
    """|mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^1/2 with covariances over N - ddof.

    The last trace is the nuclear norm |R_a R_b^T|_* of factors with R^T R = S. For rows R is the centred matrix, so
    that it is exact for N < d; for Moments R comes from the eigenvectors of the covariance. `ddof` is 1 in
    pytorch-fid, clean-fid and torchmetrics and 0 in StyleGAN-V.
    """
    mean_a, root_a = _root(a, ddof)
    mean_b, root_b = (part.to(mean_a) for part in _root(b, ddof))
    cross = torch.linalg.svdvals(root_a @ root_b.mT).sum()
    return float((mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * cross)


def _flat(rows: Tensor) -> Tensor:
    """[..., d] -> fp64 [N, d]; raises UserError for NaN or infinity."""
    flat = rows.detach().reshape(-1, rows.shape[-1]).double()
    if not bool(torch.isfinite(flat).all()):
        raise UserError("features are not finite: a network or a video holds NaN or infinity; look at the samples")
    return flat


def _root(rows: Tensor | Moments, ddof: int) -> tuple[Tensor, Tensor]:
    """Mean [d] and a factor R [at most min(N, d), d] with R^T R = covariance."""
    if isinstance(rows, Moments):
        values, vectors = torch.linalg.eigh(rows.covariance(ddof))
        kept = values > _rounding(values)  # the rest are zeros of a covariance of few rows
        return rows.mean, values[kept].sqrt()[:, None] * vectors[:, kept].mT
    flat = _flat(rows)
    if len(flat) < 2:
        raise UserError(f"a Frechet distance needs at least 2 rows a side: got {len(flat)}; evaluate more clips")
    mean = flat.mean(0)
    factor = flat - mean
    if len(flat) > flat.shape[1]:
        factor = torch.linalg.qr(factor, mode="r").R
    return mean, factor / (len(flat) - ddof) ** 0.5


def _rounding(values: Tensor) -> float:
    """Size of the rounding errors of ascending eigenvalues [n] of a positive matrix: n eps of the largest."""
    return len(values) * torch.finfo(values.dtype).eps * max(float(values[-1]), 0.0) if len(values) else 0.0


def _trace_of_root(matrix: Tensor) -> Tensor:
    """tr M^1/2 of a positive matrix; eigenvalues that are rounding errors count as zero."""
    values = torch.linalg.eigvalsh((matrix + matrix.mT) / 2)
    return values[values > _rounding(values)].sqrt().sum()


def _weighted(features: Tensor, weights: Tensor, reference: Tensor | Moments, ddof: int = 1) -> Tensor:
    """Frechet distances [K] of clip-weighted sets: features [N, R, d], weights [K, N] (how often each clip counts).

    Everything is done on the rows as the reference sees them, Z = rows R^T: tr (S_w S)^1/2 is the sum of root
    eigenvalues of the weighted Z^T Z, or of Z Z^T where that is smaller. One set costs O(min(N R, M, d)^3) and no [N,
    d, d] is made.
    """
    reference_mean, root = (part.to(features) for part in _root(reference, ddof))
    origin = features.mean((0, 1))
    rows = (features - origin).flatten(0, 1)
    seen, norms = rows @ root.mT, rows.square().sum(1)
    by_rows = len(rows) <= seen.shape[1]
    products = seen @ seen.mT if by_rows else seen.mT @ seen
    values = []
    for weight in weights.to(rows).repeat_interleave(features.shape[1], dim=1):
        count = weight.sum()
        mean = weight @ rows / count
        if by_rows:
            pull = products @ weight / count
            centred = products - pull[:, None] - pull[None] + weight @ pull / count
            inner = centred * weight.sqrt()[:, None] * weight.sqrt()
        else:
            changed = weight != 1
            moved = seen[changed]
            centre = weight @ seen / count
            inner = products + (moved * (weight[changed] - 1)[:, None]).mT @ moved - count * torch.outer(centre, centre)
        trace = (weight @ norms - count * mean.square().sum()) / (count - ddof)
        cross = _trace_of_root(inner) / (count - ddof).sqrt()
        values.append((mean + origin - reference_mean).square().sum() + trace + root.square().sum() - 2 * cross)
    return torch.stack(values).cpu()


def _by_clip(features: Tensor) -> Tensor:
    """[N, d] or [N, R, d] -> [N, R, d] in fp64; raises UserError for fewer than 3 clips."""
    by_clip = _flat(features).reshape(len(features), -1, features.shape[-1])
    if len(by_clip) < 3:
        raise UserError(f"an error over clips needs at least 3 clips: got {len(by_clip)}; evaluate more clips")
    return by_clip


def floor_of(
    real: Tensor,
    generator: torch.Generator,
    distance: Callable[[Tensor, Tensor], float],
    splits: int = 8,
    least: int = 2,
) -> tuple[float, float, int]:
    """What perfect clips would score: the distance between random halves of the real ones, of at least `least` clips each.

    Returns the mean over `splits` splits, their standard deviation, and the clips in a half (the N at which it holds).
    """
    num = len(_by_clip(real)) // 2
    if num < least or splits < 2:
        raise UserError(
            f"a floor needs at least {2 * least} clips and 2 splits: got {len(real)}, {splits}; give more real clips"
        )
    orders = [torch.randperm(len(real), generator=generator).to(real.device) for _ in range(splits)]
    draws = [distance(real[order[:num]], real[order[num : 2 * num]]) for order in orders]
    values = torch.tensor(draws, dtype=torch.float64)
    return float(values.mean()), float(values.std()), num


def jackknife_error(replicates: Tensor) -> float:
    """Standard error sqrt((n-1)/n sum (theta_i - mean)^2) from n leave-one-clip-out values [n]."""
    num = len(replicates)
    centred = replicates.double() - replicates.double().mean()
    return float(((num - 1) / num * centred.square().sum()).sqrt())


def mean_with_error(values: Float[Tensor, " n"]) -> tuple[float, float]:
    """Mean over clips and its jackknife error, which is NaN for one clip."""
    if len(values) < 2:
        return float(values.mean()), math.nan
    return float(values.mean()), jackknife_error((values.sum() - values) / (len(values) - 1))


def with_error(value: float, left: Tensor) -> tuple[float, float]:
    """A value over clips and its jackknife error; `left`: the values without each clip [N]."""
    return value, jackknife_error(left)


def difference_with_error(one: tuple[float, Tensor], two: tuple[float, Tensor]) -> tuple[float, float]:
    """The value of one system less another's on the SAME clips, and its jackknife error; each with those without each clip.

    Each clip is left out of both at once, so what the systems share cancels.
    """
    if len(one[1]) != len(two[1]):
        raise UserError(
            f"a paired comparison needs the same clips: got {len(one[1])} and {len(two[1])}; evaluate both alike"
        )
    return one[0] - two[0], jackknife_error(one[1] - two[1])


def frechet_without_each(a: Tensor, reference: Tensor | Moments, ddof: int = 1) -> tuple[float, Tensor]:
    """Frechet distance of clips a ([N, d] or [N, R, d]) from a reference, and those without each clip [N].

    These take N eigenvalue problems of min(N R, M, d) rows each (for frames at d = 2048 about a second a clip on
    a CPU core; features on a device stay there).
    """
    value = frechet_distance(a, reference, ddof)
    features = _by_clip(a)
    leave_one_out = 1 - torch.eye(len(features), dtype=torch.float64)
    return value, _weighted(features, leave_one_out, reference, ddof)


def kid_without_each(a: Tensor, b: Tensor) -> tuple[float, Tensor]:
    """Unbiased MMD^2, kernel (x.y/d + 1)^3 (Binkowski et al. 1801.01401), and those without each clip of a [N].

    a, b: [N, d] or [N, R, d]; pairs inside one clip do not count, so clips with several rows stay unbiased. May be slightly
    negative for equal sets.
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
    return float(value), left_a + constant - 2 * left_across


def _kernel_sums(a: Tensor, b: Tensor) -> Tensor:
    """Mean kernel value of every pair of clips [N, M]; memory is one clip of a against all of b."""
    dim, columns = a.shape[-1], b.flatten(0, 1).mT
    kernels = [((clip @ columns / dim + 1) ** 3).unflatten(1, b.shape[:2]).mean((0, 2)) for clip in a]
    return torch.stack(kernels)
