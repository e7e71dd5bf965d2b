"""How sharp a clip is."""

from dataclasses import dataclass

from torch import Tensor

from eval.metric import Clip
from eval.metrics.motion import in_parts, sharpness_energies
from eval.metrics.motion_energy import Energy


@dataclass(frozen=True, kw_only=True)
class Sharpness(Energy):
    """Mean squared Laplacian of the frames 1.., pixels in [-1, 1], or as a ratio."""

    name, label = "sharpness", "sharpness"

    def features(self, clip: Clip, real: Clip, networks) -> dict[str, Tensor]:
        return {"energy": in_parts(sharpness_energies, clip.video)}

    def admit(self, cases) -> tuple[dict[str, float], bool]:
        """noisy > real > decoded > blurred."""
        values = self.ratios(cases, cases.names)
        return values, values["noisy"] > values["real"] > values["decoded"] > values["blurred"]
