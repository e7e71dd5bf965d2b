"""Do clips jump where one chunk ends and the next begins?"""

import math
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
    """`seam_jump` of clips that state where their chunks begin; of others, and of clips that stand still in between, no score."""

    name, label, better, table = "seam", "seam", 1.0, "Motion"
    hint = "1 is none"

    def features(self, clip: Clip, real: Clip, networks) -> dict[str, Tensor]:
        frames, num = frames_of(clip, networks), clip.video.shape[1]
        seams = [frame for frame in clip.seams if frame < num]
        if not 0 < len(seams) < num - 1:
            return {}
        at, elsewhere = seam_changes(frames, seams)
        return {"at_seams": at[0], "elsewhere": elsewhere[0]}

    def score(self, features: Sequence[Features], reference: Sequence[Features] | None) -> dict[str, Score]:
        if not all("at_seams" in clip for clip in features):
            return {}
        at, elsewhere = stacked(features, "at_seams"), stacked(features, "elsewhere")
        return {"seam": Score(*ratio_with_error(at, elsewhere))} if bool(elsewhere.any()) else {}


def seam_changes(frames: Frames, first_frames: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean change [N] at chunk borders, and elsewhere. `first_frames` are the pixel frames that begin a chunk; frame 0 is none."""
    steps = frames.change.shape[1]
    if not first_frames or not all(1 <= frame <= steps for frame in first_frames) or len(set(first_frames)) >= steps:
        raise UserError(
            f"seams lie at frames 1..{steps}, not at all of them: got {list(first_frames)}; check the chunk length"
        )
    at = torch.zeros(steps, dtype=torch.bool)
    at[[frame - 1 for frame in first_frames]] = True
    return frames.change[:, at].mean(1), frames.change[:, ~at].mean(1)


def seam_jump(frames: Frames, first_frames: Sequence[int]) -> tuple[float, float]:
    """Mean change at chunk borders over mean change elsewhere, and its jackknife error: 1 is no seam; NaN for clips that stand
    still between their seams. `first_frames` as in `seam_changes`."""
    at, elsewhere = seam_changes(frames, first_frames)
    return ratio_with_error(at, elsewhere) if bool(elsewhere.any()) else (math.nan, math.nan)
