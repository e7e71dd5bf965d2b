import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.frechet import (
    Moments,
    frechet_distance,
    frechet_with_error,
    kid,
    kid_with_error,
    paired_bootstrap,
)
from teachers.errors import UserError


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


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
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(Moments.of(a), Moments.of(b)), rel=1e-5)
    assert abs(frechet_distance(a, a)) < 1e-9


def test_one_row_is_refused():
    with pytest.raises(UserError, match="at least 2 rows"):
        frechet_distance(normal(1, 4), normal(9, 4))
    with pytest.raises(UserError, match="more than 1 rows"):
        frechet_distance(Moments.of(normal(1, 4)), Moments.of(normal(9, 4)))


def test_nan_is_refused():
    with pytest.raises(UserError, match="not finite"):
        frechet_distance(torch.full((4, 2), float("nan")), normal(4, 2))


@settings(deadline=None, max_examples=15)
@given(cut=st.integers(1, 58), seed=st.integers(0, 99))
def test_merged_moments_equal_one_shot_in_any_order(cut: int, seed: int):
    """fp32 features around 1e4: raw second moments would cancel, Chan's update does not."""
    rows = (normal(60, 5, seed=seed) + 1e4).float()
    whole = Moments.of(rows)
    for first, second in ((rows[:cut], rows[cut:]), (rows[cut:], rows[:cut])):
        merged = Moments.of(first).merge(Moments.of(second))
        assert merged.count == 60
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(merged.covariance(), rows.double().T.cov(), rtol=1e-8, atol=1e-9)


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


def test_kid_leaves_out_pairs_of_one_clip():
    """Copies of a row inside its clip change nothing; counted as independent rows they would."""
    a, b = normal(20, 1, 4), normal(20, 1, 4, seed=1)
    copied = a.expand(-1, 3, -1)
    assert kid(copied, b) == pytest.approx(kid(a, b), rel=1e-9)
    assert kid(copied.reshape(-1, 4), b) != pytest.approx(kid(a, b), rel=1e-3)


def test_paired_bootstrap_sees_a_difference_that_single_errors_hide():
    reference = normal(400, 6, seed=9)
    a = normal(60, 6) + 0.3
    b = a * 1.0
    b[:, 0] += 0.25
    result = paired_bootstrap(b, a, reference, 200, rng(1))
    assert result["low"] < result["difference"] < result["high"]
    assert result["low"] > 0
    assert result["error"] < frechet_with_error(a, reference)[1]
    again = paired_bootstrap(b, a, reference, 200, rng(1))
    assert result == again


def test_paired_bootstrap_refuses_other_clips():
    with pytest.raises(UserError, match="the same clips"):
        paired_bootstrap(normal(8, 3), normal(9, 3), normal(20, 3), 10, rng())
