"""Two layers at real width: one update of each loss of a recipe, measured against its plan."""

import functools
import gc
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import Alive
from distill import methods
from distill.compose import RECIPES
from distill.methods import Batch
from distill.pipeline.generate import solve_states
from distill.planning.estimate import GIB, Plan, Update, make_plan, rank_bytes
from distill.planning.job import Job, batch_on, job_of, networks_on, shallow
from distill.planning.trace import CHECKPOINTING, clip_costs
from distill.recipe import Recipe, load_recipe
from distill.training.engines.engine import Engine
from distill.training.trainer import Trainer
from eval.speed import roofline
from eval.speed.latency import wait

LAYERS = 2
REAL = ("teacher.path=nowhere/teacher", *(f"{slot}.train.global_batch=null" for slot in ("init", "distill")))
SMALL = ("size=tiny", "run_dir=nowhere")
ONE_EXIT = "distill.method.exit_step=last"  # the largest, so that one update stands for all


class Peak:
    """Most bytes of tensors on the device since `restart`: of the allocator on cuda, else of a dispatch mode."""

    def __init__(self, device: torch.device):
        self.device, self.alive = device, Alive()
        self.before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        if self.device.type == "cuda":
            yield
        else:
            with self.alive:
                yield

    def restart(self) -> None:
        self.alive.peak = self.alive.now
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def read(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return self.alive.peak


def losses(name: str, device: torch.device, quick: bool) -> dict[str, Any]:
    """Planned and measured peak and TFLOP/s of every update of a recipe, and of one step of its solver; one micro-step an update,
    at the batch of the recipe."""
    recipe = load_recipe(RECIPES / f"{name}.yaml", [*(SMALL if quick else REAL), ONE_EXIT])
    job = shallow(job_of(recipe), LAYERS)
    plan = make_plan(job)
    found: dict[str, Any] = {}
    with closing(Engine(recipe.engine, recipe.threads if device.type == "cuda" else 1)) as engine:
        device = engine.device
        for stage in dict.fromkeys(update.stage for update in plan.updates):
            updates = [update for update in plan.updates if update.stage == stage]
            peak = Peak(device)
            with peak.counting():
                runs = _training(job, stage, engine) if updates[0].trained else _solving(job, updates[0], device)
                for update in updates:
                    runs[update.role]()  # the moments of every role are there
                for update in updates:
                    found[update.name] = _measure(runs[update.role], peak, planned(plan, job, update, recipe, engine))
                del runs
                gc.collect()  # or the next stage would start from what this one still holds
    dtype = torch.bfloat16 if recipe.engine.precision == "bf16" else torch.float32
    sizes, seconds = ((256,), 0.02) if quick else (None, 0.5)
    return {
        "layers": LAYERS,
        "engine": engine.kind,
        "precision": recipe.engine.precision,
        "matmul_tflops": roofline.matmul_ceiling(device, dtype, sizes, seconds) / 1e12,
        "updates": found,
    }


def planned(plan: Plan, job: Job, update: Update, recipe: Recipe, engine: Engine) -> dict[str, float]:
    """GiB at the peak on the one rank, and TFLOP."""
    switches = (CHECKPOINTING,) if recipe.engine.checkpointing else ()
    size = rank_bytes(plan, update, engine.kind, 1, switches)["peak"]
    if update.trained:
        flops = plan.costs[update.stage].flops[update.role]
    else:
        config = job.trajectories
        assert config is not None
        flops = clip_costs(job, update.role, 1, update.stage)[0] * config.batch_size
    return {"planned_gib": size / GIB, "tflop": flops / 1e12}


def _measure(run: Any, peak: Peak, facts: Mapping[str, float]) -> dict[str, float]:
    peak.restart()
    wait(peak.device)
    began = time.perf_counter()
    run()
    wait(peak.device)
    seconds, size = time.perf_counter() - began, peak.read() / GIB
    ratio = size / facts["planned_gib"]
    return {**facts, "measured_gib": size, "ratio": ratio, "seconds": seconds, "tflops": facts["tflop"] / seconds}


def _training(job: Job, stage: str, engine: Engine) -> dict[str, Any]:
    """One update of each trained role, to be called."""
    needs, part = job.needs(stage), job.stages[stage]
    roles = networks_on(job, stage, engine.device)
    frozen = {name: engine.freeze(roles.pop(name)) for name in needs.frozen}
    trainer = Trainer(engine, part.train, roles, needs.trained[0], Path(tempfile.gettempdir()))
    method = methods.build(part.method, {**roles, **frozen}, (*job.spec.sigmas, 0.0))

    def batches(_: int) -> Batch:
        return batch_on(job, stage, engine.device)

    return {role: functools.partial(trainer.update, role, method, batches, 0, 10) for role in needs.trained}


def _solving(job: Job, update: Update, device: torch.device) -> dict[str, Any]:
    """One guided step of the solver of trajectories."""
    net, config = networks_on(job, update.stage, device)[update.role], job.trajectories
    assert config is not None

    def step() -> None:
        batch = batch_on(job, update.stage, device)
        with torch.inference_mode():
            solve_states(net, batch.conditions, batch.x0, (1.0, 0.5), (0, 1), config.guidance)

    return {update.role: step}
