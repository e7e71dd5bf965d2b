"""What a recipe needs, before any weight is read: parameters, bytes a rank, disk, network forwards. Pure functions.

Weights, gradients, moments and averages follow from parameter counts. Activations do not: the method's own loss runs forward and
backward on the meta device, and what is alive is added up (`distill.planning.trace`). So the plan follows the code: the graphs of a
rollout, the context, what a checkpointed block keeps.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import nn

from distill.planning.job import LORA_RANK, Job, inner, make_network, meta_networks
from distill.planning.live_bytes import Phases, Points
from distill.planning.trace import CHECKPOINTING, LORA, StepCosts, step_costs, stream_costs, trace_phases
from distill.training.config import TrainConfig
from distill.training.lora import ENGINES as LORA_ENGINES
from students.serving.optimize import DTYPES
from students.spec import Spec
from students.weights.adapter import expected
from teachers import flow
from teachers.errors import UserError
from teachers.networks.kind import networks_in

if TYPE_CHECKING:
    pass

GIB = 2**30
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
OFFLOAD_TEACHER, OFFLOAD = "offload teacher", ("offload teacher", "offload student", "offload fake_score")
"""Switches of single roles: `engine.offload`."""
MAX_LIVE_PARAMETERS = 10**9  # DeepSpeed's stage3_max_live_parameters
MEMORY_SAVING_OPTIONS = (
    (),
    (CHECKPOINTING,),
    (OFFLOAD_TEACHER,),
    (CHECKPOINTING, OFFLOAD_TEACHER),
    OFFLOAD,
    (CHECKPOINTING, *OFFLOAD),
    (CHECKPOINTING, LORA),
    (CHECKPOINTING, LORA, *OFFLOAD),
)
"""What `suggest_fix` tries, in this order."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """One optimizer step of `role` in `stage`; or, of a role that is not trained, one forward. `together` ranks share a sequence.

    `points`, and `phases`, by memory-saving options but for offload; `Traced` when first needed."""

    stage: str
    role: str
    trained: tuple[str, ...]
    frozen: tuple[str, ...] = ()
    train: TrainConfig | None = None
    together: int = 1
    points: Mapping[tuple[str, ...], Points]
    phases: Mapping[tuple[str, ...], Phases] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.stage}.{self.role}"

    def micro_steps(self, ranks: int) -> int:
        """Of one update; UserError where the batches do not divide."""
        if ranks % self.together:
            raise UserError(f"engine.sequence_parallel: {ranks} GPUs are no multiple of {self.together}; change one")
        return self.train.micro_steps(ranks // self.together) if self.train else 1

    def traced_with(self, switches: Sequence[str]) -> tuple[Points, Phases]:
        """Nothing but weights differs for a role that is not trained; no phases where they are not known."""
        kept = tuple(word for word in switches if word not in OFFLOAD) if self.trained else ()
        return self.points[kept], self.phases.get(kept, ())

    def activations(self, *switches: str) -> int:
        """Bytes at the peak, the context included where it is alive then."""
        return max(size for _, size in self.traced_with(switches)[0])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a job needs. By role: parameters, lora (trained elements of a LoRA; of those in `adapted` as the job specifies), and
    `split_blocks`; frozen roles in `half` are held in bf16; the LoRAs of `backbone`, and what is frozen of it, share one set of
    frozen weights. `shard_ranks`, `gather_once`: the engine's. costs, by stage; bytes of context, by stage, and of trajectories.
    `together` ranks share a sequence. `stream`: `stream_costs`."""

    precision: Literal["fp32", "bf16"]
    bucket_mib: int
    parameters: Mapping[str, int]
    lora: Mapping[str, int]
    blocks: Mapping[str, int]
    outside: Mapping[str, int]
    updates: tuple[Update, ...]
    adapted: frozenset[str] = frozenset()
    backbone: frozenset[str] = frozenset()
    half: frozenset[str] = frozenset()
    context: Mapping[str, int] = field(default_factory=dict)
    trajectories: int = 0
    trajectory_forwards: int = 0
    shard_ranks: int | None = None
    gather_once: bool = False
    costs: Mapping[str, StepCosts] = field(default_factory=dict)
    together: int = 1
    stream: tuple[float, int] | None = None

    @property
    def forwards(self) -> dict[str, dict[str, float]]:
        """Network forwards of a training step by stage and role."""
        return {stage: found.forwards for stage, found in self.costs.items()}


def make_plan(job: Job) -> Plan:
    """Everything that does not depend on the number of GPUs; UserError where the job cannot run at all."""
    spec = job.spec
    cell = spec.codec.patch * spec.network.patch
    for name in ("height", "width"):
        if getattr(spec, name) % cell:
            size = getattr(spec, name)
            raise UserError(f"{name} {size} is no multiple of {cell}: recipe; a token is {cell} pixels wide")
    spec.network.check()
    solver = job.trajectories if job.solves else None
    names = ("trajectories", *job.stages) if solver else tuple(job.stages)
    if solver:
        flow.on_grid(spec.sigmas, flow.sigma_grid(solver.num_steps, solver.shift))
    nets: dict[str, nn.Module] = {}
    for stage in names:
        nets |= meta_networks(job, stage)
    if "teacher" not in nets:  # no stage learns from it, but the report and the health panel have its clips
        nets["teacher"] = make_network(job, "teacher", names[-1], False).requires_grad_(False)
    order = sorted(nets, key=lambda role: (role not in ("teacher", "student", "fake_score"), role != "teacher"))
    on_policy = [stage for stage in job.stages if "fake_score" in job.needs(stage).trained]
    return Plan(
        precision=job.precision,
        bucket_mib=job.bucket_mib,
        parameters={role: num_parameters(nets[role]) - num_adapters(nets[role]) for role in order},
        lora={role: num_lora_parameters(job, role, nets[role]) for role in order},
        blocks={role: split_blocks(nets[role])[0] for role in order},
        outside={role: split_blocks(nets[role])[1] for role in order},
        adapted=frozenset(job.lora),
        backbone=job.backbone,
        half=job.half,
        shard_ranks=job.shard_ranks,
        gather_once=job.gather_once,
        updates=tuple(update for stage in names for update in _updates(job, stage)),
        context={stage: context_bytes(job, stage) for stage in on_policy},
        trajectories=trajectory_bytes(spec, solver.num_pairs) if solver else 0,
        trajectory_forwards=solver.num_steps * job.trajectory_guidance.passes if solver else 0,
        costs={stage: step_costs(job, stage) for stage in job.stages},
        together=job.together,
        stream=stream_costs(job),
    )


def num_parameters(net: nn.Module, trained: bool = False) -> int:
    """Elements of a network's parameters, or of those with a gradient."""
    return sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad or not trained)


def num_adapters(net: nn.Module) -> int:
    """Elements of a LoRA's own matrices."""
    return sum(parameter.numel() for name, parameter in net.named_parameters() if ".lora_" in name)


def num_lora_parameters(job: Job, role: str, net: nn.Module) -> int:
    """What is trained of a role as a LoRA, by default on every matrix of attentions and MLP; all of a role without blocks."""
    network = next(networks_in(net), None)
    targets = () if network is None else network.kind.lora_targets
    if network is None or role in job.lora or not targets:
        return num_parameters(net, trained=role in job.lora)
    return sum(math.prod(shape) for shape in expected(network, LORA_RANK, targets, ()).values())


def split_blocks(net: nn.Module) -> tuple[int, int]:
    """Elements of two blocks, one at work and the next one on its way; and of all that is outside of blocks."""
    blocks = [num_parameters(block) for block in getattr(inner(net), "blocks", ()) if isinstance(block, nn.Module)]
    return sum(blocks[:2]), num_parameters(net) - sum(blocks)


def context_bytes(job: Job, stage: str) -> int:
    """The context of the last chunk of a training rollout: keys and values of every block, un-rotated and rotated."""
    spec, part = job.spec, job.stages[stage]
    longest = max(spec.num_chunks, getattr(part.method, "rollout_chunks", 0))
    seen = max(spec.history.mean_visible(chunk, spec.network.num_blocks) for chunk in range(longest))
    tokens = spec.chunk_frames * spec.token_grid[0] * spec.token_grid[1]
    passes = 1 if spec.history.commit == "clean" else len(spec.sigmas)
    size = DTYPES[job.precision].itemsize
    return int(2 * passes * seen * part.train.batch_size * tokens * spec.network.kv_per_token * size / job.together)


def trajectory_bytes(spec: Spec, num_pairs: int) -> int:
    """Tensors of the trajectories stage: fp16 states at the student's sigmas and at 0, and the row of each pair, int64."""
    channels, height, width = spec.latent_size
    return num_pairs * ((len(spec.sigmas) + 1) * channels * spec.horizon_frames * height * width * 2 + 8)


def rank_bytes(plan: Plan, update: Update, engine: str, ranks: int, switches: Sequence[str] = ()) -> dict[str, float]:
    """Bytes on one of `ranks` GPUs during an update, by part ("student weights", ...), and their "peak".

    As the roles of `distill.training` hold them: weights, gradients, moments and averages are fp32, whole (ddp) or in parts of
    1/ranks (fsdp2: of 1/shard_ranks). Of zero1 these are moments, averages and a second copy of the weights, the masters; of
    zero2 gradients too; of zero3 and fsdp2 all, frozen networks included (Rajbhandari et al. 1910.02054). bf16 is what autocast
    copies, what fsdp2 gathers, and weights of `plan.half`. `switches`, of MEMORY_SAVING_OPTIONS: checkpointing of blocks; offload
    to the host of what a trained role has in parts, and of a frozen one, of which two blocks remain where it is whole; lora for
    all trained roles. Activations may be gone when all gradients are there, so the peak can be less than the sum. UserError where
    the batch does not divide. Codec, encoders, probes and what an allocator wastes are not in it.
    """
    parts, learned = _resident(plan, update, engine, ranks, switches)
    resident = sum(parts.values())
    zero, offload = engine.startswith("zero"), is_away(update.role, switches) and engine != "ddp"
    count, micro_steps = learned.get(update.role, 0), update.micro_steps(ranks)
    each = {"ddp": 4.0, "zero1": 4.0}.get(engine, 4 / num_parts(plan, engine, ranks))
    if engine in ("zero3", "fsdp2") and offload:
        each = 0.0
    (points, phases), most = update.traced_with(switches), update.activations(*switches)
    if engine == "fsdp2" and phases and "gathered" in parts:  # not all is gathered when the most is alive
        late = max(size + _gathered(plan, update, engine, called) for called, size in phases) - parts["gathered"]
        points = tuple((held, other if held else min(other, round(late))) for held, other in points)
    if micro_steps > 1:  # the gradients wait for the next one
        points = ((count, max(other for _, other in points)),)
    parts["gradients"] = count * each
    parts["activations"] = float(most)
    flattened = 4 / ranks if zero and not offload else 0.0
    bucket = plan.bucket_mib * 2**20 * (2 if zero else 1) if ranks > 1 and count and engine != "fsdp2" else 0
    parts["peak"] = resident + max(
        count * (each + flattened) + bucket, *(held * each + other for held, other in points)
    )
    return parts


def _resident(plan: Plan, update: Update, engine: str, ranks: int, switches: Sequence[str]) -> tuple[dict, dict]:
    """What is there all the time by part, but for the gradients of the role; and the trained elements by role."""
    size, mixed = DTYPES[plan.precision].itemsize, plan.precision != "fp32"
    whole, num = engine == "ddp", num_parts(plan, engine, ranks)
    sharded = engine in ("zero3", "fsdp2") and bool(update.trained)  # ranks solve trajectories apart, with whole ones
    parts: dict[str, float] = {}
    adapters = {role for role in update.trained if role in plan.adapted or LORA in switches}
    learned = {role: (plan.lora if role in adapters else plan.parameters)[role] for role in update.trained}
    shared = plan.backbone & {*adapters, *update.frozen} if plan.backbone & (plan.adapted | adapters) else frozenset()
    if shared:
        parts["backbone weights"] = (1 / num if sharded else 1.0) * size * plan.parameters[max(shared)]
    for role in (*update.trained, *update.frozen):
        count, learns = plan.parameters[role], learned.get(role, 0)
        frozen = 0 if learns == count or role in shared else count
        held = size if role in adapters else 2 if role in plan.half else 4
        away = is_away(role, switches)
        part = (0.0 if away and not whole else 1.0) / num
        keep = part if sharded else 1.0
        if not learns and away and not sharded and frozen:
            frozen = plan.blocks[role] + plan.outside[role]
        parts[f"{role} weights"] = keep * (frozen * held + 4 * learns)
        if not learns:
            continue
        if role == update.trained[0]:
            parts[f"{role} average"] = part * 4 * learns
        parts[f"{role} moments"] = part * 8 * learns
        if engine in ("zero1", "zero2"):
            parts[f"{role} masters"] = part * 4 * learns
        if engine == "zero3" and role != update.role:  # its buffer is there all the time
            parts["idle gradients"] = parts.get("idle gradients", 0.0) + part * 4 * learns
    if mixed and not sharded and update.role in learned:
        copied = learned if update.role in adapters else plan.parameters
        parts["bf16 copies"] = size * float(copied[update.role])
    if sharded:
        costs, roles = plan.costs.get(update.stage), (*update.trained, *update.frozen)
        called = [role for role in roles if not costs or role in costs.calls[update.role]]
        parts["gathered"] = _gathered(plan, update, engine, called)
    return parts, learned


def num_parts(plan: Plan, engine: str, ranks: int) -> int:
    """Parts that an engine cuts a trained role into."""
    if engine == "ddp":
        return 1
    return min(ranks, plan.shard_ranks or ranks) if engine == "fsdp2" else ranks


def is_away(role: str, switches: Sequence[str]) -> bool:
    """Whether a role waits in the host's memory."""
    return f"offload {role}" in switches


def offloaded_bytes(plan: Plan, update: Update, engine: str, ranks: int, switches: Sequence[str]) -> float:
    """Bytes in the host's memory of a rank for the roles that wait there."""
    with_them, _ = _resident(plan, update, engine, ranks, switches)
    without, learned = _resident(plan, update, engine, ranks, tuple(word for word in switches if word not in OFFLOAD))
    each = 4 / num_parts(plan, engine, ranks) if engine != "ddp" else 0.0
    gradients = max((count * each for role, count in learned.items() if is_away(role, switches)), default=0.0)
    return sum(without.values()) - sum(with_them.values()) + gradients


def _gathered(plan: Plan, update: Update, engine: str, called: Collection[str]) -> float:
    """Bytes of weights that are in one piece at once, of the roles that were called. fsdp2 casts blocks, two at a time or,
    of roles that are gathered once, all; what is outside of them stays from a role's first call on. DeepSpeed keeps
    MAX_LIVE_PARAMETERS elements, uncast."""
    held = {role: 2.0 if role in plan.half else 4.0 for role in called}
    if engine == "zero3":
        return max(min(plan.parameters[role], MAX_LIVE_PARAMETERS) * held[role] for role in called)
    size, once = DTYPES[plan.precision].itemsize, update.trained if plan.gather_once else ()
    blocks = [plan.blocks[role] for role in called if role not in once]
    whole = sum(plan.parameters[role] - plan.outside[role] for role in called if role in once)
    return size * (whole + max(blocks, default=0)) + sum(plan.outside[role] * held[role] for role in called)


def peak_bytes(plan: Plan, engine: str, ranks: int, switches: Sequence[str] = ()) -> float:
    """The largest peak of all updates on one of `ranks` GPUs."""
    return max(rank_bytes(plan, update, engine, ranks, switches)["peak"] for update in plan.updates)


def suggest_fix(
    plan: Plan, engine: str, ranks: int, limit: float, have: tuple[str, ...] = ()
) -> tuple[str, ...] | None:
    """`have`, and the first of MEMORY_SAVING_OPTIONS with which everything fits into `limit` bytes a rank; None where nothing
    helps."""
    if not is_possible(plan, engine):
        return None
    ladder = memory_saving_options(plan, engine, have)
    return next((switches for switches in ladder if peak_bytes(plan, engine, ranks, switches) <= limit), None)


def memory_saving_options(plan: Plan, engine: str, have: tuple[str, ...]) -> list[tuple[str, ...]]:
    """`have` and each of MEMORY_SAVING_OPTIONS that an engine has: ddp keeps what it trains on the device, and LoRA roles share
    the teacher's weights."""
    found: dict[tuple[str, ...], None] = {}
    for switches in MEMORY_SAVING_OPTIONS:
        away = [word for word in switches if word in OFFLOAD and (word == OFFLOAD_TEACHER or engine != "ddp")]
        if (LORA in switches and engine not in LORA_ENGINES) or (away and plan.adapted):
            continue
        kept = [word for word in switches if word not in OFFLOAD]
        found[tuple(dict.fromkeys((*have, *kept, *away)))] = None
    return list(found)


def is_possible(plan: Plan, engine: str) -> bool:
    """Whether an engine can hold the roles: LoRAs share weights, which some cut to pieces."""
    return not plan.adapted or engine in LORA_ENGINES


class Traced(dict):
    """Points by switches, traced when they are first needed; and then their phases."""

    def __init__(self, job: Job, stage: str, role: str):
        super().__init__()
        self.ask = (job, stage, role)
        self.phases: dict[tuple[str, ...], Phases] = {}

    def __missing__(self, switches: tuple[str, ...]) -> Points:
        self[switches], self.phases[switches] = trace_phases(*self.ask, *switches)
        return self[switches]


def _updates(job: Job, stage: str) -> list[Update]:
    needs = job.needs(stage)
    found = {role: Traced(job, stage, role) for role in needs.trained or needs.frozen[:1]}
    return [
        Update(
            stage=stage,
            role=role,
            trained=needs.trained,
            frozen=needs.frozen,
            train=job.stages[stage].train if needs.trained else None,
            together=job.together,
            points=points,
            phases=points.phases,
        )
        for role, points in found.items()
    ]
