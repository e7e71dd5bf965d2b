"""Does the face stay the one of the reference frame? Cosine of DINOv2's class tokens (Oquab et al. 2304.07193)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from eval.metric import Clip, Column, Features, Score
from eval.metrics.quality import Windowed, slope_a_second, window_means


@dataclass(frozen=True, kw_only=True)
class DinoIdentity(Windowed):
    """Mean cosine of every frame but the first with the real clip's first frame, and its slope over windows of `window_seconds`."""

    name, label, better, needs = "dino_identity", "identity", 1.0, ("dinov2",)

    @property
    def columns(self) -> dict[str, Column]:
        drift = self.column("identity drift", 0.0, "a second, 0 is none", table="Drift")
        return {"identity": self.column(self.label, self.better), "identity_slope": drift}

    def features(self, clip: Clip, real: Clip, networks) -> dict[str, Tensor]:
        frames = torch.cat((real.video[:, :1], clip.video[:, 1:]), 1).transpose(0, 1)
        rows = networks.dinov2.features(frames, networks.batch_size)
        found = {"cosine": F.cosine_similarity(rows[1:].double(), rows[:1].double())}
        if length := clip.window(self.window_seconds):
            found["slope"] = slope_a_second(window_means(found["cosine"], length), length, clip.fps)
        return found

    def score(self, features: Sequence[Features], reference: Sequence[Features] | None) -> dict[str, Score]:
        found = {"identity": Score.over([clip["cosine"].mean() for clip in features])}
        if all("slope" in clip for clip in features):
            found["identity_slope"] = Score.over([clip["slope"] for clip in features])
        return found
