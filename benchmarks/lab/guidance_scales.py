"""One student at several guidance scales: the scores of a report at each, on held-out conditions.

    python benchmarks/lab/guidance_scales.py RUN [--scales text=1,audio=1 text=4 ...] [--stage distill] [--noises 2]

RUN is the folder of a run whose student is conditioned on its guidance (`guided_avatar`, `flowact_full`), or, without --scales, of
any; scales that are not named are those that it is served with. `motion` and `motion_energy` show how far it follows the text.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from distill.commands.sample.options import scales
from distill.pipeline.stages import Pipeline
from distill.training.engines.engine import Engine
from eval.report.tables import grid

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from benchmarks.lab.few_steps import COLUMNS, Scoring  # noqa: E402, of a script started by its path
from benchmarks.lab.long_streams import recipe_of  # noqa: E402


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--scales", type=scales, nargs="+", default=[None], metavar="NAME=W,..")
    parser.add_argument("--stage", default="distill")
    parser.add_argument("--conditions", type=int, default=64)
    parser.add_argument("--noises", type=int, default=2)
    parser.add_argument("--condition-seed", type=int, default=555)
    args = parser.parse_args(words)
    recipe = recipe_of(args.run)
    counted = {"num_conditions": args.conditions, "num_seeds": args.noises, "condition_seed": args.condition_seed}
    counted |= {"num_reference": 160, "diversity_conditions": 6, "diversity_seeds": 6}
    recipe = replace(recipe, run_dir=str(args.run))
    pipeline, lines = Pipeline(recipe, Engine(recipe.engine, recipe.threads)), []
    try:
        artifacts, shown = pipeline.artifacts, [column for column in COLUMNS if column != "seconds"]
        artifacts.recipe = replace(recipe, eval=replace(recipe.eval, **counted))
        every = [artifacts.spec.scales(given) for given in args.scales]  # a mistake is reported before the work
        scoring = Scoring(artifacts, args.run / "scored" / f"{args.condition_seed}-{args.conditions}")
        for given in every:
            found = scoring(artifacts, args.stage, given)
            name = ", ".join(f"{key} {value:g}" for key, value in given.items()) if given else "none"
            lines.append([name, *(f"{found[column]:.3f}" if column in found else "" for column in shown)])
            print(" ".join(lines[-1]), flush=True)
        print("\n".join(grid(["scales", *shown], lines)))
    finally:
        pipeline.close()
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main())
