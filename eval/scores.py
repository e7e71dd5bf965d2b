"""Metrics of a card on clips: which of them can be had, features of one clip, scores of a set, and what they must return."""

import sys
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from eval.cards import Card, metric_classes
from eval.metric import Clip, Features, Metric, Score
from eval.networks.loaded import Networks
from eval.networks.weights import REGISTRY, locate
from teachers.errors import UserError
from teachers.resolve import in_users_file, nearest

IN_CLIPS = frozenset({"sound", "box"})
"""What sets of clips may bring; a metric is refused for a clip that has none."""


def chosen(card: Card, keys: Iterable[str] | None, offers: Iterable[str]) -> tuple[str, ...]:
    """The metrics of these keys; None: all of the card that what is offered suffices for. UserError for an unknown key."""
    if keys is None:
        return tuple(key for key, metric in card.metrics.items() if not lacking(metric, offers))
    for key in keys:
        if key not in card.metrics and key not in metric_classes():
            raise UserError(f"unknown metric '{key}': --metrics; {nearest(key, card.metrics)}")
    return tuple(dict.fromkeys(keys))


def lacking(metric: Metric, offers: Iterable[str]) -> list[str]:
    """What a metric needs that neither a published network nor what is offered gives."""
    return [need for need in metric.needs if need not in REGISTRY and need not in offers]


def refusals(card: Card, keys: Sequence[str], offers: Iterable[str]) -> dict[str, str]:
    """Key -> why the metric cannot be had: the card does not have it, its weights are missing or wrong, or only a run has
    what it needs."""
    refused = {}
    for key in keys:
        if key not in card.metrics:
            refused[key] = f"{key} refused: the protocol {card.name} does not have it; choose another --protocol"
            continue
        metric = card.metrics[key]
        if missing := lacking(metric, offers):
            refused[key] = f"{key} refused: it needs {' and '.join(missing)}, which these clips do not bring"
            continue
        try:
            for need in metric.needs:
                if need in REGISTRY:
                    locate(need)
        except UserError as error:
            refused[key] = str(error)
    return refused


def clip_features(metric: Metric, clip: Clip, real: Clip, networks: Networks) -> dict[str, Tensor]:
    """The features of one clip; `real` is its real clip (the same for the ground truth). Raises UserError for a clip that
    has none."""
    with in_users_file(metric):
        features = metric.features(clip, real, networks)
    if not isinstance(features, Mapping) or not all(isinstance(value, Tensor) for value in features.values()):
        raise UserError(
            f"features of metric '{metric.name}' must be a dict of tensors: {_where(metric)}; got {type(features).__name__}"
        )
    return {name: value.detach().cpu().contiguous() for name, value in features.items()}


def set_scores(metric: Metric, features: Sequence[Features], reference: Sequence[Features] | None) -> dict[str, Score]:
    """Scores of a set from the features of its clips; `reference` as `Metric.against` states.

    Raises UserError where the set is too small and where a feature is not finite.
    """
    with in_users_file(metric):
        found = metric.score(features, reference)
    if not isinstance(found, Mapping):
        raise UserError(
            f"scores of metric '{metric.name}' must be a dict: {_where(metric)}; got {type(found).__name__}"
        )
    scores = {}
    for name, score in found.items():
        if name not in metric.columns:
            known = ", ".join(metric.columns)
            raise UserError(
                f"metric '{metric.name}' gives a score '{name}' that is no column of it ({known}): {_where(metric)}"
            )
        try:
            if not isinstance(score, Score):
                mean, spread = score
                score = Score(float(mean), float(spread))
            scores[name] = score
        except (TypeError, ValueError) as error:
            raise UserError(
                f"'{name}' of metric '{metric.name}' must be (mean, error): {_where(metric)}; got {type(score).__name__}"
            ) from error
    return scores


def _where(metric: Metric) -> str:
    return str(sys.modules[type(metric).__module__].__file__)
