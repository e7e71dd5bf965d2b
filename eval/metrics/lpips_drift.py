"""Does appearance drift away from the reference frame? LPIPS to it (Zhang et al. 1801.03924), and its slope over the clip."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from eval.metric import Clip, Column, Features, Metric, Score
from eval.metrics.quality import slope_a_second


@dataclass(frozen=True, kw_only=True)
class LpipsDrift(Metric):
    """LPIPS of every frame but the first to the real clip's first frame: its mean, and its slope a second over the means of windows
    of `window_seconds`.

    A clip that moves has a level, which is read beside the ground truth's; the slope of one that stays what it was is 0. Clips of
    fewer than two windows have no slope."""

    window_seconds: Fraction

    name, label, table, needs = "lpips_drift", "LPIPS to the reference", "Drift", ("alexnet",)

    def __post_init__(self):
        if self.window_seconds <= 0:
            raise ValueError(f"window_seconds must be above 0: got {self.window_seconds}; 1 is usual")

    @property
    def columns(self) -> dict[str, Column]:
        slope = self.column("LPIPS drift", 0.0, "a second, 0 is none")
        return {"lpips_drift": self.column(self.label, None, "as the truth"), "lpips_slope": slope}

    def features(self, clip: Clip, real: Clip, networks) -> dict[str, Tensor]:
        later = clip.video[:, 1:]
        distance = networks.alexnet.distance(later, real.video[:, :1].expand_as(later), networks.batch_size).double()
        found = {"distance": distance}
        if length := clip.window(self.window_seconds):
            count = len(distance) // length
            windows = distance[: count * length].unflatten(0, (count, length)).mean(1)
            found["slope"] = slope_a_second(windows[None], length, clip.fps)
        return found

    def score(self, features: Sequence[Features], reference: Sequence[Features] | None) -> dict[str, Score]:
        scores = {"lpips_drift": Score.over([clip["distance"].mean() for clip in features])}
        if all("slope" in clip for clip in features):
            scores["lpips_slope"] = Score.over([clip["slope"] for clip in features])
        return scores
