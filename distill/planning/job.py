"""What is planned, a `Job`, and its networks and batches: on the meta device for a plan, on a real one to measure."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from distill import methods
from distill.methods import Batch, Needs
from distill.pipeline.evaluation.clip_sets import generated_at_once
from distill.planning.codec import PullBack, codec_costs, pull_back_costs
from distill.planning.live_bytes import checkpointed
from distill.recipe import TrajectoriesConfig, spec_of
from distill.training import lora as lora_roles
from distill.training.lora import TARGETS
from students.serving.optimize import cast as cast_network
from students.spec import Spec
from students.weights.adapter import targeted
from teachers.conditions import Conditions, blank_features
from teachers.guidance import AnyGuidance
from teachers.networks.kind import AvatarTeacher, NetworkKind, networks_in
from teachers.networks.sequence import SequenceGroup

if TYPE_CHECKING:
    from distill.recipe import Recipe

LORA_RANK = 128  # OmniAvatar's
CAUSAL = ("student", "ar_teacher")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run as far as its needs go. `networks` by role where they differ from the student's, which is in `spec`; `stages` have
    a `method` and a `train`, in order; `trajectories`: how teachers solve, and whether a stage learns from stored solutions
    (`solves`); `lora`: the rank of a role that is trained as a LoRA, on `targets` and with the modules `full` as a whole;
    `backbone`: roles whose frozen weights are one network's, once they are LoRAs; `half`: frozen roles held in bf16;
    `checkpointing`: of the blocks of what is trained; `at_once`: clips that are generated together; `sequence`: the ranks that
    share every sequence, where they do; `decode_bytes`: at the peak of one clip that a method decodes;
    `pull_back`: costs of a clip's gradient through the decoder."""

    spec: Spec
    stages: Mapping[str, Any]
    precision: Literal["fp32", "bf16"]
    networks: Mapping[str, NetworkKind] = field(default_factory=dict)
    trajectories: TrajectoriesConfig | None = None
    solves: bool = True
    lora: Mapping[str, int] = field(default_factory=dict)
    targets: tuple[str, ...] = TARGETS
    full: tuple[str, ...] = ()
    backbone: frozenset[str] = frozenset()
    half: frozenset[str] = frozenset()
    bucket_mib: int = 32
    shard_ranks: int | None = None
    gather_once: bool = False
    checkpointing: bool = False
    at_once: int = 1
    sequence: SequenceGroup | None = None
    decode_bytes: float = 0.0
    pull_back: PullBack = field(default_factory=PullBack)

    @property
    def trajectory_guidance(self) -> AnyGuidance:
        """The guidance under which trajectories are solved: that of the recipe, or of a student's drawn scales."""
        assert self.trajectories is not None
        scales, own = self.spec.guidance, self.trajectories.guidance
        return own if scales is None else scales.of(torch.ones(1, len(scales.names)), own.batched)

    @property
    def together(self) -> int:
        """Ranks that share a sequence."""
        return 1 if self.sequence is None else self.sequence.size

    def needs(self, stage: str) -> Needs:
        """The roles of a stage; trajectories and clips train none."""
        if stage == "clips":
            return Needs(trained=())
        if stage != "trajectories":
            return methods.needs(self.stages[stage].method)
        assert self.trajectories is not None
        forced = any(self.needs(other).batch == "forced" for other in self.stages)
        return Needs(trained=(), frozen=("ar_teacher" if forced else self.trajectories.role,))


def job_of(recipe: "Recipe") -> Job:
    """The job of a recipe; UserError where its parts do not fit together. Nothing that its paths name is opened."""
    given = {"teacher": recipe.teacher} | ({} if recipe.base is None else {"base": recipe.base})
    trained = {name: stage for name, stage in given.items() if stage.is_trained}
    lora = recipe.lora
    adapters: dict[str, Any] = {}
    if lora is not None:
        ranks = dict.fromkeys(("student", "fake_score"), lora.rank)
        adapters = {"lora": ranks, "targets": lora.targets, "full": lora.full}
    spec, networks, shared = spec_of(recipe), {"teacher": recipe.teacher.network}, recipe.engine.sequence_parallel
    decodes = any(recipe.needs(slot).decodes for slot in recipe.slots)
    through = [
        getattr(recipe, slot).method for slot in recipe.slots if recipe.needs(slot).differentiates
    ]  # one at most
    if recipe.has_custom_network:  # which only the student has
        networks |= dict.fromkeys(("base", "fake_score"), (recipe.base or recipe.teacher).network)
    return Job(
        spec=spec,
        networks=networks,
        stages=trained | {slot: getattr(recipe, slot) for slot in recipe.slots},
        checkpointing=recipe.engine.checkpointing,
        at_once=generated_at_once(recipe, spec),
        trajectories=recipe.trajectories,
        solves=any(recipe.needs(slot).batch != "x0" for slot in recipe.slots),
        precision=recipe.engine.precision,
        half=frozenset(name for name, stage in given.items() if name not in trained and stage.precision == "bf16"),
        bucket_mib=recipe.engine.bucket_mib,
        shard_ranks=recipe.engine.shard_ranks,
        gather_once=recipe.engine.gather_once,
        backbone=frozenset({"student", "fake_score", "teacher" if recipe.base in (None, recipe.teacher) else "base"}),
        sequence=SequenceGroup(shared) if shared > 1 else None,
        decode_bytes=codec_costs(spec, recipe).decode_bytes if decodes else 0.0,
        pull_back=pull_back_costs(spec, recipe, getattr(through[0], "decoder", None)) if through else PullBack(),
        **adapters,
    )


def shallow(job: Job, blocks: int) -> Job:
    """The job with no more than the first `blocks` blocks of every network."""
    networks = {role: kind.shallow(blocks) for role, kind in job.networks.items()}
    return replace(job, spec=replace(job.spec, network=job.spec.network.shallow(blocks)), networks=networks)


def meta_networks(job: Job, stage: str, *, checkpointing: bool = False, lora: bool = False) -> dict[str, Any]:
    """The roles of a stage without memory, in the type that they compute in; of trained ones what is trained requires gradients.

    `lora`: all trained ones are LoRAs, not only those that the job lists.
    """
    needs, nets = job.needs(stage), {}
    for role in (*needs.trained, *needs.frozen):
        trained = role in needs.trained
        net = nets[role] = make_network(job, role, stage, trained and (lora or role in job.lora))
        net.train(trained)
        if not trained:
            net.requires_grad_(False)
        elif checkpointing:
            for network in (part for part in networks_in(net) if part.kind.can_checkpoint):
                network.kind.enable_checkpointing(network, checkpointed)
    return nets


def networks_on(job: Job, stage: str, device: torch.device | str) -> dict[str, Any]:
    """The roles of a stage on a device with random weights, as training holds them: in fp32, frozen ones of `job.half` in bf16;
    LoRA roles over one backbone, which is the teacher too where the job has it so."""
    needs, nets = job.needs(stage), {}

    def new(role: str) -> Any:
        with torch.device(device):
            return kind_of(job, role, stage).new(job.spec.dims)

    backbone: Any = lora_roles.make_backbone(new("fake_score"), job.precision) if job.lora else None
    for role in (*needs.trained, *needs.frozen):
        trained = role in needs.trained
        if trained and role in job.lora:
            config = lora_roles.LoraRoles(rank=job.lora[role], targets=job.targets, full=job.full)
            net = lora_roles.adapt(backbone, config, 0, role)
        else:
            net = backbone if backbone is not None and role in job.backbone else new(role)
            if role in job.half:
                cast_network(net, torch.bfloat16)
            net.requires_grad_(trained)
        if trained and job.checkpointing:
            net.kind.enable_checkpointing(net)
        made = job.spec.network.student(net, job.spec) if role in CAUSAL else AvatarTeacher(net)
        nets[role] = made.train(trained)
    return nets


def batch_on(job: Job, stage: str, device: torch.device | str = "meta") -> Batch:
    """A training batch of a stage, or the noise and conditions of a batch of trajectories, or `clips`, as x0: random values, on the
    meta device none."""
    spec, kind = job.spec, job.needs(stage).batch if stage in job.stages else "x0"
    if stage == "clips":
        size = job.at_once
    elif stage == "trajectories" and job.trajectories:
        size = job.trajectories.batch_size
    else:
        size = job.stages[stage].train.batch_size
    frames, stride, (channels, height, width) = spec.horizon_frames, spec.codec.stride, spec.latent_size
    of_image = {} if spec.image is None else spec.image.sizes(stride, channels, frames, height, width)
    with torch.device(device):
        x0 = torch.randn(size, channels, frames, height, width)
        conditions = Conditions(
            blank_features(spec.network, size, frames),
            **{name: torch.randn(size, *shape) for name, shape in of_image.items()},
            text=torch.randn(size, spec.text.max_tokens, spec.text.dim),
            audio=torch.randn(size, frames, stride, spec.audio_dim),
            reference=x0[:, :, :1] if spec.network.reference else None,
            pose=torch.randn(size, frames, stride, spec.pose_dim) if spec.pose_dim else None,
        )
        states = torch.randn(size, len(spec.sigmas) + 1, *x0.shape[1:]) if kind != "x0" else None
    return Batch(conditions=conditions, x0=None if kind == "trajectories" else x0, states=states)


def kind_of(job: Job, role: str, stage: str = "") -> NetworkKind:
    """The kind of a role's network; that of the stage base has the role teacher in it."""
    if role in CAUSAL:
        return job.spec.network
    name = "base" if stage == "base" else role
    return job.networks.get(name, job.spec.network)


def make_network(job: Job, role: str, stage: str = "", lora: bool = False) -> Any:
    """A role's network on the meta device; as a LoRA what is trained alone requires gradients."""
    config = kind_of(job, role, stage)
    with torch.device("meta"):
        if role == "discriminator":
            from distill.methods.critics.discriminator import build_discriminator

            score = job.networks.get("fake_score", job.spec.network)
            return build_discriminator(score)
        net = config.new(job.spec.dims)
        if job.sequence is not None:
            net.kind.split_sequence(net, job.sequence)
        if lora:
            from peft import LoraConfig

            given = role in job.lora
            rank, targets, full = (job.lora[role], job.targets, job.full) if given else (LORA_RANK, TARGETS, ())
            targeted(net, targets, full)
            net.add_adapter(LoraConfig(r=rank, target_modules=list(targets)))  # which freezes all else
            for name in full:
                net.get_submodule(name).requires_grad_(True)
        # a solver computes in the type that it is held in, adapters in that of autocast
        narrow = stage in job.stages or (stage == "clips" and role in CAUSAL)
        if role in job.half or (job.precision != "fp32" and narrow):
            cast_network(net, torch.bfloat16)
    return job.spec.network.student(net, job.spec) if role in CAUSAL else AvatarTeacher(net)


def inner(net: Any) -> Any:
    """The transformer of a role, or the whole where there is none."""
    return getattr(net, "net", net)
