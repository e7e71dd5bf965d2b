"""Where and how fast a student is served: device, type of the matrices, compiled step, attention backend, quantised weights."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from students.spec import Spec
from teachers.errors import UserError

if TYPE_CHECKING:
    from students.weights.checkpoint import Bundle

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


Compile = Literal["none", "default", "reduce-overhead", "max-autotune"]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """`compile`: none, or a mode of torch.compile (reduce-overhead records CUDA graphs). `attention`: a backend of diffusers'
    dispatcher, such as native, flash or sage. `quantize`: int8 or fp8 weight-only quantisation by torchao. What a student was
    trained in is exact; everything else changes the frames a little."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    compile: Compile = "none"
    attention: str = "native"
    quantize: Literal["none", "int8", "fp8"] = "none"


def usable(device: torch.device | str | None = None) -> torch.device:
    """This device, by default cuda where there is one, else cpu; UserError for one that cannot be used here."""
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=wanted).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {wanted} cannot be used ({str(error).splitlines()[0]}); try cpu") from error
    return torch.device(wanted)


def prepare(bundle: "Bundle", device: torch.device | str, speed: Speed) -> "Bundle":
    """The bundle on `device`, made ready in place; UserError for what is not installed or does not fit."""
    net = bundle.student.net
    cast(net, DTYPES[speed.dtype])
    try:
        bundle.to(device)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{device}: no room for the student ({str(error).splitlines()[0]}); try another") from error
    set_attention(net, speed.attention)
    if speed.quantize != "none":
        _ = bundle.fingerprint  # kept: it is of plain weights
        _quantise(net, speed.quantize)
    if speed.compile != "none":
        _allow_graphs(bundle.spec, 2)
        net.compile(mode=speed.compile, dynamic=False)
        bundle.student.one_by_one = "a compiled step, which would be compiled again for every size of a batch"
    return bundle


def set_attention(net: Any, backend: str) -> None:
    """Choose the attention backend of a network; UserError for one that is unknown, not installed or not for this machine."""
    try:
        if backend != "native":
            net.kind.set_attention(net, backend)
    except (ValueError, ImportError, RuntimeError) as error:
        line = str(error).splitlines()[0]
        raise UserError(f"attention backend '{backend}': {line}; native always works") from error


def compile_blocks(net: Any, mode: Compile, spec: Spec) -> None:
    """Compile each block's forward, for training: blocks share their graphs, and the hooks of an engine stay outside of them.
    UserError for a network without blocks."""
    if mode == "none":
        return
    _allow_graphs(spec, 8)  # with gradient and without, computed again, with conditions read ahead or not
    blocks = getattr(net, "blocks", None)
    if not isinstance(blocks, torch.nn.ModuleList):
        raise UserError(f"compile: {type(net).__name__} has no blocks; use compile=none")
    for block in blocks:
        block.forward = torch.compile(block.forward, mode=mode, dynamic=False)


def _allow_graphs(spec: Spec, kinds: int) -> None:
    """One graph for each length of the context until it is full, and each of so many `kinds` of call; past the limit the step would
    silently run uncompiled."""
    if spec.history.positions == "absolute":
        raise UserError("compile: positions: absolute would make another graph for every chunk; use compile=none")
    limit = kinds * sum(part.capacity or 16 for part in spec.history.parts) + 8
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)


def cast(net: Any, dtype: torch.dtype) -> None:
    """Every weight to `dtype`, but for those that the network keeps in fp32."""
    kept = net._keep_in_fp32_modules or ()
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if tensor.is_floating_point() and not set(name.split(".")) & set(kept):
            tensor.data = tensor.data.to(dtype)


def _quantise(net: Any, weights: str) -> None:
    try:
        from torchao.quantization import (  # pyright: ignore[reportMissingImports]  # optional
            Float8WeightOnlyConfig,
            Int8WeightOnlyConfig,
            quantize_,
        )
    except ImportError as error:
        raise UserError(f"quantize={weights}: torchao is not installed; pip install torchao") from error
    quantize_(getattr(net, "blocks", net), Int8WeightOnlyConfig() if weights == "int8" else Float8WeightOnlyConfig())
