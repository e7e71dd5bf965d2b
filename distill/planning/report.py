"""The report of `distill plan`: what every stage needs on so many GPUs as text and as JSON, and which overrides make it fit."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from distill.planning.batches import whole_batches
from distill.planning.estimate import (
    LORA,
    OFFLOAD,
    Plan,
    is_possible,
    memory_saving_options,
    rank_bytes,
    suggest_fix,
)
from distill.planning.outlook import Rates, StageOutlook, copied_bytes, disk_at_most, host_bytes, memory, warnings
from teachers.errors import UserError

if TYPE_CHECKING:
    from distill.recipe import Recipe

WORDS = {"ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}


@dataclass(frozen=True)
class Shipped:
    """The stages of a recipe, the rates that time them, and the engine and switches that the recipe has; `sharing`: the numbers of
    ranks that could share each sequence, more than the recipe's own."""

    stages: tuple[StageOutlook, ...]
    rates: Rates
    engine: str
    switches: tuple[str, ...]
    sharing: tuple[int, ...] = ()

    @property
    def words(self) -> str:
        return " + ".join((WORDS[self.engine], *in_words(self.switches)))


def in_words(switches: Sequence[str]) -> list[str]:
    """Switches as people read them: the roles that wait in the host's memory together."""
    away = [word.removeprefix("offload ") for word in switches if word.startswith("offload ")]
    others = [word for word in switches if not word.startswith("offload ")]
    return others + ([f"offload of {', '.join(away)}"] if away else [])


def engine_of(recipe: "Recipe") -> tuple[str, tuple[str, ...]]:
    """The engine of a recipe, and its switches."""
    given = recipe.engine
    switches = ("checkpointing",) if given.checkpointing else ()
    return given.kind or "ddp", (*switches, *(f"offload {role}" for role in given.offload))


def as_text(
    plan: Plan, name: str, counts: list[int], engines: list[str], gib: float, shipped: Shipped | None = None
) -> str:
    """The whole report: the recipe's own needs; for each GPU count the stages as shipped, and a table of GiB a rank."""
    lines = [f"{name}, {plan.precision}", *_facts(plan)]
    if shipped is not None:
        lines += _common(shipped)
    for count in counts:
        if shipped is not None:
            lines += ["", *_stages(plan, shipped, count, gib)]
        if engines:
            lines += ["", *_table(plan, count, engines, gib, () if shipped is None else shipped.switches)]
    return "\n".join(lines) + "\n"


def _common(shipped: Shipped) -> Iterator[str]:
    """What does not depend on the number of GPUs: disk, rates, what the columns are, warnings."""
    stages, rates = shipped.stages, shipped.rates
    left, written = (
        ", ".join(f"{stage.name} {_gib(size)}" for stage in stages if (size := getattr(stage, name)))
        for name in ("disk", "checkpoints")
    )
    yield f"disk         {_gib(disk_at_most(stages))} GiB at most: {left}"
    yield f"             checkpoints, until their stage is done: {written}"
    for stage in stages:
        if stage.disk_per_clip:
            yield f"             and {stage.disk_per_clip / 1e6:.3g} MB for each clip of the folder that it trains on"
    bf16, fp32 = (rates.flops(kind) / 1e12 for kind in ("bf16", "fp32"))
    share = f"{rates.mfu:g} of {rates.tflops:g} (--mfu, --tflops)"
    yield f"hours        at {bf16:.0f} TFLOP/s a GPU in bf16, {share}, and {fp32:.0f} in fp32;"
    yield "             reading text and sound, drawing and scoring are not in them, nor clips of a folder"
    beside = {name: size for stage in stages for name, size in stage.beside.items() if size}
    names = f": {', '.join(f'{name} {_gib(size)}' for name, size in beside.items())}" if beside else ""
    yield "columns      GiB a GPU: update = a training step, or a step that solves trajectories; clips = making or encoding clips;"
    yield f"             beside = what stays loaded in either{names}; peak = the larger of the two, and beside"
    yield from warnings(stages)


def _stages(plan: Plan, shipped: Shipped, count: int, gib: float) -> Iterator[str]:
    """A row a stage, as shipped; hosts; and whether it fits, or what makes it."""
    rates, price = shipped.rates, shipped.rates.dollars
    heads = ["update", "clips", "beside", "peak", "FLOP", "hours", *(["dollars"] if price else [])]
    title = f"{count} GPU{'s' if count > 1 else ''}, {shipped.words}"
    if len(title) > 35:
        yield title
        title = ""
    yield f"{title:<36}" + "".join(f"{head:>10}" for head in heads)
    try:
        micro_steps = {update.stage: update.micro_steps(count) for update in plan.updates}
    except UserError as error:
        yield str(error)
        for line in whole_batches(plan, shipped.sharing, count):
            yield f"it does with {line}"
        return
    total = 0.0
    for stage in shipped.stages:
        found, hours = memory(plan, stage, shipped.engine, count, shipped.switches), stage.hours(count, rates)
        total += hours
        sizes = (found["update"], found["clips"], sum(stage.beside.values()), found["peak"])
        cells = [
            *(_gib(size) if size else "-" for size in sizes),
            *((f"{stage.flops:.2e}", f"{hours:.2f}") if stage.flops else "--"),
        ]
        cells += [f"{hours * count * price:,.0f}"] if price else []
        many = micro_steps.get(stage.name, 1)
        label = f"{stage.name}, {many} micro-steps" if many > 1 else stage.name
        yield f"{label:<36}" + "".join(f"{cell:>10}" for cell in cells)
    cost = f", {total * count * price:,.0f} dollars" if price else ""
    yield f"together {total:.1f} hours, {total * count:.0f} GPU hours{cost}"
    hosts = max(host_bytes(plan, stage, shipped.engine, count, shipped.switches) for stage in shipped.stages)
    copied = max(copied_bytes(stage, shipped.engine, count) for stage in shipped.stages)
    yield f"host memory of a machine {_gib(hosts)} GiB, and what the processes themselves take;"
    yield f"{_gib(copied)} GiB more while a checkpoint is written beside training; unless twice that is free, training waits for it"
    lines = overrides(plan, shipped, count, gib)
    if lines == []:
        yield f"fits as shipped into {gib:g} GiB"
        return
    peaks = {
        stage.name: _peak(plan, stage, shipped.engine, count, shipped.switches) / 2**30 for stage in shipped.stages
    }
    over = ", ".join(f"{name} {size:.1f}" for name, size in peaks.items() if size > gib)
    fix = "take more GPUs, smaller batches or networks" if lines is None else f"it does with {shlex.join(lines)}"
    shared = [n for n in shipped.sharing if count % n == 0]
    if lines is None and shared:
        fix += (
            f", or let ranks share each clip and plan again: engine.sequence_parallel={' or '.join(map(str, shared))}"
        )
    yield f"does not fit into {gib:g} GiB as shipped: {over}; {fix}"


def _peak(plan: Plan, stage: StageOutlook, engine: str, count: int, switches: tuple[str, ...]) -> float:
    return memory(plan, stage, engine, count, switches)["peak"]


def overrides(plan: Plan, shipped: Shipped, count: int, gib: float) -> list[str] | None:
    """The overrides with which every stage fits into `gib` GiB a rank, none as shipped; None where nothing helps."""
    have = shipped.switches
    for update in plan.updates:
        try:
            update.micro_steps(count)
        except UserError:
            return None
    for engine in dict.fromkeys((shipped.engine, "fsdp2", "zero3")):
        if not is_possible(plan, engine):
            continue
        for switches in memory_saving_options(plan, engine, have):
            if LORA in switches:
                continue
            away = [word for word in switches if word in OFFLOAD]
            if all(_peak(plan, stage, engine, count, switches) <= gib * 2**30 for stage in shipped.stages):
                kind = [] if engine == shipped.engine else [f"engine.kind={engine}"]
                if kind and engine != "fsdp2":  # which alone has them
                    kind += ["engine.shard_ranks=null"] * bool(plan.shard_ranks)
                    kind += ["engine.gather_once=false"] * plan.gather_once
                more = [f"engine.{name}=true" for name in switches if name not in (*have, *away)]
                roles = ",".join(word.removeprefix("offload ") for word in away)
                return kind + more + ([f"engine.offload=[{roles}]"] if set(away) - set(have) else [])
    return None


def as_json(
    plan: Plan, name: str, counts: list[int], engines: list[str], gib: float, shipped: Shipped | None = None
) -> dict[str, Any]:
    """The report's numbers: bytes, parameters, forwards, FLOPs, hours. stages[count] as shipped; ranks[count][engine][update]
    without and with checkpointing."""

    def parts(engine: str, count: int) -> dict[str, Any]:
        return {
            update.name: {
                word: {part: round(size) for part, size in rank_bytes(plan, update, engine, count, on).items()}
                for word, on in (("plain", ()), ("checkpointing", ("checkpointing",)))
            }
            for update in plan.updates
        }

    def fits(engine: str, count: int) -> list[str] | None:
        found = suggest_fix(plan, engine, count, gib * 2**30, () if shipped is None else shipped.switches)
        return None if found is None else list(found)

    given = (
        {}
        if shipped is None
        else {
            "engine": {"kind": shipped.engine, "switches": list(shipped.switches)},
            "rates": asdict(shipped.rates),
            "stages": {
                str(count): {s.name: _stage_json(plan, s, shipped, count) for s in shipped.stages} for count in counts
            },
            "overrides": {str(count): overrides(plan, shipped, count, gib) for count in counts},
        }
    )
    return given | {
        "recipe": name,
        "precision": plan.precision,
        "gib_per_gpu": gib,
        "parameters": dict(plan.parameters),
        "lora_parameters": dict(plan.lora),
        "context_bytes": dict(plan.context),
        "stream": None if plan.stream is None else dict(zip(("step_flops", "context_bytes"), plan.stream, strict=True)),
        "trajectory_bytes": plan.trajectories,
        "forwards_per_trajectory": plan.trajectory_forwards,
        "forwards_per_step": {stage: dict(roles) for stage, roles in plan.forwards.items()},
        "sequence_parallel": plan.together,
        "exchanges_per_micro_step": {
            stage: {role: {"calls": calls, "bytes": size} for role, (calls, size) in costs.exchanges.items()}
            for stage, costs in plan.costs.items()
        },
        "ranks": {str(count): {e: parts(e, count) for e in engines if is_possible(plan, e)} for count in counts},
        "fits_with": {str(count): {engine: fits(engine, count) for engine in engines} for count in counts},
    }


def _stage_json(plan: Plan, stage: StageOutlook, shipped: Shipped, count: int) -> dict[str, Any]:
    """Everything of one stage on `count` GPUs; memory is null where its batches do not divide."""
    hours, price = stage.hours(count, shipped.rates), shipped.rates.dollars
    try:
        found = {k: round(v) for k, v in memory(plan, stage, shipped.engine, count, shipped.switches).items()}
    except UserError:
        found = None
    parts = {
        part.name: {
            "flops": part.flops,
            "precision": part.precision,
            "hours": part.seconds(count, shipped.rates) / 3600,
        }
        for part in stage.parts
    }
    return {
        "memory_bytes": found,
        "host_bytes": round(host_bytes(plan, stage, shipped.engine, count, shipped.switches)),
        "disk_bytes": round(stage.disk),
        "checkpoint_bytes": round(stage.checkpoints),
        "copied_bytes": round(copied_bytes(stage, shipped.engine, count)),
        "flops": stage.flops,
        "hours": hours,
        "dollars": None if price is None else hours * count * price,
        "parts": parts,
    }


def _facts(plan: Plan) -> Iterator[str]:
    frozen = set(plan.parameters) - {role for update in plan.updates for role in update.trained}
    for role, count in plan.parameters.items():
        adapters = f", a LoRA of {plan.lora[role]:,}" if role in plan.adapted else ""
        yield f"{role:<12} {count:,} parameters{adapters}"
    if plan.adapted & plan.backbone:
        shared = plan.backbone & (plan.adapted | frozen)
        yield f"backbone     one set of weights for {', '.join(role for role in plan.parameters if role in shared)}"
    for solver in (update.role for update in plan.updates if update.stage == "trajectories"):
        each = f"forwards for one: {solver} {plan.trajectory_forwards}"
        yield f"trajectories {_gib(plan.trajectories)} GiB on disk; {each}"
    for stage, roles in plan.forwards.items():
        unit = {"student": " (chunks)"} if stage == "distill" else {}
        counts = ", ".join(f"{role} {count:g}{unit.get(role, '')}" for role, count in roles.items())
        yield f"{stage:<12} forwards a step: {counts}"
    if plan.stream:
        flops, size = plan.stream
        yield f"stream       {flops:.3g} FLOP a denoising step behind a full context, of {_gib(size)} GiB"
    for stage, costs in plan.costs.items():
        for role, (calls, size) in costs.exchanges.items():
            if calls:
                shared = f"{calls:,.0f} exchanges a micro-step among {plan.together} ranks, {_gib(size)} GiB from each"
                yield f"{stage:<12} {role}: {shared}"


def _table(plan: Plan, count: int, engines: list[str], gib: float, have: tuple[str, ...]) -> Iterator[str]:
    """Rows of parts, columns of engines; a part that differs between updates is shown at its largest. `have`: the recipe's own
    memory-saving options, which each verdict begins with."""

    def row(label: str, cells: list[str]) -> str:
        return f"{label:<36}" + "".join(f"{cell:>10}" for cell in cells)

    asked, engines = engines, [engine for engine in engines if is_possible(plan, engine)]
    yield row(f"{count} GPU{'s' if count > 1 else ''}, GiB a rank", [WORDS[engine] for engine in engines])
    try:
        micro_steps = {update.stage: update.micro_steps(count) for update in plan.updates}
    except UserError as error:
        yield str(error)
        return
    many = [f"{stage} {number}" for stage, number in micro_steps.items() if number > 1]
    if many:
        yield f"micro-steps an update: {', '.join(many)}"
    plain = {(e, u.name): rank_bytes(plan, u, e, count) for e in engines for u in plan.updates}
    saved = {(e, u.name): rank_bytes(plan, u, e, count, ("checkpointing",)) for e in engines for u in plan.updates}
    found = {part for parts in plain.values() for part in parts}
    order = [f"{role} {part}" for role in plan.parameters for part in ("weights", "masters", "average", "moments")]
    order = ["backbone weights", *order, "idle gradients", "bf16 copies", "gathered"]
    for part in (part for part in order if part in found):
        sizes = [max(plain[e, u.name].get(part, 0.0) for u in plan.updates) for e in engines]
        yield row(part, [_gib(size) if size else "-" for size in sizes])
    for update in plan.updates:
        if update.trained:
            yield row(f"{update.name} gradients", [_gib(plain[e, update.name]["gradients"]) for e in engines])
        yield row(f"{update.name} activations", [_gib(update.activations())] * len(engines))
        if update.trained:
            yield row("    checkpointed", [_gib(update.activations("checkpointing"))] * len(engines))
        if update.stage in plan.context:
            yield row("    of them context at the end", [_gib(plan.context[update.stage])] * len(engines))
        yield row(f"{update.name} peak", [_gib(plain[e, update.name]["peak"]) for e in engines])
        if update.trained:
            yield row("    checkpointed", [_gib(saved[e, update.name]["peak"]) for e in engines])
    for engine in asked:
        yield f"{WORDS[engine]:<7} {_verdict(plan, engine, count, gib, have)}"


def _verdict(plan: Plan, engine: str, count: int, gib: float, have: tuple[str, ...]) -> str:
    """Whether everything fits with the switches that the recipe has, or else what does not and the first that fix it."""
    if not is_possible(plan, engine):
        return "shards weights, which LoRA roles share: use ddp, zero1 or zero2"
    found = suggest_fix(plan, engine, count, gib * 2**30, have)
    own = f" with {' + '.join(in_words(have))}, which the recipe has" if have else ""
    if found == have:
        return f"fits into {gib:g} GiB{own}"
    peaks = {update.name: rank_bytes(plan, update, engine, count, have)["peak"] / 2**30 for update in plan.updates}
    over = ", ".join(f"{name} {size:.1f}" for name, size in peaks.items() if size > gib)
    fix = "take more GPUs, smaller batches or networks"
    if found is not None:
        more = in_words([switch for switch in found if switch not in have])
        fix = f"fits with {' + '.join(more)}{' too' if have else ''}"
    return f"does not fit into {gib:g} GiB{own}: {over}; {fix}"


def _gib(size: float) -> str:
    value = size / 2**30
    return f"{value:.1f}" if value >= 9.95 else f"{value:.2f}" if value >= 0.0095 else f"{value:.4f}"
