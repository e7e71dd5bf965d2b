"""One process at a time in a folder: the second gets its holder's name, whenever it comes; a killed holder holds nothing."""

import multiprocessing
import os
import signal
import time

import pytest

from teachers.disk.lock import LOCK, FolderLock
from teachers.errors import UserError

CONTEXT = multiprocessing.get_context("fork")


def start(work, *words):
    process = CONTEXT.Process(target=work, args=words)
    process.start()
    return process


def hold(folder, seconds):
    FolderLock.of(folder, "wait")
    (folder / "held").write_text(str(os.getpid()))
    time.sleep(seconds)


def contend(folder, begin):
    """Take the lock as soon as `begin` is there; what happened goes to a file of our own."""
    while not begin.exists():
        time.sleep(0.0005)
    try:
        lock = FolderLock.of(folder, "wait for it")
    except UserError as error:
        found = str(error)
    else:
        time.sleep(0.3)
        lock.release()
        found = "held"
    (begin.parent / f"{os.getpid()}.txt").write_text(found)


def test_the_second_gets_who_holds_it_and_a_killed_holder_holds_nothing(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / LOCK).write_text('{"process": 999999999, "host": "gone", "since": "then"}')  # of a killed start
    process = start(hold, folder, 60)
    while not (folder / "held").is_file():
        time.sleep(0.01)
    with pytest.raises(UserError, match=rf"^in use: {folder} by process {process.pid} on \S+ since .*; wait for it$"):
        FolderLock.of(folder, "wait for it")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    lock = FolderLock.of(folder, "wait")
    again = FolderLock.of(folder, "wait")  # a process has what it has
    again.release()
    assert (folder / LOCK).is_file()
    lock.release()
    assert not (folder / LOCK).exists()


def test_of_those_that_start_at_once_one_works_and_each_other_names_it(tmp_path):
    """Four processes, three times, over what those before have left."""
    folder = tmp_path / "run"
    folder.mkdir()
    for turn in range(3):
        place = tmp_path / str(turn)
        place.mkdir()
        processes = [start(contend, folder, place / "begin") for _ in range(4)]
        (place / "begin").touch()
        for process in processes:
            process.join(20)
        found = {int(file.stem): file.read_text() for file in place.glob("*.txt")}
        holders = [pid for pid, words in found.items() if words == "held"]
        message = [words for words in found.values() if words != "held"]
        assert len(found) == 4
        assert holders
        assert all(any(f"by process {pid} on " in words for pid in holders) for words in message), found


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=r"^cannot write: .* \(Read-only file system\); make it writable$"):
        FolderLock.of(tmp_path, "wait")
