"""Networks that attend to audio, in FSDP2 shards: what their blocks compute of it has its gradient there as anywhere."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.training.config import EngineConfig
from distill.training.engines.engine import Engine
from distill.training.engines.fsdp import shard
from teachers.conditions import Conditions
from tests.support.networks.longcat import a_longcat, longcat_conditions
from tests.support.networks.s2v import an_s2v_net, s2v_conditions, s2v_latents, some_rows
from tests.support.networks.talk import a_talk_net, some_people, some_regions, talk_conditions, talk_latents
from tests.support.tiny import randn, randomise
from tests.teachers.networks import test_echomimic as echomimic
from tests.teachers.networks import test_fantasytalking as fantasytalking
from tests.teachers.networks import test_flashhead as flashhead
from tests.teachers.networks import test_stableavatar as stableavatar

NETWORKS = ("infinitetalk", "echomimic", "fantasytalking", "flashhead", "stableavatar", "s2v", "longcat")


def inputs(name: str) -> tuple[Any, Tensor, Conditions]:
    """(network, x0, conditions); with two speakers where it takes them."""
    if name == "infinitetalk":
        return a_talk_net(2), talk_latents(), talk_conditions(some_people(2, 2), some_regions())
    if name == "echomimic":
        return randomise(echomimic.CONFIG.new(echomimic.DIMS)), *echomimic.inputs()[:2]
    if name in ("fantasytalking", "stableavatar"):
        own = fantasytalking if name == "fantasytalking" else stableavatar
        return randomise(own.CONFIG.new(echomimic.DIMS)), *fantasytalking.inputs(frames=4)[:2]
    if name == "flashhead":
        return flashhead.a_net(), *flashhead.inputs()[:2]
    if name == "s2v":
        return an_s2v_net(), s2v_latents(), s2v_conditions(some_rows(), motion=7)
    return a_longcat(2), talk_latents(), longcat_conditions(some_people(2, 2), some_regions())


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        engine = Engine(EngineConfig(kind="fsdp2", precision="fp32"), threads=1)
        yield engine
        engine.close()


def gradients(net: Any, x: Tensor, given: Conditions) -> dict[str, Tensor]:
    """The output, and the gradient of every parameter."""
    kind = net.kind
    sigma = kind.levels(torch.tensor([0.9, 0.4]), x.shape[2], (0,))
    out = kind.run(net, kind.compose(x, given, (0,))[1], sigma, given, None, (0,))
    (out * randn(*out.shape, seed=9)).sum().backward()
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    whole = {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}
    return {"out": out.detach(), **whole}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_in_shards_are_those_of_the_whole(engine, name, checkpointing):
    net, x, given = inputs(name)
    net.train().requires_grad_(True)
    if checkpointing:
        net.enable_gradient_checkpointing()
    sharded = copy.deepcopy(net)
    shard(engine, sharded)
    expected, found = gradients(net, x, given), gradients(sharded, x, given)
    assert any(("audio" in key or "vocal" in key) and grad.abs().max() > 1e-6 for key, grad in expected.items())
    assert found.keys() == expected.keys()
    far = {
        key: float((found[key] - grad).abs().max() / grad.abs().max().clamp(min=1e-6)) for key, grad in expected.items()
    }
    assert {key: distance for key, distance in far.items() if not distance < 1e-4} == {}
