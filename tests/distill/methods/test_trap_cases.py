"""Numeric traps of published code that no other test holds (tests/distill/methods/test_traps.py lists all of them)."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from distill.compose import RECIPES
from distill.methods import Batch, dmd, losses
from distill.methods.rollout import draw_noise, rollout
from distill.pipeline.generate import solve_states
from distill.recipe import load_recipe, spec_of
from students.history import History
from students.serving.optimize import cast
from students.spec import student_sigmas
from teachers import flow
from teachers.codecs.wan_vae import WanVAE
from teachers.guidance import Guidance
from teachers.networks.spans import rotate
from teachers.networks.wan import with_reference
from tests.students.test_student import leaves
from tests.support.tiny import (
    CHANNELS,
    TEXT,
    TOKENS,
    a_student,
    a_teacher,
    make_net,
    randn,
    rng,
    some_conditions,
    some_latents,
)
from tests.teachers.codecs.test_wan_vae import a_video, network
from tests.teachers.codecs.test_wan_vae import some_latents as vae_latents

BF16_ROUNDING = 2**-8 * 1.01  # largest relative error of one rounding to bf16
PUBLISHED = [625.0, 833.33, 937.5, 1000.0]  # four steps, shift 5; in bf16 they would be 624, 832, 936, 1000


def inputs_of(module) -> list[Tensor]:
    """What a module is called with from now on."""
    seen: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    return seen


# ---- time and noise


@pytest.mark.parametrize("arithmetic", ["fp32", "bf16 weights", "autocast"])
def test_the_network_gets_the_published_times_unrounded(arithmetic):
    """Traps 2, 3 and 11: true times, not indices of a table and not rounded to bf16; the known frame has the time of its chunk."""
    sigmas, given, x = student_sigmas(4, 5.0), some_conditions(), some_latents()
    student, teacher = a_student(sigmas=sigmas), a_teacher()
    if arithmetic == "bf16 weights":
        cast(student.net, torch.bfloat16)
        cast(teacher.net, torch.bfloat16)

    def times_of(net, act) -> list[float]:
        seen = inputs_of(net.condition_embedder.timesteps_proj)
        with torch.autocast("cpu", torch.bfloat16) if arithmetic == "autocast" else nullcontext():
            act()
        return sorted({round(float(time), 2) for time in torch.cat(seen)})

    def stream():
        rollout(student, given, draw_noise(student, 2, rng(1)))

    levels = torch.tensor(sigmas).expand(2, -1)
    assert times_of(student.net, stream) == [0.0, *PUBLISHED], "with gradient"
    assert times_of(student.net, torch.no_grad()(stream)) == [0.0, *PUBLISHED]
    assert times_of(student.net, lambda: student.denoise_clip(x, levels, given)) == PUBLISHED
    solve = flow.sigma_grid(4, 5.0)
    assert times_of(teacher.net, lambda: solve_states(teacher, given, x, solve, (4,), Guidance())) == PUBLISHED


@torch.no_grad()
def test_the_context_pass_sees_x0_itself_at_time_zero():
    """Trap 6: a looked-up sigma of t = 0 is 0.005, and its add_noise no identity."""
    student, given = a_student(), some_conditions()
    entered, n, num_steps = inputs_of(student.net.patch_embedding), student.spec.chunk_frames, len(student.spec.sigmas)
    x0 = rollout(student, given, draw_noise(student, 2, rng(1)))
    committed = entered[num_steps :: num_steps + 1]
    assert len(committed) == student.spec.num_chunks - 1, "the last chunk is no context"
    for i, inputs in enumerate(committed):
        assert torch.equal(inputs[:, :CHANNELS], x0[:, :, i * n : (i + 1) * n])
    part = given.frames(0, n)
    entry = student.commit(student.open(given.text), x0[:, :, :n], part).cached[0]
    _, cache = student.net(committed[0], torch.zeros(2), given.text, part.audio)
    assert torch.allclose(entry.keys[0], torch.stack([key for key, _ in cache]), atol=1e-6)
    _, cache = student.net(committed[0], torch.full((2,), 0.00498), given.text, part.audio)
    assert not torch.allclose(entry.keys[0], torch.stack([key for key, _ in cache]), atol=1e-4)


def test_the_levels_of_dmd_s_scores_have_the_published_distribution(monkeypatch):
    """Trap 7: uniform, shifted by 5, clamped to 20 .. 980, one a clip: mean 746, 9.2 % of them 980, 0.4 % 20."""
    count, seen = 20_000, []
    monkeypatch.setattr(dmd, "rollout", lambda *_, **__: torch.zeros(count, 1, 2, 1, 1))
    monkeypatch.setattr(dmd, "draw_noise", lambda *_, **__: None)
    given = some_conditions(1, 8).index(torch.zeros(count, dtype=torch.long))

    def denoise(x, sigma, conditions):
        seen.append(sigma)
        return x

    method = dmd.DMD(dmd.Config(shift=5.0), a_student(), a_teacher(), SimpleNamespace(denoise=denoise))
    method.loss("fake_score", Batch(conditions=given), rng(1), rng(2))
    (sigma,) = seen
    assert sigma.shape == (count,)
    assert float(sigma.mean()) == pytest.approx(0.746, abs=0.005)
    assert float((sigma == 0.98).float().mean()) == pytest.approx(0.092, abs=0.006)
    assert float((sigma == 0.02).float().mean()) == pytest.approx(0.004, abs=0.002)


@pytest.mark.parametrize("name", ["livetalk", "self_forcing"])
def test_the_published_recipes_have_the_published_grid_and_betas(name):
    """Traps 2, 4, 5 and 37: four steps of shift 5 among the solver's, and DMD's Adam without momentum."""
    recipe = load_recipe(RECIPES / f"{name}.yaml", ["teacher.path=/nothing"])
    spec = spec_of(recipe)
    assert [round(1000 * sigma, 2) for sigma in spec.sigmas] == PUBLISHED[::-1]
    assert flow.on_grid(spec.sigmas, flow.sigma_grid(recipe.trajectories.num_steps, recipe.trajectories.shift))
    assert recipe.distill.method.shift == recipe.trajectories.shift
    assert {role: o.betas for role, o in recipe.init.train.optimizers.items()} == {"student": (0.9, 0.999)}
    betas = {"student": (0.0, 0.999), "fake_score": (0.0, 0.999)}
    assert {role: o.betas for role, o in recipe.distill.train.optimizers.items()} == betas


# ---- what is given: reference and text


@torch.no_grad()
def test_the_reference_is_written_into_a_copy():
    """Trap 12: the noise that was drawn is the noise that is stored, and the next step's."""
    student, teacher, given = a_student(), a_teacher(), some_conditions()
    n, sigma, levels = student.spec.chunk_frames, torch.tensor([0.9, 0.4]), torch.full((2, 4), 0.7)
    part, state = given.frames(0, n), student.open(given.text)
    acts = {
        "with_reference": lambda x: with_reference(x, given),
        "teacher": lambda x: teacher.denoise(x, sigma, given),
        "solver": lambda x: solve_states(teacher, given, x, flow.sigma_grid(2, 3.0), (0, 2), Guidance(audio=2.0)),
        "chunk": lambda x: student.denoise(state, None, x[:, :, :n], 0.5, part),
        "commit": lambda x: student.commit(state, x[:, :, :n], part),
        "clip": lambda x: student.denoise_clip(x, levels, given, x),
        "rollout": lambda x: rollout(student, given, lambda chunk, _: x[:, :, chunk * n : (chunk + 1) * n]),
    }
    x = some_latents()
    for name, act in acts.items():
        act(x)
        assert torch.equal(x, some_latents()), name
    assert not torch.equal(x[:, :, :1], given.reference)


def test_trajectories_and_dmd_have_one_unconditional_branch():
    """Trap 39: the negative prompt stands in the text's place wherever guidance drops it; audio is dropped with it."""
    negative = randn(2, TOKENS, TEXT, seed=77)
    given, guidance = replace(some_conditions(), negative=negative), Guidance(text=2.0, audio=2.0)
    branches: list[tuple[bool, bool]] = []

    def denoise(x, sigma, conditions):
        texts = [torch.equal(conditions.text, text) for text in (given.text, negative)]
        branches.append((texts.index(True) == 1, not conditions.audio.any()))
        return 0.5 * x

    teacher = SimpleNamespace(denoise=denoise)
    solve_states(teacher, given, some_latents(), flow.sigma_grid(2, 3.0), (2,), guidance)
    assert branches == [(False, False), (True, True)] * 2
    branches.clear()
    method = dmd.DMD(dmd.Config(guidance=guidance), a_student(), teacher, a_teacher(2))
    method.loss("student", Batch(conditions=given), rng(1), rng(2))
    assert branches == [(False, False), (True, True)]


# ---- precision


@torch.no_grad()
def test_rotations_are_those_of_fp64_at_far_positions():
    """Trap 19: 44, 42, 42 channels for time, rows, columns; in bf16 the rotation costs the rounding of its result alone."""
    net = make_net(num_heads=1, head_dim=128)
    cast(net, torch.bfloat16)
    angles = []
    for place in torch.cartesian_prod(torch.arange(1000, 1004), torch.arange(3), torch.arange(5)).double():
        axes = zip(place, (44, 42, 42), strict=True)
        angles.append(torch.cat([at * 10000.0 ** (-torch.arange(0, n, 2).double() / n) for at, n in axes]))
    exact = torch.polar(torch.ones(60, 64, dtype=torch.float64), torch.stack(angles)).view(1, 60, 1, 64)
    table = net.rope_table(1000, 4, 3, 5)
    assert (table - exact).abs().max() < 1e-6
    x = randn(2, 60, 1, 128).bfloat16()
    turned = torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * exact).flatten(-2)
    off = (rotate(x, table).double() - turned).abs()
    assert (off <= BF16_ROUNDING * turned.abs() + 1e-5).all()


@torch.no_grad()
def test_a_bf16_network_norms_and_modulates_in_fp32():
    """Trap 19: LayerNorm and modulation cost one rounding, RMSNorm over the full width at most two."""
    net = make_net()
    cast(net, torch.bfloat16)
    block, caught = net.blocks[0], {}
    block.register_forward_pre_hook(lambda _, inputs: caught.update(x=inputs[0], temb=inputs[2]))
    block.attn1.to_q.register_forward_pre_hook(lambda _, inputs: caught.update(normed=inputs[0]))
    block.attn1.norm_q.register_forward_hook(lambda _, inputs, out: caught.update(query=inputs[0], rms=out))
    given, x = some_conditions(), some_latents()
    net(with_reference(x, given)[1], torch.tensor([0.9, 0.4]), given.text, given.audio)
    assert caught["x"].dtype == caught["normed"].dtype == caught["rms"].dtype == torch.bfloat16
    assert caught["temb"].dtype == torch.float32

    x, (shift, scale) = caught["x"].double(), caught["temb"][:, :1].double().unbind(2)[:2]
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift
    assert ((caught["normed"] - expected).abs() <= BF16_ROUNDING * expected.abs() + 1e-5).all()

    query = caught["query"].double()
    expected = query / (query.square().mean(-1, keepdim=True) + 1e-6).sqrt() * block.attn1.norm_q.weight.double()
    assert ((caught["rms"] - expected).abs() <= 2 * BF16_ROUNDING * expected.abs() + 1e-5).all()


@torch.no_grad()
@pytest.mark.parametrize("arithmetic", ["bf16 weights", "autocast"])
def test_the_velocity_survives_x0_at_small_sigma(arithmetic):
    """Trap 32: x0 is fp32 whatever the network computes in; an x0 in bf16 would cost 0.01 of squared velocity."""
    teacher, given, x, sigma = a_teacher(), some_conditions(), some_latents(), torch.full((2,), 0.02)
    if arithmetic == "bf16 weights":
        cast(teacher.net, torch.bfloat16)
    gave = []
    teacher.net.register_forward_hook(lambda _, inputs, out: gave.append(out[0]))
    with torch.autocast("cpu", torch.bfloat16) if arithmetic == "autocast" else nullcontext():
        x0 = teacher.denoise(x, sigma, given)
    assert gave[0].dtype == torch.bfloat16
    assert x0.dtype == torch.float32

    def lost(x0: Tensor) -> float:
        return float((flow.velocity_from_x0(x, x0, sigma) - gave[0].float())[:, :, 1:].square().mean())

    assert lost(x0) < 1e-8 < 1e-3 < lost(x0.bfloat16())


def test_a_small_dmd_gradient_survives_a_bf16_x0():
    """Trap 33: x - (x - g) in bf16 is 0 where |g| is below 0.4 % of |x|."""
    x0, gradient = (3 + some_latents().abs()).bfloat16().requires_grad_(), 2e-3 * some_latents(seed=1)
    losses.surrogate(x0, gradient).backward()
    assert x0.grad is not None
    assert torch.allclose(x0.grad.float() * x0.numel(), gradient, rtol=1e-2, atol=1e-5)
    swallowed = x0.detach() - (x0.detach() - gradient.bfloat16())
    assert float((swallowed == 0).float().mean()) > 0.9


def test_a_perfect_student_has_a_finite_gradient():
    """Trap 34: the normaliser is |x0 - real|, which goes to 0."""
    x0 = some_latents()
    assert not losses.dmd_gradient(x0, x0, x0).any()
    assert torch.isfinite(losses.dmd_gradient(x0, x0, x0 + 1e-6)).all()


# ---- who sees whom, and what is recomputed


@torch.no_grad()
@pytest.mark.parametrize("path", ["stream", "clip", "clip on clean context"])
def test_the_frames_of_a_chunk_see_each_other_both_ways(path):
    """Trap 22: causal from chunk to chunk, not from frame to frame."""
    n = 3
    student = a_student(History(sinks=1, window=None), chunk_frames=n, horizon_frames=2 * n)
    given, x, clean = some_conditions(2, 2 * n), some_latents(2, 2 * n), some_latents(2, 2 * n, seed=1)

    def run(x: Tensor) -> Tensor:
        if path != "stream":
            return student.denoise_clip(x, torch.full((2, 2), 0.7), given, clean if "clean" in path else None)
        state = student.commit(student.open(), clean[:, :, :n], given.frames(0, n))
        return student.denoise(state, None, x[:, :, n:], 0.7, given.frames(n, 2 * n))[0]

    out = run(x)[:, :, -n:]
    for changed in (n, 2 * n - 1):
        other = x.clone()
        other[:, :, changed] += 1.0
        moved = (run(other)[:, :, -n:] - out).abs().mean((0, 1, 3, 4))
        assert (moved > 1e-3).all(), f"frame {changed - n} of the chunk reaches {moved.tolist()}"


def test_an_evicting_context_gives_the_same_gradients_under_checkpointing():
    """Trap 27: a recomputed block sees the context that it saw, although chunks have left the window since."""
    history, chunks = History(sinks=1, window=1), 5
    assert history.visible(chunks - 1) == (0, chunks - 2)
    student, found = a_student(history, horizon_frames=2 * chunks), []
    noise, _ = leaves(student)
    for on in (False, True):
        (student.net.enable_gradient_checkpointing if on else student.net.disable_gradient_checkpointing)()
        student.zero_grad()
        rollout(student, some_conditions(2, 2 * chunks), noise, 1)[:, :, 1:].square().mean().backward()
        found.append({name: p.grad.clone() for name, p in student.named_parameters()})
    assert all(grad.any() for grad in found[0].values())
    assert all(torch.allclose(found[1][name], grad, rtol=1e-5, atol=1e-7) for name, grad in found[0].items())


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_checkpointing_recomputes_whatever_the_mode(mode):
    """Trap 28: `model.eval()` and `if self.training and checkpoint` together keep every activation."""
    teacher = a_teacher()
    getattr(teacher, mode)()
    teacher.net.enable_gradient_checkpointing()
    calls = [inputs_of(block) for block in teacher.net.blocks]
    out = teacher.denoise(some_latents(), torch.tensor([0.9, 0.4]), some_conditions())
    assert [len(seen) for seen in calls] == [1, 1]
    out.square().mean().backward()
    assert [len(seen) for seen in calls] == [2, 2]


# ---- codec


def test_the_library_s_tiling_never_reaches_the_codec():
    """Trap 18: tiles shift the colours; OmniAvatar's default is tiled."""
    tiled = copy.deepcopy(network())
    tiled.enable_tiling(16, 16, 8, 8)
    latents, video = vae_latents(batch=1, frames=2), a_video(frames=5)
    with torch.no_grad():
        for ours, theirs in (
            (lambda net: WanVAE(net).decode(latents), lambda net: net.decode(latents).sample),
            (lambda net: WanVAE(net).encode(video), lambda net: net.encode(video).latent_dist.mode()),
        ):
            assert not torch.allclose(theirs(tiled), theirs(network()), atol=1e-2), "tiles change nothing here"
            assert torch.equal(ours(tiled), ours(network()))
