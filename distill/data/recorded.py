"""A folder of prepared clips as training data: output of `distill data prepare`, split so that no person is on both sides.

Real clips have frames, sound and captions; scene parameters and alternative motions exist in the procedural world only. Metrics
that need these are omitted by name (`distill.data.source.UNLABELLED`).
"""

import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.data.config import ClipsConfig
from distill.data.datasets.folder import Videos
from distill.data.datasets.manifest import Clip, Manifest
from distill.data.datasets.split import assign, place
from distill.data.listing import read_by_main
from distill.data.loader import Samples, Windows
from distill.data.order import batch_rows
from distill.data.prepare import shards
from distill.data.prepare.shards import Indexed
from distill.data.procedural import render
from distill.data.source import Clips, ClipSource, brightness_and_contrast
from teachers.config import fraction
from teachers.errors import UserError
from teachers.files import canonical_json
from teachers.flow import keyed_generator

DIGEST_BY_SOURCE = {"digest": "source"}  # `Folder.digests`: the index of the clips, not the whole folder
FEW = 8  # clips of a set, below which the report says how few there are
PROBE_CLIPS = 1536  # on which the extractors are trained, in memory; as many as the procedural world has,
PROBE_PIXELS = 2**33  # and no more than these: 404 clips of 81 frames at 512x512


@dataclass(frozen=True, kw_only=True)
class FolderConfig(ClipsConfig):
    """Clips in `path`; `world` specifies their size, frame rate and length, and the maximum number of training clips (null: all).

    `held_out`: the fraction of people held out for evaluation, by hash; an official split of the manifest takes precedence. Of one
    person the last fraction in time is held out, or as much as the scores need.
    `manifest`: which of the clips are used, with their text, split and identity there: the folder that `distill data
    curate` wrote, or a manifest.parquet of it or of `distill data split`; null is all.
    """

    path: Path = field(metadata=DIGEST_BY_SOURCE)
    held_out: float = 0.1
    manifest: Path | None = field(default=None, metadata=DIGEST_BY_SOURCE)

    def __post_init__(self):
        super().__post_init__()
        self.refuse_directions()
        if not 0 < self.held_out < 1:
            raise UserError(
                f"data.held_out: got {self.held_out}; give the fraction of people to evaluate on, such as 0.1"
            )

    def open(self) -> "Folder":
        """The clips, indexed; UserError where they are not prepared for this recipe."""
        return Folder(self)


class Folder(ClipSource):
    """The clips of a folder by name of a set: see `distill.data.source.ClipSource`.

    probes, health and both validate sets are of the people trained on; test and admit are one half of the held-out clips,
    reference the other half. A set has fewer clips than requested where there are no more; `reserve` refuses too few.
    """

    def __init__(self, config: FolderConfig):
        self.config, world = config, config.world
        self.fps = Fraction(world.fps)
        self._check_prepared()
        render.samples_per_frame(world)
        self.checksums = shards.sha256(config.path / shards.CHECKSUMS)
        self.clips = read_by_main(lambda: _used_clips(config))
        self.unused: Counter[str] = Counter()
        sides = self._sides()
        self.training, self.test = (Windows(sides[name], world.num_frames, self.fps) for name in ("train", "test"))
        self._in_time = [] if sides["test"] else self._sorted_in_time()
        self.reserve(1, "two sets")

    def reserve(self, least: int, why: str) -> None:
        """Of one person, hold out what is needed; `least` clips of each of the sets that are compared, two on a side."""
        world, notes = self.config.world, []
        if self._in_time:
            notes.append(self._hold_out_in_time(2 * least))
        self.num_clips = len(self.training)
        self.num_train = self.num_clips if world.num_train is None else min(world.num_train, self.num_clips)
        for name, windows in (("train", self.training), ("held-out", self.test)):
            if len(windows) < 2 * least:
                raise UserError(
                    f"{self.config.path}: the {name} videos have {len(windows)} clips of {world.num_frames} frames at {world.fps} "
                    f"fps, {2 * least} are needed, {least} for {why} in each of two sets{self._unused_text()}; add videos, or "
                    "change data.held_out, data.world.num_frames or eval.protocol"
                )
        if (scored := len(self.test) // 2) < FEW:
            others = len(self.test) - scored
            notes.append(f"Only {scored} clips are scored and compared with {others} others: the errors are large.")
        self.notes = tuple(notes)

    @property
    def digests(self) -> dict[str, str]:
        """Which clips these are, for the fingerprint of what is made from them."""
        found = {"clips": self.checksums}
        if self.config.manifest is not None:
            clips = canonical_json([asdict(clip) for clip in self.clips])
            found["manifest"] = hashlib.sha256(clips.encode()).hexdigest()
        return found | ({"held out in time": str(len(self.test))} if self._in_time else {})

    @property
    def facts(self) -> dict[str, Any]:
        """Numbers of used and unused clips, as plain data."""
        return {
            "train_clips": self.num_train,
            "held_out_clips": len(self.test),
            "train_samples": len({sample for sample, _ in self.training.rows}),
            "held_out_samples": len({sample for sample, _ in self.test.rows}),
            "unused_samples": dict(self.unused),
        }

    @property
    def description(self) -> str:
        """One line for the model card."""
        kept = "" if self.config.manifest is None else f", the {len(self.clips)} of a curated manifest"
        return f"clips of the folder {self.config.path.name}{kept}"

    def verify(self, rank: int, world_size: int) -> None:
        """UserError where a shard differs from its checksum."""
        shards.verify(self.config.path, rank, world_size)

    def available(self, seed: int, name: str, num: int) -> int:
        """As many as there are."""
        return min(num, len(self._set(seed, name)[1]))

    def draw(self, seed: int, name: str, num: int, motion: int = 0, rows: range | None = None) -> Clips:
        """`num` clips of the set `name`, or as many as there are; ValueError for `motion` above 0: a real clip has one."""
        if motion:
            raise ValueError("a real clip has one motion")
        windows, order = self._set(seed, name)
        found = order[:num].tolist()
        samples = windows.batch(found if rows is None else found[rows.start : rows.stop])
        return self._clips(samples, brightness_and_contrast(samples.video))

    def train(self, seed: int, numbers: Sequence[int], workers: int = 0) -> Iterator[Clips]:
        """The clips of these training shards, in the shuffled order of the first epoch, decoded by `workers` threads."""
        size, num = self.config.world.shard_clips, len(self.training)
        rows = (batch_rows(num, size, number, seed)[: self.num_films - number * size].tolist() for number in numbers)
        for samples in self.training.batches(rows, workers):
            yield self._clips(samples, {})

    def _clips(self, samples: Samples, labels: dict[str, Tensor]) -> Clips:
        """A decoded batch as clips, with the texts of the manifest."""
        text = [self._text.get(name, own) for name, own in zip(samples.ids, samples.text, strict=True)]
        return Clips(video=samples.video, audio=samples.audio, text=text, labels=labels)

    @cached_property
    def _text(self) -> dict[str, str]:
        """Texts of `data.manifest` by clip id."""
        return {} if self.config.manifest is None else {clip.id: clip.text for clip in self.clips}

    def _set(self, seed: int, name: str) -> tuple[Windows, Tensor]:
        """Windows and rows of a set, shuffled by `seed`; sets that are compared share none."""
        halves = {"health": 0, "validate": 0, "validate reference": 1, "test": 0, "admit": 0, "reference": 1}
        windows = self.test if name in ("test", "admit", "reference") else self.training
        order = torch.randperm(len(windows), generator=keyed_generator(seed, "clips"))
        if name == "probes":
            height, width = self.config.world.size
            return windows, order[: min(PROBE_CLIPS, PROBE_PIXELS // (self.config.world.num_frames * height * width))]
        middle = len(order) // 2
        return windows, order[middle:] if halves[name] else order[:middle]

    def _check_prepared(self) -> None:
        """UserError with the command that prepares these clips for this recipe, unless they are prepared."""
        path, world = self.config.path, self.config.world
        height, width = world.size
        where = f"{path.resolve().name}_{height}x{width}_{world.fps.replace('/', '-')}fps"
        command = f"--out {shlex.quote(where)} --fps {world.fps} --size {height}x{width}"
        if not path.is_dir():
            raise UserError(f"no folder of clips: {path}; give data.path=DIR, what distill data prepare wrote")
        if not (path / shards.CHECKSUMS).is_file():
            if not Videos(path).sources:
                raise UserError(f"no clips: {path} has no videos and no shards; give data.path=DIR with some")
            raise UserError(
                f"clips are not prepared: {path}; run distill data prepare folder --videos {shlex.quote(str(path))} {command}"
                f" and give data.path={shlex.quote(where)}"
            )
        try:
            fps = fraction(json.loads((path / "prepare.json").read_text(encoding="utf-8"))["fps"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"prepare.json is damaged ({error!r}): {path}; prepare the clips again") from error
        if fps != self.fps:
            raise UserError(
                f"clips are prepared at {fps} fps: {path}; run distill data prepare on their videos again, {command}, or set "
                f"data.world.fps={fps.numerator}/{fps.denominator}"
            )

    def _sides(self) -> dict[str, list[Indexed]]:
        """Samples of the people trained on and of those held out; `unused` counts the others by reason."""
        config, (height, width) = self.config, self.config.world.size
        others = {clip.split for clip in self.clips} - {"", "train", "test"}
        fractions = {"train": 1 - config.held_out, "test": config.held_out}
        divided = assign(Manifest(self.clips), {**dict.fromkeys(sorted(others), 0.0), **fractions})
        listed = {clip.id for clip in self.clips}
        owners = {clip.id: (clip.split, clip.identity or clip.source) for clip in divided.clips}
        entries: list[tuple[str, str, Indexed]] = []
        for sample in read_by_main(lambda: shards.read_indices(config.path)):
            owner = owners.get(sample.id)
            if sample.id not in listed:
                self.unused["it is not in data.manifest"] += 1
            elif not sample.has_sound:
                self.unused["it has no sound"] += 1
            elif sample.size != (height, width):
                self.unused[f"it is {sample.size[0]}x{sample.size[1]}, not {height}x{width}"] += 1
            elif owner is None:
                self.unused["its identity is officially on both sides"] += 1
            elif owner[0] in others:
                self.unused[f"it is in the split {owner[0]}"] += 1
            else:
                entries.append((*owner, sample))
        if not entries:
            raise UserError(
                f"no clip fits this recipe, {height}x{width} with sound{self._unused_text()}: {config.path}; prepare the "
                f"videos again with --fps {config.world.fps} --size {height}x{width}"
            )
        official = {clip.identity or clip.source for clip in self.clips if clip.split}
        free = {person for _, person, _ in entries} - official
        if len({person for _, person, _ in entries}) == 1 and free:
            entries = [("train", person, sample) for _, person, sample in entries]  # and then held out in time
        elif not any(side == "test" for side, _, _ in entries):
            last = max(free, key=place) if free else None
            entries = [("test" if person == last else side, person, sample) for side, person, sample in entries]
        sides = {name: [sample for side, _, sample in entries if side == name] for name in ("train", "test")}
        people = len({person for _, person, _ in entries})
        if not sides["train"] or (not sides["test"] and (people > 1 or not free)):
            side = "trained on" if sides["test"] else "held out"
            raise UserError(
                f"no person is {side}: {config.path} has {people} people; add clips of others, or change data.held_out"
            )
        return sides

    def _sorted_in_time(self) -> list[tuple[Indexed, int]]:
        """The clips of one person."""
        starts = {clip.id: (clip.source, clip.start) for clip in self.clips}
        return sorted(self.training.rows, key=lambda row: (*starts[row[0].id], row[1]))

    def _hold_out_in_time(self, least: int) -> str:
        """Of one person: the last clips in time, at least so many, become the held-out ones; the clip between is in neither. What
        the report says of it."""
        rows = self._in_time
        count = min(max(round(self.config.held_out * len(rows)), least), len(rows) // 2)
        self.training.rows, self.test.rows = rows[: max(0, len(rows) - count - 1)], rows[len(rows) - count :]
        return (
            f"All clips are of one person: the last {count} of {len(rows)} in time are held out, so the scores say nothing of "
            "other people."
        )

    def _unused_text(self) -> str:
        reasons = "; ".join(f"{number} unused: {why}" for why, number in self.unused.most_common())
        return f" ({reasons})" if reasons else ""


def _used_clips(config: FolderConfig) -> tuple[Clip, ...]:
    """The clips of `data.manifest`, of the whole folder without one; UserError unless they are clips of this folder."""
    prepared = Manifest.load(config.path / "manifest.parquet").clips
    if config.manifest is None:
        return prepared
    path = config.manifest / "manifest.parquet" if config.manifest.is_dir() else config.manifest
    used, known = Manifest.load(path).clips, {_without_annotations(clip) for clip in prepared}
    if not used:
        raise UserError(f"data.manifest: {path} keeps no clip; curate with other --thresholds")
    for clip in used:
        if _without_annotations(clip) not in known:
            raise UserError(
                f"data.manifest: clip {clip.id} of {path} is not in {config.path}; curate that folder again"
            )
    return used


def _without_annotations(clip: Clip) -> Clip:
    """The clip's source and position, without its annotations."""
    return replace(clip, text="", licence="", split="", identity="")
