"""What a video shows without any network: failures, flicker, seams, drift in windows, and the gap to the teacher.

Videos are uint8 [N, 3, T, H, W]. Motion energy and sharpness are those of `eval.metrics.motion`, slopes those of
`eval.embedded.drift`. None of these numbers is a quality by itself: each is read beside the ground truth's.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from eval.metrics.frechet import mean_with_error
from eval.metrics.motion import motion_energies, ratio_with_error, sharpness_energies
from teachers.errors import UserError

LUMA = (0.2126, 0.7152, 0.0722)  # BT.709
DARK_PIXEL, BLACK_SHARE = 0.10 * 255, 0.98  # ffmpeg's blackdetect
FROZEN = 0.001 * 255  # ffmpeg's freezedetect: -60 dB
FLASH = 0.10 * 255  # change of luma that counts as a flash in ITU-R BT.1702 and WCAG
CELLS = 4  # a side


@dataclasses.dataclass(frozen=True)
class Frames:
    """What is kept of every frame, in 0..255; float64 on the CPU."""

    colour: Tensor  # [N, 3, T] means
    saturation: Tensor  # [N, T] mean of largest less smallest channel
    dark: Tensor  # [N, T] share of pixels with a luma below 10 percent
    cells: Tensor  # [N, CELLS^2, T] mean luma of parts of the picture
    change: Tensor  # [N, T - 1] mean |x_t - x_(t-1)|

    @property
    def luma(self) -> Tensor:
        """[N, T]"""
        return torch.einsum("c,nct->nt", self.colour.new_tensor(LUMA), self.colour)


def measure(video: UInt8[Tensor, "n 3 t h w"], frames_at_once: int = 32) -> Frames:
    """One pass over the pixels, a few frames of one clip at a time, so that films of any length fit."""
    if video.ndim != 5 or video.shape[1] != 3 or video.dtype != torch.uint8 or video.shape[2] < 2:
        raise UserError(
            f"quality needs uint8 clips [N, 3, T, H, W] of at least 2 frames: got {video.dtype} {tuple(video.shape)}"
        )
    return Frames(
        *(torch.stack(parts) for parts in zip(*(_measure(clip, frames_at_once) for clip in video), strict=True))
    )


def _measure(clip: Tensor, size: int) -> tuple[Tensor, ...]:
    weights = torch.tensor(LUMA, device=clip.device)[:, None, None, None]
    rows = []
    for start in range(0, clip.shape[1], size):
        part = clip[:, start : start + size].float()
        luma = (part * weights).sum(0)
        before = clip[:, max(start - 1, 0) : start + size].float()
        rows.append(
            (
                part.double().mean((2, 3)),
                (part.amax(0) - part.amin(0)).double().mean((1, 2)),
                (luma < DARK_PIXEL).double().mean((1, 2)),
                F.adaptive_avg_pool2d(luma[:, None].double(), CELLS).flatten(1).mT,
                before.diff(dim=1).abs().double().mean((0, 2, 3)),
            )
        )
    return tuple(torch.cat(parts, dim=-1).cpu() for parts in zip(*rows, strict=True))


def failure_rates(frames: Frames) -> dict[str, Float[Tensor, " n"]]:
    """Shares of each clip: `black` frames (98 percent of pixels below 10 percent luma); of its steps, `frozen` (mean
    change below 0.1 percent) and `flash` (mean luma jumps by more than 10 percent).
    """
    return {
        "black": (frames.dark >= BLACK_SHARE).double().mean(1),
        "frozen": (frames.change < FROZEN).double().mean(1),
        "flash": (frames.luma.diff(dim=1).abs() > FLASH).double().mean(1),
    }


def flickers(frames: Frames) -> Float[Tensor, " n"]:
    """Mean |l_(t+1) - 2 l_t + l_(t-1)| / 4 over 4 x 4 parts of the picture: the amplitude of light that alternates
    every frame.

    A steady fade counts 0 and slow motion little, where a plain frame difference (VBench's flicker) counts both.
    """
    if frames.cells.shape[2] < 3:
        raise UserError(f"flicker needs clips of at least 3 frames: got {frames.cells.shape[2]}; make longer ones")
    return frames.cells.diff(n=2, dim=2).abs().mean((1, 2)) / 4


def seam_ratio(frames: Frames, first_frames: Sequence[int]) -> tuple[float, float]:
    """Mean change at chunk borders over mean change elsewhere, and its jackknife error: 1 is no seam.

    `first_frames` are the pixel frames that begin a chunk; frame 0 is none.
    """
    steps = frames.change.shape[1]
    if not first_frames or not all(1 <= frame <= steps for frame in first_frames) or len(set(first_frames)) >= steps:
        raise UserError(
            f"seams lie at frames 1..{steps}, not at all of them: got {list(first_frames)}; check the chunk length"
        )
    at = torch.zeros(steps, dtype=torch.bool)
    at[[frame - 1 for frame in first_frames]] = True
    return ratio_with_error(frames.change[:, at].mean(1), frames.change[:, ~at].mean(1))


def quality_scores(video: UInt8[Tensor, "n 3 t h w"]) -> dict[str, tuple[float, float]]:
    """Name -> (mean over clips, jackknife error): motion_energy, sharpness, flicker, black, frozen, flash, saturation."""
    frames = measure(video)
    values = {
        "motion_energy": frames.change.mean(1),
        "sharpness": sharpness_energies(video).cpu(),
        "flicker": flickers(frames),
        "saturation": frames.saturation.mean(1),
        **failure_rates(frames),
    }
    return {name: mean_with_error(x) for name, x in values.items()}


def window_colour(frames: Frames, length: int, start: Float[Tensor, "n 3"] | None = None) -> Float[Tensor, "n windows"]:
    """Distance of each whole window's mean colour from `start`, or from the film's own first frame."""
    count = frames.colour.shape[2] // length
    means = frames.colour[:, :, : count * length].unflatten(2, (count, length)).mean(3)
    return (means - (frames.colour[:, :, 0] if start is None else start)[:, :, None]).norm(dim=1)


def window_quality(
    video: UInt8[Tensor, "n 3 t h w"], length: int, reference: UInt8[Tensor, "n 3 h w"] | None = None
) -> dict[str, Float[Tensor, "n windows"]]:
    """Scores of each whole window of `length` frames: does a long film stay what it was?

    `colour` is the distance of the mean colour from the reference picture's (the film's own first frame where none is
    given), `luma` and `saturation` the signed differences from it; `sharpness` and `motion_energy` are in their own
    units.
    """
    count = video.shape[2] // length if length > 0 else 0
    if count < 1 or length < 2:
        raise UserError(f"windows of {length} frames: films have {video.shape[2]}; use 2 to {video.shape[2]} frames")
    still = (video[:, :, 0] if reference is None else reference)[:, :, None].expand(-1, -1, 2, -1, -1)
    frames, start = measure(video[:, :, : count * length]), measure(still)

    def windows(values: Tensor) -> Tensor:
        return values.unflatten(-1, (count, length)).mean(-1)

    parts = video[:, :, : count * length].split(length, dim=2)
    return {
        "colour": window_colour(frames, length, start.colour[:, :, 0]),
        "luma": windows(frames.luma) - start.luma[:, :1],
        "saturation": windows(frames.saturation) - start.saturation[:, :1],
        "sharpness": torch.stack([sharpness_energies(part).cpu() for part in parts], dim=1),
        "motion_energy": torch.stack([motion_energies(part).cpu() for part in parts], dim=1),
    }


def window_identity(
    embeddings: Float[Tensor, "n t d"], reference: Float[Tensor, "n d"], length: int
) -> Float[Tensor, "n windows"]:
    """Mean cosine of each whole window's frame embeddings (DINOv2, ArcFace, ...) with the reference picture's."""
    count = embeddings.shape[1] // length if length > 0 else 0
    if count < 1 or len(embeddings) != len(reference):
        got = (tuple(embeddings.shape), tuple(reference.shape))
        raise UserError(
            f"identity in windows of {length} frames needs longer films, each with its reference: got {got}"
        )
    cosine = F.cosine_similarity(embeddings.double(), reference.double()[:, None], dim=2)
    return cosine[:, : count * length].unflatten(1, (count, length)).mean(2)


def slope_with_error(values: Float[Tensor, "n windows"]) -> tuple[float, float]:
    """Mean over films of the least-squares change a window, and its jackknife error over films (NaN for one)."""
    return mean_with_error(torch.tensor([slope(film) for film in values.tolist()], dtype=torch.float64))


def seed_variances(videos: UInt8[Tensor, "c s 3 t h w"]) -> Float[Tensor, " c"]:
    """Unbiased variance over the S noises of each condition, over pixels in [-1, 1] and frames 1..; 0 is a collapse.

    Compare with the teacher's through `eval.metrics.motion.ratio_with_error`.
    """
    if videos.shape[1] < 2:
        raise UserError(f"variance over noise needs at least 2 seeds: got {videos.shape[1]}; draw more")
    return torch.stack([clips[:, :, 1:].float().div(127.5).var(0).double().mean() for clips in videos]).cpu()


def teacher_gap(
    student: UInt8[Tensor, "n 3 t h w"],
    teacher: UInt8[Tensor, "n 3 t h w"],
    other_noise: UInt8[Tensor, "n 3 t h w"],
) -> dict[str, tuple[float, float] | list[float]]:
    """How far the student is from its teacher under the same condition and noise, over frames 1..

    `gap` = E|student - teacher|^2 / E|other_noise - teacher|^2 with its jackknife error, where `other_noise` is the
    teacher from another noise: 0 repeats the teacher, 1 is as far as another draw. `psnr_db` is of the numerator,
    `gap_by_frame` shows where it opens.
    """
    if not student.shape == teacher.shape == other_noise.shape:
        shapes = (tuple(student.shape), tuple(teacher.shape), tuple(other_noise.shape))
        raise UserError(f"a teacher gap needs the same clips from all three: got {shapes}; sample them alike")

    def squares(video: Tensor) -> Tensor:  # [N, T - 1]
        pairs = zip(video[:, :, 1:], teacher[:, :, 1:], strict=True)
        return torch.stack([(a.float() - b.float()).square().double().mean((0, 2, 3)) for a, b in pairs]).cpu()

    own, other = squares(student), squares(other_noise)
    mean = float(own.mean())
    return {
        "gap": ratio_with_error(own.mean(1), other.mean(1)),
        "psnr_db": (10 * math.log10(255**2 / mean) if mean > 0 else math.inf, math.nan),
        "gap_by_frame": (own.mean(0) / other.mean(0).clamp_min(1e-9)).tolist(),
    }


def slope(values: list[float]) -> float:
    """Least-squares change a window."""
    x = torch.arange(len(values), dtype=torch.float64)
    y = torch.tensor(values, dtype=torch.float64)
    spread = (x - x.mean()).square().sum()
    return float(((x - x.mean()) * (y - y.mean())).sum() / spread) if len(values) > 1 else math.nan
