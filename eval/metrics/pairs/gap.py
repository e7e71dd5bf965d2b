"""How far is a student from its teacher on the same noise?"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import UInt8
from torch import Tensor

from eval.metric import Clip, Features, Metric, Score, stacked
from eval.metrics.motion import ratio_with_error


@dataclass(frozen=True, kw_only=True)
class Gap(Metric):
    """E|student - teacher|^2 / E|other - teacher|^2 over frames 1.., with its jackknife error: the teacher under the same condition
    and noise, `other` the teacher from another noise. 0 repeats the teacher, 1 is as far as another draw."""

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
