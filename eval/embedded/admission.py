"""Which metrics that stand on a run's probes are admitted: those that rank known cases right."""

from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from eval.embedded.evaluation import Evaluation
from eval.embedded.extractors import blur
from eval.metric import Features, Metric
from eval.scores import lacking


@torch.inference_mode()
def known_cases(
    real: UInt8[Tensor, "n 3 t h w"], decoded: UInt8[Tensor, "n 3 t h w"], generator: torch.Generator
) -> dict[str, Tensor]:
    """Videos whose order is known; static holds the portrait, frozen holds the middle frame."""
    num, frames = real.shape[0], real.shape[2]
    flat = decoded.float().transpose(1, 2).flatten(0, 1)
    soft = blur(flat).unflatten(0, (num, frames)).transpose(1, 2)
    noise = 24 * torch.randn(decoded.shape, generator=generator)
    order = torch.rand(num, frames - 1, generator=generator).argsort(1) + 1
    order = torch.cat((torch.zeros(num, 1, dtype=torch.long), order), dim=1)
    held = torch.arange(frames).clamp_max(frames // 2)
    return {
        "real": real,
        "decoded": decoded,
        "blurred": soft.round().to(torch.uint8),
        "noisy": (decoded + noise).clamp(0, 255).round().to(torch.uint8),
        "static": decoded[:, :, :1].expand_as(decoded).contiguous(),
        "frozen": decoded[:, :, held],
        "shuffled": decoded.gather(2, order[:, None, :, None, None].expand_as(decoded)),
    }


class Cases:
    """The known cases of an evaluation's clips, as `Metric.admit` asks for them; `names` are those of `known_cases`."""

    def __init__(self, evaluation: Evaluation, generator: torch.Generator):
        self.evaluation = evaluation
        real = torch.stack([clip.video for clip in evaluation.real])
        videos = known_cases(real, evaluation.sets["ceiling"], generator)
        self.clips = {name: evaluation.read(video) for name, video in videos.items()}
        self.names = tuple(videos)

    def features(self, metric: Metric, name: str) -> list[Features]:
        """Features of the clips of one case."""
        return self.evaluation.features(metric, self.clips[name], self.evaluation.real)

    def reference(self, metric: Metric) -> list[Features]:
        """Features of what the metric is against."""
        found = self.evaluation.reference(metric.name, metric)
        assert found is not None
        return found


def admit(evaluation: Evaluation, generator: torch.Generator) -> dict[str, dict[str, Any]]:
    """Which metrics of a card rank known cases right: {"admitted": {name: bool}, "cases": {name: {case: value}}}.

    The clips of the evaluation are held-out ones with labels. Only what the probes have learned, and has labels, is tried; what
    is tried is stated at each `Metric.admit`.
    """
    cases, metrics = Cases(evaluation, generator), evaluation.card.metrics.values()
    tried = {m.name: m.admit(cases) for m in metrics if m.admit is not None and not lacking(m, evaluation.offers)}
    return {
        "admitted": {name: admitted for name, (_, admitted) in tried.items()},
        "cases": {name: values for name, (values, _) in tried.items()},
    }
