"""Sync-C, Sync-D and offset: the arithmetic by plain loops, the clock by a clip whose pictures and sound carry one code."""

import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eval.metric import Clip
from eval.metrics.lip_sync import (
    LipSync,
    SyncNetSync,
    from_curve,
    lag_distances,
    resample_frames,
    summarise,
    sync_scores,
)
from eval.mfcc import to_int16
from eval.networks.syncnet import SyncNet
from teachers.errors import UserError
from tests.support.tiny import randn, rng

FPS = Fraction(25)


def by_loops(lip: np.ndarray, audio: np.ndarray, max_lag: int) -> np.ndarray:
    rows = []
    for v in range(len(lip)):
        row = []
        for lag in range(-max_lag, max_lag + 1):
            from_audio = audio[v + lag] if 0 <= v + lag < len(audio) else np.zeros(lip.shape[1])
            row.append(math.sqrt(sum((x - y + 1e-6) ** 2 for x, y in zip(lip[v], from_audio, strict=True))))
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("max_lag", [1, 3, 9])
def test_distances_are_those_of_the_definition_with_zeros_at_the_ends(max_lag: int):
    lip, audio = randn(7, 4).double(), randn(7, 4, seed=1).double()
    expected = by_loops(lip.numpy(), audio.numpy(), max_lag)
    np.testing.assert_allclose(lag_distances(lip, audio, max_lag).numpy(), expected, rtol=1e-12)
    mean = expected.mean(0)
    result = sync_scores(lip, audio, max_lag)
    assert result.sync_d == pytest.approx(mean.min(), rel=1e-12)
    assert result.sync_c == pytest.approx(sorted(mean)[max_lag] - mean.min(), rel=1e-12)  # the middle of 2 max_lag + 1
    assert result.offset_frames == max_lag - int(mean.argmin())
    assert result.distance_at_zero == pytest.approx(mean[max_lag], rel=1e-12)


@pytest.mark.parametrize("delay", [-15, -4, 0, 1, 15])
def test_a_known_shift_has_its_sign_and_the_bias_of_the_zeros(delay: int):
    """Sound late by k: lips match the sound k windows on, offset -k; k of V windows are compared with nothing there."""
    base, num = randn(100, 16).double(), 60
    lip, audio = base[20 : 20 + num], base[20 - delay : 20 - delay + num]
    result = sync_scores(lip, audio)
    assert len(result.curve) == 31
    assert result.offset_frames == -delay
    lost = lip[num - delay :] if delay > 0 else lip[:-delay]
    expected = (lost.norm(dim=1).sum() + (num - abs(delay)) * 1e-6 * 4) / num
    assert result.sync_d == pytest.approx(float(expected), rel=1e-5)
    assert (result.distance_at_zero > 3) == (delay != 0)


def test_a_shift_beyond_the_largest_lag_is_not_found():
    base = randn(120, 16)
    found, missed = (sync_scores(base[30:90], base[30 - k : 90 - k]).sync_c for k in (15, 16))
    assert found > 4 * missed


class Code:
    """Towers that read one number a frame: the brightness of the face, the log energy of 4 rows of cepstra."""

    def __init__(self):
        self.num_windows = []

    def features(self, faces, mfcc, num_windows):
        self.num_windows.append(num_windows)
        seen = faces.mean((1, 2, 3), dtype=torch.float64)
        from_audio = mfcc[: len(mfcc) // 4 * 4, 0].reshape(-1, 4).mean(1)
        seen, from_audio = ((x - x.mean()) / x.std() for x in (seen, from_audio))
        return seen.unfold(0, 5, 1)[:num_windows], from_audio.unfold(0, 5, 1)[:num_windows]


def coded(delay: int = 0, num: int = 80, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Grey pictures uint8 [T, 3, 24, 24] and int16 sound that is late by `delay` frames."""
    code = torch.rand(num + 40, generator=rng(seed)).double()
    grey = (40 + 180 * code[20 : 20 + num]).round().to(torch.uint8)
    loud = (0.01 * torch.exp(4 * code[20 - delay : 20 - delay + num])).repeat_interleave(640)
    tone = torch.sin(2 * math.pi * 440 / 16000 * torch.arange(num * 640).double())
    return grey[:, None, None, None].expand(-1, 3, 24, 24), to_int16(tone * loud)


BOX = torch.tensor([6.0, 6.0, 18.0, 18.0])


def score_clip(network, frames, fps, box, samples, max_lag: int = 15) -> LipSync:
    """Scores of one clip, as the metric makes them of its features."""
    metric = SyncNetSync(resample="duplicate", max_lag=max_lag, crop_scale=0.4, sound="own")
    sound = samples if samples.is_floating_point() else samples / 32768
    clip = Clip(video=frames.transpose(0, 1), fps=fps, sound=sound, box=box, has_box=True)
    features = metric.features(clip, clip, SimpleNamespace(syncnet=network))
    return from_curve(features["curve"], max_lag)


@pytest.mark.parametrize("delay", [-8, -3, 0, 3, 8])
def test_four_rows_of_cepstra_meet_one_frame(delay: int):
    frames, samples = coded(delay)
    result = score_clip(Code(), frames, FPS, BOX, samples)
    assert result.offset_frames == -delay
    assert result.sync_c > 1.0
    assert (result.distance_at_zero > result.sync_d + 1.0) == (delay != 0)


def test_in_sync_beats_another_sound_and_a_still_face():
    frames, samples = coded()
    scores = {
        "own": score_clip(Code(), frames, FPS, BOX, samples),
        "other": score_clip(Code(), frames, FPS, BOX, coded(seed=9)[1]),
    }
    assert scores["own"].sync_c > 4 * scores["other"].sync_c
    assert scores["own"].sync_d < 0.6 * scores["other"].sync_d


def test_sound_in_floats_and_trailing_pictures_or_sound_change_nothing():
    frames, samples = coded()
    plain = score_clip(Code(), frames, FPS, BOX, samples)
    assert score_clip(Code(), frames, FPS, BOX, samples.double() / 32768) == plain
    code = Code()
    score_clip(code, torch.cat((frames, frames[:9])), FPS, BOX, samples)
    score_clip(code, frames, FPS, BOX, samples[: 60 * 640 + 639])
    assert code.num_windows == [75, 55]  # min(frames, floor(samples / 640)) - 5


def test_the_box_decides_what_is_seen():
    frames, samples = coded()
    wide = torch.cat((frames, frames.flip(0)), dim=3)  # the right half runs backwards
    left, right = (score_clip(Code(), wide, FPS, torch.tensor([x, 8.0, x + 8, 16.0]), samples) for x in (4.0, 36.0))
    assert left.sync_c > 2 * right.sync_c


def test_the_published_towers_fit():
    """Random weights, 8 frames: 3 windows of 1024 numbers; the score is that of the features."""
    torch.manual_seed(0)
    network = SyncNet()
    frames = (randn(8, 3, 60, 60) * 40 + 120).clamp(0, 255).to(torch.uint8)
    samples = to_int16(0.3 * randn(8 * 640, seed=2))
    result = score_clip(network, frames, FPS, torch.tensor([15.0, 15.0, 45.0, 45.0]), samples, max_lag=2)
    assert len(result.curve) == 5
    assert min(result.curve) > 0


def test_16_frames_a_second_become_25():
    frames = torch.arange(16, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2) * 10
    shown = {how: resample_frames(frames, Fraction(16), how)[:, 0, 0, 0] for how in ("duplicate", "nearest", "blend")}
    assert all(len(x) == 25 for x in shown.values())
    assert int((shown["duplicate"].diff() == 0).sum()) == 9
    assert shown["duplicate"][:6].tolist() == [0, 0, 10, 10, 20, 30]
    assert shown["nearest"][:6].tolist() == [0, 10, 10, 20, 30, 30]
    assert shown["blend"][:6].tolist() == [0, 6, 13, 19, 26, 32]  # 10 * 16 / 25 n, rounded
    assert resample_frames(frames, FPS, "blend") is frames
    assert len(resample_frames(frames, Fraction(50), "duplicate")) == 8
    film = torch.zeros(81, 3, 1, 1, dtype=torch.uint8)
    assert len(resample_frames(film, Fraction(16), "nearest")) == 126
    assert len(resample_frames(film, Fraction(25, 2), "duplicate")) == 162


def scored(sync_c: float, offset: int = 0) -> LipSync:
    return LipSync(sync_c, 14 - sync_c, offset, 14.0, (0.0,) * 31)


def test_clips_without_a_face_are_reported_and_penalised():
    clips = [scored(6.0), None, scored(4.0, 1), scored(5.0, -4), None]
    table = summarise(clips)
    assert table["sync_c"] == (5.0, pytest.approx(1 / 3**0.5))  # the jackknife error of a mean
    assert table["sync_d"][0] == 9.0
    assert table["detection_rate"][0] == pytest.approx(0.6)
    assert table["sync_c_penalised"][0] == pytest.approx(3.0)
    assert table["in_sync_rate"][0] == pytest.approx(2 / 3)
    assert table["offset_frames"][0] == pytest.approx(-1)
    again = summarise([clips[i] for i in (4, 2, 0, 1, 3)])
    assert {name: x[0] for name, x in again.items()} == pytest.approx({name: x[0] for name, x in table.items()})
    with pytest.raises(UserError, match=r"^no face was found in any of 2 clips; give their boxes in the manifest$"):
        summarise([None, None])


@pytest.mark.usefixtures("unchecked_shapes")
def test_what_cannot_be_scored_is_refused():
    frames, samples = coded()
    cases = {
        "at least 6 frames": lambda: score_clip(Code(), frames[:5], FPS, BOX, samples),
        "one lip and one audio feature": lambda: lag_distances(torch.zeros(3, 2), torch.zeros(4, 2)),
        "not finite": lambda: sync_scores(torch.full((3, 2), float("nan")), torch.zeros(3, 2)),
        "does not fit a frame": lambda: score_clip(Code(), frames, FPS, BOX + 90, samples),
    }
    for words, call in cases.items():
        with pytest.raises(UserError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("fps", "how"), [(FPS, "duplicate"), (Fraction(16), "blend")])
def test_the_scores_that_have_a_gradient_are_the_scores(fps, how):
    """Random weights; to the rounding of crops and blended frames to integers. Steps uphill raise the score itself."""
    torch.manual_seed(0)
    network, metric = SyncNet(), SyncNetSync(resample=how, max_lag=3, crop_scale=0.4, sound="own")
    networks, num = SimpleNamespace(syncnet=network), 14
    video = (randn(3, num, 60, 60) * 40 + 120).clamp(0, 255).to(torch.uint8)
    sound = 0.3 * randn(int(num / fps * 16000), seed=2)
    clip = Clip(video=video, fps=fps, sound=sound, box=torch.tensor([15.0, 15.0, 45.0, 45.0]), has_box=True)
    found = metric.of_clip(metric.features(clip, clip, networks), None)
    leaf = (video.float() / 127.5 - 1).requires_grad_()
    with torch.enable_grad():
        ours = metric.differentiable(leaf, clip, networks)
        (slope,) = torch.autograd.grad(ours["distance_at_zero"], leaf)
    for name, value in ours.items():
        assert float(value) == pytest.approx(found[name], rel=2e-2, abs=2e-4), name
    assert slope.isfinite().all()
    nearer = leaf.detach() - slope / slope.norm()
    assert float(metric.differentiable(nearer, clip, networks)["distance_at_zero"]) < float(ours["distance_at_zero"])


def test_a_clip_without_a_face_has_no_gradient():
    metric = SyncNetSync(resample="duplicate", max_lag=3, crop_scale=0.4, sound="own")
    clip = Clip(video=torch.zeros(3, 8, 60, 60, dtype=torch.uint8), fps=FPS, sound=torch.zeros(8 * 640), has_box=True)
    with pytest.raises(UserError, match="no face box"):
        metric.differentiable(torch.zeros(3, 8, 60, 60), clip, SimpleNamespace())
