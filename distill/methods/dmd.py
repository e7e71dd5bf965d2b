"""Distribution matching distillation over the student's own rollouts (DMD2 2405.14867, Self Forcing 2506.08009).

    x0 = rollout of the student;  x = (1-s) x0 + s eps;  d/dx0 = (fake(x, s) - real(x, s)) / mean |x0 - real|  (2311.18828)

and the fake score learns to denoise rollouts. Differences to the published recipes: the normaliser and every loss leave out the
given reference frame, the gradient is fp32 throughout, the fake score trains before the student's first step, and guidance scales
are effective ones (teachers.guidance.Guidance); docs/parity.md has every difference to published code with its size. What else
`Config` offers, and where it differs:

gan                 DMD2's GAN term, softplus(-D) on noisy rollouts with weight `gan`; D is heads on the fake score's features, and
                    sees data and rollouts under one noise, at sigmas of their own `gan_shift` (DMD2 draws them apart too).
                    `gan_critic` is the weight with which D's loss trains the fake score, as in DMD2 and One-Forcing (2605.23458);
                    0 leaves D the features of a denoiser. We differ: a logit a token and block, theirs one a clip; heads and fake
                    score are updated in turn, on rollouts of their own; no R1 (One-Forcing: for chunks of three frames alone).
rollout_chunks      Longer rollouts, the last clip length of which carries the loss (LongLive 2509.22622, Self-Forcing++
                    2510.02283): chunks before it run to their end without gradient. The scores take its first frame, the
                    student's own latent, as the given one; LongLive encodes it again as an image. Each rollout starts anew.
context_noise       Committed chunks are noised to this sigma (Self Forcing); the network is conditioned on `history.level`.
context_gradient    A chunk's gradient reaches the exit-step keys and values of the chunks before it, as in Self Forcing's
                    published code, whose cache is written in place with gradient on and overwritten without
                    (docs/parity.md, F1). An ablation: the paper's algorithm, FastGen's and ours stop it there.
guidance_band       The teacher is guided at score sigmas within it only (Lip Forcing 2606.11180).
adapt               The fake score's updates a step follow its lag behind the student (`critics.fake_ratio`, our own).

More denoising steps for the first chunks (JoyAvatar 2512.11423) are the student's own: `student.first_sigmas`.

Where the student is conditioned on guidance scales (`student.guidance`), each clip draws its own: student and fake score are
conditioned on them, the teacher is guided with them in the place of `guidance`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from distill.methods import Batch, Loss, Needs, losses
from distill.methods.critics.discriminator import Discriminator
from distill.methods.critics.fake_ratio import AdaptConfig, FakeRatio, lag
from distill.methods.rollout import draw_noise, of_length, rollout
from students.student import Student
from teachers import flow
from teachers.conditions import Conditions
from teachers.errors import UserError
from teachers.guidance import AnyGuidance, Guidance, branch_outputs
from teachers.networks.kind import AvatarTeacher


@dataclass(frozen=True, kw_only=True)
class Config:
    """`fake_updates` fake-score steps precede each student step, `warmup` more come first; with `adapt` they are those that it
    starts with. Scores are compared at sigma drawn uniformly, shifted by `shift` and clamped to [sigma_min, sigma_max].
    `exit_step`: random is Self Forcing's, one for all chunks and ranks; last trains what is served: with random exits the fake
    score sees, and the student matches, their mixture. A rollout has a random number of chunks up to `rollout_chunks`, 0: those of
    the conditions."""

    guidance: Guidance = field(default_factory=Guidance)
    guidance_band: tuple[float, float] = (0.0, 1.0)
    gan: float = 0.0
    gan_critic: float = 0.0
    gan_shift: float = 1.0
    fake_updates: int = 5
    adapt: AdaptConfig | None = None
    warmup: int = 20
    exit_step: Literal["random", "last"] = "random"
    rollout_chunks: int = 0
    context_noise: float = 0.0
    context_gradient: bool = False
    shift: float = 1.0
    sigma_min: float = 0.02
    sigma_max: float = 0.98
    loss_power: float = 1.0
    loss_floor: float = 0.02

    def __post_init__(self):
        if not 0.0 < self.sigma_min < self.sigma_max <= 1.0:
            raise UserError(f"dmd sigmas: got {self.sigma_min}..{self.sigma_max}; need 0 < sigma_min < sigma_max <= 1")
        if not 0.0 <= self.context_noise < 1.0:
            raise UserError(f"dmd.context_noise: got {self.context_noise}; it is a sigma in [0, 1)")
        if not 0.0 <= self.guidance_band[0] <= self.guidance_band[1] <= 1.0:
            raise UserError(f"dmd.guidance_band: got {list(self.guidance_band)}; two sigmas, the lower one first")
        if self.gan < 0.0:
            raise UserError(f"dmd.gan: got {self.gan}; it is a weight, 0 is off")
        if self.gan_critic < 0.0 or (self.gan_critic and not self.gan):
            raise UserError(
                f"dmd.gan_critic: got {self.gan_critic} with gan={self.gan}; it is a weight beside that one, 0 is off"
            )


@dataclass(frozen=True)
class Rollouts:
    """What an update looks at: rollouts x0 [B, C, F, H, W], the `conditions` that the scores are given with them, one noise eps
    like x0, and the levels sigma [B] at which scores are compared and gan_sigma [B] of the discriminator; `batch`: the data's."""

    x0: Tensor
    sigma: Tensor
    gan_sigma: Tensor
    eps: Tensor
    conditions: Conditions
    batch: Batch

    @property
    def start(self) -> int:
        """The first frame that was generated."""
        return len(self.conditions.known)


class DMD:
    """Roles: `fake_score` (denoising loss on rollouts), `discriminator` (with gan) and `student`; `teacher` is frozen."""

    def __init__(
        self,
        config: Config,
        student: Student,
        teacher: AvatarTeacher,
        fake_score: AvatarTeacher,
        discriminator: Discriminator | None = None,
    ):
        self.config, self.student, self.teacher, self.fake_score = config, student, teacher, fake_score
        self.discriminator = discriminator
        self.ratio = None if config.adapt is None else FakeRatio(config.adapt, config.fake_updates)

    def roles_to_update(self, step: int) -> tuple[str, ...]:
        """The cadence: fake_score, and discriminator, fake_updates times (step 0: warmup more), then the student. With `adapt` so
        many times as it has found for the next step, whichever that is."""
        updates = self.config.fake_updates if self.ratio is None else self.ratio.updates
        critics = ("fake_score", "discriminator") if self.config.gan else ("fake_score",)
        return critics * (updates + (self.config.warmup if step == 0 else 0)) + ("student",)

    @property
    def watched(self) -> tuple[str, ...]:
        """The metrics that the number of updates follows."""
        return () if self.ratio is None else ("student/fake_lag",)

    def observe(self, values: Mapping[str, float]) -> None:
        """What a step has shown, over all ranks; nothing, where its update was skipped."""
        assert self.ratio is not None
        for value in values.values():
            self.ratio.observe(value)

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {} if self.ratio is None else self.ratio.state()

    def load(self, state: Mapping[str, float]) -> None:
        """Go on from a checkpoint's state."""
        assert self.ratio is not None
        self.ratio.load(state)

    def loss(self, role: str, batch: Batch, rng: torch.Generator, shared: torch.Generator) -> Loss:
        given, scales = batch.conditions, self.student.spec.guidance
        if scales is not None:
            given = replace(given, guidance=scales.draw(given.num_rows, rng).to(given.device))
            batch = replace(batch, conditions=given)
        with torch.set_grad_enabled(role == "student" and torch.is_grad_enabled()):
            x0, conditions = self._generate(given, rng, shared)
        raw = torch.rand(x0.shape[0], generator=rng)  # one score sigma per clip
        sigma, gan_sigma = (self._sigma(raw, shift).to(x0) for shift in (self.config.shift, self.config.gan_shift))
        eps = torch.randn(x0.shape, generator=rng).to(x0)
        drawn = Rollouts(x0, sigma, gan_sigma, eps, conditions, batch)
        if role == "student":
            return self._student(drawn)
        if role == "fake_score":
            return self._fake_score(drawn)
        real, fake = self._logits(drawn)
        value = losses.discriminator_loss(real, fake, drawn.batch.filmed)
        gap = losses.logit_gap(real, fake, drawn.batch.filmed)
        return Loss(value, {"loss": value.detach(), "gap": gap.detach()})

    def _sigma(self, raw: Tensor, shift: float) -> Tensor:
        return flow.shift_sigma(raw, shift).clamp(self.config.sigma_min, self.config.sigma_max)

    def _generate(
        self, conditions: Conditions, rng: torch.Generator, shared: torch.Generator
    ) -> tuple[Tensor, Conditions]:
        """A rollout's last clip length x0 [B, C, F, H, W], and the conditions that the scores are given with it."""
        config, spec = self.config, self.student.spec
        n, window = spec.chunk_frames, spec.num_chunks
        count = conditions.num_frames // n
        if config.rollout_chunks:
            count = int(torch.randint(window, config.rollout_chunks + 1, (1,), generator=shared))
            conditions = of_length(conditions, count * n)
        start, num_steps = max(0, count - window), max(len(spec.steps(j)) for j in range(count))
        noise = draw_noise(self.student, conditions.num_rows, rng, count, num_steps)
        dirt = draw_noise(self.student, conditions.num_rows, rng, count, 1) if config.context_noise else None

        def corrupt(chunk: int, x0: Tensor) -> Tensor:
            return x0 if dirt is None else flow.add_noise(x0, dirt(chunk, 0).to(x0), config.context_noise)

        exits = self._exits(start, count, shared)
        leak = config.context_gradient
        x0 = rollout(self.student, conditions, noise, exits, start=start, corrupt=corrupt, context_gradient=leak)
        if start:
            conditions = conditions.frames(start * n, count * n)
            conditions = replace(conditions, reference=x0[:, :, :1].detach()) if conditions.known else conditions
        return x0, conditions

    def _exits(self, start: int, count: int, shared: torch.Generator) -> list[int]:
        """Exit step of every chunk: the same on every rank, so that all run the same number of passes."""
        counts = [len(self.student.spec.steps(j)) for j in range(count)]
        if self.config.exit_step == "last":
            return [num - 1 for num in counts]

        def draw(num: int) -> int:
            return int(torch.randint(num, (1,), generator=shared))

        common = {num: draw(num) for num in sorted(set(counts[start:]))}
        return [common[num] if j >= start else num - 1 for j, num in enumerate(counts)]

    def _fake_score(self, drawn: Rollouts, weights: Tensor | None = None) -> Loss:
        x0, sigma, config = drawn.x0, drawn.sigma, self.config
        x0_hat = self.fake_score.denoise(flow.add_noise(x0, drawn.eps, sigma), sigma, drawn.conditions)
        value = losses.denoising(x0_hat, x0, sigma, config.loss_power, config.loss_floor, drawn.start, weights)
        metrics = {"loss": value.detach()}
        if config.gan_critic:
            critic = losses.discriminator_loss(*self._logits(drawn, train=True), drawn.batch.filmed)
            value, metrics["critic"] = value + config.gan_critic * critic, critic.detach()
        return Loss(value, metrics)

    @torch.no_grad()
    def _gradient(self, drawn: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient like x0 that the student descends, its number of elements times that of the loss, and what is logged."""
        real, fake = self._scores(drawn)
        gradient = losses.dmd_gradient(drawn.x0, real, fake, drawn.start)
        behind = lag(drawn.x0, real, fake, drawn.start).mean()
        return gradient, {"dmd_grad_abs": gradient.abs().mean(), "fake_lag": behind}

    def _student(self, drawn: Rollouts) -> Loss:
        x0 = drawn.x0
        gradient, metrics = self._gradient(drawn)
        value = losses.surrogate(x0, gradient)
        if self.config.gan:
            gradient = losses.grad_wrt_input(
                lambda clip: losses.generator_loss(self._judge(clip, drawn, drawn.conditions)), x0
            )
            value = value + self.config.gan * losses.gradient_as_loss(x0, gradient)
            metrics["gan_grad_abs"] = gradient.abs().mean()
        return Loss(value, metrics)

    def _scores(self, drawn: Rollouts) -> tuple[Tensor, Tensor]:
        """x0 predictions [B, C, F, H, W] of the guided teacher (real) and of the fake score at one noisy x."""
        sigma, conditions, (low, high) = drawn.sigma, drawn.conditions, self.config.guidance_band
        x, scales = flow.add_noise(drawn.x0, drawn.eps, sigma), self.student.spec.guidance
        guidance: AnyGuidance = self.config.guidance
        if scales is not None:
            guidance = scales.of(conditions.guidance, guidance.batched)
        outputs = branch_outputs(self.teacher.denoise, x, sigma, conditions, guidance)
        inside = ((sigma >= low) & (sigma <= high)).view(-1, 1, 1, 1, 1)
        real = torch.where(inside, guidance.combine(outputs), outputs[0])
        return real, self.fake_score.denoise(x, sigma, conditions)

    def _judge(self, clip: Tensor, drawn: Rollouts, conditions: Conditions, train: bool = False) -> Tensor:
        """The discriminator's logits of clips under the noise of the rollouts."""
        assert self.discriminator is not None
        noisy = flow.add_noise(clip, drawn.eps, drawn.gan_sigma)
        return self.discriminator(self.fake_score, noisy, drawn.gan_sigma, conditions, train)

    def _logits(self, drawn: Rollouts, train: bool = False) -> tuple[Tensor, Tensor]:
        """The discriminator's logits of data and of rollouts under one noise."""
        data = drawn.batch.x0
        assert data is not None
        real = self._judge(data, drawn, drawn.batch.conditions, train)
        return real, self._judge(drawn.x0, drawn, drawn.conditions, train)


def needs(config: Config) -> Needs:
    extra = ("discriminator",) if config.gan else ()
    return Needs(trained=("student", "fake_score", *extra), frozen=("teacher",), films="some" if config.gan else "none")


def build(config: Config, roles: dict, grid=None) -> DMD:
    spec = roles["student"].spec
    if spec.history.commit == "same_level":
        if config.exit_step != "last":
            raise UserError(
                f"dmd.exit_step: {config.exit_step} leaves steps out that a same_level history keeps; use exit_step: last"
            )
        if config.context_noise or spec.first_sigmas:
            raise UserError(
                "dmd.context_noise, student.first_sigmas: a same_level history has no pass for them; remove them"
            )
    sequential = spec.schedule.depth == 1 and spec.history.commit == "clean"
    if config.context_gradient and not (sequential and roles["student"].has_context_gradient):
        raise UserError(
            "dmd.context_gradient: of a causal DiT that makes one chunk after the other, commit: clean; remove it"
        )
    if spec.schedule.depth > 1 and config.exit_step != "last":
        raise UserError("dmd.exit_step: chunks in flight together all run to their last step; use exit_step: last")
    if 0 < config.rollout_chunks < spec.num_chunks:
        raise UserError(
            f"dmd.rollout_chunks: got {config.rollout_chunks}; a clip has {spec.num_chunks}, take at least that or 0"
        )
    if config.gan and "discriminator" not in roles:
        raise UserError("dmd.gan: there is no role discriminator; give it one, or gan: 0")
    return DMD(config, roles["student"], roles["teacher"], roles["fake_score"], roles.get("discriminator"))
