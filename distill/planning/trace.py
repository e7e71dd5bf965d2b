"""A job's losses on the meta device: what they hold at once, and how often they call each network. No weight is made."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from distill import methods
from distill.methods import Batch, Needs
from distill.methods.forcing import Forced
from distill.pipeline import generate
from distill.planning.live_bytes import LiveBytes, OnMeta, Points, checkpointed
from distill.recipe import TrajectoriesConfig
from distill.training.lora import TARGETS
from students.serving.optimize import cast as cast_network
from students.spec import Spec
from students.weights.adapter import targeted
from teachers import flow
from teachers.conditions import Conditions, blank_features
from teachers.errors import UserError
from teachers.networks.kind import AvatarTeacher, NetworkKind, networks_in

CHECKPOINTING, LORA = "checkpointing", "lora"
LORA_RANK = 128  # OmniAvatar's
CAUSAL = ("student", "ar_teacher")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run as far as its needs go. `networks` by role where they differ from the student's, which is in `spec`; `stages` have a
    `method` and a `train`, in order; `lora`: the rank of a role that is trained as a LoRA, on `targets` and with the
    modules `full` as a whole; `backbone`: roles whose frozen weights are one network's, once they are LoRAs; `half`: frozen roles
    held in bf16."""

    spec: Spec
    stages: Mapping[str, Any]
    precision: Literal["fp32", "bf16"]
    networks: Mapping[str, NetworkKind] = field(default_factory=dict)
    trajectories: TrajectoriesConfig | None = None
    lora: Mapping[str, int] = field(default_factory=dict)
    targets: tuple[str, ...] = TARGETS
    full: tuple[str, ...] = ()
    backbone: frozenset[str] = frozenset()
    half: frozenset[str] = frozenset()
    bucket_mib: int = 32

    def needs(self, stage: str) -> Needs:
        """The roles of a stage; trajectories train nobody."""
        if stage != "trajectories":
            return methods.needs(self.stages[stage].method)
        assert self.trajectories is not None
        forced = any(self.needs(other).batch == "forced" for other in self.stages)
        return Needs(trained=(), frozen=("ar_teacher" if forced else self.trajectories.role,))


def forwards(job: Job, stage: str, cadence: int = 60) -> dict[str, float]:
    """Network forwards of one training step by role, with one micro-step an update; guidance and context passes count.

    Means over `cadence` steps, and over what ranks draw together, exit steps and (at some quantiles) lengths of rollouts. A
    role's forward is over a whole clip (with clean context, over twice its frames), in a rollout the student's over one chunk.
    Backward and recomputation are not counted.
    """
    shallow = "discriminator" not in job.needs(stage).trained  # whose heads ask for deeper blocks
    nets = meta_networks(job, stage, shallow=shallow)
    made = _method(job, stage, nets)
    called: dict[str, int] = dict.fromkeys(nets, 0)
    for name, net in nets.items():

        def count(*_, name=name):
            called[name] += 1

        inner(net).register_forward_pre_hook(count)
    rng, shared = (flow.keyed_generator(0, name) for name in ("loss", "shared"))
    quantiles = len(job.spec.sigmas) * (4 if getattr(job.stages[stage].method, "rollout_chunks", 0) else 1)
    steps = [made.roles_to_update(step) for step in range(1, cadence + 1)]
    totals = dict.fromkeys(nets, 0.0)
    for role in sorted({role for roles in steps for role in roles}):
        called.update(dict.fromkeys(nets, 0))
        for runs in range(1, quantiles + 1):
            with OnMeta(shared, (runs - 0.5) / quantiles) as mode, LiveBytes():
                made.loss(role, meta_batch(job, stage), rng, shared)
            if not mode.draws:
                break
        updates = sum(roles.count(role) for roles in steps) / cadence
        for name, number in called.items():
            totals[name] += updates * number / runs
    return {role: number for role, number in totals.items() if number}


def trace(job: Job, stage: str, role: str, *switches: str) -> Points:
    """Points of one micro-step: the stage's own loss and its backward, of what ranks draw together the largest; for trajectories
    one step of the solver. `switches`: checkpointing of the blocks, lora for all trained roles."""
    spec, on_data = job.spec, job.needs(stage).batch == "x0"
    alike = spec.history.commit == "clean" and spec.schedule.depth == 1
    if on_data and alike:  # steps without gradient leave nothing behind: one stands for all of them
        job = replace(job, spec=replace(spec, sigmas=spec.sigmas[:2]))
    nets = meta_networks(job, stage, checkpointing=CHECKPOINTING in switches, lora=LORA in switches)
    batch, live = meta_batch(job, stage), LiveBytes()
    for net in nets.values():
        live.weigh(net)
    rng, shared = (flow.keyed_generator(0, name) for name in ("loss", "shared"))
    made = _method(job, stage, nets) if stage != "trajectories" else None
    given = (*batch.conditions.features.values(), batch.x0, batch.states)
    try:
        with OnMeta(shared), live:
            live.count(tensor for tensor in given if tensor is not None)
            if made is None:
                assert job.trajectories is not None
                assert batch.x0 is not None
                net = nets[role]  # a bidirectional teacher, or an autoregressive one under the data's clean chunks
                solver = net if isinstance(net, AvatarTeacher) else Forced(net, batch.x0)
                generate.solve_states(solver, batch.conditions, batch.x0, (1.0, 0.5), (0, 1), job.trajectories.guidance)
            else:
                made.loss(role, batch, rng, shared).value.backward()
    except (ValueError, RuntimeError) as error:
        line = str(error).splitlines()[0] if str(error) else repr(error)
        raise UserError(f"{stage}.{role} is not possible: {line}; fix the recipe") from error
    return tuple(sorted(live.points.items()))


def meta_networks(
    job: Job, stage: str, *, checkpointing: bool = False, lora: bool = False, shallow: bool = False
) -> dict[str, Any]:
    """The roles of a stage without memory, in the type that they compute in; of trained ones what is trained requires gradients.

    `lora`: all trained ones are LoRAs, not only those that the job lists.
    """
    needs, nets = job.needs(stage), {}
    for role in (*needs.trained, *needs.frozen):
        trained = role in needs.trained
        net = nets[role] = make_network(job, role, stage, trained and (lora or role in job.lora), shallow)
        net.train(trained)
        if not trained:
            net.requires_grad_(False)
        elif checkpointing:
            for network in (part for part in networks_in(net) if part.kind.can_checkpoint):
                network.kind.enable_checkpointing(network, checkpointed)
    return nets


def meta_batch(job: Job, stage: str) -> Batch:
    """A training batch of a stage without memory, or the noise and conditions of a batch of trajectories as x0."""
    spec, kind = job.spec, job.needs(stage).batch if stage != "trajectories" else "x0"
    size = (
        job.trajectories.batch_size
        if stage == "trajectories" and job.trajectories
        else job.stages[stage].train.batch_size
    )
    frames, stride = spec.horizon_frames, spec.codec.stride
    with torch.device("meta"):
        x0 = torch.empty(size, spec.codec.channels, frames, *spec.latent_size[1:])
        conditions = Conditions(
            blank_features(spec.network, size, frames),
            text=torch.empty(size, spec.text.max_tokens, spec.text.dim),
            audio=torch.empty(size, frames, stride, spec.audio_dim),
            reference=x0[:, :, :1] if spec.network.reference else None,
            pose=torch.empty(size, frames, stride, spec.pose_dim) if spec.pose_dim else None,
        )
        states = torch.empty(size, len(spec.sigmas) + 1, *x0.shape[1:]) if kind != "x0" else None
    return Batch(conditions=conditions, x0=None if kind == "trajectories" else x0, states=states)


def make_network(job: Job, role: str, stage: str = "", lora: bool = False, shallow: bool = False) -> Any:
    """A role's network on the meta device; as a LoRA what is trained alone requires gradients."""
    own = (
        role not in ("student", "base") and stage != "base"
    )  # the network of the stage base has the role teacher in it
    config = job.networks.get(role, job.spec.network) if own else job.spec.network
    with torch.device("meta"):
        if role == "discriminator":
            from distill.methods.discriminator import build_discriminator

            score = job.networks.get("fake_score", job.spec.network)
            return build_discriminator(score, job.stages[stage].method.gan_blocks)
        net = (config.shallow() if shallow else config).new(job.spec.dims)
        if job.precision != "fp32" or role in job.half:
            cast_network(net, torch.bfloat16)
        if lora:
            from peft import LoraConfig

            given = role in job.lora
            rank, targets, full = (job.lora[role], job.targets, job.full) if given else (LORA_RANK, TARGETS, ())
            targeted(net, targets, full)
            net.add_adapter(LoraConfig(r=rank, target_modules=list(targets)))  # which freezes all else
            for name in full:
                net.get_submodule(name).requires_grad_(True)
    return job.spec.network.student(net, job.spec) if role in CAUSAL else AvatarTeacher(net)


def inner(net: Any) -> Any:
    """The transformer of a role, or the whole where there is none."""
    return getattr(net, "net", net)


def _method(job: Job, stage: str, nets: Mapping[str, Any]) -> Any:
    return methods.build(job.stages[stage].method, dict(nets), (*job.spec.sigmas, 0.0))
