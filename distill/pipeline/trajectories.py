"""The ODE-pair factory: the teacher's trajectories, only the states the student needs, with labels that are checked."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from distill.data.latents import TrainSet
from distill.data.stored import Stored, files_of, opener
from distill.methods import Batch
from distill.methods.forcing import Forced
from distill.pipeline.artifacts import Artifacts
from distill.pipeline.generate import solve_states
from distill.recipe import TrajectoriesConfig
from distill.training.engines.engine import Engine
from teachers import flow
from teachers.errors import UserError
from teachers.files import atomic_write, load_tensors, save_tensors
from teachers.flow import keyed_generator
from teachers.guidance import AnyGuidance, EmbeddedScales


@dataclass(frozen=True)
class Trajectories:
    """N trajectories: `states`, indexed by [B] -> [B, K+1, C, F, h, w] fp16, the last state x0, which stay on the disk; rows [N] of
    the training pool; sigmas of the states; the guidance scales [N, M] of each, where drawn."""

    states: Stored
    rows: Tensor
    sigmas: tuple[float, ...]
    guidance: Tensor | None = None

    def batch(self, pool: TrainSet, rows: Tensor, device: torch.device | str) -> Batch:
        batch = pool.batch(self.rows[rows], device)
        conditions = batch.conditions
        if self.guidance is not None:
            conditions = replace(conditions, guidance=self.guidance[rows].to(device))
        states = self.states[rows].float().to(device)
        return replace(batch, conditions=conditions, states=states)


def make(
    teacher_of: Callable[[Batch], Any],
    teacher_hash: str,
    pool: TrainSet,
    config: TrajectoriesConfig,
    sigmas: Sequence[float],
    *,
    seed: int,
    folder: Path,
    engine: Engine,
    scales: EmbeddedScales | None = None,
    size: int | None = None,
) -> dict:
    """Write shards of `batch_size` trajectories; a shard that is there is not solved again. Processes share the shards.

    `teacher_of` a batch of the training set is what denoises it; its first `size` rows are drawn from (None: all). With `scales`
    each pair has guidance scales of its own, drawn after its noise and kept with it: the student, conditioned on them, regresses
    the guided solution. Meng et al. 2210.03142 first match the guided prediction at every sigma, then its steps; here both are
    one stage. Returns metadata of the stage.
    """
    grid = flow.sigma_grid(config.num_steps, config.shift)
    keep = (*flow.on_grid(sigmas, grid), config.num_steps)
    facts = {
        "sigmas": [grid[i] for i in keep],
        "num_steps": config.num_steps,
        "shift": config.shift,
        "guidance": asdict(scales or config.guidance),
        "teacher": teacher_hash,
    }
    files = files_of(folder, "shard", -(-config.num_pairs // config.batch_size))
    for i in tqdm(engine.missing(files), desc="trajectories", disable=not engine.is_main):
        rng = keyed_generator(seed, "trajectories", i)
        num = min(config.batch_size, config.num_pairs - i * config.batch_size)
        rows = torch.randint(0, len(pool) if size is None else size, (num,), generator=rng)
        batch = pool.batch(rows, engine.device)
        noise = torch.randn((num, *pool.x0.shape[1:]), generator=rng).to(engine.device)
        guidance: AnyGuidance = config.guidance
        extra = {}
        if scales is not None:
            extra = {"guidance": scales.draw(num, rng)}
            guidance = scales.of(extra["guidance"].to(engine.device), config.guidance.batched)
        states = solve_states(teacher_of(batch), batch.conditions, noise, grid, keep, guidance).half()
        if not bool(states.isfinite().all()):
            _refuse(batch, states, rows, facts["sigmas"])
        if engine.is_group_main:
            save_tensors(files[i], {"states": states, "rows": rows, **extra})
    engine.barrier()
    if engine.is_main:
        facts |= {"rows": [], **({} if scales is None else {"scales": []})}
        for part in map(load_tensors, files):
            facts["rows"].append(part["rows"].tolist())
            if scales is not None:
                facts["scales"].append(part["guidance"].tolist())
        atomic_write(folder / "manifest.json", json.dumps(facts) + "\n")
    engine.barrier()
    passes = config.guidance.passes if scales is None else 1 + len(scales.names)
    return {"pairs": config.num_pairs, "nfe": config.num_steps * passes}


def _refuse(batch: Batch, states: Tensor, rows: Tensor, sigmas: Sequence[float]) -> NoReturn:
    """UserError that says what made states [B, K+1, ..] of clips `rows` that are not finite."""
    if bad := batch.not_finite():
        raise UserError(
            f"the data are not finite: {bad[0]} of one of the clips {rows.tolist()}; check the data that its stage has left"
        )
    row, state = (~states.flatten(2).isfinite().all(dim=2)).nonzero()[0].tolist()
    raise UserError(
        f"the teacher's solution is not finite: clip {int(rows[row])} at sigma {sigmas[state]:.3g}; check its weights, "
        "trajectories.guidance and the teacher's precision"
    )


def made_by(artifacts: Artifacts) -> str:
    """The fingerprint of the stage whose network solves the trajectories."""
    done = artifacts.folder.finished(artifacts.recipe.solver_stage)
    assert done is not None
    return done["fingerprint"]


def solve(artifacts: Artifacts, folder: Path) -> dict:
    """The stage: trajectories of the network that `trajectories.role` names, for the student's conditions."""
    recipe = artifacts.recipe

    def solver(batch: Batch) -> Any:
        if recipe.solver_stage == "ar_teacher":
            assert batch.x0 is not None
            return Forced(artifacts.ar_teacher, batch.x0)
        return artifacts.teacher if recipe.solver_stage == "teacher" else artifacts.base_solver

    pool = artifacts.student_train_set
    with artifacts.codec_alone():
        return _make(artifacts, solver, pool, folder)


def _make(artifacts: Artifacts, solver: Callable[[Batch], Any], pool: TrainSet, folder: Path) -> dict:
    recipe = artifacts.recipe
    return make(
        solver,
        made_by(artifacts),
        pool,
        recipe.trajectories,
        artifacts.spec.sigmas,
        seed=recipe.seed,
        folder=folder,
        engine=artifacts.engine,
        scales=artifacts.spec.guidance,
        size=pool.num_films if recipe.solver_stage == "ar_teacher" else None,  # which is given the data's clean chunks
    )


def load(folder: Path, sigmas: Sequence[float], teacher_hash: str) -> Trajectories:
    """Trajectories of a finished stage, of which only the manifest is read now; UserError unless they are all there and made by
    this teacher for exactly these student sigmas."""
    facts = json.loads((folder / "manifest.json").read_text())
    want = [*sigmas, 0.0]
    if len(want) != len(facts["sigmas"]) or any(abs(a - b) > 1e-9 for a, b in zip(want, facts["sigmas"], strict=True)):
        raise UserError(
            f"trajectories: {folder} holds states at sigmas {facts['sigmas']}, the student asks for {want}; make them again"
        )
    if facts["teacher"] != teacher_hash:
        raise UserError(f"trajectories: {folder} comes from another teacher ({facts['teacher'][:12]}); make them again")
    rows, scales = facts["rows"], facts.get("scales")
    files = files_of(folder, "shard", len(rows))
    states = Stored(files, list(map(len, rows)), "states", opener(folder))
    guidance = None if scales is None else torch.tensor([scale for own in scales for scale in own])
    return Trajectories(states, torch.tensor([row for own in rows for row in own]), tuple(facts["sigmas"]), guidance)
