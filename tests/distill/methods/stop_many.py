"""The rule that ends a stage beside fixed numbers of steps, on many DMD runs to the Gaussian oracle.

    python -m tests.distill.methods.stop_many [--seeds 5]

Five settings at constant rates, each once to 256 steps a seed; the rule sees the Frechet distance of 32 clips from 512 real ones
over that of the start; rule and fixed steps are compared by that of 8,192 other clips from very many.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.methods import Batch
from distill.methods.dmd import DMD, Config
from distill.methods.rollout import draw_noise, rollout
from distill.training.config import OptimizerConfig, TrainConfig
from distill.training.lifecycle.selection import LEFT, Selection, StopConfig, validations
from distill.training.trainer import Trainer
from eval.frechet import Moments, frechet_distance, frechet_without_each
from eval.report.tables import grid
from teachers.conditions import Conditions
from tests.distill.methods.test_gaussian import MEAN, SPATIAL, AffineStudent, LearnedGaussian, frames, given, oracle
from tests.support.methods.gaussian import GaussianTeacher, autoregressive
from tests.support.tiny import Ranks, randn, rng

FIXED, EVERY, CLIPS, MANY = (16, 32, 64, 128, 256), 16, 32, 8192
GUIDED = autoregressive(1.6 * MEAN, 0.6 * SPATIAL, 0.7)
"""What much guidance makes of the oracle: further from the middle, and narrower."""
RULES = {
    "default": (0.0, StopConfig()),
    "kept within 1 error": (1.0, StopConfig()),
    "sure 1": (0.0, StopConfig(sure=1.0)),
    "patience 1": (0.0, StopConfig(patience=1)),
    "growth 1": (0.0, StopConfig(growth=1.0)),
}
"""`train.sure` and `train.stop`."""
SETTINGS: dict[str, dict[str, Any]] = {
    "base": {},
    "double": {"rate": 0.04},
    "guided": {"teacher": GUIDED},
    "far": {"rate": 0.16, "teacher": GUIDED, "updates": 1},
    "degraded": {"noise": 1.0},
}


def clips_of(student: AffineStudent, conditions: Conditions, seed: int) -> Tensor:
    """Rollouts, the generated frames flat [B, C (F - 1)]."""
    return frames(rollout(student, conditions, draw_noise(student, len(conditions.text), rng(seed)))).double()  # type: ignore[arg-type]


@torch.no_grad()
def values_of(student: AffineStudent, conditions: Conditions, real: Moments, start: tuple[float, Tensor] | None = None):
    """(Score, scores without each clip) of the student's clips, over those of the start."""
    value, left = frechet_without_each(clips_of(student, conditions, 5), real)
    return (value, left) if start is None else (value / start[0], left / start[1])


def run(seed: int, rate: float = 0.02, teacher: GaussianTeacher | None = None, updates: int = 3, noise: float = 0.0):
    """Step -> (what the rule sees, the test score) of one run."""
    student, fake = AffineStudent((1.0,)), LearnedGaussian()
    method = DMD(Config(fake_updates=updates, warmup=20), student, teacher or oracle(), fake)  # type: ignore[arg-type]
    optimizer = OptimizerConfig(lr=rate, betas=(0.5, 0.95), final=1.0)
    config = TrainConfig(
        num_steps=FIXED[-1],
        batch_size=32,
        ema_decay=0.9,
        checkpoint_every=0,
        optimizers={"student": optimizer, "fake_score": optimizer},
    )
    with tempfile.TemporaryDirectory() as folder:
        engine: Any = Ranks()
        trainer = Trainer(engine, config, {"student": student, "fake_score": fake}, "student", Path(folder))
    held, other = given(CLIPS, 900), given(MANY, 901)
    real = Moments.of(frames(oracle().sample(given(512, 902), rng(903))))
    truth = Moments.of(frames(oracle().sample(given(60_000, 904), rng(905))))
    start = values_of(student, held, real)

    def batches(position: int) -> Batch:
        clean = given(32, 1000 * seed + position)
        assert clean.reference is not None
        dirty = clean.reference + noise * randn(*clean.reference.shape, seed=7 + position)
        return Batch(Conditions(text=clean.text, audio=clean.audio, reference=dirty))

    found = {}
    with torch.no_grad():
        first = frechet_distance(clips_of(student, other, 6), truth)
    for step in range(1, FIXED[-1] + 1):
        trainer.advance(method, batches, seed, {"student": 1, "fake_score": 1}, lambda: False)
        if step % EVERY == 0:
            with trainer.showing_average(), torch.no_grad():
                value, left = values_of(student, held, real, start)
                test = frechet_distance(clips_of(student, other, 6), truth) / first
            found[step] = ({"score": value, LEFT: left.tolist()}, test)
    return found


def ended(found, sure: float, rule: StopConfig) -> tuple[int, int]:
    """The step that the rule keeps, and the one at which it ends."""
    selection, step = Selection(), 0
    for step in validations(EVERY, FIXED[-1], rule):
        selection.take(found[step][0], step, sure, rule)
        if selection.is_over(rule):
            break
    assert selection.best is not None
    return selection.best["step"], step


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args(words)
    runs = {name: [run(seed, **setting) for seed in range(args.seeds)] for name, setting in SETTINGS.items()}
    lines = []
    for name, found in runs.items():
        lines.append([name, *(f"{statistics.mean(one[step][1] for one in found):.3f}" for step in FIXED)])
        for sure, rule in RULES.values():
            picked = [(one, *ended(one, sure, rule)) for one in found]
            over = [one[kept][1] - min(one[step][1] for step in FIXED) for one, kept, _ in picked]
            kept, end = (statistics.mean(row[i] for row in picked) for i in (1, 2))
            lines[-1].append(f"{statistics.mean(over):.3f}, {max(over):.3f} ({kept:.0f}, {end:.0f})")
    print("\n".join(grid(["setting", *map(str, FIXED), *RULES], lines)))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main())
