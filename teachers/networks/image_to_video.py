"""What Wan's image-to-video networks share: [noisy | mask | latents of the image] as input, CLIP's tokens in cross-attention.

The channels beside the noise and the tokens are features of the reference image (`teachers.encoders.image`). Frame 0 is drawn like
every other one, as published; a kind whose frame 0 is given (InfiniteTalk) sets `reference`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from teachers.conditions import Conditions
from teachers.networks.kind import Dims, write_reference
from teachers.networks.wan import WanKind, initialise

SIZES = ("num_layers", "num_heads", "head_dim", "ffn_dim", "freq_dim", "patch")


@dataclass(frozen=True, kw_only=True)
class ImageToVideoKind(WanKind):
    """A kind states its module's class (`module_class`) and the rows of its layout beyond Wan's (`rows`)."""

    takes: ClassVar = ("text", "audio", "image", "beside")
    layouts: ClassVar = ("wan",)

    reference: bool = False

    def build(self, dims: Dims) -> Any:
        sizes = {name: size for name, size in vars(dims).items() if name not in ("speakers", "pose_dim")}
        return initialise(self.module_class()(**sizes, **{name: getattr(self, name) for name in SIZES}))

    @classmethod
    def of(cls, config: Any) -> Self:
        """The kind of a module with this config."""
        return cls(**{name: config[name] for name in SIZES})

    def compose(self, x: Tensor, conditions: Conditions, known: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(x with the clean reference in the known frames, where the kind has any; [x | beside])."""
        x = write_reference(x, conditions, known)
        return x, torch.cat([x, conditions.beside.to(x)], dim=1)
