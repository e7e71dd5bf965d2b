"""Do clips jump where one chunk ends and the next begins?"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.metric import Clip, Features, Metric, Score, stacked
from eval.metrics.motion import ratio_with_error
from eval.metrics.quality import Frames, frames_of
from teachers.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Seam(Metric):
    """`seam_ratio` of clips that state where their chunks begin; of others, and of clips that stand still in between, no score."""

    name, label, better, table = "seam", "seam", 1.0, "Motion"
    hint = "1 is none"

    def features(self, clip: Clip, real: Clip, networks) -> dict[str, Tensor]:
        change = frames_of(clip, networks).change[0]
        steps = [frame - 1 for frame in clip.seams if frame < clip.video.shape[1]]
        at = torch.zeros(len(change), dtype=torch.bool)
        at[steps] = True
        return {"at_seams": change[at].mean(), "elsewhere": change[~at].mean()} if 0 < len(steps) < len(change) else {}

    def score(self, features: Sequence[Features], reference: Sequence[Features] | None) -> dict[str, Score]:
        if not all("at_seams" in clip for clip in features):
            return {}
        at, elsewhere = stacked(features, "at_seams"), stacked(features, "elsewhere")
        return {"seam": Score(*ratio_with_error(at, elsewhere))} if bool(elsewhere.any()) else {}


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


def seam_jump(frames: Frames, first_frames: Sequence[int]) -> tuple[float, float]:
    """`seam_ratio` and its error; NaN for clips that stand still between their seams."""
    inside = [step for step in range(frames.change.shape[1]) if step + 1 not in first_frames]
    if not frames.change[:, inside].any():
        return float("nan"), float("nan")
    return seam_ratio(frames, first_frames)
