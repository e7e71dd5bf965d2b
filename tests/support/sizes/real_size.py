"""A stage's networks and losses at real width on fake tensors: what they hold, beside what the planner counts.

Both are looked at phase by phase, between the calls of networks, and with the same few blocks, so that every phase has to be the
planned one. A line through one and two blocks would be wrong: the first has no block before it whose result is still alive.

    python -m tests.support.sizes.real_size "livetalk 14B to 14B" --blocks 40    # a rank's whole peak, minutes
"""

import argparse
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import torch
import torch.distributed._tools.fake_collectives  # what a collective gives under fake tensors

from distill import methods
from distill.compose import RECIPES
from distill.planning import trace
from distill.planning.estimate import Plan, make_plan, rank_bytes
from distill.planning.job import Job, batch_on, inner, job_of, networks_on, shallow
from distill.recipe import Recipe, load_recipe
from distill.training.config import EngineConfig
from distill.training.engines import fsdp
from distill.training.engines.engine import make_role
from distill.training.role import MOMENTS
from distill.training.trainer import EMA
from students.serving.optimize import cast
from teachers.flow import keyed_generator
from tests.support.sizes.fake_cuda import fake_cuda
from tests.support.sizes.fake_ranks import RankOfMany, fake_ranks

BLOCKS = 2
CARD = 79 * 2**30
WORDS = {
    "livetalk": (),
    "livetalk 14B to 14B": ("machine=livetalk_14b_8x80gb",),
    "self_forcing": (),
    "omniavatar_one_gpu": (),
    "omniavatar_one_gpu 24 GB": ("machine=omniavatar_24gb",),
}
"""Recipes, and the overrides of the machines that they are for."""


@cache
def recipe(name: str) -> Recipe:
    return load_recipe(RECIPES / f"{name.split()[0]}.yaml", ["teacher.path=anywhere", *WORDS[name]])


@cache
def job(name: str) -> Job:
    return job_of(recipe(name))


def cut(name: str, blocks: int = BLOCKS) -> Job:
    """The recipe's job with its first blocks, and of the denoising steps two: those without gradient leave nothing behind."""
    whole = job(name)
    return shallow(replace(whole, spec=replace(whole.spec, sigmas=whole.spec.sigmas[:2])), blocks)


def loss_phases(given: Job, slot: str, role: str) -> tuple[list[float], dict[str, int]]:
    """Bytes but for weights in each phase of a loss's forward on "cuda", checkpointed, over weights in the engine's precision, as
    FSDP2 gathers them and autocast copies them; and what the host waited for."""
    with fake_cuda() as gpu:
        roles = networks_on(replace(given, checkpointing=True), slot, "cuda")
        for name, net in roles.items():
            if name not in given.lora:  # over a backbone that is narrow, adapters that autocast casts
                cast(net.net, torch.bfloat16)
            for p in net.parameters():
                p.requires_grad_(p.requires_grad and name == role)
            gpu.weigh(net)
            inner(net).register_forward_pre_hook(gpu.begin_phase)
        weights, gpu.phases = gpu.live, [gpu.live]
        method, batch = _method(given, slot, roles), batch_on(given, slot, "cuda")
        rng, shared = keyed_generator(0, "a"), keyed_generator(0, "b")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = method.loss(role, batch, rng, shared)
        assert loss.value.dtype == torch.float32
    return [size - weights for size in gpu.phases], dict(gpu.waits)


def planned_phases(given: Job, slot: str, role: str) -> list[float]:
    """The same as the planner counts it on the meta device; the last is that of the backward pass."""
    return list(trace._live(given, slot, role, trace.CHECKPOINTING).phases)


def engine_of(name: str) -> tuple[EngineConfig, int]:
    """A recipe's engine and its number of ranks, 8 where they hold shards. Nothing waits in the host's memory: what does is a plain
    sum, and fake CPU tensors stand for those of the device."""
    config = replace(recipe(name).engine, offload=())
    return config, 8 if config.kind == "fsdp2" else 1


def rank_peak(name: str, slot: str, role: str, blocks: int = BLOCKS) -> int:
    """Bytes on a rank at the peak of a micro-step of `role` under the engine's own roles: weights, moments and average, gathered
    weights, activations and gradients. On fake CPU tensors, for the backward pass; nothing is sent."""
    config, world = engine_of(name)
    given = replace(cut(name, blocks), checkpointing=config.checkpointing)
    needs = given.needs(slot)
    with fake_ranks(world), fake_mesh(config, world) as engine, fake_cuda("cpu") as gpu:
        roles = networks_on(given, slot, "cpu")
        for other in needs.frozen if engine.kind == "fsdp2" else ():
            fsdp.shard(engine, roles[other])
        make = functools.partial(torch.optim.AdamW, lr=0.0)
        held = {other: make_role(engine, engine.kind, roles[other], make, 1.0, 1) for other in needs.trained}
        average = EMA(held[needs.trained[0]], 0.9)
        for other, own in held.items():
            for p in own.params.values():
                own.optimizer.state[p] |= {moment: torch.zeros_like(p) for moment in MOMENTS}
                p.requires_grad_(other == role)
        gpu.weigh(*roles.values())
        method = _method(given, slot, roles)
        rng, shared = keyed_generator(0, "a"), keyed_generator(0, "b")
        batch = batch_on(given, slot, "cpu")
        gpu.peak = gpu.live
        held[role].backward(held[role].forward(lambda: method.loss(role, batch, rng, shared).value), last=True)
        assert average.shadow
    return gpu.peak


@contextmanager
def fake_mesh(config: EngineConfig, world: int) -> Iterator[Any]:
    """A rank whose mesh is made before any tensor is fake, as a mesh asks for values."""
    engine: Any = RankOfMany(world, config)
    engine.kind = config.kind
    mesh = fsdp.mesh_of(engine)
    with mock.patch.object(fsdp, "mesh_of", return_value=mesh):
        yield engine


@cache
def plan(name: str, blocks: int = BLOCKS, slot: str = "") -> Plan:
    """Of all stages, or of one alone."""
    given = cut(name, blocks)
    return make_plan(replace(given, stages={slot: given.stages[slot]}, solves=False) if slot else given)


def planned_peak(name: str, slot: str, role: str, blocks: int = BLOCKS) -> float:
    """The same as `distill plan` has it."""
    found, (config, world) = plan(name, blocks, slot), engine_of(name)
    update = next(update for update in found.updates if (update.stage, update.role) == (slot, role))
    return rank_bytes(found, update, config.kind or "ddp", world, ("checkpointing",) * config.checkpointing)["peak"]


def _method(given: Job, slot: str, roles: dict[str, Any]) -> Any:
    """The loss of a slot, at its longest rollout."""
    method: Any = methods.build(given.stages[slot].method, roles, (*given.spec.sigmas, 0.0))
    if hasattr(method, "_exits"):
        method._exits = lambda start, count, shared: [len(given.spec.sigmas) - 1] * count
    return method


def main() -> None:
    """A row for each update of a recipe, with so many of its blocks (40: all)."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("name", choices=tuple(WORDS))
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    args = parser.parse_args()
    for update in plan(args.name, args.blocks).updates:
        if update.trained:
            given = (args.name, update.stage, update.role, args.blocks)
            found, planned = rank_peak(*given), planned_peak(*given)
            sizes = f"simulated {found / 2**30:.2f} GiB, planned {planned / 2**30:.2f}, ratio {found / planned:.3f}"
            print(f"{args.name}, {args.blocks} blocks, {update.name}: {sizes}", flush=True)


if __name__ == "__main__":
    main()
