"""Time and value of `eval.frechet` beside scipy's matrix square root, on the same features: python benchmarks/frechet.py

No test (the square root takes its time): two threads, the two in turn, medians; prints one JSON line. With pytorch-fid
installed its own function is the other side, else the same route in six lines.
"""

import argparse
import json
import os
import time

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "2"

import numpy as np
import scipy.linalg
import torch

from eval.frechet import frechet_distance, frechet_without_each, with_error

try:
    from pytorch_fid.fid_score import calculate_frechet_distance as theirs
except ImportError:

    def theirs(mean_a, cov_a, mean_b, cov_b) -> float:
        root = scipy.linalg.sqrtm(cov_a @ cov_b).real
        return float(np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root))


def by_square_root(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double().numpy(), b.double().numpy()
    return float(theirs(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False)))


def features(num: int, dim: int, seed: int) -> torch.Tensor:
    """Inception-like: positive mean, a power-law spectrum, fp32."""
    rng = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, dim + 1).float().pow(-0.6)
    return torch.randn(num, dim, generator=rng) * spectrum + 0.4 + 0.02 * seed


def timed(call) -> tuple[float, float]:
    start = time.perf_counter()
    value = call()
    return time.perf_counter() - start, value


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--num", type=int, default=100)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(2)
    a, b = features(options.num, options.dim, 0), features(options.num, options.dim, 1)
    ours, other = [], []
    for _ in range(options.rounds):
        ours.append(timed(lambda: frechet_distance(a, b)))
        other.append(timed(lambda: by_square_root(a, b)))
    error_s, (_, error) = timed(lambda: with_error(*frechet_without_each(a, b)))
    seconds = [float(np.median([row[0] for row in rows])) for rows in (ours, other)]
    values = [rows[0][1] for rows in (ours, other)]
    result = {
        "ours_s": seconds[0],
        "square_root_s": seconds[1],
        "ratio": seconds[1] / seconds[0],
        "ours": values[0],
        "square_root": values[1],
        "relative_difference": abs(values[0] - values[1]) / values[1],
        "jackknife_error": error,
        "value_with_error_s": error_s,
        "route": theirs.__module__,
    }
    print(json.dumps(result | vars(options)))


if __name__ == "__main__":
    main()
