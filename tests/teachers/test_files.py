"""The atomic writers: a file or folder under its name is whole; what failed leaves nothing."""

import argparse
import errno
import os

import pytest
import torch

from teachers import files
from teachers.errors import UserError
from teachers.files import atomic_write, copy_folder, load_tensors, remove_folder, replacing, save_tensors, staged


def half_written(writer, error, write=lambda temporary: temporary.write_text("half")):
    """Write into the temporary path of `writer`, then fail."""
    with writer as temporary:
        write(temporary)
        raise error


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    path = tmp_path / "a.json"
    atomic_write(path, "old")
    with pytest.raises(RuntimeError):
        half_written(replacing(path), RuntimeError())
    assert path.read_text() == "old"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_says_so_and_leaves_nothing(tmp_path):
    for num_bytes, message in ((5, "a needs 5 bytes, "), (0, "a, ")):
        with pytest.raises(UserError, match=f"the disk is full: .*{message}.* are free"):
            half_written(replacing(tmp_path / "a", num_bytes), OSError(errno.ENOSPC, "No space left on device"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_staged_folder_or_file_appears_whole_or_not_at_all(tmp_path, kind):
    target = tmp_path / "out"

    def make(temporary):
        if kind == "folder":
            temporary.mkdir()
            temporary = temporary / "inside"
        temporary.write_text("all")

    with pytest.raises(KeyboardInterrupt):
        half_written(staged(target), KeyboardInterrupt(), make)
    assert list(tmp_path.iterdir()) == []
    with staged(target) as temporary:
        make(temporary)
        assert not target.exists()
    assert (target / "inside" if kind == "folder" else target).read_text() == "all"
    assert list(tmp_path.iterdir()) == [target]


def test_a_staged_target_is_refused_where_it_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    for target, message in ((tmp_path / "there", "output exists"), (tmp_path / "no" / "a", "output folder not found")):
        with pytest.raises(UserError, match=message), staged(target):
            pass
    with (
        pytest.raises(UserError, match=r"cannot write .*a: \[Errno 28\] .*choose another place"),
        staged(tmp_path / "a"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: argparse.Namespace(free=2**30))
    with (
        pytest.raises(UserError, match=r"disk is too full: .* 1\.0 GiB free, 2\.0 are needed"),
        staged(tmp_path / "a", 2**31),
    ):
        pass


def test_folders_are_copied_and_removed(tmp_path):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    save_tensors(tmp_path / "a" / "deep" / "x.safetensors", {"x": torch.ones(2)})
    copy_folder(tmp_path / "a", tmp_path / "new" / "b")
    remove_folder(tmp_path / "a")
    assert load_tensors(tmp_path / "new" / "b" / "deep" / "x.safetensors")["x"].tolist() == [1, 1]
    assert [item.name for item in tmp_path.iterdir()] == ["new"]


def test_writers_on_a_full_disk_leave_nothing(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "shard.safetensors"
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"the disk is full: .*shard.safetensors needs 4000 bytes, \d+ bytes are free"):
        save_tensors(path, {"x": torch.zeros(1000)})
    with pytest.raises(UserError, match="needs 3 bytes"):
        atomic_write(path, b"abc")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    atomic_write(path, "old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, "new")
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "old"


def test_tensors_come_back_bit_equal_and_damage_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), "b": torch.arange(5).half()[::2]}
    save_tensors(path, tensors, {"sigmas": "1,0.5"})
    back = load_tensors(path)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="damaged tensor file"):
        load_tensors(path)
    with pytest.raises(UserError, match="no tensor file"):
        load_tensors(tmp_path / "y.safetensors")
