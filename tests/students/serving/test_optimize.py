"""Faster serving changes the frames no more than it says."""

import sys

import pytest
import torch
from diffusers.models import attention_dispatch
from torch._dynamo.utils import counters
from torch._inductor import compile_fx, config

from students.history import History
from students.serving.optimize import Speed, prepare
from teachers.errors import UserError
from teachers.networks import spans
from teachers.networks.wan import NetworkConfig
from tests.students.serving.test_session import PER_FRAME, film, play
from tests.support.tiny import NETWORK, a_bundle, some_sound


def shown(speed: Speed, window: int = 2, frames: int = 24, **changes) -> torch.Tensor:
    history = History(sinks=changes.pop("sinks", 1), window=window, commit=changes.pop("commit", "clean"))
    bundle = prepare(a_bundle(history, **changes), "cpu", speed)
    return film(play(bundle, some_sound(frames * PER_FRAME), close=False)).float()


def test_bf16_keeps_norms_and_time_in_fp32_and_stays_near():
    bundle = prepare(a_bundle(), "cpu", Speed(dtype="bf16"))
    kinds = {name: p.dtype for name, p in bundle.student.net.named_parameters()}
    assert kinds["blocks.0.attn1.to_q.weight"] == kinds["condition_embedder.time_proj.weight"] == torch.bfloat16
    assert kinds["blocks.0.scale_shift_table"] == kinds["blocks.0.norm2.weight"] == torch.float32
    assert kinds["condition_embedder.time_embedder.linear_1.weight"] == torch.float32
    gap = (shown(Speed(dtype="bf16")) - shown(Speed())).abs()
    assert 0 < gap.mean() < 1.5, "grey levels of 255"


ONE_BLOCK = NetworkConfig(**(NETWORK | {"num_layers": 1}), audio_blocks=(0,))


def test_a_compiled_step_draws_the_same(monkeypatch):
    """With a short context: each of its lengths is captured, as a graph of its own; Inductor does not see it, for time."""
    monkeypatch.setattr(compile_fx, "compile_fx", lambda graph, inputs, **options: graph.forward)
    small = {"sinks": 0, "window": 1, "network": ONE_BLOCK}
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    gap = (shown(Speed(compile="default"), **small) - shown(Speed(), **small)).abs()
    assert gap.max() <= 2
    graphs = counters["stats"]["unique_graphs"] - before
    assert graphs == 4, "an empty context and one chunk, a step and a commit of each; none is compiled again"


@pytest.mark.slow
def test_what_inductor_makes_draws_the_same():
    """The first chunk in one step, through real kernels; a second step or a commit would be another graph to compile."""
    torch._dynamo.reset()
    small = {"frames": 4, "network": ONE_BLOCK, "commit": "same_level", "sigmas": (1.0,)}
    with config.patch({"compile_threads": 1, "cpp.vec_isa_ok": True}):  # what /proc/cpuinfo says is not tried out
        compiled = shown(Speed(compile="default"), **small)
    assert len(compiled) == 3
    assert (compiled - shown(Speed(), **small)).abs().max() <= 2


def test_an_attention_backend_is_used_by_its_student_alone_and_an_unknown_one_is_one_line(monkeypatch):
    used = []

    def dispatch(*inputs, backend=None, **given):
        used.append(backend)
        return attention_dispatch.dispatch_attention_fn(*inputs, backend=backend, **given)

    monkeypatch.setattr(spans, "dispatch_attention_fn", dispatch)
    before = attention_dispatch._AttentionBackendRegistry.get_active_backend()
    chosen = shown(Speed(attention="_native_math"))
    assert set(used) == {"_native_math"}
    assert attention_dispatch._AttentionBackendRegistry.get_active_backend() == before, "of this student alone"
    used.clear()
    assert (chosen - shown(Speed())).abs().max() <= 2
    assert set(used) == {None}
    with pytest.raises(UserError, match=r"^attention backend 'flush': [^\n]*; native always works$"):
        prepare(a_bundle(), "cpu", Speed(attention="flush"))


def test_quantised_weights_need_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"^quantize=int8: torchao is not installed; pip install torchao$"):
        prepare(a_bundle(), "cpu", Speed(quantize="int8"))
