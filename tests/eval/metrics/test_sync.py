import math

import pytest
import torch

from eval.metrics.sync import correlation, mouth_sync
from teachers.errors import UserError


def speech_like(num: int, frames: int, seed: int = 0) -> torch.Tensor:
    """Open and width [N, T, 2], smooth over about two frames."""
    noise = torch.randn(num, frames + 2, 2, generator=torch.Generator().manual_seed(seed))
    return noise[:, 2:] + noise[:, 1:-1] + 0.5 * noise[:, :-2]


def shift(x: torch.Tensor, lag: int) -> torch.Tensor:
    """The picture lags the sound by `lag` frames."""
    return x.roll(lag, dims=1)


@pytest.mark.parametrize("lag", range(-4, 5))
def test_offset_is_found_and_positive_when_the_picture_lags(lag: int):
    from_audio = speech_like(40, 24)
    result = mouth_sync(shift(from_audio, lag), from_audio)
    assert result["sync_offset_frames"] == lag
    assert result["sync_at_offset"] > 0.8
    assert (result["sync"] > 0.99) == (lag == 0)


def test_in_sync_beats_noisy_beats_swapped():
    from_audio = speech_like(60, 15)
    noisy = from_audio + torch.randn(from_audio.shape, generator=torch.Generator().manual_seed(1))
    scores = [mouth_sync(seen, from_audio)["sync"] for seen in (from_audio, noisy, from_audio.roll(1, 0))]
    assert scores[0] > 0.999
    assert scores[0] > scores[1] > 0.6
    assert abs(scores[2]) < 0.15
    assert mouth_sync(-from_audio, from_audio)["sync"] == pytest.approx(-1)


def test_frame_0_and_the_level_of_each_clip_do_not_count():
    from_audio = speech_like(10, 15)
    seen = from_audio * 0.3 + torch.arange(10.0)[:, None, None]
    seen[:, 0] = 99
    assert mouth_sync(seen, from_audio)["sync"] == pytest.approx(1, abs=1e-5)


def test_still_mouths_score_zero_and_do_not_outweigh_moving_ones():
    from_audio = speech_like(20, 15)
    still = torch.zeros_like(from_audio)
    assert mouth_sync(still, from_audio)["sync"] == 0
    half = torch.cat((from_audio[:10], still[10:] + 1e-6 * speech_like(10, 15, seed=5)))
    assert 0.4 < mouth_sync(half, from_audio)["sync"] < 0.95


def test_error_matches_the_scatter_of_repeated_draws():
    def one(seed: int) -> dict:
        from_audio = speech_like(30, 15, seed)
        noise = torch.randn(from_audio.shape, generator=torch.Generator().manual_seed(1000 + seed))
        return mouth_sync(from_audio + 1.5 * noise, from_audio)

    runs = [one(seed) for seed in range(60)]
    scatter = torch.tensor([run["sync"] for run in runs]).std()
    error = sum(run["error"] for run in runs) / 60
    assert 0.75 < error / float(scatter) < 1.35


def test_one_clip_has_no_error():
    assert math.isnan(mouth_sync(speech_like(1, 30), speech_like(1, 30))["error"])


def test_too_short_or_mismatched_is_refused():
    with pytest.raises(UserError, match="at least 9 frames"):
        mouth_sync(torch.zeros(3, 8, 2), torch.zeros(3, 8, 2))
    with pytest.raises(UserError, match="one audio row"):
        mouth_sync(torch.zeros(3, 15, 2), torch.zeros(3, 14, 2))


def test_correlation_of_a_constant_is_zero():
    assert correlation(torch.ones(5), torch.arange(5.0)) == 0
    assert correlation(torch.arange(5.0), 3 - torch.arange(5.0)) == pytest.approx(-1)
