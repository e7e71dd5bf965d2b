"""Losses equal their closed forms, are fp32, and leave the given frame out."""

import pytest
import torch

from distill.methods import losses
from tests.support.tiny import some_latents


def test_the_mean_leaves_frame_0_out():
    x = torch.ones(2, 3, 4, 2, 2)
    x[:, :, 0] = 1e6
    x[1, :, 1:] = 3.0
    assert losses.frame_mean(x).tolist() == [1.0, 3.0]
    assert losses.frame_mean(x, start=0)[0] > 1e5


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_denoising_weighs_by_sigma(power):
    x0, x0_hat = some_latents(2, 4), some_latents(2, 4, seed=1)
    error = (x0_hat - x0)[:, :, 1:].square().flatten(1).mean(1)
    sigma = torch.tensor([0.5, 0.01])
    expected = (error / torch.tensor([0.5, 0.1]) ** power).mean()
    assert torch.allclose(losses.denoising(x0_hat, x0, sigma, power, floor=0.1), expected)
    per_frame = losses.denoising(x0_hat, x0, sigma.unsqueeze(1).expand(2, 4), power, floor=0.1)
    assert torch.allclose(per_frame, expected)


def test_power_two_is_the_velocity_loss():
    """x0_hat = x - sigma v_hat: |x0_hat - x0|^2 / sigma^2 = |v_hat - (eps - x0)|^2."""
    x0, eps, v_hat = (some_latents(2, 4, seed=i) for i in range(3))
    sigma = torch.tensor([0.3, 0.8]).view(-1, 1, 1, 1, 1)
    x0_hat = (1 - sigma) * x0 + sigma * eps - sigma * v_hat
    expected = (v_hat - (eps - x0))[:, :, 1:].square().mean()
    assert torch.allclose(losses.denoising(x0_hat, x0, sigma.flatten(), 2.0, 0.01), expected, rtol=1e-5)


def test_regression_is_the_mean_square():
    x0, x0_hat = some_latents(2, 4), some_latents(2, 4, seed=1)
    assert torch.allclose(losses.regression(x0_hat, x0), (x0_hat - x0)[:, :, 1:].square().mean())
    x0_hat[:, :, 1:] = x0[:, :, 1:]
    assert losses.regression(x0_hat, x0) == 0


def test_the_dmd_gradient_is_eq_7_and_8():
    x0, real, fake = (some_latents(2, 4, seed=i) for i in range(3))
    gradient = losses.dmd_gradient(x0, real, fake)
    for b in range(2):
        scale = (x0[b, :, 1:] - real[b, :, 1:]).abs().mean()
        assert torch.allclose(gradient[b, :, 1:], (fake - real)[b, :, 1:] / scale, rtol=1e-4)
    assert not gradient[:, :, 0].any()
    assert not losses.dmd_gradient(x0, real, real).any()
    assert losses.dmd_gradient(x0.bfloat16(), real.bfloat16(), fake.bfloat16()).dtype == torch.float32


def test_the_dmd_gradient_points_from_real_to_fake():
    """Descent moves x0 towards what the teacher believes and away from what the fake score believes."""
    x0 = torch.zeros(1, 1, 3, 2, 2)
    assert (losses.dmd_gradient(x0, real=x0 + 1, fake=x0)[:, :, 1:] < 0).all()
    assert (losses.dmd_gradient(x0, real=x0 - 1, fake=x0)[:, :, 1:] > 0).all()


def test_the_given_frame_does_not_scale_the_others():
    x0, real, fake = (some_latents(2, 4, seed=i) for i in range(3))
    far = real.clone()
    far[:, :, 0] += 100.0
    assert torch.equal(losses.dmd_gradient(x0, far, fake), losses.dmd_gradient(x0, real, fake))


def test_the_surrogate_s_gradient_is_the_gradient():
    x0, gradient = some_latents(2, 4).requires_grad_(), some_latents(2, 4, seed=1)
    losses.surrogate(x0, gradient).backward()
    assert torch.allclose(x0.grad * x0.numel(), gradient, atol=1e-5)


def test_frames_that_are_not_given_count():
    """start 0, where no frame is given: frame 0 has its part of every loss."""
    x0, real, fake = (some_latents(2, 4, seed=i) for i in range(3))
    assert torch.allclose(losses.regression(real, x0, start=0), (real - x0).square().mean())
    assert torch.allclose(losses.denoising(real, x0, torch.ones(2), 1.0, 0.1, start=0), (real - x0).square().mean())
    assert losses.dmd_gradient(x0, real, fake, start=0)[:, :, 0].all()
    assert losses.unit_tangent(x0, 0.1, start=0)[:, :, 0].all()


def test_the_gan_losses_are_logarithms():
    """-log D(real) - log(1 - D(fake)), and -log D(fake) for the generator."""
    real, fake = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 3.0]])
    expected = -(real.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean())
    assert torch.allclose(losses.discriminator_loss(real, fake), expected)
    assert torch.allclose(losses.generator_loss(fake), -fake.sigmoid().log().mean())


def test_the_discriminator_compares_films_with_rollouts_under_the_same_conditions():
    """However the rows are divided between ranks; whatever stands where there is no film, in the gradient too."""
    real, fake = some_latents(4, 2, seed=1), some_latents(4, 2, seed=2)
    filmed = torch.tensor([True, False, True, False])
    expected = losses.discriminator_loss(real[filmed], fake[filmed]) / 2
    assert torch.allclose(losses.logit_gap(real, fake, filmed), (real - fake)[filmed].mean())
    real[1] = torch.nan
    real.requires_grad_()
    value = losses.discriminator_loss(real, fake, filmed)
    value.backward()
    assert torch.allclose(value, expected)
    assert real.grad is not None
    assert bool(real.grad[filmed].all())
    with torch.no_grad():
        for size in (1, 2):
            parts = zip(real.split(size), fake.split(size), filmed.split(size), strict=True)
            assert torch.allclose(torch.stack([losses.discriminator_loss(*part) for part in parts]).mean(), expected)
        none = torch.zeros(4, dtype=torch.bool)
        assert losses.discriminator_loss(real, fake, none) == losses.logit_gap(real, fake, none) == 0


def test_a_unit_tangent_has_length_one_without_softening():
    tangent = some_latents(2, 4) * torch.tensor([1.0, 50.0]).view(-1, 1, 1, 1, 1)
    tangent[:, :, 0] = 1e4
    for softening, length in ((1e-9, 1.0), (1.0, None)):
        out = losses.unit_tangent(tangent, softening)
        rms = tangent[:, :, 1:].square().flatten(1).mean(1).sqrt()
        expected = torch.ones(2) if length else rms / (rms + softening)
        assert torch.allclose(out[:, :, 1:].square().flatten(1).mean(1).sqrt(), expected, rtol=1e-4)
        assert not out[:, :, 0].any()
    assert not losses.unit_tangent(torch.zeros(1, 2, 3, 1, 1), 0.1).any()


def test_an_input_gradient_leaves_the_network_alone():
    net, x0 = torch.nn.Linear(4, 1), some_latents(2, 4).requires_grad_()
    with torch.no_grad():
        gradient = losses.grad_wrt_input(lambda x: net(x).square().sum(), x0)
    with torch.enable_grad():
        (expected,) = torch.autograd.grad(net(x0).square().sum(), x0)
    assert torch.allclose(gradient, expected)
    assert net.weight.grad is None
    assert x0.grad is None
    plain = x0.detach().clone()
    losses.grad_wrt_input(lambda x: x.square().sum(), plain)
    assert not plain.requires_grad
    losses.gradient_as_loss(x0, gradient).backward()
    assert torch.equal(x0.grad, gradient)
