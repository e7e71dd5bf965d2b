"""engine.attention and engine.compile: the same losses and gradients, the same refusals as the commands'."""

import pytest
import torch

from distill.methods.rollout import rollout
from distill.training.config import EngineConfig
from students.history import History
from students.serving.optimize import compile_blocks, set_attention
from teachers.errors import UserError
from tests.support.tiny import a_student, randn, some_conditions


def losses(student) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a rollout of three chunks, blocks computed again in the backward pass, and its gradients."""
    student.zero_grad()
    table = randn(3, 3, 1, 4, 2, 4, 4)
    x0 = rollout(student, some_conditions(batch=1, frames=6), lambda chunk, step: table[chunk, step], 1)
    value = x0[:, :, 1:].square().mean()
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.long
def test_compiled_blocks_give_the_same_loss_and_gradients(monkeypatch):
    """Traced and differentiated ahead of time; what inductor makes of the graphs is not tested here."""
    student = a_student(horizon_frames=6)
    student.net.enable_gradient_checkpointing()
    expected, gradients = losses(student)
    compiled = []

    def compile_ahead(function, mode, dynamic):
        compiled.append(mode)
        return torch._dynamo.optimize("aot_eager", dynamic=dynamic)(function)

    monkeypatch.setattr(torch, "compile", compile_ahead)
    compile_blocks(student.net, "default", student.spec)
    value, found = losses(student)
    assert compiled == ["default"] * len(student.net.blocks)
    assert torch.allclose(value, expected, rtol=1e-5)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(found[name], gradient, rtol=1e-5, atol=1e-7), name
    torch._dynamo.reset()


def test_none_and_native_change_nothing():
    student = a_student()
    compile_blocks(student.net, "none", student.spec)
    set_attention(student.net, "native")
    assert all("forward" not in vars(block) for block in student.net.blocks)
    config = EngineConfig(precision="fp32")
    assert (config.attention, config.compile) == ("native", "none")


def test_what_cannot_be_is_refused():
    student = a_student()
    with pytest.raises(UserError, match=r"attention backend 'nearby': .* native always works"):
        set_attention(student.net, "nearby")
    with pytest.raises(UserError, match="compile: Linear has no blocks; use compile=none"):
        compile_blocks(torch.nn.Linear(2, 2), "default", student.spec)
    absolute = a_student(History(sinks=1, window=2, positions="absolute"))
    with pytest.raises(UserError, match="compile: positions: absolute"):
        compile_blocks(absolute.net, "default", absolute.spec)
