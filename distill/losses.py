"""Pure functions of tensors: no networks, no config, no randomness; fp32 whatever comes in."""

import torch
from torch import Tensor

from teachers import flow


def frame_mean(x: Tensor, start: int = 1) -> Tensor:
    """Mean over all but the batch of x [B, C, F, H, W], frames from `start` on (frame 0 is given, not generated)."""
    return x[:, :, start:].flatten(1).mean(dim=1)


def denoising(x0_hat: Tensor, x0: Tensor, sigma: Tensor, power: float, floor: float) -> Tensor:
    """|x0_hat - x0|^2 / max(sigma, floor)^power, mean over generated elements.

    power 2 is the velocity (flow matching) loss, eq. 14 of Lipman et al. 2210.02747 with x0-prediction; power 1 weighs noise
    levels as embedded networks like it. sigma [B] or [B, F].
    """
    error = (x0_hat.float() - x0.float()).square() / flow.expand(sigma, x0).float().clamp(min=floor) ** power
    return frame_mean(error).mean()


def regression(x0_hat: Tensor, x0: Tensor) -> Tensor:
    """Mean squared error to the trajectory's end, generated frames only (ODE init, CausVid 2412.07772 eq. 5)."""
    return frame_mean((x0_hat.float() - x0.float()).square()).mean()


def dmd_gradient(x0: Tensor, real: Tensor, fake: Tensor, start: int = 1, eps: float = 1e-6) -> Tensor:
    """Normalised distribution-matching gradient (fake - real) / mean |x0 - real|, fp32 (Yin et al. 2311.18828, eqs. 7-8).

    real and fake are the x0 predictions of teacher and fake score at the same noisy x. The normaliser is per sample over
    channels, generated frames and pixels; given frames before `start` get no gradient.
    """
    x0, real, fake = x0.float(), real.float(), fake.float()
    scale = frame_mean((x0 - real).abs(), start).view(-1, 1, 1, 1, 1)
    gradient = (fake - real) / (scale + eps)
    gradient[:, :, :start] = 0.0
    return gradient


def surrogate(x0: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose gradient with respect to x0 is `gradient` / its number of elements; its value means nothing."""
    target = (x0.float() - gradient).detach()
    return 0.5 * torch.nn.functional.mse_loss(x0.float(), target)
