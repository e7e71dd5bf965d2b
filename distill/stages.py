"""The pipeline: data -> teacher -> trajectories -> init -> dmd -> export -> evaluate, each stage fingerprinted and resumable."""

import copy
import hashlib
import json
import shutil
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distill import trajectories
from distill.data import avatars
from distill.engine import Engine
from distill.methods import Batch
from distill.run_folder import MetricsLog, RunFolder, load_tensors, save_tensors
from distill.train import TrainConfig, Trainer, batch_rows, train
from students import checkpoint
from students.causal_wan import CausalWan
from students.checkpoint import Bundle, make_student
from students.spec import Spec, student_sigmas
from teachers.flow import keyed_generator
from teachers.typed import module_name, to_plain
from teachers.wan import AvatarTeacher, AvatarTransformer, NetworkConfig, build_network

if TYPE_CHECKING:
    from distill.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class TeacherStage:
    """The teacher's network and how it is trained here."""

    network: NetworkConfig
    method: Any = field(metadata={"named": "distill.methods"})
    train: TrainConfig


@dataclass(frozen=True, kw_only=True)
class MethodStage:
    """A training stage of the student."""

    method: Any = field(metadata={"named": "distill.methods"})
    train: TrainConfig


def run(recipe: "Recipe") -> Path:
    """Run every stage that is not done and return the run folder. Raises UserError for a user's mistake."""
    engine = Engine(recipe.engine, recipe.threads)
    try:
        pipeline = Pipeline(recipe, engine)
        for name in ("data", "extractors", "teacher", "trajectories", "init", "dmd", "export", "evaluate"):
            pipeline.stage(name)
        pipeline.publish()
        return pipeline.folder.path
    finally:
        engine.close()


def spec_of(recipe: "Recipe") -> Spec:
    """The student's spec as the recipe says it; UserError where its parts do not fit."""
    data, student = recipe.data, recipe.student
    return Spec(
        height=data.world.resolution,
        width=data.world.resolution,
        fps=Fraction(data.world.fps),
        chunk_frames=student.chunk_frames,
        sigmas=student_sigmas(student.num_steps, recipe.trajectories.shift),
        horizon_frames=data.latent_frames,
        history=student.history,
        network=recipe.teacher.network,
        codec=data.codec,
        audio=data.audio,
        text=data.text,
    )


class Pipeline:
    """The stages of one recipe over one run folder; what a stage reads is loaded when it is first asked for."""

    def __init__(self, recipe: "Recipe", engine: Engine):
        self.recipe, self.engine = recipe, engine
        self.spec = spec_of(recipe)
        self.folder = RunFolder.open(recipe, engine)
        self.log = MetricsLog(self.folder.path / "metrics.jsonl", engine.is_main)

    def stage(self, name: str) -> dict:
        """Run the stage `name` unless it is done; returns its metrics."""
        recipe = to_plain(self.recipe)
        student = {"student": recipe["student"], "seed": recipe["seed"]}
        probes = {k: v for k, v in recipe["eval"].items() if k.startswith("probe_")}
        config, inputs = {
            "data": ({"data": recipe["data"], "seed": recipe["seed"]}, ()),
            "extractors": (probes, ("data",)),
            "teacher": ({"teacher": recipe["teacher"], "seed": recipe["seed"]}, ("data",)),
            "trajectories": ({"trajectories": recipe["trajectories"], **student}, ("teacher",)),
            "init": ({"init": recipe["init"], **student}, ("trajectories",)),
            "dmd": ({"dmd": recipe["dmd"], **student}, ("init", "extractors")),
            "export": ({}, ("dmd",)),
            "evaluate": ({"eval": recipe["eval"]}, ("export",)),
        }[name]
        return self.folder.stage(name, config, inputs, getattr(self, f"_{name}"))

    @cached_property
    def senses(self) -> avatars.Senses:
        return avatars.load_senses(self.recipe.data, self.folder.stage_dir("data"))

    @cached_property
    def pool(self) -> avatars.Pool:
        return avatars.load_pool(self.folder.stage_dir("data"))

    @cached_property
    def probes(self):
        from eval.extractors import Probes

        return Probes.load(self.folder.stage_dir("extractors"))

    def _new_network(self) -> AvatarTransformer:
        """An untrained network, initialised from the recipe's seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_generator(self.recipe.seed, "network").initial_seed())
            text, audio = self.recipe.data.text.dim, self.senses.ears.dim
            return build_network(
                self.recipe.teacher.network,
                latent_channels=self.spec.codec.channels,
                stride=self.spec.codec.stride,
                text_dim=text,
                audio_dim=audio,
            )

    def _weights(self, stage: str) -> dict[str, Tensor]:
        return load_tensors(self.folder.stage_dir(stage) / "model.safetensors")

    @cached_property
    def teacher(self) -> AvatarTeacher:
        """The trained teacher, frozen."""
        return AvatarTeacher(self._filled(self._new_network(), "teacher")).eval().requires_grad_(False)

    def student(self, stage: str) -> CausalWan:
        """A student with the weights of a finished stage (teacher: untrained student, zero-shot)."""
        student = make_student(self.spec)
        self._filled(student.net, stage)
        return student.to(self.engine.device)

    def _filled(self, net: AvatarTransformer, stage: str) -> AvatarTransformer:
        checkpoint.fill(net, self._weights(stage), self.folder.stage_dir(stage) / "model.safetensors")
        return net.to(self.engine.device)  # pyright: ignore[reportArgumentType]  # diffusers wraps it

    @property
    def teacher_hash(self) -> str:
        """sha256 of the teacher's weights file."""
        return hashlib.sha256((self.folder.stage_dir("teacher") / "model.safetensors").read_bytes()).hexdigest()

    def _data(self, folder: Path) -> dict:
        return avatars.prepare(self.recipe.data, self.recipe.seed, folder, self.engine)

    def _extractors(self, folder: Path) -> dict:
        from distill.judging import fit_probes

        return fit_probes(self, folder)

    def _teacher(self, folder: Path) -> dict:
        config = self.recipe.teacher
        teacher = AvatarTeacher(self._new_network()).to(self.engine.device)
        return self._train("teacher", config, folder, {"teacher": teacher}, {}, self.pool.batch, len(self.pool))

    def _trajectories(self, folder: Path) -> dict:
        return trajectories.make(
            self.teacher,
            self.teacher_hash,
            self.pool,
            self.recipe.trajectories,
            self.spec.sigmas,
            seed=self.recipe.seed,
            folder=folder,
            engine=self.engine,
        )

    def _init(self, folder: Path) -> dict:
        pairs = trajectories.load(self.folder.stage_dir("trajectories"), self.spec.sigmas, self.teacher_hash)

        def batch(rows: Tensor, device) -> Batch:
            return pairs.batch(self.pool, rows, device)

        roles = {"student": self.student("teacher")}
        return self._train("init", self.recipe.init, folder, roles, {}, batch, len(pairs.rows), grid=pairs.sigmas)

    def _dmd(self, folder: Path) -> dict:
        from distill.judging import Validation

        roles = {
            "student": self.student("init"),
            "fake_score": copy.deepcopy(self.teacher).train().requires_grad_(True),
        }
        validation = Validation(self, roles["student"])
        grid = (*self.spec.sigmas, 0.0)
        return self._train(
            "dmd",
            self.recipe.dmd,
            folder,
            roles,
            {"teacher": self.teacher},
            self.pool.batch,
            len(self.pool),
            grid,
            validation,
        )

    def _train(self, stage, config, folder, roles, frozen, batch_of, size, grid=None, validate=None) -> dict:
        """Train `roles` with the stage's method; model.safetensors is the averaged (with validation: the best) weights."""
        from importlib import import_module

        engine, seed = self.engine, self.recipe.seed
        method = import_module(f"distill.methods.{module_name(config.method)}").build(
            config.method, {**roles, **frozen}, grid
        )
        average = next(iter(roles))
        trainer = Trainer(engine, config.train, roles, average, folder)

        def batches(position: int) -> Batch:
            rows = batch_rows(size, config.train.batch_size, position, seed, engine.rank, engine.world_size)
            return batch_of(rows, engine.device)

        train(trainer, method, batches, stage=stage, seed=seed, log=self.log, validate=validate)
        if engine.is_main:
            trainer.ema.copy_to(roles[average])
            state = roles[average].state_dict()
            if trainer.best is not None:
                state = torch.load(folder / "best.pt", map_location="cpu", weights_only=True)
            save_tensors(folder / "model.safetensors", {k.removeprefix("net."): v for k, v in state.items()})
        parameters = sum(p.numel() for p in roles[average].parameters())
        return {
            "steps": config.train.num_steps,
            "parameters": parameters,
            **({"best": trainer.best} if trainer.best else {}),
        }

    def bundle(self, student: CausalWan) -> Bundle:
        """A student with this run's senses, ready for a session."""
        return Bundle(student.eval(), self.senses.codec, self.senses.ears, self.senses.text)

    def _export(self, folder: Path) -> dict:
        if self.engine.is_main:
            best = (self.folder.finished("dmd") or {}).get("metrics", {})
            card = (
                f"# Student of {self.recipe.name}\n\nA causal {len(self.spec.sigmas)}-step audio-driven avatar student, distilled "
                f"by avatar-distill from a teacher on the embedded procedural world. Not trained on faces of people.\n\n"
                f"```json\n{json.dumps({'dmd': best}, indent=1)}\n```\n\n"
                "    distill sample --student . --image PORTRAIT.png --audio SPEECH.wav --text 'smiles and nods' --out out.mp4\n"
            )
            checkpoint.save_student(folder / "student", self.bundle(self.student("dmd")), card)
        self.engine.barrier()
        return {
            "nfe_per_chunk": self.spec.nfe_per_chunk,
            "parameters": sum(p.numel() for p in self.student("dmd").parameters()),
        }

    def publish(self) -> None:
        """The exported student at the top of the run folder; a copy of the export stage's."""
        target = self.folder.path / "student"
        if self.engine.is_main and not (target / "spec.json").is_file():
            shutil.rmtree(target, ignore_errors=True)
            partial = target.with_name(".student.tmp")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(self.folder.stage_dir("export") / "student", partial)
            partial.rename(target)
        self.engine.barrier()

    def _evaluate(self, folder: Path) -> dict:
        from distill.evaluate import evaluate

        return evaluate(self, folder)
