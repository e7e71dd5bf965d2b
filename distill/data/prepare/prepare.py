"""`distill data prepare`: cut the clips of a dataset into WebDataset shards; killed at any time, the same command resumes.

    OUT/prepare.json            the request; another request for the same folder is refused
    OUT/NAME-000000.tar         a shard: <key>.mp4, <key>.flac (16 kHz mono), <key>.json (metadata), key = id with "+" for "."
    OUT/NAME-000000.json        its index: key, id, place, frames and size of every sample, the clips that were refused and why
    OUT/manifest.parquet        the clips that are in the shards; manifest.refused.jsonl: all others, the reader's included
    OUT/SHA256SUMS              of all of these but prepare.json; written last: without it the run is unfinished
    OUT/.work/                  finished samples of unfinished shards

The assignment of clips to shards is fixed before the first is cut, so it does not depend on time, processes or refusals.
"""

import argparse
import errno
import hashlib
import importlib
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from tqdm import tqdm

from distill.data.datasets.manifest import Clip, Manifest, Refused
from distill.data.prepare import cutting, shards
from distill.data.prepare.cutting import CutConfig
from distill.data.prepare.workers import add_workers, exclusive, shared_out, size_of, stop_for_the_machine
from teachers.config import fraction
from teachers.disk.lock import LOCK
from teachers.errors import UserError
from teachers.files import atomic_write, canonical_json, make_folder, read_json_or_none
from teachers.media import face
from teachers.media.crop import CROPS

NAMES = ("hdtf", "avspeech", "celebvhq", "folder")
HDTF_OPTIONS = ("full_frame", "scale_crops")
SOME_REFUSED = 3
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Clip number `number` of the manifest, to be cut from `videos` into the folder `work`."""

    number: int
    clip: Clip
    videos: Path
    work: Path
    config: CutConfig

    @property
    def record(self) -> Path:
        """The last file to be written for the clip."""
        return self.work / f"{self.number:08d}.json"

    @property
    def fragment(self) -> Path:
        return self.work / f"{self.number:08d}.tar"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The result: numbers of clips and shards, their seconds, and what was refused."""

    num_clips: int
    num_shards: int
    seconds: float
    refused: tuple[Refused, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `distill data prepare`."""
    parser.add_argument("name", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument(
        "--annotations",
        type=Path,
        metavar="DIR",
        help="official annotation files (folder needs none), or a manifest.parquet",
    )
    parser.add_argument("--videos", type=Path, required=True, metavar="DIR", help="source videos")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the shards")
    parser.add_argument(
        "--fps", type=_fraction, help="frames a second, e.g. 25 or 30000/1001 (default: that of --for, or 16)"
    )
    parser.add_argument(
        "--size", type=size_of, metavar="HxW", help="of the frames (default: that of --for, or of the crop)"
    )
    parser.add_argument(
        "--crop",
        choices=CROPS,
        default="face",
        help="part of a frame of another shape than --size to keep; face without one is the top (face)",
    )
    parser.add_argument(
        "--crf", type=int, default=10, help="H.264 quality, 0 is lossless and some 15 times larger (10)"
    )
    parser.add_argument(
        "--cuts", choices=("refuse", "longest", "keep"), default="refuse", help="clips with a scene cut (refuse)"
    )
    parser.add_argument("--min-seconds", type=float, default=1.0, help="shorter clips are refused (1)")
    parser.add_argument("--max-seconds", type=float, help="longer clips are truncated")
    parser.add_argument(
        "--silent", action="store_true", help="accept clips without an audio track or with silence alone"
    )
    parser.add_argument("--full-frame", action="store_true", help="hdtf: no crops")
    parser.add_argument("--scale-crops", action="store_true", help="hdtf: crops follow a video of another resolution")
    parser.add_argument("--shard-clips", type=int, default=64, help="clips a shard (64)")
    add_workers(parser)
    parser.add_argument("--retry", action="store_true", help="try refused clips again and write their shards anew")


def run(args: argparse.Namespace) -> int:
    """Prepare and print a summary; 0 when every clip is in a shard, 3 when some were refused. Raises UserError."""
    if args.shard_clips < 1:
        raise UserError(f"--shard-clips must be 1 or more: got {args.shard_clips}")
    options: dict[str, Any] = {option.name: getattr(args, option.name) for option in fields(CutConfig)}
    if args.fps is None:
        del options["fps"]
    config = CutConfig(**options)
    manifest = _read(args)
    if not manifest.clips and not manifest.refused:
        raise UserError(f"no clips: {args.videos} has no videos; put mp4, mov, mkv or webm files there")
    with tqdm(total=len(manifest.clips), unit="clip", desc="prepare", file=sys.stderr) as progress:

        def tick(refused: Refused | None) -> None:
            if refused is not None:
                progress.write(f"refused {refused.id}: {refused.reason}", file=sys.stderr)
            progress.update()

        for refused in manifest.refused:
            progress.write(f"refused {refused.id}: {refused.reason}", file=sys.stderr)
        done = prepare(
            manifest, args.videos, args.out, args.name, config, args.shard_clips, args.workers, args.retry, tick
        )
    sys.stdout.write(
        f"{args.out}: {done.num_clips} clips, {done.seconds:.1f} s in {done.num_shards} shards; "
        f"{len(done.refused)} refused{_most_common(done.refused)}\n"
    )
    return SOME_REFUSED if done.refused else 0


def _read(args: argparse.Namespace) -> Manifest:
    """The manifest of the command line's annotations."""
    options = {name: True for name in HDTF_OPTIONS if getattr(args, name)}
    if options and args.name != "hdtf":
        raise UserError(f"--{next(iter(options)).replace('_', '-')} is for hdtf: got {args.name}; remove it")
    if args.annotations is None and args.name != "folder":
        raise UserError(f"--annotations is missing: {args.name}; give the folder of its official annotation files")
    if args.annotations is not None and args.annotations.suffix == ".parquet":
        return Manifest.load(args.annotations)
    return importlib.import_module(f"distill.data.datasets.{args.name}").read(args.annotations, args.videos, **options)


def prepare(
    manifest: Manifest,
    videos: Path,
    out: Path,
    name: str,
    config: CutConfig,
    shard_clips: int = 64,
    workers: int = 0,
    retry: bool = False,
    tick: Callable[[Refused | None], object] = lambda _: None,
) -> Prepared:
    """Cut all clips of `manifest` into shards `name`-NNNNNN.tar of `shard_clips` clips each, with indices, manifest and checksums.

    workers: processes, 0 for none but this one; retry: shards with refused clips are written anew; tick: called once a clip
    Raises UserError when the folder is another request's, in use, not writable or its disk full; finished work stays.
    """
    videos, out = Path(videos), Path(out)
    request = {
        "name": name,
        "shard_clips": shard_clips,
        **asdict(config),
        "fps": str(config.fps),
        "faces": face.detector(),
    }
    request["clips"] = hashlib.sha256(canonical_json([asdict(clip) for clip in manifest.clips]).encode()).hexdigest()
    make_folder(out)
    with exclusive(out, "prepare"):
        _check_request(out, request)
        tasks = [
            Task(number=number, clip=clip, videos=videos, work=out / ".work", config=config)
            for number, clip in enumerate(manifest.clips)
        ]
        groups = [
            _Shard(out / f"{name}-{start // shard_clips:06d}.tar", tasks[start : start + shard_clips])
            for start in range(0, len(tasks), shard_clips)
        ]
        if retry:
            (out / shards.CHECKSUMS).unlink(missing_ok=True)
            for group in groups:
                group.reopen_refused()
        if not all(group.is_done for group in groups):
            make_folder(out / ".work")
            _cut_all(groups, workers, tick)
        else:
            for _ in tasks:
                tick(None)
        return _finish(out, manifest, groups)


def make_sample(task: Task) -> dict[str, Any]:
    """Cut one clip, write its fragment and its record to the work folder, and return the record.

    The record states why a clip is refused; UserError is for a disk that is full or another failure of the machine.
    """
    record: dict[str, Any] = {"id": task.clip.id, "key": shards.sample_key(task.clip.id), "source": task.clip.source}
    video = task.work / f"{task.number:08d}.{os.getpid()}.mp4"
    try:
        members = _members(task, video, record)
        if members is not None:
            record["bytes"] = shards.write_fragment(task.fragment, record["key"], members)
        atomic_write(task.record, canonical_json(record))
    finally:
        video.unlink(missing_ok=True)
    return record


def _members(task: Task, video: Path, record: dict[str, Any]) -> dict[str, bytes | Path] | None:
    """The files of a clip's sample, extension -> content, its frames and seconds noted in `record`; None for a refused clip."""
    try:
        piece = cutting.cut(task.clip, task.videos / task.clip.source, task.config, video)
        metadata = json.dumps(
            {**_annotations(task.clip), **piece.metadata}, sort_keys=True, ensure_ascii=False, allow_nan=False
        )
        sound = {} if piece.sound is None else {"flac": cutting.encode_flac(piece.sound)}
    except Exception as error:  # one bad clip never stops the rest
        if getattr(error, "errno", None) in FULL:
            raise UserError(f"the disk is full: {task.work}; make room and run the same command again") from error
        stop_for_the_machine(error, task.clip.id)
        record["refused"] = (
            str(error) if isinstance(error, UserError) else f"cannot be cut: {type(error).__name__}: {error}"
        )
    else:
        record.update(frames=piece.num_frames, seconds=float(piece.num_frames / task.config.fps))
        record.update(size=piece.metadata["size"], sound=piece.sound is not None)
        return {"mp4": video, "json": f"{metadata}\n".encode(), **sound}
    return None


def _annotations(clip: Clip) -> dict[str, Any]:
    """The manifest's fields of a clip, its times as `annotated_start` and `annotated_end`."""
    fields = {name: getattr(clip, name) for name in ("id", "dataset", "source", "text", "licence", "split", "identity")}
    return {**fields, "annotated_start": clip.start, "annotated_end": clip.end}


class _Shard:
    """A shard and the tasks of its clips."""

    def __init__(self, path: Path, tasks: Sequence[Task]):
        self.path, self.index_path, self.tasks = path, path.with_suffix(".json"), tasks

    @property
    def is_done(self) -> bool:
        return self.index_path.is_file()

    def index(self) -> dict[str, Any]:
        """The index of the finished shard; UserError where it is damaged."""
        index = read_json_or_none(self.index_path)
        if index is None:
            raise UserError(f"index is damaged: {self.index_path}; delete it and prepare the data again")
        return index

    def close(self) -> bool:
        """Join the fragments if all clips are cut, the index last; returns whether the shard is finished."""
        records = [(task, record) for task in self.tasks if (record := read_json_or_none(task.record)) is not None]
        if len(records) < len(self.tasks):
            return False
        cut = [(task, record) for task, record in records if "refused" not in record]
        offsets, digest = shards.join([task.fragment for task, _ in cut], self.path)
        samples = [{**record, "offset": offset} for (_, record), offset in zip(cut, offsets, strict=True)]
        index = {
            "sha256": digest,
            "samples": samples,
            "refused": [record for _, record in records if "refused" in record],
        }
        atomic_write(self.index_path, json.dumps(index, sort_keys=True, indent=1) + "\n")
        self.clear()
        return True

    def clear(self) -> None:
        """Remove the records, then the fragments."""
        for task in self.tasks:
            task.record.unlink(missing_ok=True)
        for task in self.tasks:
            task.fragment.unlink(missing_ok=True)

    def reopen_refused(self) -> None:
        """Delete the records of refused clips, and the index of a shard that has any."""
        if self.is_done and self.index()["refused"]:
            self.index_path.unlink()
        for task in self.tasks:
            if "refused" in (read_json_or_none(task.record) or {}):
                task.record.unlink()


def _cut_all(groups: Sequence[_Shard], workers: int, tick: Callable) -> None:
    """Cut every clip that is not cut yet and close each shard when its last clip is there."""
    waiting, shard_of, missing = [], {}, Counter()
    for group in groups:
        if group.is_done:
            group.clear()
        for task in group.tasks:
            if group.is_done or task.record.is_file():
                tick(None)
            else:
                waiting.append(task)
                shard_of[task.number] = group
                missing[group.path] += 1
        if not group.is_done and not missing[group.path]:
            group.close()
    for task, record in shared_out(make_sample, waiting, workers):
        if record is None:
            record = {"id": task.clip.id, "key": shards.sample_key(task.clip.id), "source": task.clip.source}
            record["refused"] = "its decoder crashed"
            atomic_write(task.record, canonical_json(record))
        reason, group = record.get("refused"), shard_of[task.number]
        tick(None if reason is None else Refused(task.clip.id, task.clip.source, reason))
        missing[group.path] -= 1
        if not missing[group.path]:
            group.close()


def _finish(out: Path, manifest: Manifest, groups: Sequence[_Shard]) -> Prepared:
    """Write the manifest of the clips in the shards and the checksums, and remove the work folder."""
    indices = [group.index() for group in groups]
    reasons = {row["id"]: row["refused"] for index in indices for row in index["refused"]}
    prepared = tuple(clip for clip in manifest.clips if clip.id not in reasons)
    refused = tuple(Refused(c.id, c.source, reasons[c.id]) for c in manifest.clips if c.id in reasons)
    sums = {group.path.name: index["sha256"] for group, index in zip(groups, indices, strict=True)}
    if not (out / shards.CHECKSUMS).is_file():
        Manifest(prepared, (*manifest.refused, *refused)).save(out / "manifest.parquet")
        others = [group.index_path.name for group in groups] + ["manifest.parquet", "manifest.refused.jsonl"]
        shards.write_checksums(out, {**sums, **{name: shards.sha256(out / name) for name in others}})
    shutil.rmtree(out / ".work", ignore_errors=True)
    return Prepared(
        num_clips=len(prepared),
        num_shards=len(groups),
        seconds=sum(row["seconds"] for index in indices for row in index["samples"]),
        refused=(*manifest.refused, *refused),
    )


def _check_request(out: Path, request: dict[str, Any]) -> None:
    """Write prepare.json with this request; UserError when the folder has another request's or something else."""
    path, request = out / "prepare.json", json.loads(json.dumps(request))
    before = read_json_or_none(path)
    if before is None:
        if any(path.name != LOCK for path in out.iterdir()):
            raise UserError(f"not a folder of prepared data: {out} contains something else; choose another --out")
        atomic_write(path, json.dumps(request, sort_keys=True, indent=1) + "\n")
    elif before != request:
        names = sorted(name for name in before.keys() | request.keys() if before.get(name) != request.get(name))
        raise UserError(f"prepared with another request ({', '.join(names)} differ): {out}; choose another --out")


def _most_common(refused: Sequence[Refused]) -> str:
    """The three most frequent reasons in brackets, their numbers masked."""
    kinds = Counter(re.sub(r"[\d.]+", "_", row.reason.partition(":")[0]) for row in refused).most_common(3)
    return f" ({'; '.join(f'{number} x {kind}' for kind, number in kinds)})" if kinds else ""


def _fraction(text: str) -> Fraction:
    try:
        return fraction(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not a number of frames a second: {text}") from error
