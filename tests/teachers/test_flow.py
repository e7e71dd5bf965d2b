"""The noise process: conversions invert, grids compose, the Euler solver has order 1."""

from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from teachers import flow
from teachers.errors import UserError
from tests.support.tiny import some_latents

shifts = st.floats(1.0, 20.0)
levels = st.floats(0.0, 1.0)


@settings(deadline=None, max_examples=50)
@given(levels, shifts, shifts)
def test_shifts_compose_and_invert(s, first, second):
    shifted = flow.shift_sigma(s, first)
    assert flow.shift_sigma(shifted, second) == pytest.approx(flow.shift_sigma(s, first * second), abs=1e-9)
    assert flow.shift_sigma(shifted, 1 / first) == pytest.approx(s, abs=1e-9)
    assert s - 1e-12 <= shifted <= 1.0


def test_the_grid_runs_from_one_to_zero():
    grid = flow.sigma_grid(4, 5.0)
    assert grid == pytest.approx((1.0, 15 / 16, 5 / 6, 5 / 8, 0.0))  # the published 1000 937.5 833.3 625 of four steps
    assert grid[0] == 1.0
    assert grid[-1] == 0.0


def test_published_sampler_grids():
    """Values of the published schedulers: LiveAvatar's four sigmas and 25 diffusers steps (FlowMatchEulerDiscreteScheduler), Wan's
    UniPC below 1, MultiTalk's last step at sh(0.001), the few-step students' fixed steps."""
    assert flow.sigma_grid(4, 3.0, "twice") == pytest.approx((1.0, 0.85769, 0.60215, 0.00893, 0.0), abs=5e-6)
    assert flow.sigma_grid(4, 5.0) == pytest.approx((1.0, 0.9375, 5 / 6, 0.625, 0.0))
    closed = flow.sigma_grid(40, 7.0, "closed")
    assert closed[0] == 1.0
    assert closed[39] == pytest.approx(0.007 / 1.006)
    assert closed[13] == pytest.approx(7 * (1 - 0.333) / (1 + 6 * (1 - 0.333)))
    assert len(closed) == 41
    assert closed[-1] == 0.0
    unipc = flow.sigma_grid(40, 3.0, "unipc")
    assert unipc[0] == pytest.approx(3 * 0.999 / (1 + 2 * 0.999))
    assert unipc[20] == pytest.approx(3 * 0.4995 / (1 + 2 * 0.4995))
    for kind in ("even", "closed", "twice", "unipc"):
        grid = flow.sigma_grid(25, 5.0, kind)
        assert all(a > b for a, b in pairwise(grid))
        assert len(grid) == 26


def test_the_grid_of_diffusers_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0)
    scheduler.set_timesteps(25)
    assert flow.sigma_grid(25, 5.0, "twice") == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("steps", "kind", "message"), [(1, "closed", "at least 2"), (0, "even", "at least 1"), (4, "odd", "choose")]
)
def test_a_grid_that_cannot_be(steps, kind, message):
    with pytest.raises(UserError, match=message):
        flow.sigma_grid(steps, 5.0, kind)


def test_a_coarser_grid_lies_on_a_finer_one():
    assert flow.on_grid(flow.sigma_grid(4, 3.0), flow.sigma_grid(48, 3.0)) == (0, 12, 24, 36, 48)
    for sigmas, grid in [(flow.sigma_grid(5, 3.0), flow.sigma_grid(48, 3.0)), ((0.7,), flow.sigma_grid(48, 5.0))]:
        with pytest.raises(UserError, match=r"is not on the teacher's grid of 48 steps \(nearest .*step count"):
            flow.on_grid(sigmas, grid)


@settings(deadline=None, max_examples=25)
@given(st.floats(0.01, 1.0), st.booleans())
def test_conversions_invert(sigma, per_frame):
    x0, eps = some_latents(2, 4), some_latents(2, 4, seed=1)
    level = torch.full((2, 4) if per_frame else (2,), sigma)
    x = flow.add_noise(x0, eps, level)
    velocity = flow.velocity_from_x0(x, x0, level)
    assert torch.allclose(velocity, eps - x0, atol=1e-4 / sigma**0.5)
    assert torch.allclose(flow.x0_from_velocity(x, velocity, level), x0, atol=1e-5)


def test_a_level_of_each_frame_touches_that_frame_alone():
    x0, eps = some_latents(1, 4), some_latents(1, 4, seed=1)
    x = flow.add_noise(x0, eps, torch.tensor([[0.0, 1.0, 0.25, 0.0]]))
    assert torch.equal(x[:, :, 0], x0[:, :, 0])
    assert torch.equal(x[:, :, 1], eps[:, :, 1])
    assert torch.allclose(x[:, :, 2], 0.75 * x0[:, :, 2] + 0.25 * eps[:, :, 2])


def test_differences_are_taken_in_fp32():
    x, x0 = some_latents(1, 2).bfloat16(), some_latents(1, 2, seed=1).bfloat16()
    velocity = flow.velocity_from_x0(x, x0, torch.tensor([0.3]))
    assert velocity.dtype == torch.float32
    assert torch.equal(velocity, (x.float() - x0.float()) / torch.tensor(0.3))


def test_the_solver_is_exact_where_the_path_is_straight():
    """One data point: the velocity is constant, so every grid ends on it and passes through the interpolation."""
    x0, noise = some_latents(2, 2).double(), some_latents(2, 2, seed=1).double()
    grid = flow.sigma_grid(5, 3.0)
    states = list(flow.solve(lambda x, sigma: x0, noise, grid))
    assert len(states) == 6
    assert torch.equal(states[0], noise)
    for sigma, state in zip(grid, states, strict=True):
        assert torch.allclose(state, (1 - sigma) * x0 + sigma * noise, atol=1e-12)


def test_keyed_generators_do_not_touch_the_global_one():
    before = torch.random.get_rng_state()
    draws = [torch.randn(3, generator=flow.keyed_generator(0, "noise", i)) for i in (0, 1, 0)]
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 4, 1), ()])
def test_a_sigma_of_another_batch_or_another_number_of_frames_is_refused_by_its_annotation(shape):
    with pytest.raises(TypeCheckError, match="sigma"):
        flow.add_noise(some_latents(2, 4), some_latents(2, 4, seed=1), torch.ones(shape))


def test_noise_of_another_shape_is_refused_by_its_annotation_and_does_not_broadcast():
    with pytest.raises(TypeCheckError, match="eps"):
        flow.add_noise(some_latents(2, 4), some_latents(1, 4), torch.ones(2))
