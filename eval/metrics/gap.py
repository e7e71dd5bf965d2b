"""How far is a student from its teacher on the same noise?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

from eval.metric import Clip, Features, Metric, Score, stacked
from eval.metrics.motion import ratio_with_error
from teachers.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Gap(Metric):
    """The `gap` of `teacher_gap`; 0 repeats the teacher, 1 is as far as another noise."""

    name, label, better, table = "gap", "gap to the teacher", "lower", "Motion"
    hint = "on the same noise; 1 is another draw"
    needs = ("teacher", "teacher_same_noise")

    def features(self, clip: Clip, real: Clip, networks) -> dict[str, Tensor]:
        own, other = clip.beside["teacher_same_noise"], clip.beside["teacher"]
        return {"own": frame_squares(clip.video, own), "other": frame_squares(other, own)}

    def score(self, features: Sequence[Features], reference: Sequence[Features] | None) -> dict[str, Score]:
        return {"gap": Score(*ratio_with_error(stacked(features, "own").mean(1), stacked(features, "other").mean(1)))}


def frame_squares(video: UInt8[Tensor, "3 t h w"], teacher: UInt8[Tensor, "3 t h w"]) -> Tensor:
    """Mean squared difference [T - 1] of the frames 1.., in 0..255."""
    return (video[:, 1:].float() - teacher[:, 1:].float()).square().double().mean((0, 2, 3)).cpu()


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
        return torch.stack([frame_squares(*pair) for pair in zip(video, teacher, strict=True)])

    own, other = squares(student), squares(other_noise)
    mean = float(own.mean())
    return {
        "gap": ratio_with_error(own.mean(1), other.mean(1)),
        "psnr_db": (10 * math.log10(255**2 / mean) if mean > 0 else math.inf, math.nan),
        "gap_by_frame": (own.mean(0) / other.mean(0).clamp_min(1e-9)).tolist(),
    }
