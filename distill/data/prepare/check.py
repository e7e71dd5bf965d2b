"""`distill data check`: verify that prepared data are complete, down to every frame and audio sample, and summarise them."""

import argparse
import io
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import av
import torch
from tqdm import tqdm

from distill.data.datasets.manifest import Manifest
from distill.data.prepare import page, shards
from distill.data.prepare.framing import CUT
from distill.data.prepare.workers import add_workers, shared_out
from teachers.config import fraction
from teachers.errors import UserError
from teachers.files import atomic_write
from teachers.media.container import upright
from teachers.media.sound import SAMPLE_RATE

INCOMPLETE = 3
FACE_CUT = "the face is cut by the frame ({:.0%} of it outside)"
TABLES = {
    "sizes": "height x width",
    "fps": "frames a second",
    "source_sizes": "height x width of the sources",
    "source_fps": "frames a second of the sources",
    "splits": "splits",
}
MAX_PROBLEMS = 200  # on a page
BAR = 160  # pixels of the longest bar
METADATA = (
    *("id", "fps", "frames", "size", "samples", "source_fps", "source_size", "loudness_dbfs", "identity", "split"),
    "face_cut",
)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The metadata of every intact sample, and a message for every problem."""

    samples: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    num_refused: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `distill data check`."""
    parser.add_argument("data", type=Path, metavar="DIR", help="what distill data prepare wrote")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts and problems there")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with histograms and thumbnails there")
    parser.add_argument("--quick", action="store_true", help="checksums and indices only, nothing is decoded")
    add_workers(parser)


def run(args: argparse.Namespace) -> int:
    """Print counts and problems; 0 when the data are complete, 3 when they are not. UserError when there are none."""
    with tqdm(unit="shard", desc="check", file=sys.stderr) as progress:
        checked = check(
            args.data,
            decode=not args.quick,
            workers=args.workers,
            tick=progress.update,
            thumbnails=args.html is not None,
        )
    totals = summary(checked)
    if args.json is not None:
        atomic_write(args.json, json.dumps(totals, indent=1, sort_keys=True) + "\n")
    if args.html is not None:
        page.write_page(args.html, "check.html.j2", page_context(args.data, checked, quick=args.quick))
    for problem in checked.problems:
        sys.stderr.write(f"{problem}\n")
    for sample in faces_cut(checked):
        sys.stderr.write(f"{sample['id']}: {FACE_CUT.format(sample['face_cut'])}; prepare it with --crop face\n")
    lines = [f"{name.replace('_', ' ')}: {_text(value)}" for name, value in totals.items() if name != "problems"]
    sys.stdout.write("\n".join([*lines, f"problems: {len(checked.problems)}", ""]))
    return INCOMPLETE if checked.problems else 0


def check(
    folder: Path,
    decode: bool = True,
    workers: int = 0,
    tick: Callable[[], object] = lambda: None,
    thumbnails: bool = False,
) -> Checked:
    """Compare prepared data with their checksums, indices and manifest, and (`decode`) every video and sound with its metadata.

    With `thumbnails` the metadata of decoded samples has a small JPEG of the middle frame, `thumbnail`.
    Raises UserError when `folder` has no prepared data; everything else that is wrong is a problem in the result.
    """
    folder, checked = Path(folder), Checked()
    sums = shards.read_checksums(folder)
    listed = sorted(name for name in sums if name.endswith(".tar"))
    stray = sorted({file.name for file in folder.glob("*.tar")} - sums.keys())
    checked.problems.extend(f"{name}: not in {shards.CHECKSUMS}" for name in stray)
    for name in sorted(sums.keys() - set(listed)):
        checked.problems.extend(_compared(folder / name, sums[name]))
    tasks = [folder / name for name in listed]
    work = partial(_check_shard, sums=sums, decode=decode, thumbnails=thumbnails)
    for path, result in shared_out(work, tasks, workers):
        tick()
        if result is None:
            checked.problems.append(f"{path.name}: its decoder crashed")
        else:
            checked.samples.extend(result.samples)
            checked.problems.extend(result.problems)
    _check_manifest(folder, checked)
    checked.samples.sort(key=lambda metadata: metadata["id"])
    checked.problems.sort()
    return Checked(samples=checked.samples, problems=checked.problems, num_refused=_num_refused(folder))


def _num_refused(folder: Path) -> int:
    try:
        return len((folder / "manifest.refused.jsonl").read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError):
        return 0


def _compared(path: Path, digest: str) -> list[str]:
    """What is wrong with a file that should have this sha256."""
    try:
        return [] if shards.sha256(path) == digest else [f"{path.name}: differs from its checksum"]
    except FileNotFoundError:
        return [f"{path.name}: missing"]
    except OSError as error:
        return [f"{path.name}: cannot be read ({error.strerror})"]


def _check_shard(path: Path, sums: dict[str, str], decode: bool, thumbnails: bool) -> Checked:
    """The samples of one shard against its index."""
    checked = Checked(problems=_compared(path, sums[path.name]))
    try:
        expected = {sample.key: sample.id for sample in shards.read_index(path)}
        keys = set()
        for key, members in shards.samples(path):
            keys.add(key)
            problems, metadata = check_sample(members, decode)
            if key not in expected or (metadata and metadata["id"] != expected[key]):
                problems.append("is not in the index")
            checked.problems.extend(f"{path.name}: {key}: {problem}" for problem in problems)
            if metadata and not problems:
                sample = {name: metadata.get(name) for name in METADATA}
                sample["seconds"] = float(metadata["frames"] / fraction(metadata["fps"]))
                if decode and thumbnails:
                    middle = next(islice(shards.frames_of(members["mp4"]), metadata["frames"] // 2, None))
                    sample["thumbnail"] = page.thumbnail(torch.from_numpy(upright(middle)))
                checked.samples.append(sample)
        checked.problems.extend(f"{path.name}: {key}: missing" for key in sorted(expected.keys() - keys))
    except UserError as error:
        checked.problems.append(f"{path.name}: {error}")
    return checked


def check_sample(members: dict[str, bytes], decode: bool = True) -> tuple[list[str], dict[str, Any] | None]:
    """What is wrong with a sample (extension -> content), and its metadata where they can be read."""
    try:
        metadata = json.loads(members["json"])
        fps, (height, width) = fraction(metadata["fps"]), metadata["size"]
        num_frames, num_samples = metadata["frames"], metadata["samples"]
        has_sound = metadata["sample_rate"] is not None
        if fps <= 0 or not isinstance(metadata["id"], str):
            raise ValueError("fps or id")
    except (KeyError, ValueError, TypeError, ZeroDivisionError, RecursionError) as error:
        return [f"its metadata cannot be read ({error!r})"], None
    expected = {"json", "mp4"} | ({"flac"} if has_sound else set())
    if members.keys() != expected:
        return [f"has the members {sorted(members)}, not {sorted(expected)}"], metadata
    problems = []
    if has_sound and num_samples != round(num_frames * SAMPLE_RATE / fps):
        problems.append(f"{num_samples} samples of sound do not fill {num_frames} frames at {fps} fps")
    if decode:
        try:
            if (got := _video_metadata(members["mp4"])) != ((width, height), num_frames, fps):
                problems.append(f"video is {got}, not {((width, height), num_frames, fps)}")
            if has_sound and (got := len(shards.sound_of(members["flac"]))) != num_samples:
                problems.append(f"sound has {got} samples, not {num_samples}")
        except (av.FFmpegError, OSError, LookupError, ValueError) as error:
            problems.append(f"cannot be decoded ({error})")
    return problems, metadata


def _video_metadata(data: bytes) -> tuple[tuple[int, int], int, Fraction]:
    """Size, frames and frame rate of an mp4, every frame decoded."""
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.video[0]
        stream.codec_context.options, stream.codec_context.thread_count = {"err_detect": "explode"}, 1
        num_frames = sum(1 for _ in container.decode(stream))
        return (stream.width, stream.height), num_frames, Fraction(stream.average_rate or 0)


def _check_manifest(folder: Path, checked: Checked) -> None:
    """The manifest lists the samples, each once."""
    ids = Counter(metadata["id"] for metadata in checked.samples)
    checked.problems.extend(f"{name}: in more than one sample" for name, number in ids.items() if number > 1)
    try:
        listed = {clip.id for clip in Manifest.load(folder / "manifest.parquet").clips}
    except UserError as error:
        checked.problems.append(str(error))
        return
    checked.problems.extend(f"{name}: in a shard but not in the manifest" for name in sorted(ids.keys() - listed))
    if not checked.problems:
        checked.problems.extend(f"{name}: in the manifest but in no shard" for name in sorted(listed - ids.keys()))


def summary(checked: Checked) -> dict[str, Any]:
    """Counts, lengths, histograms of sizes and rates, and loudness, as plain data."""
    seconds = [metadata["seconds"] for metadata in checked.samples]
    loudness = [metadata["loudness_dbfs"] for metadata in checked.samples if metadata["loudness_dbfs"] is not None]
    return {
        "clips": len(checked.samples),
        "refused": checked.num_refused,
        "identities": len({metadata["identity"] for metadata in checked.samples}),
        "hours": round(math.fsum(seconds) / 3600, 4),
        "clip_seconds": _spread(seconds),
        "loudness_dbfs": _spread(loudness),
        "faces_cut": len(faces_cut(checked)),
        "without_sound": sum(metadata["samples"] == 0 for metadata in checked.samples),
        "sizes": _histogram("x".join(map(str, metadata["size"])) for metadata in checked.samples),
        "fps": _histogram(metadata["fps"] for metadata in checked.samples),
        "source_sizes": _histogram("x".join(map(str, metadata["source_size"][::-1])) for metadata in checked.samples),
        "source_fps": _histogram(metadata["source_fps"] for metadata in checked.samples),
        "splits": _histogram(metadata["split"] or "none" for metadata in checked.samples),
        "problems": checked.problems,
    }


def faces_cut(checked: Checked) -> list[dict[str, Any]]:
    """The samples whose face is partly outside their frame, as `prepare` recorded it."""
    return [sample for sample in checked.samples if (sample.get("face_cut") or 0) >= CUT]


def page_context(folder: Path, checked: Checked, quick: bool = False) -> dict[str, Any]:
    """Template context of the page."""
    totals, samples = summary(checked), checked.samples
    loudness = [metadata["loudness_dbfs"] for metadata in samples if metadata["loudness_dbfs"] is not None]
    tables = [
        {
            "name": title,
            "rows": [(value, count, round(BAR * count / len(samples))) for value, count in totals[name].items()],
        }
        for name, title in TABLES.items()
    ]
    shown = page.spaced([metadata for metadata in samples if "thumbnail" in metadata])
    cards = [
        {
            "id": metadata["id"],
            "thumbnail": metadata["thumbnail"],
            "metadata": f"{metadata['seconds']:.2f} s, "
            + (f"{metadata['loudness_dbfs']:.1f} dBFS" if metadata["loudness_dbfs"] is not None else "silent")
            + (f", {FACE_CUT.format(metadata['face_cut'])}" if (metadata["face_cut"] or 0) >= CUT else ""),
        }
        for metadata in shown
    ]
    notes = {
        "nothing was decoded (--quick), so there are no thumbnails": quick,
        f"{len(cards)} of {len(samples)}, evenly spaced by id; the middle frame of each": len(cards) < len(samples),
    }
    num = len(checked.problems)
    return {
        "title": "Prepared data",
        "lead": f"{folder}: {totals['clips']} clips, {totals['hours']:.4g} hours, {totals['refused']} refused by prepare",
        "verdict": f"{num} problem{'s' if num > 1 else ''}" if num else "Complete: nothing is missing or changed.",
        "problems": checked.problems[:MAX_PROBLEMS],
        "num_more_problems": max(0, num - MAX_PROBLEMS),
        "counts": [(name, _text(value)) for name, value in totals.items() if name != "problems" and name not in TABLES],
        "plots": [
            {"name": "seconds a clip", "svg": page.histogram([metadata["seconds"] for metadata in samples], unit=" s")},
            {"name": "loudness", "svg": page.histogram(loudness, unit=" dBFS")},
        ],
        "tables": tables,
        "cards": cards,
        "cards_note": next((note for note, applies in notes.items() if applies), ""),
    }


def _histogram(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"least": round(min(values), 3), "median": round(median(values), 3), "most": round(max(values), 3)}


def _text(value: Any) -> str:
    """A count, or the pairs of a histogram, in one line."""
    return ", ".join(f"{name} {number}" for name, number in value.items()) if isinstance(value, dict) else str(value)
