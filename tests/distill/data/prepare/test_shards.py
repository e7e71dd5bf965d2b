import errno
import hashlib
import os
import subprocess
import tarfile

import pytest

from distill.data.prepare import shards
from teachers.errors import UserError


def fragments(folder, num=3):
    paths = []
    for number in range(num):
        path = folder / f"{number}.part"
        members = {"mp4": bytes([number]) * (700 * number), "json": b'{"n": %d}\n' % number, "flac": b"x" * 512}
        shards.write_fragment(path, f"clip_{number}", members)
        paths.append(path)
    return paths


def test_a_shard_is_a_tar_that_says_nothing_of_when_and_by_whom(tmp_path):
    offsets, digest = shards.join(fragments(tmp_path), tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as tar:
        infos = tar.getmembers()
    assert [info.name for info in infos[:3]] == ["clip_0.flac", "clip_0.json", "clip_0.mp4"]
    assert {(info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) for info in infos} == {
        (0, 0, 0, "", "", 0o644)
    }
    assert offsets == [info.offset for info in infos if info.name.endswith(".flac")]
    assert digest == hashlib.sha256((tmp_path / "a.tar").read_bytes()).hexdigest() == shards.sha256(tmp_path / "a.tar")
    assert sorted(os.listdir(tmp_path)) == ["0.part", "1.part", "2.part", "a.tar"]


def test_the_same_content_gives_the_same_bytes_on_another_day(tmp_path, monkeypatch):
    shards.join(fragments(tmp_path), tmp_path / "a.tar")
    monkeypatch.setattr("time.time", lambda: 1e9)
    monkeypatch.setattr("os.getpid", lambda: 77)
    shards.join(fragments(tmp_path), tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_samples_come_back_whole_and_in_order(tmp_path):
    shards.join(fragments(tmp_path), tmp_path / "a.tar")
    read = list(shards.samples(tmp_path / "a.tar"))
    assert [key for key, _ in read] == ["clip_0", "clip_1", "clip_2"]
    assert read[2][1] == {"mp4": b"\2" * 1400, "json": b'{"n": 2}\n', "flac": b"x" * 512}


def test_a_member_may_be_a_file_and_a_key_long(tmp_path):
    (tmp_path / "film").write_bytes(b"film" * 1000)
    key = "k" * 200
    size = shards.write_fragment(tmp_path / "part", key, {"mp4": tmp_path / "film"})
    assert size == (tmp_path / "part").stat().st_size
    shards.join([tmp_path / "part"], tmp_path / "a.tar")
    assert list(shards.samples(tmp_path / "a.tar")) == [(key, {"mp4": b"film" * 1000})]


def test_a_shard_without_samples_is_a_tar(tmp_path):
    assert shards.join([], tmp_path / "a.tar")[0] == []
    assert list(shards.samples(tmp_path / "a.tar")) == []


def test_keys_have_no_dot_and_stay_apart():
    ids = ["a.b", "a_b", "a-b", "ab", "-x_003.003000-008.000000"]
    keys = [shards.sample_key(name) for name in ids]
    assert len(set(keys)) == len(ids)
    assert all(shards.KEY.fullmatch(key) for key in keys)


@pytest.mark.parametrize("key", ["../a", "a/b", "a.b", "", "a\0"])
def test_a_key_is_never_a_path(tmp_path, key):
    with pytest.raises(ValueError):
        shards.write_fragment(tmp_path / "part", key, {"json": b""})
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def fsync(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    parts = fragments(tmp_path)
    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(UserError, match="the disk is full"):
        shards.join(parts, tmp_path / "a.tar")
    with pytest.raises(UserError, match="the disk is full"):
        shards.write_fragment(tmp_path / "part", "a", {"json": b"{}"})
    assert sorted(os.listdir(tmp_path)) == ["0.part", "1.part", "2.part"]


@pytest.mark.parametrize("part", [0.3, 0.6])
def test_a_damaged_shard_is_a_user_error(tmp_path, part):
    shards.join(fragments(tmp_path), tmp_path / "a.tar")
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: int(part * len(data))])
    with pytest.raises(UserError, match="damaged"):
        list(shards.samples(tmp_path / "a.tar"))
    with pytest.raises(UserError, match="not found"):
        list(shards.samples(tmp_path / "b.tar"))


def test_checksums_are_those_of_sha256sum(tmp_path):
    (tmp_path / "b.tar").write_bytes(b"b")
    (tmp_path / "a.tar").write_bytes(b"a")
    sums = {name: shards.sha256(tmp_path / name) for name in ("b.tar", "a.tar")}
    shards.write_checksums(tmp_path, sums)
    assert shards.read_checksums(tmp_path) == sums
    said = subprocess.check_output(["sha256sum", "--check", "SHA256SUMS"], cwd=tmp_path, text=True)
    assert said == "a.tar: OK\nb.tar: OK\n"


@pytest.mark.parametrize("line", ["abc  a.tar", f"{'0' * 64}  ../a.tar", f"{'0' * 64} a.tar"])
def test_a_damaged_list_of_checksums_is_a_user_error(tmp_path, line):
    (tmp_path / "SHA256SUMS").write_text(line + "\n")
    with pytest.raises(UserError, match="damaged"):
        shards.read_checksums(tmp_path)
