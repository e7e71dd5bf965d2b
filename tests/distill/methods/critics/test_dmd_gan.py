"""DMD2's discriminator: the GAN term, whose gradient reaches whom, and what it learns."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import softplus

from distill.methods import Batch, dmd, losses
from distill.methods.critics.discriminator import Discriminator, hidden_tokens
from distill.methods.dmd import Config, Rollouts
from teachers import flow
from tests.distill.methods.test_dmd import a_batch, cell_dmd, gradients, make_dmd, scorer, sound
from tests.support.methods.gaussian import autoregressive
from tests.support.tiny import (
    a_teacher,
    randn,
    rng,
    some_conditions,
    some_latents,
)


def exact_discriminator(real, fake):
    """logit = log p_real(x_s) - log p_fake(x_s) of Gaussian oracles, up to a constant."""

    def energy(teacher, x, sigma, conditions):
        s = sigma.double().unsqueeze(1)
        mean = teacher.expectation(conditions).flatten(1)[:, ~teacher.given]
        centred = (x.double().flatten(1)[:, ~teacher.given] - (1 - s) * mean) @ teacher.vectors
        spread = (1 - s) ** 2 * teacher.values + s**2
        return -0.5 * (centred.square() / spread + spread.log()).sum(1)

    return lambda net, x, sigma, c, train=False: energy(real, x, sigma, c) - energy(fake, x, sigma, c)


def test_the_gan_term_is_the_score_difference_weighed_by_1_minus_d():
    """d softplus(-logit) / d x0 = -(1 - D) (1 - s) (score_real - score_fake), scores from Tweedie on the exact denoisers."""
    mean, spatial = torch.linspace(-1, 1, 8).view(2, 4, 1, 1), torch.tensor([[1.0, 0.3], [0.3, 0.8]])
    real, fake = autoregressive(mean, spatial, 0.7), autoregressive(mean + 0.5, 2 * spatial, 0.2)
    method = cell_dmd(exit_step="last")
    method.config = replace(method.config, gan=3.0)
    method.discriminator = exact_discriminator(real, fake)
    method.teacher = method.fake_score = scorer([])  # dmd's own gradient vanishes
    given, sigma, eps = sound(5, 4), torch.linspace(0.2, 0.9, 5), randn(5, 2, 4, 1, 1, seed=1)
    x0 = randn(5, 2, 4, 1, 1, seed=2).requires_grad_()
    method._student(Rollouts(x0, sigma.flip(0), sigma, eps, given, Batch(given))).value.backward()
    x = flow.add_noise(x0.detach(), eps, sigma)
    s = flow.expand(sigma, x)
    scores = [((1 - s) * net.denoise(x, sigma, given) - x) / s**2 for net in (real, fake)]
    logit = method.discriminator(None, x, sigma, given).view(-1, 1, 1, 1, 1)
    expected = -3.0 * torch.sigmoid(-logit) * (1 - s) * (scores[0] - scores[1]) / 5
    assert torch.allclose(x0.grad[:, :, 1:], expected[:, :, 1:].float(), atol=1e-5)


@pytest.mark.parametrize("role", ["student", "fake_score", "discriminator"])
def test_a_gradient_reaches_its_own_role_only(role):
    method = make_dmd(gan=0.1)
    loss = method.loss(role, a_batch(), rng(1), rng(2))
    loss.value.backward()
    names = ("student", "teacher", "fake_score", "discriminator")
    reached = {name for name in names if any(g is not None and g.any() for g in gradients(getattr(method, name)))}
    assert reached == {role}
    assert all(g is not None and g.any() for g in gradients(getattr(method, role)))
    assert all(not value.requires_grad for value in loss.metrics.values())


def test_the_critic_trains_the_fake_score_by_its_two_losses():
    """Spelt out: the denoising loss on rollouts, and `gan_critic` times softplus(-logit) of data and softplus(logit) of rollouts,
    which lie under one noise at a sigma of their own shift; logits of the frames that are generated."""
    batch, found, made = a_batch(), [], make_dmd(gan=0.1, gan_critic=0.7, shift=3.0)
    made.discriminator.requires_grad_(False)  # as the trainer does, of all roles but the one that is updated
    for plainly in (False, True):
        method, own, shared = copy.deepcopy(made), rng(1), rng(2)
        if plainly:
            value = plain_critic(method, batch, own, shared)
        else:
            value = method.loss("fake_score", batch, own, shared).value
        value.backward()
        found.append([value.detach(), *gradients(method.fake_score)])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*found, strict=True))


def plain_critic(method, batch, own, shared):
    with torch.no_grad():
        x0, given = method._generate(batch.conditions, own, shared)
    raw, eps = torch.rand(2, generator=own), torch.randn(x0.shape, generator=own)
    sigma, low = flow.shift_sigma(raw, 3.0).clamp(0.02, 0.98), raw.clamp(0.02, 0.98)
    net, judge, logits = method.fake_score, method.discriminator, []
    x0_hat = net.denoise(flow.add_noise(x0, eps, sigma), sigma, given)
    for clip in (batch.x0, x0):
        kept = []
        handles = [
            block.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out[0])) for block in net.net.blocks
        ]
        net.denoise(flow.add_noise(clip, eps, low), low, given)
        for handle in handles:
            handle.remove()
        heads = [head(tokens).squeeze(2)[:, 4:] for head, tokens in zip(judge.heads, kept, strict=True)]
        logits.append(torch.stack(heads, dim=1))
    real, fake = (softplus(sign * logit).mean() for sign, logit in zip((-1, 1), logits, strict=True))
    return losses.denoising(x0_hat, x0, sigma, 1.0, 0.02) + 0.7 * (real + fake)


def test_the_gradient_vanishes_where_the_scores_agree():
    method = make_dmd()
    method.fake_score = copy.deepcopy(method.teacher)
    method.loss("student", a_batch(), rng(1), rng(2)).value.backward()
    assert not any(g.any() for g in gradients(method.student))


def test_tokens_are_the_blocks_own_and_checkpointing_changes_nothing():
    net, given, x, sigma = a_teacher(), some_conditions(), some_latents(), torch.tensor([0.3, 0.6])
    kept = hidden_tokens(net, (0, 1), x, sigma, given)
    assert [tuple(tokens.shape) for tokens in kept] == [(2, 8 * 4, 32)] * 2
    assert not torch.equal(*kept)
    assert not any(block._forward_hooks for block in net.net.blocks)
    judge = Discriminator(32, (0, 1), 16)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            net.net.enable_gradient_checkpointing()
        pull = losses.grad_wrt_input(lambda clip: losses.generator_loss(judge(net, clip, sigma, given)), x)
        found.append(pull)
    assert torch.equal(*found)
    assert found[0][:, :, 1:].any()
    logits = judge(net, x, sigma, given)
    assert logits.shape == (2, 2, 7 * 4), "the given frame's tokens have no logit"


def test_a_discriminator_learns_to_tell_and_the_student_to_fool():
    method, batch = make_dmd(gan=1.0, exit_step="last", sigma_max=0.3), a_batch(8)
    judge = method.discriminator
    optimizer = torch.optim.Adam(judge.parameters(), lr=0.02)
    values = []
    for i in range(16):
        optimizer.zero_grad()
        loss = method.loss("discriminator", batch, rng(i), rng(i, 1))
        loss.value.backward()
        optimizer.step()
        values.append(float(loss.value))
    assert sum(values[-4:]) < 0.6 * sum(values[:4])
    assert loss.metrics["gap"] > 1.0
    x0, sigma = some_latents(8).requires_grad_(), torch.full((8,), 0.3)
    method.fake_score = copy.deepcopy(method.teacher)  # dmd's own gradient vanishes
    method._student(Rollouts(x0, sigma, sigma, torch.zeros_like(x0), batch.conditions, batch)).value.backward()
    moved = x0.detach() - 1e-3 * x0.grad / x0.grad.abs().max()
    before, after = (judge(method.fake_score, 0.7 * x, sigma, batch.conditions).mean() for x in (x0, moved))
    assert after > before


def test_the_discriminator_is_updated_beside_the_fake_score():
    method = make_dmd(gan=0.1, fake_updates=2, warmup=1)
    assert method.roles_to_update(3) == ("fake_score", "discriminator") * 2 + ("student",)
    assert method.roles_to_update(0) == ("fake_score", "discriminator") * 3 + ("student",)
    assert dmd.needs(method.config).trained == ("student", "fake_score", "discriminator")
    assert dmd.needs(Config()).trained == ("student", "fake_score")
