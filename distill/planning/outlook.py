"""What each stage of a recipe computes, holds and leaves on the disk: FLOPs, hours, memory of a rank, host memory. Pure functions.

FLOPs are counted where a stage's own code runs on the meta device (`trace`), times the counts in the recipe. Not counted: text and
audio encoders, probes and scoring, the drawing of clips, transfers, and ranks that wait for the disk.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from distill.data import latents
from distill.pipeline.evaluation.clip_sets import SCORED_SIDE
from distill.pipeline.evaluation.costs import COSTS_SECONDS
from distill.planning.codec import codec_costs
from distill.planning.estimate import Plan, is_away, offloaded_bytes, rank_bytes
from distill.planning.job import Job, batch_on
from distill.planning.trace import clip_costs
from distill.training.lifecycle.selection import validations
from students.serving.optimize import DTYPES
from teachers.encoders.small import SAMPLE_RATE

if TYPE_CHECKING:
    from distill.recipe import Recipe

Precision = Literal["fp32", "bf16"]
FP32_SLOWER = 8.4
"""How much slower fp32 is than bf16 at a like utilisation: of an H100 without TF32 70 % of 67 TFLOP/s, beside 40 % of 989."""
MANY_PARAMETERS = 10**9
"""A network of more, computed in fp32, is worth a warning."""
NODE = 8  # GPUs of a machine
CAPTION_TOKENS = 60  # of a clip's text, which is stored without padding
ENCODERS = {"WanVAEConfig": 4 * 126_892_531, "UMT5Config": 2 * 5_680_910_336, "Wav2VecConfig": 4 * 94_371_712}
ENCODERS["WanImageConfig"] = 4 * 611_086_080
"""Bytes on the device: Wan2.1's VAE in fp32, umT5-xxl's encoder in bf16, wav2vec2-base and CLIP ViT-H/14 in fp32."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """A GPU's dense bf16 TFLOP/s by its data sheet, the share of it that is reached, and a GPU hour's price."""

    tflops: float = 989.0
    mfu: float = 0.4
    dollars: float | None = None

    def flops(self, precision: Precision) -> float:
        """FLOPs a second."""
        return self.tflops * 1e12 * self.mfu / (FP32_SLOWER if precision == "fp32" else 1.0)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Work of a stage: FLOPs of all ranks together, which share it in `jobs` equal pieces (0: in as many as there are ranks; 1:
    also what each rank does, where an update's batch grows with the ranks). Of a piece `together` ranks do equal parts, or the
    `branches` of a guidance, where ranks divide and do not share it already. `parameters` of its network, and the `key` of the
    recipe that sets its precision, where there is one."""

    name: str
    flops: float
    precision: Precision
    jobs: int = 0
    together: int = 1
    branches: int = 1
    parameters: int = 0
    key: str = ""

    def _sharing(self, ranks: int) -> int:
        """Ranks that do parts of one piece."""
        return self.together if self.together > 1 or ranks % self.branches else self.branches

    def seconds(self, ranks: int, rates: Rates) -> float:
        """Until the last of the ranks is done."""
        sharing = self._sharing(ranks)
        groups = max(1, ranks // sharing)
        share = math.ceil(self.jobs / groups) / self.jobs if self.jobs else 1 / groups
        return self.flops * share / sharing / rates.flops(self.precision)

    def wait(self, ranks: int, rates: Rates) -> float:
        """Seconds that some rank waits for another at the end: those of one job, where jobs do not divide."""
        sharing = self._sharing(ranks)
        if not self.jobs or self.jobs % max(1, ranks // sharing) == 0:
            return 0.0
        return self.flops / self.jobs / sharing / rates.flops(self.precision)


@dataclass(frozen=True, kw_only=True)
class StageOutlook:
    """A stage. Bytes: `disk` that it leaves, `disk_per_clip` of films whose number the recipe does not say, `checkpoints` while it
    runs; `beside`: what lies on each GPU besides what `rank_bytes` counts; `clips`: of clips that are encoded in it, or generated
    with what training holds; `made`: by role, of the whole network that is on the GPU alone to generate clips, and of these;
    `host`: of a rank, and of rank 0; `copied`: of a checkpoint and of the best weights, which ranks hold until they are written."""

    name: str
    parts: tuple[Part, ...]
    disk: float = 0
    disk_per_clip: float = 0
    checkpoints: float = 0
    beside: Mapping[str, float]
    clips: float = 0
    made: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    host: tuple[float, float] = (0, 0)
    copied: float = 0

    @property
    def flops(self) -> float:
        return sum(part.flops for part in self.parts)

    def hours(self, ranks: int, rates: Rates) -> float:
        return sum(part.seconds(ranks, rates) for part in self.parts) / 3600


def memory(plan: Plan, stage: StageOutlook, engine: str, ranks: int, switches: Sequence[str] = ()) -> dict[str, float]:
    """Bytes on a rank at the peak of a stage: `update` (training, or one step of the solver), `clips` (with the networks that make
    them) and what is alive `beside`; their `peak` is the larger one of the first two with all of the rest."""
    found = [rank_bytes(plan, u, engine, ranks, switches) for u in plan.updates if u.stage == stage.name]
    update = max((parts["peak"] for parts in found), default=0.0)
    held = max((_at_rest(parts) for parts in found), default=0.0)
    clips = [stage.clips + held if stage.clips else 0.0]
    for role, (weights, size) in stage.made.items():
        if role == "teacher" and is_away(role, switches):
            weights *= (plan.blocks[role] + plan.outside[role]) / plan.parameters[role]
        clips.append(weights + size)
    made = max(clips)
    return {**stage.beside, "update": update, "clips": made, "peak": max(update, made) + sum(stage.beside.values())}


def _at_rest(parts: Mapping[str, float]) -> float:
    return sum(size for name, size in parts.items() if name not in ("gradients", "activations", "peak"))


def copied_bytes(stage: StageOutlook, engine: str, ranks: int) -> float:
    """Of a machine with up to eight of the ranks: its share of a checkpoint that is being written."""
    return stage.copied * (1 if engine == "ddp" else min(ranks, NODE) / ranks)


def host_bytes(plan: Plan, stage: StageOutlook, engine: str, ranks: int, switches: Sequence[str] = ()) -> float:
    """Of a machine with up to eight of the ranks; without the processes themselves and what the system keeps of files."""
    waits = [offloaded_bytes(plan, u, engine, ranks, switches) for u in plan.updates if u.stage == stage.name]
    waits += [weights for role, (weights, _) in stage.made.items() if role == "teacher" and is_away(role, switches)]
    return (stage.host[0] + max(waits, default=0.0)) * min(ranks, NODE) + stage.host[1]


def outlook(plan: Plan, job: Job, recipe: "Recipe") -> list[StageOutlook]:
    """Every stage that computes, in order."""
    return list(_Stages(plan, job, recipe).all())


class _Stages:
    """What the stages of one recipe have in common."""

    def __init__(self, plan: Plan, job: Job, recipe: "Recipe"):
        self.plan, self.job, self.recipe, self.codec = plan, job, recipe, codec_costs(job.spec, recipe)
        data, spec = recipe.data, job.spec
        self.num_films, self.num_drawn = data.training_counts()
        parts = () if recipe.tiny else (data.codec, data.audio, data.text, data.image)
        self.codec_bytes = 0 if recipe.tiny else ENCODERS.get(type(data.codec).__name__, 0)
        self.encoders = sum(ENCODERS.get(type(part).__name__, 0) for part in parts)
        steps = job.trajectories.num_steps if job.trajectories else 0
        self.teacher_clip, self.teacher_bytes = clip_costs(job, "teacher", steps)
        self.student_clip, self.student_bytes = clip_costs(job, "student")
        given = batch_on(job, "clips").conditions
        frame = math.prod(spec.latent_size)
        self.clip_bytes = _clip_bytes(recipe, given.stored, frame * spec.horizon_frames)
        self.drawn_bytes = _clip_bytes(recipe, given.stored, frame)
        self.variants = 2 + sum(given.has(name) for name in ("text", "audio"))

    def all(self) -> Iterator[StageOutlook]:
        recipe, films, drawn, codec = self.recipe, self.num_films or 0, self.num_drawn, self.codec
        shards = sum(-(-num // recipe.data.world.shard_clips) for num in (films, drawn))
        videos = (1 + recipe.data.mirror) * (1 if recipe.data.image is None else 2)  # and the portrait's own
        flops = videos * (films * codec.encode + drawn * codec.encode_portrait)
        encode = Part(name="encoding", flops=flops, precision="fp32", jobs=shards)
        disk = films * self.clip_bytes + drawn * self.drawn_bytes
        unknown = self.clip_bytes if self.num_films is None else 0.0
        yield self._stage("data", [encode], disk=disk, disk_per_clip=unknown, clips=codec.encode_bytes)
        seen = films + recipe.eval.admit_clips
        both = Part(name="codec", flops=seen * (codec.encode + codec.decode), precision="fp32", jobs=seen)
        yield self._stage("extractors", [both], clips=max(codec.encode_bytes, codec.decode_bytes))
        for name in self.job.stages:
            if name == "init" and self.job.solves:
                yield self._trajectories()
            yield self._training(name)
        yield self._evaluate()

    def _stage(self, name: str, parts: Sequence[Part], **facts) -> StageOutlook:
        alone = name in self.job.stages or name == "trajectories"  # what these do not need is let go
        held = self.codec_bytes if alone else self.encoders
        return StageOutlook(name=name, parts=tuple(parts), beside={"codec" if alone else "encoders": held}, **facts)

    def _solver(self) -> str:
        return next((update.role for update in self.plan.updates if update.stage == "trajectories"), "")

    @property
    def _branches(self) -> int:
        """Of the teacher's guidance, which ranks compute side by side."""
        return self.job.trajectories.guidance.passes if self.job.trajectories else 1

    def _held(self, role: str) -> float:
        return self.plan.parameters[role] * (2 if role in self.plan.half else 4)

    def _precision(self, role: str) -> Precision:
        return "bf16" if role in self.plan.half else "fp32"

    def _part(self, name: str, flops: float, role: str, jobs: int, precision: Precision | None = None, **facts) -> Part:
        """Work of a role's frozen network: as it is held, unless it is `precision`; of ranks that share sequences."""
        key = f"{role}.precision" if role in ("teacher", "base") else ""
        facts = {"precision": precision or self._precision(role), "together": self.job.together, "key": key, **facts}
        return Part(name=name, flops=flops, jobs=jobs, parameters=self.plan.parameters.get(role, 0), **facts)

    def _trajectories(self) -> StageOutlook:
        config, role = self.job.trajectories, self._solver()
        assert config is not None
        flops, _ = clip_costs(self.job, role, config.num_steps, "trajectories")
        part = self._part(role, config.num_pairs * flops, role, -(-config.num_pairs // config.batch_size))
        return self._stage("trajectories", [part], disk=self.plan.trajectories)

    def _training(self, name: str) -> StageOutlook:
        """A stage that trains: its updates, and the clips by which its student is watched."""
        plan, recipe, costs, codec = self.plan, self.recipe, self.plan.costs[name], self.codec
        train = self.job.stages[name].train
        micro_steps = (train.global_batch or train.batch_size * train.accumulation) / train.batch_size
        steps = [
            Part(
                name=role,
                flops=costs.updates[role] * flops * micro_steps * self.job.together,
                precision=plan.precision,
                jobs=0 if train.global_batch else 1,
                together=self.job.together,
                parameters=plan.parameters[role],
                key="engine.precision",
            )
            for role, flops in costs.flops.items()
        ]
        trained = [self._learned(role) for role in self.job.needs(name).trained]
        state, best = 4 * (3 * sum(trained) + trained[0]), 4 * trained[0] if name == "distill" else 0
        facts: dict = {"checkpoints": (recipe.engine.keep_checkpoints + 1) * (state + best), "copied": state + best}
        facts |= {
            "disk": 4 * trained[0] + (2 * self._exported if name == "distill" else 0),
            "host": (self._student_file, 4 * trained[0]),
        }
        if name in ("teacher", "base"):
            return self._stage(name, steps, **facts)
        decode = self.job.together * codec.decode  # every rank of a group decodes, or waits
        clip, num = self.student_clip + decode, recipe.health.num_conditions
        panel, teacher = self.variants * num, self.teacher_clip + decode
        if self.job.needs(name).decodes:
            steps.append(self._rewards(name, micro_steps))
        if name != "distill":
            steps.append(self._part("health", panel * clip, "student", num, plan.precision))
            made = {"student": self._made("student")}
            if name == "init":
                branches = self._branches
                steps.append(self._part("health of the teacher", panel * teacher, "teacher", panel, branches=branches))
                made["teacher"] = self._made("teacher")
            return self._stage(name, steps, made=made, **facts)
        times = len(list(validations(train.validate_every, train.num_steps, train.stop)))  # if it ends at its last step
        held_out = 2 * recipe.eval.num_conditions
        steps += [
            self._part("validation", (1 + times) * held_out * clip, "student", held_out, plan.precision),
            self._part("health", times * panel * clip, "student", num, plan.precision),
        ]
        return self._stage(name, steps, clips=max(self.student_bytes, codec.decode_bytes), **facts)

    def _rewards(self, name: str, micro_steps: float) -> Part:
        """The decoding of rollouts, and of the data's clips where a reward compares them."""
        method, train = self.job.stages[name].method, self.job.stages[name].train
        updates = self.plan.costs[name].updates
        clips = sum(updates[role] * times for role, times in method.decodings.items()) * micro_steps * train.batch_size
        jobs = 0 if train.global_batch else 1
        flops = self.job.together * clips * self.codec.decode
        if self.job.needs(name).differentiates:
            flops += self.job.together * updates["student"] * micro_steps * train.batch_size * self.job.pull_back.flops
        return Part(name="decoding for rewards", flops=flops, precision="fp32", jobs=jobs, together=self.job.together)

    def _learned(self, role: str) -> int:
        return (self.plan.lora if role in self.plan.adapted else self.plan.parameters)[role]

    @property
    def _exported(self) -> float:
        """Bytes of the student as it is served: an adapter alone, or all of it in fp32."""
        lora = self.recipe.lora
        return self._student_file if lora and lora.export == "adapter" else 4 * self.plan.parameters["student"]

    @property
    def _student_file(self) -> float:
        """Bytes of what a stage has stored of its student, fp32, which every rank reads whole."""
        return 4 * self._learned("student") if "student" in self.plan.parameters else 0.0

    def _made(self, role: str, alone: bool = False) -> tuple[float, float]:
        """Bytes of a whole network that generates, and of what it generates, by a rank `alone` as rank 0 does to time it; a student
        that was trained whole is read in fp32."""
        decoding, plan = self.codec.decode_bytes, self.plan
        size = self.teacher_bytes if role == "teacher" else self.student_bytes
        if alone and self.job.sequence is not None:
            size = clip_costs(replace(self.job, sequence=None), role, 1)[1]
        if role == "teacher":
            return self._held("teacher"), max(size, decoding)
        weights = plan.parameters.get("student", 0) * DTYPES[plan.precision].itemsize
        return weights, max(size, decoding, self._student_file - weights)

    def _evaluate(self) -> StageOutlook:
        """Three students; the teacher on its grid, on the student's few steps, and once from the student's noise; costs of them."""
        job, config, codec, solver = self.job, self.recipe.eval, self.codec, self.job.trajectories
        assert solver is not None
        test = config.num_conditions
        each = test * config.num_seeds + config.diversity_conditions * config.diversity_seeds
        step, most = self.teacher_clip / solver.num_steps, COSTS_SECONDS * Rates().flops("bf16")
        few = len(job.spec.sigmas) * step
        # no more steps are timed than go into those seconds
        clip = step * min(solver.num_steps, max(1, int(most / step)))
        fitting = int(most / (clip + few + 6 * self.student_clip))
        timed = min(config.latency_warmup + config.latency_runs, max(1, fitting))
        together = job.at_once if job.at_once > 1 else 0
        streams = 3 * (2 * timed + 5 * together) * self.student_clip
        alone = (timed + together) * (clip + few) + step
        branches = self._branches
        idle = branches if job.together == 1 else 1
        waits = 3 * each + idle * (2 * each + test)  # the rest of a group waits for its first rank
        decode = waits * job.together * codec.decode
        parts = [
            self._part("teacher", (each + test) * self.teacher_clip, "teacher", each + test, branches=branches),
            self._part("teacher, few steps", each * few, "teacher", each, branches=branches),
            self._part("students", 3 * each * self.student_clip, "student", 3 * each, self.plan.precision),
            self._part("codec", decode, "", 5 * each + test, "fp32"),
            self._part("costs of the teacher", alone, "teacher", 1, together=1),
            self._part("costs of students", streams, "student", 1, self.plan.precision, together=1),
        ]
        made = {role: self._made(role, alone=True) for role in ("teacher", "student")}
        if self.recipe.has_custom_network:
            flops, _ = clip_costs(job, "ar_teacher", solver.num_steps)
            parts.append(self._part("ar_teacher", each * flops, "ar_teacher", each, branches=branches))
        waiting = self._held("teacher") + 3 * made["student"][0]  # on rank 0, which times them in turn
        frames, sides = 1 + (job.spec.horizon_frames - 1) * job.spec.codec.stride, (job.spec.height, job.spec.width)
        video = 3 * frames * math.prod(sides) * min(1.0, SCORED_SIDE / max(sides)) ** 2
        return self._stage(
            "evaluate",
            parts,
            disk=(5 * each + test) * video,
            made=made,
            host=(self._student_file, (6 * each + 2 * test + config.num_reference) * video + waiting),
        )


def _clip_bytes(recipe: "Recipe", features: Mapping[str, Tensor], elements: int) -> float:
    """What the stage data stores of a clip: latents of so many elements, features, and the text as if no other clip had it."""
    data, copies = recipe.data, 1 + recipe.data.mirror
    precision, found = DTYPES[data.precision], 2.0 * copies * elements
    if data.keep_sound:
        found += 2.0 * SAMPLE_RATE * data.world.num_frames / float(data.world.fps)
    for name, value in features.items():
        if name == "text":
            found += min(CAPTION_TOKENS, value.shape[1]) * value.shape[2] * precision.itemsize
            continue
        size = value[:1].numel() * latents.stored_type(name, precision, value).itemsize
        # of the clip as one, and as it is streamed
        again = name == "audio" and getattr(data.audio, "whole_clip", False)
        found += size * (1 + again if name in latents.SOUND else copies)
    return found


def disk_at_most(stages: Sequence[StageOutlook]) -> float:
    """Bytes that a run takes at once: what finished stages have left, and checkpoints, which go at the end of theirs."""
    found = left = 0.0
    for stage in stages:
        left += stage.disk
        found = max(found, left + stage.checkpoints)
    return found


def warnings(stages: Sequence[StageOutlook]) -> Iterator[str]:
    """A line for each stage in which a large network computes in fp32."""
    for stage in stages:
        slow = [part for part in stage.parts if part.precision == "fp32" and part.parameters > MANY_PARAMETERS]
        if slow:
            names, keys = ", ".join(part.name for part in slow), dict.fromkeys(part.key for part in slow if part.key)
            fix = "".join(f"; set {key}=bf16" for key in keys)
            size = f"{max(part.parameters for part in slow) / 1e9:.1f}e9 parameters"
            yield f"warning: {stage.name}: {names}, {size}, in fp32, {FP32_SLOWER:g} times slower than bf16{fix}"
