"""The manifest: which clips a dataset has, where they lie, and which were refused and why.

On disk: `manifest.parquet` with a row for every clip, and beside it `manifest.refused.jsonl` with a line for every refused one.
"""

import codecs
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from teachers.errors import UserError
from teachers.files import replacing

SAFE_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
SEPARATOR, DRIVE = re.compile(r"[/\\]"), re.compile(r"[A-Za-z]:")
MAX_ID_LENGTH = 200  # a file name has at most 255 bytes on common file systems, the suffix included
MAX_PIXELS = 2**31 - 1

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("start", pa.float64(), nullable=False),
        pa.field("end", pa.float64()),
        pa.field("crop", pa.list_(pa.int32())),
        pa.field("crop_size", pa.list_(pa.int32())),
        pa.field("text", pa.string(), nullable=False),
        pa.field("licence", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("identity", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """One clip of a source file; UserError for an invalid field.

    id: a safe file name, letters, digits, `._-`, unique in its manifest
    source: the file, relative to the folder of videos
    start, end: seconds of the source; end None is the source's end
    crop: x, y, width, height in pixels of a frame of `crop_size`; None is the whole frame
    crop_size: width, height of the frame that the crop was measured in; None is the source's own
    text: the caption; licence: as text; split: train, test, ... or "" where none is known
    identity: what must be on one side of a split only (a person, or the source's name where the person is not known)
    """

    id: str
    dataset: str
    source: str
    start: float = 0.0
    end: float | None = None
    crop: tuple[int, int, int, int] | None = None
    crop_size: tuple[int, int] | None = None
    text: str = ""
    licence: str = ""
    split: str = ""
    identity: str = ""

    def __post_init__(self):
        check_id(self.id)
        for name in ("dataset", "source", "text", "licence", "split", "identity"):
            _check_text(name, getattr(self, name))
        _check_source(self.source)
        if not (math.isfinite(self.start) and self.start >= 0):
            raise UserError(f"clip start must be 0 s or later: got {self.start}; correct the annotation")
        if self.end is not None and not (math.isfinite(self.end) and self.end > self.start):
            raise UserError(f"clip end must lie after its start {self.start} s: got {self.end}; correct the annotation")
        _check_crop(self.crop, self.crop_size)


@dataclass(frozen=True, slots=True)
class Refused:
    """A clip, or a line of an annotation file, that could not be used: its id as annotated (perhaps unsafe) and why.

    What is not UTF-8 is kept as escapes, so that every refusal can be printed.
    """

    id: str
    source: str
    reason: str

    def __post_init__(self):
        for name in ("id", "source", "reason"):
            object.__setattr__(self, name, getattr(self, name).encode("utf-8", "backslashreplace").decode())


@dataclass(frozen=True)
class Manifest:
    """All clips of a dataset, ids unique, and all refused ones; made by `gather`."""

    clips: tuple[Clip, ...]
    refused: tuple[Refused, ...] = ()

    def __post_init__(self):
        seen = set()
        for clip in self.clips:
            if clip.id in seen:
                raise UserError(f"clip id twice in one manifest: {clip.id}; rename one of them")
            seen.add(clip.id)

    def save(self, path: Path) -> None:
        """Write the clips to `path` (parquet) and the refused beside it (`refused_path`), each whole or not at all."""
        path = Path(path)
        columns = {name: [getattr(clip, name) for clip in self.clips] for name in SCHEMA.names}
        table = pa.Table.from_pydict(columns, schema=SCHEMA)
        lines = "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in self.refused)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(refused_path(path), len(lines)) as temporary:
                temporary.write_bytes(lines.encode("ascii"))
            with replacing(path, table.nbytes) as temporary:
                pq.write_table(table, temporary)
        except OSError as error:
            raise UserError(
                f"manifest cannot be written ({error.strerror or error}): {path}; choose another place"
            ) from error

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """The manifest in `path`; UserError when it or its list of refused clips is missing, damaged or not a manifest."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"manifest not found: {path}; check the path")
        try:
            with pq.ParquetFile(path) as file:
                table = file.read()
            if table.schema.remove_metadata() != SCHEMA:
                raise UserError("not a manifest, it has other columns; make it again with `distill data prepare`")
            rows = table.to_pylist()
            for row in rows:
                row.update({name: row[name] and tuple(row[name]) for name in ("crop", "crop_size")})
            clips = tuple(Clip(**row) for row in rows)
            lines = refused_path(path).read_text(encoding="utf-8").splitlines()
            return cls(clips, tuple(Refused(**json.loads(line)) for line in lines))
        except UserError as error:
            raise UserError(f"{error} (in {path})") from error
        except OSError as error:
            raise UserError(
                f"manifest cannot be read ({error.strerror or error}): {error.filename or path}; check the path"
            ) from error
        except (pa.ArrowException, ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"manifest is damaged ({error}): {path}; make it again with `distill data prepare`"
            ) from error


def clip_or_refusal(**fields) -> Clip | Refused:
    """`Clip(**fields)`, or why it cannot be one."""
    try:
        return Clip(**fields)
    except UserError as error:
        return Refused(str(fields["id"]), str(fields["source"]), str(error))


def gather(rows: Iterable[Clip | Refused]) -> Manifest:
    """Rows of a reader as a manifest, in their order; of clips with the same id the first stays, the others are refused."""
    clips: dict[str, Clip] = {}
    refused = []
    for row in rows:
        if isinstance(row, Refused):
            refused.append(row)
        elif row.id in clips:
            refused.append(Refused(row.id, row.source, f"duplicate id, first used for {clips[row.id].source}"))
        else:
            clips[row.id] = row
    return Manifest(tuple(clips.values()), tuple(refused))


def refused_path(path: Path) -> Path:
    """Where the refused clips of the manifest at `path` are listed."""
    return Path(path).with_suffix(".refused.jsonl")


def read_lines(path: Path, refused: "list[Clip | Refused]") -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 annotation file, without its byte order mark and blank lines.

    A line in another encoding goes to `refused`; UserError when the file is missing, unreadable, or UTF-16 as a whole.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise UserError(f"annotation file is UTF-16: {path}; save it as UTF-8")
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError:
                    reason = f"line {number} is not UTF-8: {line[:80]!r}"
                    refused.append(Refused(f"{path.name}:{number}", path.name, reason))
                    continue
                if text:
                    yield number, text
    except OSError as error:
        raise UserError(f"annotation file cannot be read ({error.strerror}): {path}; check the path") from error


def check_id(value: str) -> None:
    """UserError unless `value` is safe as a file name."""
    if not isinstance(value, str) or not SAFE_ID.fullmatch(value) or ".." in value or len(value) > MAX_ID_LENGTH:
        raise UserError(
            f"clip id is no safe file name: {str(value)[:80]!r}; use 1 to {MAX_ID_LENGTH} of the characters "
            "A-Z a-z 0-9 . _ - with no '..' and no '.' in front"
        )


def _check_text(name: str, value: str) -> None:
    if not isinstance(value, str):
        raise UserError(f"clip {name} must be text: got {value!r}; correct the annotation")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"clip {name} is not UTF-8: {value[:80]!r}; save the annotation as UTF-8") from error


def _check_source(source: str) -> None:
    """A source is a relative path that stays in the folder of videos, read as either system would read it."""
    parts = SEPARATOR.split(source)
    if not parts[0] or ".." in parts or DRIVE.match(source) or "\0" in source:
        raise UserError(f"clip source must be a file inside the folder of videos: got {source!r}; correct its path")


def _check_crop(crop: tuple[int, int, int, int] | None, crop_size: tuple[int, int] | None) -> None:
    numbers = (*(crop or ()), *(crop_size or ()))
    if any(type(number) is not int or abs(number) > MAX_PIXELS for number in numbers):
        raise UserError(f"crop must be whole pixels: got {crop} of {crop_size}; correct the annotation")
    if crop_size is not None and (len(crop_size) != 2 or min(crop_size) < 1):
        raise UserError(f"crop_size must be a width and a height of 1 or more: got {crop_size}; correct the annotation")
    if crop is None:
        return
    if len(crop) != 4 or min(crop[2:]) < 1:
        raise UserError(f"crop must be x, y, width, height with 1 pixel or more: got {crop}; correct the annotation")
    x, y, width, height = crop
    if min(x, y) < 0 or (crop_size is not None and (x + width > crop_size[0] or y + height > crop_size[1])):
        raise UserError(f"crop lies outside the frame: got {crop} of {crop_size or 'any size'}; correct the annotation")
