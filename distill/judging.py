"""The embedded evaluation: what is generated for which held-out conditions, validation while training, and the final report."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from distill.data.world import Clips
from distill.health import Checkup, reasons
from distill.rollout import Noise, rollout
from distill.run_folder import save_tensors
from distill.trajectories import solve_states
from eval import benchmark
from eval.benchmark import Asked, Reference
from eval.extractors import Probes
from students.student import Student
from teachers import flow
from teachers.conditions import Conditions, Guidance
from teachers.flow import keyed_generator
from teachers.senses import AudioConfig, LogMel

if TYPE_CHECKING:
    from distill.stages import Pipeline

SAME_NOISE = "teacher_same_noise"
Generate = Callable[[Conditions, int, str], Tensor]  # (conditions, noise seed, name of the set) -> x0


@dataclass(frozen=True)
class HeldOut:
    """Held-out conditions as the metrics want them: real clips, their codec ceiling, conditions and what was asked."""

    clips: Clips
    decoded: Tensor
    conditions: Conditions
    asked: Asked

    @classmethod
    def draw(cls, pipeline: "Pipeline", name: str, num: int) -> "HeldOut":
        """`num` clips (or as many as there are), the same for every training seed: `eval.condition_seed` and `name` decide."""
        clips = pipeline.source.draw(pipeline.recipe.eval.condition_seed, name, num)
        x0, conditions = pipeline.senses.of_clips(clips)
        rows = heard(pipeline, clips)
        asked = Asked(
            audio_features=rows,
            gesture=clips.labels.get("gesture"),
            expression=clips.labels.get("expression"),
            portrait=clips.video[:, :, 0],
        )
        return cls(clips, pipeline.senses.decode(x0), conditions.to(pipeline.engine.device), asked)


def heard(pipeline: "Pipeline", clips: Clips) -> Tensor:
    """What the metrics hear, rows [N, T, A] of log-mel columns, whatever the student's ears are."""
    samples = pipeline.spec.samples_per_frame
    return LogMel(AudioConfig(hop=samples // 4), samples)(clips.voice, 0, clips.video.shape[2])


def fit_probes(pipeline: "Pipeline", folder: Path) -> dict:
    """The extractors stage: train the embedded probes on the training clips and show that they rank known cases right."""
    config, source, engine = pipeline.recipe.eval, pipeline.source, pipeline.engine
    if engine.is_main:
        clips = source.draw(config.probe_seed, "probes", source.num_train)
        decoded, rows = pipeline.senses.decode(pipeline.senses.encode(clips.video)), heard(pipeline, clips)
        total = 3 * config.probe_steps
        with tqdm(total=total, desc="extractors", mininterval=1.0) as bar:

            def progress(step: int, _: int, loss: float) -> None:
                bar.n = step
                bar.set_postfix(loss=f"{loss:.3g}")
                bar.refresh()

            rng = keyed_generator(config.probe_seed, "fit")
            Probes.fit(clips.video, clips.labels, rows, config, rng, progress, decoded).save(folder)
    engine.barrier()
    probes = Probes.load(folder)
    test = HeldOut.draw(pipeline, "admit", config.admit_clips)
    reference = source.draw(config.condition_seed, "reference", config.num_reference)
    rng = keyed_generator(config.probe_seed, "admit")
    result = benchmark.admit(
        probes, test.clips.video, test.decoded, test.asked.audio_features, test.asked.gesture, reference.video, rng
    )
    checks = probes.check(test.decoded, test.clips.labels, test.asked.audio_features)
    return {"sha256": probes.sha256, "checks": checks, **result}


def clip_noise(spec, num: int, seed: int, *keys: int | str) -> Tensor:
    """Initial noise [N, C, F, h, w] of whole clips."""
    channels, height, width = spec.latent_size
    rng = keyed_generator(seed, "clip noise", *keys)
    return torch.randn(num, channels, spec.horizon_frames, height, width, generator=rng)


def stream_noise(spec, num: int, seed: int, *keys: int | str) -> Noise:
    """Noise of every (chunk, step) of `num` streams, drawn when asked for."""
    channels, height, width = spec.latent_size

    def noise(chunk: int, step: int) -> Tensor:
        rng = keyed_generator(seed, "stream noise", *keys, chunk, step)
        return torch.randn(num, channels, spec.chunk_frames, height, width, generator=rng)

    return noise


@torch.inference_mode()
def student_clips(student: Student, conditions: Conditions, noise: Noise, batch: int) -> Tensor:
    """x0 of whole clips by the student's own rollout, the function that serving runs."""
    num, device, parts = conditions.text.shape[0], conditions.text.device, []
    for start in range(0, num, batch):
        rows = slice(start, min(start + batch, num))
        parts.append(rollout(student, conditions.index(rows), lambda c, s, rows=rows: noise(c, s)[rows].to(device)))
    return torch.cat(parts)


@torch.inference_mode()
def many_step_clips(
    student: Student, conditions: Conditions, noise: Noise, grid, guidance: Guidance, batch: int
) -> Tensor:
    """x0 of whole clips as an autoregressive teacher draws them: each chunk by the guided Euler solution on `grid`, every branch
    of the guidance with a context of its own."""
    num, device, parts = conditions.text.shape[0], conditions.text.device, []
    for start in range(0, num, batch):
        rows = slice(start, min(start + batch, num))
        parts.append(
            _solve_stream(student, conditions.index(rows), lambda c, r=rows: noise(c, 0)[r].to(device), grid, guidance)
        )
    return torch.cat(parts)


def _solve_stream(student: Student, conditions: Conditions, noise, grid, guidance: Guidance) -> Tensor:
    branches: list[Conditions] = []
    guidance(lambda c: branches.append(c) or c.text, conditions)  # which conditions it asks for, in order
    n, states, done = student.spec.chunk_frames, [student.open(c.text) for c in branches], []
    for j in range(conditions.num_frames // n):
        told = [c.frames(j * n, (j + 1) * n) for c in branches]
        plans = [student.plan(state, c) for state, c in zip(states, told, strict=True)]

        def denoise(x, level, states=states, plans=plans, told=told):
            found = (
                student.denoise(*given[:2], x, level, given[2])[0] for given in zip(states, plans, told, strict=True)
            )
            return guidance(lambda _: next(found), told[0])

        *_, x0 = flow.solve(denoise, noise(j), grid)
        states = [student.commit(s, x0, c, plan=p) for s, c, p in zip(states, told, plans, strict=True)]
        done.append(x0)
    return torch.cat(done, dim=2)


@torch.inference_mode()
def teacher_clips(teacher, conditions: Conditions, noise: Tensor, grid, guidance, batch: int, progress=None) -> Tensor:
    """x0 of whole clips by the guided Euler solution on `grid`."""
    parts, last = [], len(grid) - 1
    for start in range(0, noise.shape[0], batch):
        rows = slice(start, min(start + batch, noise.shape[0]))
        part = noise[rows].to(conditions.text.device)
        parts.append(solve_states(teacher, conditions.index(rows), part, grid, (last,), guidance)[:, 0])
        if progress is not None:
            progress.update(len(part))
    return torch.cat(parts)


class Validation:
    """Scores of a student on validation conditions, relative to what it was when training began; lower is better.

    score = fid/fid_0 + fvd/fvd_0 + |energy - 1| + |sharpness - 1| + 2 max(0, sync_0 - sync): overshoot is a fault like
    stillness; without labels of the mouth there is no sync. The conditions are not those of the report. The health panel comes
    with them as `health/...`.
    """

    def __init__(self, pipeline: "Pipeline", student: Student, folder: Path):
        self.pipeline, self.student = pipeline, student
        self.test = HeldOut.draw(pipeline, "validate", 2 * pipeline.recipe.eval.num_conditions)
        config = pipeline.recipe.eval
        real = pipeline.source.draw(config.condition_seed, "validate reference", config.num_reference)
        self.reference: Reference = benchmark.prepare_reference(pipeline.probes, real.video, self.test.decoded)
        self.start = self._measure()
        self.checkup = Checkup(pipeline)
        self.teacher = self.checkup.teacher(folder)

    def _measure(self) -> dict[str, float]:
        pipeline, num = self.pipeline, len(self.test.clips.text)
        noise = stream_noise(pipeline.spec, num, pipeline.recipe.eval.condition_seed, "validate")
        x0 = student_clips(self.student, self.test.conditions, noise, pipeline.recipe.eval.batch_size)
        video = pipeline.senses.decode(x0)
        scores = benchmark.evaluate_videos(pipeline.probes, video[None], self.reference, self.test.asked)
        wanted = ("fid", "fvd", "sync", "motion", "motion_energy", "sharpness")
        return {name: scores[name]["mean"] for name in wanted if name in scores}

    def __call__(self) -> dict[str, float]:
        now, then = self._measure(), self.start
        lost = max(0.0, then["sync"] - now["sync"]) if "sync" in now else 0.0
        score = now["fid"] / then["fid"] + now["fvd"] / then["fvd"] + 2 * lost
        score += abs(now["motion_energy"] - 1) + abs(now["sharpness"] - 1)
        panel = self.checkup.student(self.student)
        return {**now, "score": score, **{f"health/{name}": value for name, value in panel.items()}}

    def collapse(self, values: Mapping[str, float]) -> str | None:
        """Why the student of these numbers has collapsed, or None; also None where the recipe goes on with `health.stop=false`."""
        config = self.pipeline.recipe.health
        own = {name.removeprefix("health/"): value for name, value in values.items() if name.startswith("health/")}
        return "; ".join(reasons(own, self.teacher, config.collapse)) or None if config.stop else None


def systems(pipeline: "Pipeline") -> dict[str, Generate]:
    """The systems of the report: how each generates x0 for conditions, a noise seed and a set's name. A student with a network of
    its own has its own many-step teacher among them. SAME_NOISE is none, but the teacher from the noise that students start from.
    """
    recipe, spec = pipeline.recipe, pipeline.spec
    settings = recipe.trajectories
    batch = recipe.eval.batch_size
    grids = {
        "teacher": flow.sigma_grid(settings.num_steps, settings.shift),
        "teacher_few_step": (*spec.sigmas, 0.0),
    }
    stages = {"zero_shot": pipeline.untrained, "init": "init", "student": "dmd"}

    def teacher(grid) -> Generate:
        def generate(conditions, seed, name):
            noise = clip_noise(spec, conditions.text.shape[0], recipe.eval.condition_seed, name, seed)
            with tqdm(total=noise.shape[0], desc=f"teacher {len(grid) - 1} steps", leave=False, mininterval=1.0) as bar:
                return teacher_clips(pipeline.teacher, conditions, noise, grid, settings.guidance, batch, bar)

        return generate

    def same_noise(conditions, seed, name):
        start = stream_noise(spec, conditions.text.shape[0], recipe.eval.condition_seed, name, seed)
        noise = torch.cat([start(chunk, 0) for chunk in range(spec.num_chunks)], dim=2)
        return teacher_clips(pipeline.teacher, conditions, noise, grids["teacher"], settings.guidance, batch)

    def student(stage) -> Generate:
        net = pipeline.student(stage).eval()

        def generate(conditions, seed, name):
            noise = stream_noise(spec, conditions.text.shape[0], recipe.eval.condition_seed, name, seed)
            return student_clips(net, conditions, noise, batch)

        return generate

    def own_teacher(conditions, seed, name):
        noise = stream_noise(spec, conditions.text.shape[0], recipe.eval.condition_seed, name, seed)
        return many_step_clips(pipeline.ar_teacher, conditions, noise, grids["teacher"], settings.guidance, batch)

    return (
        {name: teacher(grid) for name, grid in grids.items()}
        | {SAME_NOISE: same_noise}
        | ({"ar_teacher": own_teacher} if pipeline.own_network else {})
        | {name: student(stage) for name, stage in stages.items()}
    )


def generate_all(pipeline: "Pipeline", folder: Path, sets: dict[str, tuple[Conditions, int]]) -> None:
    """Every system's clips of every set (name -> conditions, noise seeds), shared out over the ranks and kept in the stage, so
    that a killed evaluation goes on where it was."""
    jobs = [
        (generate, conditions, seed, name, clips_file(folder, name, system, seed))
        for system, generate in systems(pipeline).items()
        for name, (conditions, seeds) in sets.items()
        for seed in range(seeds)
        if system != SAME_NOISE or (name == "test" and seed == 0)
    ]
    engine = pipeline.engine
    (folder / "clips").mkdir(exist_ok=True)
    for generate, conditions, seed, name, file in jobs[engine.rank :: engine.world_size]:
        if not file.is_file():
            x0 = generate(conditions, seed, name)
            save_tensors(file, {"video": pipeline.senses.decode(x0)})
    engine.barrier()


def clips_file(folder: Path, name: str, system: str, seed: int) -> Path:
    """Where a system's clips uint8 [N, 3, T, H, W] of one set and noise seed lie."""
    return folder / "clips" / f"{name}-{system}-{seed}.safetensors"
