"""`distill plan`: what a recipe needs on every GPU, on disk and in network forwards, before any weight is read."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teachers.config import nearest
from teachers.errors import UserError

if TYPE_CHECKING:
    from distill.planning.estimate import Plan

WORDS = {"ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `distill plan`."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a shipped recipe's name or a .yaml file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. engine.precision=bf16")
    parser.add_argument("--gpus", default="1,4,8,64", metavar="N,N,...", help="a table for each (default 1,4,8,64)")
    parser.add_argument("--gib-per-gpu", type=float, default=80.0, metavar="GIB", help="what has to fit (default 80)")
    parser.add_argument(
        "--engines", default=",".join(WORDS), metavar="NAME,...", help=f"columns (default {','.join(WORDS)})"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the numbers, in bytes")


def run(args: argparse.Namespace) -> int:
    """Print the plan and return 0, also when it does not fit. Raises UserError in one line; the file is whole or absent."""
    counts, engines = _gpu_counts(args.gpus), _engines(args.engines)
    if not 0 < args.gib_per_gpu < float("inf"):
        raise UserError(f"--gib-per-gpu must be above 0: got {args.gib_per_gpu}; 80 is an H100's")
    if args.json is not None and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise UserError(f"--json cannot be written: {args.json}; name a file in a folder that exists")
    from distill.planning.estimate import job_of, make_plan
    from distill.recipe import load_recipe
    from teachers.files import atomic_write

    recipe = load_recipe(args.recipe, args.overrides)
    plan = make_plan(job_of(recipe))
    if args.json is not None:
        atomic_write(
            args.json, json.dumps(as_json(plan, recipe.name, counts, engines, args.gib_per_gpu), indent=1) + "\n"
        )
    sys.stdout.write(as_text(plan, recipe.name, counts, engines, args.gib_per_gpu))
    return 0


def as_text(plan: "Plan", name: str, counts: list[int], engines: list[str], gib: float) -> str:
    """The whole report: the recipe's own needs, then a table of GiB a rank for each GPU count."""
    lines = [f"{name}, {plan.precision}", *_facts(plan)]
    for count in counts:
        lines += ["", *_table(plan, count, engines, gib)]
    return "\n".join(lines) + "\n"


def as_json(plan: "Plan", name: str, counts: list[int], engines: list[str], gib: float) -> dict[str, Any]:
    """The report's numbers: bytes, parameters, forwards. ranks[count][engine][update] without and with checkpointing."""
    from distill.planning.estimate import is_possible, rank_bytes, suggest_fix

    def parts(engine: str, count: int) -> dict[str, Any]:
        return {
            update.name: {
                word: {part: round(size) for part, size in rank_bytes(plan, update, engine, count, on).items()}
                for word, on in (("plain", ()), ("checkpointing", ("checkpointing",)))
            }
            for update in plan.updates
        }

    def fits(engine: str, count: int) -> list[str] | None:
        found = suggest_fix(plan, engine, count, gib * 2**30)
        return None if found is None else list(found)

    return {
        "recipe": name,
        "precision": plan.precision,
        "gib_per_gpu": gib,
        "parameters": dict(plan.parameters),
        "lora_parameters": dict(plan.lora),
        "context_bytes": dict(plan.context),
        "trajectory_bytes": plan.trajectories,
        "forwards_per_trajectory": plan.trajectory_forwards,
        "forwards_per_step": {stage: dict(roles) for stage, roles in plan.forwards.items()},
        "ranks": {str(count): {e: parts(e, count) for e in engines if is_possible(plan, e)} for count in counts},
        "fits_with": {str(count): {engine: fits(engine, count) for engine in engines} for count in counts},
    }


def _gpu_counts(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and 0 < int(word) <= 100_000 for word in words):
        raise UserError(f"--gpus takes counts from 1 on, such as 1,8: got '{text}'; mend it")
    return sorted({int(word) for word in words})


def _engines(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in WORDS:
            raise UserError(f"unknown engine '{word}': --engines; {nearest(word, WORDS)}")
    return list(dict.fromkeys(words))


def _facts(plan: "Plan") -> Iterator[str]:
    frozen = set(plan.parameters) - {role for update in plan.updates for role in update.trained}
    for role, count in plan.parameters.items():
        adapted = role not in frozen and (role in plan.adapted or plan.lora[role] < count)
        adapters = f", {'' if role in plan.adapted else 'as '}a LoRA of {plan.lora[role]:,}" if adapted else ""
        yield f"{role:<12} {count:,} parameters{adapters}"
    if plan.adapted & plan.backbone:
        shared = plan.backbone & (plan.adapted | frozen)
        yield f"backbone     one set of weights for {', '.join(role for role in plan.parameters if role in shared)}"
    for solver in (update.role for update in plan.updates if update.stage == "trajectories"):
        each = f"forwards for one: {solver} {plan.trajectory_forwards}"
        yield f"trajectories {_gib(plan.trajectories)} GiB on disk; {each}"
    for stage, roles in plan.forwards.items():
        unit = {"student": " (chunks)"} if stage == "distill" else {}
        counts = ", ".join(f"{role} {count:g}{unit.get(role, '')}" for role, count in roles.items())
        yield f"{stage:<12} forwards a step: {counts}"


def _table(plan: "Plan", count: int, engines: list[str], gib: float) -> Iterator[str]:
    """Rows of parts, columns of engines; a part that differs between updates is shown at its largest."""
    from distill.planning.estimate import is_possible, rank_bytes

    def row(label: str, cells: list[str]) -> str:
        return f"{label:<36}" + "".join(f"{cell:>10}" for cell in cells)

    asked, engines = engines, [engine for engine in engines if is_possible(plan, engine)]
    yield row(f"{count} GPU{'s' if count > 1 else ''}, GiB a rank", [WORDS[engine] for engine in engines])
    try:
        micro_steps = {update.stage: update.micro_steps(count) for update in plan.updates}
    except UserError as error:
        yield str(error)
        return
    many = [f"{stage} {number}" for stage, number in micro_steps.items() if number > 1]
    if many:
        yield f"micro-steps an update: {', '.join(many)}"
    plain = {(e, u.name): rank_bytes(plan, u, e, count) for e in engines for u in plan.updates}
    saved = {(e, u.name): rank_bytes(plan, u, e, count, ("checkpointing",)) for e in engines for u in plan.updates}
    found = {part for parts in plain.values() for part in parts}
    order = [f"{role} {part}" for role in plan.parameters for part in ("weights", "masters", "average", "moments")]
    order = ["backbone weights", *order, "idle gradients", "bf16 copies", "gathered"]
    for part in (part for part in order if part in found):
        sizes = [max(plain[e, u.name].get(part, 0.0) for u in plan.updates) for e in engines]
        yield row(part, [_gib(size) if size else "-" for size in sizes])
    for update in plan.updates:
        if update.trained:
            yield row(f"{update.name} gradients", [_gib(plain[e, update.name]["gradients"]) for e in engines])
        yield row(f"{update.name} activations", [_gib(update.activations())] * len(engines))
        if update.trained:
            yield row("    checkpointed", [_gib(update.activations("checkpointing"))] * len(engines))
        if update.stage in plan.context:
            yield row("    of them context at the end", [_gib(plan.context[update.stage])] * len(engines))
        yield row(f"{update.name} peak", [_gib(plain[e, update.name]["peak"]) for e in engines])
        if update.trained:
            yield row("    checkpointed", [_gib(saved[e, update.name]["peak"]) for e in engines])
    for engine in asked:
        yield f"{WORDS[engine]:<7} {_verdict(plan, engine, count, gib)}"


def _verdict(plan: "Plan", engine: str, count: int, gib: float) -> str:
    """Whether everything fits, or else what does not and the first switches that mend it."""
    from distill.planning.estimate import is_possible, rank_bytes, suggest_fix

    if not is_possible(plan, engine):
        return "shards weights, which LoRA roles share: use ddp, zero1 or zero2"
    found = suggest_fix(plan, engine, count, gib * 2**30)
    if found == ():
        return f"fits into {gib:g} GiB"
    peaks = {update.name: rank_bytes(plan, update, engine, count)["peak"] / 2**30 for update in plan.updates}
    over = ", ".join(f"{name} {size:.1f}" for name, size in peaks.items() if size > gib)
    mend = "take more GPUs, smaller batches or networks" if found is None else f"fits with {' + '.join(found)}"
    return f"does not fit into {gib:g} GiB: {over}; {mend}"


def _gib(size: float) -> str:
    value = size / 2**30
    return f"{value:.1f}" if value >= 9.95 else f"{value:.2f}" if value >= 0.0095 else f"{value:.4f}"
