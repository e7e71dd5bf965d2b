"""Clips with sound and text, and what gives them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from teachers.errors import UserError
from teachers.resolve import in_users_file, label, missing

DRAWN = 256
"""Training clips of a source without end where `data.world.num_train` is null."""
CELLS = 4  # a side of the grid in which the extractors predict brightness and contrast
UNLABELLED = {
    "sync": "the clips have no mouth labels, which the embedded extractors need for training",
    "identity": "the embedded extractors are trained on faces of the procedural world alone",
    "motion": "the clips have no gesture labels",
    "expression": "the clips have no expression labels",
    "diversity": "there is one clip of each condition, so the spread of real motion is unknown",
}
"""Metrics that are undefined on clips without labels, and why."""


@dataclass(frozen=True, kw_only=True)
class Clips:
    """video uint8 [N, 3, T, H, W]; audio [N, S], of two speakers [N, 2, S], own voice first; text; labels per frame [N, T] and per
    clip [N], those that are known; pose rows [N, T, P]; what is known besides of a conversation, [N, T]: `turn`, `other_open`.

    A `video` of one frame is a portrait alone, of a condition that no film belongs to (`distill.data.conditions`).

    `features`: conditions that no encoder makes, by the name that they are declared under, as a network takes them: [N, ..], on the
    latent clock [N, F, ..] (`teachers.conditions.pack_rows` makes latent frames of pixel frames). They are trained on and sampled
    with as they are.

    `skipped`: files that could not be read and were passed over for others.
    """

    video: Tensor
    audio: Tensor
    text: list[str]
    labels: dict[str, Tensor]
    pose: Tensor | None = None
    talk: dict[str, Tensor] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    skipped: Sequence[str] = ()

    def rows(self, rows: range) -> "Clips":
        """Some of them."""
        cut = slice(rows.start, rows.stop)

        def named(values: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: value[cut] for name, value in values.items()}

        return Clips(
            video=self.video[cut],
            audio=self.audio[cut],
            text=self.text[cut],
            labels=named(self.labels),
            pose=None if self.pose is None else self.pose[cut],
            talk=named(self.talk),
            features=named(self.features),
        )

    @property
    def voice(self) -> Tensor:
        """The avatar's own sound [N, S]."""
        return self.audio if self.audio.ndim == 2 else self.audio[:, 0]

    @property
    def mixed(self) -> Tensor:
        """All speakers mixed [N, S]."""
        return self.audio if self.audio.ndim == 2 else self.audio.sum(dim=1).clamp(-1, 1)


class ClipSource:
    """Where clips come from: the procedural world (`procedural.source.World`), a folder (`recorded.Folder`), or a source of one's
    own, for which `clips` is all that has to be written.

    `config` is a `distill.data.config.ClipsConfig`. A set of clips has a name; the same seed and name are the same clips. Sets of
    different names must share no clip: test and reference are compared.

    left_out: metrics that are undefined here, and why; digests: of what the clips are read from, for fingerprints
    facts: what is worth knowing of the clips, as plain data; description: the clips in words, for a model card
    notes: what a reader of the report has to know of them, a sentence each
    num_train: training clips that are used; num_clips: those that there are, None where any number can be made
    """

    left_out: Mapping[str, str] = UNLABELLED
    digests: Mapping[str, str] = {}
    facts: Mapping[str, Any] = {}
    description: str = "clips of a data source of one's own"
    notes: Sequence[str] = ()
    num_clips: int | None = None
    _whole: tuple[tuple[int, str, int], Clips] | None = None

    def __init__(self, config: Any):
        self.config = config
        self.num_train = DRAWN if config.world.num_train is None else config.world.num_train

    def how_many(self) -> str:
        """ "256 of 50,000 clips": how many are trained on, of how many; "" where there is no end of them."""
        if self.num_clips is None:
            return ""
        more = " (data.world.num_train: null takes all)" if self.num_train < self.num_clips else ""
        return f"{self.num_train:,} of {self.num_clips:,} clips{more}"

    @property
    def num_films(self) -> int:
        """Those of the training clips that are films; they come first, the others are portraits with sound and text."""
        return self.num_train

    @property
    def num_film_shards(self) -> int:
        """Training shards of films, `world.shard_clips` each, the last one shorter."""
        return -(-self.num_films // self.config.world.shard_clips)

    @property
    def num_shards(self) -> int:
        """Training shards, those of films first; no shard has both."""
        return self.num_film_shards - (self.num_films - self.num_train) // self.config.world.shard_clips

    @missing
    def clips(self, seed: int, name: str, num: int) -> Clips:
        """`num` clips of the set `name`, the same for the same seed and name: video uint8 [num, 3, T, H, W] of data.world's size,
        audio [num, S] at 16 kHz in [-1, 1] as long as the video, text, labels {} where there are none."""
        raise NotImplementedError

    def verify(self, rank: int, world_size: int) -> None:
        """UserError where files differ from their checksums (here there are none); processes share the work."""

    def reserve(self, least: int, why: str) -> None:
        """See that each set of clips that are compared has `least` of them, which `why` (names of metrics) need; UserError where
        there are fewer. Here any number can be made."""

    def available(self, seed: int, name: str, num: int) -> int:  # noqa: ARG002
        """Any number can be made."""
        return num

    def draw(self, seed: int, name: str, num: int, motion: int = 0, rows: range | None = None) -> Clips:
        """`num` clips (or fewer, where there are no more) of the set `name`, or `rows` of them, with what can be measured on them
        as labels where they have none. Another `motion` is the same conditions again; ValueError where a clip has one."""
        if motion:
            raise ValueError("a clip has one motion here")
        if rows is None:
            clips = self._checked(seed, name, num)
        else:  # piece by piece, of a set that is made whole
            if self._whole is None or self._whole[0] != (seed, name, num):
                self._whole = None
                self._whole = (seed, name, num), self._checked(seed, name, num)
            clips = self._whole[1].rows(rows)
        return clips if clips.labels else replace(clips, labels=brightness_and_contrast(clips.video))

    def forget(self) -> None:
        """Let go of the set that `draw` was last asked for rows of."""
        self._whole = None

    def train(self, seed: int, numbers: Sequence[int], workers: int = 0) -> Iterator[Clips]:  # noqa: ARG002
        """The clips of these training shards, the sets train/0, train/1 and so on; `workers` threads may decode them."""
        size = self.config.world.shard_clips
        for number in numbers:
            yield self._checked(seed, f"train/{number}", min(size, self.num_train - number * size))

    def meanings(self, clips: Clips) -> dict[str, tuple[Tensor, int]]:
        """Classes that a text encoder is trained to separate, here the distinct texts: name -> class of each clip [N], and the
        number of classes."""
        known = {text: number for number, text in enumerate(sorted(set(clips.text)))}
        return {"text": (torch.tensor([known[text] for text in clips.text]), len(known))}

    def _checked(self, seed: int, name: str, num: int) -> Clips:
        """`clips`; UserError, which names the file of a source from outside, for what fails in it and for a wrong shape."""
        world = self.config.world
        with in_users_file(self.config):
            clips = self.clips(seed, name, num)
        samples = round(world.num_frames * 16_000 / Fraction(world.fps))
        wanted = {"video": (num, 3, world.num_frames, *world.size), "audio": (num, *clips.audio.shape[1:-1], samples)}
        for part, shape in wanted.items():
            if tuple(getattr(clips, part).shape) != shape:
                raise UserError(
                    f"{label(self.config)}: clips(.., '{name}', {num}) gives {part} {list(getattr(clips, part).shape)}; "
                    f"data.world wants {list(shape)}"
                )
        if clips.video.dtype != torch.uint8 or len(clips.text) != num:
            raise UserError(
                f"{label(self.config)}: clips(.., '{name}', {num}) gives {clips.video.dtype} video and {len(clips.text)} texts; "
                f"give torch.uint8 and {num}"
            )
        return clips


def brightness_and_contrast(video: UInt8[Tensor, "n 3 t h w"]) -> dict[str, Float[Tensor, "n t"]]:
    """Labels [N, T] that need no annotation: brightness and contrast in each of 4 x 4 cells.

    video: uint8 [N, 3, T, H, W]; contrast is the mean distance to the pixel on the right and below, both in units of 255.
    """
    parts = []
    for clips in video.split(16):
        grey = clips.float().mean(1).div(255)
        across, down = grey.diff(dim=-1, append=grey[..., -1:]).abs(), grey.diff(dim=-2, append=grey[..., -1:, :]).abs()
        maps = (F.adaptive_avg_pool2d(x, CELLS).flatten(2) for x in (grey, across + down))
        parts.append(torch.cat([*maps], dim=2))
    names = [f"{what}_{cell}" for what in ("brightness", "contrast") for cell in range(CELLS * CELLS)]
    return dict(zip(names, torch.cat(parts).unbind(2), strict=True))
