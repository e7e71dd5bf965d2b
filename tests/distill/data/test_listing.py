"""Lists of a folder's files: what is in them, and that ranks have one, which rank 0 has read."""

import os
from pathlib import Path

import pytest

from distill.data.listing import list_files
from distill.training.engines.engine import Engine, EngineConfig
from teachers.errors import UserError
from tests.support.processes import run_ranks


@pytest.fixture
def folder(tmp_path):
    for name, size in (("b.wav", 3), ("a/c.WAV", 5), (".hidden/d.wav", 1), ("a/.e.wav", 1), ("notes.txt", 9)):
        file = tmp_path / "files" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(size))
    return tmp_path / "files"


def test_files_by_suffix_with_their_sizes_in_one_order(folder):
    assert list_files(folder, "data.speech", (".wav",)) == [("a/c.WAV", 5), ("b.wav", 3)]


def test_no_folder_and_no_file_are_refused(folder):
    with pytest.raises(UserError, match=r"^data\.speech: no such folder: "):
        list_files(folder / "none", "data.speech", (".wav",))
    with pytest.raises(UserError, match=r"^data\.speech: no file is one of \.flac"):
        list_files(folder, "data.speech", (".flac",))


def test_rank_0_walks_for_all(folder):
    """Another rank opens no folder, has the same list, and the same error."""
    run_ranks(__file__, folder, 2)


def worker(folder: Path) -> None:
    engine = Engine(EngineConfig(precision="fp32"))
    walked, walk = [], os.walk
    os.walk = lambda *words, **options: (walked.append(words), walk(*words, **options))[1]
    assert list_files(folder, "data.speech", (".wav",)) == [("a/c.WAV", 5), ("b.wav", 3)]
    with pytest.raises(UserError, match=r"^data\.speech: no file is one of \.flac"):
        list_files(folder, "data.speech", (".flac",))
    assert len(walked) == (2 if engine.is_main else 0)
    engine.close()
