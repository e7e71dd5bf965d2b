"""`distill doctor`: what is installed, what this machine has, what is missing and where it goes."""

import argparse
import importlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import av
import psutil
import torch

from distill.pipeline.run_folder import revision, versions
from eval.networks.weights import REGISTRY, locate
from teachers.errors import UserError
from teachers.media import face

MODULES = ("torchvision", "peft", "deepspeed", "hydra", "torchmetrics", "lpips", "safetensors", "jinja2", "tqdm")
GIB = 2**30
MIN_DISK_GIB, MIN_MEMORY_GIB = 2.0, 4.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `distill doctor`."""
    parser.add_argument("--golden", action="store_true", help="do the metrics' weights give what their authors print?")


def run(args: argparse.Namespace) -> int:
    """Print one line a check; 0 when the embedded pipeline can run here, 1 when something it needs is missing.

    With --golden, also whether the published metric weights give their authors' numbers; 1 when one is missing or off.
    """
    complete = True
    for mark, line in (*_software(), *_machine(), *_codecs(), *_faces(), *_weights(), *_teacher_parts()):
        print(f"{mark:<8} {line}")
        complete = complete and mark != "MISSING"
    if args.golden:
        complete = _golden() and complete
    print("ready" if complete else "not ready: fix the lines marked MISSING or FAILED")
    return 0 if complete else 1


def _software() -> Iterator[tuple[str, str]]:
    for name, version in {**versions(), "revision": revision()}.items():
        yield ("MISSING" if version == "missing" else "ok"), f"{name} {version}"
    logging.disable(logging.WARNING)  # some libraries greet
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except (ImportError, RuntimeError, OSError) as error:
            yield "MISSING", f"{name}: {str(error).splitlines()[0] if str(error) else error!r}; pip install -e . again"
        else:
            yield "ok", f"{name} {getattr(module, '__version__', '')}".rstrip()
    logging.disable(logging.NOTSET)


def _machine() -> Iterator[tuple[str, str]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    omp = os.environ.get("OMP_NUM_THREADS", "not set")
    yield "ok", f"{cores} cores, torch uses {torch.get_num_threads()} threads, OMP_NUM_THREADS {omp}"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            yield "ok", f"cuda:{index} {device.name}, {device.total_memory / GIB:.0f} GiB"
    else:
        yield (
            "ok",
            f"no CUDA device (torch built for {torch.version.cuda or 'CPU only'}); the embedded recipe needs none",
        )
    memory = psutil.virtual_memory().available / GIB
    yield (
        ("ok" if memory >= MIN_MEMORY_GIB else "low"),
        f"memory {memory:.1f} GiB free ({MIN_MEMORY_GIB:.0f} are enough)",
    )
    disk = shutil.disk_usage(Path.cwd()).free / GIB
    yield ("ok" if disk >= MIN_DISK_GIB else "low"), f"disk {disk:.1f} GiB free here ({MIN_DISK_GIB:.0f} are enough)"


def _codecs() -> Iterator[tuple[str, str]]:
    for name in ("libx264", "aac"):
        found = name in av.codecs_available
        yield (
            ("ok" if found else "MISSING"),
            f"PyAV {av.__version__} encoder {name}{'' if found else ': pip install av'}",
        )


def _faces() -> Iterator[tuple[str, str]]:
    name = face.detector()
    yield ("ok", f"face detector {name}") if name else ("optional", f"face detector for crops: {face.INSTALL}")


def _weights() -> Iterator[tuple[str, str]]:
    for name, weights in REGISTRY.items():
        try:
            line = "ok", f"{weights.metric}: {locate(name)}"
        except UserError as error:
            line = "optional", str(error)
        yield line


def _golden() -> bool:
    """Print one line a golden number; whether all passed."""
    from eval import golden

    results = golden.run()
    for result in results:
        mark = "MISSING" if result.passed is None else "ok" if result.passed else "FAILED"
        outcome = result.found if result.passed is None else f"expected {result.expected}, found {result.found}"
        print(f"{mark:<8} golden {result.name}: {outcome}")
    return all(result.passed for result in results)


def _teacher_parts() -> Iterator[tuple[str, str]]:
    """What a published teacher needs beside its own weights, and where it comes from; a path is given where it is used."""
    from teachers.codecs import dc_ae, taehv, wan_vae
    from teachers.encoders import image, umt5, wav2vec

    for use, source in {
        "audio encoder of OmniAvatar": wav2vec.SOURCE,
        "text encoder of Wan": f"{umt5.DIFFUSERS}; or {umt5.ORIGINAL}",
        "image encoder of Wan": f"{image.ORIGINAL}; or {image.DIFFUSERS}",
        "codec of Wan": wan_vae.WHERE,
        "tiny decoder": taehv.WHERE,
        "codec of MIDAS": dc_ae.WHERE,
    }.items():
        yield "optional", f"{use}: {source}"
