"""What a video shows without any network: failures, flicker, saturation, drift in windows.

Videos are uint8 [N, 3, T, H, W]. Motion energy and sharpness are those of `eval.metrics.motion`. None of these numbers is a quality
by itself: each is read beside the ground truth's.
"""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from eval.metric import Clip, Column, Features, Metric, Score
from eval.metrics.motion import motion_energies, sharpness_energies
from teachers.errors import UserError

LUMA = (0.2126, 0.7152, 0.0722)  # BT.709
DARK_PIXEL, BLACK_SHARE = 0.10 * 255, 0.98  # ffmpeg's blackdetect
FROZEN = 0.001 * 255  # ffmpeg's freezedetect: -60 dB
FLASH = 0.10 * 255  # change of luma that counts as a flash in ITU-R BT.1702 and WCAG
CELLS = 4  # a side


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windowed(Metric):
    """Shared by metrics with a drift: a slope over windows of `window_seconds`."""

    window_seconds: Fraction

    def __post_init__(self):
        if self.window_seconds <= 0:
            raise ValueError(f"window_seconds must be above 0: got {self.window_seconds}; 1 is usual")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality(Windowed):
    """`flickers`, saturation, `failure_rates`, and the drift of the mean colour over windows of `window_seconds`."""

    name, table = "quality", "Measures without a network"

    @property
    def columns(self) -> dict[str, Column]:
        shown = {name: self.column(name, None, "as the truth") for name in ("flicker", "saturation")}
        shown["black"] = self.column("black", "lower", "share of frames")
        shown |= {name: self.column(name, "lower", "share of steps") for name in ("frozen", "flash")}
        return shown | {"colour_slope": self.column("colour drift", 0.0, "levels a second, 0 is none", table="Drift")}

    def features(self, clip: Clip, real: Clip, networks) -> dict[str, Tensor]:
        frames = frames_of(clip, networks)
        values = {"flicker": flickers(frames), "saturation": frames.saturation.mean(1), **failure_rates(frames)}
        found = {name: value[0] for name, value in values.items()}
        if length := clip.window(self.window_seconds):
            found["colour_slope"] = slope_a_second(window_colour(frames, length)[0], length, clip.fps)
        return found

    def score(self, features: Sequence[Features], reference: Sequence[Features] | None) -> dict[str, Score]:
        names = [name for name in self.columns if all(name in clip for clip in features)]
        return {name: Score.over([clip[name] for clip in features]) for name in names}


@dataclasses.dataclass(frozen=True)
class Frames:
    """What is kept of every frame, in 0..255; float64 on the CPU."""

    colour: Tensor  # [N, 3, T] means
    saturation: Tensor  # [N, T] mean of largest less smallest channel
    dark: Tensor  # [N, T] share of pixels with a luma below 10 percent
    cells: Tensor  # [N, CELLS^2, T] mean luma of parts of the frame
    change: Tensor  # [N, T - 1] mean |x_t - x_(t-1)|

    @property
    def luma(self) -> Tensor:
        """[N, T]"""
        return torch.einsum("c,nct->nt", self.colour.new_tensor(LUMA), self.colour)


def frames_of(clip: Clip, networks) -> Frames:
    """`measure` of one clip, made once."""
    return networks.once(clip, "frames", lambda: measure(clip.video[None]))


def measure(video: UInt8[Tensor, "n 3 t h w"], frames_at_once: int = 32) -> Frames:
    """One pass over the pixels, a few frames of one clip at a time, so that videos of any length fit."""
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
    """Mean |l_(t+1) - 2 l_t + l_(t-1)| / 4 over 4 x 4 parts of the frame: the amplitude of light that alternates
    every frame.

    A steady fade counts 0 and slow motion little, where a plain frame difference (VBench's flicker) counts both.
    """
    if frames.cells.shape[2] < 3:
        raise UserError(f"flicker needs clips of at least 3 frames: got {frames.cells.shape[2]}; make longer ones")
    return frames.cells.diff(n=2, dim=2).abs().mean((1, 2)) / 4


def window_means(values: Float[Tensor, "*each t"], length: int) -> Float[Tensor, "*each windows"]:
    """Mean of each whole window of `length` frames."""
    count = values.shape[-1] // length
    return values[..., : count * length].unflatten(-1, (count, length)).mean(-1)


def window_colour(frames: Frames, length: int, start: Float[Tensor, "n 3"] | None = None) -> Float[Tensor, "n windows"]:
    """Distance of each whole window's mean colour from `start`, or from the video's own first frame."""
    means = window_means(frames.colour, length)
    return (means - (frames.colour[:, :, 0] if start is None else start)[:, :, None]).norm(dim=1)


def quality_beside(
    video: UInt8[Tensor, "n 3 t h w"], reference: UInt8[Tensor, "n 3 h w"]
) -> dict[str, Float[Tensor, " n"]]:
    """Scores of each clip beside a reference frame: `colour` is the distance of the mean colour from the frame's, `luma` and
    `saturation` the signed differences from it; `sharpness` and `motion_energy` are in their own units.
    """
    frames, still = measure(video), measure(reference[:, :, None].expand(-1, -1, 2, -1, -1))
    return {
        "colour": window_colour(frames, video.shape[2], still.colour[:, :, 0])[:, 0],
        "luma": frames.luma.mean(-1) - still.luma[:, 0],
        "saturation": frames.saturation.mean(-1) - still.saturation[:, 0],
        "sharpness": sharpness_energies(video).cpu(),
        "motion_energy": motion_energies(video).cpu(),
    }


def slope_a_second(windows: Float[Tensor, " windows"], length: int, fps: Fraction) -> Float[Tensor, ""]:
    """Slope of one clip's windows of `length` frames."""
    return torch.tensor(slope(windows.tolist()) / float(length / fps), dtype=torch.float64)


def slope(values: list[float]) -> float:
    """Least-squares change a window."""
    x = torch.arange(len(values), dtype=torch.float64)
    y = torch.tensor(values, dtype=torch.float64)
    spread = (x - x.mean()).square().sum()
    return float(((x - x.mean()) * (y - y.mean())).sum() / spread) if len(values) > 1 else math.nan
