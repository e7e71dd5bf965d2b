"""Audio-visual sync score of mouth motion and voice, without weights or training.

Articulators in motion change the sound: a mouth that moves goes with a voice that is loud and changes its spectrum, and both do so
at 2 to 7 Hz (Chandrasekaran et al., PLoS Comput. Biol. 2009). But the head moves more than the lips do. So the face is tracked by
its upper half first (brow to nose, which speech leaves alone; Lucas and Kanade 1981), and the mouth is sampled where the face
then has it: what still changes there is the mouth's own motion.
"""

import math
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from eval.mfcc import mfcc
from teachers.media.crop import Box
from teachers.media.sound import SAMPLE_RATE

STILL = (0.05, 0.08, 0.95, 0.66)  # left, top, right, bottom of the part that is tracked, in units of the face's box
MOUTH = (0.15, 0.62, 0.85, 1.10)  # and of the mouth with the jaw's way down
POINTS, MOUTH_POINTS = 24, 20  # a side of their grids
REACH, NUM_STEPS, LEASH = 0.2, 13, 1.0  # widths that a head may jump between frames, tried places a side, their price
ITERATIONS, ENOUGH = 12, 0.02  # of Gauss and Newton; pixels that do not matter
OUTLIER = 12.0  # levels by which a point may differ before it counts half (Cauchy's weight)
RENEWED, LOST = 0.08, 0.6  # weight of a frame in the tracked pattern; correlation below which it has none
FAINTEST = 0.02  # change of a mouth that counts as none, in standard deviations of its image
CEPSTRA = 8  # coefficients of the sound, its log energy the first
SLOWEST_HZ, FASTEST_HZ = 0.5, 8.0  # of what is compared
LOUDNESS, FAINT = 3000.0, 10.0  # root mean square of the sound and of the noise that fills its silence, in int16 units
SILENT = 1e-3  # root mean square below which a sound is silence, -60 dBFS
EARLY_SECONDS, LATE_SECONDS = 0.125, 0.045  # by which the video may lead and lag its sound unnoticed (ITU-R BT.1359)
FAR_SECONDS = 0.6  # largest delay that is tried, either way
SHORTEST_SECONDS = 2


def follow(frames: UInt8[Tensor, "t h w"], box: Box) -> Float[Tensor, "t 4"]:
    """Where the face is in each frame: shift (x, y) in pixels, stretch and turn (a, b) of the similarity
    (1 + a, -b; b, 1 + a) about the middle of `box`, which is the face in the first frame or near it.

    Each frame is compared with a slowly renewed mean of the former ones: first shifts alone, then Gauss and Newton's steps for
    all four together with gain and offset of the light, points that do not fit weighing less.
    """
    points, coarse = (_grid(STILL, num, box, frames) for num in (POINTS, POINTS // 2))
    width = float(box.width * frames.shape[2])
    steps = torch.linspace(-REACH, REACH, NUM_STEPS) * width
    jumps = torch.cartesian_prod(steps, steps)
    price = LEASH * jumps.square().sum(1) / width**2
    pose, poses = torch.zeros(4), []
    fine_pattern = coarse_pattern = None
    for frame in frames:
        light = F.avg_pool2d(F.pad(frame[None].float(), (1, 1, 1, 1), mode="replicate"), 3, 1)
        down, across = torch.gradient(light[0])
        maps, soft = torch.cat([light, across[None], down[None]]), F.avg_pool2d(light, 3, 1, 1)
        if fine_pattern is None or coarse_pattern is None:
            fine_pattern, coarse_pattern = _read(light, points, pose)[0], _read(soft, coarse, pose)[0]
        tried = torch.cat([pose[:2] + jumps, pose[2:].expand(len(jumps), 2)], 1)
        best = (_likeness(_read(soft, coarse, tried)[0], coarse_pattern) - price).argmax()
        pose = _aligned(maps, points, fine_pattern, tried[best] * torch.tensor([1.0, 1.0, 0.97, 0.97]), width)
        seen = _read(light, points, pose)[0]
        if _likeness(seen, fine_pattern) > LOST:
            fine_pattern = fine_pattern.lerp(seen, RENEWED)
            coarse_pattern = coarse_pattern.lerp(_read(soft, coarse, pose)[0], RENEWED)
        poses.append(pose)
    return torch.stack(poses)


def _aligned(maps: Tensor, points: Tensor, pattern: Tensor, pose: Tensor, width: float) -> Tensor:
    """The pose [4] near `pose` in which the points [n, 2] of light and its slopes [3, h, w] fit the pattern [n] best."""
    x, y = (points[:, :2] - points[:, 2:]).unbind(1)
    for _ in range(ITERATIONS):
        light, across, down = _read(maps, points, pose)
        slopes = torch.stack([across, down, across * x + down * y, down * x - across * y, light, torch.ones_like(x)], 1)
        wrong = pattern - light
        weighted = slopes * (1 / (1 + (wrong / OUTLIER) ** 2))[:, None]
        system = weighted.T @ slopes
        step = torch.linalg.solve(system + 1e-3 * system.diag().diag() + 1e-6 * torch.eye(6), weighted.T @ wrong)
        pose = pose + step[:4]
        if float(step[:2].abs().sum() + width * step[2:4].abs().sum()) < ENOUGH:
            break
    return pose


def _grid(part: tuple[float, float, float, float], num: int, box: Box, frames: Tensor) -> Tensor:
    """num * num points (x, y) in pixels over a part of the face, each with the middle of the face behind it: [num * num, 4]."""
    size = torch.tensor([float(box.width) * frames.shape[2], float(box.height) * frames.shape[1]])
    corner = torch.tensor([float(box.x) * frames.shape[2], float(box.y) * frames.shape[1]])
    sides = [torch.linspace(part[i], part[i + 2], num) for i in (0, 1)]
    down, across = torch.meshgrid(sides[1], sides[0], indexing="ij")
    places = corner + torch.stack([across, down], -1).flatten(0, 1) * size
    return torch.cat([places, (corner + size / 2).expand_as(places)], 1)


def _read(maps: Tensor, points: Tensor, poses: Tensor) -> Tensor:
    """Maps [c, h, w] at points [n, 4] moved by a pose [4] or by each of [m, 4]: [c, n] or [c, m, n]."""
    x, y = (points[:, :2] - points[:, 2:]).unbind(1)
    dx, dy, a, b = poses[..., None, :].unbind(-1)
    moved = torch.stack([points[:, 2] + dx + (1 + a) * x - b * y, points[:, 3] + dy + b * x + (1 + a) * y], -1)
    size = torch.tensor([maps.shape[2] - 1, maps.shape[1] - 1])
    places = (2 * moved / size - 1).reshape(1, -1, len(points), 2)
    read = F.grid_sample(maps[None], places, mode="bilinear", padding_mode="border", align_corners=True)[0]
    return read if poses.ndim > 1 else read[:, 0]


def _likeness(seen: Tensor, pattern: Tensor) -> Tensor:
    """Correlation of readings [..., n] with a pattern [n]."""
    a, b = seen - seen.mean(-1, keepdim=True), pattern - pattern.mean()
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum() + 1e-6).sqrt()


def mouth_motion(frames: UInt8[Tensor, "t h w"], box: Box) -> np.ndarray:
    """Log mean change of the mouth around each frame, [T]: between its neighbours and it, where the face has the mouth.

    Its 20 x 20 samples are normalised to mean 0 and deviation 1, so that light does not matter.
    """
    points = _grid(MOUTH, MOUTH_POINTS, box, frames)
    poses = follow(frames, box)
    seen = torch.stack([_read(frame[None].float(), points, pose)[0] for frame, pose in zip(frames, poses, strict=True)])
    seen = (seen - seen.mean(1, keepdim=True)) / (seen.std(1, keepdim=True) + 1)
    change = F.pad(seen.diff(dim=0).abs().mean(1)[None], (1, 1), mode="replicate")[0]
    return (change.unfold(0, 2, 1).mean(1) + FAINTEST).log().double().numpy()


def cepstra(sound: np.ndarray, num_frames: int, fps: Fraction) -> np.ndarray:
    """The mean cepstra under each frame, [num_frames, 8], of sound [S] at 16 kHz whose silence is filled with faint noise."""
    level = math.sqrt(float(np.square(sound, dtype=np.float64).mean())) + 1e-9
    noise = FAINT * np.random.default_rng(0).standard_normal(len(sound))
    rows = mfcc(torch.from_numpy(sound * (LOUDNESS / level) + noise))[:, :CEPSTRA].numpy()
    frame = ((np.arange(len(rows)) * 0.010 + 0.0125) * float(fps)).astype(int)
    inside = frame < num_frames
    total = np.zeros((num_frames, CEPSTRA))
    np.add.at(total, frame[inside], rows[inside])
    return total / np.maximum(1, np.bincount(frame[inside], minlength=num_frames))[:, None]


def speech_band(rows: np.ndarray, fps: Fraction) -> np.ndarray:
    """Rows [T, n] between 0.5 and 8 Hz: less a Gaussian mean of many frames, and that of few (6 dB at these frequencies)."""
    for hertz, keep in ((FASTEST_HZ, True), (SLOWEST_HZ, False)):
        spread = math.sqrt(2 * math.log(2)) / (2 * math.pi) * float(fps) / hertz
        reach = min(math.ceil(4 * spread), len(rows) - 1)
        bell = np.exp(-0.5 * (np.arange(-reach, reach + 1) / spread) ** 2)
        padded = np.pad(rows, ((reach, reach), (0, 0)), mode="reflect")
        smooth = np.lib.stride_tricks.sliding_window_view(padded, len(bell), axis=0) @ (bell / bell.sum())
        rows = smooth if keep else rows - smooth
    return rows


def voice_motion(sound: np.ndarray, num_frames: int, fps: Fraction) -> np.ndarray:
    """How loud the voice is and how fast its spectrum changes under each frame, [num_frames], both counting alike."""
    rows = cepstra(sound, num_frames, fps)
    change = np.linalg.norm(np.gradient(rows, axis=0), axis=1)
    parts = speech_band(np.stack([rows[:, 0], change], 1), fps)
    return (parts / (parts.std(0) + 1e-9)).sum(1)


def sync(motion: np.ndarray, sound: np.ndarray, fps: Fraction) -> tuple[float | None, float | None]:
    """How well the mouth's motion [T] goes with the sound [S] under it, -1 to 1, and the delay of the best match, in ms.

    The correlation of both between 0.5 and 8 Hz, for every delay up to 0.6 s. The score is the largest among
    unnoticeable delays; the delay is the best of all, positive when the video lags the sound (SyncNet's sign). It is a
    proxy: chance reaches 0.2 to 0.3 in 5 s, so short clips are not decided by it. None under 2 s; 0 for silence.
    """
    num = min(len(motion), int(len(sound) * fps / SAMPLE_RATE))
    far = round(FAR_SECONDS * fps)
    if num < SHORTEST_SECONDS * fps:
        return None, None
    if math.sqrt(float(np.square(sound, dtype=np.float64).mean())) < SILENT:
        return 0.0, None
    mouth, voice = speech_band(motion[:num, None], fps)[:, 0], voice_motion(sound, num, fps)
    curve = {
        lag: _correlation(mouth[max(lag, 0) : num + min(lag, 0)], voice[max(-lag, 0) : num - max(lag, 0)])
        for lag in range(-far, far + 1)
    }
    best = max(sorted(curve, key=abs), key=lambda lag: curve[lag])
    near = range(-round(EARLY_SECONDS * fps), round(LATE_SECONDS * fps) + 1)
    return max(curve[lag] for lag in near), 1000 * float(best / fps)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 1e-9 else 0.0
