"""How many updates the fake score needs before each of the student's: adapted to how far it lags behind the student.

The best fake score is the mean of the clips given the noisy one, so what it misses of a fresh rollout, r = x0 - fake(x, s), is
uncorrelated with every function of x (orthogonality of conditional means; Tweedie). One such function is DMD's own direction,
d = fake(x, s) - real(x, s). Moved by e d, the fake score's loss on fresh rollouts is E |r - e d|^2, which is least at
e = E(r . d) / E|d|^2 and there lower by the share

    E(r . d)^2 / (E|r|^2 E|d|^2) = cos(r, d)^2

of itself: the gap of its loss along d, a lower bound of its whole gap (Cauchy-Schwarz), which needs no other network, no second
batch and not the least loss, which nobody knows. A student that has moved along -d since the fake score learnt has r . d < 0: so
much of DMD's gradient says where the student was. In the units of that gradient, d / |x0 - real|, it is about cos(r, d).

`lag` is that cosine, clip by clip, so that every sigma counts alike; its mean is 0 of a residual that is symmetric around 0. Its
mean over all ranks, averaged over steps, decides: beyond `AdaptConfig.lag` the next step has one update more, else one less. Our
own derivation; DMD2 (2405.14867, section 4.2) and Self Forcing (2506.08009) have a fixed number, five.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from teachers.errors import UserError
from teachers.flow import Latents


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """Between `least` and `most` updates of the fake score a step, one more where its `lag`, averaged over steps by `decay`, is
    larger than this in size, else one less."""

    least: int = 1
    most: int = 8
    lag: float = 0.1
    decay: float = 0.8

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise UserError(f"dmd.adapt: got {self.least}..{self.most} updates; need 1 <= least <= most")
        if not 0.0 < self.lag < 1.0:
            raise UserError(f"dmd.adapt.lag: got {self.lag}; it is a cosine between 0 and 1")
        if not 0.0 <= self.decay < 1.0:
            raise UserError(f"dmd.adapt.decay: got {self.decay}; it must lie in 0..1, 1 excluded")


def lag(x0: Latents, real: Latents, fake: Latents, start: int = 1) -> Float[Tensor, " batch"]:
    """cos(x0 - fake, fake - real) of each clip over the generated frames, those from `start` on, fp32; 0 where either is 0."""
    x0, real, fake = (value.float()[:, :, start:].flatten(1) for value in (x0, real, fake))
    return cosine_similarity(x0 - fake, fake - real, dim=1, eps=1e-12)


class FakeRatio:
    """The number of updates of the next step. Every rank gives it the same lags, so that all have the same number."""

    def __init__(self, config: AdaptConfig, start: int):
        self.config = config
        self.updates = min(config.most, max(config.least, start))
        self.mean, self.weight = 0.0, 0.0

    def observe(self, value: float) -> None:
        """The lag of a step, over all ranks."""
        decay = self.config.decay
        self.mean, self.weight = (
            decay * old + (1 - decay) * new for old, new in ((self.mean, value), (self.weight, 1.0))
        )
        lags = abs(self.mean) > self.config.lag * self.weight
        self.updates = min(self.config.most, max(self.config.least, self.updates + (1 if lags else -1)))

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps of it."""
        return {"updates": self.updates, "mean": self.mean, "weight": self.weight}

    def load(self, state: Mapping[str, float]) -> None:
        """Go on from a checkpoint's."""
        self.updates, self.mean, self.weight = int(state["updates"]), state["mean"], state["weight"]
