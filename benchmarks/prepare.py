"""Clips a minute of the whole `distill data prepare folder` command beside one ffmpeg process a clip, on the same clips, in turns.

    python benchmarks/prepare.py --videos DIR [--clips 24] [--rounds 3] [--seconds 5] [--workers 2] [--fps 16] [--side 512]

Clips are stretches of the films in DIR, evenly spaced, as many of each film, cropped to the square in the middle. Each way turns
them into a film of SIDE x SIDE pixels at FPS and sound at 16 kHz mono. Its time is that of the whole command, start of Python
included; CPU seconds are those of all its processes. A script, not a test; what it writes is deleted.

prepare          distill data prepare folder: shards, checks for scene cuts, damage and lengths, facts, checksums
ffmpeg           one process a clip, one after the other, as the published scripts do: cut, crop, scale, fps, mp4 and wav
ffmpeg, N at once    the same, as many at a time as there are workers, one thread each
ffmpeg, plain    one after the other with the encoder's defaults (4:2:0, crf 23, medium), as those scripts leave them
"""

import argparse
import csv
import ctypes
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av

from distill.data.datasets.folder import Videos
from distill.data.prepare import shards
from teachers.errors import UserError
from teachers.media.film import probe

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
ENCODER = ("-preset", "veryfast", "-crf", "10", "-pix_fmt", "yuv444p")  # as `distill.data.prepare.cutting` encodes


@dataclass(frozen=True)
class Piece:
    """`seconds` of a film from `start`, and the square in its middle: x, y, side in pixels."""

    name: str
    source: str
    start: float
    seconds: float
    square: tuple[int, int, int]


def pieces(videos: Path, num: int, seconds: float) -> list[Piece]:
    """`num` pieces of the films of a folder; UserError where there is none that is long enough."""
    films = [(source, *probe(videos / source)) for source in Videos(videos).sources]
    films = [(source, size, length) for source, size, length in films if length > seconds]
    if not films:
        raise UserError(f"no film of more than {seconds} s: {videos}; give a folder with some")
    found = []
    for number in range(num):
        source, (width, height), length = films[number % len(films)]
        count = len(range(number % len(films), num, len(films)))
        start = (length - seconds) * (number // len(films)) / max(1, count - 1)
        side = min(width, height) // 2 * 2
        square = ((width - side) // 2, (height - side) // 2, side)
        found.append(Piece(f"piece_{number:03d}", source, round(start, 2), seconds, square))
    return found


def by_prepare(todo: Sequence[Piece], args: argparse.Namespace, out: Path) -> None:
    """The command, in a process of its own."""
    out.mkdir()
    with (out / "metadata.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("id", "file_name", "start", "end", "crop"))
        for piece in todo:
            x, y, side = piece.square
            rows.writerow(
                (piece.name, piece.source, piece.start, piece.start + piece.seconds, f"{x} {y} {side} {side}")
            )
    given = ("--annotations", out / "metadata.csv", "--videos", args.videos, "--out", out / "shards", "--cuts", "keep")
    size = ("--fps", args.fps, "--size", f"{args.side}x{args.side}", "--workers", args.workers)
    words = [sys.executable, "-m", "distill", "data", "prepare", "folder", *map(str, (*given, *size))]
    subprocess.run(words, check=True, capture_output=True)


def by_ffmpeg(*encoder: str, at_once: bool) -> Callable[[Sequence[Piece], argparse.Namespace, Path], None]:
    """One ffmpeg process a clip, `--workers` of them at a time or one after the other."""

    def run(todo: Sequence[Piece], args: argparse.Namespace, out: Path) -> None:
        out.mkdir()

        def cut(piece: Piece) -> None:
            x, y, side = piece.square
            pictures = f"crop={side}:{side}:{x}:{y},scale={args.side}:{args.side}:flags=bicubic,fps={args.fps}"
            threads = ("-threads", "1") if at_once else ()
            read = (*threads, "-ss", piece.start, "-t", piece.seconds, "-i", args.videos / piece.source)
            film = ("-vf", pictures, "-an", "-c:v", "libx264", *encoder, *threads, out / f"{piece.name}.mp4")
            sound = ("-vn", "-ac", "1", "-ar", "16000", out / f"{piece.name}.wav")
            subprocess.run(["ffmpeg", "-nostdin", "-v", "error", *map(str, (*read, *film, *sound))], check=True)

        with ThreadPoolExecutor(args.workers if at_once else 1) as pool:
            list(pool.map(cut, todo))

    return run


def check(out: Path, todo: Sequence[Piece], args: argparse.Namespace) -> None:
    """UserError unless every piece is there with as many frames as it lasts, to one."""
    wanted = int(Fraction(todo[0].seconds).limit_denominator(1000) * args.fps)
    found = {path.stem: _num_frames(path) for path in out.glob("*.mp4")}
    for shard in (out / "shards").glob("*.tar"):
        for key, members in shards.samples(shard):
            film = out / f"{key}.mp4"
            film.write_bytes(members["mp4"])
            found[key] = _num_frames(film)
    for piece in todo:
        if abs(found.get(piece.name, 0) - wanted) > 1:
            raise UserError(f"{piece.name} has {found.get(piece.name, 0)} frames of {wanted}: {out}; look at the film")


def _num_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return container.streams.video[0].frames


def measure(args: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Way -> wall and CPU seconds of each round."""
    todo = pieces(args.videos, args.clips, args.seconds)
    ways = {
        "prepare": by_prepare,
        "ffmpeg": by_ffmpeg(*ENCODER, at_once=False),
        f"ffmpeg, {args.workers} at once": by_ffmpeg(*ENCODER, at_once=True),
        "ffmpeg, plain": by_ffmpeg("-pix_fmt", "yuv420p", at_once=False),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory(prefix="measure_prepare_") as folder:
        for number in range(args.rounds):
            names = list(ways)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                out = Path(folder) / "out"
                before, start = _cpu(), time.perf_counter()
                ways[name](todo, args, out)
                found[name].append((time.perf_counter() - start, _cpu() - before))
                check(out, todo, args)
                shutil.rmtree(out)
                print(f"round {number + 1}: {name} {found[name][-1][0]:.1f} s", file=sys.stderr)
    return found


def _cpu() -> float:
    """CPU seconds of all that ran so far, orphans included: `main` made this process the one that they come to."""
    with suppress(ChildProcessError):
        while True:
            os.wait()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--videos", type=Path, required=True, metavar="DIR")
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--fps", type=Fraction, default=Fraction(16))
    parser.add_argument("--side", type=int, default=512)
    args = parser.parse_args()
    if args.rounds < 1 or args.clips < 1 or args.workers < 1:
        raise UserError("--clips, --rounds and --workers are 1 or more: measure_prepare; give such numbers")
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    found = measure(args)
    base = statistics.median(wall for wall, _ in found["prepare"])
    print(f"{args.clips} clips of {args.seconds} s, {args.side}x{args.side} at {args.fps} fps, {os.cpu_count()} cores")
    print("| way | clips a minute, median (least, most) | CPU seconds a clip | time to prepare's |\n|---|---|---|---|")
    for name, rounds in found.items():
        wall = [seconds for seconds, _ in rounds]
        speeds = [60 * args.clips / seconds for seconds in (statistics.median(wall), max(wall), min(wall))]
        used = statistics.median(cpu for _, cpu in rounds) / args.clips
        ratio = statistics.median(wall) / base
        print(f"| {name} | {speeds[0]:.1f} ({speeds[1]:.1f}, {speeds[2]:.1f}) | {used:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"measure_prepare: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"measure_prepare: {error.cmd[0]} failed: {(error.stderr or b'').decode()[-500:]}")
