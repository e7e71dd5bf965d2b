"""CelebV-HQ (Zhu et al. 2207.12393): `celebvhq_info.json` as a manifest."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.data.datasets.folder import Videos
from distill.data.datasets.manifest import Clip, Manifest, Refused, clip_or_refusal, gather
from teachers.errors import UserError

FILE_NAME = "celebvhq_info.json"
LICENCE = "non-commercial research only, no redistribution (CelebV-HQ); the video belongs to its owner on YouTube"
EXPAND = 0.02  # of the frame, added to each side of the box by the authors' script


def read(annotations: Path, videos: Path | None = None) -> Manifest:
    """Every clip of the official file (or of its folder), with its attributes as text.

    videos: a folder with the whole videos, `YOUTUBEID.mp4`, or with clips cut from them, `CLIPID.mp4`. A cut clip with a square
        frame is taken as cropped already. Without the folder (to count or to split) clips have no crop: the file has
        boxes as fractions of a frame whose size it does not state.

    The identity is the YouTube id: the people are not named. UserError when the file is missing or not this file.
    """
    path = Path(annotations)
    path = path / FILE_NAME if path.is_dir() else path
    library = Videos(videos)
    clips, names, refused = _load(path)
    rows: list[Clip | Refused] = [*library.refused, *refused]
    for key, entry in clips.items():
        try:
            rows.append(_clip(key, entry, names, library))
        except UserError as error:
            rows.append(Refused(key, path.name, str(error)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            rows.append(Refused(key, path.name, f"differs from the official format: {type(error).__name__} {error}"))
    return gather(rows)


def square_crop(box: Mapping[str, float], width: int, height: int) -> tuple[int, int, int, int]:
    """The authors' crop of a box (fractions of the frame) as x, y, side, side in pixels.

    Each side is moved out by `EXPAND`, clamped to the frame; the corners are rounded to pixels; the crop is the centred square of
    side 2 * (short side // 2). A corner on half a pixel is rounded down.
    UserError when the box is empty or leaves the frame.
    """
    top, bottom, left, right = (float(box[name]) for name in ("top", "bottom", "left", "right"))
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise UserError(f"box is empty or outside the frame: {dict(box)}; correct the annotation")
    top, bottom = round(max(top - EXPAND, 0) * height), round(min(bottom + EXPAND, 1) * height)
    left, right = round(max(left - EXPAND, 0) * width), round(min(right + EXPAND, 1) * width)
    half = min(bottom - top, right - left) // 2
    return math.floor((left + right) / 2) - half, math.floor((top + bottom) / 2) - half, 2 * half, 2 * half


def describe(attributes: Mapping[str, Any], names: Mapping[str, list[str]]) -> str:
    """The attributes as text, e.g. "young, wavy hair; talk, smile; neutral then happy"."""
    parts = []
    for kind in ("appearance", "action"):
        flags = attributes[kind]
        if len(flags) != len(names[kind]):
            raise UserError(f"{kind} has {len(flags)} values for {len(names[kind])} names; take the official file")
        parts.append(
            ", ".join(name.replace("_", " ").lower() for name, flag in zip(names[kind], flags, strict=True) if flag)
        )
    labels = attributes["emotion"]["labels"]  # text, or with sep_flag a list of texts with their times
    parts.append(labels if isinstance(labels, str) else " then ".join(label["emotion"] for label in labels))
    return "; ".join(part for part in parts if part)


def _clip(key: str, entry: Mapping[str, Any], names: Mapping[str, list[str]], library: Videos) -> Clip | Refused:
    youtube, text = entry["ytb_id"], describe(entry["attributes"], names)
    start, end = float(entry["duration"]["start_sec"]), float(entry["duration"]["end_sec"])
    source = library.find(youtube, key)
    is_cut = Path(source).stem == key
    crop, crop_size = None, None
    if library.folder is not None:
        width, height = crop_size = library.size(source)
        if not (is_cut and width == height):
            crop = square_crop(entry["bbox"], width, height)
    return clip_or_refusal(
        id=key,
        dataset="celebvhq",
        source=source,
        start=0.0 if is_cut else start,
        end=None if is_cut else end,
        crop=crop,
        crop_size=None if crop is None else crop_size,
        text=text,
        licence=LICENCE,
        identity=youtube,
    )


def _load(path: Path) -> tuple[dict[str, Any], dict[str, list[str]], list[Refused]]:
    """The clips, the names of the attributes, and the clips that the file lists a second time."""
    duplicates: list[str] = []

    def keep_first(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        first: dict[str, Any] = {}
        for key, value in pairs:
            if key in first:
                duplicates.append(key)
            else:
                first[key] = value
        return first

    try:  # bytes that are not UTF-8 stay in the texts, so that only their clips are refused
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
        content = json.loads(text, object_pairs_hook=keep_first)
        clips, mapping = content["clips"], content["meta_info"]
        if not isinstance(clips, dict):
            raise TypeError("clips is no mapping")
        names = {kind: list(mapping[f"{kind}_mapping"]) for kind in ("appearance", "action")}
    except OSError as error:
        raise UserError(f"annotation file cannot be read ({error.strerror}): {path}; put {FILE_NAME} there") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"not CelebV-HQ's {FILE_NAME} ({type(error).__name__} {error}): {path}; download it again"
        ) from error
    return (
        clips,
        names,
        [Refused(key, path.name, f"{key} is in the file twice; the first is used") for key in duplicates],
    )
