"""Does the face stay the one that was given?"""

from jaxtyping import Float
from torch import Tensor

from eval.metrics.frechet import jackknife_error
from teachers.errors import UserError


def identity_agreement(generated: Float[Tensor, "n t i"], reference: Float[Tensor, "n i"]) -> tuple[float, float]:
    """1 - E|g_(n,t) - r_n|^2 / E|g_(n,t) - r_m|^2 with m != n, over frames 1.., and its jackknife error over clips.

    `generated` and `reference` are the standardised identity outputs of the frame probe. 1 is the same face, 0 is
    what a face swapped between the clips scores in expectation; negative is worse than a swap.
    """
    if len(generated) != len(reference) or len(reference) < 3:
        got = (len(generated), len(reference))
        raise UserError(f"identity needs at least 3 clips, each with its portrait: got {got}; evaluate more clips")
    faces, portraits = generated[:, 1:].double(), reference.double()
    distance = (faces[:, :, None] - portraits).square().sum(3).mean(1)
    num = len(distance)
    own, total = distance.diagonal(), distance.sum()
    swapped = total - own.sum()
    value = 1 - (own.sum() / num) / (swapped / (num * (num - 1)))
    left_own = (own.sum() - own) / (num - 1)
    left_swapped = (swapped - distance.sum(0) - distance.sum(1) + 2 * own) / ((num - 1) * (num - 2))
    return float(value), jackknife_error(1 - left_own / left_swapped)
