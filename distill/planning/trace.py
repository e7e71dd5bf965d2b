"""A job's losses on the meta device: what they hold at once, and how often they call each network. No weight is made."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from distill import methods
from distill.methods.forcing import Forced
from distill.methods.rollout import rollout
from distill.pipeline import generate
from distill.planning.codec import PlannedReader
from distill.planning.job import CAUSAL, Job, batch_on, inner, kind_of, make_network, meta_networks
from distill.planning.live_bytes import LiveBytes, OnMeta, Phases, Points
from students.networks.causal_wan import CausalWan
from teachers import flow
from teachers.errors import UserError
from teachers.networks.kind import AvatarTeacher, NetworkKind
from teachers.networks.sequence import SequenceGroup

CHECKPOINTING, LORA = "checkpointing", "lora"
DEPTHS = (3, 6)
"""Blocks of the networks whose memory stands for that of deeper ones."""


def forwards(job: Job, stage: str, cadence: int = 60) -> dict[str, float]:
    """Network forwards of one training step by role, with one micro-step an update; guidance and context passes count.

    Means over `cadence` steps, and over what ranks draw together, exit steps and (at some quantiles) lengths of rollouts. A
    role's forward is over a whole clip (with clean context, over twice its frames), in a rollout the student's over one chunk.
    Backward and recomputation are not counted.
    """
    return step_costs(job, stage, cadence).forwards


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """`forwards` of a mean training step by network; by role that is updated: the networks that one of its micro-steps `calls`,
    its `flops` on a rank (forward, backward and recomputation), how often the whole stage updates it, and of a micro-step the
    collectives among ranks that share sequences, with the bytes that each sends in them."""

    forwards: dict[str, float]
    calls: dict[str, frozenset[str]]
    flops: dict[str, float]
    updates: dict[str, int]
    exchanges: dict[str, tuple[float, float]]


def step_costs(job: Job, stage: str, cadence: int = 60) -> StepCosts:
    """What a stage computes, at the depths of its networks: FLOPs go on from one and two blocks along a line, which is exact but
    for the few of audio's projections."""
    part = job.stages[stage]
    made = _method(job, stage, meta_networks(job, stage))
    steps = [made.roles_to_update(step) for step in range(1, cadence + 1)]
    totals, calls, flops, updates, exchanges = {}, {}, {}, {}, {}
    for role in sorted({role for roles in steps for role in roles}):
        called: dict[str, float] = {}

        def measure(small: Job, role=role, called=called) -> list[float]:
            found, *counts = _micro_step(small, stage, role)
            called.update(found)
            return counts

        flops[role], *exchanged = _at_depth(job, stage, measure, (1, 2))
        exchanges[role] = (exchanged[0], exchanged[1])
        calls[role] = frozenset(name for name, number in called.items() if number)
        each = sum(roles.count(role) for roles in steps) / cadence
        first = made.roles_to_update(0).count(role) - each
        updates[role] = round(each * part.train.num_steps + first)
        for name, number in called.items():
            totals[name] = totals.get(name, 0.0) + each * number
    order = (*job.needs(stage).trained, *job.needs(stage).frozen)
    called = {name: totals[name] for name in order if totals.get(name)}
    return StepCosts(forwards=called, calls=calls, flops=flops, updates=updates, exchanges=exchanges)


def _micro_step(job: Job, stage: str, role: str) -> tuple[dict[str, float], float, float, float]:
    """Of one micro-step of `role`: forwards by network, FLOPs, collectives among ranks that share sequences, and the bytes that a
    rank sends in these; means over what ranks draw together."""
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
    shares = job.sequence or SequenceGroup(1)
    before = shares.calls, shares.sent
    for quantile in quantiles:
        with OnMeta(shared, quantile) as mode, LiveBytes() as live:
            made.loss(role, batch_on(job, stage), rng, shared).value.backward()
        work.append(live.flops)
        if not mode.draws:
            break
    means = [total / len(work) for total in (sum(work), shares.calls - before[0], shares.sent - before[1])]
    return {name: number / len(work) for name, number in called.items()}, means[0], means[1], means[2]


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
    needs, window = job.needs(stage), job.spec.history.window
    cycle = len(window) if isinstance(window, tuple) else 1
    kinds: list[NetworkKind] = []
    for kind in (
        kind_of(job, role, stage) for role in roles or (*needs.trained, *needs.frozen) if role != "discriminator"
    ):
        few, deep = _two_depths(kind, depths, cycle)
        if kind not in kinds and kind.num_blocks > deep and kind.shallow(few) != kind:
            kinds.append(kind)
    if not kinds or "discriminator" in needs.trained:  # whose heads ask for deeper blocks
        return list(measure(job))
    ends = [_two_depths(kind, depths, cycle) for kind in kinds]
    total = start = list(measure(_cut(job, [(kind, few) for kind, (few, _) in zip(kinds, ends, strict=True)])))
    for kind, (few, deep) in zip(kinds, ends, strict=True):
        pairs = zip(kinds, ends, strict=True)
        deeper = measure(_cut(job, [(other, two[other == kind]) for other, two in pairs]))
        slope = (kind.num_blocks - few) / (deep - few)
        total = [now + slope * (b - a) for now, a, b in zip(total, start, deeper, strict=True)]
    return total


def _two_depths(kind: NetworkKind, depths: tuple[int, int], cycle: int) -> tuple[int, int]:
    """The depths that stand for a network's: with a cycle of windows whole cycles apart, of each other and of its own."""
    few, many = depths
    if cycle == 1:
        return few, max(many, few + kind.period)
    step, few = math.lcm(kind.period, cycle), max(few, cycle)
    few += (kind.num_blocks - few) % step
    return few, few + step


def clip_costs(job: Job, role: str, num_steps: int = 0, stage: str = "clips") -> tuple[float, int]:
    """(FLOPs of a clip, of all ranks that share it; bytes of a rank at the peak but for weights while `job.at_once` of them are
    made): by the rollout of `student`, by `num_steps` guided steps of a teacher or, chunk by chunk, of `ar_teacher`. In the stage
    trajectories a batch of those, an `ar_teacher`'s under the data's clean chunks."""
    stream = role == "ar_teacher" and stage == "clips"

    def measure(small: Job) -> list[float]:
        counts = [_generate(small, role, stage, steps) for steps in ((1, 2) if stream else (1,))]
        first, last = counts[0], counts[-1]
        more = (num_steps - 1) * (last[0] - first[0]) if stream else (max(1, num_steps) - 1) * first[0]
        return [(first[0] + more) / (first[2]), last[1]]

    flops, peak = _at_depth(job, stage, measure, DEPTHS, (role,))
    return flops * job.together, round(peak)


def _generate(job: Job, role: str, stage: str, num_steps: int) -> tuple[int, int, int]:
    """FLOPs, peak and number of one batch of clips."""
    assert job.trajectories is not None
    net, live = make_network(job, role, stage).eval().requires_grad_(False), LiveBytes()
    live.weigh(net)
    batch, n = batch_on(job, stage), job.spec.chunk_frames
    assert batch.x0 is not None
    chunk, guidance = batch.x0[:, :, :n], job.trajectories.guidance if stage == "clips" else job.trajectory_guidance
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


def stream_costs(job: Job) -> tuple[float, int] | None:
    """(FLOPs of a denoising step behind a full context, bytes of that context: keys and values, un-rotated and rotated) of one
    stream as it is served; None for students without a KV cache, and where chunks are in flight together."""
    if job.spec.schedule.depth > 1 or not isinstance(make_network(job, "student", "clips"), CausalWan):
        return None
    flops, size = _at_depth(job, "clips", _step, DEPTHS, ("student",))
    return flops * job.together, round(size * job.together)


def _step(job: Job) -> tuple[float, float]:
    """`stream_costs` of a rank: every chunk of the context is as the first one, committed once."""
    student, spec, history = make_network(job, "student", "clips").eval(), job.spec, job.spec.history
    given = batch_on(job, "clips").conditions.index(slice(0, 1)).frames(0, spec.chunk_frames)
    x, live = torch.zeros(1, spec.latent_size[0], spec.chunk_frames, *spec.latent_size[1:], device="meta"), LiveBytes()
    full = spec.num_chunks - 1
    if history.capacity is not None:
        full = history.capacity + history.memory_every * (history.memory + 1)
    with OnMeta(), torch.no_grad():
        state, steps = student.open(given.text), []
        for i, sigma in enumerate(spec.sigmas if history.commit == "same_level" else ()):
            steps.append(student.denoise(state, None, x, sigma, given, i)[1])
        made = student.commit(state, x, given, steps).cached
        state = student.resume(state, [replace(entry, chunk=i) for i in range(full) for entry in made], full)
        plan = student.plan(state, given)
        with live:
            student.denoise(state, plan, x, spec.sigmas[-1], given, len(spec.sigmas) - 1)
    kept = sum(x.numel() * x.element_size() for one in state.cached for x in (*one.keys, *one.values))
    return live.flops, 2 * kept


def trace(job: Job, stage: str, role: str, *switches: str) -> Points:
    """The points of `trace_phases`."""
    return trace_phases(job, stage, role, *switches)[0]


def trace_phases(job: Job, stage: str, role: str, *switches: str) -> tuple[Points, Phases]:
    """Points and phases of one micro-step: the stage's own loss and its backward, of what ranks draw together the largest; for
    trajectories one step of the solver. `switches`: checkpointing of the blocks, lora for all trained roles. Of networks of
    many blocks only two points, the peak and what is alive with all gradients, follow lines in their depth, the peak one for
    each phase: a network's call, and the backward pass."""
    needs = job.needs(stage)
    others = () if needs.trained else needs.frozen  # beside training no block of theirs leaves anything behind
    kept = (*needs.trained, *(name for name in needs.frozen if name in CAUSAL or name in others))
    if all(name == "discriminator" or kind_of(job, name, stage).num_blocks <= 2 * DEPTHS[1] for name in kept):
        live = _live(job, stage, role, *switches)
        return tuple(sorted(live.points.items())), tuple(zip(live.called, live.phases, strict=True))
    called: list[frozenset[str]] = []

    def measure(small: Job) -> list[float]:
        live = _live(small, stage, role, *switches)
        called[:] = live.called
        return [*max(live.points.items()), *live.phases]

    count, last, *phases = map(round, _at_depth(job, stage, measure, DEPTHS, kept))
    points = ((0, max(phases)), (count, last)) if count else ((0, max(phases)),)
    return points, tuple(zip(called, phases, strict=True))


def _live(job: Job, stage: str, role: str, *switches: str) -> LiveBytes:
    """What is alive in one micro-step."""
    spec, on_data = job.spec, job.needs(stage).batch == "x0"
    alike = spec.history.commit == "clean" and spec.schedule.depth == 1
    if on_data and alike:  # steps without gradient leave nothing behind: one stands for all of them
        job = replace(job, spec=replace(spec, sigmas=spec.sigmas[:2]))
    nets = meta_networks(job, stage, checkpointing=CHECKPOINTING in switches, lora=LORA in switches)
    batch, live = batch_on(job, stage), LiveBytes()
    for name, net in nets.items():
        live.weigh(net)
        inner(net).register_forward_pre_hook(lambda *_, name=name: live.begin_phase(name))
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
                generate.solve_states(solver, batch.conditions, batch.x0, (1.0, 0.5), (0, 1), job.trajectory_guidance)
            else:
                value = made.loss(role, batch, rng, shared).value
                live.begin_phase()
                value.backward()
    except (ValueError, RuntimeError) as error:
        line = str(error).splitlines()[0] if str(error) else repr(error)
        raise UserError(f"{stage}.{role} is not possible: {line}; fix the recipe") from error
    return live


def _method(job: Job, stage: str, nets: Mapping[str, Any]) -> Any:
    roles = {**nets, "clip_reader": PlannedReader(job.spec, job.decode_bytes, job.pull_back.bytes)}
    return methods.build(job.stages[stage].method, roles, (*job.spec.sigmas, 0.0))
