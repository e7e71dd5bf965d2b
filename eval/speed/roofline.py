"""How near a piece of work comes to what the machine can do: its FLOPs against the rate of large matrix products."""

import time
from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from eval.speed.latency import wait


def attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: object, **__: object) -> int:
    """FLOPs of attention over tensors of these shapes."""
    return sdpa_flop_count(query, key, value)


CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
"""The fused attention of CPUs, which torch's counter does not know."""


def count_flops(call: Callable[[], object]) -> int:
    """Floating point operations of `call()`, a multiply-add being two: matrix products, convolutions and attention by torch's
    counter. It sees this thread alone, and no compiled code."""
    with torch.inference_mode(), FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        call()
    return counter.get_total_flops()


def matmul_ceiling(
    device: torch.device, dtype: torch.dtype, sizes: Sequence[int] | None = None, seconds: float = 0.5
) -> float:
    """FLOP/s of the fastest square matrix product of `dtype` with the present threads, each size repeated for `seconds`."""
    if sizes is None:
        sizes = (4096, 8192) if device.type == "cuda" else (512, 1024, 2048)
    best = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = a @ b
        repeats, spent = 1, 0.0
        while spent < seconds:
            wait(device)
            start = time.perf_counter()
            for _ in range(repeats):
                torch.mm(a, b, out=out)
            wait(device)
            took = time.perf_counter() - start
            spent += took
            best = max(best, 2.0 * size**3 * repeats / took)
            repeats = max(1, min(4 * repeats, int(0.2 * seconds * repeats / took)))
    return best
