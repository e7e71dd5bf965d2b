"""Does a clip show the expression of its condition?"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from eval.metric import Clip, Features, Metric, Score, stacked
from eval.metrics.motion import class_agreement


@dataclass(frozen=True, kw_only=True)
class Expression(Metric):
    """Share of clips whose expression, as a run's frame probe reads it, is that of their condition; it fades in over the
    first third."""

    name, label, better, hint, table = "expression", "expression", "higher", "0 to 1", "Motion"
    needs, admitted_with = ("probes", "expression"), "motion"

    def features(self, clip: Clip, real: Clip, networks) -> dict[str, Tensor]:
        return {"expression": networks.reading(clip).expression, "target": real.labels["expression"]}

    def score(self, features: Sequence[Features], reference: Sequence[Features] | None) -> dict[str, Score]:
        shown = stacked(features, "expression")
        late = shown[:, shown.shape[1] // 3 :].mean(1)
        return {"expression": Score(*class_agreement(late, stacked(features, "target"))[:2])}
