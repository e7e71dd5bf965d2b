"""What MIDAS costs at its published size, counted on the meta device: no weight is made, nothing is timed.

    python benchmarks/midas.py

Qwen2.5-3B, a head of half a billion, 60 latent tokens a frame (64x, 384 x 640), 125 frames in sight, bf16. Counted are one chunk's
`plan` and its four `denoise`, as a session calls them: FLOPs by torch's FlopCounterMode, and bytes of the weights that are read.
Beside them the figures that MIDAS' paper (2508.19320) implies. A script; its numbers are in a test,
tests/students/networks/test_midas_size.py.
"""

import functools
import sys
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from students.history import History, HistoryNoise
from students.kv_cache import CachedChunk
from students.networks.midas import Midas
from students.networks.midas_net import MidasConfig
from students.spec import Spec, student_sigmas
from students.student import Finished
from students.weights.checkpoint import make_student
from teachers.codecs.linear import CodecConfig
from teachers.conditions import Conditions
from teachers.encoders.umt5 import UMT5Config
from teachers.encoders.wav2vec import Wav2VecConfig

SEEN, STEPS, CHUNK = 125, 4, 6  # frames in sight, denoising steps, frames of MIDAS' chunk
H200 = {"flops": 790e12, "bytes": 4.8e12}  # bf16 a second as measured elsewhere, memory as published
IMPLIED = {"llm TF": (0.48, 0.55), "head TF": (0.24, 0.24), "llm ms": (1.16, 1.16), "head ms": (0.83, 0.83)}
"""Of one frame, computed from the paper's sizes: some 61 tokens a frame, a head of 0.5 B with four steps, weights at 4.8 TB/s."""


@dataclass(frozen=True)
class Cost:
    """FLOPs, bytes of weights and bytes of cached keys and values that one call reads."""

    flops: float
    weights: float
    context: float = 0.0

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.flops * times, self.weights * times, self.context * times)


@functools.cache
def real_midas(frames: int = 1, text_tokens: int = 4) -> Midas:
    """A MIDAS student of the published size on the meta device, `frames` latent frames planned and drawn at once."""
    spec = Spec(
        height=384,
        width=640,
        fps=Fraction(25, 2),
        chunk_frames=frames,
        sigmas=student_sigmas(STEPS, 1.0),
        horizon_frames=frames * 10,
        history=History(sinks=1, window=SEEN // frames - 1),
        history_noise=HistoryNoise(),
        network=MidasConfig(text_tokens=text_tokens),
        codec=CodecConfig(stride=1, patch=64, channels=128),  # the geometry of DC-AE f64c128
        audio=Wav2VecConfig(),
        text=UMT5Config(path=Path("umt5")),
    )
    with torch.device("meta"):
        return make_student(spec).to(torch.bfloat16).eval().requires_grad_(False)  # pyright: ignore[reportReturnType]


def some_conditions(student: Midas) -> Conditions:
    """The shapes of a chunk's conditions, in bf16 without values."""
    spec, like = student.spec, torch.zeros(1, device="meta", dtype=torch.bfloat16)
    channels, height, width = spec.latent_size
    return Conditions(
        text=like.new_empty(1, spec.text.max_tokens, spec.text.dim),
        audio=like.new_empty(1, spec.chunk_frames, 1, spec.audio_dim),
        reference=like.new_empty(1, channels, 1, height, width),
    )


class WeightsRead:
    """Counts the bytes of the parameters of every module that is called, each time it is called."""

    def __init__(self, module: nn.Module):
        self.bytes, self.calls = 0, []
        for part in (part for part in module.modules() if part is not module):  # which is only the door to its parts
            # Attention calls its output layer as a function; everywhere else a parameter belongs to the module that is called.
            whole = isinstance(part, nn.MultiheadAttention)
            size = sum(p.numel() * p.element_size() for p in part.parameters(recurse=whole))
            self.calls.append(part.register_forward_pre_hook(lambda *_, size=size: self._add(size)))

    def _add(self, size: int) -> None:
        self.bytes += size

    def __enter__(self) -> "WeightsRead":
        return self

    def __exit__(self, *_: object) -> None:
        for call in self.calls:
            call.remove()


@torch.no_grad()
def measure(student: Midas) -> dict[str, Cost]:
    """`llm` (a chunk's plan with a full context) and `head` (all its steps)."""
    spec, given = student.spec, some_conditions(student)
    net, config = student.net, student.net.config
    heads, width = config.num_kv_heads, config.width // config.num_heads
    cached = given.text.new_empty(config.num_layers, 1, student._size, heads, width)
    x = given.text.new_empty(1, spec.latent_size[0], spec.chunk_frames, *spec.latent_size[1:])
    chunk = SEEN // spec.chunk_frames + 1
    kept = tuple(CachedChunk(i, (cached,), (cached,)) for i in spec.history.visible(chunk))
    state = student.resume(replace(student.open(), chunk=chunk), kept, chunk)
    state = replace(state, pending=Finished(chunk - 1, x, given))
    with FlopCounterMode(display=False) as planned, WeightsRead(net) as read:
        plan = student.plan(state, given)
    context = 2 * len(kept) * cached.numel() * cached.element_size()
    llm = Cost(planned.get_total_flops(), read.bytes, context)
    with FlopCounterMode(display=False) as drawn, WeightsRead(net) as read:
        for i, sigma in enumerate(spec.sigmas):
            student.denoise(state, plan, x, sigma, given, i)
    return {"llm": llm, "head": Cost(drawn.get_total_flops(), read.bytes)}


def milliseconds(cost: Cost) -> tuple[float, float]:
    """Of an H200 that only computes, and of one that only reads."""
    return 1e3 * cost.flops / H200["flops"], 1e3 * (cost.weights + cost.context) / H200["bytes"]


def main() -> None:
    student = real_midas()
    size = {name: sum(p.numel() for p in part.parameters()) / 1e9 for name, part in student.net.named_children()}
    tokens = student._size
    out = sys.stdout.write
    out(
        f"language model {size['llm']:.2f} B, head {size['head']:.2f} B, {tokens} tokens a frame of which 60 latent\n\n"
    )
    out(
        "| | TFLOP | implied | weights GB | ms at 4.8 TB/s | implied | keys and values GB |\n|---|---|---|---|---|---|---|\n"
    )
    for name, cost in measure(student).items():
        low, high = IMPLIED[f"{name} TF"]
        said = f"{low}" if low == high else f"{low} to {high}"
        reads = 1e3 * cost.weights / H200["bytes"]
        out(
            f"| {name}, a frame | {cost.flops / 1e12:.3f} | {said} | {cost.weights / 1e9:.2f} | {reads:.2f} | "
            f"{IMPLIED[f'{name} ms'][0]} | {cost.context / 1e9:.3f} |\n"
        )
    out("\n| six frames | TFLOP | weights GB | ms of an H200: computing | reading |\n|---|---|---|---|---|\n")
    for title, frames in (("one after the other (the paper)", 1), ("planned and drawn at once", CHUNK)):
        costs = [cost * (CHUNK / frames) for cost in measure(real_midas(frames)).values()]
        whole = Cost(*(sum(getattr(cost, name) for cost in costs) for name in ("flops", "weights", "context")))
        computing, reading = milliseconds(whole)
        out(f"| {title} | {whole.flops / 1e12:.2f} | {whole.weights / 1e9:.1f} | {computing:.1f} | {reading:.1f} |\n")


if __name__ == "__main__":
    main()
