"""examples/slurm/distill.sbatch under shell scripts in the place of sbatch, srun and scontrol, and of `distill` itself.

The srun here starts every task of two nodes at once and returns the highest of their exit statuses; a task that a signal ended
counts as 128 + its number, as in Slurm. The `distill` writes down what it was given; what it does then, each test says.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill.cli import parse
from tests.support.processes import ROOT

SCRIPT = ROOT / "examples" / "slurm" / "distill.sbatch"
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SCONTROL = """\
case "$1 $2" in
    "show hostnames") [ "$3" = "gpu[07-08]" ] && printf 'gpu07\\ngpu08\\n' ;;
    requeue*) echo "$2" >> "$STATE/requeued" ;;
esac
"""
SRUN = """\
[ "$1" = --kill-on-bad-exit=1 ] && shift
tasks=
for task in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) "$@" & tasks="$tasks $!"
done
echo $tasks > "$STATE/tasks.part" && mv "$STATE/tasks.part" "$STATE/tasks"
highest=0
for task in $tasks; do
    wait $task; status=$?
    [ $status -gt $highest ] && highest=$status
done
exit $highest
"""
DISTILL = """\
echo "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >> "$STATE/started"
ends() {{ {ends}; }}
ends
"""


class Job:
    """A job of two nodes with two tasks each."""

    def __init__(self, folder: Path, ends: str):
        """`ends`: shell commands with which each task ends."""
        self.state, programs = folder, folder / "bin"
        programs.mkdir()
        for name, text in (("scontrol", SCONTROL), ("srun", SRUN), ("distill", DISTILL.format(ends=ends))):
            (programs / name).write_text(f"#!/bin/bash\n{text}")
            (programs / name).chmod(0o755)
        self.environ = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "STATE": str(folder)}
        slurm = {"JOB_NODELIST": "gpu[07-08]", "JOB_ID": "123457", "NTASKS": "4", "TASKS_PER_NODE": "2(x2)"}
        self.environ |= {f"SLURM_{name}": value for name, value in slurm.items()}

    def submit(self, *words: str) -> subprocess.Popen:
        return subprocess.Popen(["bash", SCRIPT, *words], env=self.environ, stderr=sys.stderr)

    def signal(self, number: int) -> None:
        """To every task, as scancel and the end of the time do."""
        deadline = time.monotonic() + 60
        ready = self.state / "ready"
        while not (self.state / "tasks").is_file() or not ready.is_file() or ready.read_text().count("\n") < 4:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for task in (self.state / "tasks").read_text().split():
            os.kill(int(task), number)

    @property
    def started(self) -> list[list[str]]:
        """Variables and arguments of each task that was started."""
        file = self.state / "started"
        return sorted(line.split(" ") for line in file.read_text().splitlines()) if file.is_file() else []

    @property
    def requeued(self) -> list[str]:
        file = self.state / "requeued"
        return file.read_text().split() if file.is_file() else []


def test_every_task_is_a_rank_of_one_group(tmp_path):
    job = Job(tmp_path, "true")
    words = ["livetalk", "teacher.path=/shared/a folder", "engine=fsdp2"]
    assert job.submit(*words).wait(60) == 0
    given = ["gpu07", str(20000 + 123457 % 20000), "run", *" ".join(words).split(" ")]
    assert job.started == [[str(rank), "4", str(rank % 2), "2", *given] for rank in range(4)]
    assert job.requeued == []
    assert parse(["run", *words]).overrides == words[1:]


def test_the_end_of_its_time_puts_it_back_into_the_queue_and_it_continues(tmp_path):
    """SIGUSR1 ends a stage with 138 (distill.training.lifecycle.signals); the same script then runs again."""
    ends = '[ "$SLURM_RESTART_COUNT" ] && exit 0; sleep 99 & trap "kill $!; exit 138" USR1; echo ready >> "$STATE/ready"; wait'
    job = Job(tmp_path, ends)
    running = job.submit("livetalk")
    job.signal(signal.SIGUSR1)
    assert running.wait(60) == 138
    assert job.requeued == ["123457"]
    job.environ["SLURM_RESTART_COUNT"] = "1"
    assert job.submit("livetalk").wait(60) == 0
    assert job.requeued == ["123457"], "once"
    assert len(job.started) == 8


@pytest.mark.parametrize(
    ("ends", "status", "again"), [("kill -USR1 $$", 138, 1), ("exit 143", 143, 1), ("exit 2", 2, 0), ("exit 1", 1, 0)]
)
def test_a_mistake_or_a_killed_rank_is_not_tried_again(tmp_path, ends, status, again):
    """But a signal in a stage that does not train, which ends the process at once, is."""
    job = Job(tmp_path, f"if [ $RANK = 2 ]; then {ends}; fi")
    assert job.submit("livetalk").wait(60) == status
    assert job.requeued == ["123457"] * again


def test_the_header_asks_for_what_the_script_relies_on():
    options = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--signal=USR1@300", "--requeue", "--ntasks-per-node=8", "--gpus-per-node=8"} <= set(options)
    assert not [option for option in options if option.startswith(("--gpus-per-task", "--gpu-bind"))]
    assert all(name in SCRIPT.read_text() for name in VARIABLES)
