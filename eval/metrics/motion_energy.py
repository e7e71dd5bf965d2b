"""How much a clip moves."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from eval.metric import Clip, Column, Features, Metric, Score, stacked
from eval.metrics.motion import in_parts, motion_energies, ratio_with_error, ratio_without_each


@dataclass(frozen=True, kw_only=True)
class Energy(Metric):
    """Shared by motion energy and sharpness. relative: a ratio to the same clips after the codec (in `distill eval`: to the real
    clips), and not a number of its own."""

    relative: bool

    table = "Motion"

    @property
    def against(self) -> str | None:
        return "ceiling" if self.relative else None

    @property
    def columns(self) -> dict[str, Column]:
        better, hint = (1.0, "") if self.relative else (None, "as the truth")
        return {self.name: self.column(self.label, better, hint, plot=self.relative)}

    def score(self, features: Sequence[Features], reference: Sequence[Features] | None) -> dict[str, Score]:
        if not self.relative:
            return {self.name: Score.over([clip["energy"] for clip in features])}
        if reference is None:
            return {}
        found = ratio_without_each(stacked(features, "energy"), stacked(reference, "energy"))
        return {self.name: Score.without_each(*found)}

    def ratios(self, cases, names: Sequence[str]) -> dict[str, float]:
        """Ratios of known cases to the decoded clips."""
        base = stacked(cases.reference(self), "energy")
        return {name: ratio_with_error(stacked(cases.features(self, name), "energy"), base)[0] for name in names}


@dataclass(frozen=True, kw_only=True)
class MotionEnergy(Energy):
    """Mean |x_t - x_(t-1)|, in 0..255 or as a ratio."""

    name, label = "motion_energy", "motion energy"

    def features(self, clip: Clip, real: Clip, networks) -> dict[str, Tensor]:
        return {"energy": in_parts(motion_energies, clip.video)}

    def admit(self, cases) -> tuple[dict[str, float], bool]:
        """static < 0.1 < real < noisy."""
        values = self.ratios(cases, ("real", "static", "noisy"))
        return values, values["static"] < 0.1 < values["real"] < values["noisy"]
