"""AVSpeech (Ephrat et al. 1804.03619): `avspeech_train.csv` and `avspeech_test.csv` as a manifest.

No header; a line is `YouTube id, start, end, x, y`: seconds, and the face's centre at the start, as fractions of the frame from its
top left. Only the centre is given, so a clip is the full frame and the face is left to a detector.
"""

import re
from pathlib import Path

from distill.data.datasets.folder import Videos
from distill.data.datasets.manifest import Clip, Manifest, Refused, clip_or_refusal, gather, read_lines
from teachers.errors import UserError

SPLITS = ("train", "test")
YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{11}")
LICENCE = "the video belongs to its owner on YouTube (AVSpeech gives addresses and times)"
CUT_TOLERANCE_SECONDS = 0.2  # an encoder's padding of a cut file; a cut that was snapped to a key frame is off by more


def read(annotations: Path, videos: Path | None = None) -> Manifest:
    """Every segment of the files `avspeech_SPLIT.csv` in the folder `annotations`, or of the one such file that it is.

    videos: a folder with the whole videos, `ID.mp4`, or the segments that the common download script cuts from them,
        `ID_START-END.mp4` (`cut_name`). Such a cut is refused where its length shows that it was snapped to a key frame.

    The identity is the YouTube id: the speakers are not named. The official split is kept. UserError when there is no file.
    """
    library = Videos(videos)
    rows: list[Clip | Refused] = list(library.refused)
    for file, split in _files(Path(annotations)):
        for number, text in read_lines(file, rows):
            try:
                rows.append(_clip([word.strip() for word in text.split(",")], split, library))
            except (UserError, ValueError) as error:
                rows.append(Refused(f"{file.name}:{number}", text.partition(",")[0], f"{error} (line {number})"))
    return gather(rows)


def cut_name(youtube: str, start: float, end: float) -> str:
    """Name without suffix of a cut file, as the common download script writes it: `ID_090.000000-093.500000`."""
    return f"{youtube}_{start:010.6f}-{end:010.6f}"


def _files(annotations: Path) -> list[tuple[Path, str]]:
    if annotations.is_file():
        split = next((name for name in SPLITS if name in annotations.stem), None)
        if split is None:
            raise UserError(
                f"neither train nor test in its name: {annotations}; name it avspeech_train.csv or avspeech_test.csv"
            )
        return [(annotations, split)]
    files = [(file, split) for split in SPLITS if (file := annotations / f"avspeech_{split}.csv").is_file()]
    if not files:
        raise UserError(f"no avspeech_train.csv or avspeech_test.csv: {annotations}; put the official files there")
    return files


def _clip(values: list[str], split: str, library: Videos) -> Clip | Refused:
    if len(values) != 5:
        raise UserError(f"5 values are needed, got {len(values)}; correct the annotation")
    youtube, (start, end, x, y) = values[0], (float(value) for value in values[1:])
    if not YOUTUBE_ID.fullmatch(youtube):
        raise UserError(
            f"no YouTube id: {youtube[:80]!r} (spreadsheets change ids that begin with '-'); take the official file"
        )
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise UserError(f"face centre lies outside the frame: ({x}, {y}); correct the annotation")
    name = cut_name(youtube, start, end)
    key, source = name.replace(".", "_"), f"{youtube}.mp4"
    try:
        source = library.find(youtube, name)
        if Path(source).stem == name:
            start, end = 0.0, _cut_seconds(library, source, end - start)
    except UserError as error:
        return Refused(key, source, str(error))
    return clip_or_refusal(
        id=key,
        dataset="avspeech",
        source=source,
        start=start,
        end=end,
        licence=LICENCE,
        split=split,
        identity=youtube,
    )


def _cut_seconds(library: Videos, source: str, expected: float) -> float:
    actual = library.seconds(source)
    if abs(actual - expected) > CUT_TOLERANCE_SECONDS:
        raise UserError(
            f"cut is {actual:.2f} s long, the segment {expected:.2f} s; cut it again and re-encode, or provide the whole video"
        )
    return expected
