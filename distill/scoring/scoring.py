"""Scores of a set of clips against the real ones: features kept for each clip, shared out over processes, joined in order.

A feature's file is named by what it was made of (bytes of the clip, card, extractor, metric), so a killed run goes on, and a
real clip is read once for any number of students. Every process works with one thread: their number changes no digit.
"""

import hashlib
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from distill import __version__
from distill.data.prepare.workers import shared_out
from distill.pipeline.run_folder import versions
from distill.scoring.clip_sets import Entry, open_set, read_clip
from distill.scoring.generate import GenerateJob, generate_clip
from eval import golden
from eval.cards import Card
from eval.clip_scores import (
    PAIRED,
    Extractors,
    Scores,
    clip_features,
    floor_scores,
    group_of,
    refusals,
    set_scores,
)
from teachers.errors import UserError
from teachers.files import canonical_json, load_tensors, make_folder, save_tensors

ON_THE_PAIR = ("sync", "identity", "probes", "pairs", "lpips")  # features for which the real clip matters too
TOLD = 5  # clips that are named in an error


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every process has to know. `probes`: folder of the embedded extractors; `cache`: where features lie."""

    card: Card
    metrics: tuple[str, ...]
    cache: Path
    probes: Path | None = None
    device: str = "cpu"
    batch_size: int = 32
    processes: int = 0

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(group_of(metric, self.card) for metric in self.metrics))


@dataclass(frozen=True)
class Task:
    """One clip to look at; for the ground truth both entries are the same."""

    entry: Entry
    real: Entry
    generated: bool


@dataclass(frozen=True)
class Found:
    """Where the features of a clip lie, and its shape; or why there are none, for the clip as a whole or for one group."""

    files: dict[str, str]
    shape: tuple[int, ...]
    problem: str | None
    without: dict[str, str]


def generate_all(job: GenerateJob, real: Mapping[str, Entry], card: Card, processes: int) -> dict[str, Entry]:
    """The student's clips for every real one, drawn where they are not there yet. Raises UserError naming clips that failed."""
    make_folder(job.folder)
    problems: dict[str, str] = {}
    work = partial(_draw, job, card)
    with tqdm(total=len(real), unit="clip", desc="draw", file=sys.stderr) as bar, _one_thread():
        for entry, problem in shared_out(work, real.values(), processes):
            if problem is None or problem:
                problems[entry.clip.id] = problem or "its process was killed, most likely for want of memory"
            bar.update()
    _raise(problems, len(real), "cannot be drawn")
    return {name: entry for name, entry in open_set(job.folder).items() if name in real}


def _draw(job: GenerateJob, card: Card, entry: Entry) -> str:
    """An empty text, or what is wrong with the clip."""
    try:
        generate_clip(job, entry, card)
    except UserError as error:
        return str(error)
    return ""


def match(generated: Mapping[str, Entry], real: Mapping[str, Entry], card: Card) -> list[str]:
    """The names of the clips, alphabetically. Raises UserError unless both sets have the same names, and the card's number."""
    missing, extra = sorted(real.keys() - generated.keys()), sorted(generated.keys() - real.keys())
    if missing or extra:
        words = [f"{len(generated)} generated and {len(real)} real clips"]
        words += [f"no generated clip for {_some(missing)}"] if missing else []
        words += [f"no real clip for {_some(extra)}"] if extra else []
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
    refused = refusals(job.card, job.metrics)
    metrics = tuple(metric for metric in job.metrics if metric not in refused)
    if not metrics:
        raise UserError("nothing can be scored: " + " | ".join(refused.values()))
    job = Job(**{**vars(job), "metrics": metrics})
    tasks = [Task(real[clip], real[clip], False) for clip in clips]
    tasks += [Task(generated[clip], real[clip], True) for clip in clips]
    found = _features(job, tasks)
    theirs, ours = found[: len(clips)], found[len(clips) :]
    _check_shapes(clips, ours, theirs)
    refused |= _without(job, [*theirs, *ours])
    table: dict[str, Any] = {"ground_truth": _row(len(clips)), "floor": _row(len(clips) // 2), name: _row(len(clips))}
    kept: dict[str, list[dict[str, Tensor]]] = {}
    with tqdm(metrics, desc="score", file=sys.stderr) as bar:
        for metric in bar:
            bar.set_postfix_str(metric)
            if metric in refused:
                continue
            group = group_of(metric, job.card)
            for role, which in (("real", theirs), ("generated", ours)):
                if f"{role} {group}" not in kept:
                    kept[f"{role} {group}"] = [load_tensors(job.cache / item.files[group]) for item in which]
            try:
                _score_metric(metric, kept[f"generated {group}"], kept[f"real {group}"], job.card, table, name)
            except UserError as error:
                refused[metric] = f"{metric} refused: {error}"
    if not table[name]["metrics"]:
        raise UserError("nothing can be scored: " + " | ".join(refused.values()))
    files = {
        group: {"generated": [item.files[group] for item in ours], "real": [item.files[group] for item in theirs]}
        for group in job.groups
        if all(group in item.files for item in found)
    }
    return {
        "format": 1,
        "name": name,
        "card": job.card.plain(),
        "n": len(clips),
        "clips": clips,
        "shape": list(ours[0].shape),
        "rows": table,
        "refused": refused,
        "features": files,
        "golden": golden.refine_context(),
        "versions": versions(),
    }


def _row(num: int) -> dict[str, Any]:
    return {"n": num, "metrics": {}, "clips": {}}


def _score_metric(metric: str, ours: list, theirs: list, card: Card, table: dict[str, Any], name: str) -> None:
    _put(table[name], set_scores(metric, ours, theirs, card))
    if metric not in PAIRED:
        _put(table["ground_truth"], set_scores(metric, theirs, None, card))
    floor = floor_scores(metric, theirs, card)
    if floor is not None:
        table["floor"]["metrics"][metric] = {"mean": floor[0][0], "error": floor[0][1]}
        table["floor"]["n"] = floor[1]


def _put(row: dict[str, Any], scores: Scores) -> None:
    row["metrics"] |= {name: {"mean": _finite(m), "error": _finite(e)} for name, (m, e) in scores.metrics.items()}
    row["clips"] |= {name: [_finite(value) for value in values] for name, values in scores.clips.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _features(job: Job, tasks: Sequence[Task]) -> list[Found]:
    """In the order of `tasks`. Raises UserError that names the clips which cannot be read."""
    make_folder(job.cache)
    found: dict[int, Found] = {}
    problems: dict[str, str] = {}
    work = partial(_look, job)
    with tqdm(total=len(tasks), unit="clip", desc=", ".join(job.groups), file=sys.stderr) as bar, _one_thread():
        for (index, task), result in shared_out(work, enumerate(tasks), job.processes):
            problem = "its process was killed, most likely for want of memory" if result is None else result.problem
            if problem is not None:
                side = "generated" if task.generated else "real"
                problems[f"{side} {task.entry.clip.id}"] = problem
            elif result is not None:
                found[index] = result
            bar.update()
            bar.set_postfix(failed=len(problems))
    _raise(problems, len(tasks), "cannot be scored")
    return [found[index] for index in range(len(tasks))]


@lru_cache(maxsize=1)
def _extractors(probes: Path | None, device: str, batch_size: int) -> Extractors:
    return Extractors(probes, device, batch_size)


def _look(job: Job, numbered: tuple[int, Task]) -> Found:
    """Make the features of one clip that are not there yet; its shape is kept beside them."""
    task = numbered[1]
    try:
        files = {group: _mark(job, task, group) for group in ("shape", *job.groups)}
        missing = [group for group, file in files.items() if not (job.cache / file).is_file()]
        without = _make(job, task, {group: files[group] for group in missing}) if missing else {}
        shape = tuple(load_tensors(job.cache / files["shape"])["shape"].tolist())
    except UserError as error:
        return Found({}, (), str(error), {})
    return Found({group: file for group, file in files.items() if group not in without}, shape, None, without)


def _make(job: Job, task: Task, files: Mapping[str, str]) -> dict[str, str]:
    """Write features, group -> file; returns group -> why this clip has none. UserError for the clip as a whole."""
    take = read_clip(task.entry, job.card, task.generated)
    real = take if task.entry is task.real else read_clip(task.real, job.card, False)
    if set(files) & set(ON_THE_PAIR) and take.video.shape != real.video.shape:
        raise UserError(_unlike(take.video.shape, real.video.shape))
    extractors = _extractors(job.probes, job.device, job.batch_size)
    without = {}
    for group, file in files.items():
        if group == "shape":
            made = {"shape": torch.tensor([*take.video.shape[1:], *take.fps.as_integer_ratio()])}
        elif group == "sync" and not task.real.has_box:
            without[group] = f"no face box for {task.real.clip.id}: give faces.json beside the real clips"
            continue
        else:
            try:
                made = clip_features(group, take, real, job.card, extractors)
            except UserError as error:
                without[group] = f"{task.entry.clip.id}: {error}"
                continue
        save_tensors(job.cache / file, made)
    return without


def _mark(job: Job, task: Task, group: str) -> str:
    paired = group in ON_THE_PAIR
    facts = {
        "group": group,
        "card": job.card.sha256,
        "clip": task.entry.identity,
        "real": task.real.identity if paired else "",
        "version": __version__,
    }
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:40] + ".safetensors"


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
        for group, reason in item.without.items():
            reasons.setdefault(group, []).append(reason)
    told = {}
    for metric in job.metrics:
        if said := list(dict.fromkeys(reasons.get(group_of(metric, job.card), []))):
            more = f" (and {len(said) - 1} more)" if len(said) > 1 else ""
            told[metric] = f"{metric} refused: {said[0]}{more}"
    return told


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:TOLD]) + (f" and {len(names) - TOLD} more" if len(names) > TOLD else "")


def _raise(problems: Mapping[str, str], total: int, what: str) -> None:
    """UserError in one line that names the clips and what is wrong with each."""
    if problems:
        told = [f"{name}: {why}" for name, why in sorted(problems.items())[:TOLD]]
        more = [f"and {len(problems) - TOLD} more"] if len(problems) > TOLD else []
        raise UserError(f"{len(problems)} of {total} clips {what}: " + "; ".join([*told, *more]))


@contextmanager
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def read_report(path: Path) -> dict[str, Any]:
    """An eval.json, or the one in a folder; UserError when it is missing or something else."""
    path = Path(path)
    path = path / "eval.json" if path.is_dir() else path
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["format"] != 1 or not {"name", "card", "n", "clips", "rows"} <= report.keys():
            raise ValueError("other keys")
    except FileNotFoundError as error:
        raise UserError(f"no scores: {path}; distill eval --out writes them") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"no scores of distill eval: {path} ({error}); score again") from error
    return report
