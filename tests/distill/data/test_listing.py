"""Lists of a folder's files: what is in them, and that ranks have one, which rank 0 has read."""

import os
from pathlib import Path

import pytest

from distill.compose import RECIPES
from distill.data.listing import list_files
from distill.data.prepare import shards
from distill.recipe import load_recipe
from distill.training.engines.engine import Engine, EngineConfig
from teachers.errors import UserError
from tests.distill.data.test_recorded import SHORT, clips, films, prepared  # noqa: F401 (fixtures)
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


def test_rank_0_reads_the_indices_of_a_folder_for_all(films, tmp_path):  # noqa: F811
    """50,000 small files on a disk that all ranks share; every rank has the same clips."""
    prepared(films, tmp_path / "shards")
    run_ranks(__file__, tmp_path, 2)
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text() != ""


def worker(folder: Path) -> None:
    engine = Engine(EngineConfig(precision="fp32"))
    if (folder / "shards").is_dir():
        opened, read_index = [], shards.read_index
        shards.read_index = lambda path: (opened.append(path), read_index(path))[1]
        words = [*SHORT, "data=folder", f"data.path={folder / 'shards'}"]
        source = load_recipe(RECIPES / "scratch_avatar.yaml", words).data.open()
        (folder / str(engine.rank)).write_text(repr([(sample.id, start) for sample, start in source.training.rows]))
        assert bool(opened) == engine.is_main
    else:
        lists_files(engine, folder)
    engine.close()


def lists_files(engine: Engine, folder: Path) -> None:
    walked, walk = [], os.walk
    os.walk = lambda *words, **options: (walked.append(words), walk(*words, **options))[1]
    assert list_files(folder, "data.speech", (".wav",)) == [("a/c.WAV", 5), ("b.wav", 3)]
    with pytest.raises(UserError, match=r"^data\.speech: no file is one of \.flac"):
        list_files(folder, "data.speech", (".flac",))
    assert len(walked) == (2 if engine.is_main else 0)
