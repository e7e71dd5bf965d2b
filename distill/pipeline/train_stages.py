"""The stages that train: networks of the teacher's kind, and the student by the method of a slot (ar_teacher, init, distill).

A slot takes any method whose roles can be built here: it may train those of TRAINED, the student first, against those of
FROZEN. Its batches are clips, or stored trajectories where the method needs those.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from distill import methods
from distill.data.order import AHEAD, Positions, batch_rows
from distill.methods import Batch
from distill.methods.critics.discriminator import Discriminator, build_discriminator
from distill.pipeline import trajectories
from distill.pipeline.artifacts import Artifacts
from distill.pipeline.clip_reader import ClipReader
from distill.pipeline.evaluation.health import HealthCheck, logged, outcome, readiness
from distill.pipeline.evaluation.validation import Validation
from distill.pipeline.pretrained import load_given, write_config
from distill.recipe import MethodStage, TeacherStage
from distill.training import lora
from distill.training.lifecycle.selection import LEFT
from distill.training.loop import train
from distill.training.trainer import Trainer
from students.serving.optimize import compile_blocks, set_attention
from teachers.checkpoints.strict import check_finite
from teachers.files import save_tensors
from teachers.flow import keyed_generator
from teachers.networks.kind import AvatarTeacher, networks_in

TRAINED, FROZEN = ("student", "fake_score", "discriminator"), ("teacher", "ar_teacher")


def train_teacher(artifacts: Artifacts, folder: Path, stage: str = "teacher") -> dict:
    """Train a network of the teacher's kind; one that is given is only checked for names and shapes."""
    config, data = artifacts.config(stage), artifacts.train_set
    if not config.is_trained:
        net = load_given(config, artifacts.spec, torch.device("meta"))
        return {"parameters": sum(p.numel() for p in net.parameters()), "path": str(config.path)}
    device = artifacts.engine.device
    net = load_given(config, artifacts.spec, device, frozen=False) if config.path else artifacts.new_network(stage)
    roles = {"teacher": AvatarTeacher(artifacts.engine.split(net)).to(device)}
    found = run_training(artifacts, stage, config, folder, roles, (), data.batch, data.num_films)
    if config.network.layouts and artifacts.engine.is_main:
        write_config(folder, config.network, artifacts.spec)
    return found


def train_base(artifacts: Artifacts, folder: Path) -> dict:
    """Train the network that student and fake score start from."""
    return train_teacher(artifacts, folder, "base")


def train_student(artifacts: Artifacts, folder: Path, slot: str) -> dict:
    """Train the student by the method of a slot; `distill` is validated while it trains, the others are checked at their end."""
    recipe, spec = artifacts.recipe, artifacts.spec
    config, needs, start = getattr(recipe, slot), recipe.needs(slot), recipe.start_of(slot)
    artifacts.release(needs.frozen)
    roles = {name: _trained_role(artifacts, name, start) for name in needs.trained}
    if slot == "init" and spec.guidance is not None:
        roles["student"].net.add_guidance(len(spec.guidance.names))
    data = artifacts.train_set if slot == "ar_teacher" else artifacts.student_train_set
    batch_of, grid = data.batch, (*spec.sigmas, 0.0)
    size = data.num_films if needs.takes_films_alone else len(data)
    if needs.batch != "x0":
        pairs = trajectories.load(
            artifacts.folder.stage_dir("trajectories"), spec.sigmas, trajectories.made_by(artifacts)
        )
        size, grid = len(pairs.rows), pairs.sigmas

        def batch_of(rows: Tensor, device: torch.device) -> Batch:
            return pairs.batch(data, rows, device)

    if slot != "distill":
        metrics = run_training(artifacts, slot, config, folder, roles, needs.frozen, batch_of, size, grid)
        roles.clear()
        return metrics | {"health": check_health(artifacts, slot, folder)}
    check = Validation(artifacts, roles["student"], folder)
    check_and_alarm = (check, check.collapse)
    found = run_training(artifacts, slot, config, folder, roles, needs.frozen, batch_of, size, grid, *check_and_alarm)
    if "best" in found:
        alarms = check.alarms(found["best"])
        found["best"].pop(LEFT, None)
        found["outcome"] = outcome(logged(found["best"]), check.teacher, recipe.health.healthy, alarms)
        if artifacts.engine.is_main:
            tqdm.write(f"distill: student: {found['outcome']}", file=sys.stderr)
    return found


def _trained_role(artifacts: Artifacts, name: str, start: str) -> Any:
    """A role to be trained, with the weights that it starts from."""
    if name == "student":
        return artifacts.trainee(start)
    return artifacts.fake_score() if name == "fake_score" else _new_discriminator(artifacts)


def _new_discriminator(artifacts: Artifacts) -> Discriminator:
    recipe = artifacts.recipe
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_generator(recipe.seed, "discriminator").initial_seed())
        return build_discriminator(artifacts.config(recipe.init_checkpoint).network).to(artifacts.engine.device)


def run_training(
    artifacts: Artifacts,
    stage: str,
    config: TeacherStage | MethodStage,
    folder: Path,
    roles: Mapping[str, Any],
    frozen: Sequence[str],
    batch_of: Callable[[Tensor, torch.device], Batch],
    size: int,
    grid: tuple[float, ...] = (),
    validate: Callable[[], dict[str, Any]] | None = None,
    alarm: Callable[[Mapping[str, Any]], str | None] | None = None,
) -> dict:
    """Train `roles` with the stage's method on batches of rows of `size`; model.safetensors holds the averaged weights of the first
    role (with validation: the best of them)."""
    engine, settings = artifacts.engine, config.train
    assert settings is not None
    seed = artifacts.recipe.seed if settings.seed is None else settings.seed
    if engine.config.checkpointing:
        for network in (net for role in roles.values() for net in networks_in(role)):
            network.kind.enable_checkpointing(network)
    _make_fast(artifacts, roles)
    average = next(iter(roles))
    parameters = sum(p.numel() for p in roles[average].parameters())
    trainer = Trainer(engine, settings, roles, average, folder)

    @torch.autocast(engine.device.type, enabled=False)  # whichever thread makes it
    def make(position: int) -> Batch:
        rows = batch_rows(size, settings.batch_size, position, seed, engine.data_rank, engine.data_ranks)
        batch = batch_of(rows, torch.device("cpu"))
        return batch.map(Tensor.pin_memory) if engine.device.type == "cuda" else batch

    ahead = 0 if engine.device.type == "cpu" else AHEAD
    with artifacts.training(frozen), closing(Positions(make, ahead)) as made:
        held = {name: artifacts.frozen(name) for name in frozen}
        _make_fast(artifacts, held)
        if methods.needs(config.method).decodes:
            held["clip_reader"] = ClipReader(artifacts, settings.batch_size)
        method = methods.build(config.method, {**roles, **held}, grid)

        def batches(position: int) -> Batch:
            return made(position).map(lambda value: value.to(engine.device, non_blocking=True))

        train(trainer, method, batches, stage=stage, seed=seed, log=artifacts.log, validate=validate, alarm=alarm)
    _save_averaged(trainer, folder)
    return {
        "steps": trainer.step,
        "parameters": parameters,
        **({"trained": sum(p.numel() for p in trainer.trained[average].values())} if artifacts.recipe.lora else {}),
        **({"best": dict(trainer.best)} if trainer.best else {}),
        **({"ended": trainer.selection.ended} if trainer.selection.ended else {}),
    }


def _make_fast(artifacts: Artifacts, roles: Mapping[str, Any]) -> None:
    """The engine's attention backend and compiled blocks in every network of these roles."""
    for network in (net for role in roles.values() for net in networks_in(role)):
        set_attention(network, artifacts.engine.config.attention)
        compile_blocks(network, artifacts.engine.config.compile, artifacts.spec)


def _save_averaged(trainer: Trainer, folder: Path) -> None:
    """model.safetensors, by rank 0; UserError on every rank for weights that are not finite or cannot be written."""
    path = folder / "model.safetensors"

    def write(state: Mapping[str, Tensor]) -> None:
        named = {lora.stored_name(k.removeprefix("net.")): v for k, v in state.items()}
        check_finite(named, folder, "train it again with a lower learning rate")
        save_tensors(path, named)

    trainer.hand_on(path, write)


def check_health(artifacts: Artifacts, slot: str, folder: Path) -> dict[str, Any]:
    """The health metrics of the student that a slot has trained; of `init` beside the teacher's, with the quality gate, which is
    printed."""
    artifacts.engine.barrier()  # its weights are on the disk
    artifacts.release(())  # the teacher is loaded again when its turn comes
    check = HealthCheck(artifacts)
    with artifacts.codec_alone():
        own = check.student(artifacts.finished_student(slot))
    found: dict[str, Any] = {"num_conditions": check.num, slot: own}
    if not any("health/noise" in row for row in artifacts.log.rows(slot)):
        steps = getattr(artifacts.recipe, slot).train.num_steps
        artifacts.log.write(slot, steps, {f"health/{name}": value for name, value in own.items()})
    if slot == "init":
        with artifacts.codec_alone():
            found["teacher"] = check.teacher(folder)
        found["readiness"] = readiness(own, found["teacher"], artifacts.recipe.health.ready)
        if artifacts.engine.is_main:
            tqdm.write(f"distill: init: {found['readiness']}", file=sys.stderr)
    return found
