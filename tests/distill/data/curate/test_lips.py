"""The mouth is looked at where the face is, and agrees with its own sound better than with another, however the head moves."""

import numpy as np
import pytest
import torch

from distill.data.curate import lips
from distill.data.curate.metric import MouthMotion
from eval.metric import Clip
from teachers.errors import UserError
from teachers.media.crop import Box
from tests.support.media import talking

SECONDS = 4.0
LEFT, TOP, RIGHT, BOTTOM = talking.FACE
FACE = Box(LEFT / 160, TOP / 192, (RIGHT - LEFT) / 160, (BOTTOM - TOP) / 192, confidence=1.0)


def moved(frames: torch.Tensor, across: np.ndarray, down: np.ndarray) -> torch.Tensor:
    """Frames [T, H, W], each shifted by whole pixels."""
    pairs = zip(frames, across, down, strict=True)
    return torch.stack([torch.roll(frame, (int(y), int(x)), (0, 1)) for frame, x, y in pairs])


@pytest.fixture(scope="module")
def sound():
    return talking.speech(SECONDS, seed=3)


@pytest.fixture(scope="module")
def restless(sound):
    """Frames uint8 [T, H, W] of a head that nods and sways by 10 pixels twice a second, and its way [T] across and down."""
    pictures = torch.from_numpy(np.stack(talking.film(sound)))
    time = np.arange(len(pictures)) / float(talking.FPS)
    across, down = (10 * np.sin(2 * np.pi * hertz * time + 1) for hertz in (2.1, 1.7))
    light = (pictures.float() @ torch.tensor([0.299, 0.587, 0.114])).round().byte()
    return moved(light, across.round(), down.round()), across.round(), down.round()


@pytest.fixture(scope="module")
def motion(restless):
    return lips.mouth_motion(restless[0], FACE)


def test_the_face_is_followed_through_fast_shifts_and_turns(restless):
    frames, across, down = restless
    picture = torch.roll(frames[0], (-int(down[0]), -int(across[0])), (0, 1))
    poses = lips.follow(moved(picture.expand(len(frames), -1, -1), across, down), FACE).numpy()
    assert np.abs(poses[:, :2] - poses[0, :2] - np.stack([across - across[0], down - down[0]], 1)).max() < 0.1
    assert np.abs(poses[:, 2:]).max() < 0.01
    jumps = np.array([0, 0, 9, 9, 0, -9, -9, 0])
    leapt = lips.follow(moved(picture.expand(8, -1, -1), jumps, -jumps), FACE).numpy()
    assert np.abs(leapt[:, :2] - np.stack([jumps, -jumps], 1)).max() < 0.1
    angles = np.sin(np.arange(20) / 3) * 0.2
    middle = torch.tensor([FACE.x * 160 + (RIGHT - LEFT) / 2, FACE.y * 192 + (BOTTOM - TOP) / 2])
    turned = torch.stack([_turned(picture, float(angle), middle) for angle in angles])
    assert np.abs(lips.follow(turned, FACE)[:, 3].numpy() - np.tan(angles)).max() < 0.03


def _turned(picture: torch.Tensor, angle: float, middle: torch.Tensor) -> torch.Tensor:
    """A picture [H, W] turned about `middle`, so that what was at middle + p lies at middle + R(angle) p."""
    rows, columns = torch.meshgrid(*(torch.arange(side).float() for side in picture.shape), indexing="ij")
    x, y = columns - middle[0], rows - middle[1]
    cos, sin = np.cos(angle), np.sin(angle)
    grid = torch.stack([middle[0] + cos * x + sin * y, middle[1] - sin * x + cos * y], -1)
    size = torch.tensor([picture.shape[1] - 1.0, picture.shape[0] - 1.0])
    read = torch.nn.functional.grid_sample(picture[None, None].float(), 2 * grid[None] / size - 1, align_corners=True)
    return read[0, 0].round().byte()


def both(motion: np.ndarray, sound: np.ndarray) -> tuple[float, float]:
    """Score and delay in ms, where there are some."""
    value, delay = lips.sync(motion, sound, talking.FPS)
    assert value is not None
    assert delay is not None
    return value, delay


def test_a_moving_head_does_not_hide_the_lips(restless, motion, sound):
    own, delay = both(motion, sound)
    assert own > 0.4
    assert abs(delay) <= 40
    copies = [talking.shifted(sound, seconds) for seconds in (-0.6, -0.36, -0.2, 0.2, 0.36, 0.6)]
    copies += [talking.speech(SECONDS, seed) for seed in (4, 5, 6)]
    assert max(both(motion, copy)[0] for copy in copies) < own - 0.1
    left, right = (round(at * 160) for at in (FACE.x, FACE.x + FACE.width))
    top, bottom = (round(at * 192) for at in (FACE.y + FACE.height / 2, FACE.y + FACE.height))
    fixed = restless[0][:, top:bottom, left:right].float().diff(dim=0).abs().mean((1, 2)).log().numpy()
    assert both(np.append(fixed, fixed[-1]), sound)[0] < own - 0.2


def test_delays_count_as_viewers_notice_them(motion, sound):
    """BT.1359: 125 ms of the sound behind the picture pass, 45 ms before it; the delay tells both."""
    own, _ = both(motion, sound)
    late, early = (both(motion, talking.shifted(sound, seconds)) for seconds in (0.12, -0.12))
    assert late[0] > own - 0.05
    assert early[0] < 0.8 * late[0]
    assert late[1] == pytest.approx(-120, abs=40)
    assert early[1] == pytest.approx(120, abs=40)


def test_how_loud_or_bright_a_clip_is_does_not_matter(restless, motion, sound):
    own, _ = both(motion, sound)
    assert lips.sync(motion, sound * 0.1, talking.FPS)[0] == pytest.approx(own, abs=0.02)
    dim = lips.mouth_motion((restless[0].float() * 0.5).round().byte(), FACE)
    assert lips.sync(dim, sound, talking.FPS)[0] == pytest.approx(own, abs=0.05)


def test_silence_and_short_clips_have_no_score_to_speak_of(motion, sound):
    assert lips.sync(motion, sound * 0, talking.FPS) == (0.0, None)
    assert lips.sync(motion, sound * 1e-3, talking.FPS) == (0.0, None)
    assert lips.sync(motion[:49], sound, talking.FPS) == (None, None)
    assert lips.sync(motion, sound[: 49 * 640], talking.FPS) == (None, None)
    assert lips.sync(motion[:50], sound, talking.FPS)[0] is not None
    frozen = lips.sync(np.zeros(len(motion)), sound, talking.FPS)
    assert frozen[0] == 0


def test_the_score_is_a_metric_of_one_clip(restless, sound, motion):
    """As a reward takes it: in the clip's face box, with its own sound; without a box it is refused."""
    video, waveform = restless[0].expand(3, -1, -1, -1), torch.from_numpy(sound)
    clip = Clip(video=video, fps=talking.FPS, sound=waveform, box=torch.tensor(talking.FACE).float(), has_box=True)
    metric = MouthMotion()
    found = metric.of_clip(metric.features(clip, clip, None), None)
    assert found["mouth_motion"] == pytest.approx(lips.sync(motion, sound, talking.FPS)[0], abs=1e-3)
    with pytest.raises(UserError, match="no face box"):
        metric.features(clip, Clip(video=video, fps=talking.FPS), None)
