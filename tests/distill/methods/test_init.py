"""Initialisations: forcing, ODE pairs of an autoregressive teacher, causal consistency; against an AR(1) process in closed form."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from distill.methods import Batch, consistency, forcing, ode_init
from distill.methods.consistency import Consistency
from distill.methods.forcing import Forced, Forcing, strata
from distill.methods.ode_init import ODEInit
from distill.pipeline.generate import solve_states
from students.history import History
from students.schedule import Schedule
from students.spec import student_sigmas
from teachers import flow
from teachers.conditions import Conditions
from teachers.errors import UserError
from teachers.guidance import Guidance
from tests.support.methods.gaussian import autoregressive
from tests.support.tiny import a_student, a_train_set, randn, rng, some_conditions, some_latents

C, F, RHO = 2, 4, 0.7
MEAN = torch.tensor([[0.3, 0.8, -0.5, 0.4], [-0.2, -0.6, 0.5, 1.0]]).view(C, F, 1, 1)
VARIANCE = torch.tensor([1.0, 0.5])
SIGMAS = student_sigmas(3, 3.0)


class ARGaussian(nn.Module):
    """x_j given x_(j-1) is N(m, V), m = gain x_(j-1) + bias, one-frame chunks. `is_map` false: the denoiser E[x0 | x_s]; true: the
    consistency function, where the ODE through x_s ends: m + V^(1/2) ((1-s)^2 V + s^2)^(-1/2) (x_s - (1-s) m)."""

    def __init__(self, is_map: bool, exact: bool):
        super().__init__()
        history = History(sinks=0, window=1)
        self.spec = SimpleNamespace(
            schedule=Schedule(), sigmas=SIGMAS, chunk_frames=1, num_chunks=F, history=history, history_noise=None
        )
        self.is_map = is_map
        gain, bias, variance = torch.zeros(C, F), torch.zeros(C, F), torch.full((C, F), 0.25)
        if exact:
            gain = torch.full((C, F), RHO)
            bias = MEAN[..., 0, 0] - RHO * MEAN[..., 0, 0].roll(1, 1)
            variance = (1 - RHO**2) * VARIANCE.view(C, 1).expand(C, F)
        self.gain, self.bias = nn.Parameter(gain), nn.Parameter(bias)
        self.log_variance = nn.Parameter(variance.log())

    def denoise_clip(
        self, x: Tensor, sigma: Tensor, conditions: Conditions, clean: Tensor | None = None, level: Tensor | None = None
    ) -> Tensor:
        assert clean is not None
        assert level is None
        assert sigma.shape == (x.shape[0], F)
        s, variance = sigma.unsqueeze(1), self.log_variance.exp()
        mean = self.gain * clean[..., 0, 0].roll(1, 2) + self.bias
        spread = (1 - s) ** 2 * variance + s**2
        factor = (variance / spread).sqrt() if self.is_map else (1 - s) * variance / spread
        x0 = mean + factor * (x[..., 0, 0] - (1 - s) * mean)
        return torch.cat([conditions.reference[..., 0, 0], x0[:, :, 1:]], dim=2)[..., None, None]

    @torch.no_grad()
    def errors(self) -> list[float]:
        """Largest error of gain, bias and variance (relative) of the generated frames."""
        exact = ARGaussian(self.is_map, exact=True)
        ratio = (self.log_variance - exact.log_variance).exp() - 1
        pairs = (self.gain - exact.gain, self.bias - exact.bias, ratio)
        return [float(error[:, 1:].abs().max()) for error in pairs]


def oracle():
    return autoregressive(MEAN, torch.diag(VARIANCE), RHO)


def data(batch: int, seed: int) -> Batch:
    """Clips of the process and their conditions."""
    reference = MEAN[:, :1] + VARIANCE.sqrt().view(C, 1, 1, 1) * randn(batch, C, 1, 1, 1, seed=seed)
    given = Conditions(text=torch.zeros(batch, 1, 1), audio=torch.zeros(batch, F, 1, 1), reference=reference)
    return Batch(conditions=given, x0=oracle().sample(given, rng(seed, 3)).float())


def fit(method, student: ARGaussian, num_steps: int, batch_of=lambda i: data(256, i)) -> ARGaussian:
    optimizer = torch.optim.Adam(student.parameters(), lr=0.03, betas=(0.8, 0.95))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for i in range(num_steps):
        optimizer.zero_grad()
        method.loss("student", batch_of(i), rng(i), rng(i, 1)).value.backward()
        optimizer.step()
        decay.step()
    return student


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_teacher_forcing_learns_the_process(power):
    student = ARGaussian(is_map=False, exact=False)
    config = forcing.Config(loss_power=power, drop={})
    gain, bias, variance = fit(Forcing(config, student), student, 200).errors()
    assert gain < 0.04
    assert bias < 0.04
    assert variance < 0.12


class Recorder:
    """Keeps what denoise_clip was given and answers with `answer`."""

    def __init__(self, answer, history: History | None = None):
        history = history or History()
        self.spec = SimpleNamespace(
            schedule=Schedule(), sigmas=SIGMAS, chunk_frames=2, num_chunks=4, history=history, history_noise=None
        )
        self.answer, self.calls = answer, []

    def denoise_clip(self, x, sigma, conditions, clean=None, level=None):
        assert level is None
        self.calls.append(SimpleNamespace(x=x, sigma=sigma, conditions=conditions, clean=clean))
        return self.answer


@pytest.mark.parametrize("context", ["clean", "noisy"])
def test_forcing_noises_every_chunk_to_its_own_sigma(context):
    batch = a_train_set(16).batch(torch.arange(16))
    student = Recorder(batch.x0)
    config = forcing.Config(context=context, shift=1.0, drop={"text": 0.5, "audio": 0.25})
    assert Forcing(config, student).loss("student", batch, rng(1), rng(2)).value == 0, "the target is not the data"
    (call,) = student.calls
    assert call.sigma.shape == (16, 4)
    assert sorted((call.sigma.flatten() * 64).long().tolist()) == list(range(64)), "not one in each stratum"
    levels = flow.expand(call.sigma.repeat_interleave(2, dim=1), batch.x0)
    eps = (call.x - (1 - levels) * batch.x0) / levels
    kept = eps[(levels > 0.1).expand_as(eps)]
    assert float(kept.std()) == pytest.approx(1.0, abs=0.05)
    assert call.clean is None if context == "noisy" else torch.equal(call.clean, batch.x0)
    dropped = sum(not row.any() for i in range(20) for row in _audio(student, config, batch, i)) / 320
    assert dropped == pytest.approx(0.25, abs=0.08)


def _audio(student, config, batch, seed):
    Forcing(config, student).loss("student", batch, rng(seed), rng(2))
    return student.calls[-1].conditions.audio


def test_forcing_leaves_the_given_frame_out():
    batch = a_train_set(2).batch(torch.arange(2))
    wrong = batch.x0.clone()
    wrong[:, :, 0] += 5.0
    assert Forcing(forcing.Config(), Recorder(wrong)).loss("student", batch, rng(1), rng(2)).value == 0
    wrong[:, :, 1] += 5.0
    assert Forcing(forcing.Config(), Recorder(wrong)).loss("student", batch, rng(1), rng(2)).value > 0


def test_strata():
    values = strata((3, 5), rng(1))
    assert sorted((values.flatten() * 15).long().tolist()) == list(range(15))
    assert values.flatten().tolist() != sorted(values.flatten().tolist())


def forced_states(batch: Batch, noise: Tensor, num_steps: int) -> Tensor:
    """Trajectories of the exact autoregressive teacher under the data's clean chunks."""
    grid = flow.sigma_grid(num_steps, 3.0)
    keep = (*flow.on_grid(SIGMAS, grid), num_steps)
    teacher = Forced(ARGaussian(is_map=False, exact=True), batch.x0)
    with torch.no_grad():
        return solve_states(teacher, batch.conditions, noise, grid, keep, Guidance())


def test_an_autoregressive_trajectory_is_a_function_of_what_a_causal_student_sees():
    """Its end is the closed-form map of the chunk's own state and the data before it: no error is left (Causal Forcing)."""
    batch, noise = data(64, 1), randn(64, C, F, 1, 1, seed=2)
    states = forced_states(batch, noise, 600)
    exact = ARGaussian(is_map=True, exact=True)
    end = exact.denoise_clip(noise, torch.ones(64, F), batch.conditions, batch.x0)
    assert (states[:, -1] - end).abs().max() < 0.01
    given = Batch(conditions=batch.conditions, x0=batch.x0, states=states)
    right = ODEInit(ode_init.Config(context="data"), exact, (*SIGMAS, 0.0))
    wrong = ODEInit(ode_init.Config(context="clean"), exact, (*SIGMAS, 0.0))
    assert right.loss("student", given, rng(1), rng(2)).value < 1e-5
    assert wrong.loss("student", given, rng(1), rng(2)).value > 0.05, "the trajectory's own end passed for the data"


def test_ode_init_from_an_autoregressive_teacher_learns_its_map():
    student = ARGaussian(is_map=True, exact=False)

    def batch_of(i: int) -> Batch:
        batch = data(128, i % 8)
        states = forced_states(batch, randn(128, C, F, 1, 1, seed=i % 8), 192)
        return Batch(conditions=batch.conditions, x0=batch.x0, states=states)

    pairs = [batch_of(i) for i in range(8)]
    method = ODEInit(ode_init.Config(context="data"), student, (*SIGMAS, 0.0))
    assert max(fit(method, student, 200, lambda i: pairs[i % 8]).errors()) < 0.05


def test_a_bidirectional_trajectory_is_not():
    """The best affine function of a chunk's own state and all clean chunks before it leaves an error, for its end depends on later
    noise; of an autoregressive trajectory it leaves none."""
    batch, num = data(2000, 1), 2000
    noise, teacher = randn(num, C, F, 1, 1, seed=2), oracle()
    both = [teacher.solution(noise, s, batch.conditions) for s in (SIGMAS[1], 0.0)]
    forced = forced_states(batch, noise, 300)
    left = {}
    for name, x, end, past in (
        ("bidirectional", both[0], both[1], both[1]),
        ("autoregressive", forced[:, 1], forced[:, -1], batch.x0),
    ):
        j = 1  # two chunks follow it
        seen = torch.cat([x[:, :, j].flatten(1), past[:, :, :j].flatten(1), torch.ones(num, 1)], dim=1).double()
        target = end[:, :, j].flatten(1).double()
        fitted = seen @ torch.linalg.lstsq(seen, target).solution
        left[name] = float((fitted - target).square().mean())
    assert left["autoregressive"] < 1e-6
    assert left["bidirectional"] > 0.01


def consistency_of(student, teacher=None, **config) -> Consistency:
    return Consistency(consistency.Config(**config), student, teacher or ARGaussian(is_map=False, exact=True))


@pytest.mark.slow
@pytest.mark.parametrize(("config", "bound"), [({"num_steps": 192}, 0.03), ({"kind": "continuous"}, 1e-4)])
def test_consistency_learns_the_teacher_s_map(config, bound):
    """Continuous: exactly; discrete: to the Euler step's error (48 steps: 8 % of the variance, 192: 2 %)."""
    student = ARGaussian(is_map=True, exact=False)
    assert max(fit(consistency_of(student, **config), student, 300).errors()) < bound


def test_the_tangent_vanishes_at_the_solution_alone():
    batch, sigma = data(64, 1), strata((64, F), rng(4)).clamp(min=0.05)
    teacher = Forced(ARGaussian(is_map=False, exact=True), batch.x0)
    x = flow.add_noise(batch.x0, randn(64, C, F, 1, 1, seed=5), sigma)
    tangents = {}
    for exact in (True, False):
        student = ARGaussian(is_map=True, exact=exact)
        velocity = flow.velocity_from_x0(x, teacher.denoise(x, sigma, batch.conditions), sigma)
        method = consistency_of(student, kind="continuous")
        with torch.no_grad():
            tangents[exact] = method._tangent(x, velocity, sigma, batch.conditions, batch.x0)[:, :, 1:]
    assert tangents[True].abs().max() < 1e-4
    assert tangents[False].abs().mean() > 0.1


@pytest.mark.parametrize("prediction", ["velocity", "reference"])
def test_the_tangent_of_a_network_is_the_central_difference(prediction):
    """And no chunk's depends on another chunk's x or sigma."""
    student, given, clean = a_student(prediction=prediction), some_conditions(), some_latents(2, 8, seed=3)
    x, direction, sigma = some_latents(2, 8), some_latents(2, 8, seed=9), 0.2 + 0.6 * torch.rand(2, 4, generator=rng(1))
    method, h = consistency_of(student, kind="continuous"), 2e-5

    @torch.no_grad()
    def at(step: float) -> Tensor:
        return student.denoise_clip(x + step * direction, sigma + step, given, clean)

    with torch.no_grad():
        tangent = method._tangent(x, direction, sigma, given, clean)
        changed, other = x.clone(), sigma.clone()
        changed[:, :, :4], other[:, :2] = 0.0, 0.5
        moved = method._tangent(changed, direction, other, given, clean)
    difference = (at(h) - at(-h)) / (2 * h)
    assert (tangent - difference).norm() < 0.02 * difference.norm()
    assert torch.allclose(moved[:, :, 4:], tangent[:, :, 4:], atol=1e-3)
    assert not torch.allclose(moved[:, :, 2:4], tangent[:, :, 2:4], atol=1e-1)
    assert not tangent[:, :, 0].any()


def test_a_discrete_step_lands_on_the_next_grid_point():
    """Student at (x_s, s), teacher at the same, then the student without gradient at the Euler step's end, all given the data."""
    batch = a_train_set(4).batch(torch.arange(4))
    student, teacher = Recorder(torch.ones_like(batch.x0)), Recorder(2 * torch.ones_like(batch.x0))
    method = consistency_of(student, teacher, num_steps=6, guidance=Guidance(text=2.0, audio=2.0))
    loss = method.loss("student", batch, rng(1), rng(2))
    call, (first, second) = teacher.calls[0], student.calls
    assert len(teacher.calls) == 2, "guidance was not applied"
    assert torch.equal(call.x, first.x)
    assert torch.equal(call.sigma, first.sigma)
    assert all(torch.equal(call.clean, batch.x0) for call in (*teacher.calls, *student.calls))
    grid = flow.sigma_grid(6, 3.0)
    index = [[grid.index(pytest.approx(s)) for s in row] for row in first.sigma.tolist()]
    assert len({i for row in index for i in row}) > 3, "chunks share their sigma"
    assert second.sigma.tolist() == [pytest.approx([grid[i + 1] for i in row]) for row in index]
    s, end = (flow.expand(call.sigma.repeat_interleave(2, dim=1), batch.x0) for call in student.calls)
    assert torch.allclose(second.x, 2 + end / s * (first.x - 2), atol=1e-5)
    anchored = (end == 0).expand_as(batch.x0)[:, :, 1:].float().mean()
    assert 0 < anchored < 1
    assert torch.allclose(loss.value, anchored), (
        "the last interval's target is the teacher's x0, the others' the student's"
    )


def test_continuous_targets_are_a_step_along_the_tangent():
    """Targets are f - s df/ds / (rms + c); where sigma is below the anchor, the teacher's x0."""
    batch, student = data(32, 1), ARGaussian(is_map=True, exact=False)
    method = consistency_of(student, kind="continuous", anchor=0.3, softening=0.5)
    seen = {}

    def spy(x0_hat, target, start):
        seen.update(x0_hat=x0_hat, target=target)
        return (x0_hat - target).square()[:, :, start:].mean()

    keep = student.denoise_clip
    inputs = []
    student.denoise_clip = lambda x, s, c, clean: inputs.append((x, s)) or keep(x, s, c, clean)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(consistency.losses, "regression", spy)
        method.loss("student", batch, rng(1), rng(2))
    x, sigma = inputs[0]
    teacher_x0 = method.ar_teacher.denoise_clip(x, sigma, batch.conditions, batch.x0)
    low = (sigma <= 0.3)[:, None, :, None, None].expand_as(x)
    assert torch.equal(seen["target"][low][:1], teacher_x0[low][:1])
    assert torch.allclose(seen["target"][low], teacher_x0[low])
    student.denoise_clip = keep
    s = sigma[:, None, :, None, None]
    with torch.no_grad():
        tangent = s * method._tangent(x, (x - teacher_x0) / s, sigma, batch.conditions, batch.x0) * ~low
    rms = tangent[:, :, 1:].square().flatten(1).mean(1).sqrt().view(-1, 1, 1, 1, 1)
    step = seen["x0_hat"] - seen["target"]
    assert torch.allclose(step[~low], (tangent / (rms + 0.5))[~low], atol=1e-5)
    assert not seen["target"].requires_grad


@pytest.mark.parametrize("name", ["forcing", "forcing_noisy", "discrete", "continuous"])
def test_an_initialisation_trains_a_real_student(name):
    """Every weight of the student is reached, the teacher's none; a loss is a function of its generators."""
    student, teacher, batch = a_student(), a_student(seed=1), a_train_set().batch(torch.arange(2))
    if name.startswith("forcing"):
        method = Forcing(forcing.Config(context="noisy" if "noisy" in name else "clean"), student)
    else:
        method = Consistency(consistency.Config(kind=name), student, teacher)
    before = torch.random.get_rng_state()
    loss = method.loss("student", batch, rng(1), rng(2))
    loss.value.backward()
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())
    assert not any(p.grad is not None for p in teacher.parameters())
    assert torch.equal(loss.value, method.loss("student", batch, rng(1), rng(2)).value)
    assert not torch.equal(loss.value, method.loss("student", batch, rng(3), rng(2)).value)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert method.roles_to_update(3) == ("student",)


def test_what_the_initialisations_ask_for():
    assert forcing.needs(forcing.Config()).batch == "x0"
    assert consistency.needs(consistency.Config()).frozen == ("ar_teacher",)
    assert ode_init.needs(ode_init.Config()).batch == "trajectories"
    assert ode_init.needs(ode_init.Config(context="data")).batch == "forced"


def test_wrong_settings_are_one_line():
    level = Recorder(None, History(commit="same_level"))
    for build, words in (
        (lambda: forcing.build(forcing.Config(), {"student": level}), "forcing.context"),
        (lambda: consistency.build(consistency.Config(), {"student": level, "ar_teacher": None}), "consistency"),
        (lambda: ode_init.build(ode_init.Config(context="data"), {"student": level}, (*SIGMAS, 0.0)), "init.context"),
        (
            lambda: consistency.build(consistency.Config(num_steps=50), {"student": Recorder(None)}),
            "not on the teacher",
        ),
        (lambda: consistency.Config(num_steps=0), "consistency.num_steps"),
        (lambda: consistency.Config(anchor=0.0), "consistency.anchor"),
        (lambda: consistency.Config(softening=0.0), "consistency.softening"),
    ):
        with pytest.raises(UserError, match=rf"^[^\n]*{words}[^\n]*$"):
            build()
    forcing.build(forcing.Config(context="noisy"), {"student": level})
