"""What each rank of livetalk receives and sends in a micro-step, on 8 and on 64 GPUs: golden numbers.

The recipe's own chunks, steps, guidance and engine; networks of two narrow blocks, sharded by the engine's own code in torch's fake
process group. A collective's size tells which block or root it belongs to; those of the real networks are put in its place.
"""

import functools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from distill import methods
from distill.compose import RECIPES
from distill.planning.job import batch_on, job_of, meta_networks, networks_on
from distill.recipe import load_recipe, spec_of
from distill.training.engines import fsdp
from distill.training.engines.fsdp import FSDP2Role
from teachers.flow import keyed_generator
from tests.support.sizes.fake_ranks import RankOfMany, fake_ranks

pytestmark = pytest.mark.slow

RECIPE = load_recipe(RECIPES / "livetalk.yaml", ["teacher.path=anywhere"])
SPEC, JOB = spec_of(RECIPE), job_of(RECIPE)
GATHERED = {  # GB in a micro-step
    ("init", "student"): 2.9,
    ("distill", "fake_score"): 5.8,
    ("distill", "student"): 62.5,
}
BEFORE = 523e9  # bytes gathered in an iteration of distill when every call of every network gathered its blocks anew
NARROW = {"num_layers": 2, "num_heads": 2, "audio_blocks": (0,), "freq_dim": 32}
SMALL = replace(
    JOB,
    spec=replace(SPEC, height=32, width=32, network=replace(SPEC.network, head_dim=16, ffn_dim=64, **NARROW)),
    networks={"teacher": replace(JOB.networks["teacher"], head_dim=24, ffn_dim=96, **NARROW)},
)


def sizes(job, slot: str) -> dict[str, tuple[int, int, int]]:
    """Of each role's network: its blocks, the bytes of one that is gathered, and those of what is outside of them."""
    found = {}
    for role, net in meta_networks(job, slot).items():
        inner, held = net.net, 2 if role in job.half else 4
        own = [p for block in inner.blocks for p in block.parameters()]
        table = {id(p) for block in inner.blocks for p in block.parameters(recurse=False)}
        block = sum(p.numel() for p in inner.blocks[0].parameters() if id(p) not in table)
        outside = sum(p.numel() for p in inner.parameters()) - sum(p.numel() for p in own)
        found[role] = (len(inner.blocks), 2 * block, held * outside)
    return found


def micro_step(world: int, slot: str, role: str, **changes) -> dict[str, dict[str, int]]:
    """How often each unit ("student block": of a network like the student's) is gathered, and reduced, in one micro-step of `role`,
    at the depth and with the bytes of the real networks: {"all_gather": {"student block": n, .., "bytes": ..}, ..}."""
    small, real = sizes(SMALL, slot), sizes(JOB, slot)
    config = replace(RECIPE.engine, **changes)
    with fake_ranks(world) as sent:
        engine: Any = RankOfMany(world, config)
        roles, needs = networks_on(SMALL, slot, "cpu"), JOB.needs(slot)
        for name in needs.frozen:
            fsdp.shard(engine, roles[name])
        make = functools.partial(torch.optim.AdamW, lr=0.0)
        held = {name: FSDP2Role(engine, roles[name], make, 1.0, 1) for name in needs.trained}
        method: Any = methods.build(getattr(RECIPE, slot).method, roles, (*SPEC.sigmas, 0.0))
        if slot == "distill":
            method._exits = lambda start, count, shared: [len(SPEC.sigmas) - 1] * count
        for name, own in held.items():
            for p in own.params.values():
                p.requires_grad_(name == role)
        sent.clear()
        rng, shared = keyed_generator(0, "a"), keyed_generator(0, "b")
        batch = batch_on(SMALL, slot, "cpu")
        value = held[role].forward(lambda: method.loss(role, batch, rng, shared).value)
        held[role].backward(value, last=True)
        for own in held.values():
            own.release()
        return {name: at_real_size(found.sizes, small, real, name) for name, found in sent.sent.items() if found.sizes}


def at_real_size(found: Counter[int], small: dict, real: dict, what: str) -> dict[str, int]:
    """Collectives by unit instead of size; gradients are fp32."""
    counts: dict[str, int] = {"bytes": 0}
    for size, calls in found.items():
        for role in ("student", "teacher"):
            if role not in small:
                continue
            wide = 1 if what == "all_gather" else 2
            (few, block, root), (many, big_block, big_root) = small[role], real[role]
            cut = 1 if what != "all_reduce" else 8  # of a machine's shards
            if size * cut == pytest.approx(wide * block, rel=0.02):
                counts[f"{role} block"], each = calls * many // few, wide * big_block
            elif size * cut == pytest.approx(root if root else -1, rel=0.02):
                counts[f"{role} root"], each = calls, big_root
            else:
                continue
            counts["bytes"] += each // cut * counts[f"{role} {'block' if each == wide * big_block else 'root'}"]
            break
        else:
            raise AssertionError(f"{what} of {size} bytes is no unit's: {small}")
    return counts


LIKE = {"student block": 30, "student root": 1}
GOLDEN = {  # student and fake score are of one size; each is gathered once, the teacher for both branches of its guidance
    ("init", "student"): LIKE,
    ("distill", "fake_score"): {"student block": 60, "student root": 2},
    ("distill", "student"): {"student block": 60, "student root": 2, "teacher block": 80, "teacher root": 1},
}


@pytest.mark.parametrize("world", [8, 64])
@pytest.mark.parametrize(("slot", "role"), GOLDEN)
def test_collectives_of_a_micro_step(slot, role, world):
    """Each block's weights once, its gradients once; on 64 ranks the machines add up theirs, of a machine's shards."""
    found = micro_step(world, slot, role)
    sent = {name: dict(counts) for name, counts in found.items()}
    gigabytes = {name: round(counts.pop("bytes") / 1e9, 1) for name, counts in sent.items()}
    print(slot, role, world, sent, gigabytes)
    reduced = {"reduce_scatter": LIKE} | ({"all_reduce": LIKE} if world > 8 else {})
    assert sent == {"all_gather": GOLDEN[slot, role], **reduced}
    shards = {"all_reduce": 0.7} if world > 8 else {}
    assert gigabytes == {"all_gather": GATHERED[slot, role], "reduce_scatter": 5.7, **shards}


def test_an_iteration_gathers_less_than_a_quarter_of_what_it_did():
    """Five updates of the fake score to one of the student; the exit step does not matter where weights stay gathered."""
    method: Any = RECIPE.distill.method
    iteration = method.fake_updates * GATHERED["distill", "fake_score"] + GATHERED["distill", "student"]
    assert 1e9 * iteration < BEFORE / 4
