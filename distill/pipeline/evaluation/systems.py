"""The systems of the report: how each generates clips of given conditions; all their clips, in the stage's folder."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from tqdm import tqdm

from distill.pipeline.artifacts import Artifacts
from distill.pipeline.evaluation import clip_sets
from distill.pipeline.generate import Rows, clip_noise, many_step_clips, stream_noise, student_clips, teacher_clips
from students.student import Student
from teachers import flow
from teachers.files import load_tensors, save_tensors
from teachers.guidance import AnyGuidance

SAME_NOISE = "teacher_same_noise"
Generate = Callable[..., Tensor]  # (conditions, rows of them or None, seed and other keys of the noise) -> x0


class LastStudent(Mapping[str, Student]):
    """The students of the report: zero-shot, after initialisation, after distillation. No more than the one that was last asked for
    is held."""

    def __init__(self, artifacts: Artifacts):
        self.artifacts, self.last = artifacts, ("", cast(Student, None))
        self.stages = {"zero_shot": artifacts.recipe.zero_shot_stage, "init": "init", "student": "distill"}

    def __getitem__(self, name: str) -> Student:
        if self.last[0] != name:
            self.last = ("", cast(Student, None))
            self.last = (name, self.artifacts.finished_student(self.stages[name]))
        return self.last[1]

    def __contains__(self, name: object) -> bool:
        return name in self.stages  # without loading it

    def __iter__(self) -> Iterator[str]:
        return iter(self.stages)

    def __len__(self) -> int:
        return len(self.stages)


def teacher_systems(artifacts: Artifacts, batch: int, guidance: AnyGuidance) -> dict[str, Generate]:
    """The systems of the report under `guidance`: how each generates x0 for rows of conditions, `batch` at a time. A student with
    a network of its own has its own many-step teacher among them. SAME_NOISE is none, but the teacher from the noise that
    students start from."""
    recipe, spec = artifacts.recipe, artifacts.spec
    grid = flow.sigma_grid(recipe.trajectories.num_steps, recipe.trajectories.shift)

    def teacher(conditions: Rows, rows: Tensor | None, *keys: Any, grid: Sequence[float] = grid) -> Tensor:
        noise = clip_noise(spec, *keys)
        return teacher_clips(artifacts.teacher, conditions, noise, grid, guidance, batch, rows)

    def same_noise(conditions: Rows, rows: Tensor | None, *keys: Any) -> Tensor:
        def noise(rows: Tensor) -> Tensor:
            start = stream_noise(spec, *keys)(rows)
            return torch.cat([start(chunk, 0) for chunk in range(spec.num_chunks)], dim=2)

        return teacher_clips(artifacts.teacher, conditions, noise, grid, guidance, batch, rows)

    def own_teacher(conditions: Rows, rows: Tensor | None, *keys: Any) -> Tensor:
        noise = stream_noise(spec, *keys)
        return many_step_clips(artifacts.ar_teacher, conditions, noise, grid, guidance, batch, rows)

    found = {"teacher": teacher, "teacher_few_step": partial(teacher, grid=(*spec.sigmas, 0.0)), SAME_NOISE: same_noise}
    found |= {"ar_teacher": own_teacher} if recipe.has_custom_network else {}
    return {name: in_precision(artifacts, generate) for name, generate in found.items()}


def student_systems(artifacts: Artifacts, students: Mapping[str, Student], batch: int) -> dict[str, Generate]:
    """How each of the students, which is asked for when it is called, generates x0 for rows of conditions."""

    def student(conditions: Rows, rows: Tensor | None, *keys: Any, name: str) -> Tensor:
        noise = stream_noise(artifacts.spec, *keys)
        return student_clips(students[name], conditions, noise, batch, rows)

    return {name: in_precision(artifacts, partial(student, name=name)) for name in students}


def in_precision(artifacts: Artifacts, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under the engine's autocast: what is compared is computed, and timed, in one precision."""

    def run(*words: Any, **named: Any) -> Any:
        with artifacts.engine.autocast():
            return function(*words, **named)

    return run


def generate_all(
    artifacts: Artifacts, students: Mapping[str, Student], folder: Path, sets: Mapping[str, tuple[Rows, int]]
) -> None:
    """Every system's clips of every set (name -> conditions, noise seeds) at the scored size, a few clips a job, and the first
    ones at their own. Jobs are shared out over the ranks, those of the teacher over groups that share its branches, and kept in the
    stage, so that a killed evaluation goes on."""
    batch, where = clip_sets.generated_at_once(artifacts.recipe, artifacts.spec), clips_folder(artifacts, folder)

    def jobs(systems: Mapping[str, Generate]) -> list[Job]:
        return [
            Job(generate, conditions, rows, (name, seed), clips_file(where, name, system, seed, int(rows[0])))
            for system, generate in systems.items()
            for name, (conditions, seeds) in sets.items()
            for seed in range(seeds)
            if system != SAME_NOISE or (name == "test" and seed == 0)
            for rows in torch.arange(conditions.num_rows).split(batch)
        ]

    where.mkdir(parents=True, exist_ok=True)
    with artifacts.engine.sharing_branches(artifacts.recipe.trajectories.guidance) as guidance:
        _generate(artifacts, jobs(teacher_systems(artifacts, batch, guidance)), "the teacher's clips")
    artifacts.release(())
    _generate(artifacts, jobs(student_systems(artifacts, students, batch)), "the students' clips")
    artifacts.engine.barrier()


class Job(NamedTuple):
    """A few clips of one system: rows of a set's conditions, the keys of their noise, and the file that they are kept in."""

    generate: Generate
    conditions: Rows
    rows: Tensor
    keys: tuple[str, int]
    file: Path


def _generate(artifacts: Artifacts, jobs: Sequence[Job], what: str) -> None:
    """This rank's share of the jobs that are not done."""
    engine, config = artifacts.engine, artifacts.recipe.eval
    mine = [jobs[i] for i in engine.missing([job.file for job in jobs])]
    for job in tqdm(mine, desc=what, disable=not engine.is_main, mininterval=1.0):
        x0 = job.generate(job.conditions, job.rows, config.condition_seed, *job.keys)
        if engine.is_group_main:
            video = artifacts.encoders.decode(x0, job.conditions.index(job.rows).lead)
            shown = max(0, config.num_samples - int(job.rows[0])) if job.keys == ("test", 0) else 0
            save_tensors(job.file, {"video": clip_sets.scored(video), "samples": video[:shown].clone()})


def clips_folder(artifacts: Artifacts, folder: Path) -> Path:
    """Where `generate_all` keeps clips in the stage's folder: apart by how many a file holds, which another start may change."""
    return folder / "clips" / f"{clip_sets.generated_at_once(artifacts.recipe, artifacts.spec)}-a-file"


def clips_file(where: Path, name: str, system: str, seed: int, start: int) -> Path:
    """The file of a system's clips uint8 [n, 3, T, H, W] of one set and noise seed, from row `start` on."""
    return where / f"{name}-{system}-{seed}-{start:06d}.safetensors"


def generated(where: Path, name: str, system: str, seed: int, what: str = "video") -> Tensor:
    """The clips of a set that `generate_all` stored at the scored size; or `samples`, at their own."""
    files = sorted(where.glob(f"{name}-{system}-{seed}-*.safetensors"))
    return torch.cat([load_tensors(file)[what] for file in files])
