"""The rule that ends a distillation (`distill.training.lifecycle.selection`) beside fixed numbers of steps, on the jobs of a sweep.

    python benchmarks/lab/stop_lab.py SWEEP [--jobs NAME ...] [--recipe lab_avatar] [--out runs/lab_stop] [--table]

Each job is trained once to the sweep's num_steps, with the rule off: at constant rates a run of N steps is its beginning. After
1/16 to all of these steps, and where the rule would validate, its averaged weights get the validation's numbers, by which the
rule decides, and a score on other conditions and noises (TEST_SEED), by which rule and fixed numbers of steps are compared. CPU
seconds of training and of validations are counted apart. What is recorded is not made again; --table only reads it.

The table, a row a job: the score (lower is better) after each fixed number of steps, with its jackknife error; what the rule kept,
and where it ended; its score over the best fixed one's; CPU seconds of the rule, validations included, beside those of the fixed
runs, which are validated once.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distill.commands.sweep.command import read_sweep
from distill.compose import find_recipe, quoted
from distill.health import Limits
from distill.pipeline.evaluation.health import logged, violations
from distill.pipeline.evaluation.validation import Validation, score_of, score_without_each
from distill.pipeline.stages import Pipeline
from distill.pipeline.train_stages import run_training
from distill.recipe import load_recipe
from distill.training.engines.engine import Engine
from distill.training.lifecycle.selection import LEFT, Selection, StopConfig, validations
from eval.frechet import difference_with_error, jackknife_error
from eval.report.tables import grid
from teachers.config import convert, to_plain
from teachers.files import atomic_write, read_json_or_none

FIXED = (16, 8, 4, 2, 1)
"""What a sweep's num_steps are divided by."""
TEST_SEED, TEST_CONDITIONS = 777, 32  # twice as many clips
LAST = "distill"


def fixed_steps(total: int) -> tuple[int, ...]:
    """The fixed numbers of steps that a rule is compared with."""
    return tuple(total // part for part in FIXED)


def record(pipeline: Pipeline, file: Path, sets: Path) -> None:
    """Train a job and write, step by step, what validation and test say of its averaged weights. `sets`: where the clips that all
    jobs are compared with lie."""
    artifacts = pipeline.artifacts
    recipe, engine = artifacts.recipe, artifacts.engine
    config, needs, stop = recipe.distill, recipe.needs(LAST), recipe.distill.train.stop
    folder = file.parent / "stages" / "record"
    folder.mkdir(parents=True, exist_ok=True)
    artifacts.release(needs.frozen)
    roles: dict[str, Any] = {"student": artifacts.trainee("init"), "fake_score": artifacts.fake_score()}
    check = Validation(artifacts, roles["student"], sets / "validate")
    unseen = replace(recipe, eval=replace(recipe.eval, condition_seed=TEST_SEED, num_conditions=TEST_CONDITIONS))
    artifacts.recipe = unseen
    test = Validation(artifacts, roles["student"], sets / "test")
    artifacts.recipe = recipe
    total = config.train.num_steps
    due = set(validations(config.train.validate_every, total, stop))
    found: dict = read_json_or_none(file) or {"teacher": check.teacher, "limits": to_plain(recipe.health), "steps": {}}
    found |= {
        "stop": to_plain(stop),
        "num_steps": total,
        "every": config.train.validate_every,
        "sure": config.train.sure,
    }
    clock = [time.process_time()]

    def validate() -> dict[str, Any]:
        began, step = time.process_time(), artifacts.log.rows(LAST)[-1]["step"]
        row: dict[str, Any] = {"train_seconds": began - clock[0]}
        if step in due:
            row["values"] = check()
            row["validate_seconds"] = time.process_time() - began
        found["steps"][str(step)] = row
        if step in fixed_steps(total) or (step in due and (replay(found)[0].best or {}).get("step") == step):
            artifacts.recipe = unseen
            seen, start = test.measure(), test.start
            artifacts.recipe = recipe
            parts, first = ({name: score.mean for name, score in of.items()} for of in (seen, start))
            left = score_without_each(seen, start)
            assert left is not None
            row["test"] = {**parts, "score": score_of(parts, first), LEFT: left.tolist()}
        atomic_write(file, json.dumps(found) + "\n")
        print(file.parent.name, step, {k: round(v, 3) for k, v in row.get("test", {}).items() if k != LEFT}, flush=True)
        clock[0] = time.process_time()
        return {"score": 0.0}

    train = replace(config.train, stop=None)
    data = artifacts.student_train_set
    grid_of = (*artifacts.spec.sigmas, 0.0)
    stage = replace(config, train=train)
    run_training(artifacts, LAST, stage, folder, roles, needs.frozen, data.batch, len(data), grid_of, validate)
    assert engine.is_main


def train(recipe: Path, words: Sequence[str], folder: Path, others: Sequence[Path]) -> None:
    """The stages before the last one, those to be had from others taken over; and the record of the last one."""
    reuse = ",".join(quoted(str(other)) for other in others if other != folder)
    found = load_recipe(recipe, [*words, f"run_dir={quoted(str(folder))}", f"reuse=[{reuse}]"])
    pipeline = Pipeline(found, Engine(found.engine, found.threads))
    try:
        names = list(pipeline.stages)
        for name in names[: names.index(LAST)]:
            pipeline.stage(name)
        record(pipeline, folder / "record.json", folder.parent / "sets")
    finally:
        pipeline.close()


def replay(found: Mapping[str, Any], stop: StopConfig | None = None) -> tuple[Selection, int]:
    """The rule on what was recorded: what it kept, and the step at which it ended."""
    rule = stop or convert(StopConfig, found["stop"])
    limits = convert(Limits, found["limits"]["collapse"])
    selection, step = Selection(), 0
    for step in validations(found["every"], found["num_steps"], rule):
        if str(step) not in found["steps"]:
            break
        values = found["steps"][str(step)]["values"]
        if selection.best is not None and (reasons := violations(logged(values), found["teacher"], limits)):
            selection.ended = f"collapsed: {'; '.join(reasons)}"
            break
        selection.take(values, step, found["sure"], rule)
        if selection.is_over(rule):
            break
    return selection, step


def compared(found: Mapping[str, Any]) -> dict[str, Any]:
    """The rule beside the fixed steps, on the test conditions."""
    rows = found["steps"]
    fixed = fixed_steps(found["num_steps"])
    tests = {step: rows[str(step)]["test"] for step in fixed}
    selection, end = replay(found)
    assert selection.best is not None
    kept = selection.best["step"]
    best = min(fixed, key=lambda step: tests[step]["score"])
    ours, theirs = rows[str(kept)]["test"], tests[best]
    pair = [(one["score"], torch.tensor(one[LEFT], dtype=torch.float64)) for one in (ours, theirs)]
    seconds = [rows[step]["train_seconds"] for step in sorted(rows, key=int)]
    each = sum(seconds) / (len(seconds) * found["every"])
    check = [row["validate_seconds"] for row in rows.values() if "validate_seconds" in row]
    cost = sum(check) / len(check)
    times = sum(
        1 for step in validations(found["every"], found["num_steps"], convert(StopConfig, found["stop"])) if step <= end
    )
    return {
        "fixed": {step: (one["score"], jackknife_error(torch.tensor(one[LEFT]))) for step, one in tests.items()},
        "kept": kept,
        "end": end,
        "why": selection.ended,
        "score": ours["score"],
        "best": best,
        "over": ours["score"] / theirs["score"],
        "error": difference_with_error(*pair)[1] / theirs["score"],
        "seconds": end * each + times * cost,
        "fixed_seconds": {step: step * each + cost for step in fixed},
        "validation": cost,
        "step": each,
    }


def is_whole(found: Mapping[str, Any]) -> bool:
    """Whether a job is recorded to its last step."""
    return str(found.get("num_steps")) in found.get("steps", {})


def table(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A row a job."""
    lines = []
    for job, record in found.items():
        row = compared(record)
        fixed = [f"{score:.3f} ± {error:.3f}" for score, error in row["fixed"].values()]
        rule = f"{row['score']:.3f} (step {row['kept']}, ended at {row['end']})"
        over = f"{row['over']:.3f} ± {row['error']:.3f} of {row['best']}"
        seconds = " ".join(f"{value:.0f}" for value in row["fixed_seconds"].values())
        lines.append([job, *fixed, rule, over, f"{row['seconds']:.0f}", seconds])
    steps = fixed_steps(next(iter(found.values()))["num_steps"])
    return grid(["job", *map(str, steps), "rule", "over the best fixed", "CPU s", "CPU s of fixed"], lines)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep")
    parser.add_argument("--recipe", default="lab_avatar")
    parser.add_argument("--jobs", nargs="+", help="these jobs only")
    parser.add_argument("--out", type=Path, default=Path("runs/lab_stop"))
    parser.add_argument("--table", action="store_true", help="of what is recorded already")
    args = parser.parse_args(words)
    recipe = find_recipe(Path(args.recipe))
    common, jobs = read_sweep(recipe, args.sweep, args.jobs)
    found: dict[str, dict[str, Any]] = {}
    for name, own in jobs.items():
        folder = args.out / f"{args.sweep}-{name}"
        done = read_json_or_none(folder / "record.json") or {}
        if not is_whole(done) and not args.table:
            others = sorted(path.parent for path in args.out.glob("*/stages") if path.is_dir())
            train(recipe, [*common, *own], folder, others)
            done = read_json_or_none(folder / "record.json") or done
        if is_whole(done):
            found[name] = done
    print("\n".join(table(found)) if found else "nothing is recorded")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main())
