"""DMD whose student also climbs differentiable rewards (Diff-Instruct++ 2410.18881, eq. 3.1).

    min over the student q:  D(q | p) - beta E_q[R(x0)],    R = sum_k weight_k r_k / std r_k

D is DMD's. The reward's gradient goes through metric and decoder into the rollout and is subtracted from DMD's own, which is
normalised and averaged over noise levels, so that the optimum is where the two cancel (in closed form for Gaussians:
`tests/distill/methods/test_reward_gradient.py`), near the tilted p exp(beta R) of `dmd_reward`. A few dozen steps end long before
it, which wants a larger beta: compare `reward_grad_abs` with `dmd_grad_abs`. `std`: over the clips of an update on all ranks, so
that beta has no unit. `limit` bounds a clip's gradient where few or equal clips have hardly a deviation, or where a reward is
steep. What a reward does not see it does not protect: watch others with weight 0 (`distill.pipeline.evaluation.reward_watch`).

Against `dmd_reward`: a weight on a clip's loss prefers clips that are good by chance, a gradient says how to make each better. It
needs a metric with a gradient (`eval.metric.Metric.differentiable`), and decodes with a graph, a latent frame at a time
(`teachers.codecs.streamed.pull_back`). With beta 0 it is `dmd`, bit for bit.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from distill.methods import Needs, dmd, losses
from distill.methods.rewards import ClipReader, Reward, check_config, logged, moments, rewarded
from teachers.errors import UserError
from teachers.registry import CODECS


@dataclass(frozen=True, kw_only=True)
class Config(dmd.Config):
    """`beta`: 0 is plain DMD. `limit`: a clip's reward gradient is at most so many times DMD's gradient of that clip, by mean
    absolute values. `face`: as in `dmd_reward`. `decoder`: a lighter published codec of the same latents for the gradient alone
    (TAEHV beside Wan's VAE: a sixteenth of its memory); values are read with the run's own."""

    rewards: dict[str, Reward]
    beta: float = 1.0
    limit: float = 10.0
    face: tuple[float, float, float, float] | None = None
    decoder: Any = field(default=None, metadata={"kinds": CODECS})

    def __post_init__(self):
        super().__post_init__()
        check_config("dmd_reward_gradient", self.rewards, self.beta, self.rollout_chunks)
        if self.limit <= 0.0:
            raise UserError(f"dmd_reward_gradient.limit: got {self.limit}; it is above 0")
        if self.decoder is not None and self.decoder.fitted:
            raise UserError(
                "dmd_reward_gradient.decoder: a fitted codec is of its run's clips; give a published one, or none"
            )
        for name, reward in self.rewards.items():
            if reward.weight and (reward.compares or reward.column not in reward.metric.with_gradient):
                known = ", ".join(reward.metric.with_gradient) or "none"
                raise UserError(
                    f"dmd_reward_gradient.rewards.{name}: {reward.column} of {reward.metric.name} has no gradient; its scores with "
                    f"one: {known}; weight 0 watches it, and dmd_reward takes any score"
                )

    @property
    def decodings(self) -> dict[str, int]:
        """How often an update of each role decodes a clip for values, the data's own counted too; the gradient comes on top."""
        return {"student": 2 if any(reward.compares for reward in self.rewards.values()) else 1}


class RewardGradientDMD(dmd.DMD):
    """DMD and the gradient of the rewards; `reader` decodes, scores and differentiates."""

    config: Config
    reader: ClipReader

    @torch.no_grad()
    def _gradient(self, drawn: dmd.Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        (gradient, metrics), rewards = super()._gradient(drawn), self.config.rewards
        given = (drawn.x0.detach(), drawn.conditions, drawn.batch)
        values = self.reader.of_all(self.reader.read(rewards, *given)).double()
        metrics = metrics | logged(rewards, values)
        if self.config.beta == 0.0:
            return gradient, metrics
        uphill = self.config.beta * self.reader.gradient(self._factors(values), *given).float()
        uphill[:, :, : drawn.start] = 0.0
        uphill = limited(uphill, self.config.limit * losses.frame_mean(gradient.abs(), drawn.start), drawn.start)
        return gradient - uphill, metrics | {"reward_grad_abs": uphill.abs().mean()}

    def _factors(self, values: Tensor) -> dict[str, tuple[Reward, float]]:
        """The rewards that steer, each with its weight over the standard deviation of the clips' values [K, N]; a reward that is
        equal on all clips is left out."""
        found = {}
        for (name, reward), row in zip(self.config.rewards.items(), values, strict=True):
            if reward.weight:
                spread = moments(name, reward, row, self.reader.reasons.get(name, "look at the clips"))[1]
                found |= {name: (reward, reward.weight / spread)} if spread else {}
        return found


def limited(gradient: Tensor, most: Tensor, start: int) -> Tensor:
    """A gradient [B, C, F, H, W] whose mean absolute value over a clip's frames from `start` on is at most that clip's of `most`
    [B]: a larger one is scaled down as a whole."""
    size = losses.frame_mean(gradient.abs(), start)
    return gradient * (most / size.clamp(min=1e-20)).clamp(max=1.0).view(-1, 1, 1, 1, 1)


def needs(config: Config) -> Needs:
    return replace(rewarded(dmd.needs(config), config.rewards), differentiates=config.beta > 0.0)


def build(config: Config, roles: dict, grid=None) -> RewardGradientDMD:
    plain, reader = dmd.build(config, roles, grid), roles["clip_reader"]
    reader.check(config.rewards, config.face)
    if config.beta:
        reader.differentiate_through(config.decoder)
    made = RewardGradientDMD(config, plain.student, plain.teacher, plain.fake_score, plain.discriminator)
    made.reader = reader
    return made
