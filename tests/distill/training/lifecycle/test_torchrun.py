"""Under torchrun's own agent, in a process that is forked with all imports done: a rank that is killed ends the others with a word,
and a signal to the agent is acted on between two micro-steps, whatever it does to the agent.
"""

import os
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from distill.methods import Batch
from distill.training import checkpoint
from distill.training.engines.engine import Engine, EngineConfig
from distill.training.loop import train
from distill.training.metrics_log import MetricsLog
from distill.training.trainer import Trainer
from tests.distill.training.test_loop import Regression, batches_of, config, nets
from tests.support.processes import CONTEXT, kill

SECONDS, MICRO_STEPS = 0.1, 200
"""Of a micro-step of the second step, and how many an update has: the step takes a minute."""


def worker(folder: Path, scene: str) -> None:
    """A rank that trains; in its second step rank 1 is killed, or sends the agent a signal."""
    log = os.open(folder / f"{os.environ['RANK']}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)
    engine = Engine(EngineConfig(precision="fp32"))
    roles = nets()
    trainer = Trainer(engine, config(batch_size=2, accumulation=MICRO_STEPS), roles, "a", folder)
    (folder / f"{engine.rank}.pid").write_text(str(os.getpid()))

    def batches(position: int) -> Batch:
        if trainer.step == 1:
            if position % MICRO_STEPS == 5 and engine.rank == 1:
                what, number = (os.getpid(), "SIGKILL") if scene == "killed" else (os.getppid(), scene)
                (folder / "when").write_text(str(time.time()))
                os.kill(what, getattr(signal, number))
            time.sleep(SECONDS)
        return batches_of(2)(position)

    try:
        train(trainer, Regression(roles), batches, stage="s", seed=0, log=MetricsLog(folder / "metrics.jsonl", False))
    except RuntimeError:
        engine.settle()
        raise
    engine.close()


def launch(folder: Path, scene: str) -> None:
    """torchrun --nproc-per-node 2, without restarts."""
    options = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "start_method": "fork", "max_restarts": 0}
    rendezvous = {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0", "run_id": "test"}
    try:
        elastic_launch(LaunchConfig(**options, **rendezvous, monitor_interval=0.1), worker)(folder, scene)
    except ChildFailedError:
        sys.exit(1)


def alive(folder: Path) -> bool:
    """Whether a rank is still there; one that nobody has waited for is not."""
    found = []
    for rank in range(2):
        with suppress(OSError):
            found.append(Path("/proc", (folder / f"{rank}.pid").read_text(), "stat").read_text().rpartition(")")[2])
    return any(not state.startswith(" Z") for state in found)


def outcome(folder: Path, scene: str) -> tuple[int, float, list[str]]:
    """The agent's exit status, seconds from rank 1's deed until no rank is left, and what the ranks said."""
    agent = CONTEXT.Process(target=launch, args=(folder, scene))
    agent.start()
    try:
        agent.join(100)
        while alive(folder) and time.time() < float((folder / "when").read_text()) + 60:
            time.sleep(0.05)
        seconds = time.time() - float((folder / "when").read_text())
        return agent.exitcode, seconds, [(folder / f"{rank}.log").read_text() for rank in range(2)]
    finally:
        if agent.exitcode is None:
            kill(agent)


def test_the_end_of_one_rank_ends_the_other_with_a_word(tmp_path):
    code, seconds, said = outcome(tmp_path, "killed")
    assert code == 1
    assert seconds < 60
    assert re.search(
        r"^distill: rank 1 \(process \d+ on .*\) was killed, or its machine was lost: all ranks end", said[0], re.M
    )
    assert checkpoint.saved(tmp_path) == []


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 1), ("SIGUSR1", -signal.SIGUSR1)])
def test_a_signal_to_the_agent_saves_between_two_micro_steps(tmp_path, name, code):
    """torchrun hands SIGTERM on; of SIGUSR1 (Slurm's) it dies, and its ranks get SIGTERM for it."""
    ended, seconds, said = outcome(tmp_path, name)
    assert ended == code
    assert [path.name for path in checkpoint.saved(tmp_path)] == ["checkpoint-00000001"]
    assert "distill: SIGTERM: s is saved after step 1; the same command continues" in said[0]
    assert seconds < MICRO_STEPS * SECONDS, "less than an update takes"
