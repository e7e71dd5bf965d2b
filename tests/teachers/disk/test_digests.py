"""Digests: what was written is known while it is written, and every change of it is found later."""

import random
import time

import pytest
import torch

from teachers.disk import digests
from teachers.disk.digests import faults, measure, read_sealed, read_sums, recording, sealed, write_sums
from teachers.errors import UserError
from teachers.files import atomic_write, copy_folder, save_tensors, staged


def test_a_recorder_knows_what_the_writers_wrote(tmp_path):
    with recording(tmp_path / "stage", tmp_path / "sums", lambda name: not name.startswith(".")) as recorder:
        (tmp_path / "stage").mkdir()
        save_tensors(tmp_path / "stage" / "a.safetensors", {"x": torch.ones(3)})
        atomic_write(tmp_path / "stage" / "b.json", "old")
        atomic_write(tmp_path / "stage" / "b.json", "new")
        atomic_write(tmp_path / "elsewhere", "not ours")
        with staged(tmp_path / "stage" / "folder") as temporary:
            temporary.mkdir()
            (temporary / "c").write_text("c")
        found = recorder.wait()
    assert sorted(found) == ["a.safetensors", "b.json", "folder/c"]
    assert all(written == measure(tmp_path / "stage" / name) for name, written in found.items())
    assert read_sums(tmp_path / "sums") == {name: digest for name, (_, digest) in found.items()}
    assert not list(faults(tmp_path / "stage", found))


def test_every_flipped_bit_of_a_sealed_file_is_found(tmp_path):
    path = tmp_path / "a.json"
    values = {"loss": float("nan"), "mean": 0.1, "many": [1, 2, {"x": None}], "text": "ü"}
    path.write_text(sealed(values))
    assert read_sealed(path, "x") == {**values, "loss": None}
    data, rng = path.read_bytes(), random.Random(0)
    for _ in range(100):
        place, bit = rng.randrange(len(data)), rng.randrange(8)
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
        if chr(data[place]).isspace():  # which may become other white space
            continue
        with pytest.raises(UserError, match=f"damaged file: {path}"):
            read_sealed(path, "x")
    for content in (b"", b"[]", b"{}", b"7", b"\xff", b"[" * 100_000, b'{"digest": 1}'):
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged file"):
            read_sealed(path, "x")


def test_lists_of_sums_are_read_strictly_but_for_a_torn_line(tmp_path):
    (tmp_path / "a").write_text("a")
    write_sums(tmp_path, {"a": measure(tmp_path / "a")})
    assert read_sums(tmp_path / digests.SUMS) == {"a": measure(tmp_path / "a")[1]}
    with (tmp_path / digests.SUMS).open("a") as file:
        file.write("12ab")
    assert list(read_sums(tmp_path / digests.SUMS, strict=False)) == ["a"]
    with pytest.raises(UserError, match="damaged file"):
        read_sums(tmp_path / digests.SUMS)
    assert read_sums(tmp_path / "none") == {}


def test_hashing_never_blocks(tmp_path, monkeypatch):
    """A writer goes on while a thread hashes what it wrote."""
    real = digests.hashlib.file_digest
    monkeypatch.setattr(digests.hashlib, "file_digest", lambda *words: (time.sleep(0.5), real(*words))[1])
    with recording(tmp_path) as recorder:
        began = time.perf_counter()
        for i in range(3):
            atomic_write(tmp_path / str(i), "x")
        assert time.perf_counter() - began < 1.0
        assert len(recorder.wait()) == 3
        assert time.perf_counter() - began > 1.4


def test_files_that_only_their_owner_may_read_are_opened_to_the_others(tmp_path):
    """safetensors writes 0600; everything here has the mode of a file that Python opens."""
    from safetensors.torch import save_file

    (tmp_path / "plain").touch()
    mode = (tmp_path / "plain").stat().st_mode
    with staged(tmp_path / "folder") as temporary:
        (temporary / "deep").mkdir(parents=True)
        save_file({"x": torch.ones(2)}, temporary / "deep" / "a.safetensors")
    save_tensors(tmp_path / "b.safetensors", {"x": torch.ones(2)})
    copy_folder(tmp_path / "folder", tmp_path / "copy")
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 4
    assert {file.stat().st_mode for file in files} == {mode}


def test_a_file_that_has_not_changed_is_read_once_a_process(tmp_path, monkeypatch):
    """One that was written a moment ago is read each time: a change within a tick of the file system's clock would not show."""
    file, read, file_digest = tmp_path / "a", [], digests.hashlib.file_digest
    monkeypatch.setattr(digests.hashlib, "file_digest", lambda *given: (read.append(1), file_digest(*given))[1])
    file.write_bytes(b"a" * 10)
    fresh = [digests.sha256(file) for _ in range(2)]
    assert len(read) == 2
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    assert fresh == [digests.sha256(file) for _ in range(2)]
    assert len(read) == 3
    time.sleep(0.02)
    file.write_bytes(b"b" * 10)
    assert digests.sha256(file) == digests.sha256(file) != fresh[0]
    assert len(read) == 4
