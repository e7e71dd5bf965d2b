"""What a network is conditioned on besides the noise level: named features, each with a clock and an empty value.

`FEATURES` is the only list of them: what drops, cuts, joins, stores or batches conditions reads that table. A feature that this
package does not know is declared beside the network or the data source that brings it:

    declare(Feature(name="emotion", clock="stream", size=(7,)))
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from teachers.config import nearest
from teachers.errors import UserError

Clock = Literal["stream", "latent", "grid", "anchor"]
TIME_AXIS: Mapping[Clock, int | None] = MappingProxyType({"stream": None, "latent": 1, "grid": 2, "anchor": None})
"""The axis of latent frames. stream [B, ..]: one value for a whole stream; latent [B, F, ..]: one a latent frame; grid
[B, C, F, H, W]: beside the noise, the last frame held beyond its end; anchor [B, C, R, H, W]: clean latents that are tokens of
their own, R of them, outside time."""


@dataclass(frozen=True, kw_only=True)
class Feature:
    """A named condition.

    `empty`: the feature that stands in its place where it is dropped (None, or where that one is not given: zeros). `follows`: the
    feature that it is another form of, and is dropped with. `stored`: kept in the shards of a training set, a row a clip; what is
    not comes from elsewhere at every batch. `size`: its shape without batch and latent frames, of a feature from outside this
    package; where a stream does not give it, it is zeros of this size. `mirror`: its value in a clip's mirror image (None: flipped
    on the clocks grid and anchor, which are images, else as it is).
    """

    name: str
    clock: Clock
    empty: str | None = None
    follows: str | None = None
    stored: bool = True
    size: tuple[int, ...] | None = None
    mirror: Callable[[Tensor], Tensor] | None = field(default=None, compare=False)

    @property
    def axis(self) -> int | None:
        """Of latent frames, None outside time."""
        return TIME_AXIS[self.clock]

    def mirrored(self, value: Tensor) -> Tensor:
        """The value in a clip's mirror image."""
        if self.mirror is not None:
            return self.mirror(value)
        return value.flip(-1) if self.clock in ("grid", "anchor") else value

    def blank(self, batch: int, frames: int) -> Tensor:
        """Zeros of this size on the CPU; UserError for a feature without one."""
        if self.size is None:
            raise UserError(f"condition '{self.name}': its Feature has no size; declare it with size=(..)")
        shape = {None: self.size, 1: (frames, *self.size), 2: (*self.size[:1], frames, *self.size[1:])}[self.axis]
        return torch.zeros(batch, *shape)


FEATURES: dict[str, Feature] = {}
"""Every feature by name, in the order in which they are declared."""


def declare(feature: Feature) -> Feature:
    """Add a feature to the table. The same one again changes nothing; UserError for another one under a known name, or one whose
    `empty` or `follows` is unknown."""
    if not feature.name.isidentifier() or hasattr(Conditions, feature.name) or feature.name == "features":
        raise UserError(
            f"condition {feature.name!r}: not a name for one; use a Python name that Conditions does not have"
        )
    if feature.clock not in TIME_AXIS:
        raise UserError(
            f"condition '{feature.name}': unknown clock {feature.clock!r}; {nearest(feature.clock, TIME_AXIS)}"
        )
    for other in (feature.empty, feature.follows):
        if other is not None:
            known(other)
    if FEATURES.setdefault(feature.name, feature) != feature:
        raise UserError(
            f"condition '{feature.name}' is declared twice: {FEATURES[feature.name]} and {feature}; rename one"
        )
    return feature


def known(name: str) -> Feature:
    """The feature of that name; UserError for an unknown one."""
    if name not in FEATURES:
        raise UserError(
            f"unknown condition '{name}': {nearest(name, FEATURES)} (a new one is declared by "
            "teachers.conditions.declare(Feature(name=.., clock=..)))"
        )
    return FEATURES[name]


def forms(name: str) -> tuple[Feature, ...]:
    """The feature of that name and those that follow it."""
    return (known(name), *(feature for feature in FEATURES.values() if feature.follows == name))


@dataclass(frozen=True, eq=False, init=False)
class Conditions:
    """Named features of a batch of clips or streams: `Conditions(text=.., audio=..)`, or `Conditions(mapping, text=..)`.

    A feature reads as an attribute, None where it is not given. `dataclasses.replace` gives other values, None takes one away.
    UserError for a feature that is not declared.
    """

    features: dict[str, Tensor] = field(default_factory=dict)

    def __init__(self, features: Mapping[str, Tensor | None] | None = None, **named: Tensor | None):
        given = {**(features or {}), **named}
        for name in given:
            known(name)
        object.__setattr__(self, "features", {name: value for name, value in given.items() if value is not None})

    def __getattr__(self, name: str) -> Any:
        if name not in FEATURES:
            raise AttributeError(f"unknown condition '{name}'; {nearest(name, FEATURES)}")
        return self.features.get(name)

    # ---- size

    @property
    def num_rows(self) -> int:
        """B."""
        return self._any().shape[0]

    @property
    def device(self) -> torch.device:
        return self._any().device

    @property
    def num_frames(self) -> int:
        """F, latent frames; ValueError where no feature has any."""
        for name, value in self.features.items():
            if FEATURES[name].clock == "latent":
                return value.shape[1]
        raise ValueError(f"conditions without latent frames: {', '.join(self.features) or 'none'}")

    @property
    def known(self) -> tuple[int, ...]:
        """The latent frames of the clip that are given, not drawn."""
        return () if self.reference is None else (0,)

    def has(self, name: str) -> bool:
        """Whether a feature is given and holds any numbers."""
        value = self.features.get(known(name).name)
        return value is not None and value.numel() > 0

    def _any(self) -> Tensor:
        for value in self.features.values():
            return value
        raise ValueError("conditions without a feature have no size")

    # ---- parts of the table

    @property
    def timed(self) -> dict[str, Tensor]:
        """The features that run with the latent frames."""
        return {name: value for name, value in self.features.items() if FEATURES[name].axis is not None}

    @property
    def stored(self) -> dict[str, Tensor]:
        """The features that a training set keeps, a row a clip."""
        return {name: value for name, value in self.features.items() if FEATURES[name].stored}

    @property
    def outside(self) -> dict[str, Tensor]:
        """The features that this package does not know."""
        return {name: value for name, value in self.features.items() if name not in BUILT_IN}

    # ---- other values

    def drop(self, *names: str) -> "Conditions":
        """The same conditions with these features, and those that follow them, empty; one that is not given stays away."""
        empty = {}
        for feature in (feature for name in names for feature in forms(name)):
            if (value := self.features.get(feature.name)) is not None:
                other = self.features.get(feature.empty) if feature.empty else None
                empty[feature.name] = torch.zeros_like(value) if other is None else other
        return Conditions(self.features, **empty)

    def drop_rows(self, **rows: Tensor) -> "Conditions":
        """Features as zeros in the batch rows where the given bool mask [B] is set, in training: there an `empty` feature, which is
        a sampler's, does not stand in."""
        out = dict(self.features)
        for name, mask in rows.items():
            for feature in forms(name):
                if (value := out.get(feature.name)) is not None:
                    out[feature.name] = value * (~mask).view(-1, *[1] * (value.ndim - 1)).to(value)
        return Conditions(out)

    def roll_rows(self, name: str) -> "Conditions":
        """A feature, and those that follow it, from the row before; the others as they are."""
        rolled = {f.name: self.features[f.name].roll(1, 0) for f in forms(name) if f.name in self.features}
        return Conditions(self.features, **rolled)

    def frames(self, start: int, stop: int, hold: bool = False) -> "Conditions":
        """The conditions of latent frames start..stop-1. Beyond its end a grid, with `hold` every feature, holds its last frame;
        without it the others end there."""
        out = {}
        for name, value in self.timed.items():
            feature = FEATURES[name]
            axis, held = feature.axis or 0, hold or feature.clock == "grid"
            if held and stop > value.shape[axis]:
                index = torch.arange(start, stop, device=value.device).clamp(max=value.shape[axis] - 1)
                out[name] = value.index_select(axis, index)
            else:
                out[name] = value[(slice(None),) * axis + (slice(start, stop),)]
        return Conditions(self.features, **out)

    def index(self, rows) -> "Conditions":
        """Select batch rows."""
        return self.map(lambda value: value[rows])

    def to(self, *args, **kwargs) -> "Conditions":
        """Every feature by Tensor.to."""
        return self.map(lambda value: value.to(*args, **kwargs))

    def map(self, change: Callable[[Tensor], Tensor]) -> "Conditions":
        """Every feature changed alike."""
        return Conditions({name: change(value) for name, value in self.features.items()})

    @staticmethod
    def join_frames(parts: Sequence["Conditions"]) -> "Conditions":
        """Conditions one after the other in time; what does not run with the frames is the first one's."""
        return _joined(parts, parts[0].timed, lambda name: FEATURES[name].axis)

    @staticmethod
    def join_rows(parts: Sequence["Conditions"]) -> "Conditions":
        """Conditions beside each other in the batch."""
        return _joined(parts, parts[0].features, lambda _: 0)


def _joined(parts: Sequence[Conditions], names: Iterable[str], axis: Callable[[str], Any]) -> Conditions:
    """The first of the parts, its features `names` concatenated; ValueError where another part has other features."""
    first = parts[0]
    if any(set(part.features) != set(first.features) for part in parts):
        raise ValueError(f"conditions to join differ: {[sorted(part.features) for part in parts]}")
    whole = {name: torch.cat([part.features[name] for part in parts], dim=axis(name)) for name in names}
    return Conditions(first.features, **whole)


for _feature in (
    Feature(name="negative", clock="stream", stored=False),  # [B, L, D], Wan's negative prompt
    Feature(name="text", clock="stream", empty="negative"),  # token features [B, L, D], zero where padded
    # [B, F, stride, A], the rows of a latent frame's pixel frames, of two speakers side by side, the avatar's own first
    Feature(name="audio", clock="latent"),
    # [B, F, stride, A], what bidirectional networks take in the place of `audio` where their encoder needs the whole clip
    Feature(name="clip_audio", clock="latent", follows="audio"),
    Feature(name="pose", clock="latent"),  # [B, F, stride, P]
    # [B, C, 1, H, W], the latent of the reference image, frame 0 of the clip; not given: plain text-to-video
    Feature(name="reference", clock="stream", stored=False),
    # [B, C, 1, H, W], the latent of the reference image where it is in front of the clip and no frame of it: for the codec alone
    Feature(name="lead", clock="stream", stored=False),
    Feature(name="guidance", clock="stream", stored=False),  # [B, M], the scales of a network with an embedding of them
    # What an image encoder makes of the one reference image (teachers.registry.ImageEncoder)
    Feature(name="image", clock="stream"),  # tokens [B, K, V], CLIP's
    Feature(
        name="beside", clock="grid"
    ),  # [B, C', F, H, W], channels beside the noise: Wan's mask and latents of the image
    Feature(name="anchors", clock="anchor"),  # [B, C, R, H, W], clean latents that are tokens of their own
    # [B, P, H, W] on the latent grid, where each of P speakers is, 0 to 1
    Feature(name="regions", clock="stream", mirror=lambda value: value.flip(-1)),
):
    declare(_feature)


OF_IMAGE = ("image", "beside", "anchors", "regions")
"""The features that an image encoder can make; of a clip's mirror image they are made anew."""
BUILT_IN = frozenset(FEATURES)
"""The features whose values and sizes the encoders, the clip itself or a sampler give."""


def taken(network: Any) -> tuple[str, ...]:
    """The names of the conditions that a network's config `takes`; none where it does not specify them."""
    return tuple(getattr(network, "takes", ()))


def blank_features(network: Any, batch: int, frames: int) -> dict[str, Tensor]:
    """Zeros, by name, of the features from outside this package that a network's config `takes`: what stands for those that a
    stream does not give, and what a planner measures. UserError for one that is not declared, or without a size."""
    return {name: known(name).blank(batch, frames) for name in taken(network) if name not in BUILT_IN}


def pack_rows(features: Tensor, stride: int) -> Tensor:
    """Pixel-frame rows [B, T, A] -> [B, F, stride, A]; row 0 is repeated in front so that latent i covers
    pixel frames stride*i-(stride-1) .. stride*i (OmniAvatar's first-frame rule). T = 1 + stride (F - 1)."""
    if (features.shape[1] - 1) % stride:
        raise ValueError(f"rows: got T={features.shape[1]}, need T = 1 + {stride} (F - 1)")
    lead = features[:, :1].expand(-1, stride - 1, -1)
    return torch.cat([lead, features], dim=1).unflatten(1, (-1, stride))


def side_by_side(rows: Tensor) -> Tensor:
    """Rows of several speakers [.., speakers, T, A] -> [.., T, speakers A], as `Conditions.audio` has them."""
    return rows.transpose(-3, -2).flatten(-2)
