"""DMD whose student also climbs differentiable rewards (Diff-Instruct++ 2410.18881, eq. 3.1): lips better than the teacher's.

    min over the student q:  D(q | p) - beta E_q[R(x0)],    R = sum_k weight_k r_k / std r_k

D is DMD's; the reward's gradient goes through metric and decoder into the rollout. Both gradients are divided by the number of
elements, so that at the optimum a unit of beta moves R about as far as in `dmd_reward`, whose optimum is the tilted p exp(beta R);
ours is where the two gradients cancel, DMD's being normalised and averaged over noise levels (in closed form for Gaussians:
`tests/distill/methods/test_reward_gradient.py`). A few dozen steps end long before it, which wants a larger beta: compare
`reward_grad_abs` with `dmd_grad_abs`. `std`: over the clips of an update on all ranks, so that beta has no unit. What a reward does
not see it does not protect: watch others with weight 0 (`distill.pipeline.evaluation.reward_watch`).

Against `dmd_reward`: a weight on a clip's loss prefers clips that are good by chance, a gradient says how to make each better. It
needs a metric with `differentiable` (`eval.metric.Metric`), and decodes with a graph, a latent frame at a time
(`teachers.codecs.streamed.pull_back`). With beta 0 it is `dmd`, bit for bit.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from distill.methods import Loss, Needs, dmd, losses
from distill.methods.rewards import ClipReader, Reward, check_config, logged, moments, rewarded
from teachers.errors import UserError
from teachers.registry import CODECS


@dataclass(frozen=True, kw_only=True)
class Config(dmd.Config):
    """`beta`: 0 is plain DMD. `face`: as in `dmd_reward`. `decoder`: a lighter codec of the same latents for the gradient alone
    (TAEHV beside Wan's VAE: a sixteenth of its memory); values are read with the run's own."""

    rewards: dict[str, Reward]
    beta: float = 1.0
    face: tuple[float, float, float, float] | None = None
    decoder: Any = field(default=None, metadata={"kinds": CODECS})

    def __post_init__(self):
        super().__post_init__()
        check_config("dmd_reward_gradient", self.rewards, self.beta, self.rollout_chunks)
        for name, reward in self.rewards.items():
            if reward.weight and reward.metric.differentiable is None:
                raise UserError(
                    f"dmd_reward_gradient.rewards.{name}: {reward.metric.name} has no gradient; weight 0 watches it, and "
                    "dmd_reward takes any metric"
                )

    @property
    def decodings(self) -> dict[str, int]:
        """How often an update of each role decodes a clip for values, the data's own counted too; the gradient comes on top."""
        return {"student": 2 if any(reward.compares for reward in self.rewards.values()) else 1}


class RewardGradientDMD(dmd.DMD):
    """DMD and the gradient of the rewards; `reader` decodes, scores and differentiates."""

    config: Config
    reader: ClipReader

    def _student(self, drawn: dmd.Rollouts) -> Loss:
        loss, rewards, x0 = super()._student(drawn), self.config.rewards, drawn.x0
        given = (x0.detach(), drawn.conditions, drawn.batch)
        values = self.reader.of_all(self.reader.read(rewards, *given)).double()
        metrics = loss.metrics | logged(rewards, values)
        if self.config.beta == 0.0:
            return replace(loss, metrics=metrics)
        gradient = self.config.beta * self.reader.gradient(self._factors(values), *given).float()
        gradient[:, :, : drawn.start] = 0.0
        value = loss.value - losses.gradient_as_loss(x0, gradient / x0.numel())  # as losses.surrogate counts elements
        return Loss(value, metrics | {"reward_grad_abs": gradient.abs().mean()})

    def _factors(self, values: Tensor) -> dict[str, tuple[Reward, float]]:
        """The rewards that steer, each with its weight over the standard deviation of the clips' values [K, N]; none whose clips
        are all worth the same."""
        found = {}
        for (name, reward), row in zip(self.config.rewards.items(), values, strict=True):
            if reward.weight:
                spread = moments(name, reward, row, self.reader.reasons.get(name, "look at the clips"))[1]
                found |= {name: (reward, reward.weight / spread)} if spread else {}
        return found


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
