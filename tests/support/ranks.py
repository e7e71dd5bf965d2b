"""Processes of one group on this machine."""

import importlib
import os
import socket
import traceback
from pathlib import Path

import pytest
import torch

from tests.support.processes import CONTEXT, kill

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(script: str, folder: Path, count: int, timeout: float = 400.0) -> None:
    """`worker(folder)` of a test file as `count` ranks, each with its log in the folder; all have to end well."""
    if torch.cuda.is_available():
        pytest.skip("several ranks of one GPU are no group")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    module = ".".join(Path(script).resolve().relative_to(ROOT).with_suffix("").parts)
    world = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = []
    for rank in range(count):
        environ = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(CONTEXT.Process(target=_rank, args=(module, folder, environ, folder / f"{rank}.log")))
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(timeout)
        codes = [process.exitcode for process in ranks]
    finally:
        for process in ranks:
            if process.exitcode is None:
                kill(process)
    failed = next((rank for rank, code in enumerate(codes) if code), 0)
    assert codes == [0] * count, (folder / f"{failed}.log").read_text()[-3000:]


def _rank(module: str, folder: Path, environ: dict[str, str], log: Path) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= environ
    torch.set_num_threads(1)
    try:
        importlib.import_module(module).worker(folder)
    except BaseException:
        traceback.print_exc()
        raise
