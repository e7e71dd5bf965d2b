"""Pure functions of tensors: no networks, no config, no randomness; fp32 whatever comes in."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import softplus

from teachers import flow
from teachers.flow import Latents, Level

Scalar = Float[Tensor, ""]


def frame_mean(x: Latents, start: int = 1) -> Float[Tensor, " batch"]:
    """Mean over all but the batch of x [B, C, F, H, W], frames from `start` on (those before are given, not generated)."""
    return x[:, :, start:].flatten(1).mean(dim=1)


def denoising(
    x0_hat: Latents,
    x0: Latents,
    sigma: Level,
    power: float,
    floor: float,
    start: int = 1,
    weights: Float[Tensor, " batch"] | None = None,
) -> Scalar:
    """|x0_hat - x0|^2 / max(sigma, floor)^power, mean over generated elements, clips counted by `weights` where they are given.

    power 2 is the velocity (flow matching) loss, eq. 14 of Lipman et al. 2210.02747 with x0-prediction; power 1 weighs noise
    levels as embedded networks like it. sigma [B] or [B, F].
    """
    each = denoising_errors(x0_hat, x0, sigma, power, floor, start)
    return (each if weights is None else weights * each).mean()


def denoising_errors(
    x0_hat: Latents, x0: Latents, sigma: Level, power: float, floor: float, start: int = 1
) -> Float[Tensor, " batch"]:
    """The same of each clip."""
    error = (x0_hat.float() - x0.float()).square() / flow.expand(sigma, x0).float().clamp(min=floor) ** power
    return frame_mean(error, start)


def regression(x0_hat: Latents, x0: Latents, start: int = 1) -> Scalar:
    """Mean squared error to the trajectory's end, generated frames only (ODE init, CausVid 2412.07772 eq. 5)."""
    return frame_mean((x0_hat.float() - x0.float()).square(), start).mean()


def dmd_gradient(x0: Latents, real: Latents, fake: Latents, start: int = 1, eps: float = 1e-6) -> Latents:
    """Normalised distribution-matching gradient (fake - real) / mean |x0 - real|, fp32 (Yin et al. 2311.18828, eqs. 7-8).

    real and fake are the x0 predictions of teacher and fake score at the same noisy x. The normaliser is per sample over
    channels, generated frames and pixels; given frames before `start` get no gradient.
    """
    x0, real, fake = x0.float(), real.float(), fake.float()
    scale = frame_mean((x0 - real).abs(), start).view(-1, 1, 1, 1, 1)
    gradient = (fake - real) / (scale + eps)
    gradient[:, :, :start] = 0.0
    return gradient


def surrogate(x0: Latents, gradient: Latents) -> Scalar:
    """A scalar whose gradient with respect to x0 is `gradient` / its number of elements; its value means nothing."""
    target = (x0.float() - gradient).detach()
    return 0.5 * torch.nn.functional.mse_loss(x0.float(), target)


def discriminator_loss(
    real: Float[Tensor, "batch *any"], fake: Float[Tensor, "batch *any"], filmed: Bool[Tensor, " batch"] | None = None
) -> Scalar:
    """Non-saturating GAN loss of a discriminator: softplus(-real) + softplus(fake) of its logits (DMD2 2405.14867, sec. 4.3).

    Both are of rows that are `filmed` (None: all), divided by the number of all rows: as many films as rollouts count, under the
    same conditions, however a batch is divided between ranks."""
    each = softplus(-real.float()).flatten(1).mean(dim=1) + softplus(fake.float()).flatten(1).mean(dim=1)
    return each.mean() if filmed is None else torch.where(filmed, each, 0.0).mean()


def logit_gap(real: Float[Tensor, "batch *any"], fake: Float[Tensor, "batch *any"], filmed: Tensor | None) -> Scalar:
    """How much larger the mean logit of films is than that of rollouts under the same conditions; 0 where no row is filmed."""
    each = (real - fake).flatten(1).mean(dim=1)
    return each.mean() if filmed is None else torch.where(filmed, each, 0.0).sum() / filmed.sum().clamp(min=1)


def generator_loss(fake: Float[Tensor, "..."]) -> Scalar:
    """The generator's side of it: softplus(-fake) of the logits, which is -log D."""
    return softplus(-fake.float()).mean()


def unit_tangent(tangent: Latents, softening: float, start: int = 1) -> Latents:
    """tangent / (rms + softening) per sample, generated frames only, fp32; the given frames before `start` get none.

    Tangent normalisation of Lu & Song 2410.11081, with a root mean square in place of the norm, so that `softening` knows no size.
    """
    tangent = tangent.float()
    rms = frame_mean(tangent.square(), start).sqrt().view(-1, 1, 1, 1, 1)
    out = tangent / (rms + softening)
    out[:, :, :start] = 0.0
    return out


def grad_wrt_input(loss_of: Callable[[Tensor], Tensor], x0: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """d loss_of(x0) / d x0 in fp32, through networks that are left without a gradient; their graph is freed before it returns."""
    with torch.enable_grad():
        leaf = x0.detach().float().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(leaf), leaf)
    return gradient


def gradient_as_loss(x0: Float[Tensor, "*any"], gradient: Float[Tensor, "*any"]) -> Scalar:
    """A scalar whose gradient with respect to x0 is `gradient` itself; its value means nothing."""
    return (x0.float() * gradient.detach()).sum()
