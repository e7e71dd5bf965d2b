"""An exact Gaussian video teacher: every prediction has a closed form, so what is distilled from it can be checked."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from teachers.conditions import Conditions


class GaussianTeacher(nn.Module):
    """Clips [C, F, H, W] that are jointly N(mean, covariance); frame 0 is given by conditions.reference.

    Given the reference the other frames are N(m, S), m affine in the reference (Schur complement); text and audio are
    ignored. covariance [D, D] is that of the flat clip, D = C*F*H*W; ValueError unless it is positive definite. All
    algebra is fp64 in the eigenbasis of S = V diag(l) V^T; results have the type of the input.
    """

    given: Tensor
    mean: Tensor
    gain: Tensor
    covariance: Tensor
    values: Tensor
    vectors: Tensor

    def __init__(self, mean: Tensor, covariance: Tensor):
        super().__init__()
        self.shape = mean.shape
        given = torch.zeros(mean.shape, dtype=torch.bool)
        given[:, 0] = True
        given = given.flatten()
        mean, covariance = mean.double().flatten(), covariance.double()
        gain = torch.linalg.solve(covariance[given][:, given], covariance[given][:, ~given]).T  # S_ba S_aa^-1
        conditional = covariance[~given][:, ~given] - gain @ covariance[given][:, ~given]
        values, vectors = torch.linalg.eigh((conditional + conditional.T) / 2)
        if values[0] <= 0 or torch.linalg.eigvalsh(covariance)[0] <= 0:
            raise ValueError(f"covariance [{len(mean)}, {len(mean)}] is not positive definite")
        self.register_buffer("given", given)
        self.register_buffer("mean", mean)
        self.register_buffer("gain", gain)
        self.register_buffer("covariance", conditional)
        self.register_buffer("values", values)
        self.register_buffer("vectors", vectors)

    def expectation(self, conditions: Conditions) -> Tensor:
        """E[clip | reference] [B, C, F, H, W] in fp64; frame 0 is the reference."""
        reference = self._reference(conditions)
        return self._join(reference, self.mean[~self.given] + (reference - self.mean[self.given]) @ self.gain.T)

    @staticmethod
    def _reference(conditions: Conditions) -> Tensor:
        assert conditions.reference is not None
        return conditions.reference.double().flatten(1)

    def _join(self, reference: Tensor, frames: Tensor) -> Tensor:
        flat = frames.new_empty(frames.shape[0], self.given.shape[0])
        flat[:, self.given], flat[:, ~self.given] = reference, frames
        return flat.unflatten(1, self.shape)

    def _spectral(self, centred: Tensor, factor: Tensor) -> Tensor:
        """V diag(factor) V^T applied to centred [B, D']; factor [B, D'] or [D']."""
        return (centred @ self.vectors * factor) @ self.vectors.T

    def denoise(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """E[x0 | x_sigma = x] = m + (1-s) S ((1-s)^2 S + s^2 I)^-1 (x - (1-s) m); x [B, C, F, H, W], sigma [B]."""
        s = sigma.double().unsqueeze(1)
        mean = self.expectation(conditions).flatten(1)[:, ~self.given]
        factor = (1 - s) * self.values / ((1 - s) ** 2 * self.values + s**2)
        centred = x.double().flatten(1)[:, ~self.given] - (1 - s) * mean
        x0 = mean + self._spectral(centred, factor)
        return self._join(self._reference(conditions), x0).to(x.dtype)

    def solution(self, noise: Tensor, sigma: float, conditions: Conditions) -> Tensor:
        """The state at sigma of the probability-flow ODE that starts at `noise` at sigma 1.

        (1-s) m + ((1-s)^2 S + s^2 I)^(1/2) noise; frame 0 is the noised reference.
        """
        mean = self.expectation(conditions).flatten(1)[:, ~self.given]
        factor = ((1 - sigma) ** 2 * self.values + sigma**2).sqrt()
        flat = noise.double().flatten(1)
        frames = (1 - sigma) * mean + self._spectral(flat[:, ~self.given], factor)
        reference = (1 - sigma) * self._reference(conditions) + sigma * flat[:, self.given]
        return self._join(reference, frames).to(noise.dtype)

    def sample(self, conditions: Conditions, rng: torch.Generator) -> Tensor:
        """Exact clips [B, C, F, H, W] in fp64, one for each row of the conditions."""
        noise = torch.randn(conditions.text.shape[0], *self.shape, generator=rng, dtype=torch.float64)
        return self.solution(noise.to(self.mean.device), 0.0, conditions)


def autoregressive(mean: Tensor, spatial: Tensor, correlation: float) -> GaussianTeacher:
    """AR(1) over frames: cov of (c, f, y, x) and (c', f', y', x') = correlation^|f - f'| spatial[(c y x), (c' y' x')].

    mean [C, F, H, W]; spatial [C*H*W, C*H*W] is the covariance of one frame.
    """
    channels, frames, height, width = mean.shape
    steps = torch.arange(frames, dtype=torch.float64)
    time = correlation ** (steps.unsqueeze(1) - steps).abs()
    place = spatial.double().view(channels, height * width, channels, height * width)
    covariance = torch.einsum("fg,cpdq->cfpdgq", time, place)
    return GaussianTeacher(mean, covariance.reshape(mean.numel(), mean.numel()))


class OneFrameStudent(nn.Module):
    """A student of chunks of one frame that see the frame before: a state is the chunk's number and that frame."""

    def open(self, text=None):
        return 0, None

    def plan(self, state, conditions, grad=False):
        return None

    def commit(self, state, x0, conditions, steps):
        return state[0] + 1, x0.detach()


class Recorder:
    """Keeps what denoise_clip of a real student was given and what it gave."""

    def __init__(self, student):
        self.student, self.spec, self.calls = student, student.spec, []

    def __getattr__(self, name):
        return getattr(self.student, name)

    def denoise_clip(self, x, sigma, conditions, clean=None, level=None):
        x0 = self.student.denoise_clip(x, sigma, conditions, clean, level)
        self.calls.append(SimpleNamespace(x=x, sigma=sigma, conditions=conditions, clean=clean, x0=x0))
        return x0
