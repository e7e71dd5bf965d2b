"""Tasks over processes: a crash is that of the task it was at, and what says nothing of a clip ends the run."""

import errno
import os
import signal
from functools import partial
from pathlib import Path

import pytest

from distill.data.prepare.workers import shared_out, stop_for_the_machine
from teachers.errors import UserError
from teachers.media.container import opened
from tests.support.media.films import counting_film


def note(folder: Path, task: str) -> str:
    """A line for each time that a task runs; `always` kills its process, `once` does so the first time."""
    file = folder / task
    with file.open("a") as lines:
        lines.write(f"{os.getpid()}\n")
    if "always" in task or ("once" in task and len(file.read_text().splitlines()) == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return task.upper()


def test_a_crash_is_of_one_task_and_the_others_run_once(tmp_path):
    tasks = ["always", *(f"task {number}" for number in range(9)), "once"]
    found = list(shared_out(partial(note, tmp_path), tasks, workers=3))
    assert dict(found) == {task: None if task == "always" else task.upper() for task in tasks}
    runs = {task: len((tmp_path / task).read_text().splitlines()) for task in tasks}
    assert runs == {task: 2 if task in ("always", "once") else 1 for task in tasks}
    assert {task for task, _ in found[-2:]} == {"always", "once"}, "again behind all others"


class Failing:
    """A file whose disk fails behind so many bytes."""

    def __init__(self, stream, most: int):
        self.stream, self.most = stream, most

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()

    def read(self, size: int = -1) -> bytes:
        if self.stream.tell() >= self.most:
            raise OSError(errno.EIO, "Input/output error")
        return self.stream.read(size)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.98])
def test_a_failing_disk_is_no_broken_film(tmp_path, monkeypatch, share):
    """FFmpeg takes an error of the last packets for the end of the film, which would be a shorter one."""
    film = counting_film(tmp_path / "film.mkv", 8.0)
    most, open_file = int(share * film.stat().st_size), Path.open
    monkeypatch.setattr(Path, "open", lambda self, *mode: Failing(open_file(self, *mode), most))
    with pytest.raises(UserError, match=r"cannot be read \(Input/output error\)") as raised, opened(film, "film") as c:
        sum(1 for _ in c.decode(video=0))
    with pytest.raises(UserError, match=r"stopped at clip 7, by an error of the machine \(film cannot be read"):
        stop_for_the_machine(raised.value, "clip 7")


def test_a_damaged_film_is_no_failing_disk(tmp_path):
    film = counting_film(tmp_path / "film.mkv", 2.0)
    film.write_bytes(film.read_bytes()[:300])
    with pytest.raises(UserError) as raised, opened(film, "film") as container:
        sum(1 for _ in container.decode(video=0))
    stop_for_the_machine(raised.value, "clip 7")
