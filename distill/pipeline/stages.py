"""The pipeline as a table of stages: data -> teacher -> trajectories -> init -> distill -> export -> evaluate.

A stage is a value: its name, the recipe fields that it reads, its input stages, and its function. Its fingerprint follows from
these: the values of the fields, digests of every file that a path in them names and of code from outside the packages, and the
fingerprints of its inputs. So a stage that is done is run again when, and only when, something that it reads has changed.
"""

import dataclasses
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from distill.data import latents
from distill.data.procedural.corruption import corrupt_clips
from distill.data.source import Clips, ClipSource
from distill.pipeline import trajectories
from distill.pipeline.artifacts import Artifacts
from distill.pipeline.evaluation.clip_sets import reserve
from distill.pipeline.evaluation.evaluate import evaluate
from distill.pipeline.evaluation.validation import fit_probes
from distill.pipeline.export import export, publish
from distill.pipeline.pretrained import digest, weights_file
from distill.pipeline.run_folder import RunFolder
from distill.pipeline.tiny import write_weights
from distill.pipeline.train_stages import FROZEN, TRAINED, train_base, train_student, train_teacher
from distill.recipe import Recipe, TeacherStage, spec_of
from distill.training import lora, metrics_log
from distill.training.engines.engine import Engine
from distill.training.lora import LoraRoles
from distill.training.metrics_log import MetricsLog
from eval.embedded.protocol import EvalConfig
from students.spec import NETWORKS, Spec
from students.weights import checkpoint
from teachers.config import to_plain
from teachers.errors import UserError
from teachers.flow import keyed_generator
from teachers.resolve import in_users_file, name_of

SPEC = ("student", "trajectories.shift")  # besides data and, where its weights are read, the teacher: they are inputs
TRAINING = ("seed", "engine.precision")
SOLVER = ("trajectories.num_steps", "trajectories.shift", "trajectories.guidance")  # the teacher's own clips
STATES = tuple(f"student.{name}" for name in ("num_steps", "grid", "first_sigmas", "guidance"))
"""What of a student decides which states of a trajectory are kept."""
HELD_OUT = ("eval.condition_seed", "eval.num_conditions", "eval.num_reference")
PROBES = (
    "eval.admit_clips",
    "eval.probes",
    *(f"eval.{name}" for name in EvalConfig.__dataclass_fields__ if name.startswith("probe_")),
)
ADAPTERS = tuple(f"lora.{name}" for name in LoraRoles.__dataclass_fields__ if name not in ("export", "scale"))
REPORT = tuple(f"eval.{name}" for name in EvalConfig.__dataclass_fields__ if name != "batch_size")
REPORTS = ("report.*", "samples/*.mp4")
PACKAGES = ("teachers", "students", "eval", "distill")


@dataclass(frozen=True)
class Stage:
    """`fields`: the dotted recipe fields that `run` reads, without those that an input reads; `inputs`: the stages whose outputs
    it reads; run(artifacts, folder) returns its metrics, and resumes from what it left in `folder` itself. `beside`: patterns of
    what it makes at the top of the run."""

    name: str
    fields: tuple[str, ...]
    inputs: tuple[str, ...]
    run: Callable[[Artifacts, Path], dict]
    beside: tuple[str, ...] = ()


def stages(recipe: Recipe) -> tuple[Stage, ...]:
    """The stages of a recipe, in order."""
    table = [
        Stage("data", ("data", "seed"), (), prepare_data),
        Stage(
            "extractors", (*PROBES, "eval.protocol", "eval.condition_seed", "eval.num_reference"), ("data",), fit_probes
        ),
        Stage("teacher", (*_given("teacher"), *TRAINING), ("data",), train_teacher),
    ]
    if recipe.base is not None:
        table.append(Stage("base", (*_given("base"), *TRAINING), ("data",), train_base))
    if recipe.ar_teacher is not None:
        table.append(_slot(recipe, "ar_teacher"))
    if recipe.corruption is not None:
        table.append(Stage("corrupted", ("corruption", "seed"), ("data",), corrupt))
    if any(recipe.needs(slot).batch != "x0" for slot in recipe.slots):
        fields = ("trajectories", *STATES, *TRAINING)
        table.append(Stage("trajectories", fields, (recipe.solver_stage, recipe.conditions_stage), trajectories.solve))
    table += [
        _slot(recipe, "init"),
        _slot(recipe, "distill"),
        Stage("export", ("name", "lora.export", "lora.scale"), ("distill",), export),
        Stage("evaluate", ("name", "seed", "expect", *SOLVER, *REPORT), ("export",), evaluate, REPORTS),
    ]
    return tuple(table)


def _given(role: str) -> tuple[str, ...]:
    """The fields of a teacher that its weights depend on."""
    return tuple(f"{role}.{name}" for name in TeacherStage.__dataclass_fields__ if name != "sampler")


def _slot(recipe: Recipe, slot: str) -> Stage:
    """The stage of a slot: what its method needs, and what checks the student that it trains."""
    needs = recipe.needs(slot)
    fields = (slot, *SPEC, *TRAINING, *ADAPTERS, "eval.condition_seed")
    data = "data" if slot == "ar_teacher" else recipe.conditions_stage
    inputs, start = ["trajectories" if needs.batch != "x0" else data], recipe.start_of(slot)
    starts_new = recipe.has_custom_network and start == recipe.init_checkpoint
    inputs += needs.frozen if starts_new else (start, *needs.frozen)
    if "fake_score" in needs.trained:
        inputs.append(recipe.init_checkpoint)
    if slot != "ar_teacher":  # its health is compared with the teacher's
        fields, inputs = (*fields, *SOLVER), [*inputs, "teacher"]
    if slot == "distill":
        fields = (*fields, *HELD_OUT)
        fields += ("health",) if recipe.distill.train.stop is not None else ()  # where it ends
    if slot == "distill" or needs.decodes:
        inputs.append("extractors")
    return Stage(slot, tuple(dict.fromkeys(fields)), tuple(dict.fromkeys(inputs)), partial(train_student, slot=slot))


def field_value(recipe: Recipe, field: str) -> Any:
    """The value of a dotted field; None below a part that is not there."""
    value: Any = recipe
    for name in field.split("."):
        value = None if value is None else getattr(value, name)
    return value


def facts(stage: Stage, recipe: Recipe, source_digests: Mapping[str, str]) -> dict[str, Any]:
    """What a stage depends on besides its inputs, as plain data: `field: value` and, where its fields name some, `files`."""
    plain, files = to_plain(recipe, digests=True), {}
    for part in plain.values():  # a training without a seed of its own has the recipe's, given or not
        train = part.get("train") if isinstance(part, dict) else None
        if isinstance(train, dict) and train.get("seed", recipe.seed) is None:
            train["seed"] = recipe.seed
    found: dict[str, Any] = {}
    for field in stage.fields:
        value: Any = plain
        for name in field.split("."):
            value = None if value is None else value[name]
        found[field] = value
        files |= dict(_files(field_value(recipe, field), field))
    if "data" in stage.fields:
        files |= {f"data source: {name}": value for name, value in source_digests.items()}
    return found | ({"files": files} if files else {})


def _files(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """(dotted key, digest) of every file that a path in `value` names, and of a config's own code where it is none of ours. A field
    with metadata {"digest": "source"} is left to the data source, which knows what it reads of its folder."""
    if isinstance(value, Path):
        yield key, digest(value)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _files(item, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _files(item, f"{key}[{i}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        if type(value).__module__.partition(".")[0] not in PACKAGES:
            yield f"{key} code", hashlib.sha256(Path(inspect.getfile(type(value))).read_bytes()).hexdigest()
        for field in dataclasses.fields(value):
            if field.metadata.get("digest") != "source":
                yield from _files(getattr(value, field.name), f"{key}.{field.name}")


def prepare_data(artifacts: Artifacts, folder: Path) -> dict:
    """Clips as latents and features, the codec and encoders that are fitted first."""
    recipe = artifacts.recipe
    return latents.prepare(recipe.data, artifacts.source, recipe.seed, folder, artifacts.engine)


def corrupt(artifacts: Artifacts, folder: Path) -> dict:
    """The training clips again, corrupted."""
    seed, config, source = artifacts.recipe.seed, artifacts.recipe.corruption, artifacts.source
    assert config is not None

    def clips(shards) -> Iterator[Clips]:
        for shard, own in zip(shards, source.train(seed, shards), strict=True):
            yield corrupt_clips(config, own, keyed_generator(seed, "degraded", shard))

    return {"clips": latents.write_shards(source, folder, artifacts.engine, artifacts.encoders, clips).rows}


class Pipeline:
    """The stages of one recipe over one run folder. UserError, before anything is written, where the recipe's parts do not fit."""

    def __init__(self, recipe: Recipe, engine: Engine):
        spec = spec_of(recipe)
        with in_users_file(recipe.data):
            source = recipe.data.open()
        self.stages = {stage.name: stage for stage in stages(recipe)}
        check(recipe, spec, engine)
        reserve(recipe, source)
        check_films(recipe, source)
        folder = RunFolder.open(recipe, engine)
        try:
            if recipe.tiny and engine.is_main:
                write_weights(recipe, spec)
            engine.barrier()
            tracker = metrics_log.open_tracker(recipe, folder.path) if engine.is_main else None
            log = MetricsLog(folder.path / "metrics.jsonl", engine.is_main, tracker)
            self.artifacts = Artifacts(recipe, engine, spec, source, folder, log)
        except BaseException:
            folder.close()
            raise

    def stage(self, name: str) -> dict:
        """Run the stage `name` unless it is done; returns its metrics."""
        stage, artifacts = self.stages[name], self.artifacts
        main = artifacts.engine.is_main  # which alone reads the files that are named
        config = artifacts.engine.from_main(facts(stage, artifacts.recipe, artifacts.source.digests) if main else None)
        return artifacts.folder.stage(name, config, stage.inputs, partial(stage.run, artifacts), stage.beside)

    def run(self) -> None:
        """Run every stage that is not done, and publish the student."""
        for name in self.stages:
            self.stage(name)
        publish(self.artifacts)

    def close(self) -> None:
        """End the log and the lock of the run folder."""
        self.artifacts.log.close()
        self.artifacts.folder.close()


def run(recipe: Recipe) -> Path:
    """Run every stage that is not done and return the run folder. Raises UserError for a user's mistake."""
    metrics_log.check(recipe.tracker)
    engine = Engine(recipe.engine, recipe.threads)
    try:
        pipeline = Pipeline(recipe, engine)
        try:
            if engine.is_main:
                tqdm.write(f"distill: {engine.description}", file=sys.stderr)
            pipeline.run()
            if engine.is_main:
                path = pipeline.artifacts.folder.path
                tqdm.write(f"distill: done: report {path / 'report.html'}, student {path / 'student'}", file=sys.stderr)
        finally:
            pipeline.close()
    except BaseException as error:
        if isinstance(error, RuntimeError):  # of a collective, perhaps, because another rank has ended
            engine.settle()
        engine.close(failed=not isinstance(error, SystemExit))  # which all ranks raise together
        raise
    engine.close()
    return pipeline.artifacts.folder.path


def _check_slot(recipe: Recipe, slot: str) -> None:
    """UserError where the pipeline has not what the method of a slot needs."""
    needs, role = recipe.needs(slot), recipe.trajectories.role
    if unknown := [*(set(needs.trained) - set(TRAINED)), *(set(needs.frozen) - set(FROZEN))]:
        raise UserError(
            f"{slot}.method: no role '{unknown[0]}' to be had; train {', '.join(TRAINED)}, freeze {', '.join(FROZEN)}"
        )
    if needs.trained[:1] != ("student",):
        raise UserError(
            f"{slot}.method: it trains {', '.join(needs.trained) or 'nothing'}; a slot trains the student first"
        )
    if needs.batch == "forced" and role != "ar_teacher":
        raise UserError(f"trajectories.role: got {role}; {slot}.method.context: data needs role: ar_teacher")
    if needs.batch == "trajectories" and role == "ar_teacher":
        raise UserError(f"trajectories.role: ar_teacher is for {slot}.method.context: data; use teacher")


def check_films(recipe: Recipe, source: ClipSource) -> None:
    """UserError where a stage is trained on films, and there are none; or where conditions without films would be corrupted."""
    if recipe.corruption is not None and source.num_films < source.num_train:
        raise UserError("corruption: of films alone; remove it, or use data.name=folder")
    if source.num_films:
        return
    given = {"teacher": recipe.teacher, "base": recipe.base}
    trains = [name for name, part in given.items() if part is not None and part.is_trained]
    needs = {slot: recipe.needs(slot) for slot in recipe.slots}
    learns = [slot for slot, need in needs.items() if need.takes_films_alone or need.films == "some"]
    if learns := trains + learns:
        raise UserError(
            f"{learns[0]} is trained on films, of which these data train on none; give some (data.train_on_films=true), or a "
            "teacher, method@init=ode_init and method@distill=dmd, which need none"
        )


def check(recipe: Recipe, spec: Spec, engine: Engine) -> None:
    """UserError where methods, trajectories and networks do not fit together or a teacher is missing."""
    for slot in recipe.slots:
        _check_slot(recipe, slot)
    for name in ("teacher", "base", "ar_teacher", "init"):
        train = field_value(recipe, f"{name}.train")
        if train is not None and train.stop is not None:
            raise UserError(f"{name}.train.stop: only distill is validated while it trains; remove it")
    needs = recipe.needs("init")
    if spec.guidance is not None and needs.batch == "x0":
        raise UserError("student.guidance: init learns it from trajectories; use method@init=ode_init")
    if recipe.base is not None and recipe.base.path is not None and recipe.init.train.num_steps == 0:
        checkpoint.check_sampler(spec, weights_file(recipe.base.path), "the recipe")  # a student that is taken as it is
    if recipe.start_of("init") == "ar_teacher" and recipe.ar_teacher is None:
        raise UserError("init asks for an autoregressive teacher: add method@ar_teacher=forcing")
    if recipe.has_custom_network and needs.batch == "trajectories":
        raise UserError(
            "init: a student with a network of its own has a teacher of its own: add method@init=ode_init_causal"
        )
    if recipe.has_custom_network:
        if recipe.lora is not None or engine.kind == "zero3":
            kind = name_of(NETWORKS, spec.network)
            raise UserError(
                f"student.network: {kind} is trained whole: remove lora, use engine=local, ddp, zero1, zero2 or fsdp2"
            )
        with torch.device("meta"):
            checkpoint.make_student(spec)  # its parts fit
    if recipe.lora is not None:
        config = recipe.teacher if recipe.base is None else recipe.base
        lora.check(config.precision, engine.config.precision, engine.kind)
        if getattr(recipe.init.method, "kind", "") == "continuous" and engine.config.precision != "fp32":
            raise UserError("lora: init.method.kind continuous differentiates in fp32; set fp32 in both precisions")
