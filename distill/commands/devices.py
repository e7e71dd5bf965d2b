"""Where a student runs and how fast: the options of every command that has one, and what they ask for."""

import argparse
import atexit
import math
import os
import platform
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from students.serving import optimize
from students.serving.optimize import DTYPES, Speed, usable
from teachers.errors import UserError

if TYPE_CHECKING:
    from distill.training.engines.engine import Engine
    from students.serving.shared import Shared
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
    """The student of a folder where the options ask for it. Of several processes rank 0 alone returns: the others share the
    tokens of its streams until it ends, and then exit."""
    from students.weights.checkpoint import load_student

    ranks = share(args)
    if ranks is None:
        usable(args.device)
        bundle = load_student(folder)
        return optimize.prepare(bundle, *choose(args))
    from students.serving.shared import Shared, follow

    bundle = split(optimize.prepare(load_student(folder), *choose(args, "student" if ranks.is_main else "")), ranks)
    assert ranks.sequence is not None
    bundle = replace(bundle, shared=Shared(ranks.sequence))
    if ranks.is_main:
        _SHARED.append(bundle.shared)
        return bundle
    for number in (signal.SIGINT, signal.SIGTERM):  # rank 0 ends what is shared, or is lost, and the watch ends it
        signal.signal(number, signal.SIG_IGN)
    follow(bundle)
    leave()
    raise SystemExit(0)


_RANKS: list["Engine"] = []
_SHARED: list["Shared"] = []


def share(args: argparse.Namespace) -> "Engine | None":
    """The processes that a launcher (torchrun, accelerate, srun) has started, which share the tokens of a stream; None where this
    one is alone. `args.device` becomes this rank's. UserError for options that cannot be shared."""
    from distill.training.engines.engine import Engine, EngineConfig, requested_processes

    world = requested_processes(os.environ)
    if world == 1 or _RANKS:
        return next(iter(_RANKS), None)
    for name, default in (("device", None), ("compile", "none")):
        if getattr(args, name) != default:
            raise UserError(f"--{name}: {world} processes share a stream, one on each GPU, uncompiled; remove it")
    ranks = Engine(EngineConfig(precision="fp32", sequence_parallel=world))
    _RANKS.append(ranks)
    atexit.register(leave)
    args.device = str(ranks.device)
    return ranks


def alone(command: str) -> None:
    """UserError where a launcher has started several processes, of which each would do all of a command's work."""
    from distill.training.lifecycle.launcher import requested_processes

    if (world := requested_processes(os.environ)) > 1:
        raise UserError(
            f"{command} is one process: {world} were started, and each would do all of it; run it without a launcher"
        )


def split(bundle: "Bundle", ranks: "Engine") -> "Bundle":
    """The bundle, whose network takes this rank's part of the tokens; UserError where it cannot."""
    kind = bundle.spec.network
    kind.check_sequence(ranks.world_size, math.prod(side // kind.patch for side in bundle.spec.latent_size[1:]))
    ranks.split(bundle.student)
    return bundle


def leave() -> None:
    """Let go of the other processes, where there are any: rank 0 ends what they share, and all leave together. After a call that
    has failed halfway nobody waits for another."""
    atexit.unregister(leave)
    failed = any(shared.broken for shared in _SHARED)
    for shared in _SHARED if not failed else ():
        shared.end()
    for ranks in _RANKS:
        ranks.close(failed)
    _SHARED.clear()
    _RANKS.clear()


def device_name(device: torch.device) -> str:
    """What the vendor calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
