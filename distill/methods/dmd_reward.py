"""DMD that prefers clips with a high reward: `dmd` with the weights of `distill.methods.rewards` (2512.04678, 2604.23632).

    weighs: student       a clip's loss of the student times w ~ exp(beta R): the published form. A student that can hold the
                          teacher's distribution ends at it whatever the reward, as every clip's gradient vanishes there; one
                          that cannot is nearest to it where the reward is high.
    weighs: fake_score    a clip's loss of the fake score times w ~ exp(-beta R): the fake score learns the student's distribution
                          times exp(-beta R), DMD makes that equal to the teacher's p, and so the student ends at p exp(beta R), the
                          tilted distribution that reward-weighted learning is after (ours; `tests/distill/methods/test_reward.py`).
                          It decodes in every update of the fake score too.

The weights are constants: no gradient goes through codec or metric. With beta 0 it is `dmd`, bit for bit. All rewards, those of
weight 0 too, are logged in every student update, and `distill.pipeline.evaluation.reward_watch` compares them at the end.
"""

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from distill.methods import Loss, Needs, dmd
from distill.methods.rewards import ClipReader, Reward, Weighed, check_config, rewarded, weigh
from teachers.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(dmd.Config):
    """`beta`: 0 is plain DMD; `limit` of |R| (see `rewards`). `face`: left, top, right, bottom of the face as shares of the frame,
    for rewards that want a box (Sync-C): clips are cropped around it."""

    rewards: dict[str, Reward]
    beta: float = 1.0
    limit: float = 3.0
    weighs: Literal["student", "fake_score"] = "student"
    face: tuple[float, float, float, float] | None = None

    def __post_init__(self):
        super().__post_init__()
        check_config("dmd_reward", self.rewards, self.beta, self.rollout_chunks)
        if self.limit <= 0.0:
            raise UserError(f"dmd_reward.limit: got {self.limit}; it is above 0")

    @property
    def decodings(self) -> dict[str, int]:
        """How often an update of each role decodes a clip, the data's own counted too."""
        times = 2 if any(reward.compares for reward in self.rewards.values()) else 1
        return dict.fromkeys(("student",) if self.weighs == "student" else ("student", "fake_score"), times)


class RewardDMD(dmd.DMD):
    """DMD whose clips count by their rewards; `reader` decodes and scores them."""

    config: Config
    reader: ClipReader

    def _weigh(self, beta: float, drawn: dmd.Rollouts) -> Weighed:
        config = self.config
        return weigh(config.rewards, beta, config.limit, self.reader, drawn.x0, drawn.conditions, drawn.batch)

    def _student(self, drawn: dmd.Rollouts) -> Loss:
        found = self._weigh(self.config.beta if self.config.weighs == "student" else 0.0, drawn)
        loss = super()._student(replace(drawn, x0=weighted(drawn.x0, found.weights)))
        return replace(loss, metrics=loss.metrics | found.metrics(self.config.rewards))

    def _fake_score(self, drawn: dmd.Rollouts, weights: Tensor | None = None) -> Loss:
        if self.config.weighs == "fake_score":
            weights = self._weigh(-self.config.beta, drawn).weights.to(drawn.x0)
        return super()._fake_score(drawn, weights)


def weighted(x0: Tensor, weights: Tensor) -> Tensor:
    """x0 [B, C, F, H, W] itself, through which a clip's gradient goes times its weight [B]."""
    fixed = x0.detach()
    return fixed + weights.to(x0).view(-1, 1, 1, 1, 1) * (x0 - fixed)


def needs(config: Config) -> Needs:
    return rewarded(dmd.needs(config), config.rewards)


def build(config: Config, roles: dict, grid=None) -> RewardDMD:
    plain, reader = dmd.build(config, roles, grid), roles["clip_reader"]
    reader.check(config.rewards, config.face)
    made = RewardDMD(config, plain.student, plain.teacher, plain.fake_score, plain.discriminator)
    made.reader = reader
    return made
