"""A frozen teacher whose blocks wait in the host's memory: the same numbers, and two blocks on the device in place of all."""

import pytest
import torch
from diffusers.hooks import HookRegistry, group_offloading
from torch import nn

from distill.training.engines.offload import HOOK, is_streamed, stream
from teachers.errors import UserError
from teachers.networks.kind import AvatarTeacher
from teachers.networks.wan import NetworkConfig
from tests.support.tiny import NETWORK, make_spec, randomise, some_conditions, some_latents

LAYERS, SIGMA = 4, (0.7, 0.2)


def a_network(**changes) -> nn.Module:
    spec = make_spec(network=NetworkConfig(**(NETWORK | {"num_layers": LAYERS} | changes), audio_blocks=(1,)))
    return spec.network.new(spec.dims).requires_grad_(False)


def test_streaming_changes_no_number():
    teacher = AvatarTeacher(randomise(a_network())).eval()
    expected = teacher.denoise(some_latents(), torch.tensor(SIGMA), some_conditions())
    assert not is_streamed(teacher)
    stream(teacher.net, torch.device("cpu"))
    assert is_streamed(teacher)
    for _ in range(2):  # the first pass loads its first block, later ones too
        assert torch.equal(teacher.denoise(some_latents(), torch.tensor(SIGMA), some_conditions()), expected)


def test_a_network_without_blocks_is_refused():
    with pytest.raises(UserError, match=r"engine\.offload: Linear has no blocks to stream"):
        stream(nn.Linear(2, 2), torch.device("cpu"))


def test_two_blocks_are_on_the_device_at_a_time(monkeypatch):
    """While a block computes, it and the next one; the last one alone, and none between passes."""
    held, seen, group = set(), [], group_offloading.ModuleGroup
    loads, leaves = group.onload_, group.offload_

    def load(self) -> None:
        held.add(self)
        loads(self)

    def leave(self) -> None:
        held.discard(self)
        leaves(self)

    monkeypatch.setattr(group, "onload_", load)
    monkeypatch.setattr(group, "offload_", leave)
    teacher = AvatarTeacher(a_network()).eval()
    stream(teacher.net, torch.device("cpu"))
    for block in teacher.net.blocks:
        block.attn1.to_q.register_forward_pre_hook(lambda *_: seen.append(len(held)))
    for _ in range(2):
        teacher.denoise(some_latents(), torch.tensor(SIGMA), some_conditions())
        assert not held
    assert seen == 2 * [2, 2, 2, 1]


def test_what_is_read_ahead_of_a_block_is_not_moved_with_it():
    """Its table, which the network adds to the time before it calls the block."""
    net = stream(a_network(), torch.device("cpu"))
    moved = {id(p) for block in net.blocks for part in of(block).modules for p in part.parameters()}
    own = [p for block in net.blocks for p in block.parameters(recurse=False)]
    assert len(own) == LAYERS
    assert not moved & {id(p) for p in own}
    assert len(moved) == sum(1 for block in net.blocks for _ in block.parameters()) - LAYERS


def of(block: nn.Module) -> group_offloading.ModuleGroup:
    return HookRegistry.check_if_exists_or_initialize(block).get_hook(HOOK).group
