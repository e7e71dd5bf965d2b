"""`distill data curate`: select clips that are good conditions. Every clip is scored once; thresholds may change afterwards.

    OUT/curate.json                  the data and the thresholds; another kind of folder is refused
    OUT/scores.parquet               a row a clip: id, fingerprint, scores (see `scores.py`), caption, thumbnail, problem
    OUT/manifest.parquet             the clips that are kept; manifest.refused.jsonl: all others and why
    OUT/kept.html, removed.html      pages to look at, the clips nearest to a threshold first
    OUT/references/<key>.png         first frames of the kept clips through a super-resolution model, where one is given
    OUT/scores.jsonl                 rows of an unfinished run; the same command resumes from them

A recipe trains on the kept clips with `data.name=folder data.path=DIR data.manifest=OUT` (`distill.data.recorded`).
A row is used again while its fingerprint (content, clip, face, version of the formulas) is the same.
"""

import argparse
import base64
import errno
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from distill.data.curate.candidates import Candidate, Framing, opened, read_candidates, read_faces
from distill.data.curate.models import CaptionRewriter, Upscaler
from distill.data.curate.scores import SCORES, motion_text, score
from distill.data.datasets.manifest import Clip, Manifest, Refused
from distill.data.prepare import page, shards
from distill.data.prepare.workers import add_workers, exclusive, shared_out, size_of, stop_for_the_machine
from teachers.config import convert, nearest
from teachers.disk.lock import LOCK
from teachers.disk.read import read_yaml
from teachers.errors import UserError
from teachers.files import atomic_write, make_folder, replacing
from teachers.media.crop import CROPS

NOT_SCORED = 3
OFFSET = "sync_offset_ms"
NAMES = (*SCORES, OFFSET)
ABOUT = {**SCORES, OFFSET: "delay of the video behind the sound at the best correlation, in ms"}
DIGITS = 3
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("fingerprint", pa.string(), nullable=False),
        *(pa.field(name, pa.float64()) for name in NAMES),
        pa.field("face_box", pa.list_(pa.float64())),
        pa.field("thumbnail", pa.binary()),
        pa.field("problem", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("caption_fingerprint", pa.string()),
        pa.field("kept", pa.bool_()),
        pa.field("reasons", pa.list_(pa.string())),
    ]
)
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Range:
    """Values of a score that are kept."""

    at_least: float | None = None
    at_most: float | None = None

    def violation(self, name: str, value: float | None) -> str | None:
        """Why a value is outside the range, or None."""
        if self.at_least is None and self.at_most is None:
            return None
        if value is None:
            return f"{name} cannot be measured"
        if self.at_least is not None and value < self.at_least:
            return f"{name} {value:.{DIGITS}f} is below {self.at_least:g}"
        if self.at_most is not None and value > self.at_most:
            return f"{name} {value:.{DIGITS}f} is above {self.at_most:g}"
        return None

    def margin(self, value: float | None) -> float:
        """Distance of a kept value from the nearer end, as a share of that end."""
        ends = [end for end in (self.at_least, self.at_most) if end is not None]
        if value is None:
            return 0.0
        return min((abs(value - end) / (abs(end) or 1.0) for end in ends), default=math.inf)


Thresholds = dict[str, Range]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `distill data curate`."""
    parser.epilog = (
        "A recipe trains on the kept clips with data.name=folder data.path=DIR data.manifest=OUT. Of a manifest.parquet, give "
        "OUT/manifest.parquet to distill data prepare as --annotations: it cuts the kept clips alone."
    )
    parser.add_argument("data", type=Path, metavar="DIR", help="what distill data prepare wrote, or a manifest.parquet")
    parser.add_argument("--videos", type=Path, metavar="DIR", help="source videos of a manifest.parquet")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of scores, pages and the manifest"
    )
    parser.add_argument(
        "--thresholds", type=Path, metavar="YAML", help="ranges of the scores (distill/data/curate/curate.yaml)"
    )
    parser.add_argument(
        "--size",
        type=size_of,
        metavar="HxW",
        help="of a manifest.parquet: score clips as prepare --size will crop them",
    )
    parser.add_argument(
        "--crop", choices=CROPS, default="face", help="part of a frame of another shape than --size to keep (face)"
    )
    parser.add_argument(
        "--faces",
        type=Path,
        metavar="CSV",
        help="faces by your own detector: id,x,y,width,height in fractions of a frame",
    )
    parser.add_argument(
        "--captions", type=Path, metavar="MODEL", help="folder of an image-text model that rewrites captions"
    )
    parser.add_argument(
        "--super-resolution",
        type=Path,
        metavar="MODEL",
        help="folder of an image-to-image model for reference images",
    )
    add_workers(parser)


def run(args: argparse.Namespace) -> int:
    """Curate and print a summary; 0 when every clip was scored, 3 when some could not be. Raises UserError."""
    thresholds, faces = read_thresholds(args.thresholds), read_faces(args.faces)
    candidates, manifest = read_candidates(args.data, args.videos, faces, Framing(size=args.size, crop=args.crop))
    rewriter = CaptionRewriter(args.captions) if args.captions is not None else None
    upscaler = Upscaler(args.super_resolution) if args.super_resolution is not None else None
    with tqdm(total=len(candidates), unit="clip", desc="curate", file=sys.stderr) as progress:

        def tick(row: Row) -> None:
            if row["problem"]:
                progress.write(f"not scored {row['id']}: {row['problem']}", file=sys.stderr)
            progress.update()

        rows = curate(
            candidates, manifest, args.out, thresholds, args.workers, tick, rewriter, upscaler, source=str(args.data)
        )
    num_kept, num_problems = (sum(bool(row[name]) for row in rows) for name in ("kept", "problem"))
    removed = len(rows) - num_kept - num_problems
    sys.stdout.write(
        f"{args.out}: {num_kept} of {len(rows)} clips kept, {removed} removed, {num_problems} not scored; "
        f"look at {args.out / 'kept.html'} and {args.out / 'removed.html'}\n"
    )
    return NOT_SCORED if num_problems else 0


def read_thresholds(path: Path | None) -> Thresholds:
    """The ranges in a YAML file, the package's own without one; UserError with the key for an unknown or mistyped one."""
    name = path or "distill/data/curate/curate.yaml"
    if path is None:
        values = yaml.safe_load((resources.files("distill.data.curate") / "curate.yaml").read_text("utf-8"))
    else:
        values = read_yaml(path, "write `score: {at_least: 0.5}` in each line") or {}
    if not isinstance(values, dict):
        raise UserError(f"thresholds must be a mapping: {name}; write `score: {{at_least: 0.5}}` in each line")
    for key in values:
        if key not in NAMES:
            raise UserError(f"unknown score '{key}': {name}; {nearest(str(key), NAMES)}")
    ranges = {key: convert(Range, value or {}, str(key), lambda _: str(name)) for key, value in values.items()}
    for key, limits in ranges.items():
        if None not in (limits.at_least, limits.at_most) and limits.at_least > limits.at_most:
            raise UserError(f"range of '{key}' is empty, at_least is above at_most: {name}; correct it")
    return ranges


def curate(
    candidates: Sequence[Candidate],
    manifest: Manifest,
    out: Path,
    thresholds: Thresholds,
    workers: int = 0,
    tick: Callable[[Row], object] = lambda _: None,
    rewriter: CaptionRewriter | None = None,
    upscaler: Upscaler | None = None,
    source: str = "",
) -> list[Row]:
    """Score what is not scored yet, apply the thresholds, and write scores, manifest and pages to `out`.

    tick: called once a clip. A clip that cannot be scored is a row with a problem and is not kept. Raises UserError when the
    folder contains something else, is in use or its disk full; the scores so far stay. Returns the rows in the manifest's order.
    """
    make_folder(out)
    limits = {name: asdict(value) for name, value in thresholds.items()}
    if not (out / "curate.json").is_file() and any(path.name != LOCK for path in out.iterdir()):
        raise UserError(f"not a folder of curated data: {out} contains something else; choose another --out")
    with exclusive(out, "curate"):
        request = {"data": source, "thresholds": limits}
        atomic_write(out / "curate.json", json.dumps(request, sort_keys=True, indent=1) + "\n")
        rows = _score_all(candidates, out, workers, tick)
        kept = []
        for candidate, row in zip(candidates, rows, strict=True):
            _rewrite_caption(candidate, row, thresholds, rewriter, out)
            apply_thresholds(row, thresholds)
            if row["kept"]:
                clip = candidate.clip
                kept.append(clip if row["caption"] is None else replace(clip, text=row["caption"]))
            if row["kept"] and upscaler is not None:
                _write_reference(candidate, upscaler, out)
        _save(out, rows, Manifest(tuple(kept), (*manifest.refused, *_removed(candidates, rows))))
        clips = {candidate.clip.id: candidate.clip for candidate in candidates}
        for name, wanted in (("kept", True), ("removed", False)):
            page.write_page(
                out / f"{name}.html", "curate.html.j2", page_context(rows, thresholds, wanted, clips, source)
            )
    return rows


def score_row(candidate: Candidate) -> Row:
    """The row of one clip; `problem` states why it could not be scored."""
    row = _empty(candidate)
    try:
        content = opened(candidate)
        text = candidate.clip.text
        scores, frame = score(
            content.frames, content.fps, content.sound, text, content.scale, candidate.box, content.face_cut
        )
    except Exception as error:  # one bad clip never stops the rest
        stop_for_the_machine(error, candidate.clip.id)
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return {**row, "problem": f"{kind}{error}"[:500]}
    return {**row, **scores, "thumbnail": page.thumbnail(frame, scores["face_box"])}


def _empty(candidate: Candidate) -> Row:
    return {**dict.fromkeys(SCHEMA.names), "id": candidate.clip.id, "fingerprint": candidate.fingerprint}


def _score_all(candidates: Sequence[Candidate], out: Path, workers: int, tick: Callable[[Row], object]) -> list[Row]:
    """Rows of all candidates in their order, taken from earlier runs where the fingerprint is the same."""
    fingerprints = {candidate.clip.id: candidate.fingerprint for candidate in candidates}
    rows = {row["id"]: row for row in _earlier_rows(out) if fingerprints.get(row["id"]) == row["fingerprint"]}
    waiting = [candidate for candidate in candidates if candidate.clip.id not in rows]
    for row in rows.values():
        tick(row)
    for candidate, row in shared_out(score_row, waiting, workers):
        row = row or {**_empty(candidate), "problem": "its decoder crashed"}
        _append(out / "scores.jsonl", row)
        rows[row["id"]] = row
        tick(row)
    return [rows[candidate.clip.id] for candidate in candidates]


def _earlier_rows(out: Path) -> list[Row]:
    """Complete rows of earlier runs, the latest of a clip last; those with a problem are scored again."""
    rows: list[Row] = []
    with suppress(OSError, pa.ArrowException):
        table = pq.read_table(out / "scores.parquet")
        rows += table.to_pylist() if table.schema.remove_metadata() == SCHEMA else []
    for line in _complete_lines(out / "scores.jsonl"):
        with suppress(ValueError, TypeError, AttributeError, RecursionError, pa.ArrowException):
            row = json.loads(line)
            if row.keys() == set(SCHEMA.names):
                row["thumbnail"] = base64.b64decode(row["thumbnail"]) if row["thumbnail"] else None
                pa.Table.from_pylist([row], SCHEMA).validate(full=True)
                rows.append(row)
    return [row for row in rows if row["problem"] is None]


def _append(path: Path, row: Row) -> None:
    """Append a row to those of the unfinished run, as one line."""
    thumbnail = base64.b64encode(row["thumbnail"]).decode() if row["thumbnail"] else None
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "thumbnail": thumbnail}) + "\n")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk is full: {path}; make room and run the same command again") from error
        raise UserError(f"scores cannot be written ({error.strerror}): {path}; choose another --out") from error


def _complete_lines(path: Path) -> list[bytes]:
    """The lines of the file, truncated after the last complete one."""
    with suppress(FileNotFoundError), path.open("rb+") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)
        return data[: data.rfind(b"\n") + 1].splitlines()
    return []


def _rewrite_caption(
    candidate: Candidate, row: Row, thresholds: Thresholds, rewriter: CaptionRewriter | None, out: Path
) -> None:
    """Rewrite the caption of a clip that passes all other thresholds; without a rewriter it is the clip's own again."""
    if rewriter is not None and row["caption_fingerprint"] == rewriter.fingerprint:
        return
    row.update(caption=None, caption_fingerprint=None, motion_text=motion_text(candidate.clip.text))
    others = {name: limits for name, limits in thresholds.items() if name != "motion_text"}
    if rewriter is None or row["problem"] is not None or violations(row, others):
        return
    try:
        caption = rewriter(_first_frame(candidate), candidate.clip.text)
    except (UserError, ValueError, RuntimeError) as error:
        row["problem"] = f"caption: {error}"[:500]
    else:
        row.update(caption=caption, caption_fingerprint=rewriter.fingerprint, motion_text=motion_text(caption))
        _append(out / "scores.jsonl", row)


def _first_frame(candidate: Candidate) -> torch.Tensor:
    return torch.from_numpy(next(iter(opened(candidate).frames)).copy())


def _write_reference(candidate: Candidate, upscaler: Upscaler, out: Path) -> None:
    """Write the super-resolved first frame, unless it is there from the same model and clip."""
    make_folder(out / "references")
    path = out / "references" / f"{shards.sample_key(candidate.clip.id)}.png"
    fingerprint = f"{candidate.fingerprint} {upscaler.fingerprint}"
    with suppress(OSError), Image.open(path) as before:
        if before.info.get("fingerprint") == fingerprint:
            return
    image = Image.fromarray(upscaler(_first_frame(candidate)).numpy())
    metadata = PngInfo()
    metadata.add_text("fingerprint", fingerprint)
    with replacing(path, image.width * image.height * 3) as temporary:
        image.save(temporary, "PNG", pnginfo=metadata)


def violations(row: Row, thresholds: Thresholds) -> dict[str, str]:
    """Score -> why it removes the clip."""
    reasons = {name: limits.violation(name, row[name]) for name, limits in thresholds.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def apply_thresholds(row: Row, thresholds: Thresholds) -> None:
    """Set `kept` of the row and the `reasons` for which the clip is removed."""
    reasons = [f"cannot be scored: {row['problem']}"] if row["problem"] else list(violations(row, thresholds).values())
    row.update(kept=not reasons, reasons=reasons)


def _removed(candidates: Sequence[Candidate], rows: Sequence[Row]) -> list[Refused]:
    pairs = zip(candidates, rows, strict=True)
    return [Refused(c.clip.id, c.clip.source, "; ".join(row["reasons"])) for c, row in pairs if not row["kept"]]


def _save(out: Path, rows: Sequence[Row], manifest: Manifest) -> None:
    """Write scores and manifest, then delete the rows of the unfinished run."""
    table = pa.Table.from_pylist(list(rows), schema=SCHEMA)
    with replacing(out / "scores.parquet", table.nbytes) as temporary:
        pq.write_table(table, temporary)
    manifest.save(out / "manifest.parquet")
    (out / "scores.jsonl").unlink(missing_ok=True)


def page_context(
    rows: Sequence[Row], thresholds: Thresholds, kept: bool, clips: Mapping[str, Clip], source: str
) -> dict[str, Any]:
    """Template context of the page of kept or removed clips; the clips nearest to a threshold come first."""

    def nearness(row: Row) -> tuple[float, str]:
        if kept:
            return min((limits.margin(row[name]) for name, limits in thresholds.items()), default=0.0), row["id"]
        return float(len(row["reasons"])), row["id"]

    chosen = sorted((row for row in rows if row["kept"] == kept), key=nearness)
    cards = [
        {
            "id": row["id"],
            "thumbnail": row["thumbnail"],
            "reasons": row["reasons"],
            "failed": violations(row, thresholds),
            "scores": [(name, "-" if row[name] is None else f"{row[name]:.{DIGITS}g}") for name in NAMES],
            "text": row["caption"] if row["caption"] is not None else clips[row["id"]].text,
        }
        for row in chosen[: page.MAX_CARDS]
    ]
    plots = []
    for name in NAMES:
        limits, values = thresholds.get(name, Range()), [row[name] for row in rows if row[name] is not None]
        svg = page.histogram(values, (limits.at_least, limits.at_most))
        plots.append({"name": name, "about": ABOUT[name], "svg": svg})
    num_kept = sum(row["kept"] for row in rows)
    return {
        "title": "Kept clips" if kept else "Removed clips",
        "lead": f"{num_kept} of {len(rows)} clips are kept, {len(rows) - num_kept} removed{f': {source}' if source else ''}",
        "note": "The rectangle in a frame is the detected face; where it is not a face, the face scores are meaningless.",
        "plots": plots,
        "heading": "Kept, the nearest to removal first" if kept else "Removed, those with the fewest reasons first",
        "num_hidden": len(chosen) - len(cards),
        "cards": cards,
    }
