"""A stage's networks and losses at real width on fake tensors: what they hold, beside what the planner counts.

Both are looked at phase by phase, between the calls of networks, and with the same few blocks, so that every phase has to be the
planned one. A line through one and two blocks would be wrong: the first has no block before it whose result is still alive.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from distill import methods
from distill.compose import RECIPES
from distill.planning import trace
from distill.planning.estimate import job_of
from distill.planning.job import Job, batch_on, inner, networks_on, shallow
from distill.recipe import Recipe, load_recipe
from students.serving.optimize import cast
from teachers.flow import keyed_generator
from tests.support.fake_cuda import fake_cuda

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


def loss_phases(given: Job, slot: str, role: str, device: str = "cuda") -> tuple[list[float], dict[str, int]]:
    """Bytes but for weights and their gradients in each phase of a loss, checkpointed, over weights in the engine's precision, as
    FSDP2 gathers them and autocast copies them; and what the host waited for. On "cuda" the forward alone, on "cpu" the backward
    too."""
    with fake_cuda(device) as gpu:
        roles = networks_on(replace(given, checkpointing=True), slot, device)
        for name, net in roles.items():
            if name not in given.lora:  # over a backbone that is narrow, adapters that autocast casts
                cast(net.net, torch.bfloat16)
            for p in net.parameters():
                p.requires_grad_(p.requires_grad and name == role)
            gpu.weigh(net)
            inner(net).register_forward_pre_hook(gpu.begin_phase)
        weights, gpu.phases = gpu.live, [gpu.live]
        method: Any = methods.build(given.stages[slot].method, roles, (*given.spec.sigmas, 0.0))
        if hasattr(method, "_exits"):
            method._exits = lambda start, count, shared: [len(given.spec.sigmas) - 1] * count
        batch = batch_on(given, slot, device)
        rng, shared = keyed_generator(0, "a"), keyed_generator(0, "b")
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = method.loss(role, batch, rng, shared)
        assert loss.value.dtype == torch.float32
        if device == "cpu":
            gpu.begin_phase()
            _backward(loss.value, roles[role])
    return [size - weights for size in gpu.phases], dict(gpu.waits)


def _backward(value: Tensor, net: nn.Module) -> None:
    """Gradients are let go when they are made, as they are reduced to shards."""
    made = 0

    def reduce(parameter: Tensor) -> None:
        nonlocal made
        parameter.grad, made = None, made + 1

    for p in net.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(reduce)
    value.backward()
    assert made


def planned_phases(given: Job, slot: str, role: str) -> list[float]:
    """The same as the planner counts it on the meta device; the last is that of the backward pass."""
    return list(trace._live(given, slot, role, trace.CHECKPOINTING).phases)
