"""torchrun's agent starts all ranks again when one was lost: training continues from the last checkpoint to the same result.

The agent is torchrun's own (`torchrun --max-restarts 1`), in a process that is forked with all imports done.
"""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from distill.data.order import batch_rows
from distill.methods import Batch
from distill.training import checkpoint
from distill.training.config import EngineConfig
from distill.training.engines.engine import Engine
from distill.training.loop import train
from distill.training.metrics_log import MetricsLog
from distill.training.trainer import Trainer
from teachers.files import load_tensors, save_tensors
from tests.distill.training.test_loop import DATA, TARGET, Regression, config, nets
from tests.support.processes import call

pytestmark = pytest.mark.slow


def worker(folder: Path, killed: int | None) -> None:
    """A rank of FSDP2; in the first start that of number `killed` ends with SIGKILL after the second checkpoint was begun."""
    engine = Engine(EngineConfig(kind="fsdp2", precision="fp32"))
    roles = nets()
    trainer = Trainer(engine, config(batch_size=2, checkpoint_every=1), roles, "a", folder)
    is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    starts = folder / f"starts-{engine.rank}"
    starts.write_text(starts.read_text() + "." if starts.exists() else ".")

    def batches(position: int) -> Batch:
        if engine.rank == killed and is_first and checkpoint.saved(folder) and trainer.step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        rows = batch_rows(24, 2, position, 0, engine.rank, engine.world_size)
        return Batch(conditions=None, x0=(DATA[rows], TARGET[rows]))

    log = MetricsLog(folder / "metrics.jsonl", engine.is_main)
    train(trainer, Regression(roles, 0.3), batches, stage="s", seed=0, log=log)
    state = trainer.averaged()
    if engine.is_main:
        save_tensors(folder / "averaged.safetensors", state)
    engine.close()


def launch(folder: Path, killed: int | None) -> float:
    """Seconds until the agent has done."""
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    began = time.monotonic()
    options = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "start_method": "fork"}
    rendezvous = {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0", "run_id": "test"}
    elastic_launch(LaunchConfig(**options, **rendezvous, max_restarts=1, monitor_interval=0.1), worker)(folder, killed)
    return time.monotonic() - began


@pytest.mark.parametrize("killed", [0, 1])
def test_a_lost_rank_is_started_again_and_nothing_differs(tmp_path, killed):
    for name, lost in (("whole", None), ("lost", killed)):
        (tmp_path / name).mkdir()
        call(launch, tmp_path / name, lost)
    assert [(tmp_path / "lost" / f"starts-{rank}").read_text() for rank in range(2)] == ["..", ".."]
    assert [(tmp_path / "whole" / f"starts-{rank}").read_text() for rank in range(2)] == [".", "."]
    whole, lost = (load_tensors(tmp_path / name / "averaged.safetensors") for name in ("whole", "lost"))
    assert set(whole) == set(lost)
    assert all(torch.equal(whole[name], lost[name]) for name in whole)
    rows = [MetricsLog(tmp_path / name / "metrics.jsonl").rows() for name in ("whole", "lost")]
    assert rows[0] == rows[1]
