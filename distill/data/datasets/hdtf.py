"""HDTF (Zhang et al., CVPR 2021): the authors' annotation files as a manifest.

For each group RD, WDA and WRA there are `*_video_url`, `*_resolution`, `*_annotion_time` (sic), `*_crop_wh` and `*_crop_ratio`
.txt, separated by spaces, without header, some with a byte order mark. `crop_ratio` is of the authors' second method (landmarks,
for videos of another resolution) and is not read. The dataset has no official split.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from distill.data.datasets.folder import Videos
from distill.data.datasets.manifest import Clip, Manifest, Refused, clip_or_refusal, gather, read_lines
from teachers.errors import UserError

GROUPS = ("RD", "WDA", "WRA")
LICENCE = "annotations CC BY 4.0 (HDTF); the video belongs to its owner on YouTube"
RANGE = re.compile(r"(\d{1,2}:)?(\d{1,4}):(\d{1,2})-(\d{1,2}:)?(\d{1,4}):(\d{1,2})")
NUMBER = re.compile(r"[0-9]{1,6}")


@dataclass(frozen=True)
class Tables:
    """The files of one group, by name without .mp4: `crops` by clip, the others by video; and the lines that are unusable."""

    urls: dict[str, list[str]]
    resolutions: dict[str, list[str]]
    ranges: dict[str, list[str]]
    crops: dict[str, list[str]]
    refused: list[Clip | Refused] = field(default_factory=list)


def read(
    annotations: Path, videos: Path | None = None, *, full_frame: bool = False, scale_crops: bool = False
) -> Manifest:
    """Every annotated clip, ids `GROUP_Name_000` as papers write them, cropped to the face as the authors measured it.

    videos: a folder with `Name.mp4` or `GROUP_Name.mp4` anywhere under it. Without it (to count or to split) crops are checked
        against the listed number of lines alone.
    full_frame: no crops, so that clips without one are kept too.
    scale_crops: a crop is valid only at the resolution listed for it, so a video of another height is refused; this scales the
        crop instead (for a download of the same video at another quality).

    The identity is the video's name without its trailing digits (AmyKlobuchar0 and AmyKlobuchar1 are one person; Radio1 to
    Radio57, whose speakers are not named, count as one). UserError when a file is missing.
    """
    library = Videos(videos)
    tables = {group: _tables(Path(annotations), group) for group in GROUPS}
    groups_of = Counter(name for table in tables.values() for name in table.ranges)
    rows: list[Clip | Refused] = list(library.refused)
    for group, table in tables.items():
        rows += table.refused
        for name in table.ranges:
            stems = (f"{group}_{name}",) if groups_of[name] > 1 else (f"{group}_{name}", name)
            rows += _clips(table, group, name, stems, library, full_frame, scale_crops)
        rows += _leftovers(table, group)
    return gather(rows)


def identity_of(name: str) -> str:
    """The person in a video of this name: the name without its trailing digits."""
    return name.rstrip("0123456789") or name


def _tables(annotations: Path, group: str) -> Tables:
    refused: list[Clip | Refused] = []
    names = ("video_url", "resolution", "annotion_time", "crop_wh")
    return Tables(*(_table(annotations / f"{group}_{name}.txt", refused) for name in names), refused=refused)


def _table(path: Path, refused: list[Clip | Refused]) -> dict[str, list[str]]:
    """Words of each line by its first word without .mp4; unreadable and repeated lines go to `refused`."""
    table: dict[str, list[str]] = {}
    for number, text in read_lines(path, refused):
        key, *words = text.split()
        key = key.removesuffix(".mp4")
        if key in table:
            refused.append(
                Refused(key, path.name, f"line {number} of {path.name} names {key} again; the first is used")
            )
        else:
            table[key] = words
    return table


def _span(text: str) -> tuple[float, float]:
    """Seconds of `MM:SS-MM:SS`, hours before them allowed; UserError for another format."""
    match = RANGE.fullmatch(text)
    if match is None:
        raise UserError(f"time is not MM:SS-MM:SS: {text}; correct the annotation")
    numbers = [float((part or "0").rstrip(":")) for part in match.groups()]
    return 3600 * numbers[0] + 60 * numbers[1] + numbers[2], 3600 * numbers[3] + 60 * numbers[4] + numbers[5]


def _clips(
    table: Tables, group: str, name: str, stems: tuple[str, ...], library: Videos, full_frame: bool, scale: bool
) -> Iterator[Clip | Refused]:
    for index, text in enumerate(table.ranges[name]):
        key, source = f"{group}_{name}_{index:03d}", f"{stems[0]}.mp4"
        try:
            start, end = _span(text)
            source = library.find(*stems)
            crop, crop_size = (None, None) if full_frame else _crop(table, name, index, library, source, scale)
        except UserError as error:
            yield Refused(key, source, str(error))
            continue
        yield clip_or_refusal(
            id=key,
            dataset="hdtf",
            source=source,
            start=start,
            end=end,
            crop=crop,
            crop_size=crop_size,
            licence=LICENCE,
            identity=identity_of(name),
        )


def _crop(
    table: Tables, name: str, index: int, library: Videos, source: str, scale: bool
) -> tuple[tuple[int, int, int, int], tuple[int, int] | None]:
    """The crop of a clip and the frame that it was measured in; UserError where there is no valid one."""
    words = table.crops.get(f"{name}_{index}")
    if words is None:
        raise UserError("no row in crop_wh.txt; detect the face yourself or use the full frame")
    if len(words) != 4 or not all(map(NUMBER.fullmatch, words)):
        raise UserError(f"crop is not 'x width y height': {' '.join(words)}; correct the annotation")
    x, width, y, height = (int(word) for word in words)
    listed = " ".join(table.resolutions.get(name, []))
    lines = int(listed) if NUMBER.fullmatch(listed) else 0
    if lines == 0:
        raise UserError(f"the crop's resolution is not known (listed: {listed or 'nothing'}); use the full frame")
    if y + height > lines:
        raise UserError(
            f"crop lies outside the frame: y {y} + height {height} of {lines} lines; correct the annotation"
        )
    if library.folder is None:
        return (x, y, width, height), None
    actual = library.size(source)
    if actual[1] == lines:
        return (x, y, width, height), actual
    if not scale:
        raise UserError(f"crop was measured at {lines} lines, the video has {actual[1]}; get {lines} or scale the crop")
    return (x, y, width, height), (round(actual[0] * lines / actual[1]), lines)


def _leftovers(table: Tables, group: str) -> Iterator[Refused]:
    """Videos without a clip and crops without a clip."""
    for name in sorted(table.urls.keys() | table.resolutions.keys()):
        if name not in table.ranges:
            yield Refused(f"{group}_{name}", f"{group}_{name}.mp4", "no clip of this video in annotion_time.txt")
    keys = {f"{name}_{index}" for name, ranges in table.ranges.items() for index in range(len(ranges))}
    for key in table.crops:
        if key not in keys:
            yield Refused(
                f"{group}_{key}", f"{group}_{key}", "no clip in annotion_time.txt for this row of crop_wh.txt"
            )
