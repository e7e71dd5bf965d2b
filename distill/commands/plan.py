"""`distill plan`: what a recipe needs of GPUs, host, disk and time, stage by stage, before any weight is read."""

import argparse
import json
import sys
from pathlib import Path

from teachers.config import nearest
from teachers.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `distill plan`."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a shipped recipe's name or a .yaml file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. engine.precision=bf16")
    parser.add_argument("--gpus", default="1,4,8,64", metavar="N,N,...", help="a table for each (default 1,4,8,64)")
    parser.add_argument("--gib-per-gpu", type=float, default=80.0, metavar="GIB", help="what has to fit (default 80)")
    parser.add_argument(
        "--engines", metavar="NAME,...", help="tables of an update's parts under these, of ddp,zero1,zero2,zero3,fsdp2"
    )
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="share of the GPU's FLOP/s that is reached (default 0.4)"
    )
    parser.add_argument(
        "--tflops", type=float, default=989.0, help="the GPU's dense bf16 TFLOP/s (default 989, an H100)"
    )
    parser.add_argument("--dollars-per-gpu-hour", type=float, metavar="PRICE", help="adds what every stage costs")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the numbers; sizes in bytes")


def run(args: argparse.Namespace) -> int:
    """Print the plan and return 0, also when it does not fit. Raises UserError in one line; the file is whole or absent."""
    counts, engines = _gpu_counts(args.gpus), [] if args.engines is None else _engines(args.engines)
    for name in ("mfu", "tflops", "dollars_per_gpu_hour"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} must be above 0: got {value}; fix it")
    if args.mfu > 1:
        raise UserError(f"--mfu is a share of the GPU's speed, at most 1: got {args.mfu}; 0.4 is usual")
    if not 0 < args.gib_per_gpu < float("inf"):
        raise UserError(f"--gib-per-gpu must be above 0: got {args.gib_per_gpu}; 80 is an H100's")
    if args.json is not None and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise UserError(f"--json cannot be written: {args.json}; name a file in a folder that exists")
    from distill.planning.batches import sharing
    from distill.planning.estimate import make_plan
    from distill.planning.job import job_of
    from distill.planning.outlook import Rates, outlook
    from distill.planning.report import Shipped, as_json, as_text, engine_of
    from distill.recipe import load_recipe
    from teachers.files import atomic_write

    recipe = load_recipe(args.recipe, args.overrides)
    job = job_of(recipe)
    plan = make_plan(job)
    rates = Rates(tflops=args.tflops, mfu=args.mfu, dollars=args.dollars_per_gpu_hour)
    shipped = Shipped(tuple(outlook(plan, job, recipe)), rates, *engine_of(recipe), sharing(job))
    given = (plan, recipe.name, counts, engines, args.gib_per_gpu, shipped)
    text = as_text(*given)
    if args.json is not None:
        atomic_write(args.json, json.dumps(as_json(*given), indent=1) + "\n")
    sys.stdout.write(text)
    return 0


def _gpu_counts(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and 0 < int(word) <= 100_000 for word in words):
        raise UserError(f"--gpus takes counts from 1 on, such as 1,8: got '{text}'; fix it")
    return sorted({int(word) for word in words})


def _engines(text: str) -> list[str]:
    from distill.planning.report import WORDS

    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in WORDS:
            raise UserError(f"unknown engine '{word}': --engines; {nearest(word, WORDS)}")
    return list(dict.fromkeys(words))
