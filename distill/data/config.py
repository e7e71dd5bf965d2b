"""The `data` part of a recipe that every source shares: the shape of its clips and how they are coded."""

from dataclasses import dataclass, field
from typing import Any, Literal

from distill.data.procedural.render import WorldConfig
from distill.data.source import ClipSource
from teachers import registry
from teachers.errors import UserError
from teachers.registry import AudioEncoderKind, CodecKind, TextEncoderKind
from teachers.resolve import missing


@dataclass(frozen=True, kw_only=True)
class ClipsConfig:
    """`world`: size, frame rate, length and number of the clips; and their encoders: pixels to latents, sound and text to
    features; `image`: the reference image, for networks that take more of it than its latent. `text_steps`: training steps of a
    fitted text encoder. `negative`: the prompt that replaces a dropped text (null: zeros). `precision`: that of stored features
    of sound and text; bf16 loses nothing of an encoder that gives bf16 (umT5). `mirror`: the mirror image of every clip is
    trained on too. `lead`: the first latent frame of a clip is the portrait's alone, for networks whose kind has such a lead: it
    primes the codec and is in no chunk (0: it is a frame like the others). `keep_sound`: the training set keeps each clip's own
    sound beside the features of it, for rewards that listen. A source's own config inherits from it and opens the source."""

    world: WorldConfig
    codec: CodecKind = field(metadata={"kinds": registry.CODECS})
    audio: AudioEncoderKind = field(metadata={"kinds": registry.AUDIO_ENCODERS})
    text: TextEncoderKind = field(metadata={"kinds": registry.TEXT_ENCODERS})
    image: Any = field(default=None, metadata={"kinds": registry.IMAGE_ENCODERS})
    text_steps: int = 200
    negative: str | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    mirror: bool = True
    lead: int = 0
    keep_sound: bool = False

    def __post_init__(self):
        world, codec = self.world, self.codec
        if (world.num_frames - 1) % codec.stride:
            raise UserError(
                f"data.world.num_frames: got {world.num_frames} with codec.stride={codec.stride}; use 1 + stride * n frames"
            )
        if any(side % codec.patch for side in world.size):
            raise UserError(f"data.world.resolution: {world.size} is no multiple of codec.patch={codec.patch}")

    @property
    def latent_frames(self) -> int:
        """F of a training clip, without the lead."""
        return 1 + (self.world.num_frames - 1) // self.codec.stride - self.lead

    def training_counts(self) -> tuple[int | None, int]:
        """How many films (null: as many as there are) and conditions without a film are trained on, for `distill plan`."""
        return self.world.num_train, 0

    @missing
    def open(self) -> ClipSource:
        """Where the clips come from."""
        raise NotImplementedError

    def refuse_directions(self) -> None:
        """UserError where the recipe asks for what only the procedural world has."""
        if self.world.speakers != 1 or self.world.steered:
            raise UserError(
                "data.world: speakers and steered are of the procedural world; other clips have one audio track and no "
                "directions; remove both"
            )
