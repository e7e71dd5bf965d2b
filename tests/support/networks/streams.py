"""A causal student's stream beside its masked forward."""

from collections.abc import Callable

import torch
from torch import Tensor

from students.student import Student
from teachers.conditions import Conditions
from tests.support.tiny import randn


def check_stream(
    student: Student, x: Tensor, given: Conditions
) -> tuple[Tensor, Callable[[Tensor, Conditions], Tensor]]:
    """Of two clips x [2, C, 6, h, w] in chunks of two, with a sigma for each clip and chunk, the masked forward over clean chunks
    gives the stream's x0, chunk by chunk. Returns it, and the masked forward of other clips or conditions."""
    clean, sigma = randn(*x.shape, seed=11), torch.tensor([[0.9, 0.6, 0.3], [0.5, 0.8, 0.2]])
    together, state = student.denoise_clip(x, sigma, given, clean), student.open(given.text)
    for k in range(3):
        part, cut = given.frames(2 * k, 2 * k + 2), slice(2 * k, 2 * k + 2)
        x0, _ = student.denoise(state, student.plan(state, part), x[:, :, cut], sigma[:, k], part)
        assert (x0 - together[:, :, cut]).abs().max() < 1e-5, k
        state = student.commit(state, clean[:, :, cut], part)
    return together, lambda other, conditions: student.denoise_clip(other, sigma, conditions, clean)
