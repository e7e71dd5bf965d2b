"""WebDataset shards: plain tar files whose members `<key>.<extension>` lie together, and whose bytes depend on content alone.

A sample is first a fragment, its members as they will lie in the tar; a shard is its fragments and the end-of-archive mark.
So samples can be made in any order by any number of processes, and a killed run goes on from the fragments that are whole.
Format: github.com/webdataset/webdataset (a key is a member's name up to its first dot) and POSIX tar with GNU long names.
"""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from teachers.errors import UserError
from teachers.files import atomic_write, replacing
from teachers.media.channels import decoded_sound, keep
from teachers.media.sound import SAMPLE_RATE

END = b"\0" * (2 * tarfile.BLOCKSIZE)
CHECKSUMS = "SHA256SUMS"
HINT = "`distill data check` tells more; prepare the data again"
"""How an error about data that are not whole ends."""
KEY = re.compile(r"[A-Za-z0-9_+-]+")


def sample_key(clip_id: str) -> str:
    """The WebDataset key of a clip: its id with each dot as "+", since a key ends at the first dot; no two ids share one."""
    return clip_id.replace(".", "+")


def write_fragment(path: Path, key: str, members: Mapping[str, bytes | Path]) -> int:
    """Write the members of a sample, extension -> content or the file that has it, in order of extension; return its bytes.

    Owner, time and mode are fixed. The file is whole or absent; UserError on a full disk, ValueError for an unsafe key.
    """
    if not KEY.fullmatch(key):
        raise ValueError(f"a key has letters, digits and _ + - alone: got {key!r}")
    sizes = {name: len(given) if isinstance(given, bytes) else given.stat().st_size for name, given in members.items()}
    with replacing(path, sum(sizes.values())) as temporary, temporary.open("wb") as output:
        tar = tarfile.TarFile(fileobj=output, mode="w", format=tarfile.GNU_FORMAT)  # never closed: no end mark
        for extension in sorted(members):
            info, given = tarfile.TarInfo(f"{key}.{extension}"), members[extension]
            info.size, info.mode = sizes[extension], 0o644
            with io.BytesIO(given) if isinstance(given, bytes) else given.open("rb") as source:
                tar.addfile(info, source)
        return output.tell()


def join(fragments: Sequence[Path], shard: Path) -> tuple[list[int], str]:
    """Make a shard of fragments; return the offset of each in bytes and the shard's sha256. Whole or absent."""
    offsets, digest = [], hashlib.sha256()
    num_bytes = sum(fragment.stat().st_size for fragment in fragments) + len(END)
    with replacing(shard, num_bytes) as temporary, temporary.open("wb") as output:
        for fragment in fragments:
            offsets.append(output.tell())
            with fragment.open("rb") as source:
                while block := source.read(1 << 20):
                    digest.update(block)
                    output.write(block)
        digest.update(END)
        output.write(END)
    return offsets, digest.hexdigest()


def samples(shard: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members (extension -> content) of each sample, in order; UserError when the shard is missing or damaged."""
    key, members = "", {}
    with _reading(shard), tarfile.open(shard, "r:") as tar:
        for name, extension, content in _members(tar, shard):
            if name != key and members:
                yield key, members
                members = {}
            key, members[extension] = name, content
    if members:
        yield key, members


@dataclass(frozen=True, slots=True)
class Indexed:
    """A sample by the index beside its shard: WebDataset key, id of its clip, first byte and number of bytes in the shard, and of
    its video the frames, (height, width), and whether it has sound."""

    shard: Path
    key: str
    id: str
    offset: int
    num_bytes: int
    frames: int
    size: tuple[int, int]
    has_sound: bool

    def __str__(self) -> str:
        return f"sample {self.key} of {self.shard}"

    def members(self) -> dict[str, bytes]:
        """Its members (extension -> content); UserError, naming shard and sample, unless it lies there."""
        with _reading(self.shard, f"sample {self.key}: "):
            with self.shard.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.num_bytes)
            with tarfile.open(fileobj=io.BytesIO(data + END), mode="r:") as tar:
                found = list(_members(tar, self.shard))
        if len(data) != self.num_bytes or not found or any(name != self.key for name, _, _ in found):
            raise UserError(f"shard is damaged (sample {self.key} is not at byte {self.offset}): {self.shard}; {HINT}")
        return {extension: content for _, extension, content in found}


def read_index(shard: Path) -> list[Indexed]:
    """The samples that the JSON file beside a shard of `distill data prepare` lists; UserError where it is missing or damaged."""
    path = shard.with_suffix(".json")
    try:
        return [
            Indexed(
                shard=shard,
                key=row["key"],
                id=row["id"],
                offset=int(row["offset"]),
                num_bytes=int(row["bytes"]),
                frames=int(row["frames"]),
                size=(int(row["size"][0]), int(row["size"][1])),
                has_sound=bool(row["sound"]),
            )
            for row in json.loads(path.read_text(encoding="utf-8"))["samples"]
        ]
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise UserError(f"index of a shard cannot be read ({error!r}): {path}; {HINT}") from error


def read_indices(folder: Path) -> list[Indexed]:
    """The samples of all shards in the list of checksums, in order; UserError where one has no index."""
    names = sorted(name for name in read_checksums(folder) if name.endswith(".tar"))
    return [sample for name in names for sample in read_index(folder / name)]


def verify(folder: Path, rank: int = 0, world_size: int = 1) -> None:
    """UserError for the first shard of this rank's share that differs from its checksum."""
    sums = read_checksums(folder)
    for name in sorted(name for name in sums if name.endswith(".tar"))[rank::world_size]:
        path = folder / name
        if not path.is_file() or sha256(path) != sums[name]:
            raise UserError(f"shard differs from its checksum: {path}; {HINT}")


def frames_of(video: bytes, start: Fraction = Fraction(0)) -> Iterator[av.VideoFrame]:
    """The frames of an mp4 in a sample, decoded from the key frame at or before `start` seconds on; PyAV's error for damage."""
    with av.open(io.BytesIO(video), "r") as container:
        stream = container.streams.video[0]
        stream.codec_context.options, stream.codec_context.thread_count = {"err_detect": "explode"}, 1
        if start:
            container.seek(round(start / Fraction(stream.time_base or 1)), stream=stream)
        yield from container.decode(stream)


def sound_of(flac: bytes) -> Tensor:
    """The sound of a sample, float32 [S]; PyAV's error for damage, ValueError where it is not 16 kHz mono."""
    with av.open(io.BytesIO(flac), "r") as container:
        stream = container.streams.audio[0]
        if stream.rate != SAMPLE_RATE or keep(stream.codec_context.layout).nb_channels != 1:
            raise ValueError(f"it is not {SAMPLE_RATE} Hz mono")
        stream.codec_context.options = {"err_detect": "crccheck+explode"}
        frames = list(decoded_sound(container, stream))
        if any(frame.layout.nb_channels != 1 for frame in frames):
            raise ValueError("its channels change")
        parts = [frame.to_ndarray()[0] for frame in frames]
    whole = np.concatenate(parts) if parts else np.zeros(0, np.int16)
    return torch.from_numpy(whole.astype(np.float32) / 2 ** (8 * whole.dtype.itemsize - 1))  # FLAC has whole numbers


def _members(tar: tarfile.TarFile, shard: Path) -> Iterator[tuple[str, str, bytes]]:
    """Key, extension and content of each member."""
    for info in tar:
        key, _, extension = info.name.partition(".")
        file = tar.extractfile(info)
        if file is None or not extension:
            raise UserError(f"shard has a member that is no part of a sample ({info.name}): {shard}")
        yield key, extension, file.read()


@contextmanager
def _reading(shard: Path, what: str = "") -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"shard not found: {shard}; {HINT}") from error
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(f"shard is damaged ({what}{error}): {shard}; {HINT}") from error


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write SHA256SUMS (file name -> sha256), as `sha256sum --check` reads it."""
    atomic_write(folder / CHECKSUMS, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))


def read_checksums(folder: Path) -> dict[str, str]:
    """File name -> sha256; UserError when the list is missing or damaged."""
    path = folder / CHECKSUMS
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"no prepared data, {CHECKSUMS} is missing: {folder}; let distill data prepare end") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"list of checksums cannot be read ({error}): {path}; prepare the data again") from error
    found = {}
    for line in lines:
        digest, _, name = line.partition("  ")
        if not re.fullmatch(r"[0-9a-f]{64}", digest) or Path(name).name != name or not name:
            raise UserError(f"list of checksums is damaged ({line[:80]!r}): {path}; prepare the data again")
        found[name] = digest
    return found
