"""Lazy loading of finished stages' outputs: encoders, training sets, probes, networks of every role."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch

from distill.data import latents
from distill.data.encoders import ConditionEncoders, load_encoders
from distill.data.source import ClipSource
from distill.pipeline.pretrained import fill_given, fill_strict, load_given, outline
from distill.pipeline.run_folder import RunFolder
from distill.recipe import Recipe, TeacherStage
from distill.training import lora
from distill.training.engines.engine import Engine
from distill.training.engines.offload import stream
from distill.training.metrics_log import MetricsLog
from eval.embedded.extractors import Probes
from students.serving.optimize import DTYPES
from students.serving.optimize import cast as cast_network
from students.spec import Spec
from students.student import Student
from students.weights import checkpoint
from students.weights.adapter import HINT, fold
from students.weights.checkpoint import Bundle
from students.weights.coverage import FILE, load_coverage
from teachers.checkpoints.strict import load_strict
from teachers.errors import UserError
from teachers.files import load_tensors
from teachers.flow import keyed_generator
from teachers.networks.kind import AvatarTeacher


class Artifacts:
    """What a stage gets besides its folder: the recipe, this process and the outputs of the stages before it.

    `engine` owns processes and device, `spec` is the student's, `source` gives clips, `folder` is the run on disk, `log` its
    metrics. Everything else is loaded when it is first read, from a stage that must be finished.
    """

    def __init__(
        self, recipe: Recipe, engine: Engine, spec: Spec, source: ClipSource, folder: RunFolder, log: MetricsLog
    ) -> None:
        self.recipe, self.engine, self.spec = recipe, engine, spec
        self.source, self.folder, self.log = source, folder, log

    def config(self, stage: str) -> TeacherStage:
        """The config of `teacher` or `base`."""
        config = self.recipe.base if stage == "base" else self.recipe.teacher
        assert config is not None
        return config

    @cached_property
    def encoders(self) -> ConditionEncoders:
        folder = self.folder.stage_dir("data")
        return load_encoders(self.recipe.data, folder, self.spec.network.reference, self.engine.device)

    @cached_property
    def train_set(self) -> latents.TrainSet:
        """Clean clips: what teachers are trained on."""
        return latents.load_train_set(self.folder.stage_dir("data"), self.encoders.mark, self.spec.network.reference)

    @cached_property
    def student_train_set(self) -> latents.TrainSet:
        """What the student is distilled on: the training set, or its corrupted clips."""
        folder = self.folder.stage_dir(self.recipe.conditions_stage)
        return latents.load_train_set(folder, self.encoders.mark, self.spec.network.reference)

    @cached_property
    def probes(self) -> Probes:
        """The embedded extractors, on our device."""
        return Probes.load(self.folder.stage_dir("extractors")).to(self.engine.device)

    def new_network(self, stage: str) -> Any:
        """An untrained network, initialised from the recipe's seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_generator(self.recipe.seed, "network").initial_seed())
            return self.engine.split(self.config(stage).network.new(self.spec.dims))

    @property
    def shards(self) -> bool:
        """Whether the networks of a training stage are made in shards, and whole nowhere."""
        return self.engine.kind == "fsdp2" and not self.recipe.has_custom_network and self.spec.guidance is None

    def in_shards(self, stage: str, role: str) -> Any:
        """The network of a finished stage, to be a role, in the engine's shards, of which each rank reads its rows."""
        from distill.training.engines import fsdp

        frozen, offload = role in ("teacher", "ar_teacher"), role in self.engine.config.offload
        given = stage in ("teacher", "base") and not self.config(stage).is_trained
        config = self.config(stage if stage == "teacher" else self.recipe.init_checkpoint)
        file = self.folder.stage_dir(stage) / "model.safetensors"
        fill = partial(fill_given, stage=config) if given else partial(fill_strict, file=file)
        net = self.engine.split(outline(config, self.spec, frozen=given and frozen)).requires_grad_(not frozen)
        fsdp.shard(self.engine, net, keep=not frozen and self.engine.config.gather_once, fill=fill, offload=offload)
        return net

    def network(self, stage: str, frozen: bool = True, device: torch.device | None = None) -> Any:
        """The network of a finished stage, on our device or this: given weights, or what was trained here, an adapter folded."""
        device = device or self.engine.device
        recipe, file = self.recipe, self.folder.stage_dir(stage) / "model.safetensors"
        if stage in ("teacher", "base") and not self.config(stage).is_trained:
            return self.engine.split(load_given(self.config(stage), self.spec, device, frozen))
        if recipe.lora is not None and stage not in ("teacher", "base"):
            net = self.network(recipe.init_checkpoint, frozen, device)
            fold(net, recipe.lora.adapter(load_tensors(file), recipe.lora.scale if stage == "distill" else 1.0), file)
            return net
        net = self.new_network(stage if stage == "teacher" else recipe.init_checkpoint)
        if self.spec.guidance is not None and stage in ("init", "distill"):
            net.add_guidance(len(self.spec.guidance.names))
        load_strict(net, load_tensors(file), file, HINT)
        return net.to(device)

    @cached_property
    def backbone(self) -> Any:
        """The frozen network whose tensors all LoRA roles share."""
        return lora.make_backbone(self.network(self.recipe.init_checkpoint), self.engine.config.precision)

    def adapted(self, role: str, stage: str) -> Any:
        """A LoRA role over the backbone, with the adapter of a finished stage or, at `init_checkpoint`, a fresh one."""
        assert self.recipe.lora is not None
        net = lora.adapt(self.backbone, self.recipe.lora, self.recipe.seed, role)
        if stage != self.recipe.init_checkpoint:
            file = self.folder.stage_dir(stage) / "model.safetensors"
            lora.load(net, load_tensors(file), file)
        return net

    @cached_property
    def teacher(self) -> AvatarTeacher:
        """The teacher, frozen; with LoRA roles the backbone itself, where that is the same network."""
        base, own = self.recipe.base, self.recipe.teacher
        shared = self.recipe.lora is not None and (base is None or (base == own and not own.is_trained))
        if "teacher" not in self.engine.config.offload:
            return AvatarTeacher(self.backbone if shared else self.network("teacher")).eval().requires_grad_(False)
        if shared:
            raise UserError("engine.offload: LoRA roles are made of the teacher's own weights; remove teacher from it")
        net = self.network("teacher", device=torch.device("cpu")).eval().requires_grad_(False)
        return AvatarTeacher(stream(net, self.engine.device))

    @cached_property
    def base_solver(self) -> AvatarTeacher:
        """The network that the student starts from, frozen, as a bidirectional denoiser."""
        net = self.network(self.recipe.init_checkpoint) if self.recipe.lora is None else self.backbone
        return AvatarTeacher(net).eval().requires_grad_(False)

    def frozen(self, role: str) -> Any:
        """What a stage trains against: the teacher or ar_teacher, in shards where the engine shards weights."""
        if not self.shards:
            if role == "teacher" and self.engine.kind in ("fsdp2", "zero3"):  # never one that is streamed
                self.__dict__[role] = AvatarTeacher(self.network(role)).eval().requires_grad_(False)
            made = self.engine.freeze(getattr(self, role))
            if made is not self.__dict__[role]:  # a copy in partitions
                del self.__dict__[role]
            return made
        net = self.in_shards(role, role)
        made = AvatarTeacher(net) if role == "teacher" else self.spec.network.student(net, self.spec)
        return made.eval().requires_grad_(False)

    def release(self, frozen: Sequence[str]) -> None:
        """Let go of the whole networks that earlier stages have left, but for those that this one trains against, and for the
        backbone that is one of them."""
        held = set(() if self.shards else frozen) | ({"backbone"} if frozen else set())
        for name in {"teacher", "base_solver", "ar_teacher", "backbone"} - held:
            self.__dict__.pop(name, None)

    @contextmanager
    def training(self, frozen: Sequence[str]) -> Iterator[None]:
        """Inside, of the whole networks only those that are trained against are held, and of the encoders only the codec."""
        self.release(frozen)
        with self.codec_alone():
            yield

    @contextmanager
    def codec_alone(self) -> Iterator[None]:
        """Inside, the encoders of text and audio are not held; they are loaded again when they are next asked for."""
        encoders: Any = self.encoders
        if encoders.text is None and encoders.image is None:
            yield
            return
        self.__dict__["encoders"] = replace(encoders, audio_encoder=None, text=None, image=None)
        del encoders
        try:
            yield
        finally:
            del self.__dict__["encoders"]

    def fake_score(self) -> AvatarTeacher:
        """A fake score to be trained, with the weights that the student started from: whole, in shards, or as an adapter."""
        if self.recipe.lora is not None:
            return AvatarTeacher(self.adapted("fake_score", self.recipe.init_checkpoint))
        if self.shards:
            net = self.in_shards(self.recipe.init_checkpoint, "fake_score")
            return AvatarTeacher(net).train().requires_grad_(True)
        net = self.network(self.recipe.init_checkpoint, frozen=False).train().requires_grad_(True)
        if self.spec.guidance is not None:
            net.add_guidance(len(self.spec.guidance.names))
        return AvatarTeacher(net)

    def student(self, stage: str, frozen: bool = False, device: torch.device | None = None) -> Student:
        """A student with the weights of a finished stage, on our device or this; at `init_checkpoint` an untrained one, zero-shot.
        A `frozen` one of given weights is read in the precision of these."""
        if not self.recipe.has_custom_network:
            return self.spec.network.student(self.network(stage, frozen, device), self.spec)
        student = self._new_student()
        if stage != self.recipe.init_checkpoint:
            file = self.folder.stage_dir(stage) / "model.safetensors"
            load_strict(student.net, load_tensors(file), file, HINT)
        return student.to(device or self.engine.device)

    def _new_student(self) -> Student:
        """An untrained student with a network of its own, initialised from the recipe's seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_generator(self.recipe.seed, "student").initial_seed())
            student = checkpoint.make_student(self.spec)
        self.spec.network.start(student.net)
        return student

    def finished_student(self, stage: str) -> Student:
        """A student that only generates, as it will be served: its matrices in the engine's precision."""
        student = self.student(stage, frozen=self.recipe.lora is not None).eval().requires_grad_(False)
        if self.engine.config.precision != "fp32":
            cast_network(student.net, DTYPES[self.engine.config.precision])
        return student

    def trainee(self, stage: str) -> Student:
        """The student of `stage` to be trained on: whole, in shards, or as an adapter over the backbone."""
        if self.recipe.lora is None:
            if self.shards:
                return self.spec.network.student(self.in_shards(stage, "student"), self.spec)
            return self.student(stage)
        return self.spec.network.student(self.adapted("student", stage), self.spec)

    @cached_property
    def ar_teacher(self) -> Student:
        """The autoregressive teacher, frozen and whole, since ranks make other clips, and as many as each has left; in the engine's
        precision, an adapter too, since it may run without autocast."""
        if self.recipe.lora is None:
            return self.finished_student("ar_teacher")
        made = self.trainee("ar_teacher").eval().requires_grad_(False)
        cast_network(made.net, DTYPES[self.engine.config.precision])
        return made

    def bundle(self, student: Student) -> Bundle:
        """A student with this run's encoders, ready for a session."""
        coverage = load_coverage(self.folder.stage_dir("data") / FILE)
        own = self.encoders
        return Bundle(student.eval(), own.codec, own.audio_encoder, own.text, coverage, own.image)
