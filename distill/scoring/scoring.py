"""Scores of a set of clips against the real ones: features kept for each clip, shared out over processes, joined in order.

A feature's file is named by what it was made of (bytes of the clip, card, extractor, metric), so a killed run goes on, and a
real clip is read once for any number of students. Every process works with one thread: their number changes no digit.
"""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from distill import __version__
from distill.data.prepare.workers import one_thread, shared_out
from distill.pipeline.run_folder import versions
from distill.scoring.clip_io import read_clip
from distill.scoring.clip_sets import Entry, open_set
from distill.scoring.generate import GenerateJob, generate_clip
from eval import golden
from eval.cards import Card
from eval.metric import Metric, Score
from eval.networks.loaded import Networks
from eval.scores import IN_CLIPS, clip_features, refusals, set_scores
from teachers.checkpoints.strict import listed
from teachers.errors import UserError
from teachers.files import canonical_json, load_tensors, make_folder, save_tensors

NAMED = 5  # clips that are named in an error
FACTS = "facts"  # of a clip, kept in a file as features are
Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every process has to know. `metrics`: keys of the card; `probes`: folder of the embedded extractors; `cache`:
    where features lie."""

    card: Card
    metrics: tuple[str, ...]
    probes: Path | None
    device: str
    batch_size: int
    processes: int
    cache: Path = Path("features")


@dataclass(frozen=True)
class Look:
    """One clip to look at; for the ground truth both entries are the same."""

    entry: Entry
    real: Entry
    generated: bool


@dataclass(frozen=True)
class Found:
    """Where the features of a clip lie, its shape, and which of several sound tracks it has (number, of how many; zeros without a
    choice); or why there are none for one metric."""

    files: dict[str, str]
    shape: tuple[int, ...]
    track: tuple[int, ...]
    without: dict[str, str]


def generate_clips(job: GenerateJob, real: Mapping[str, Entry], card: Card, processes: int) -> dict[str, Entry]:
    """The student's clips for every real one, generated where they are not there yet. Raises UserError naming clips that failed."""
    make_folder(job.folder)
    work = partial(generate_clip, job, card=card)
    _of_all(work, real, processes, "generate", "cannot be generated")
    return {name: entry for name, entry in open_set(job.folder).items() if name in real}


def _of_all(
    work: Callable[[Task], Result], tasks: Mapping[str, Task], processes: int, title: str, failed: str
) -> list[Result]:
    """What `work` gives for every task, in their order. Raises UserError that names the tasks which failed."""
    found: dict[str, Result] = {}
    problems: dict[str, str] = {}
    with tqdm(total=len(tasks), unit="clip", desc=title, file=sys.stderr) as bar, one_thread():
        for (name, _), result in shared_out(partial(_tried, work), tasks.items(), processes):
            if result is None:
                problems[name] = "its process was killed, most likely for want of memory"
            elif isinstance(result, UserError):
                problems[name] = str(result)
            else:
                found[name] = result
            bar.update()
            bar.set_postfix(failed=len(problems))
    _raise(problems, len(tasks), failed)
    return [found[name] for name in tasks]


def _tried(work: Callable[[Task], Result], named: tuple[str, Task]) -> Result | UserError:
    try:
        return work(named[1])
    except UserError as error:
        return error


def match(generated: Mapping[str, Entry], real: Mapping[str, Entry], card: Card) -> list[str]:
    """The names of the clips, alphabetically. Raises UserError unless both sets have the same names, and the card's number."""
    missing, extra = sorted(real.keys() - generated.keys()), sorted(generated.keys() - real.keys())
    if missing or extra:
        words = [f"{len(generated)} generated and {len(real)} real clips"]
        words += [f"no generated clip for {listed(missing, NAMED)}"] if missing else []
        words += [f"no real clip for {listed(extra, NAMED)}"] if extra else []
        raise UserError("; ".join(words) + "; clips are matched by name: add, rename or remove them")
    check_number(real, card)
    return sorted(real)


def check_number(real: Mapping[str, Entry], card: Card) -> None:
    """Raises UserError unless there are as many real clips as the card scores."""
    if card.clips.num is not None and len(real) != card.clips.num:
        raise UserError(f"the protocol {card.name} scores {card.clips.num} clips: got {len(real)}; give that many")


def score(job: Job, name: str, generated: Mapping[str, Entry], real: Mapping[str, Entry]) -> dict[str, Any]:
    """The report of one set against the real clips, as eval.json has it.

    A metric that cannot be had (weights, sound, boxes, too few clips) is in `refused` with the reason. Raises UserError in one line
    for clips that cannot be read, do not fit the card or each other, and where nothing is left to score.
    """
    clips = match(generated, real, job.card)
    refused = refusals(job.card, job.metrics, IN_CLIPS | _networks(job.probes, job.device, job.batch_size).offers)
    job = replace(job, metrics=tuple(key for key in job.metrics if key not in refused))
    if not job.metrics:
        raise UserError("nothing can be scored: " + " | ".join(refused.values()))
    looks = {f"real {clip}": Look(real[clip], real[clip], False) for clip in clips}
    looks |= {f"generated {clip}": Look(generated[clip], real[clip], True) for clip in clips}
    make_folder(job.cache)
    found = _of_all(partial(_look, job), looks, job.processes, ", ".join(job.metrics), "cannot be scored")
    theirs, ours = found[: len(clips)], found[len(clips) :]
    _check_shapes(clips, ours, theirs)
    refused |= _without(job, [*theirs, *ours])
    table: dict[str, Any] = {"ground_truth": _row(len(clips)), "floor": _row(len(clips) // 2), name: _row(len(clips))}
    notes = _tracks(dict(zip(looks, found, strict=True)))
    with tqdm([key for key in job.metrics if key not in refused], desc="score", file=sys.stderr) as bar:
        for key in bar:
            bar.set_postfix_str(key)
            sides = [[load_tensors(job.cache / item.files[key]) for item in which] for which in (ours, theirs)]
            try:
                notes += _score_metric(
                    job.card.metrics[key], sides[0], sides[1], clips, job.card.floor_splits, table, name
                )
            except UserError as error:
                refused[key] = f"{key} refused: {error}"
    if not table[name]["metrics"]:
        raise UserError("nothing can be scored: " + " | ".join(refused.values()))
    files = {
        key: {"generated": [item.files[key] for item in ours], "real": [item.files[key] for item in theirs]}
        for key in job.metrics
        if all(key in item.files for item in found)
    }
    return {
        "format": 2,
        "name": name,
        "card": job.card.plain(),
        "columns": {column: shown.plain() for column, shown in job.card.columns.items()},
        "n": len(clips),
        "clips": clips,
        "shape": list(ours[0].shape),
        "rows": table,
        "notes": notes,
        "refused": refused,
        "features": files,
        "golden": golden.remembered(),
        "versions": versions(),
    }


def _row(num: int) -> dict[str, Any]:
    return {"n": num, "metrics": {}, "clips": {}}


def _score_metric(
    metric: Metric, ours: list, theirs: list, clips: list[str], splits: int, table: dict[str, Any], name: str
) -> list[str]:
    """Put the scores of all rows into the table; returns what must stand beside them."""
    scores = set_scores(metric, ours, None if metric.against is None else theirs)
    truth = {} if metric.paired else set_scores(metric, theirs, None)
    floor = metric.floor(theirs, splits)
    put_scores(table[name], scores)
    put_scores(table["ground_truth"], truth)
    if floor is not None:
        table["floor"]["metrics"] |= {name: {"mean": mean, "error": error} for name, (mean, error) in floor[0].items()}
        table["floor"]["n"] = floor[1]
    return metric.notes(clips, truth)


def put_scores(row: dict[str, Any], scores: Mapping[str, Score]) -> None:
    """Add scores to a row of a report: mean and error, and a value for each clip where there is one."""
    row["metrics"] |= {name: {"mean": _finite(x.mean), "error": _finite(x.error)} for name, x in scores.items()}
    row["clips"] |= {name: [_finite(v) for v in x.clips] for name, x in scores.items() if x.clips is not None}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@lru_cache(maxsize=1)
def _networks(probes: Path | None, device: str, batch_size: int) -> Networks:
    return Networks(probes, device, batch_size)


def _look(job: Job, look: Look) -> Found:
    """Make the features of one clip that are not there yet; its shape and track are kept beside them.

    UserError for the clip as a whole.
    """
    files = {key: _file_name(job, look, key) for key in (FACTS, *job.metrics)}
    missing = [key for key, file in files.items() if not (job.cache / file).is_file()]
    without = _make(job, look, {key: files[key] for key in missing}) if missing else {}
    facts = {name: tuple(value.tolist()) for name, value in load_tensors(job.cache / files[FACTS]).items()}
    return Found({key: file for key, file in files.items() if key not in without}, **facts, without=without)


def _make(job: Job, look: Look, files: Mapping[str, str]) -> dict[str, str]:
    """Write features, metric -> file; returns metric -> why this clip has none. UserError for the clip as a whole."""
    clip = read_clip(look.entry, job.card, look.generated)
    real = clip if look.entry is look.real else read_clip(look.real, job.card, False)
    if clip.video.shape != real.video.shape:
        raise UserError(_unlike(clip.video.shape, real.video.shape))
    networks = _networks(job.probes, job.device, job.batch_size)
    without = {}
    for key, file in files.items():
        if key == FACTS:
            made = {"shape": torch.tensor([*clip.video.shape[1:], *clip.fps.as_integer_ratio()])}
            made["track"] = torch.tensor([int(word) for word in (clip.track or "0 of 0").split(" of ")])
        else:
            try:
                made = clip_features(job.card.metrics[key], clip, real, networks)
            except UserError as error:
                without[key] = f"{look.entry.clip.id}: {error}"
                continue
        save_tensors(job.cache / file, made)
    return without


def _file_name(job: Job, look: Look, key: str) -> str:
    facts = {
        "metric": key,
        "card": job.card.sha256,
        "clip": look.entry.identity,
        "real": look.real.identity,
        "version": __version__,
    }
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:40] + ".safetensors"


def _tracks(found: Mapping[str, Found]) -> list[str]:
    """Which sound track was taken of the clips that have several, a line for each choice."""
    names: dict[tuple[int, ...], list[str]] = {}
    for name, item in found.items():
        if item.track[1] > 1:
            names.setdefault(item.track, []).append(name)
    return [
        f"Sound: audio track {track[0]} of {track[1]}, the default one, was taken of {listed(clips, NAMED)}."
        for track, clips in sorted(names.items())
    ]


def _unlike(ours: Sequence[int], theirs: Sequence[int]) -> str:
    a, b = ours[1:], theirs[1:]
    return f"{a[0]} frames of {a[2]} x {a[1]}, its real clip {b[0]} of {b[2]} x {b[1]}; the protocol wants them alike"


def _check_shapes(clips: Sequence[str], ours: Sequence[Found], theirs: Sequence[Found]) -> None:
    """Frames, size and rate: equal in a pair, and in all clips."""
    problems = {}
    for clip, a, b in zip(clips, ours, theirs, strict=True):
        if a.shape != b.shape:
            problems[clip] = f"generated {_shape(a.shape)}, real {_shape(b.shape)}"
    _raise(problems, len(clips), "differ from their real clips")
    first = theirs[0].shape
    others = {clip: _shape(b.shape) for clip, b in zip(clips, theirs, strict=True) if b.shape != first}
    _raise(others, len(clips), f"differ from {clips[0]} ({_shape(first)})")


def _shape(shape: Sequence[int]) -> str:
    frames, height, width, top, bottom = shape
    return f"{frames} frames of {width} x {height} at {top / bottom:.5g} fps"


def _without(job: Job, found: Iterable[Found]) -> dict[str, str]:
    """Metric -> why its features are missing for some clip."""
    reasons: dict[str, list[str]] = {}
    for item in found:
        for key, reason in item.without.items():
            reasons.setdefault(key, []).append(reason)
    refused = {}
    for key in job.metrics:
        if given := list(dict.fromkeys(reasons.get(key, []))):
            more = f" (and {len(given) - 1} more)" if len(given) > 1 else ""
            refused[key] = f"{key} refused: {given[0]}{more}"
    return refused


def _raise(problems: Mapping[str, str], total: int, what: str) -> None:
    """UserError in one line that names the clips and what is wrong with each."""
    if problems:
        named = [f"{name}: {why}" for name, why in sorted(problems.items())[:NAMED]]
        more = [f"and {len(problems) - NAMED} more"] if len(problems) > NAMED else []
        raise UserError(f"{len(problems)} of {total} clips {what}: " + "; ".join([*named, *more]))


def read_report(path: Path) -> dict[str, Any]:
    """An eval.json, or the one in a folder; UserError when it is missing or something else."""
    path = Path(path)
    path = path / "eval.json" if path.is_dir() else path
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["format"] != 2 or not {"name", "card", "n", "clips", "rows", "columns"} <= report.keys():
            raise ValueError("other keys")
    except FileNotFoundError as error:
        raise UserError(f"no scores: {path}; distill eval --out writes them") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"no scores of distill eval: {path} ({error}); score again") from error
    return report
