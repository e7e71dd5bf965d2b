"""Processes of one group on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(script: str, folder: Path, count: int, timeout: float = 400.0) -> None:
    """Run `script FOLDER` as `count` ranks, each with its log in the folder; all have to end well."""
    if torch.cuda.is_available():
        pytest.skip("several ranks of one GPU are no group")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    given = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    given |= {"PYTHONPATH": str(ROOT)}
    ranks = []
    for rank in range(count):
        own = os.environ | given | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (folder / f"{rank}.log").open("w") as log:
            ranks.append(subprocess.Popen([sys.executable, script, str(folder)], stdout=log, stderr=log, env=own))
    try:
        codes = [process.wait(timeout=timeout) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    failed = next((rank for rank, code in enumerate(codes) if code), 0)
    assert codes == [0] * count, (folder / f"{failed}.log").read_text()[-3000:]
