"""The weight-free sync of `curate` as a metric, for rewards and protocol cards: `name: distill.data.curate.metric:MouthMotion`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.data.curate.lips import SHORTEST_SECONDS, mouth_motion, sync
from eval.metric import Clip, Features, Metric, Score
from teachers.errors import UserError
from teachers.media.crop import Box


@dataclass(frozen=True, kw_only=True)
class MouthMotion(Metric):
    """`lips.sync` of the mouth's motion in the video, in the clip's face box, with its own sound. It is a proxy: chance reaches
    0.2 to 0.3 in 5 s."""

    name, label, better, hint = "mouth_motion", "mouth motion", "higher", "-1 to 1"
    needs = ("sound", "box")

    def features(self, clip: Clip, real: Clip, networks) -> dict[str, Tensor]:
        del networks
        height, width = clip.video.shape[-2:]
        if real.box is None:
            raise UserError("no face box: mouth_motion needs one for each clip")
        left, top, right, bottom = (real.box / torch.tensor([width, height, width, height])).tolist()
        box = Box(left, top, right - left, bottom - top, 1.0)
        grey = clip.video.float().mean(0).round().to(torch.uint8)
        score, _ = sync(mouth_motion(grey, box), clip.voice().cpu().numpy(), clip.fps)
        if score is None:
            raise UserError(
                f"mouth_motion needs {SHORTEST_SECONDS} s: got {clip.video.shape[1]} frames; use longer clips"
            )
        return {"mouth_motion": torch.tensor(score, dtype=torch.float64)}

    def score(self, features: Sequence[Features], reference: Sequence[Features] | None) -> dict[str, Score]:
        del reference
        return {"mouth_motion": Score.over([clip["mouth_motion"] for clip in features])}
