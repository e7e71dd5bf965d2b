"""A frozen network whose blocks lie in the host's pinned memory and are on the device while they compute.

By diffusers' group offloading: while a block computes, the next one is copied on a stream of its own, so that of a teacher of N
blocks two are on the device. What is outside of blocks, and the tables that a network reads of its blocks before it calls them,
stays there. Without gradient: a backward pass would ask for blocks that have left.
"""

from itertools import pairwise
from typing import Any

import torch
from diffusers.hooks import HookRegistry, apply_group_offloading
from torch import nn

from teachers.errors import UserError

HOOK = "group_offloading"


def stream(net: Any, device: torch.device) -> Any:
    """`net`, frozen and in the host's memory, with its blocks streamed to `device` and the rest there; UserError for a network
    without blocks."""
    blocks = getattr(net, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise UserError(f"engine.offload: {type(net).__name__} has no blocks to stream; remove teacher from it")
    own = nn.Module()
    own.blocks = blocks
    side = device.type != "cpu"
    apply_group_offloading(own, device, num_blocks_per_group=1, use_stream=side, record_stream=side)
    hooks: list[Any] = [HookRegistry.check_if_exists_or_initialize(block).get_hook(HOOK) for block in blocks]
    for hook, block in zip(hooks, blocks, strict=True):
        hook.group.modules = list(block.children())  # without the block's own table
    for hook, following in pairwise(hooks):
        hook.next_group, following.group.onload_self = following.group, False
    inside = {id(module) for block in blocks for part in block.children() for module in part.modules()}
    for module in (module for module in net.modules() if id(module) not in inside):
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(p.to(device), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return net


def is_streamed(net: nn.Module) -> bool:
    """Whether a network in `net` has blocks that `stream` moves."""
    found = (part.__dict__.get("_diffusers_hook") for part in net.modules())
    return any(registry is not None and registry.get_hook(HOOK) is not None for registry in found)
