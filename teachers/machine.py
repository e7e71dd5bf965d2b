"""What this machine has: free memory, and fast products in bf16."""

import os
from pathlib import Path
from typing import Literal

import torch

CGROUP = Path("/sys/fs/cgroup")
PIXELS_AT_ONCE = 2**25
"""Pixels that are drawn, encoded, decoded or scored at once: one clip of 81 frames at 512x512."""
CPU_PIXELS_AT_ONCE = 2**18
"""On a CPU so few that the outputs of a layer stay in its caches: two clips of the embedded world."""


def clips_at_once(frames: int, height: int, width: int, device: str = "") -> int:
    """Clips of this size that are worked on at once, on a device of this type."""
    pixels = CPU_PIXELS_AT_ONCE if device == "cpu" else PIXELS_AT_ONCE
    return max(1, pixels // (frames * height * width))


def free_host_bytes() -> int:
    """Bytes of memory that one of this machine's processes of a run (LOCAL_WORLD_SIZE) may take: an equal share of what Linux calls
    available, and of what is left of the control group's limit."""
    free = min(_available(), _left_of_limit(CGROUP))
    return free // max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def multiplies_bf16() -> bool:
    """Whether the GPU, or without one this CPU, has products of bf16 matrices (CPUs with AMX have AVX512-BF16 too). Elsewhere torch
    converts what they multiply, which takes longer than products in fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def native_precision() -> Literal["fp32", "bf16"]:
    """The precision in which this machine computes fastest."""
    return "bf16" if multiplies_bf16() else "fp32"


def _available() -> int:
    return 1024 * _number(Path("/proc/meminfo"), "MemAvailable:", 2**52)


def _left_of_limit(group: Path) -> int:
    """2**62 without a limit. Cached files, which are given back when memory is short, do not count as used."""
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return 2**62 if limit == "max" else int(limit) - int(used) + _number(group / "memory.stat", "inactive_file", 0)
    except (OSError, ValueError):
        return 2**62


def _number(file: Path, name: str, otherwise: int) -> int:
    """The number beside `name` in a file of lines."""
    try:
        rows = (line.split() for line in file.read_text().splitlines())
        return next(int(row[1]) for row in rows if row[:1] == [name])
    except (OSError, StopIteration, ValueError, IndexError):
        return otherwise
