"""What the finished stages of a run left, loaded when it is first asked for: clips, senses, probes, networks of every role."""

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from distill.data import latents
from distill.pipeline.pretrained import load_given, network_dims
from distill.pipeline.run_folder import RunFolder
from distill.recipe import TeacherStage
from distill.training import lora
from distill.training.engine import Engine
from students.networks.causal_wan import CausalWan
from students.networks.midas_net import read_language_model
from students.spec import Spec
from students.student import Student
from students.weights import checkpoint
from students.weights.adapter import HINT, fold
from students.weights.checkpoint import Bundle
from teachers.checkpoints.strict import load_strict
from teachers.files import load_tensors
from teachers.flow import keyed_generator
from teachers.networks.wan import AvatarTeacher, AvatarTransformer, build_network

if TYPE_CHECKING:
    from distill.recipe import Recipe


class Artifacts:
    """Student and fake score start from the weights of the stage `origin`: those of `recipe.base`, else the teacher's."""

    recipe: "Recipe"
    engine: Engine
    spec: Spec
    folder: RunFolder

    @property
    def origin(self) -> str:
        return "teacher" if self.recipe.base is None else "base"

    @property
    def pool_stage(self) -> str:
        """The stage that the student's conditions come from."""
        return "data" if self.recipe.corruption is None else "corrupted"

    @property
    def own_network(self) -> bool:
        """Whether the student's network is another kind than the teacher's, and so starts from none of its weights."""
        return self.recipe.student.network is not None

    @property
    def untrained(self) -> str:
        """The stage whose weights are the zero-shot student's: the teacher's; where it can have none, its own teacher's."""
        return "ar_teacher" if self.own_network else self.origin

    def config(self, stage: str) -> TeacherStage:
        """The config of `teacher` or `base`."""
        config = self.recipe.base if stage == "base" else self.recipe.teacher
        assert config is not None
        return config

    @cached_property
    def encoders(self) -> latents.ConditionEncoders:
        folder = self.folder.stage_dir("data")
        return latents.load_encoders(self.recipe.data, folder, self.spec.network.reference, self.engine.device)

    @cached_property
    def pool(self) -> latents.TrainSet:
        return latents.load_train_set(self.folder.stage_dir("data"), self.encoders.mark, self.spec.network.reference)

    @cached_property
    def given(self) -> latents.TrainSet:
        """What the student is distilled on: the training set, or its corrupted clips."""
        return latents.load_train_set(
            self.folder.stage_dir(self.pool_stage), self.encoders.mark, self.spec.network.reference
        )

    @cached_property
    def probes(self):
        from eval.embedded.extractors import Probes

        return Probes.load(self.folder.stage_dir("extractors"))

    def _new_network(self, stage: str) -> AvatarTransformer:
        """An untrained network, initialised from the recipe's seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_generator(self.recipe.seed, "network").initial_seed())
            return build_network(self.config(stage).network, **network_dims(self.spec))

    def network(self, stage: str, frozen: bool = True) -> AvatarTransformer:
        """The network of a finished stage, on our device: given weights, or what was trained here, an adapter folded."""
        if stage in ("teacher", "base") and not self.config(stage).is_trained:
            return load_given(self.config(stage), self.spec, self.engine.device, frozen)
        if self.recipe.lora is not None and stage not in ("teacher", "base"):
            net, file = self.network(self.origin, frozen=False), self.folder.stage_dir(stage) / "model.safetensors"
            fold(net, self.recipe.lora.adapter(load_tensors(file)), file)
            return net
        net = self._new_network(stage if stage == "teacher" else self.origin)
        if self.spec.guidance is not None and stage in ("init", "dmd"):
            net.add_guidance()
        file = self.folder.stage_dir(stage) / "model.safetensors"
        load_strict(net, load_tensors(file), file, HINT)
        return net.to(self.engine.device)  # pyright: ignore[reportArgumentType]  # diffusers wraps it

    @cached_property
    def backbone(self) -> AvatarTransformer:
        """The frozen network whose tensors all LoRA roles share."""
        return lora.make_backbone(self.network(self.origin), self.engine.config.precision)

    def adapted(self, role: str, stage: str) -> AvatarTransformer:
        """A LoRA role over the backbone, with the adapter of a finished stage or, at `origin`, a fresh one."""
        assert self.recipe.lora is not None
        net = lora.adapt(self.backbone, self.recipe.lora, self.recipe.seed, role)
        if stage != self.origin:
            file = self.folder.stage_dir(stage) / "model.safetensors"
            lora.load(net, load_tensors(file), file)
        return net

    @cached_property
    def teacher(self) -> AvatarTeacher:
        """The teacher, frozen; with LoRA roles the backbone itself, where that is the same network."""
        base, own = self.recipe.base, self.recipe.teacher
        shared = self.recipe.lora is not None and (base is None or (base == own and not own.is_trained))
        return AvatarTeacher(self.backbone if shared else self.network("teacher")).eval().requires_grad_(False)

    def student(self, stage: str) -> Student:
        """A student with the weights of a finished stage; those of the stage `origin` are an untrained student's, zero-shot."""
        if not self.own_network:
            return CausalWan(self.network(stage, frozen=False), self.spec)
        student = self._new_student()
        if stage != self.origin:
            file = self.folder.stage_dir(stage) / "model.safetensors"
            load_strict(student.net, load_tensors(file), file, HINT)
        return student.to(self.engine.device)

    def _new_student(self) -> Student:
        """An untrained student with a network of its own, initialised from the recipe's seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_generator(self.recipe.seed, "student").initial_seed())
            student = checkpoint.make_student(self.spec)
        if self.recipe.student.network.llm is not None:
            read_language_model(student.net, self.recipe.student.network.llm)
        return student

    def trainee(self, stage: str) -> Student:
        """The student of `stage` to be trained on: whole, or as an adapter over the backbone."""
        if self.recipe.lora is None:
            return self.student(stage)
        return CausalWan(self.adapted("student", stage), self.spec)

    @cached_property
    def ar_teacher(self) -> Student:
        """The autoregressive teacher, frozen."""
        return self.trainee("ar_teacher").eval().requires_grad_(False)

    def bundle(self, student: Student) -> Bundle:
        """A student with this run's senses, ready for a session."""
        return Bundle(student.eval(), self.encoders.codec, self.encoders.audio_encoder, self.encoders.text)
