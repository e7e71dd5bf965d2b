"""Any folder of clips: every mp4, mov, mkv or webm in it, with texts and other metadata from files beside them.

`NAME.txt` beside `NAME.mp4` is the clip's text. A `metadata.csv`, `metadata.json` or `metadata.jsonl` has a row for every clip:
`file_name` (relative to the folder; the name that Hugging Face's VideoFolder uses) and any of the columns in `COLUMNS`.
"""

import csv
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from distill.data.datasets.manifest import SAFE_ID, Clip, Manifest, Refused, clip_or_refusal, gather, read_lines
from teachers.config import nearest
from teachers.errors import UserError
from teachers.media.film import probe

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm")
OTHER_VIDEO = re.compile(
    r"\.(3g2|3gp|asf|avi|divx|dv|f4v|flv|gxf|h26[45]|hevc|ivf|m2t|m2ts|m2v|m4v|mjpeg|mk3d|mod|mpe|mpeg|mpg|mts|mxf|nut|obu|og[mv]|"
    r"part|qt|rm|rmvb|tod|ts|vob|wmv|wtv|y4m)"
)
BESIDE = re.compile(
    r"\.(aac|avif|csv|flac|gif|heic|heif|jpeg|jpg|json|jsonl|m4a|md|mka|mp3|npy|npz|oga|ogg|opus|parquet|png|pt|safetensors|srt|tar|"
    r"txt|vtt|wav|webp|yaml|yml|zip)"
)
"""Suffixes of what may lie beside videos."""
MARKS = (
    (4, b"ftyp"),
    (0, b"\x1aE\xdf\xa3"),
    (8, b"AVI "),
    (0, b"\x06\x0e+4"),
    (0, b"OggS"),
    (0, b"\x30\x26\xb2\x75"),
    (0, b"FLV"),
)
"""First bytes of videos, and where: mp4, mkv, avi, mxf, ogg, asf, flv."""
METADATA = ("metadata.csv", "metadata.json", "metadata.jsonl")
COLUMNS = ("id", "start", "end", "crop", "crop_size", "text", "licence", "split", "identity")


def read(annotations: Path | None, videos: Path | None = None) -> Manifest:
    """Clips of the folder `videos`; `annotations` is a metadata file or a folder that may contain one. Either is optional.

    Without metadata every video is a clip as a whole, named after its path and with itself as its identity. With metadata
    its rows are the clips, and a video that has no row is refused. In a csv `crop` is "x y width height" in pixels, `crop_size`
    "width height"; in json they are lists. UserError when a folder or the metadata cannot be read at all.
    """
    path = annotations or videos
    if path is None:
        raise UserError("no folder of clips: neither annotations nor videos; give one")
    metadata = _metadata_file(Path(path))
    where = Path(videos or (metadata.parent if metadata else path))
    library = Videos(where)
    rows: list[Clip | Refused] = list(library.refused)
    if metadata is None:
        rows += [_clip(library, {"file_name": source}) for source in library.sources]
    else:
        rows += _described(library, metadata)
    return gather(rows)


class Videos:
    """The source videos under a folder, found by name; without a folder every name stands for an mp4 of that name.

    Hidden files and files that are no videos are skipped. In `refused` are folders that cannot be read or are links,
    and videos of other formats, by their suffix or, where it is none that is known, by their first bytes.
    """

    def __init__(self, folder: Path | None):
        self.folder = None if folder is None else Path(folder)
        self.sources: list[str] = []
        self.refused: list[Refused] = []
        self._by_stem: dict[str, list[str]] = {}
        self._sizes: dict[str, tuple[int, int]] = {}
        if self.folder is not None:
            self._walk(self.folder)

    def find(self, *stems: str) -> str:
        """The source whose name without suffix is the first of `stems` that there is; UserError when none or several are."""
        if self.folder is None:
            return f"{stems[0]}.mp4"
        for stem in stems:
            sources = self._by_stem.get(stem, [])
            if len(sources) > 1:
                raise UserError(f"several videos of one name: {', '.join(sources)}; keep one")
            if sources:
                return sources[0]
        raise UserError(
            f"video not found: {' or '.join(stems)} ({', '.join(VIDEO_SUFFIXES)}); put it there or ignore it"
        )

    def size(self, source: str) -> tuple[int, int]:
        """Width and height in pixels of the upright frame; UserError when the file contains none."""
        if source not in self._sizes:
            self._sizes[source] = self._probe(source)[0]
        return self._sizes[source]

    def seconds(self, source: str) -> float:
        """Duration by the container's header, or of its packets; UserError when the file contains no video."""
        return self._probe(source)[1]

    def _probe(self, source: str) -> tuple[tuple[int, int], float]:
        path = self._path(source)
        try:
            return probe(path)
        except UserError as error:  # the same wherever the folder lies
            raise UserError(str(error).replace(str(path), path.name)) from error

    def text(self, source: str) -> str:
        """The content of `NAME.txt` beside the video, or ""; UserError when it is not UTF-8."""
        path = self._path(source).with_suffix(".txt")
        try:
            return path.read_text(encoding="utf-8-sig").strip() if path.is_file() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"text cannot be read ({error}): {path.name}; save it as UTF-8") from error

    def _path(self, source: str) -> Path:
        if self.folder is None:
            raise ValueError("no folder of videos was given")
        return self.folder / source

    def _walk(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(
                f"folder of videos {'is no folder' if folder.exists() else 'not found'}: {folder}; check the path"
            )
        for where, folders, files in os.walk(folder, onerror=self._unreadable):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            here = PurePosixPath(Path(where).relative_to(folder).as_posix())
            for name in folders:
                if Path(where, name).is_symlink():
                    self.refused.append(Refused(name, (here / name).as_posix(), "a link to a folder is not followed"))
            for name in files:
                self._add((here / name).as_posix())
        self.sources.sort()
        for source in self.sources:
            self._by_stem.setdefault(PurePosixPath(source).stem, []).append(source)

    def _add(self, name: str) -> None:
        suffix = PurePosixPath(name).suffix.lower()
        if PurePosixPath(name).name.startswith("."):
            return
        if suffix in VIDEO_SUFFIXES:
            if self._path(name).is_file():
                self.sources.append(name)
            else:
                self.refused.append(Refused(name, name, "not a regular file"))
        elif OTHER_VIDEO.fullmatch(suffix) or (not BESIDE.fullmatch(suffix) and self._is_video(name)):
            reason = f"not one of {', '.join(VIDEO_SUFFIXES)}; convert it, ffmpeg -i IN OUT.mp4"
            self.refused.append(Refused(name, name, reason))

    def _is_video(self, name: str) -> bool:
        path = self._path(name)
        try:
            with path.open("rb") if path.is_file() else io.BytesIO() as file:
                head = file.read(16)
        except OSError:
            return False
        return any(head[at:].startswith(mark) for at, mark in MARKS)

    def _unreadable(self, error: OSError) -> None:
        path = Path(error.filename)
        if path == self.folder:
            raise UserError(
                f"folder of videos cannot be read ({error.strerror}): {path}; check its permissions"
            ) from error
        self.refused.append(Refused(path.name, path.name, f"folder cannot be read: {error.strerror}"))


def _metadata_file(path: Path) -> Path | None:
    """The metadata file that `path` is or, as a folder, contains; UserError when it contains several or is neither."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"annotations not found: {path}; give a metadata file or a folder")
    files = [path / name for name in METADATA if (path / name).is_file()]
    if len(files) > 1:
        raise UserError(f"several metadata files: {', '.join(file.name for file in files)} in {path}; keep one")
    return files[0] if files else None


def _described(library: Videos, metadata: Path) -> Iterator[Clip | Refused]:
    """A clip or refusal for every row of `metadata`, and a refusal for every video without a row."""
    refused: list[Clip | Refused] = []
    rows = list(_rows(metadata, refused))
    yield from refused
    num_rows = Counter(row["file_name"] for row in rows)
    known, used = set(library.sources), Counter()
    for row in rows:
        if (source := row["file_name"]) not in known:
            yield Refused(str(row.get("id", source)), source, f"{metadata.name} names a video that is not there")
        else:
            yield _clip(library, row, used[source] if num_rows[source] > 1 else None)
            used[source] += 1
    for source in library.sources:
        if source not in num_rows:
            yield Refused(source, source, f"no row in {metadata.name}")


def _clip(library: Videos, row: dict[str, Any], index: int | None = None) -> Clip | Refused:
    """The clip of a metadata row; clips of one file are numbered by `index` where they have no id of their own."""
    source, number = row["file_name"], "" if index is None else f"_{index:03d}"
    fields = {"id": safe_id(source) + number, "identity": source, "start": 0.0, **row}
    del fields["file_name"]
    try:
        if fields.get("crop") is not None and fields.get("crop_size") is None:
            fields["crop_size"] = library.size(source)
        fields["text"] = fields.get("text") or library.text(source)
    except UserError as error:
        return Refused(str(fields["id"]), source, str(error))
    return clip_or_refusal(dataset="folder", source=source, **fields)


def safe_id(source: str) -> str:
    """`source` without its suffix as an id, folders joined by `__`; a name with other characters gets a hash instead of them."""
    stem = PurePosixPath(source).with_suffix("").as_posix()
    name = stem.replace("/", "__").replace(".", "_")
    if SAFE_ID.fullmatch(name) and len(name) <= 150:
        return name
    digest = hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return (re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:120] + "-" + digest).lstrip("-")


def _rows(path: Path, refused: list[Clip | Refused]) -> Iterator[dict[str, Any]]:
    """Rows of a metadata file with their values typed; what is no row goes to `refused`; UserError for the whole file."""
    if path.suffix == ".json":
        pairs: Iterable[tuple[int, Any]] = enumerate(_json_list(path), start=1)
    elif path.suffix == ".jsonl":
        pairs = ((number, _json(text)) for number, text in read_lines(path, refused))
    else:
        pairs = _csv_rows(path, refused)
    for number, values in pairs:
        where = f"{path.name}:{number}"
        if not isinstance(values, dict) or not isinstance(name := values.get("file_name"), str) or not name:
            refused.append(Refused(where, path.name, "a row must have a file_name"))
            continue
        for name in values.keys() - {"file_name", *COLUMNS}:
            raise UserError(f"unknown column '{name}': {where}; {nearest(str(name), COLUMNS)}")
        try:
            yield {name: _typed(name, value) for name, value in values.items() if value is not None and value != ""}
        except (ValueError, TypeError, OverflowError) as error:
            refused.append(Refused(where, values["file_name"], f"a value cannot be read: {error}"))


def _typed(name: str, value: Any) -> Any:
    if name in ("start", "end"):
        return float(value)
    if name in ("crop", "crop_size"):
        return tuple(int(part) for part in value.split()) if isinstance(value, str) else tuple(value)
    return value


def _csv_rows(path: Path, refused: list[Clip | Refused]) -> Iterator[tuple[int, Any]]:
    good = list(read_lines(path, refused))
    reader = csv.DictReader(io.StringIO("\n".join(text for _, text in good)), restkey="(too many values)", strict=True)
    try:
        yield from ((good[reader.line_num - 1][0], row) for row in reader)
    except csv.Error as error:
        raise UserError(f"not a csv file ({error}): {path}; save it again") from error


def _json_list(path: Path) -> list[Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"metadata cannot be read ({error}): {path}; save it as UTF-8 json") from error
    if not isinstance(values, list):
        raise UserError(f"metadata must be a list of rows: {path}; see metadata.jsonl for one row a line")
    return values


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
