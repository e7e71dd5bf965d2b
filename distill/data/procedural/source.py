"""The embedded world as a source of clips, and the `data` config of a recipe that every source shares."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from distill.data.procedural import render
from distill.data.procedural.render import WorldConfig
from distill.data.source import Clips, Source
from teachers import registry
from teachers.errors import UserError
from teachers.flow import keyed_generator
from teachers.registry import AudioEncoderKind, CodecKind, TextEncoderKind


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The world and its encoders: pixels to latents, sound and text to features. `text_steps`: training steps of a fitted text
    encoder. `negative`: the prompt that replaces a dropped text (null: zeros)."""

    world: WorldConfig
    codec: CodecKind = field(metadata={"kinds": registry.CODECS})
    audio: AudioEncoderKind = field(metadata={"kinds": registry.AUDIO_ENCODERS})
    text: TextEncoderKind = field(metadata={"kinds": registry.TEXT_ENCODERS})
    text_steps: int = 200
    negative: str | None = None

    def __post_init__(self):
        world, codec = self.world, self.codec
        if (world.num_frames - 1) % codec.stride:
            raise UserError(
                f"data.world.num_frames: got {world.num_frames} with codec.stride={codec.stride}; use 1 + stride * n frames"
            )
        if world.speakers not in (1, 2):
            raise UserError(f"data.world.speakers: got {world.speakers}; 1, or 2 who take turns")
        if any(side % codec.patch for side in world.size):
            raise UserError(f"data.world.resolution: {world.size} is no multiple of codec.patch={codec.patch}")

    @property
    def latent_frames(self) -> int:
        """F of a training clip."""
        return 1 + (self.world.num_frames - 1) // self.codec.stride

    def open(self) -> Source:
        """Where the clips come from: here the procedural world."""
        return World(self)


def held_out(config: DataConfig, seed: int, name: str, num: int, motion: int = 0) -> Clips:
    """`num` fresh clips of the world named `name`; another `motion` is the same conditions with other nuisance."""
    scene = render.draw_conditions(config.world, num, keyed_generator(seed, "asked", name))
    return render.make_clips(config.world, scene, keyed_generator(seed, "motion", name, motion))


class World:
    """The procedural world as a source of clips: see `distill.data.source.Source`. Any number of clips can be drawn."""

    left_out: Mapping[str, str] = {}
    given: Mapping[str, str] = {}
    facts: Mapping[str, Any] = {}
    description = "procedural avatars, no people"

    def __init__(self, config: DataConfig):
        self.config = config
        self.num_train = config.world.num_train
        self.num_shards = -(-self.num_train // config.world.shard_clips)

    def verify(self, rank: int, world_size: int) -> None:
        """There are no files."""

    def draw(self, seed: int, name: str, num: int, motion: int = 0) -> Clips:
        """See `held_out`."""
        return held_out(self.config, seed, name, num, motion)

    def train(self, seed: int, numbers: Sequence[int], workers: int = 0) -> Iterator[Clips]:  # noqa: ARG002
        """The clips of these training shards; there is nothing to decode."""
        size = self.config.world.shard_clips
        for i in numbers:
            yield held_out(self.config, seed, f"train/{i}", min(size, self.num_train - i * size))

    def meanings(self, clips: Clips) -> dict[str, tuple[Tensor, int]]:
        """Expression and gesture."""
        known = {"expression": render.EXPRESSIONS, "gesture": render.GESTURES}
        return {name: (clips.labels[name], len(classes)) for name, classes in known.items()}
