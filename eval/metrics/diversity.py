"""Do clips of one condition differ from noise to noise as much as real ones do?"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.metric import Clip, Features, Metric, Score, stacked
from eval.metrics.motion import Spread, diversity, spread_over_noise


@dataclass(frozen=True, kw_only=True)
class Diversity(Metric):
    """`eval.metrics.motion.diversity`. Its spread is that between the first and the second half of the noises."""

    name, label, better, table, plot = "diversity", "diversity", 1.0, "Motion", True
    needs, over, against, admitted_with = ("probes", "noises"), "noises", "real", "fid"

    def features(self, clip: Clip, real: Clip, networks) -> dict[str, Tensor]:
        labels = {f"label {name}": values for name, values in networks.reading(clip).labels.items()}
        return {"video": clip.video, "condition": torch.tensor(clip.condition), **labels}

    def score(self, features: Sequence[Features], reference: Sequence[Features] | None) -> dict[str, Score]:
        if reference is None:
            return {}
        ours, own = Noises(features), Noises(reference).spread()
        value = diversity(ours.spread(), own)
        halves = [value["diversity"]]
        if ours.num >= 4:
            middle = ours.num // 2
            halves = [diversity(ours.spread(row), own)["diversity"] for row in (slice(0, middle), slice(middle, None))]
        parts = {name: x for name, x in value.items() if name not in ("diversity", "error")}
        return {"diversity": Score(value["diversity"], value["error"], seeds=halves, parts=parts)}


class Noises:
    """Clips of C conditions, K noises each, in order of the conditions."""

    def __init__(self, features: Sequence[Features]):
        conditions = [int(clip["condition"]) for clip in features]
        self.num = conditions.count(conditions[0])
        self.video = stacked(features, "video").unflatten(0, (-1, self.num))
        names = [name for name in features[0] if name.startswith("label ")]
        self.labels = {
            name.removeprefix("label "): stacked(features, name).unflatten(0, (-1, self.num)) for name in names
        }

    def spread(self, rows: slice = slice(None)) -> Spread:
        """Variance over the noises `rows`."""
        return spread_over_noise(self.video[:, rows], {name: x[:, rows] for name, x in self.labels.items()})
