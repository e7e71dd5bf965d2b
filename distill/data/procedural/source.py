"""The embedded procedural world as a source of clips."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from distill.data.config import ClipsConfig
from distill.data.procedural import render
from distill.data.source import Clips, ClipSource
from teachers.errors import UserError
from teachers.flow import keyed_generator


@dataclass(frozen=True, kw_only=True)
class DataConfig(ClipsConfig):
    """Clips of the procedural world."""

    def __post_init__(self):
        super().__post_init__()
        if self.world.speakers not in (1, 2):
            raise UserError(f"data.world.speakers: got {self.world.speakers}; 1, or 2 who take turns")
        if not 0.0 <= self.world.variety <= 1.0:
            raise UserError(f"data.world.variety: got {self.world.variety}; give a number from 0 to 1")

    def open(self) -> "World":
        """The procedural world."""
        return World(self)


def held_out(config: DataConfig, seed: int, name: str, num: int, motion: int = 0, rows: range | None = None) -> Clips:
    """`num` fresh clips of the world named `name`, or `rows` of them; another `motion` is the same conditions with other
    nuisance."""
    scene = render.draw_conditions(config.world, num, keyed_generator(seed, "asked", name))
    return render.make_clips(config.world, scene, keyed_generator(seed, "motion", name, motion), rows)


class World(ClipSource):
    """The procedural world as a source of clips, with every label. Any number of clips can be drawn."""

    left_out: Mapping[str, str] = {}
    description = "procedural avatars, no people"

    def clips(self, seed: int, name: str, num: int) -> Clips:
        """See `held_out`."""
        return held_out(self.config, seed, name, num)

    def draw(self, seed: int, name: str, num: int, motion: int = 0, rows: range | None = None) -> Clips:
        """See `held_out`."""
        return held_out(self.config, seed, name, num, motion, rows)

    def meanings(self, clips: Clips) -> dict[str, tuple[Tensor, int]]:
        """Expression and gesture."""
        known = {"expression": render.EXPRESSIONS, "gesture": render.GESTURES}
        return {name: (clips.labels[name], len(classes)) for name, classes in known.items()}
