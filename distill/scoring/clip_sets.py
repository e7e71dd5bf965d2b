"""Sets of clips to score: folders of videos or tensors, prepared shards, manifests; found by name (`clip_io` reads them).

A set is a folder of mp4, mov, mkv or webm videos, of `NAME.safetensors` (`video` [3, T, H, W], uint8 or float in [-1, 1],
`audio` [S] at 16 kHz, metadata `fps`, `text`, and `chunks`: the frames at which all but the first begin), a folder that `distill
data prepare` wrote, or a manifest of `distill data`, of videos or of such a folder's clips. Beside them: `NAME.txt` says what
happens, `NAME.wav` or `NAME.flac` is the sound and goes before a video's own track, `faces.json` has a face box for each clip:
{"NAME": [left, top, right, bottom]} in pixels of the clip before it is scaled, null where no face was found. A dot in a name
counts as "_".
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from distill.data.datasets import folder as folders
from distill.data.datasets.manifest import Clip, Manifest
from distill.data.prepare import shards
from teachers.disk.read import read_text
from teachers.errors import UserError
from teachers.files import canonical_json

TENSORS, FACES = ".safetensors", "faces.json"
SOUNDS = (".wav", ".flac")


@dataclass(frozen=True)
class Entry:
    """One clip of a set: where it lies, what is said to happen, its sound beside it, and its face box.

    box: (left, top, right, bottom), None where no face was found; `has_box` is False where none was looked for
    sample: where it lies in a shard at `path`, cut from its source as `clip` says
    """

    clip: Clip
    path: Path
    sound: Path | None
    text: str
    has_box: bool = False
    box: tuple[float, float, float, float] | None = None
    sample: shards.Indexed | None = field(default=None, compare=False)

    @property
    def identity(self) -> str:
        """sha256 over the bytes of its files and which part of them it is."""
        clip = {name: asdict(self.clip)[name] for name in ("start", "end", "crop", "crop_size")}
        sound = None if self.sound is None else file_sha256(self.sound)
        place = () if self.sample is None else (self.sample.offset, self.sample.num_bytes)
        file = file_sha256(self.path, *place)
        facts = {"file": file, "clip": clip, "sound": sound, "box": self.box, "looked": self.has_box}
        return hashlib.sha256(canonical_json(facts).encode()).hexdigest()


def open_set(path: Path, videos: Path | None = None) -> dict[str, Entry]:
    """The clips of a folder or a manifest (its videos or shards under `videos`, else beside it), by name in alphabetical order.

    Raises UserError in one line where the set is missing or empty, and where files in it can be no clips.
    """
    path = Path(path)
    if path.is_file():
        root, manifest = Path(videos or path.parent), Manifest.load(path)
    elif path.is_dir():
        root = path
        named = any((path / name).is_file() for name in folders.METADATA)
        if (path / shards.CHECKSUMS).is_file():
            manifest = Manifest.load(path / "manifest.parquet")
        else:
            manifest = folders.read(path if named else None, path)
    else:
        raise UserError(f"no clips: {path} is neither a folder nor a manifest; check the path")
    prepared = (root / shards.CHECKSUMS).is_file()
    samples = {_named(sample.id): sample for sample in shards.read_indices(root)} if prepared else None
    if manifest.refused and samples is None:  # what is in no shard, `distill data prepare` reported
        first = manifest.refused[0]
        more = f" and {len(manifest.refused) - 1} more" if len(manifest.refused) > 1 else ""
        raise UserError(f"{path} holds what is no clip: {first.source}: {first.reason}{more}; fix or remove it")
    clips = [replace(clip, id=_named(clip.id)) for clip in manifest.clips]
    if path.is_dir():
        clips += [Clip(id=folders.safe_id(f.name), dataset="folder", source=f.name) for f in path.glob(f"*{TENSORS}")]
    boxes = _boxes((path if path.is_dir() else path.parent) / FACES)
    entries: dict[str, Entry] = {}
    for clip in sorted(clips, key=lambda clip: clip.id):
        if clip.id in entries:
            raise UserError(f"two clips of one name: {clip.id} in {path}; remove one of them")
        found = _at(root, clip) if samples is None else _in_shard(root, clip, samples)
        entries[clip.id] = replace(found, has_box=clip.id in boxes, box=boxes.get(clip.id))
    if not entries:
        raise UserError(f"no clips in {path}; put mp4, mov, mkv, webm or {TENSORS} files there")
    if unknown := sorted(boxes.keys() - entries.keys()):
        raise UserError(f"{FACES} names a clip that is not there: {unknown[0]}; correct the name")
    return entries


def _at(root: Path, clip: Clip) -> Entry:
    file = root / clip.source
    beside = (file.with_suffix(suffix) for suffix in SOUNDS)
    sound = next((sound for sound in beside if sound.is_file()), None)
    return Entry(clip=clip, path=file, sound=sound, text=clip.text or _text(file))


def _in_shard(root: Path, clip: Clip, samples: Mapping[str, shards.Indexed]) -> Entry:
    sample = samples.get(clip.id)
    if sample is None:
        raise UserError(f"clip {clip.id} is in no shard: {root}; prepare it, or remove it from the manifest")
    return Entry(clip=clip, path=sample.shard, sound=None, text=clip.text, sample=sample)


def facts_of(path: Path) -> dict[str, str]:
    """The metadata of a clip of tensors, empty where there is no whole file."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def _named(clip: str) -> str:
    """What a clip is called here: as a file of that name is in a folder (`distill.data.datasets.folder.safe_id`), without dots."""
    return clip.replace(".", "_")


def _text(path: Path) -> str:
    """The text of a clip of tensors: its metadata, or `NAME.txt` beside it."""
    if path.suffix != TENSORS:
        return ""
    beside = path.with_suffix(".txt")
    return facts_of(path).get("text", "") or (read_text(beside).strip() if beside.is_file() else "")


@lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, changed: int, first: int | None, count: int) -> str:
    del size, changed
    if first is not None:
        with path.open("rb") as file:
            file.seek(first)
            return hashlib.sha256(file.read(count)).hexdigest()
    if path.suffix != TENSORS:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    facts = facts_of(path)  # they lie in the file in any order
    digest = hashlib.sha256((facts.get("fps", "") + facts.get("chunks", "")).encode())
    try:
        with safe_open(path, "pt") as tensors:
            for name in sorted(tensors.keys()):
                value = tensors.get_tensor(name).contiguous()
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"no clip of tensors ({error}): {path.name}; it needs video [3, T, H, W] and fps") from error
    return digest.hexdigest()


def file_sha256(path: Path, first: int | None = None, count: int = 0) -> str:
    """Of a file's bytes (`count` from `first` on), or of what a clip of tensors holds; read once as long as it does not change."""
    try:
        facts = path.stat()
        return _sha256(path, facts.st_size, facts.st_mtime_ns, first, count)
    except OSError as error:
        raise UserError(f"clip cannot be read ({error.strerror}): {path}; check the path") from error


def _boxes(path: Path) -> dict[str, tuple[float, float, float, float] | None]:
    if not path.is_file():
        return {}
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"face boxes cannot be read ({error}): {path}; give JSON of clip -> [l, t, r, b]") from error
    if not isinstance(given, dict):
        raise UserError(f"face boxes are no mapping: {path}; give JSON of clip -> [left, top, right, bottom]")
    for name, box in given.items():
        numbers = isinstance(box, list) and len(box) == 4 and all(type(x) in (int, float) for x in box)
        if box is not None and not (numbers and all(map(math.isfinite, box)) and box[0] < box[2] and box[1] < box[3]):
            raise UserError(f"face box of {name} is not [left, top, right, bottom] or null: {path}; got {box}")
    return {
        _named(name): None if box is None else (float(box[0]), float(box[1]), float(box[2]), float(box[3]))
        for name, box in given.items()
    }
