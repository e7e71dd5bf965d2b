"""Weight-free measures by their closed forms."""

from fractions import Fraction

import pytest
import torch

from eval.metric import Clip
from eval.metrics.motion_energy import MotionEnergy
from eval.metrics.pairs.gap import Gap
from eval.metrics.quality import (
    Quality,
    failure_rates,
    flickers,
    measure,
    quality_beside,
    slope,
    window_colour,
    window_means,
)
from eval.metrics.seam import seam_jump
from eval.metrics.sharpness import Sharpness
from eval.networks.loaded import Networks
from eval.scores import clip_features, set_scores
from teachers.errors import UserError
from tests.support.tiny import randn, rng


def grey(levels: list[float], side: int = 8, num: int = 1) -> torch.Tensor:
    """Clips of flat grey frames."""
    values = torch.tensor(levels).round().to(torch.uint8)
    return values[None, None, :, None, None].expand(num, 3, -1, side, side).clone()


def noise_video(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=rng(seed), dtype=torch.uint8)


def test_frames_are_measured_by_their_definitions():
    video = noise_video(2, 3, 5, 8, 12)
    frames, exact = measure(video), video.double()
    luma = (exact * torch.tensor([0.2126, 0.7152, 0.0722]).double()[:, None, None, None]).sum(1)
    torch.testing.assert_close(frames.colour, exact.mean((3, 4)))
    torch.testing.assert_close(frames.luma, luma.mean((2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(frames.saturation, (exact.amax(1) - exact.amin(1)).mean((2, 3)))
    torch.testing.assert_close(frames.dark, (luma < 25.5).double().mean((2, 3)))
    torch.testing.assert_close(frames.change, exact.diff(dim=2).abs().mean((1, 3, 4)), rtol=1e-6, atol=0)
    cells = luma.unflatten(3, (4, 3)).unflatten(2, (4, 2)).mean((3, 5)).flatten(2).mT
    torch.testing.assert_close(frames.cells, cells, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_pieces_and_clip_order_change_nothing(size: int):
    video = noise_video(3, 3, 7, 8, 8)
    whole, parts, turned = measure(video), measure(video, size), measure(video.flip(0))
    for name in ("colour", "saturation", "dark", "cells", "change"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(getattr(turned, name).flip(0), getattr(whole, name), rtol=1e-6, atol=1e-9)


def test_black_frozen_and_flash_are_shares():
    levels = [120.0, 121, 122, 0, 122, 122, 122, 123, 160, 160]
    rates = {name: float(x) for name, x in failure_rates(measure(grey(levels))).items()}
    assert rates == pytest.approx({"black": 1 / 10, "frozen": 3 / 9, "flash": 3 / 9})
    for step, expected in ((25, 0), (26, 1)):  # of 255
        fade = failure_rates(measure(grey([100.0 + step * i for i in range(6)])))
        assert float(fade["flash"]) == expected


def test_a_dark_picture_with_a_bright_corner_is_not_black():
    video = grey([10.0, 12, 14])
    assert float(failure_rates(measure(video))["black"]) == 1
    video[..., :2, :2] = 200  # 6 percent of the pixels
    assert float(failure_rates(measure(video))["black"]) == 0


def test_flicker_is_the_amplitude_of_alternating_light():
    alternating = grey([100.0 + 6 * (-1) ** i for i in range(9)])
    fade = grey([50.0 + 7 * i for i in range(9)])
    assert float(flickers(measure(alternating))) == pytest.approx(6)
    assert float(flickers(measure(fade))) == pytest.approx(0, abs=1e-5)
    part = grey([100.0] * 9)
    part[:, :, ::2, :4, :4] += 12  # a quarter of the picture, +- 6
    assert float(flickers(measure(part))) == pytest.approx(1.5)


def test_a_seam_is_a_larger_step_at_chunk_borders():
    steps = [2.0, 2, 2, 8, 2, 2, 2, 8, 2, 2, 2]
    levels = torch.tensor([50.0, *steps]).cumsum(0).tolist()
    frames = measure(grey(levels, num=3))
    assert seam_jump(frames, [4, 8]) == (pytest.approx(4), pytest.approx(0, abs=1e-9))
    assert seam_jump(frames, [3, 7])[0] == pytest.approx(2 / (30 / 9))
    for wrong in ([], [0], [12], list(range(1, 12))):
        with pytest.raises(UserError, match=r"^seams lie at frames 1\.\.11, not at all of them"):
            seam_jump(frames, wrong)


def test_windows_of_a_fading_film():
    film = grey(torch.linspace(100, 159, 60).tolist(), num=2)
    means = film[0, 0, :, 0, 0].double().unflatten(0, (4, 15)).mean(1)
    colour = window_colour(measure(film), 15)
    torch.testing.assert_close(colour, (means - 100).expand(2, 4) * 3**0.5, rtol=1e-5, atol=1e-5)
    assert [slope((clip / 3**0.5).tolist()) for clip in colour] == [pytest.approx(15, rel=0.02)] * 2
    assert window_colour(measure(film), 14).shape == (2, 4)  # the rest of 4 frames is dropped
    torch.testing.assert_close(window_means(film[:, 0, :, 0, 0].double(), 15), means.expand(2, 4))


def test_a_film_beside_a_portrait():
    film = grey(torch.linspace(100, 159, 60).tolist(), num=2)
    mean = film[0, 0, :, 0, 0].double().mean()
    portrait = torch.full((2, 3, 8, 8), 90, dtype=torch.uint8)
    scores = quality_beside(film, portrait)
    torch.testing.assert_close(scores["luma"], (mean - 90).expand(2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores["colour"], (mean - 90).expand(2) * 3**0.5, rtol=1e-5, atol=1e-5)
    assert float(scores["saturation"].abs().max()) == 0
    assert float(scores["sharpness"].abs().max()) == 0
    torch.testing.assert_close(scores["motion_energy"], torch.ones(2).double(), rtol=0.05, atol=0)
    red = film.clone()
    red[:, 1:] -= 20
    torch.testing.assert_close(quality_beside(red, portrait)["saturation"], torch.full((2,), 20.0).double())
    noise = noise_video(2, 3, 15, 16, 16)
    soft = torch.nn.functional.avg_pool2d(noise.float().flatten(1, 2), 3, 1, 1).unflatten(1, (3, 15)).to(torch.uint8)
    sharp, blurred = (quality_beside(video, noise[:, :, 0])["sharpness"] for video in (noise, soft))
    assert (blurred < 0.2 * sharp).all()


def gap(student: torch.Tensor, teacher: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    features = [
        Gap().features(Clip(video=own, fps=Fraction(4), beside={"teacher_same_noise": one, "teacher": two}), None, None)
        for own, one, two in zip(student, teacher, other, strict=True)
    ]
    return Gap().score(features, None)["gap"][:2]


@pytest.mark.usefixtures("unchecked_shapes")
def test_the_gap_to_the_teacher_is_0_for_a_copy_and_1_for_another_draw():
    base = randn(24, 3, 6, 8, 8, seed=5) * 25
    teacher, other, third = (
        (base + 20 * randn(24, 3, 6, 8, 8, seed=seed) + 127).clamp(0, 255).round().to(torch.uint8) for seed in (1, 2, 3)
    )
    assert gap(teacher, teacher, other) == (0, 0)
    value, error = gap(third, teacher, other)
    assert abs(value - 1) < 4 * error < 0.1
    half = ((teacher.float() + third.float()) / 2).round().to(torch.uint8)
    assert gap(half, teacher, other)[0] == pytest.approx(0.25, rel=0.05)
    late = teacher.clone()
    late[:, :, 4:] = third[:, :, 4:]
    late[:, :, 0] = 0
    assert gap(late, teacher, other)[0] == pytest.approx(2 / 5, rel=0.1)  # two of the frames 1..


def quality_scores(video: torch.Tensor) -> dict[str, tuple[float, float]]:
    """What a card with absolute measures gives for a set."""
    clips, networks = [Clip(video=one, fps=Fraction(4)) for one in video], Networks()
    metrics = (MotionEnergy(relative=False), Sharpness(relative=False), Quality(window_seconds=Fraction(9)))
    found = {}
    for metric in metrics:
        found |= set_scores(metric, [clip_features(metric, clip, clip, networks) for clip in clips], None)
    return {name: score[:2] for name, score in found.items()}


def test_scores_of_a_set_are_means_with_errors():
    video = torch.cat((grey([100.0, 110] * 4), grey([100.0, 102] * 4), grey([0.0] * 8)))
    scores = quality_scores(video)
    assert scores["motion_energy"] == (
        pytest.approx(4),
        pytest.approx(float(torch.tensor([10.0, 2, 0]).std()) / 3**0.5),
    )
    assert scores["flicker"][0] == pytest.approx(2)
    assert scores["black"][0] == scores["frozen"][0] == pytest.approx(1 / 3)
    assert scores["flash"][0] == scores["sharpness"][0] == scores["saturation"][0] == 0
    order = quality_scores(video[[2, 0, 1]])
    assert {name: x[0] for name, x in order.items()} == pytest.approx({name: x[0] for name, x in scores.items()})


@pytest.mark.parametrize("video", [torch.zeros(1, 3, 4, 8, 8), torch.zeros(1, 3, 1, 8, 8, dtype=torch.uint8)])
@pytest.mark.usefixtures("unchecked_shapes")
def test_other_videos_are_refused(video):
    with pytest.raises(UserError, match="quality needs uint8 clips"):
        measure(video)


def test_short_films_are_refused():
    film = grey([1.0, 2, 3])
    with pytest.raises(UserError, match="at least 3 frames"):
        flickers(measure(film[:, :, :2]))
