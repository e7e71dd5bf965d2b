"""`distill data check`: whether prepared data are whole, down to every frame and sample of sound, and what is in them."""

import argparse
import io
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import av
import torch
from tqdm import tqdm

from distill.data.datasets.manifest import Manifest
from distill.data.prepare import page, shards
from distill.data.prepare.video import SAMPLE_RATE
from distill.data.prepare.workers import shared_out
from teachers.errors import UserError
from teachers.files import atomic_write

NOT_WHOLE = 3
TABLES = {
    "sizes": "height x width",
    "fps": "frames a second",
    "source_sizes": "height x width of the sources",
    "source_fps": "frames a second of the sources",
    "splits": "splits",
}
MOST_PROBLEMS = 200  # on a page
BAR = 160  # pixels of the longest bar
FACTS = ("id", "fps", "frames", "size", "samples", "source_fps", "source_size", "loudness_dbfs", "identity", "split")


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What was found: the facts of every sample that is whole, and where something is wrong, in words."""

    samples: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    num_refused: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `distill data check`."""
    parser.add_argument("data", type=Path, metavar="DIR", help="what distill data prepare wrote")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts and problems there")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with histograms and pictures there")
    parser.add_argument("--quick", action="store_true", help="checksums and indices only, nothing is decoded")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes, 0 works in this one (one a core)"
    )


def run(args: argparse.Namespace) -> int:
    """Print counts and problems; 0 when the data are whole, 3 when they are not. UserError when there are none."""
    if args.workers < 0:
        raise UserError(f"--workers must be 0 or more: got {args.workers}")
    with tqdm(unit="shard", desc="check", file=sys.stderr) as progress:
        checked = check(
            args.data, decode=not args.quick, workers=args.workers, tick=progress.update, pictures=args.html is not None
        )
    totals = summary(checked)
    if args.json is not None:
        try:
            atomic_write(args.json, json.dumps(totals, indent=1, sort_keys=True) + "\n")
        except OSError as error:
            raise UserError(
                f"report cannot be written ({error.strerror}): {args.json}; choose another place"
            ) from error
    if args.html is not None:
        page.write_page(args.html, "check.html.j2", page_context(args.data, checked, quick=args.quick))
    for problem in checked.problems:
        sys.stderr.write(f"{problem}\n")
    lines = [f"{name.replace('_', ' ')}: {_words(value)}" for name, value in totals.items() if name != "problems"]
    sys.stdout.write("\n".join([*lines, f"problems: {len(checked.problems)}", ""]))
    return NOT_WHOLE if checked.problems else 0


def check(
    folder: Path,
    decode: bool = True,
    workers: int = 0,
    tick: Callable[[], object] = lambda: None,
    pictures: bool = False,
) -> Checked:
    """Compare prepared data with their checksums, indices and manifest, and (`decode`) every film and sound with its facts.

    With `pictures` the facts of what is decoded have a small JPEG of the middle frame, `thumbnail`.
    Raises UserError when `folder` holds no prepared data; everything else that is wrong is a problem in the result.
    """
    folder, checked = Path(folder), Checked()
    sums = shards.read_checksums(folder)
    listed = sorted(name for name in sums if name.endswith(".tar"))
    present = {file.name for file in folder.iterdir()}
    checked.problems.extend(f"{name}: not in {shards.CHECKSUMS}" for name in sorted(present) if _is_stray(name, sums))
    for name in sorted(sums.keys() - set(listed)):
        checked.problems.extend(_compared(folder / name, sums[name]))
    tasks = [folder / name for name in listed]
    work = partial(_check_shard, sums=sums, decode=decode, pictures=pictures)
    for path, result in shared_out(work, tasks, workers):
        tick()
        if result is None:
            checked.problems.append(f"{path.name}: the decoder crashed on it")
        else:
            checked.samples.extend(result.samples)
            checked.problems.extend(result.problems)
    _check_manifest(folder, checked)
    checked.samples.sort(key=lambda facts: facts["id"])
    checked.problems.sort()
    return Checked(samples=checked.samples, problems=checked.problems, num_refused=_num_refused(folder))


def _is_stray(name: str, sums: dict[str, str]) -> bool:
    return name.endswith(".tar") and name not in sums


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


def _check_shard(path: Path, sums: dict[str, str], decode: bool, pictures: bool) -> Checked:
    """The samples of one shard against its index."""
    checked = Checked(problems=_compared(path, sums[path.name]))
    try:
        if (rows := shards.read_index(path)) is None:
            raise FileNotFoundError(path.with_suffix(".json").name)
        expected = {row["key"]: row["id"] for row in rows}
        found = set()
        for key, members in shards.samples(path):
            found.add(key)
            problems, facts = check_sample(members, decode)
            if key not in expected or (facts and facts["id"] != expected[key]):
                problems.append("is not in the index")
            checked.problems.extend(f"{path.name}: {key}: {problem}" for problem in problems)
            if facts and not problems:
                sample = {name: facts.get(name) for name in FACTS}
                if decode and pictures:
                    sample["thumbnail"] = _picture(members["mp4"], facts["frames"] // 2)
                checked.samples.append(sample)
        checked.problems.extend(f"{path.name}: {key}: missing" for key in sorted(expected.keys() - found))
    except UserError as error:
        checked.problems.append(f"{path.name}: {error}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        checked.problems.append(f"{path.name}: its index cannot be read ({error!r})")
    return checked


def check_sample(members: dict[str, bytes], decode: bool = True) -> tuple[list[str], dict[str, Any] | None]:
    """What is wrong with a sample (extension -> content), and its facts where they can be read."""
    try:
        facts = json.loads(members["json"])
        fps, (height, width) = Fraction(facts["fps"]), facts["size"]
        num_frames, num_samples, has_sound = facts["frames"], facts["samples"], facts["sample_rate"] is not None
        if fps <= 0 or not isinstance(facts["id"], str):
            raise ValueError("fps or id")
    except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:
        return [f"its facts cannot be read ({error!r})"], None
    wanted = {"json", "mp4"} | ({"flac"} if has_sound else set())
    if members.keys() != wanted:
        return [f"has the members {sorted(members)}, not {sorted(wanted)}"], facts
    problems = []
    if has_sound and num_samples != round(num_frames * SAMPLE_RATE / fps):
        problems.append(f"{num_samples} samples of sound do not fill {num_frames} frames at {fps} fps")
    if decode:
        try:
            if (got := _film_facts(members["mp4"])) != ((width, height), num_frames, fps):
                problems.append(f"film is {got}, not {((width, height), num_frames, fps)}")
            if has_sound and (got := _sound_facts(members["flac"])) != (SAMPLE_RATE, num_samples):
                problems.append(f"sound is {got}, not {(SAMPLE_RATE, num_samples)}")
        except (av.FFmpegError, OSError, IndexError) as error:
            problems.append(f"cannot be decoded ({error})")
    return problems, facts


def _film_facts(data: bytes) -> tuple[tuple[int, int], int, Fraction]:
    """Size, frames and frame rate of an mp4, every frame decoded."""
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.video[0]
        stream.codec_context.options, stream.codec_context.thread_count = {"err_detect": "explode"}, 1
        num_frames = sum(1 for _ in container.decode(stream))
        return (stream.width, stream.height), num_frames, Fraction(stream.average_rate or 0)


def _picture(data: bytes, number: int) -> bytes:
    """A small JPEG of one frame of an mp4."""
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        frame = next(frame for at, frame in enumerate(container.decode(stream)) if at == number)
        return page.thumbnail(torch.from_numpy(frame.to_ndarray(format="rgb24")))


def _sound_facts(data: bytes) -> tuple[int, int]:
    """Rate and samples of a FLAC file, all of it decoded."""
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.audio[0]
        return stream.rate, sum(frame.samples for frame in container.decode(stream))


def _check_manifest(folder: Path, checked: Checked) -> None:
    """The manifest lists the samples, each once."""
    ids = Counter(facts["id"] for facts in checked.samples)
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
    seconds = [float(facts["frames"] / Fraction(facts["fps"])) for facts in checked.samples]
    loudness = [facts["loudness_dbfs"] for facts in checked.samples if facts["loudness_dbfs"] is not None]
    return {
        "clips": len(checked.samples),
        "refused": checked.num_refused,
        "identities": len({facts["identity"] for facts in checked.samples}),
        "hours": round(math.fsum(seconds) / 3600, 4),
        "clip_seconds": _spread(seconds),
        "loudness_dbfs": _spread(loudness),
        "without_sound": sum(facts["samples"] == 0 for facts in checked.samples),
        "sizes": _histogram("x".join(map(str, facts["size"])) for facts in checked.samples),
        "fps": _histogram(facts["fps"] for facts in checked.samples),
        "source_sizes": _histogram("x".join(map(str, facts["source_size"][::-1])) for facts in checked.samples),
        "source_fps": _histogram(facts["source_fps"] for facts in checked.samples),
        "splits": _histogram(facts["split"] or "none" for facts in checked.samples),
        "problems": checked.problems,
    }


def page_context(folder: Path, checked: Checked, quick: bool = False) -> dict[str, Any]:
    """What the page shows of prepared data."""
    totals, samples = summary(checked), checked.samples
    seconds = [float(facts["frames"] / Fraction(facts["fps"])) for facts in samples]
    loudness = [facts["loudness_dbfs"] for facts in samples if facts["loudness_dbfs"] is not None]
    tables = [
        {
            "name": title,
            "rows": [(value, count, round(BAR * count / len(samples))) for value, count in totals[name].items()],
        }
        for name, title in TABLES.items()
    ]
    shown = page.spaced([facts for facts in samples if "thumbnail" in facts])
    cards = [
        {
            "id": facts["id"],
            "thumbnail": facts["thumbnail"],
            "facts": f"{float(facts['frames'] / Fraction(facts['fps'])):.2f} s, "
            + (f"{facts['loudness_dbfs']:.1f} dBFS" if facts["loudness_dbfs"] is not None else "no sound heard"),
        }
        for facts in shown
    ]
    notes = {
        "nothing was decoded (--quick), so there are no pictures": quick,
        f"{len(cards)} of {len(samples)}, evenly spaced by id; the middle frame of each": len(cards) < len(samples),
    }
    num = len(checked.problems)
    return {
        "title": "Prepared data",
        "lead": f"{folder}: {totals['clips']} clips, {totals['hours']:.4g} hours, {totals['refused']} refused by prepare",
        "verdict": f"{num} problem{'s' if num > 1 else ''}" if num else "Whole: nothing is missing or changed.",
        "problems": checked.problems[:MOST_PROBLEMS],
        "num_more_problems": max(0, num - MOST_PROBLEMS),
        "counts": [
            (name, _words(value)) for name, value in totals.items() if name != "problems" and name not in TABLES
        ],
        "plots": [
            {"name": "seconds a clip", "svg": page.histogram(seconds, unit=" s")},
            {"name": "loudness", "svg": page.histogram(loudness, unit=" dBFS")},
        ],
        "tables": tables,
        "cards": cards,
        "cards_note": next((words for words, true in notes.items() if true), ""),
    }


def _histogram(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"least": round(min(values), 3), "median": round(median(values), 3), "most": round(max(values), 3)}


def _words(value: Any) -> str:
    """A count, or the pairs of a histogram, in one line."""
    return ", ".join(f"{name} {number}" for name, number in value.items()) if isinstance(value, dict) else str(value)
