"""Where a student runs and how fast: the options of every command that has one, and what they ask for."""

import argparse
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from students.serving import optimize
from students.serving.optimize import DTYPES, Speed, usable

if TYPE_CHECKING:
    from students.weights.checkpoint import Bundle


def add_arguments(parser: argparse.ArgumentParser, **given: Any) -> None:
    """Declare --device, --dtype, --compile, --attention and --quantize; `given` replaces every default."""
    modes, weights = (get_args(Speed.__annotations__[name]) for name in ("compile", "quantize"))

    group = parser.add_argument_group("where a student runs")

    def add(name: str, default: str | None, text: str, **more: Any) -> None:
        group.add_argument(f"--{name}", **{"default": default, "help": text, **more, **given})

    add("device", None, "cpu, cuda, cuda:1 (default: cuda where there is one)")
    add("dtype", None, "of its matrices (default: bf16 on cuda, else fp32)", choices=tuple(DTYPES))
    text = f"torch.compile: {', '.join(modes)} (default none); reduce-overhead records CUDA graphs"
    add("compile", "none", text, nargs="?", choices=modes, const="default", metavar="MODE")
    add("attention", "native", "of diffusers: native, flash, sage, .. (default native)", metavar="NAME")
    add("quantize", "none", "weights, by torchao (default none)", choices=weights)


def choose(args: argparse.Namespace, what: str = "student") -> tuple[torch.device, Speed]:
    """What `prepare` gets by the options; one line on stderr says where `what` runs ("": no word). UserError for a device that
    cannot be used."""
    device = usable(args.device)
    dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    speed = Speed(dtype=dtype, compile=args.compile, attention=args.attention, quantize=args.quantize)
    if what:
        options = "".join(f", {k} {v}" for k, v in vars(speed).items() if k == "dtype" or v != getattr(Speed, k))
        options = options if what == "student" else ""
        sys.stderr.write(f"{what} on {device} ({device_name(device)}){options}\n")
    return device, speed


def load(folder: Path, args: argparse.Namespace) -> "Bundle":
    """The student of a folder where the options ask for it."""
    from students.weights.checkpoint import load_student

    usable(args.device)
    bundle = load_student(folder)
    return optimize.prepare(bundle, *choose(args))


def device_name(device: torch.device) -> str:
    """What the vendor calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
