"""What ranks that share sequences send each other in a micro-step of `livetalk`, on 8 and 64 GPUs: golden numbers, and the plan's.

One block at full width runs forward and backward on fake tensors over torch's fake process group.
"""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill import methods
from distill.compose import RECIPES
from distill.planning.job import Job, batch_on, job_of, networks_on, shallow
from distill.planning.trace import step_costs
from distill.recipe import load_recipe
from teachers.flow import keyed_generator
from teachers.networks.kind import networks_in
from teachers.networks.sequence import SequenceGroup

pytestmark = pytest.mark.slow

TOGETHER = 4
RECIPE = load_recipe(RECIPES / "livetalk.yaml", ["teacher.path=anywhere", f"engine.sequence_parallel={TOGETHER}"])


class Collectives(TorchDispatchMode):
    """Number of collectives by kind, and bytes of the larger of what goes in and what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            sizes = [x.numel() * x.element_size() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            outputs = len(sizes) - 1 if "allgather" in func.name() else 1  # one tensor for each rank
            self.found[func.name(), max(sizes) * outputs] += 1
        return func(*args, **(kwargs or {}))


def exchanges(job: Job, world: int) -> Counter[tuple[str, int]]:
    """Collectives of one micro-step of the init stage among the first TOGETHER of so many ranks."""
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        group = SequenceGroup(TOGETHER, 0, dist.new_group(list(range(TOGETHER))))
        with FakeTensorMode(allow_non_fake_inputs=True), Collectives() as sent:
            roles = networks_on(job, "init", "cpu")
            for network in networks_in(roles["student"]):
                network.kind.split_sequence(network, group)
            method = methods.build(RECIPE.init.method, roles, (*job.spec.sigmas, 0.0))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                batch = batch_on(job, "init", "cpu")
                loss = method.loss("student", batch, keyed_generator(0, "a"), keyed_generator(0, "b"))
            loss.value.backward()
    finally:
        dist.destroy_process_group()
    return sent.found


def test_what_an_init_step_exchanges():
    job, own = shallow(job_of(RECIPE), 1), 2 * 42 * 1024 // TOGETHER  # bf16 of every token: clean and noisy frames
    golden = {
        ("c10d::alltoall_base_", 3 * own * 1536): 3,  # queries, keys, values: forward, again, and back
        ("c10d::alltoall_base_", own * 1536): 3,  # the result
        ("c10d::allgather_", TOGETHER * own * 64): 1,  # the output
    }
    assert [exchanges(job, world) for world in (8, 64)] == [golden, golden]
    sent = sum(size * count for (_, size), count in golden.items()) * (TOGETHER - 1) // TOGETHER
    assert step_costs(job, "init").exchanges["student"] == (7, sent)
