"""A metric of one's own: does the border of the frame, which is background, stay what it was in the reference frame?"""

from dataclasses import dataclass

import torch

from eval.metric import Metric, Score


@dataclass(frozen=True, kw_only=True)
class Border(Metric):
    """Mean absolute difference, in grey levels, of the outermost `width` pixels from those of the real clip's first frame."""

    width: int

    name, label, better, hint, table = "border", "border", "lower", "grey levels", "Drift"

    def features(self, clip, real, networks):
        change = (clip.video[:, 1:].float() - real.video[:, :1].float()).abs()
        border = torch.ones(change.shape[2:], dtype=torch.bool)
        border[self.width : -self.width, self.width : -self.width] = False
        return {"change": change[:, :, border].mean((0, 2))}  # [T - 1]

    def score(self, features, reference):
        return {"border": Score.over([clip["change"].mean() for clip in features])}
