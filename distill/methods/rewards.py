"""Rewards of generated clips and the weights that they give to a clip's loss: any metric of `eval`, or several, as a reward.

    z_k = (r_k - mean r_k) / std r_k over the clips of all ranks;  R = clamp(sum_k weight_k z_k, +-limit)
    w = exp(beta R) / mean exp(beta R)

exp(beta r) is the weight of Reward Forcing (2512.04678, Re-DMD) and of Hallo-Live (2604.23632, HP-DMD, whose r is standardised over
the ranks and whose beta is 1). Ours differ: w has mean 1 over all ranks, so that rate, clip of the gradient and weight of the GAN
term mean what they mean without rewards; and R is limited, as without a limit one clip of 64 can have z = 7.9 and so, at beta 1,
nearly all of the weight. Nothing here is differentiated: a reward may be any function of frames and sound.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from distill.methods import Batch, Needs
from eval.cards import registry
from eval.metric import Metric
from teachers.conditions import Conditions
from teachers.errors import UserError
from teachers.registry import CodecKind

LEAST_CLIPS = 2
EVEN = 1e-6
"""A standard deviation below this share of the largest value is rounding: such clips are worth the same."""


@dataclass(frozen=True, kw_only=True)
class Reward:
    """One reward: a metric with its config (`name: sync`, or `my_file:Thing`), and `score`, which of its scores of one clip (by
    default the one of its name). `weight`: its share of R, negative where less is better; 0 only watches it. `band`: the reward is
    minus the distance from these two values, 0 between them. `scale`: (mean, std) in the place of those of the update's clips."""

    metric: Any = field(metadata={"kinds": registry()})
    score: str | None = None
    weight: float = 1.0
    band: tuple[float, float] | None = None
    scale: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.column not in self.metric.columns:
            known = ", ".join(self.metric.columns)
            raise UserError(f"rewards: {self.metric.name} gives no score '{self.column}'; set score to one of {known}")
        if self.metric.least > 1 or self.metric.over != "clips":
            raise UserError(f"rewards: {self.metric.name} scores sets of clips, a reward one clip; take another metric")
        if self.band is not None and self.band[0] > self.band[1]:
            raise UserError(f"rewards: band: got {list(self.band)}; two values, the lower one first")
        if self.scale is not None and self.scale[1] <= 0:
            raise UserError(f"rewards: scale: got {list(self.scale)}; a mean and a standard deviation above 0")

    @property
    def column(self) -> str:
        """The score that is taken."""
        return self.metric.name if self.score is None else self.score

    @property
    def compares(self) -> bool:
        """Whether a clip is compared with the data's own clip."""
        metric: Metric = self.metric
        return metric.paired or metric.against is not None

    def value(self, scores: Mapping[str, float]) -> float:
        """The reward of a clip with these scores."""
        score = scores[self.column]
        return score if self.band is None else -max(self.band[0] - score, score - self.band[1], 0.0)


class ClipReader(Protocol):
    """What looks at frames (`distill.pipeline.clip_reader`): decoding and scoring are of each rank's own clips, `of_all` is the one
    collective. `gradient`, after `read` of the same clips: d / d x0 of the sum over rewards of each one's value times its factor,
    through the decoder that `differentiate_through` names (None: the run's). `rank`: the number of this rank's share of the batch;
    `reasons`: why a clip had no such reward, by its name."""

    rank: int
    reasons: Mapping[str, str]

    def check(self, rewards: Mapping[str, Reward], face: tuple[float, ...] | None) -> None: ...

    def differentiate_through(self, decoder: CodecKind | None) -> None: ...

    def read(
        self, rewards: Mapping[str, Reward], x0: Tensor, conditions: Conditions, batch: Batch
    ) -> Float[Tensor, "k b"]: ...

    def gradient(
        self, rewards: Mapping[str, tuple[Reward, float]], x0: Tensor, conditions: Conditions, batch: Batch
    ) -> Tensor: ...

    def of_all(self, own: Float[Tensor, "k b"]) -> Float[Tensor, "k n"]: ...


@dataclass(frozen=True)
class Weighed:
    """Weights [B] of this rank's clips; values [K, N] of the rewards and weights [N] of the clips of all ranks."""

    weights: Tensor
    values: Tensor
    all_weights: Tensor

    def metrics(self, names: Mapping[str, Any]) -> dict[str, Tensor]:
        """To log: `logged`, and the share of clips that count, (sum w)^2 / (N sum w^2)."""
        share = self.all_weights.sum().square() / (len(self.all_weights) * self.all_weights.square().sum())
        return logged(names, self.values) | {"effective_clips": share}


def logged(names: Mapping[str, Any], values: Float[Tensor, "k n"]) -> dict[str, Tensor]:
    """To log: the mean and spread of every reward over the clips that have it."""
    found = {}
    for name, row in zip(names, values, strict=True):
        known = row[row.isfinite()]
        found |= {f"reward_{name}": known.mean(), f"spread_{name}": known.std(correction=0)}
    return found


@torch.no_grad()
def weigh(
    rewards: Mapping[str, Reward],
    beta: float,
    limit: float,
    reader: ClipReader,
    x0: Tensor,
    conditions: Conditions,
    batch: Batch,
) -> Weighed:
    """The weights of the clips x0 [B, C, F, H, W] of this rank. UserError on every rank alike, where the clips of all are too few
    or none of them has a reward."""
    own = reader.read(rewards, x0.detach(), conditions, batch)
    values = reader.of_all(own).double()
    total = torch.stack(
        [
            reward.weight * standardised(name, reward, row, reader.reasons.get(name, "look at the clips"))
            for (name, reward), row in zip(rewards.items(), values, strict=True)
        ]
    ).sum(0)
    weights = torch.exp(beta * total.clamp(-limit, limit))
    weights = weights / weights.mean()
    start = reader.rank * own.shape[1]
    return Weighed(weights[start : start + own.shape[1]], values, weights)


def check_number(name: str, reward: Reward, num: int) -> None:
    """UserError where the `num` clips that one update has on all ranks do not suffice to standardise a reward."""
    if reward.weight and reward.scale is None and num < LEAST_CLIPS:
        raise UserError(
            f"rewards.{name}: {num} clip in an update has no standard deviation; raise train.batch_size or the number of GPUs, or "
            f"give rewards.{name}.scale: [mean, std]"
        )


def standardised(name: str, reward: Reward, values: Float[Tensor, " n"], reason: str = "") -> Float[Tensor, " n"]:
    """z of the clips; a clip without this reward (NaN: no face was found, say) has the least of all that have it. UserError, with
    the `reason`, where none has it."""
    if reward.weight == 0.0:
        return torch.zeros_like(values)
    mean, spread = moments(name, reward, values, reason)
    if spread == 0.0:
        return torch.zeros_like(values)
    return (torch.where(values.isfinite(), values, values[values.isfinite()].min()) - mean) / spread


def moments(name: str, reward: Reward, values: Float[Tensor, " n"], reason: str = "") -> tuple[float, float]:
    """Mean and standard deviation by which the clips are standardised, the second 0 where they are all worth the same. Errors as
    `standardised`."""
    known = values[values.isfinite()]
    if len(known) == 0:
        raise UserError(f"rewards.{name}: none of {len(values)} clips has it: {reason}; or remove the reward")
    check_number(name, reward, len(values))
    mean, spread = (float(known.mean()), float(known.std(correction=0))) if reward.scale is None else reward.scale
    return mean, spread if spread > EVEN * float(known.abs().max()) else 0.0


def rewarded(needs: Needs, rewards: Mapping[str, Reward]) -> Needs:
    """What a method needs besides where its clips have rewards."""
    compares = any(reward.compares for reward in rewards.values())
    return replace(needs, decodes=True, films="all" if compares else needs.films)


def check_config(method: str, rewards: Mapping[str, Reward], beta: float, rollout_chunks: int) -> None:
    """UserError for rewards that steer nothing, or rollouts that they cannot judge."""
    if not any(reward.weight for reward in rewards.values()):
        raise UserError(f"{method}.rewards: none has a weight; give one, or use method@distill=dmd")
    if beta < 0.0:
        raise UserError(f"{method}.beta: got {beta}; it is at least 0")
    if rollout_chunks:
        raise UserError(f"{method}.rollout_chunks: a reward is of the clip that the data have a sound for; use 0")
