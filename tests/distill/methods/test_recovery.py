"""Recovery from drift: the optimum under a perturbed past in closed form, what it spoils, and an adapter that is merged."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from distill.methods import Batch, build, needs
from distill.methods.recovery import Config, Recovery, perturb
from distill.methods.rollout import draw_noise, rollout
from distill.training.lora import LoraRoles, adapt, trained
from students.history import History
from students.networks.causal_wan import CausalWan
from students.schedule import Schedule
from students.spec import student_sigmas
from students.weights.adapter import fold
from teachers import flow
from teachers.conditions import Conditions
from teachers.errors import UserError
from tests.support.methods.gaussian import OneFrameStudent, Recorder, autoregressive
from tests.support.tiny import a_student, a_train_set, make_net, make_spec, randn, rng, some_conditions, some_latents

# Closed form ------------------------------------------------------------------------------------------------------------

C, F, RHO, SHIFT = 2, 4, 0.9, 1.0
MEAN = torch.tensor([[0.3, 0.8, -0.5, 0.4], [-0.2, -0.6, 0.5, 1.0]]).view(C, F, 1, 1)
VARIANCE = torch.tensor([1.0, 0.5])
SIGMAS = student_sigmas(3, 3.0)
ONLY_SHIFT = {"early": 2, "rolled": 0, "clean": 0.0, "noise": 0.0, "blur": 0.0, "contrast": 0.0, "shift": SHIFT}


class Affine(OneFrameStudent):
    """One-frame chunks of an AR(1) process, which see the chunk before: x0 = A x + P previous + R reference + b, all diagonal, for
    every chunk and denoising step. It starts as the exact denoiser under a clean past, or as the map of noise to samples that a
    few-step student is distilled to (`is_map`)."""

    def __init__(self, is_map: bool = False):
        super().__init__()
        history = History(sinks=0, window=1)
        self.spec = SimpleNamespace(
            guidance=None, history=history, history_noise=None, schedule=Schedule(), sigmas=SIGMAS, step="renoise",
            steps=lambda chunk: SIGMAS, chunk_frames=1, num_chunks=F, latent_size=(C, 1, 1),
        )  # fmt: skip
        mean = MEAN[..., 0, 0].T
        own, previous, bias = torch.zeros(3, F, len(SIGMAS), C)
        for j in range(1, F):
            for i in range(len(SIGMAS)):
                given = torch.tensor(RHO), torch.tensor(0.0), mean[j] - RHO * mean[j - 1]
                own[j, i], previous[j, i], _, bias[j, i] = weights(SIGMAS[i], *given, STEP, is_map)
        self.own, self.previous, self.bias = nn.Parameter(own), nn.Parameter(previous), nn.Parameter(bias)
        self.reference = nn.Parameter(torch.zeros(F, len(SIGMAS), C))

    def _x0(self, x: Tensor, past: Tensor, reference: Tensor, chunk, step) -> Tensor:
        """x, past and reference [.., C] of chunks at steps."""
        pairs = ((self.own, x), (self.previous, past), (self.reference, reference))
        return sum(weight[chunk, step] * value for weight, value in pairs) + self.bias[chunk, step]

    def denoise_clip(self, x, sigma, conditions, clean=None, level=None):
        assert level is None
        step = (sigma.unsqueeze(2) - torch.tensor(SIGMAS)).abs().argmin(2)  # [B, F]
        x, past, reference = (v[..., 0, 0].transpose(1, 2) for v in (x, clean.roll(1, 2), conditions.reference))
        x0 = self._x0(x, past, reference, torch.arange(F), step)
        return torch.cat([reference, x0[:, 1:]], dim=1).transpose(1, 2)[..., None, None]

    def denoise(self, state, plan, x, sigma, conditions, step):
        if state[0] == 0:
            return conditions.reference, None
        parts = (v.flatten(1) for v in (x, state[1], conditions.reference))
        return self._x0(*parts, state[0], step).view_as(x), None


STEP = (1 - RHO**2) * VARIANCE
"""The variance of a frame given the one before."""


def weights(
    s: float, past: Tensor, reference: Tensor, bias: Tensor, variance: Tensor, is_map=False
) -> tuple[Tensor, ...]:
    """A, P, R, b of E[x0 | x_s], where x0 is N(past * previous + reference * reference + bias, variance), or of the map along the
    ODE, which keeps that variance."""
    spread = (1 - s) ** 2 * variance + s**2
    gain = (variance / spread).sqrt() if is_map else (1 - s) * variance / spread
    return gain, *((1 - gain * (1 - s)) * part for part in (past, reference, bias))


def optimum(s: float) -> tuple[Tensor, ...]:
    """The denoiser of frame 2 given the reference (frame 0) and frame 1 with a shift of standard deviation SHIFT."""
    mean = MEAN[..., 0, 0].T
    known = STEP / (STEP + SHIFT**2)  # of frame 1, how much of what is seen is believed
    bias = mean[2] - RHO * (mean[1] - (1 - known) * (mean[1] - RHO * mean[0]))
    variance = RHO**2 * (1 - known) * STEP + STEP
    return weights(s, RHO * known, RHO * RHO * (1 - known), bias, variance)


def data(batch: int, seed: int) -> Batch:
    reference = MEAN[:, :1] + VARIANCE.sqrt().view(C, 1, 1, 1) * randn(batch, C, 1, 1, 1, seed=seed)
    given = Conditions(text=torch.zeros(batch, 1, 1), audio=torch.zeros(batch, F, 1, 1), reference=reference)
    clips = autoregressive(MEAN, torch.diag(VARIANCE), RHO).sample(given, rng(seed, 3)).float()
    return Batch(conditions=given, x0=clips)


def recovered(target: str, is_map: bool = False, num_steps: int = 400) -> Affine:
    student = Affine(is_map)
    method = Recovery(Config(target=target, **ONLY_SHIFT), student, Affine(is_map) if target == "ar_teacher" else None)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.03, betas=(0.8, 0.95))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for i in range(num_steps):
        optimizer.zero_grad()
        method.loss("student", data(512, i), rng(i), rng(i, 1)).value.backward()
        optimizer.step()
        decay.step()
    return student


def drift(student: Affine, shift: float) -> Tensor:
    """How far streams whose frame 1 is shifted are from those of the same noise whose is not, at frames 2 and 3."""
    given, found = data(512, 9).conditions, []
    for delta in (shift, 0.0):

        def corrupt(j, own, delta=delta):
            return own + delta if j == 1 else own

        with torch.no_grad():
            found.append(rollout(student, given, draw_noise(student, 512, rng(4)), start=2, corrupt=corrupt))
    return (found[0] - found[1]).abs().mean(dim=(0, 1, 3, 4))


def spread(student: Affine) -> Tensor:
    """Standard deviations of frame 2 of streams with one past, over the process's own."""
    given = data(1, 9).conditions.index(torch.zeros(4096, dtype=torch.long))
    with torch.no_grad():
        found = rollout(student, given, draw_noise(student, 4096, rng(4)), start=2, corrupt=lambda j, own: 0 * own)
    return found[:, :, 0].flatten(1).std(0) / STEP.sqrt()


@pytest.mark.slow
def test_a_few_step_student_keeps_its_samples_where_its_own_are_the_target():
    """It forgets most of a shift either way (measured: 0.90 and 0.81 to 0.11 and 0.01, on data to 0.11 and 0.04). On data its
    samples become means: their spread falls from 1.0 to 0.4; where its own samples are the target it is 1.1."""
    before = Affine(is_map=True)
    own, on_data = recovered("ar_teacher", is_map=True), recovered("data", is_map=True)
    assert (drift(own, 1.0) < 0.2 * drift(before, 1.0)).all()
    assert (drift(on_data, 1.0) < 0.2 * drift(before, 1.0)).all()
    assert (spread(before) - 1).abs().max() < 0.05
    assert (spread(own) - 1).abs().max() < 0.2
    assert spread(on_data).max() < 0.6


@pytest.mark.parametrize("target", [pytest.param("data", marks=pytest.mark.slow), "ar_teacher"])
def test_the_student_ends_at_the_best_denoiser_under_a_spoilt_past(target):
    """At each of its own steps, whichever target; its streams forget a shift that the student before carried on."""
    student, before = recovered(target), Affine()
    for i, s in enumerate(SIGMAS):
        found = (student.own, student.previous, student.reference, student.bias)
        for parameter, exact, old in zip(
            found, optimum(s), (before.own, before.previous, before.reference, before.bias), strict=True
        ):
            assert (parameter[2, i] - exact).abs().max() < 0.04, (s, parameter[2, i], exact, old[2, i])
    carried, left = drift(before, 1.0), drift(student, 1.0)
    assert (left < 0.5 * carried).all(), (left, carried)
    for unused in (student.own, student.previous, student.bias, student.reference):
        assert unused.grad is not None
        assert not unused.grad[:2].any(), "a loss on what was perturbed"
    with torch.no_grad():
        assert student.previous[2].abs().max() < before.previous[2].abs().max()


def test_a_clean_past_alone_leaves_an_exact_student_where_it_is():
    student = Affine()
    method = Recovery(Config(**(ONLY_SHIFT | {"clean": 1.0})), student)
    loss = method.loss("student", data(200_000, 1), rng(1), rng(2))
    loss.value.backward()
    grads = torch.stack([p.grad[2:] for p in (student.own, student.previous, student.bias)])
    assert grads.abs().max() < 5e-3
    method = Recovery(Config(**ONLY_SHIFT), student)
    student.zero_grad()
    method.loss("student", data(200_000, 1), rng(1), rng(2)).value.backward()
    assert student.previous.grad[2:].abs().max() > 0.05


# The past ---------------------------------------------------------------------------------------------------------------


def test_the_first_chunks_are_perturbed_and_the_rest_is_the_student_s_own():
    """Two chunks of two frames are perturbed, but not the reference; the third is rolled out behind them, the last one stays."""
    batch, student = a_train_set(16).batch(torch.arange(16)), Recorder(a_student())
    method = Recovery(Config(early=2, rolled=1, clean=0.4), student)
    method.loss("student", batch, rng(1), rng(2))
    (call,) = student.calls
    x0, past = batch.x0, call.clean
    changed = (past != x0).flatten(3).any(3).any(1)  # [B, F]
    perturbed = changed.any(1)
    assert 0 < perturbed.sum() < 16, "clean rows and others"
    assert torch.equal(perturbed, torch.rand(16, generator=rng(2)) >= 0.4), "which rows is not the same on every rank"
    assert changed[perturbed].tolist() == [[False] + [True] * 5 + [False] * 2] * int(perturbed.sum())
    levels = torch.tensor(student.spec.sigmas)
    assert set(call.sigma.flatten().tolist()) == set(levels.tolist()), "not the student's own sigmas"
    eps = (call.x - (1 - flow.expand(call.sigma.repeat_interleave(2, 1), x0)) * x0) / flow.expand(
        call.sigma.repeat_interleave(2, 1), x0
    )
    assert float(eps.std()) == pytest.approx(1.0, abs=0.05)
    # behind the same past the third chunk is what a stream of the student is
    rows = perturbed.nonzero().flatten()
    draws = rng(1)
    torch.randint(3, (16, 4), generator=draws)
    torch.randn(x0.shape, generator=draws)
    perturb(x0[rows, :, :4], method.config, draws)
    noise = draw_noise(student, len(rows), draws)
    given = batch.conditions.index(rows).frames(0, 6)
    with torch.no_grad():
        own = rollout(student, given, noise, start=2, corrupt=lambda j, _: past[rows, :, 2 * j : 2 * j + 2])
    assert torch.allclose(past[rows, :, 4:6], own, atol=1e-5)


@pytest.mark.parametrize("part", ["noise", "blur", "shift", "contrast"])
def test_a_perturbation_is_as_large_as_asked(part):
    x0 = randn(400, 3, 2, 8, 8, seed=1) + 1.0
    off = dict.fromkeys(("noise", "blur", "shift", "contrast"), 0.0)
    assert torch.allclose(perturb(x0, Config(**off), rng(1)), x0, atol=1e-6)
    found = perturb(x0, Config(**(off | {part: 0.5})), rng(1))
    assert torch.equal(found, perturb(x0, Config(**(off | {part: 0.5})), rng(1)))
    mean, spread = (found - x0).mean(dim=(2, 3, 4)), found.std(dim=(2, 3, 4)) / x0.std(dim=(2, 3, 4))
    if part == "shift":
        assert float(mean.std()) == pytest.approx(0.5, rel=0.1)
        assert torch.allclose(found - mean.view(400, 3, 1, 1, 1), x0, atol=1e-5)
    elif part == "contrast":
        assert float(spread.log().std()) == pytest.approx(0.5, rel=0.1)
        assert mean.abs().max() < 1e-5
    elif part == "blur":
        assert spread.max() < 1.001
        assert 0.45 < spread.min() < 0.65, "at most half of it is the mean of nine"
    else:
        sigma = 1 - found.mean(dim=(1, 2, 3, 4)) / x0.mean(dim=(1, 2, 3, 4))
        assert float(sigma.mean()) == pytest.approx(0.25, abs=0.02)


def test_wrong_settings_are_one_line():
    roles = {"student": a_student()}
    for make, words in (
        (lambda: Config(early=0), "recovery.early, rolled: got 0, 1"),
        (lambda: Config(clean=1.5), "recovery.clean, noise, blur"),
        (lambda: Config(shift=-1.0), "recovery.shift, contrast"),
        (lambda: build(Config(early=2, rolled=2), roles, ()), "of a clip's 4 chunks"),
        (lambda: build(Config(), {"student": a_student(History(commit="same_level"))}, ()), "clean history"),
        (lambda: LoraRoles(scale=0.5, full=("audio_proj",)), "lora.scale: got 0.5, but audio_proj is trained whole"),
    ):
        with pytest.raises(UserError, match=rf"^[^\n]*{words}[^\n]*$"):
            make()
    assert needs(Config()).frozen == ()
    assert needs(Config(target="ar_teacher")).frozen == ("ar_teacher",)


# The adapter ------------------------------------------------------------------------------------------------------------

LORA = LoraRoles(rank=8, alpha=8.0)


def gaps(student: CausalWan, base: CausalWan, past: Tensor) -> tuple[float, float]:
    """Mean square distance, at its sigmas, of a student under a perturbed and a clean past from the base under the clean one."""
    x0, given, sigma = some_latents(16, 8, 40), some_conditions(16, 8, 40), torch.tensor(base.spec.sigmas)
    sigma = sigma[torch.randint(3, (16, 4), generator=rng(5))]
    x = flow.add_noise(x0, randn(*x0.shape, seed=6), sigma.repeat_interleave(2, 1))
    with torch.no_grad():
        wanted = base.denoise_clip(x, sigma, given, x0)
        found = (student.denoise_clip(x, sigma, given, seen) - wanted for seen in (past, x0))
        perturbed, clean = (float(error[:, :, 4:].square().mean()) for error in found)
    return perturbed, clean


@pytest.mark.slow
def test_an_adapter_recovers_keeps_what_the_student_could_and_is_merged(tmp_path):
    """Under a perturbed past it comes nearer to what the frozen student does under a clean one, where it stays near it; no
    weight of that student moves, and the adapter's fold at scale 1 is the adapted student, at 0 the student before."""
    spec = make_spec(prediction="reference")
    net = make_net(0, "reference").requires_grad_(False)
    kept, base = copy.deepcopy(net.state_dict()), CausalWan(net, spec)
    student = CausalWan(adapt(net, LORA, 0, "student"), spec)
    config = Config(target="ar_teacher", noise=0.6, shift=1.0, contrast=0.5, clean=0.5)
    method, pool = Recovery(config, student, base), a_train_set(256)
    past = method._past(some_latents(16, 8, 40), some_conditions(16, 8, 40), rng(7), rng(3))
    before, nothing = gaps(student, base, past)
    assert nothing == 0.0, "a fresh adapter changes something"
    optimizer = torch.optim.Adam(trained(student.net).values(), lr=4e-3)
    for i in range(60):
        optimizer.zero_grad()
        rows = torch.randint(256, (16,), generator=rng(i, 2))
        method.loss("student", pool.batch(rows), rng(i), rng(i, 1)).value.backward()
        optimizer.step()
    after, clean = gaps(student, base, past)
    assert after < 0.7 * before, (before, after, clean)
    assert clean < 0.3 * before, (before, after, clean)
    assert all(torch.equal(value, kept[name]) for name, value in net.state_dict().items())
    tensors = {name: p.detach() for name, p in trained(student.net).items()}
    for scale in (0.0, 0.5, 1.0):
        merged = copy.deepcopy(net)
        fold(merged, LORA.adapter(tensors, scale), tmp_path)
        found = gaps(CausalWan(merged, spec), base, past)
        if scale == 0.0:
            assert found == (before, 0.0)
        elif scale == 1.0:
            assert found == pytest.approx((after, clean), rel=1e-3)
        else:
            assert found[0] < before
            assert found[1] < clean, "half an adapter moves the student as far as all of it"
    assert replace(LORA, scale=0.5).adapter(tensors).alpha == LORA.alpha, "training knows of no scale"
