"""A job's losses on the meta device: what they hold at once, and how often they call each network. No weight is made."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from distill import methods
from distill.methods import Batch, Needs
from distill.methods.forcing import Forced
from distill.methods.rollout import rollout
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
DEPTHS = (3, 6)
"""Blocks of the networks whose memory stands for that of deeper ones."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run as far as its needs go. `networks` by role where they differ from the student's, which is in `spec`; `stages` have a
    `method` and a `train`, in order; `lora`: the rank of a role that is trained as a LoRA, on `targets` and with the
    modules `full` as a whole; `backbone`: roles whose frozen weights are one network's, once they are LoRAs; `half`: frozen roles
    held in bf16; `checkpointing`: of the blocks of what is trained; `at_once`: clips that are generated together."""

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
    checkpointing: bool = False
    at_once: int = 1

    def needs(self, stage: str) -> Needs:
        """The roles of a stage; trajectories and clips train nobody."""
        if stage == "clips":
            return Needs(trained=())
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
    return step_costs(job, stage, cadence).forwards


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """`forwards` of a mean training step by network; by role that is updated: `flops` of one of its micro-steps (forward, backward
    and recomputation) and how often the whole stage updates it."""

    forwards: dict[str, float]
    flops: dict[str, float]
    updates: dict[str, int]


def step_costs(job: Job, stage: str, cadence: int = 60) -> StepCosts:
    """What a stage computes, at the depths of its networks: FLOPs go on from one and two blocks along a line, which is exact but
    for the few of audio's projections."""
    part = job.stages[stage]
    made = _method(job, stage, meta_networks(job, stage))
    steps = [made.roles_to_update(step) for step in range(1, cadence + 1)]
    totals, flops, updates = {}, {}, {}
    for role in sorted({role for roles in steps for role in roles}):
        called: dict[str, float] = {}

        def measure(small: Job, role=role, called=called) -> list[float]:
            found, work = _micro_step(small, stage, role)
            called.update(found)
            return [work]

        (flops[role],) = _at_depth(job, stage, measure, (1, 2))
        each = sum(roles.count(role) for roles in steps) / cadence
        first = made.roles_to_update(0).count(role) - each
        updates[role] = round(each * part.train.num_steps + first)
        for name, number in called.items():
            totals[name] = totals.get(name, 0.0) + each * number
    order = (*job.needs(stage).trained, *job.needs(stage).frozen)
    return StepCosts(forwards={name: totals[name] for name in order if totals.get(name)}, flops=flops, updates=updates)


def _micro_step(job: Job, stage: str, role: str) -> tuple[dict[str, float], float]:
    """Forwards by network and FLOPs of one micro-step of `role`, means over what ranks draw together."""
    nets = meta_networks(job, stage, checkpointing=job.checkpointing)
    made = _method(job, stage, nets)
    called: dict[str, int] = dict.fromkeys(nets, 0)
    for name, net in nets.items():

        def count(*_, name=name):
            called[name] += 1

        inner(net).register_forward_pre_hook(count)
    rng, shared = (flow.keyed_generator(0, name) for name in ("loss", "shared"))
    longer = getattr(job.stages[stage].method, "rollout_chunks", 0)
    num = len(job.spec.sigmas) * (4 if longer else 1)
    quantiles = [(run + 0.5) / num for run in range(num)]
    if not longer and job.spec.schedule.depth == 1:  # each later exit costs one call more, so the ends have the mean
        quantiles = [quantiles[0], quantiles[-1]]
    work: list[int] = []
    for quantile in quantiles:
        with OnMeta(shared, quantile) as mode, LiveBytes() as live:
            made.loss(role, meta_batch(job, stage), rng, shared).value.backward()
        work.append(live.flops)
        if not mode.draws:
            break
    return {name: number / len(work) for name, number in called.items()}, sum(work) / len(work)


def _cut(job: Job, depths: Sequence[tuple[NetworkKind, int]]) -> Job:
    """The job with so many blocks in networks of these kinds."""

    def cut(kind: NetworkKind) -> NetworkKind:
        return next((kind.shallow(blocks) for other, blocks in depths if other == kind), kind)

    networks = {role: cut(kind) for role, kind in job.networks.items()}
    return replace(job, spec=replace(job.spec, network=cut(job.spec.network)), networks=networks)


def _at_depth(
    job: Job, stage: str, measure: Callable[[Job], Sequence[float]], depths: tuple[int, int], roles: Sequence[str] = ()
) -> list[float]:
    """What `measure` gives of the job, from two depths along a line in each kind of network of `roles` (all of the stage)."""
    few, many = depths
    needs = job.needs(stage)
    kinds: list[NetworkKind] = []
    for kind in (
        kind_of(job, role, stage) for role in roles or (*needs.trained, *needs.frozen) if role != "discriminator"
    ):
        if kind not in kinds and kind.num_blocks > many and kind.shallow(few) != kind:
            kinds.append(kind)
    if not kinds or "discriminator" in needs.trained:  # whose heads ask for deeper blocks
        return list(measure(job))
    total = start = list(measure(_cut(job, [(kind, few) for kind in kinds])))
    for kind in kinds:
        deeper = measure(_cut(job, [(other, many if other == kind else few) for other in kinds]))
        slope = (kind.num_blocks - few) / (many - few)
        total = [now + slope * (b - a) for now, a, b in zip(total, start, deeper, strict=True)]
    return total


def clip_costs(job: Job, role: str, num_steps: int = 0, stage: str = "clips") -> tuple[float, int]:
    """(FLOPs of a clip, bytes at the peak but for weights while `job.at_once` of them are made): by the rollout of `student`, by
    `num_steps` guided steps of a teacher or, chunk by chunk, of `ar_teacher`. In the stage trajectories a batch of those, an
    `ar_teacher`'s under the data's clean chunks."""
    stream = role == "ar_teacher" and stage == "clips"

    def measure(small: Job) -> list[float]:
        counts = [_generate(small, role, stage, steps) for steps in ((1, 2) if stream else (1,))]
        first, last = counts[0], counts[-1]
        more = (num_steps - 1) * (last[0] - first[0]) if stream else (max(1, num_steps) - 1) * first[0]
        return [(first[0] + more) / (first[2]), last[1]]

    flops, peak = _at_depth(job, stage, measure, DEPTHS, (role,))
    return flops, round(peak)


def _generate(job: Job, role: str, stage: str, num_steps: int) -> tuple[int, int, int]:
    """FLOPs, peak and number of one batch of clips."""
    assert job.trajectories is not None
    net, live = make_network(job, role, stage).eval().requires_grad_(False), LiveBytes()
    live.weigh(net)
    batch, n = meta_batch(job, stage), job.spec.chunk_frames
    assert batch.x0 is not None
    chunk, guidance = batch.x0[:, :, :n], job.trajectories.guidance
    with OnMeta(), torch.no_grad(), live:
        if role == "student":
            rollout(net, batch.conditions, lambda *_: chunk)
        elif role != "ar_teacher" or stage != "clips":
            solver = Forced(net, batch.x0) if role == "ar_teacher" else net
            generate.solve_states(solver, batch.conditions, batch.x0, (1.0, 0.5), (0, 1), guidance)
        else:
            grid = tuple(1 - i / num_steps for i in range(num_steps + 1))
            generate.solve_stream(net, batch.conditions, lambda *_: chunk, grid, guidance)
    return live.flops, max(live.points.values()), len(batch.x0)


def trace(job: Job, stage: str, role: str, *switches: str) -> Points:
    """Points of one micro-step: the stage's own loss and its backward, of what ranks draw together the largest; for trajectories
    one step of the solver. `switches`: checkpointing of the blocks, lora for all trained roles. Of networks of many blocks only two
    points, the peak and what is alive with all gradients, follow lines in their depth, the peak one for each phase: a network's
    call, and the backward pass."""
    needs = job.needs(stage)
    others = () if needs.trained else needs.frozen  # beside training no block of theirs leaves anything behind
    kept = (*needs.trained, *(name for name in needs.frozen if name in CAUSAL or name in others))
    if all(name == "discriminator" or kind_of(job, name, stage).num_blocks <= 2 * DEPTHS[1] for name in kept):
        return _trace(job, stage, role, *switches)

    def measure(small: Job) -> list[float]:
        live = _live(small, stage, role, *switches)
        return [*max(live.points.items()), *live.phases]

    count, last, *phases = map(round, _at_depth(job, stage, measure, DEPTHS, kept))
    return ((0, max(phases)), (count, last)) if count else ((0, max(phases)),)


def _trace(job: Job, stage: str, role: str, *switches: str) -> Points:
    """`trace` at the depth that the networks have."""
    return tuple(sorted(_live(job, stage, role, *switches).points.items()))


def _live(job: Job, stage: str, role: str, *switches: str) -> LiveBytes:
    """What is alive in one micro-step."""
    spec, on_data = job.spec, job.needs(stage).batch == "x0"
    alike = spec.history.commit == "clean" and spec.schedule.depth == 1
    if on_data and alike:  # steps without gradient leave nothing behind: one stands for all of them
        job = replace(job, spec=replace(spec, sigmas=spec.sigmas[:2]))
    nets = meta_networks(job, stage, checkpointing=CHECKPOINTING in switches, lora=LORA in switches)
    batch, live = meta_batch(job, stage), LiveBytes()
    for net in nets.values():
        live.weigh(net)
        inner(net).register_forward_pre_hook(live.begin_phase)
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
    return live


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


def meta_batch(job: Job, stage: str) -> Batch:
    """A training batch of a stage without memory, or the noise and conditions of a batch of trajectories, or `clips`, as x0."""
    spec, kind = job.spec, job.needs(stage).batch if stage in job.stages else "x0"
    if stage == "clips":
        size = job.at_once
    elif stage == "trajectories" and job.trajectories:
        size = job.trajectories.batch_size
    else:
        size = job.stages[stage].train.batch_size
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
            from distill.methods.discriminator import build_discriminator

            score = job.networks.get("fake_score", job.spec.network)
            return build_discriminator(score, job.stages[stage].method.gan_blocks)
        net = config.new(job.spec.dims)
        # what no stage trains with computes in the type that it is held in
        if role in job.half or (job.precision != "fp32" and stage in job.stages):
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
