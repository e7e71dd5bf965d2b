"""Clips to be scored: those in prepared shards, or those of a manifest in their source videos."""

import csv
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from distill.data.curate.scores import VERSION
from distill.data.datasets.manifest import Clip, Manifest
from distill.data.prepare import shards
from distill.data.prepare.framing import FaceWatch, crop_box, find_face
from teachers.config import fraction
from teachers.errors import UserError
from teachers.files import canonical_json
from teachers.media.container import upright
from teachers.media.crop import Box
from teachers.media.face import detector
from teachers.media.film import probe, read_frames
from teachers.media.sound import LONGEST, SAMPLE_RATE, read_sound

FACE_COLUMNS = ("id", "x", "y", "width", "height")


@dataclass(frozen=True, kw_only=True)
class Framing:
    """The shape (H, W) for which clips of source videos will be cropped, None for none, and the rule (`teachers.media.crop`)."""

    size: tuple[int, int] | None = None
    crop: str = "face"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A clip and where it lies: in a shard as `sample`, or in the source video at `path` where that is None.

    fingerprint: sha256 of whatever its scores depend on; box: its face, where the user provides it; framing: how a source video
    will be cropped
    """

    clip: Clip
    path: Path
    sample: shards.Indexed | None
    fingerprint: str
    box: Box | None = None
    framing: Framing = Framing()


@dataclass(frozen=True)
class Content:
    """A clip's frames uint8 [H, W, 3], frames a second, and sound float32 [S] at 16 kHz or None.

    scale: pixels of the clip for one of its source, across and down; face_cut: see `scores.score`
    """

    frames: Iterator[np.ndarray]
    fps: Fraction
    sound: np.ndarray | None
    scale: tuple[Fraction, Fraction] = (Fraction(1), Fraction(1))
    face_cut: Callable[[], float | None] = lambda: None


def read_candidates(
    data: Path, videos: Path | None, faces: Mapping[str, Box], framing: Framing | None = None
) -> tuple[list[Candidate], Manifest]:
    """The clips of a folder of prepared data, or of a manifest.parquet with its `videos`, and the manifest; the latter are scored
    as `framing` will crop them.

    Raises UserError when there are none, for a face of an unknown clip, and for incomplete shards.
    """
    if data.suffix == ".parquet" and videos is None:
        raise UserError(f"--videos is missing: {data} lists clips of source videos; give their folder")
    framing = framing or Framing()
    if data.suffix != ".parquet" and framing.size is not None:
        raise UserError(f"--size is for a manifest.parquet: {data} is a folder of shards, cropped already; remove it")
    if data.suffix != ".parquet" and videos is not None:
        raise UserError(f"--videos is for a manifest.parquet: {data} is a folder of shards; remove it")
    manifest = Manifest.load(data if videos is not None else data / "manifest.parquet") if data.exists() else None
    if manifest is None:
        raise UserError(f"data not found: {data}; give a folder that distill data prepare wrote, or a manifest.parquet")
    unknown_ids = sorted(faces.keys() - {clip.id for clip in manifest.clips})
    if unknown_ids:
        raise UserError(f"face of a clip that is not in the data: {unknown_ids[0]}; correct its id or remove it")
    sums = shards.read_checksums(data) if videos is None else {}
    samples = {sample.id: sample for sample in shards.read_indices(data)} if videos is None else {}
    candidates = []
    for clip in manifest.clips:
        sample = samples.get(clip.id)
        if videos is not None:
            path = videos / clip.source
            content = _stamp(path)
        elif sample is not None:
            path, content = sample.shard, f"{sums[sample.shard.name]} {sample.offset}"
        else:
            raise UserError(f"clip {clip.id} is in no shard: {data}; run distill data check on it")
        box = faces.get(clip.id)
        inputs = [VERSION, content, asdict(clip), None if box is None else asdict(box), asdict(framing), detector()]
        fingerprint = hashlib.sha256(canonical_json(inputs).encode()).hexdigest()
        candidates.append(
            Candidate(clip=clip, path=path, sample=sample, fingerprint=fingerprint, box=box, framing=framing)
        )
    return candidates, manifest


def _stamp(path: Path) -> str:
    """Size and modification time of a source video: enough to notice another file without reading it."""
    try:
        status = path.stat()
    except OSError:
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"


def read_faces(path: Path | None) -> dict[str, Box]:
    """Clip id -> its face from a CSV with the columns id, x, y, width, height (brow to chin, as fractions of the clip's frame)."""
    if path is None:
        return {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if tuple(rows.fieldnames or ()) != FACE_COLUMNS:
                raise UserError(f"faces must have the columns {','.join(FACE_COLUMNS)}: {path}; correct its first line")
            boxes = {}
            for row in rows:
                sides = [float(row[name]) for name in FACE_COLUMNS[1:]]
                if not all(0 <= side <= 1 and math.isfinite(side) for side in sides) or min(sides[2:]) <= 0:
                    raise UserError(
                        f"face must be in fractions of the frame, 0 to 1: got {sides} for {row['id']}: {path}"
                    )
                boxes[row["id"]] = Box(*sides, confidence=1.0)
            return boxes
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"faces cannot be read ({error}): {path}; check the path") from error
    except (ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"faces cannot be read ({error}): {path}; give numbers in line {rows.line_num}") from error


def opened(candidate: Candidate) -> Content:
    """The content of a candidate, its frames decoded lazily; UserError or av's error for damaged content."""
    if candidate.sample is None:
        return _from_video(candidate.clip, candidate.path, candidate.framing)
    members = candidate.sample.members()
    metadata = json.loads(members["json"])
    if metadata["id"] != candidate.clip.id:
        raise UserError(f"shard contains clip {metadata['id']} where its index has {candidate.clip.id}")
    scale = tuple(Fraction(side, cut) for side, cut in zip(metadata["size"][::-1], metadata["crop"][2:], strict=True))
    sound = shards.sound_of(members["flac"]).numpy() if "flac" in members else None
    frames = (upright(frame) for frame in shards.frames_of(members["mp4"]))
    return Content(frames, fraction(metadata["fps"]), sound, (scale[0], scale[1]), lambda: metadata.get("face_cut"))


def _from_video(clip: Clip, path: Path, framing: Framing) -> Content:
    """A clip of its source video, its crop applied, at the video's own frame rate."""
    start = Fraction(clip.start).limit_denominator(10**6)
    end = None if clip.end is None else Fraction(clip.end).limit_denominator(10**6)
    with closing(read_frames(path, start)) as source:
        first = next(source)
    if not first.rate:
        raise UserError(f"video without a frame rate: {path}; convert it")
    height, width = upright(first.frame).shape[:2]
    x, y, w, h = window = crop_box(
        clip, (width, height), framing.size, framing.crop, lambda: find_face(path, start, end)
    )
    scale = (
        (Fraction(1), Fraction(1))
        if framing.size is None
        else (Fraction(framing.size[1], w), Fraction(framing.size[0], h))
    )
    watch = FaceWatch()

    def frames() -> Iterator[np.ndarray]:
        with closing(read_frames(path, start)) as source:
            for frame in source:
                if clip.end is not None and frame.time >= clip.end:
                    return
                if frame.time + frame.duration > start:
                    pixels = upright(frame.frame)
                    if pixels.shape[:2] != (height, width):
                        raise UserError(f"frames change their size from {[width, height]}: {path}; convert it")
                    watch.look(pixels, window, frame.time - start)
                    yield pixels[y : y + h, x : x + w]

    until = min(clip.start + LONGEST, probe(path)[1]) if clip.end is None else clip.end  # a header may say anything
    count = round((until - clip.start) * SAMPLE_RATE)
    sound = read_sound(path, round(start * SAMPLE_RATE), count) if count > 0 else None
    samples = None if sound is None else sound.samples.numpy()
    return Content(frames(), Fraction(first.rate), samples, scale, lambda: watch.metadata["face_cut"])
