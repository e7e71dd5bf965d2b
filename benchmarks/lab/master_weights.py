"""What becomes of small learning rates where the master weights are bf16: steps that are lost.

    python benchmarks/lab/master_weights.py RUN [--rates 5e-4 5e-5 5e-6] [--steps 48] [--seeds 0 1 2]

The initialisation of a run (its method, batches and teacher) at a constant rate, twice from the same weights: with fp32 masters,
as the engine has them, and with masters that are rounded to bf16 after every update (AdamW's arithmetic and moments stay fp32,
which is kinder than bf16 throughout). A row a rate: the loss on pairs that were held out, over that before training; and the share
of weights that an update has changed. bf16 has 8 bits: an update below 2^-9 of a weight is rounded away, in every step anew.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from distill import methods
from distill.pipeline import trajectories
from distill.pipeline.artifacts import Artifacts
from distill.pipeline.stages import Pipeline
from distill.training.engines.engine import Engine
from distill.training.role import trained
from eval.report.tables import grid
from teachers.flow import keyed_generator

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from benchmarks.lab.long_streams import recipe_of  # noqa: E402, of a script started by its path

HELD_OUT = 16  # pairs


@torch.no_grad()
def round_to_bf16(params: Sequence[Tensor]) -> None:
    """What bf16 masters keep of fp32 weights, to the nearest."""
    for p in params:
        p.copy_(p.bfloat16())


@torch.no_grad()
def changed(params: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """Share of the weights that differ."""
    return sum(float((p != old).sum()) for p, old in zip(params, before, strict=True)) / sum(p.numel() for p in params)


class Case:
    """The initialisation of a finished run, to be trained again and again."""

    def __init__(self, run: Path):
        recipe = recipe_of(run)
        self.pipeline = Pipeline(recipe, Engine(recipe.engine, recipe.threads))
        self.artifacts: Artifacts = self.pipeline.artifacts
        folder = self.artifacts.folder.stage_dir("trajectories")
        self.pairs = trajectories.load(folder, self.artifacts.spec.sigmas, trajectories.made_by(self.artifacts))
        self.data, self.size = self.artifacts.student_train_set, len(self.pairs.rows) - HELD_OUT

    def start(self) -> tuple[nn.Module, methods.Method]:
        """A student with the weights that init starts from, and the method that trains it."""
        recipe = self.artifacts.recipe
        student = self.artifacts.trainee(recipe.start_of("init"))
        return student, methods.build(recipe.init.method, {"student": student}, self.pairs.sigmas)

    def loss(self, method: methods.Method, rows: Tensor, *keys: int | str) -> Tensor:
        """The method's loss on these pairs."""
        batch = self.pairs.batch(self.data, rows, "cpu")
        with self.artifacts.engine.autocast():
            return method.loss("student", batch, keyed_generator(0, *keys), keyed_generator(1, *keys)).value

    @torch.no_grad()
    def held_out(self, method: methods.Method) -> float:
        """Mean loss on the held-out pairs under fixed noise."""
        return float(self.loss(method, torch.arange(self.size, self.size + HELD_OUT), "held out"))

    def train(self, rate: float, narrow: bool, steps: int, seed: int) -> tuple[float, float]:
        """(Held-out loss over that of the start, mean share of weights that a step changes) after `steps` at `rate`."""
        student, method = self.start()
        params = list(trained(student).values())
        if narrow:
            round_to_bf16(params)
        config = self.artifacts.recipe.init.train.optimizers["student"]
        optimizer = torch.optim.AdamW(params, lr=rate, betas=config.betas, weight_decay=config.weight_decay)
        first, shares = self.held_out(method), []
        for step in range(steps):
            rng = keyed_generator(seed, "rows", step)
            rows = torch.randperm(self.size, generator=rng)[: self.artifacts.recipe.init.train.batch_size]
            self.loss(method, rows, seed, step).backward()
            nn.utils.clip_grad_norm_(params, config.clip)
            before = [p.detach().clone() for p in params]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if narrow:
                round_to_bf16(params)
            shares.append(changed(params, before))
        return self.held_out(method) / first, statistics.mean(shares)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 5e-5, 5e-6])
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(words)
    case, found = Case(args.run), []
    for rate in args.rates:
        for narrow in (False, True):
            runs = [case.train(rate, narrow, args.steps, seed) for seed in args.seeds]
            losses, shares = zip(*runs, strict=True)
            found.append({"rate": rate, "masters": "bf16" if narrow else "fp32", "loss": losses, "changed": shares})
            print(json.dumps(found[-1]), flush=True)
    cells = [
        [f"{row['rate']:g}", row["masters"], *(" ".join(f"{x:.4f}" for x in row[name]) for name in ("loss", "changed"))]
        for row in found
    ]
    print("\n".join(grid(["rate", "masters", "held-out loss, over the start's", "weights changed by a step"], cells)))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    case.pipeline.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
