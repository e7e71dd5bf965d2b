"""Does the face stay the one of the reference frame? The identity head of a run's frame probe."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from eval.frechet import jackknife_error
from eval.metric import Clip, Features, Metric, Score, stacked
from teachers.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Identity(Metric):
    """`identity_agreement` of every frame but the first with the real clip's first frame."""

    name, label, better, needs = "identity", "identity", 1.0, ("probes", "identity")

    def features(self, clip: Clip, real: Clip, networks) -> dict[str, Tensor]:
        return {"identity": networks.reading(clip).identity, "portrait": networks.portrait(real)}

    def score(self, features: Sequence[Features], reference: Sequence[Features] | None) -> dict[str, Score]:
        return {"identity": Score(*identity_agreement(stacked(features, "identity"), stacked(features, "portrait")))}

    def of_clip(self, features: Features, real: Features | None) -> dict[str, float]:
        """1 - E|g_t - r|^2 / 2 I: the identity outputs [I] are standardised, so 2 I is what a swapped face has in expectation."""
        faces, portrait = features["identity"][1:].double(), features["portrait"].double()
        return {"identity": float(1 - (faces - portrait).square().sum(1).mean() / (2 * len(portrait)))}

    def admit(self, cases) -> tuple[dict[str, float], bool]:
        """Own face > 0.5 > another clip's face."""
        real = cases.features(self, "real")
        faces, portraits = stacked(real, "identity"), stacked(real, "identity")[:, 0]
        values = {
            "real": identity_agreement(faces, portraits)[0],
            "decoded": identity_agreement(stacked(cases.features(self, "decoded"), "identity"), portraits)[0],
            "swapped": identity_agreement(faces.roll(1, 0), portraits)[0],
        }
        return values, min(values["real"], values["decoded"]) > 0.5 > values["swapped"]


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
