"""Flow matching of a bidirectional teacher on data (Lipman et al. 2210.02747), conditions dropped for guidance."""

from dataclasses import dataclass, field

import torch

from distill.methods import Batch, Loss, Needs, check_drop, drop_conditions, losses
from teachers import flow
from teachers.networks.kind import AvatarTeacher


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sigmas are stratified over the batch, shifted by `shift`. `drop`: with which probability a clip goes without a condition."""

    shift: float = 3.0
    loss_power: float = 1.0
    loss_floor: float = 0.15
    drop: dict[str, float] = field(default_factory=lambda: {"text": 0.1, "audio": 0.1})

    def __post_init__(self):
        check_drop("flow_matching.drop", self.drop)


class FlowMatching:
    """Role `teacher`: |x0_hat - x0|^2 / sigma^power on the frames that are not given."""

    def __init__(self, config: Config, teacher: AvatarTeacher):
        self.config, self.teacher = config, teacher

    def roles_to_update(self, step: int) -> tuple[str, ...]:
        return ("teacher",)

    def loss(self, role: str, batch: Batch, rng: torch.Generator, shared: torch.Generator) -> Loss:
        x0, config = batch.x0, self.config
        assert x0 is not None
        num = x0.shape[0]
        strata = (torch.arange(num) + torch.rand(num, generator=rng)) / num
        sigma = flow.shift_sigma(strata[torch.randperm(num, generator=rng)], config.shift).to(x0)
        eps = torch.randn(x0.shape, generator=rng).to(x0)
        conditions = drop_conditions(batch.conditions, config.drop, rng)
        x0_hat = self.teacher.denoise(flow.add_noise(x0, eps, sigma), sigma, conditions)
        value = losses.denoising(x0_hat, x0, sigma, config.loss_power, config.loss_floor, len(conditions.known))
        return Loss(value, {"loss": value.detach()})


def needs(config: Config) -> Needs:
    return Needs(trained=("teacher",))


def build(config: Config, roles: dict, grid=None) -> FlowMatching:
    return FlowMatching(config, roles["teacher"])
