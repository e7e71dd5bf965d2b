import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.frechet import (
    Moments,
    difference_with_error,
    floor_of,
    frechet_distance,
    frechet_without_each,
    jackknife_error,
    kid_without_each,
    with_error,
)
from teachers.errors import UserError


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


def frechet_with_error(a: torch.Tensor, reference: torch.Tensor | Moments, ddof: int = 1) -> tuple[float, float]:
    return with_error(*frechet_without_each(a, reference, ddof))


def kid(a: torch.Tensor, b: torch.Tensor) -> float:
    return kid_without_each(a, b)[0]


def kid_with_error(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    return with_error(*kid_without_each(a, b))


def paired(without_each, a: torch.Tensor, b: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    return difference_with_error(without_each(a, reference), without_each(b, reference))


def by_definition(a: torch.Tensor, b: torch.Tensor) -> float:
    """Eigenvalues of S_a S_b, a third way to the trace of its square root."""
    cross = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp_min(0).sqrt().sum()
    traces = a.T.cov().trace() + b.T.cov().trace()
    return float((a.mean(0) - b.mean(0)).square().sum() + traces - 2 * cross)


def test_equal_covariance_gives_the_squared_shift():
    a = normal(50, 6)
    shift = torch.arange(6.0, dtype=torch.float64)
    assert frechet_distance(a, a + shift) == pytest.approx(float(shift.square().sum()), rel=1e-9)


@settings(deadline=None, max_examples=20)
@given(factor=st.floats(0.1, 5.0))
def test_scaled_covariance_has_the_closed_form(factor: float):
    """S_b = c^2 S_a: (1 - c)^2 tr S_a."""
    a = normal(40, 5)
    a = a - a.mean(0)
    expected = (1 - factor) ** 2 * float(a.T.cov().trace())
    assert frechet_distance(a, factor * a) == pytest.approx(expected, rel=1e-7, abs=1e-9)


def test_diagonal_covariances_have_the_closed_form():
    basis = torch.linalg.qr(normal(64, 4) - normal(64, 4).mean(0)).Q
    basis = basis - basis.mean(0)
    basis = torch.linalg.qr(basis).Q * 63**0.5
    s1, s2 = torch.tensor([1.0, 2.0, 0.5, 3.0]).double(), torch.tensor([0.1, 1.0, 4.0, 3.0]).double()
    assert frechet_distance(basis * s1, basis * s2) == pytest.approx(float((s1 - s2).square().sum()), rel=1e-9)


@pytest.mark.parametrize(("n", "m", "d"), [(200, 150, 8), (30, 40, 6)])
def test_three_ways_agree(n: int, m: int, d: int):
    a, b = normal(n, d) * torch.linspace(0.5, 2, d), normal(m, d, seed=1) + 0.3
    value = frechet_distance(a, b)
    assert value == pytest.approx(by_definition(a, b), rel=1e-8)
    assert value == pytest.approx(frechet_distance(Moments.of(a), Moments.of(b)), rel=1e-8)
    assert value == pytest.approx(frechet_distance(b, a), rel=1e-9)
    turn = torch.linalg.qr(normal(d, d, seed=3)).Q
    assert value == pytest.approx(frechet_distance(a @ turn + 7, b @ turn + 7), rel=1e-8)


@pytest.mark.parametrize("n", [2, 16])
def test_fewer_rows_than_columns(n: int):
    """The nuclear form needs no inverse and no complex root; Moments agree to the rounding of small eigenvalues."""
    a, b = normal(n, 40), normal(n + 1, 40, seed=1)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(Moments.of(a), Moments.of(b)), rel=1e-10)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(a, Moments.of(b)), rel=1e-10)
    assert abs(frechet_distance(a, a)) < 1e-9


def by_scipy(a: torch.Tensor, b: torch.Tensor, ddof: int = 1) -> float:
    """The route of the published implementations: a matrix square root of the product of the covariances."""
    a, b = a.double().numpy(), b.double().numpy()
    first, second = np.cov(a, rowvar=False, ddof=ddof), np.cov(b, rowvar=False, ddof=ddof)
    root = scipy.linalg.sqrtm(first @ second)
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(first + second - 2 * root.real))


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize(("n", "m", "d"), [(400, 300, 24), (90, 120, 12)])
def test_equals_the_matrix_square_root_on_well_conditioned_sets(n: int, m: int, d: int, ddof: int):
    mix = torch.linalg.qr(normal(d, d, seed=5)).Q * torch.linspace(0.5, 3, d)
    a, b = normal(n, d) @ mix, normal(m, d, seed=1) + 0.3
    assert frechet_distance(a, b, ddof) == pytest.approx(by_scipy(a, b, ddof), rel=1e-9)
    assert frechet_distance(Moments.of(a), Moments.of(b), ddof) == pytest.approx(by_scipy(a, b, ddof), rel=1e-9)


def test_the_divisor_is_n_minus_ddof():
    """One column without a shift: (s_a - s_b)^2, so the factor between the two conventions is known."""
    a = normal(10, 1)
    a = a - a.mean(0)
    assert frechet_distance(a, 3 * a, ddof=0) == pytest.approx(4 * float(a.square().mean()), rel=1e-12)
    assert frechet_distance(a, 3 * a) == pytest.approx(4 * float(a.square().sum()) / 9, rel=1e-12)
    assert frechet_with_error(a, 3 * a, ddof=0)[0] == pytest.approx(4 * float(a.square().mean()), rel=1e-12)


def test_equal_rows_have_no_covariance():
    a, b = torch.ones(5, 3), torch.zeros(4, 3)
    assert frechet_distance(a, b) == 3
    assert frechet_distance(Moments.of(a), Moments.of(b)) == 3


def test_a_large_common_mean_in_fp32_costs_no_digits():
    """A raw second moment in fp32 at 1e4 has an absolute error of about 10: the whole covariance of 1."""
    a, b = (normal(300, 6) + 1e4).float(), (normal(300, 6, seed=1) * 1.5 + 1e4).float()
    centred = [x.double() - 1e4 for x in (a, b)]
    expected = by_scipy(*centred)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(*map(Moments.of, (a, b))) == pytest.approx(expected, rel=1e-8)
    (_, error), (_, plain) = frechet_with_error(a, b), frechet_with_error(*centred)
    assert error == pytest.approx(plain, rel=1e-6)


def test_one_row_is_refused():
    with pytest.raises(UserError, match="at least 2 rows"):
        frechet_distance(normal(1, 4), normal(9, 4))
    with pytest.raises(UserError, match="more than 1 rows"):
        frechet_distance(Moments.of(normal(1, 4)), Moments.of(normal(9, 4)))


def test_nan_is_refused():
    with pytest.raises(UserError, match="not finite"):
        frechet_distance(torch.full((4, 2), float("nan")), normal(4, 2))
    with pytest.raises(UserError, match="not finite"):
        kid(torch.full((4, 2), float("inf")), normal(4, 2))


def test_small_sets_of_one_distribution_are_biased_upwards():
    """Guards against "fixing" the known bias: E[FD(P, P)] at N = 50 is clearly above 0 and falls with N."""
    small = [frechet_distance(normal(50, 16, seed=i), normal(50, 16, seed=100 + i)) for i in range(8)]
    large = [frechet_distance(normal(800, 16, seed=i), normal(800, 16, seed=100 + i)) for i in range(8)]
    assert 1.0 < sum(small) / 8 < 4.0
    assert sum(large) / 8 < 0.3


def test_jackknife_error_equals_leaving_clips_out_by_hand():
    clips, reference = normal(12, 5, 4), normal(90, 4, seed=1) + 0.2
    value, error = frechet_with_error(clips, reference)
    assert value == pytest.approx(frechet_distance(clips, reference))
    left = [frechet_distance(torch.cat((clips[:i], clips[i + 1 :])), reference) for i in range(12)]
    left = torch.tensor(left, dtype=torch.float64)
    assert error == pytest.approx(float((11 / 12 * (left - left.mean()).square().sum()).sqrt()), rel=1e-5)


@pytest.mark.parametrize(
    ("clips", "rows", "columns", "others"),
    [(9, 1, 30, 12), (9, 4, 30, 200), (7, 5, 6, 90), (6, 2, 40, 8), (9, 2, 5, 4)],
)
def test_jackknife_of_every_shape_equals_leaving_clips_out_by_hand(clips: int, rows: int, columns: int, others: int):
    """N < d, N > d, several rows a clip, a reference of few rows: each takes another way to the trace."""
    a, reference = normal(clips, rows, columns) + 0.1, normal(others, columns, seed=1)
    keep = [[j for j in range(clips) if j != i] for i in range(clips)]
    left = torch.tensor([frechet_distance(a[index], reference) for index in keep], dtype=torch.float64)
    for target in (reference, Moments.of(reference)):
        assert frechet_with_error(a, target)[1] == pytest.approx(jackknife_error(left), rel=1e-6)


def test_jackknife_of_a_mean_is_its_standard_error():
    values = normal(11)
    left_out = (values.sum() - values) / 10
    assert jackknife_error(left_out) == pytest.approx(float(values.std()) / 11**0.5, rel=1e-12)


def test_clip_order_changes_nothing():
    a, reference, order = normal(20, 3, 5), normal(60, 5, seed=1), torch.randperm(20, generator=rng(4))
    assert frechet_with_error(a[order], reference) == pytest.approx(frechet_with_error(a, reference), rel=1e-9)
    assert kid_with_error(a[order], reference) == pytest.approx(kid_with_error(a, reference), rel=1e-9)


def clips_of_a_system(num: int, seed: int, dim: int = 6) -> torch.Tensor:
    """Clips of 3 correlated frames, off the reference in mean and spread."""
    scale = torch.linspace(0.6, 1.8, dim, dtype=torch.float64)
    between, within = normal(num, 1, dim, seed=seed), normal(num, 3, dim, seed=seed + 10_000)
    return (between + 0.3 * within) * scale + 0.4


def percentile_interval(a: torch.Tensor, reference: Moments, rounds: int, seed: int) -> tuple[float, float]:
    drawn = torch.randint(len(a), (rounds, len(a)), generator=rng(seed))
    values = torch.tensor([frechet_distance(a[rows], reference) for rows in drawn], dtype=torch.float64)
    return float(values.quantile(0.025)), float(values.quantile(0.975))


@pytest.mark.slow
def test_error_bars_cover():
    """Value +- 2 errors holds the expected value at this N in >= 90 % of 200 sets, though frames of a clip correlate."""
    reference = Moments.of(normal(3000, 6, seed=77))
    sets = [clips_of_a_system(40, seed) for seed in range(200)]
    fid = torch.tensor([frechet_with_error(a, reference) for a in sets], dtype=torch.float64)
    expected = sum(frechet_distance(clips_of_a_system(40, 3000 + seed), reference) for seed in range(800)) / 800
    covered = ((fid[:, 0] - expected).abs() < 2 * fid[:, 1]).double().mean()
    assert 0.90 <= float(covered) <= 0.999
    as_frames = [frechet_with_error(a.flatten(0, 1), reference) for a in sets[:60]]
    naive = sum(abs(value - expected) < 2 * error for value, error in as_frames) / 60
    assert naive < 0.85, "frames taken for clips must show as too small an error"


def test_error_bars_cover_with_fewer_clips_than_columns():
    reference = normal(50, 40, seed=77) * 0.8
    runs = torch.tensor([frechet_with_error(normal(16, 40, seed=s) + 0.1, reference) for s in range(200)]).double()
    expected = sum(frechet_distance(normal(16, 40, seed=3000 + s) + 0.1, reference) for s in range(600)) / 600
    assert float(((runs[:, 0] - expected).abs() < 2 * runs[:, 1]).double().mean()) >= 0.90


def test_kid_error_bars_cover():
    """The kernel distance is unbiased over both sets; its error is over the clips of a, for a given b."""
    reference = normal(60, 1, 16, seed=77)
    runs = [kid_with_error(0.7 * clips_of_a_system(30, s, 16), reference) for s in range(100)]
    values, errors = torch.tensor(runs, dtype=torch.float64).unbind(1)
    expected = sum(kid(0.7 * clips_of_a_system(30, 3000 + s, 16), reference) for s in range(200)) / 200
    assert float(((values - expected).abs() < 2 * errors).double().mean()) >= 0.90


def test_a_percentile_bootstrap_of_one_value_does_not_cover():
    """Why there is none: where N is near d, its interval misses even the value that it was drawn from."""
    reference = Moments.of(normal(1000, 24, seed=77))
    inside = 0
    for seed in range(10):
        a = normal(30, 24, seed=seed)
        low, high = percentile_interval(a, reference, 60, seed)
        inside += low < frechet_distance(a, reference) < high
    assert inside == 0


def pair_of_systems(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """b shares most of each clip with a."""
    a = clips_of_a_system(40, seed, 8)
    return a, 1.05 * a + 0.2 * normal(40, 1, 8, seed=seed + 50_000)


@pytest.mark.slow
def test_errors_of_a_paired_difference_cover():
    reference = Moments.of(normal(1500, 8, seed=77))
    pairs = [pair_of_systems(seed) for seed in range(120)]
    runs = [difference_with_error(*(frechet_without_each(x, reference) for x in pair)) for pair in pairs]
    difference, errors = torch.tensor(runs, dtype=torch.float64).unbind(1)
    more = [pair_of_systems(seed) for seed in range(3000, 3500)]
    expected = sum(frechet_distance(a, reference) - frechet_distance(b, reference) for a, b in more) / len(more)
    assert 0.90 <= float(((difference - expected).abs() < 2 * errors).double().mean()) <= 0.999
    single = sum(frechet_with_error(pair_of_systems(seed)[0], reference)[1] for seed in range(20)) / 20
    assert float(errors.mean()) < 0.7 * single, "what the systems share must cancel"


def test_a_paired_difference_has_the_sign_and_error_of_its_definition():
    a, b = pair_of_systems(1)
    reference = normal(90, 8, seed=9)
    difference, error = paired(frechet_without_each, a, b, reference)
    assert difference == pytest.approx(frechet_distance(a, reference) - frechet_distance(b, reference))
    keep = [[j for j in range(40) if j != i] for i in range(40)]
    left = [frechet_distance(a[rows], reference) - frechet_distance(b[rows], reference) for rows in keep]
    assert error == pytest.approx(jackknife_error(torch.tensor(left, dtype=torch.float64)), rel=1e-6)
    assert paired(frechet_without_each, a, a, reference) == (0, 0)


def test_the_floor_is_the_distance_of_real_from_real_at_half_the_clips():
    real = normal(60, 2, 8)
    floor, spread, num = floor_of(real, rng(), frechet_distance)
    assert num == 30
    halves = [frechet_distance(normal(30, 2, 8, seed=s), normal(30, 2, 8, seed=s + 500)) for s in range(1, 30)]
    assert floor == pytest.approx(sum(halves) / len(halves), rel=0.25)
    assert 0 < spread < floor
    assert floor_of(normal(240, 2, 8), rng(), frechet_distance)[0] < 0.5 * floor
    with pytest.raises(UserError, match="at least 4 clips"):
        floor_of(normal(3, 8), rng(), frechet_distance)


def test_jackknife_error_matches_the_scatter_of_repeated_draws():
    reference = normal(4000, 6, seed=99)
    runs = [frechet_with_error(normal(80, 6, seed=i) * 1.5, reference) for i in range(40)]
    values, errors = torch.tensor(runs, dtype=torch.float64).unbind(1)
    assert 0.7 < float(errors.mean() / values.std()) < 1.6


def test_rows_of_one_clip_count_as_one_in_the_error():
    clips = normal(40, 1, 4) + torch.zeros(40, 6, 4)
    reference = normal(200, 4, seed=1)
    _, as_clips = frechet_with_error(clips, reference)
    _, as_rows = frechet_with_error(clips.reshape(-1, 4), reference)
    assert as_clips > 1.8 * as_rows


def test_kid_is_unbiased_and_orders():
    same = [kid(normal(40, 8, seed=i), normal(40, 8, seed=500 + i)) for i in range(60)]
    same = torch.tensor(same)
    assert abs(float(same.mean())) < 3 * float(same.std()) / 60**0.5
    a, b = normal(60, 8), normal(60, 8, seed=1)
    assert kid(a, b) < kid(a, b + 0.5) < kid(a, b + 1.0)


def test_kid_equals_its_definition():
    a, b = normal(7, 3), normal(9, 3, seed=1) + 0.4
    kernel = lambda x, y: (x @ y / 3 + 1) ** 3  # noqa: E731
    within = lambda x: sum(kernel(p, q) for i, p in enumerate(x) for j, q in enumerate(x) if i != j)  # noqa: E731
    expected = within(a) / 42 + within(b) / 72 - 2 * sum(kernel(p, q) for p in a for q in b) / 63
    value, error = kid_with_error(a, b)
    assert value == pytest.approx(float(expected), rel=1e-9)
    left = torch.tensor([kid(torch.cat((a[:i], a[i + 1 :])), b) for i in range(7)], dtype=torch.float64)
    assert error == pytest.approx(float((6 / 7 * (left - left.mean()).square().sum()).sqrt()), rel=1e-9)


def test_a_paired_difference_of_kid_has_the_sign_and_error_of_its_definition():
    a, b, reference = normal(8, 2, 3) + 0.4, normal(8, 2, 3, seed=1), normal(9, 2, 3, seed=2)
    difference, error = paired(kid_without_each, a, b, reference)
    assert difference == pytest.approx(kid(a, reference) - kid(b, reference))
    keep = [[j for j in range(8) if j != i] for i in range(8)]
    left = [kid(a[rows], reference) - kid(b[rows], reference) for rows in keep]
    assert error == pytest.approx(jackknife_error(torch.tensor(left, dtype=torch.float64)), rel=1e-9)
    assert paired(kid_without_each, a, a, reference) == (0, 0)
    with pytest.raises(UserError, match="the same clips"):
        paired(kid_without_each, a, b[1:], reference)


def test_the_floor_of_kid_is_around_0_at_half_the_clips():
    real = normal(24, 2, 6)
    floor, spread, num = floor_of(real, rng(), kid, 12, least=3)
    assert num == 12
    assert abs(floor) < spread
    with pytest.raises(UserError, match="a floor needs at least 6 clips"):
        floor_of(real[:5], rng(), kid, least=3)


def test_kid_leaves_out_pairs_of_one_clip():
    """Copies of a row inside its clip change nothing; counted as independent rows they would."""
    a, b = normal(20, 1, 4), normal(20, 1, 4, seed=1)
    copied = a.expand(-1, 3, -1)
    assert kid(copied, b) == pytest.approx(kid(a, b), rel=1e-9)
    assert kid(copied.reshape(-1, 4), b) != pytest.approx(kid(a, b), rel=1e-3)
