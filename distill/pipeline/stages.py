"""The pipeline: data -> teacher -> trajectories -> init -> dmd -> export -> evaluate, each stage fingerprinted and resumable."""

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from distill.data import latents
from distill.data.order import batch_rows
from distill.data.procedural.corruption import corrupt_clips
from distill.data.source import Clips
from distill.methods import Batch, Needs
from distill.methods.discriminator import Discriminator, build_discriminator
from distill.methods.forcing import Forced
from distill.pipeline import trajectories
from distill.pipeline.artifacts import Artifacts
from distill.pipeline.pretrained import digest, load_given
from distill.pipeline.run_folder import RunFolder
from distill.recipe import spec_of
from distill.training import lora, metrics_log
from distill.training.engine import Engine
from distill.training.loop import Trainer, train
from distill.training.metrics_log import MetricsLog
from students.networks.midas_net import MidasNet
from students.schedule import Schedule
from students.spec import NETWORKS
from students.weights import checkpoint
from students.weights.adapter import Adapter, Base
from teachers.config import kind_name, module_name, to_plain
from teachers.errors import UserError
from teachers.files import load_tensors, save_tensors, staged
from teachers.flow import keyed_generator
from teachers.networks.wan import AvatarTeacher, AvatarTransformer

if TYPE_CHECKING:
    from distill.recipe import Recipe


def run(recipe: "Recipe") -> Path:
    """Run every stage that is not done and return the run folder. Raises UserError for a user's mistake."""
    metrics_log.check(recipe.tracker)
    engine = Engine(recipe.engine, recipe.threads)
    try:
        pipeline = Pipeline(recipe, engine)
        try:
            for name in pipeline.names:
                pipeline.stage(name)
            pipeline.publish()
        finally:
            pipeline.log.close()
        return pipeline.folder.path
    finally:
        engine.close()


class Pipeline(Artifacts):
    """The stages of one recipe over one run folder."""

    def __init__(self, recipe: "Recipe", engine: Engine):
        self.recipe, self.engine = recipe, engine
        self.spec = spec_of(recipe)
        self.source = recipe.data.open()
        base = () if recipe.base is None else ("base",)
        causal = () if recipe.ar_teacher is None else ("ar_teacher",)
        pairs = () if self.needs("init").batch == "x0" else ("trajectories",)
        worse = () if recipe.corruption is None else ("corrupted",)
        given = ("data", "extractors", "teacher", *base, *causal, *worse)
        self.names = (*given, *pairs, "init", "dmd", "export", "evaluate")
        self._check_roles()
        self.folder = RunFolder.open(recipe, engine)
        if recipe.tiny and engine.is_main:
            from distill.pipeline.tiny import write_weights

            write_weights(recipe, self.spec)
        engine.barrier()
        tracker = metrics_log.open_tracker(recipe, self.folder.path) if engine.is_main else None
        self.log = MetricsLog(self.folder.path / "metrics.jsonl", engine.is_main, tracker)

    def stage(self, name: str) -> dict:
        """Run the stage `name` unless it is done; returns its metrics."""
        recipe = to_plain(self.recipe)
        plain = {"schedule": to_plain(Schedule()), "history_noise": None, "network": None}
        # A fingerprint names what differs from the plain student.
        facts = {key: value for key, value in recipe["student"].items() if key not in plain or value != plain[key]}
        student = {"student": facts, "seed": recipe["seed"]}
        adapters, export = self._adapters()
        probes = {k: v for k, v in recipe["eval"].items() if k.startswith("probe_")}
        config, inputs = {
            "data": ({"data": recipe["data"], "seed": recipe["seed"], **self._given_parts(), **self.source.given}, ()),
            "extractors": (probes, ("data",)),
            "teacher": (self._stage_config("teacher"), ("data",)),
            "base": (self._stage_config("base"), ("data",)),
            "corrupted": ({"corruption": recipe["corruption"]}, ("data",)),
            "trajectories": ({"trajectories": recipe["trajectories"], **student}, (self._solver, self.pool_stage)),
            "ar_teacher": (
                {"ar_teacher": recipe["ar_teacher"], **student, **adapters, **self._language_model()},
                (self.origin, "data"),
            ),
            "init": ({"init": recipe["init"], **student, **adapters}, self._init_inputs),
            "dmd": ({"dmd": recipe["dmd"], **student, **adapters}, ("init", "extractors")),
            "export": (export, ("dmd",)),
            "evaluate": ({"eval": recipe["eval"]}, ("export",)),
        }[name]
        return self.folder.stage(name, config, inputs, getattr(self, f"_{name}"))

    @property
    def _solver(self) -> str:
        """The stage of the network that solves trajectories."""
        role = self.recipe.trajectories.role
        return self.origin if role == "base" else role

    def needs(self, stage: str) -> Needs:
        """What the method of a training stage asks for."""
        method = getattr(self.recipe, stage).method
        return import_module(f"distill.methods.{module_name(method)}").needs(method)

    @property
    def _init_inputs(self) -> tuple[str, ...]:
        """The stages that `init` reads."""
        data = self.pool_stage if self.needs("init").batch == "x0" else "trajectories"
        return (data, self._start)

    @property
    def _start(self) -> str:
        """The stage whose weights `init` starts from: an autoregressive teacher's, where the method or the network has one."""
        needs = self.needs("init")
        forced = "ar_teacher" in needs.frozen or needs.batch == "forced"
        causal = self.own_network or forced or self.recipe.init.start is not None
        return "ar_teacher" if causal else self.origin

    def _check_roles(self) -> None:
        """UserError where init and trajectories do not fit together or a teacher is missing."""
        needs, role = self.needs("init"), self.recipe.trajectories.role
        if self.recipe.dmd.start or (self.recipe.ar_teacher and self.recipe.ar_teacher.start):
            raise UserError("start: only init may start from the ar_teacher; leave it out of the other stages")
        if self.spec.guidance is not None and needs.batch == "x0":
            raise UserError("student.guidance: init learns it from trajectories; use method@init=ode_init")
        if needs.batch == "forced" and role != "ar_teacher":
            raise UserError(f"trajectories.role: got {role}; init.method.context: data needs role: ar_teacher")
        if needs.batch == "trajectories" and role == "ar_teacher":
            raise UserError("trajectories.role: ar_teacher is for init.method.context: data; use teacher")
        if self._start == "ar_teacher" and self.recipe.ar_teacher is None:
            raise UserError("init asks for an autoregressive teacher: add method@ar_teacher=forcing")
        if self.own_network and needs.batch == "trajectories":
            raise UserError(
                "init: a student with a network of its own has a teacher of its own: add method@init=ode_init_causal"
            )
        whole = self.recipe.lora is None and self.engine.kind != "zero3"
        if self.own_network and not whole:
            kind = kind_name(NETWORKS, self.spec.network)
            raise UserError(
                f"student.network: {kind} is trained whole: leave lora out, engine=local, ddp, zero1, zero2 or fsdp2"
            )
        if self.own_network:
            with torch.device("meta"):
                checkpoint.make_student(self.spec)  # its parts fit
        if self.recipe.lora is not None:
            lora.check(self.config(self.origin).precision, self.engine.config.precision, self.engine.kind)
            if getattr(self.recipe.init.method, "kind", "") == "continuous" and self.engine.config.precision != "fp32":
                raise UserError("lora: init.method.kind continuous differentiates in fp32; say fp32 in both precisions")

    def _adapters(self) -> tuple[dict, dict]:
        """What LoRA roles add to the configs of the stages that train them, and of export; nothing without them."""
        if self.recipe.lora is None:
            return {}, {}
        values = to_plain(self.recipe.lora)
        return {"lora": {k: v for k, v in values.items() if k != "export"}}, {"export": values["export"]}

    def _stage_config(self, stage: str) -> dict:
        """What the stage of a network depends on: its config, and which files it reads."""
        if stage == "base" and self.recipe.base is None:
            return {}
        config = self.config(stage)
        given = {"weights": digest(config.path, config.wan)} if config.path else {}
        return {stage: to_plain(config), "seed": self.recipe.seed, **given}

    def _language_model(self) -> dict:
        """Which file a student of its own network starts from."""
        llm = getattr(self.recipe.student.network, "llm", None)
        return {} if llm is None else {"language model": digest(llm)}

    def _given_parts(self) -> dict:
        """Which files the codec, ears and text encoder that are given read."""
        paths = {f.name: getattr(getattr(self.recipe.data, f.name), "path", None) for f in fields(self.recipe.data)}
        return {f"{name} weights": digest(path) for name, path in paths.items() if path is not None}

    @property
    def solver_hash(self) -> str:
        """Which weights solved the trajectories."""
        done = self.folder.finished(self._solver)
        assert done is not None
        return done["fingerprint"]

    def _data(self, folder: Path) -> dict:
        return latents.prepare(self.recipe.data, self.source, self.recipe.seed, folder, self.engine)

    def _corrupted(self, folder: Path) -> dict:
        seed, worse = self.recipe.seed, self.recipe.corruption
        assert worse is not None

        def clips(shards: Sequence[int]) -> Iterator[Clips]:
            for shard, own in zip(shards, self.source.train(seed, shards), strict=True):
                yield corrupt_clips(worse, own, keyed_generator(seed, "degraded", shard))

        return {"clips": latents.write_shards(self.source, folder, self.engine, self.encoders, clips)}

    def _extractors(self, folder: Path) -> dict:
        from distill.pipeline.validation import fit_probes

        return fit_probes(self, folder)

    def _teacher(self, folder: Path, stage: str = "teacher") -> dict:
        config = self.config(stage)
        if not config.is_trained:
            net = load_given(config, self.spec, torch.device("meta"))  # names and shapes fit
            return {"parameters": sum(p.numel() for p in net.parameters()), "path": str(config.path)}
        net = (
            load_given(config, self.spec, self.engine.device, frozen=False) if config.path else self._new_network(stage)
        )
        teacher = AvatarTeacher(net).to(self.engine.device)
        return self._train(stage, config, folder, {"teacher": teacher}, {}, self.pool.batch, len(self.pool))

    def _base(self, folder: Path) -> dict:
        return self._teacher(folder, "base")

    def _ar_teacher(self, folder: Path) -> dict:
        config = self.recipe.ar_teacher
        roles = {"student": self.trainee(self.origin)}
        metrics = self._train("ar_teacher", config, folder, roles, {}, self.pool.batch, len(self.pool))
        return metrics | self._health("ar_teacher", folder)

    def _solver_of(self, batch: Batch) -> Any:
        """What solves the trajectories of a batch."""
        if self._solver == "ar_teacher":
            assert batch.x0 is not None
            return Forced(self.ar_teacher, batch.x0)
        return self.teacher if self._solver == "teacher" else self._base_solver

    @cached_property
    def _base_solver(self) -> AvatarTeacher:
        net = self.network(self._solver) if self.recipe.lora is None else self.backbone
        return AvatarTeacher(net).eval().requires_grad_(False)

    def _trajectories(self, folder: Path) -> dict:
        return trajectories.make(
            self._solver_of,
            self.solver_hash,
            self.given,
            self.recipe.trajectories,
            self.spec.sigmas,
            seed=self.recipe.seed,
            folder=folder,
            engine=self.engine,
            told=self.spec.guidance,
        )

    def _init(self, folder: Path) -> dict:
        needs, roles = self.needs("init"), {"student": self.trainee(self._start)}
        if needs.batch == "x0":
            frozen = {name: getattr(self, name) for name in needs.frozen}
            metrics = self._train("init", self.recipe.init, folder, roles, frozen, self.given.batch, len(self.given))
            return metrics | self._health("init", folder)
        if self.spec.guidance is not None:
            roles["student"].net.add_guidance()
        pairs = trajectories.load(self.folder.stage_dir("trajectories"), self.spec.sigmas, self.solver_hash)

        def batch(rows: Tensor, device) -> Batch:
            return pairs.batch(self.given, rows, device)

        metrics = self._train("init", self.recipe.init, folder, roles, {}, batch, len(pairs.rows), grid=pairs.sigmas)
        return metrics | self._health("init", folder)

    def _health(self, stage: str, folder: Path) -> dict:
        """The health panel of the student that a stage has trained; of `init` beside the teacher's, with a verdict that is told."""
        from distill.pipeline.health import Checkup, verdict

        self.engine.barrier()  # its weights are on the disk
        checkup = Checkup(self)
        own = checkup.student(self.student(stage).eval())
        found: dict[str, Any] = {"num_conditions": checkup.num, stage: own}
        if not any("health/noise" in row for row in self.log.rows(stage)):
            steps = getattr(self.recipe, stage).train.num_steps
            self.log.write(stage, steps, {f"health/{name}": value for name, value in own.items()})
        if stage == "init":
            found["teacher"] = checkup.teacher(folder)
            found["verdict"] = verdict(own, found["teacher"], self.recipe.health.ready)
            if self.engine.is_main:
                tqdm.write(f"distill: init: {found['verdict']}", file=sys.stderr)
        return {"health": found}

    def _new_discriminator(self) -> Discriminator:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_generator(self.recipe.seed, "discriminator").initial_seed())
            blocks = self.recipe.dmd.method.gan_blocks
            return build_discriminator(self.config(self.origin).network, blocks).to(self.engine.device)

    def _dmd(self, folder: Path) -> dict:
        from distill.pipeline.validation import Validation

        if self.recipe.lora is None:
            score = self.network(self.origin, frozen=False).train().requires_grad_(True)
            if self.spec.guidance is not None:
                score.add_guidance()
        else:
            score = self.adapted("fake_score", self.origin)
        roles = {"student": self.trainee("init"), "fake_score": AvatarTeacher(score)}
        if "discriminator" in self.needs("dmd").trained:
            roles["discriminator"] = self._new_discriminator()
        validation = Validation(self, roles["student"], folder)
        grid = (*self.spec.sigmas, 0.0)
        return self._train(
            "dmd",
            self.recipe.dmd,
            folder,
            roles,
            {"teacher": self.teacher},
            self.given.batch,
            len(self.given),
            grid,
            validation,
            validation.collapse,
        )

    def _train(
        self, stage, config, folder, roles, frozen, batch_of, size, grid=None, validate=None, alarm=None
    ) -> dict:
        """Train `roles` with the stage's method; model.safetensors is the averaged (with validation: the best) weights."""
        engine, seed = self.engine, self.recipe.seed
        if engine.config.checkpointing:
            for network in (part for role in roles.values() for part in role.modules()):
                if isinstance(network, AvatarTransformer | MidasNet):
                    network.enable_gradient_checkpointing()
        average = next(iter(roles))
        parameters = sum(p.numel() for p in roles[average].parameters())
        frozen = {name: engine.freeze(net) for name, net in frozen.items()}
        method = import_module(f"distill.methods.{module_name(config.method)}").build(
            config.method, {**roles, **frozen}, grid
        )
        trainer = Trainer(engine, config.train, roles, average, folder)

        def batches(position: int) -> Batch:
            rows = batch_rows(size, config.train.batch_size, position, seed, engine.rank, engine.world_size)
            return batch_of(rows, engine.device)

        train(trainer, method, batches, stage=stage, seed=seed, log=self.log, validate=validate, alarm=alarm)
        state = trainer.averaged()
        if engine.is_main:
            if trainer.best is not None:
                state = torch.load(folder / "best.pt", map_location="cpu", weights_only=True)
            named = {lora.stored_name(k.removeprefix("net.")): v for k, v in state.items()}
            save_tensors(folder / "model.safetensors", named)
        return {
            "steps": config.train.num_steps,
            "parameters": parameters,
            **({"trained": sum(p.numel() for p in trainer.trained[average].values())} if self.recipe.lora else {}),
            **({"best": trainer.best} if trainer.best else {}),
        }

    def _export(self, folder: Path) -> dict:
        if self.engine.is_main:
            best = (self.folder.finished("dmd") or {}).get("metrics", {})
            card = (
                f"# Student of {self.recipe.name}\n\nA causal {len(self.spec.sigmas)}-step audio-driven avatar student, distilled "
                f"by avatar-distill. Data: {self.spec.width}x{self.spec.height} {self.source.description}.\n\n"
                f"```json\n{json.dumps({'dmd': best}, indent=1)}\n```\n\n"
                "    distill sample --student . --image PORTRAIT.png --audio SPEECH.wav --text 'smiles and nods' --out out.mp4\n"
            )
            checkpoint.save_student(folder / "student", self.bundle(self.student("dmd")), card, self._over())
        self.engine.barrier()
        return {
            "nfe_per_chunk": self.spec.nfe_per_chunk,
            "parameters": sum(p.numel() for p in self.student("dmd").parameters()),
        }

    def _over(self) -> tuple[Adapter, Base] | None:
        """The student's adapter and where its base is, if that is to be exported."""
        if self.recipe.lora is None or self.recipe.lora.export == "merged":
            return None
        config, file = self.config(self.origin), self.folder.stage_dir(self.origin) / "model.safetensors"
        path, wan = (file, None) if config.is_trained else (config.path, config.wan)
        assert path is not None
        path, wan = path.expanduser().resolve(), wan and wan.expanduser().resolve()
        base = Base(path=path, wan=wan, widen=config.widen, ours=config.is_trained, digest=digest(path, wan))
        return self.recipe.lora.adapter(load_tensors(self.folder.stage_dir("dmd") / "model.safetensors")), base

    def publish(self) -> None:
        """The exported student at the top of the run folder; a copy of the export stage's."""
        target = self.folder.path / "student"
        if self.engine.is_main and not (target / "spec.json").is_file():
            shutil.rmtree(target, ignore_errors=True)
            with staged(target) as partial:
                shutil.copytree(self.folder.stage_dir("export") / "student", partial)
        self.engine.barrier()

    def _evaluate(self, folder: Path) -> dict:
        from distill.pipeline.evaluate import evaluate

        return evaluate(self, folder)
