"""Does appearance drift away from the reference frame? LPIPS to it (Zhang et al. 1801.03924), and its slope over the clip."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from eval.metric import Clip, Column, Features, Score
from eval.metrics.quality import Windowed, slope_a_second, window_means


@dataclass(frozen=True, kw_only=True)
class LpipsDrift(Windowed):
    """LPIPS of every frame but the first to the real clip's first frame: its mean, and its slope a second over the means of windows
    of `window_seconds`.

    A clip that moves has a level, which is read beside the ground truth's; the slope of one that stays what it was is 0. Clips of
    fewer than two windows have no slope."""

    name, label, table, needs = "lpips_drift", "LPIPS to the reference", "Drift", ("alexnet",)

    @property
    def columns(self) -> dict[str, Column]:
        slope = self.column("LPIPS drift", 0.0, "a second, 0 is none")
        return {"lpips_drift": self.column(self.label, None, "as the truth"), "lpips_slope": slope}

    def features(self, clip: Clip, real: Clip, networks) -> dict[str, Tensor]:
        later = clip.video[:, 1:]
        distance = networks.alexnet.distance(later, real.video[:, :1].expand_as(later), networks.batch_size).double()
        found = {"distance": distance}
        if length := clip.window(self.window_seconds):
            found["slope"] = slope_a_second(window_means(distance, length), length, clip.fps)
        return found

    def score(self, features: Sequence[Features], reference: Sequence[Features] | None) -> dict[str, Score]:
        scores = {"lpips_drift": Score.over([clip["distance"].mean() for clip in features])}
        if all("slope" in clip for clip in features):
            scores["lpips_slope"] = Score.over([clip["slope"] for clip in features])
        return scores
