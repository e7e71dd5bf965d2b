"""A student of published shape, served: eager, compiled, as CUDA graphs, with fp8 weights."""

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.gpu_parts.skipped import SkippedError
from distill.commands.bench import SHAPES, Shape, bench, make_scene, random_student
from students.serving.optimize import DTYPES, Speed
from teachers.encoders.small import TextConfig
from teachers.networks.wan import NetworkConfig

MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "fp8": {"quantize": "fp8"},
    "compiled": {"compile": "default"},
    "graphs": {"compile": "reduce-overhead"},
}
ROUNDS = 3


def small(shape: Shape) -> Shape:
    """The same structure in 32x48 pixels."""
    network = NetworkConfig(num_layers=2, num_heads=2, head_dim=16, ffn_dim=64, audio_hidden=8, audio_blocks=(1,))
    parts: dict[str, Any] = {"text": TextConfig(dim=24, max_tokens=7), "audio_dim": 40}
    parts |= {"decoder_widths": (16, 8, 8, 8), "encoder_width": 8}
    return replace(shape, height=32, width=48, network=network, **parts)


def speed(name: str, mode: str, layers: int | None, device: torch.device, quick: bool) -> dict[str, Any]:
    """What `distill bench --shape NAME` measures, in bf16 on cuda; `layers`: the first so many of them alone, with the encoders and
    codec as they are."""
    if "quantize" in MODES[mode] and find_spec("torchao") is None:
        raise SkippedError("torchao is not installed")
    shape = small(SHAPES[name]) if quick else SHAPES[name]
    if layers is not None:
        shape = replace(shape, network=shape.network.shallow(layers))
    dtype = "bf16" if device.type == "cuda" else "fp32"
    capacity = shape.history.capacity or 0
    chunks = capacity + (2 if quick else 4)  # all but the first few have a full context
    bundle = random_student(shape, device, DTYPES[dtype])
    scene = make_scene(bundle.spec, chunks)
    found = bench(bundle, scene, chunks, 1 if quick else ROUNDS, device, Speed(dtype=dtype, **MODES[mode]))
    return {"layers": shape.network.num_layers, **found}
