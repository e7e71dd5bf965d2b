"""Prepared shards as a stream of training clips: any sample by its number, in an order that is a function of (seed, position).

An index says where each sample lies, so that row -> sample is one read of its shard at an offset; nothing that was decoded is
kept. Order and position know nothing of processes and workers: those only share the work out.
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distill.data.order import batch_rows
from distill.data.prepare import shards
from distill.data.prepare.video import SAMPLE_RATE
from teachers.errors import UserError
from teachers.flow import keyed_generator
from teachers.media.read import upright

IMAGES = ("jpeg", "jpg", "png")
SOUNDS = ("flac",)


class Bucket(NamedTuple):
    """What the samples of one batch have in common: their parts, and the height and width of their frames (0 without)."""

    parts: tuple[str, ...]  # of video, image, audio
    height: int
    width: int


@dataclass(frozen=True)
class Sample:
    """A clip of `num_frames` frames: video uint8 [3, T, H, W], image uint8 [3, H, W], audio float32 [S] at 16 kHz, or what of them
    the sample has; its id, text and all other facts; `first` frame of the clip in its sample."""

    facts: dict[str, Any]
    first: int
    video: Tensor | None = None
    image: Tensor | None = None
    audio: Tensor | None = None

    @property
    def text(self) -> str:
        """What is seen and done in the clip, "" where nobody said."""
        return str(self.facts.get("text") or "")


@dataclass(frozen=True)
class Samples:
    """A batch from one bucket: rows [N]; video [N, 3, T, H, W], image [N, 3, H, W], audio [N, S] where the bucket has them."""

    rows: Tensor
    bucket: Bucket
    ids: list[str]
    text: list[str]
    video: Tensor | None
    image: Tensor | None
    audio: Tensor | None


@dataclass(frozen=True)
class Index:
    """Where the samples of a folder lie, one entry each: shard number, offset and bytes in it, frames, bucket number, key."""

    folder: Path
    shards: tuple[str, ...]
    buckets: tuple[Bucket, ...]
    shard: np.ndarray
    offset: np.ndarray
    num_bytes: np.ndarray
    frames: np.ndarray
    bucket: np.ndarray
    keys: np.ndarray  # bytes
    sha256: str  # of the list of checksums: which data these are

    @classmethod
    def read(cls, folder: Path, fps: Fraction) -> "Index":
        """The index of prepared data; of a shard that `prepare` did not index, its members are listed. Sound alone is measured in
        frames of `fps`. UserError where the data are not whole."""
        folder = Path(folder)
        sums = shards.read_checksums(folder)
        names = tuple(sorted(name for name in sums if name.endswith(".tar")))
        columns: list[tuple] = []
        known: dict[Bucket, int] = {}
        for number, name in enumerate(names):
            rows = _stored_rows(folder / name)
            for row in _listed_rows(folder / name, fps) if rows is None else rows:
                bucket = known.setdefault(row.bucket, len(known))
                columns.append((number, row.offset, row.num_bytes, row.frames, bucket, row.key.encode("ascii")))
        if not columns:
            raise UserError(f"no samples: {folder}; prepare clips that can be used")
        shard, offset, num_bytes, frames, bucket, keys = (np.array(column) for column in zip(*columns, strict=True))
        digest = sha256((folder / shards.CHECKSUMS).read_bytes()).hexdigest()
        return cls(folder, names, tuple(known), shard, offset, num_bytes, frames, bucket, keys, digest)

    def key(self, entry: int) -> str:
        """The WebDataset key of an entry."""
        return self.keys[entry].decode("ascii")

    def members(self, entry: int) -> dict[str, bytes]:
        """The members of a sample, extension -> content; UserError, naming shard and sample, unless they are there and its own."""
        path = self.folder / self.shards[self.shard[entry]]
        return shards.read_sample(path, self.key(entry), int(self.offset[entry]), int(self.num_bytes[entry]))

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """UserError for the first shard of this rank's share that differs from its checksum."""
        sums = shards.read_checksums(self.folder)
        for name in self.shards[rank::world_size]:
            path = self.folder / name
            if not path.is_file() or shards.sha256(path) != sums[name]:
                raise UserError(f"shard differs from its checksum: {path}; {shards.HINT}")


class _Row(NamedTuple):
    key: str
    offset: int
    num_bytes: int
    frames: int
    bucket: Bucket


def _stored_rows(shard: Path) -> list[_Row] | None:
    """The samples that the index beside a shard of `prepare` lists; None without one that says their sizes."""
    rows = shards.read_index(shard)
    try:
        return (
            None
            if rows is None
            else [
                _Row(row["key"], row["offset"], row["bytes"], row["frames"], _video_bucket(row["size"], row["sound"]))
                for row in rows
            ]
        )
    except KeyError:
        return None
    except (ValueError, TypeError, IndexError) as error:
        raise UserError(
            f"index of a shard cannot be read ({error!r}): {shard.with_suffix('.json')}; {shards.HINT}"
        ) from error


def _video_bucket(size: Sequence[int], has_sound: bool) -> Bucket:
    return Bucket(("video", "audio") if has_sound else ("video",), int(size[0]), int(size[1]))


def _listed_rows(shard: Path, fps: Fraction) -> Iterator[_Row]:
    """The samples of a shard from its members alone; UserError where they are no samples."""
    offset = 0
    for key, members in shards.samples(shard):
        where = f"sample {key} of {shard}"
        num_bytes = sum(shards.BLOCK * (1 + -(-len(content) // shards.BLOCK)) for content in members.values())
        has_sound = any(name in members for name in SOUNDS)
        image = next((members[name] for name in IMAGES if name in members), None)
        facts = _facts(members, where)
        if "mp4" in members:
            try:
                bucket, frames = _video_bucket(facts["size"], has_sound), int(facts["frames"])
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise UserError(
                    f"{where} does not say its size and frames; let distill data prepare make it"
                ) from error
        elif image is not None:
            height, width = _image(image, where).shape[1:]
            bucket, frames = Bucket(("image", "audio") if has_sound else ("image",), height, width), 0
        elif has_sound:
            bucket, frames = Bucket(("audio",), 0, 0), 0
        else:
            raise UserError(f"{where} has neither video, image nor sound: {sorted(members)}; remove it")
        if has_sound and "mp4" not in members:
            frames = int(len(_sound(_first(members, SOUNDS), where)) * fps / SAMPLE_RATE)
        yield _Row(key, offset, num_bytes, frames, bucket)
        offset += num_bytes


class Windows(Dataset):
    """Clips of `num_frames` frames out of an index, one after the other in each sample; an image without sound is one clip.

    Row -> (sample, first frame) is arithmetic. Videos and sounds that are shorter have no clip; `entries` are the samples that may
    be used (all).
    """

    def __init__(self, index: Index, num_frames: int, fps: Fraction, entries: Iterable[int] | None = None):
        self.index, self.num_frames, self.fps = index, num_frames, Fraction(fps)
        per_frame = SAMPLE_RATE / self.fps
        if per_frame.denominator != 1:
            raise UserError(f"fps: {fps} does not divide {SAMPLE_RATE} Hz; use 25/2, 16, 20 or 25")
        self.samples_per_frame = per_frame.numerator
        used = np.arange(len(index.shard)) if entries is None else np.array(sorted(entries), dtype=np.int64)
        still = np.array([bucket.parts == ("image",) for bucket in index.buckets])
        each = np.where(still[index.bucket[used]], 1, index.frames[used] // num_frames)
        self.entry = np.repeat(used, each)
        self.number = np.arange(len(self.entry)) - np.repeat(np.cumsum(each) - each, each)

    def __len__(self) -> int:
        return len(self.entry)

    def bucket(self, row: int) -> Bucket:
        """The bucket of a row."""
        return self.index.buckets[self.index.bucket[self.entry[row]]]

    def members(self) -> list[np.ndarray]:
        """The rows of each bucket that has some, in order."""
        of_row = self.index.bucket[self.entry]
        found = [np.flatnonzero(of_row == number) for number in range(len(self.index.buckets))]
        return [rows for rows in found if len(rows)]

    def __getitem__(self, row: int) -> Sample:
        """Decode one clip; UserError where its sample is damaged."""
        entry, first = int(self.entry[row]), int(self.number[row]) * self.num_frames
        members = self.index.members(entry)
        where = f"sample {self.index.key(entry)} of {self.index.folder / self.index.shards[self.index.shard[entry]]}"
        bucket, video, image, audio = self.bucket(row), None, None, None
        if "video" in bucket.parts:
            rate = Fraction(_facts(members, where).get("fps", self.fps))
            if rate != self.fps:
                raise UserError(
                    f"{where} has {rate} frames a second, {self.fps} are asked for; prepare it at --fps {self.fps}"
                )
            video = _video(members["mp4"], first, self.num_frames, rate, where)
        if "image" in bucket.parts:
            image = _image(_first(members, IMAGES), where)
        if "audio" in bucket.parts:
            whole, span = _sound(_first(members, SOUNDS), where), self.num_frames * self.samples_per_frame
            audio = whole[first * self.samples_per_frame :][:span]
            if len(audio) != span or len(whole) != _facts(members, where).get("samples", len(whole)):
                raise UserError(f"sound cannot be decoded (there is too little of it): {where}; {shards.HINT}")
        return Sample(_facts(members, where), first, video, image, audio)

    def batch(self, rows: Tensor) -> Samples:
        """Decode rows [N] of one bucket."""
        numbers = rows.tolist()
        found = [self[row] for row in numbers]
        (bucket,) = {self.bucket(row) for row in numbers}

        def stacked(name: str) -> Tensor | None:
            return torch.stack([getattr(sample, name) for sample in found]) if name in bucket.parts else None

        ids = [str(sample.facts.get("id", "")) for sample in found]
        parts = (stacked("video"), stacked("image"), stacked("audio"))
        return Samples(rows, bucket, ids, [sample.text for sample in found], *parts)

    def __getitems__(self, rows: list[int]) -> "Samples | UserError":
        """A batch for DataLoader; an error comes as a value, since a worker's traceback is no message."""
        try:
            return self.batch(torch.tensor(rows))
        except UserError as error:
            return error


def turn(sizes: Sequence[int], number: int) -> tuple[int, int]:
    """Which bucket the batch `number` of a stream is from, and its number among that bucket's batches.

    Buckets of `sizes` rows take turns in proportion to them: bucket 0 has floor(n size_0 / all) of the first n, and the others
    share the rest by the same rule.
    """
    total = sum(sizes)
    for bucket, size in enumerate(sizes):
        before = number * size // total
        if (number + 1) * size // total > before:
            return bucket, before
        number, total = number - before, total - size
    raise AssertionError("the last bucket takes what is left")


class Loader:
    """An endless shuffled stream of batches, this rank's share of it: position p is batch p * world_size + rank of all.

    Each bucket is shuffled anew in each epoch and no row comes twice in one (`distill.train.batch_rows`, which is the whole order
    where there is one bucket). Iterating goes on at `position`; state_dict() knows it whatever `workers` have read ahead.
    """

    def __init__(
        self, windows: Windows, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, workers: int = 0
    ):
        if not len(windows):
            raise UserError(f"no clip of {windows.num_frames} frames: {windows.index.folder}; prepare longer videos")
        self.windows, self.batch_size, self.seed = windows, batch_size, seed
        self.rank, self.world_size, self.workers = rank, world_size, workers
        self.position = 0
        self._members = windows.members()

    def rows(self, position: int) -> Tensor:
        """Rows [batch_size] of this rank's batch number `position`, all of one bucket."""
        sizes = [len(rows) for rows in self._members]
        bucket, number = turn(sizes, position * self.world_size + self.rank)
        keys = () if len(sizes) == 1 else ("bucket", bucket)
        seed = keyed_generator(self.seed, *keys).initial_seed() if keys else self.seed
        return torch.from_numpy(self._members[bucket])[batch_rows(sizes[bucket], self.batch_size, number, seed)]

    def read(self, positions: Iterable[int]) -> Iterator[Samples]:
        """The batches at these positions, in their order, decoded by `workers` processes."""
        wanted = (self.rows(position).tolist() for position in positions)
        loader = DataLoader(
            self.windows,
            batch_sampler=wanted,  # pyright: ignore[reportArgumentType]  # any iterable of lists of rows
            num_workers=self.workers,
            collate_fn=_as_is,
            generator=torch.Generator(),  # the global one stays as it is
        )
        for found in loader:
            if isinstance(found, UserError):
                raise found
            yield found

    def __iter__(self) -> Iterator[Samples]:
        for samples in self.read(count(self.position)):
            self.position += 1
            yield samples

    def take(self, num: int) -> list[Samples]:
        """The next `num` batches."""
        return list(islice(self, num))

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, over all ranks."""
        return {"batches": self.position * self.world_size, **self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; UserError unless it is of these data, this order and a number of ranks that fits."""
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise UserError(
                    f"position of another stream: {name} was {state.get(name)}, is {value}; start the stream anew"
                )
        if state["batches"] % self.world_size:
            raise UserError(
                f"position after {state['batches']} batches: {self.world_size} ranks never reach it; use another number"
            )
        self.position = state["batches"] // self.world_size

    @property
    def _identity(self) -> dict[str, Any]:
        windows = self.windows
        chosen = sha256(np.ascontiguousarray(windows.entry, dtype=np.int64).tobytes()).hexdigest()
        return {
            "data": windows.index.sha256,
            "rows": chosen,
            "num_frames": windows.num_frames,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }


def _as_is(batch: Any) -> Any:
    return batch


def _first(members: Mapping[str, bytes], extensions: Sequence[str]) -> bytes:
    return next(members[name] for name in extensions if name in members)


def _facts(members: Mapping[str, bytes], where: str) -> dict[str, Any]:
    """The json of a sample; of one that has only a text (`KEY.txt`), that."""
    try:
        facts = json.loads(members["json"]) if "json" in members else {}
        return {"text": members["txt"].decode(), **facts} if "txt" in members else dict(facts)
    except (ValueError, TypeError) as error:
        raise UserError(f"facts cannot be read ({error}): {where}; {shards.HINT}") from error


def _video(data: bytes, first: int, num: int, fps: Fraction, where: str) -> Tensor:
    """Frames first .. first + num - 1 of an mp4, uint8 [3, num, H, W], decoded from the key frame before them."""
    found: list[Tensor] = []
    try:
        with av.open(io.BytesIO(data), "r") as container:
            stream = container.streams.video[0]
            stream.codec_context.options, stream.codec_context.thread_count = {"err_detect": "explode"}, 1
            assert stream.time_base is not None
            if first:
                container.seek(round(first / fps / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                assert frame.pts is not None
                number = round(frame.pts * stream.time_base * fps)
                if number == first + len(found):
                    found.append(torch.from_numpy(upright(frame, "rgb24")).permute(2, 0, 1))
                if len(found) == num:
                    break
    except (av.FFmpegError, OSError, IndexError) as error:
        raise UserError(f"video cannot be decoded ({error}): {where}; {shards.HINT}") from error
    if len(found) != num:
        raise UserError(f"video ends early, frame {first + len(found)} is missing: {where}; {shards.HINT}")
    return torch.stack(found, dim=1)


def _sound(data: bytes, where: str) -> Tensor:
    """All samples float32 [S] of a FLAC file at 16 kHz."""
    try:
        with av.open(io.BytesIO(data), "r") as container:
            stream = container.streams.audio[0]
            if stream.rate != SAMPLE_RATE or stream.channels != 1:
                raise UserError(f"sound is not {SAMPLE_RATE} Hz mono: {where}; let distill data prepare make it")
            stream.codec_context.options = {"err_detect": "crccheck+explode"}
            parts = [frame.to_ndarray()[0] for frame in container.decode(stream)]
    except (av.FFmpegError, OSError, IndexError) as error:
        raise UserError(f"sound cannot be decoded ({error}): {where}; {shards.HINT}") from error
    whole = np.concatenate(parts) if parts else np.zeros(0, np.int16)
    return torch.from_numpy(
        whole.astype(np.float32) / 2 ** (8 * whole.dtype.itemsize - 1)
    )  # FLAC decodes to whole numbers


def _image(data: bytes, where: str) -> Tensor:
    """An image uint8 [3, H, W]."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"image cannot be read ({error}): {where}; {shards.HINT}") from error
