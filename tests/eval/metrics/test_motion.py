import pytest
import torch

from eval.metrics.identity import identity_agreement
from eval.metrics.motion import (
    class_agreement,
    diversity,
    motion_energies,
    ratio_with_error,
    sharpness_energies,
    spread_over_noise,
)
from teachers.errors import UserError


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise_video(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=rng(seed), dtype=torch.uint8)


def test_class_agreement_counts_and_averages():
    probabilities = torch.tensor([[0.8, 0.2], [0.4, 0.6], [0.9, 0.1], [0.3, 0.7]])
    value, error, probability = class_agreement(probabilities, torch.tensor([0, 1, 1, 1]))
    assert value == 0.75
    assert probability == pytest.approx((0.8 + 0.6 + 0.1 + 0.7) / 4)
    assert error == pytest.approx((0.75 * 0.25 / 3) ** 0.5)  # the jackknife of a mean is its standard error


def test_motion_energy_orders_and_has_its_closed_form():
    still = noise_video(2, 3, 1, 16, 16).expand(-1, -1, 6, -1, -1)
    ramp = torch.zeros(2, 3, 6, 16, 16, dtype=torch.uint8) + torch.arange(0, 60, 10, dtype=torch.uint8)[:, None, None]
    assert motion_energies(still).tolist() == [0, 0]
    assert motion_energies(ramp).tolist() == [10, 10]


def test_sharpness_falls_with_blur_and_ignores_frame_0():
    video = noise_video(3, 3, 5, 16, 16)
    soft = torch.nn.functional.avg_pool2d(video.float().flatten(1, 2), 3, 1, 1).unflatten(1, (3, 5)).to(torch.uint8)
    assert (sharpness_energies(soft) < 0.2 * sharpness_energies(video)).all()
    changed = video.clone()
    changed[:, :, 0] = 0
    torch.testing.assert_close(sharpness_energies(changed), sharpness_energies(video))
    flat = torch.full((1, 3, 4, 16, 16), 90, dtype=torch.uint8)
    assert float(sharpness_energies(flat)) == 0


def test_ratio_of_a_set_to_itself_is_exactly_one():
    values = torch.rand(20, generator=rng(), dtype=torch.float64) + 1
    assert ratio_with_error(values, values) == (1.0, pytest.approx(0, abs=1e-12))
    value, error = ratio_with_error(values * 2, values[:10])
    assert value > 1.5
    assert error > 0
    with pytest.raises(UserError, match="reference that moves"):
        ratio_with_error(values, torch.zeros(4, dtype=torch.float64))


def spread_world(scale: float, num_seeds: int = 8, seed: int = 0, gaze: float = 1.0):
    """6 conditions x seeds with independent nuisance of a known size."""
    draw = torch.randn(6, num_seeds, 10, 5, generator=rng(seed)) * scale
    names = ("head_x", "head_y", "tilt", "light", "gaze")
    labels = {name: draw[..., i] * (gaze if name == "gaze" else 1) for i, name in enumerate(names)}
    labels["blink"] = (torch.rand(6, num_seeds, 10, generator=rng(seed + 1)) < 0.2).float()
    base = torch.rand(6, 1, 3, 10, 8, 8, generator=rng(7)) * 60 + 90
    pixels = torch.randn(6, num_seeds, 3, 10, 8, 8, generator=rng(seed + 2)) * 12 * scale
    return spread_over_noise((base + pixels).clamp(0, 255).round().to(torch.uint8), labels)


def test_diversity_is_the_ratio_of_spreads():
    world = spread_world(1.0)
    assert diversity(world, world)["diversity"] == pytest.approx(1)
    half = diversity(spread_world(0.5, seed=20), world)
    assert half["diversity"] == pytest.approx(0.5, rel=0.05)
    assert half["head_spread"] == pytest.approx(0.5, rel=0.1)
    assert 0 < half["error"] < 0.05
    assert half["blink_rate"] == pytest.approx(1, rel=0.35)
    assert diversity(spread_world(1.0, num_seeds=3, seed=40), world)["diversity"] == pytest.approx(1, rel=0.1)


def test_a_collapsed_part_is_not_bought_back_by_others():
    world = spread_world(1.0)
    lively_without_gaze = diversity(spread_world(1.2, seed=20, gaze=0.01), world)
    assert lively_without_gaze["head_spread"] > 1.1
    assert lively_without_gaze["diversity"] < 0.5
    assert diversity(spread_world(1e-4, seed=20), world)["diversity"] < 0.01


def test_spread_needs_two_noises():
    with pytest.raises(UserError, match="at least 2 seeds"):
        spread_over_noise(noise_video(4, 1, 3, 5, 8, 8), {})


def test_identity_is_one_for_the_same_and_zero_for_swapped_faces():
    faces = torch.randn(40, 1, 9, generator=rng()).expand(-1, 6, -1)
    assert identity_agreement(faces, faces[:, 0])[0] == pytest.approx(1)
    swapped, error = identity_agreement(faces.roll(1, 0), faces[:, 0])
    assert abs(swapped) < 4 * error
    noisy, error = identity_agreement(faces + 0.5 * torch.randn(40, 6, 9, generator=rng(1)), faces[:, 0])
    assert noisy == pytest.approx(1 - 0.25 / 2.25, abs=0.03)
    assert 0 < error < 0.02


def test_identity_error_equals_leaving_clips_out_by_hand():
    faces = torch.randn(9, 5, 4, generator=rng())
    portraits = faces[:, 0] + 0.3 * torch.randn(9, 4, generator=rng(1))
    _, error = identity_agreement(faces, portraits)
    keep = [[j for j in range(9) if j != i] for i in range(9)]
    left = torch.tensor([identity_agreement(faces[rows], portraits[rows])[0] for rows in keep], dtype=torch.float64)
    assert error == pytest.approx(float((8 / 9 * (left - left.mean()).square().sum()).sqrt()), rel=1e-9)
