"""LPIPS to the reference frame, with a stand-in distance whose values are known."""

from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from eval.cards import load_card
from eval.metric import Clip
from eval.metrics.lpips_drift import LpipsDrift
from eval.scores import clip_features, set_scores
from tests.support.tiny import rng

METRIC = LpipsDrift(window_seconds=Fraction(1))


class MeanChange:
    """Distance of two frames: mean absolute difference, in 0..1."""

    @staticmethod
    def distance(a, b, batch_size):
        del batch_size
        return (a.float() - b.float()).abs().mean((0, 2, 3)) / 255


def a_clip(rise: float, seconds: int = 4, fps: int = 10) -> Clip:
    """A still frame that becomes brighter by `rise` levels a second."""
    still = torch.randint(0, 100, (3, 1, 8, 8), generator=rng(3)).float()
    video = still + rise * torch.arange(seconds * fps + 1)[:, None, None] / fps
    return Clip(video=video.round().byte(), fps=Fraction(fps))


def scores(*clips: Clip, metric: LpipsDrift = METRIC) -> dict:
    networks, real = SimpleNamespace(alexnet=MeanChange(), batch_size=8), a_clip(0)
    return set_scores(metric, [clip_features(metric, clip, real, networks) for clip in clips], None)


def test_a_still_clip_has_neither_level_nor_slope_and_a_drifting_one_has_both():
    still = scores(a_clip(0), a_clip(0))
    assert still["lpips_drift"][:2] == still["lpips_slope"][:2] == (0, 0)
    found = scores(a_clip(20), a_clip(30))
    assert found["lpips_slope"].clips == pytest.approx([20 / 255, 30 / 255], rel=1e-3)
    assert found["lpips_slope"].mean == pytest.approx(25 / 255, rel=1e-3)
    assert found["lpips_drift"].clips == pytest.approx([20 * 2.05 / 255, 30 * 2.05 / 255], rel=1e-2)


def test_the_reference_is_the_real_clips_first_frame_and_not_the_clips_own():
    shifted = a_clip(0)
    shifted = Clip(video=shifted.video + 51, fps=shifted.fps)
    found = scores(shifted)
    assert found["lpips_drift"].mean == pytest.approx(0.2)
    assert found["lpips_slope"].mean == 0


def test_clips_of_fewer_than_two_windows_have_a_level_alone():
    assert set(scores(a_clip(20, seconds=1))) == {"lpips_drift"}
    assert set(scores(a_clip(20), metric=LpipsDrift(window_seconds=Fraction(1, 2)))) == {"lpips_drift", "lpips_slope"}


def test_the_cards_that_have_it_show_it_as_drift():
    for name in ("strict", "livetalk", "omniavatar"):
        card = load_card(name)
        assert {card.columns[column].table for column in METRIC.columns} == {"Drift"}
        assert "alexnet" in card.plain()["weights"]


def test_a_window_has_two_frames_and_a_clip_two_windows():
    clip = Clip(video=torch.zeros(3, 9, 4, 4, dtype=torch.uint8), fps=Fraction(25))
    assert [clip.window(Fraction(n, 25)) for n in (1, 2, 4, 5)] == [0, 2, 4, 0]
