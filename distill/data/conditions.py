"""Conditions without films: portraits, speech and prompts of one's own, combined at random, beside films or in their place.

ODE initialisation and DMD train on what the teacher and the student generate, so the data give them conditions alone: Self Forcing
(2506.08009, sec. 4) trains on prompts, DMD2 (2405.14867, sec. 4.3) adds a GAN term on real data. Here the films of `data.path` are
what students are validated and scored on and, where they are trained on too, what such a term compares with.
"""

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from distill.data.codec_training import TrainableConfig
from distill.data.listing import list_files
from distill.data.order import AHEAD, made_ahead
from distill.data.procedural.render import samples_per_frame
from distill.data.recorded import DIGEST_BY_SOURCE, Folder, FolderConfig
from distill.data.source import Clips
from teachers.codecs.convolutional import ConvCodecConfig
from teachers.codecs.linear import CodecConfig, to_uint8
from teachers.errors import UserError
from teachers.files import canonical_json
from teachers.flow import keyed_generator
from teachers.media.container import is_of_the_machine
from teachers.media.face import INSTALL, detector, fit_portrait
from teachers.media.picture import SUFFIXES, decode_image
from teachers.media.sound import SAMPLE_RATE, AudioReader, read_sound

SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".aiff", ".mp4", ".mov", ".mkv", ".webm")
TRIES = 200
"""Different files that are drawn for a condition before the folder is refused; broken ones and recordings that are too short or
silent are skipped."""


@dataclass(frozen=True, kw_only=True)
class ConditionsConfig(FolderConfig):
    """Prepared films in `path`, and what `num_drawn` conditions are drawn from: pictures in `portraits`, recordings in `speech`
    (both with their subfolders), the lines of `prompts` (null: no text). `crop`: how a picture is fitted (docs/data.md, crops).
    `train_on_films`: false trains on drawn conditions alone; then no stage may need films."""

    portraits: Path = field(metadata=DIGEST_BY_SOURCE)
    speech: Path = field(metadata=DIGEST_BY_SOURCE)
    prompts: Path | None = field(default=None, metadata=DIGEST_BY_SOURCE)
    num_drawn: int = 1000
    train_on_films: bool = True
    crop: Literal["face", "top", "center"] = "face"

    def __post_init__(self):
        super().__post_init__()
        if self.num_drawn < 1:
            raise UserError(f"data.num_drawn: got {self.num_drawn}; draw at least one, or use data.name=folder")
        codec, learned = self.codec, isinstance(self.codec, CodecConfig)
        if isinstance(codec, TrainableConfig):
            taken = isinstance(codec, ConvCodecConfig) and codec.path is not None and codec.train is None
            learned = codec.fitted and not taken
        if learned and not self.train_on_films:
            raise UserError("data.codec is fitted to films: give a trained one, or data.train_on_films=true")

    def training_counts(self) -> tuple[int | None, int]:
        """Of the films as of a folder, where they are trained on; and the drawn conditions."""
        return (self.world.num_train if self.train_on_films else 0), self.num_drawn

    def open(self) -> "DrawnConditions":
        """The films, indexed, and the lists of files; UserError where one is missing or empty."""
        return DrawnConditions(self)


class DrawnConditions(Folder):
    """Films, then drawn conditions: the clips of a film shard have all frames, those of the others the portrait alone. Condition
    number i is a function of the seed, i and the files; sets that students are scored on are films."""

    config: ConditionsConfig

    def __init__(self, config: ConditionsConfig):
        self.portraits = list_files(config.portraits, "data.portraits", SUFFIXES)
        self.speech = list_files(config.speech, "data.speech", SOUNDS)
        self.prompts = [""] if config.prompts is None else _lines(config.prompts)
        self._broken: set[Path] = set()
        self._lock = Lock()  # of it: shards are made by threads
        super().__init__(config)

    def reserve(self, least: int, why: str) -> None:
        """As of a folder; the drawn conditions come on top."""
        super().reserve(least, why)
        if self.config.crop == "face" and not detector():
            note = f"Portraits of another shape than the clips are cropped to their top: there is no face detector ({INSTALL})."
            self.notes = (*self.notes, note)
        self._films = self.num_train if self.config.train_on_films else 0
        self.num_train = self._films + self.config.num_drawn

    @property
    def num_films(self) -> int:
        return self._films

    def how_many(self) -> str:
        """ "192 of 200 films and 1,000 drawn conditions"."""
        return f"{self._films:,} of {self.num_clips:,} films and {self.config.num_drawn:,} drawn conditions"

    @property
    def digests(self) -> dict[str, str]:
        """The films, the names and sizes of the files that conditions are drawn from, and what finds the faces."""
        return super().digests | self._drawn_from

    @cached_property
    def _drawn_from(self) -> dict[str, str]:
        listed = {"portraits": self.portraits, "speech": self.speech}
        digests = {name: _digest(files) for name, files in listed.items()}
        found = {"prompts": _digest(self.prompts), **digests}
        return found | ({"faces": detector()} if self.config.crop == "face" else {})

    @property
    def facts(self) -> dict:
        """As of a folder, and the numbers of what is drawn from."""
        own = {"portraits": len(self.portraits), "recordings": len(self.speech), "prompts": len(self.prompts)}
        return super().facts | {"train_clips": self._films, "drawn_conditions": self.config.num_drawn, **own}

    @property
    def description(self) -> str:
        """One line for the model card."""
        films = f"{self._films:,} {super().description} and " if self._films else ""
        text = "" if self.config.prompts is None else f" and {len(self.prompts):,} prompts"
        sources = f"{len(self.portraits):,} portraits, {len(self.speech):,} recordings{text}"
        return f"{films}{self.config.num_drawn:,} conditions drawn from {sources}"

    def train(self, seed: int, numbers: Sequence[int], workers: int = 0) -> Iterator[Clips]:
        """The clips of these training shards, films first."""
        films = [number for number in numbers if number < self.num_film_shards]
        yield from super().train(seed, films, workers)
        drawn = [number for number in numbers if number >= self.num_film_shards]
        yield from made_ahead(partial(self._shard, seed), drawn, max(1, workers), AHEAD if workers else 0)

    def _shard(self, seed: int, number: int) -> Clips:
        """The conditions of a drawn shard: video uint8 [N, 3, 1, H, W], audio [N, S] as long as a clip."""
        size = self.config.world.shard_clips
        first = (number - self.num_film_shards) * size
        numbers = range(first, min(first + size, self.config.num_drawn))

        def rngs(part: str) -> list[torch.Generator]:
            return [keyed_generator(seed, "drawn conditions", i, part) for i in numbers]

        skipped: list[str] = []
        portraits = [self._portrait(rng, skipped) for rng in rngs("portrait")]
        sounds = [self._sound(rng, skipped) for rng in rngs("sound")]
        text = [self.prompts[_pick(self.prompts, rng)] for rng in rngs("prompt")]
        video, audio = torch.stack(portraits)[:, :, None], torch.stack(sounds)
        return Clips(video=video, audio=audio, text=text, labels={}, skipped=skipped)

    def _portrait(self, rng: torch.Generator, skipped: list[str]) -> Tensor:
        """uint8 [3, H, W]; broken files are added to `skipped`."""

        def fitted(file: Path) -> Tensor:
            return to_uint8(fit_portrait(decode_image(file), self.config.world.size, self.config.crop)[0])

        return self._first_good("portraits", self.portraits, fitted, rng, skipped)

    def _sound(self, rng: torch.Generator, skipped: list[str]) -> Tensor:
        """A stretch of a recording [S] as long as a clip, anywhere in it and not silent; broken files are added to `skipped`."""
        samples = self.config.world.num_frames * samples_per_frame(self.config.world)
        unusable = f" or shorter than a clip, {samples / SAMPLE_RATE:.1f} s, or silent there"
        stretch = partial(_stretch, samples=samples, rng=rng)
        return self._first_good("speech", self.speech, stretch, rng, skipped, unusable)

    def _first_good(
        self,
        key: Literal["portraits", "speech"],
        files: Sequence[tuple[str, int]],
        read: Callable[[Path], Tensor | None],
        rng: torch.Generator,
        skipped: list[str],
        unusable: str = "",
    ) -> Tensor:
        """What `read` gives of the first file drawn that it can use (None: it cannot). Each process names a broken one once."""
        folder, last, tried = getattr(self.config, key), "", set[int]()
        while len(tried) < min(TRIES, len(files)):
            number = _pick(files, rng)
            if number in tried:
                continue
            tried.add(number)
            file = folder / files[number][0]
            try:
                if (found := read(file)) is not None:
                    return found
            except UserError as error:
                if is_of_the_machine(error):  # one that is skipped for it would be another condition the next time
                    raise
                last = f"; the last broken one: {error}"
                skipped.append(f"{key}/{files[number][0]}")
                with self._lock:
                    seen = file in self._broken
                    self._broken.add(file)
                if not seen:
                    tqdm.write(f"distill: data.{key}: skipped: {error}", file=sys.stderr)
        raise UserError(
            f"data.{key}: none of {len(tried)} files drawn from {folder} is of use: each is broken{unusable}{last}; give others"
        )


def _stretch(path: Path, samples: int, rng: torch.Generator) -> Tensor | None:
    """Samples [S] of a recording at 16 kHz from a random place on; None where it is too short or silent there."""
    reader = AudioReader(path)
    try:
        seconds = reader.seconds or sum(map(len, reader)) / reader.rate
    finally:
        reader.close()
    place, room = float(torch.rand((), generator=rng)), int(seconds * SAMPLE_RATE) - samples
    if room < 0:
        return None
    found = read_sound(path, int(place * (room + 1)), samples)
    return None if found is None or found.silent or found.late or found.early else found.samples


def _pick(items: Sequence, rng: torch.Generator) -> int:
    return int(torch.randint(0, len(items), (), generator=rng))


def _lines(path: Path) -> list[str]:
    """The prompts of a text file, a line each; UserError where there is none."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.prompts: {path} cannot be read ({error}); give a UTF-8 text file") from error
    if not any(lines):
        raise UserError(f"data.prompts: {path} has no line; write one prompt a line, or data.prompts=null")
    return [line for line in lines if line]


def _digest(value: object) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
