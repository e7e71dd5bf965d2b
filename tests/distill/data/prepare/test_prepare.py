import argparse
import errno
import fcntl
import gc
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import tarfile
import time
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from distill.cli import Parser
from distill.commands import data
from distill.data.datasets import folder
from distill.data.datasets.manifest import Clip, Manifest
from distill.data.prepare import cutting, shards
from distill.data.prepare.cutting import CutConfig
from distill.data.prepare.prepare import SOME_REFUSED, Task, make_sample, prepare
from teachers.errors import UserError
from tests.support.media.films import clicks, counting_film, frames_of, number_of, numbered, sound_of, turn, write_film

CONFIG = CutConfig(fps=Fraction(16), size=(32, 40), min_seconds=0.5)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Five good films and every bad one."""
    path = tmp_path_factory.mktemp("videos")
    for number, fps in enumerate((25, 30, 24)):
        counting_film(path / f"good_{number}.mov", 1.2, fps)
    film = [numbered(number) for number in range(30)]
    times = np.cumsum([0.0, *[0.02, 0.06, 0.04] * 9, 0.04, 0.04])
    write_film(path / "vfr.mkv", film, [Fraction(round(t * 1000), 1000) for t in times], clicks(1.2, 48000))
    write_film(path / "rotated.mp4", [np.rot90(p) for p in film], Fraction(25), clicks(1.2, 48000), 48000, "aac")
    turn(path / "rotated.mp4")
    write_film(path / "silent.mp4", film, Fraction(25))
    write_film(path / "single.mov", film[:1], Fraction(25), clicks(0.04, 48000))
    write_film(path / "two_shots.mov", [*film[:15], *(255 - p for p in film[15:])], Fraction(25), clicks(1.2, 48000))
    data = counting_film(path / "truncated.mov", 1.2).read_bytes()
    (path / "truncated.mov").write_bytes(data[: len(data) // 2])
    (path / "text.mp4").write_text("no film")
    (path / "empty.mp4").write_bytes(b"")
    return path


@pytest.fixture(scope="module")
def manifest(videos):
    """All films as clips, a crop outside, a stretch behind the end, and a missing source, with a good one last."""
    clips = folder.read(None, videos).clips
    more = (
        Clip(id="outside", dataset="folder", source="good_0.mov", crop=(60, 0, 40, 40)),
        Clip(id="behind", dataset="folder", source="good_0.mov", start=5.0, end=6.0),
        Clip(id="missing", dataset="folder", source="gone.mp4"),
        Clip(id="part.of-a.film", dataset="folder", source="good_1.mov", start=0.4, end=1.0, text="a man talks"),
    )
    return Manifest((*clips, *more))


@pytest.fixture(scope="module")
def reference(manifest, videos, tmp_path_factory):
    """The data prepared without interruption in one process, and the result."""
    out = tmp_path_factory.mktemp("reference") / "out"
    return out, prepare(manifest, videos, out, "folder", CONFIG, shard_clips=4)


def content(out) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}


def test_one_bad_clip_never_stops_the_rest(reference):
    _, done = reference
    reasons = {row.id: row.reason for row in done.refused}
    assert done.num_clips == 6
    assert done.num_shards == 4
    for name, words in {
        "silent": "no audio track",
        "single": "too short: 0 frames",
        "two_shots": "scene cut at 0.6",
        "truncated": "cannot be read",
        "text": "cannot be read",
        "empty": "is empty",
        "outside": "outside the frame",
        "behind": "no frame at 5.00 s",
        "missing": "not found",
    }.items():
        assert words in reasons.pop(name)
    assert reasons == {}


def test_what_is_written(reference, videos):
    out, _ = reference
    names = {f"folder-{number:06d}.{ending}" for number in range(4) for ending in ("tar", "json")}
    assert set(os.listdir(out)) == names | {"SHA256SUMS", "manifest.parquet", "manifest.refused.jsonl", "prepare.json"}
    manifest = Manifest.load(out / "manifest.parquet")
    ids = [row["id"] for n in range(4) for row in json.loads((out / f"folder-{n:06d}.json").read_text())["samples"]]
    assert ids == [clip.id for clip in manifest.clips]
    assert ids == ["good_0", "good_1", "good_2", "rotated", "vfr", "part.of-a.film"]
    assert len(manifest.refused) == 9
    assert shards.read_checksums(out).keys() == set(os.listdir(out)) - {"SHA256SUMS", "prepare.json"}


def test_a_sample_holds_frames_sound_and_facts(reference):
    out, _ = reference
    index = json.loads((out / "folder-000003.json").read_text())
    row = next(row for row in index["samples"] if row["id"] == "part.of-a.film")
    data = (out / "folder-000003.tar").read_bytes()[row["offset"] : row["offset"] + row["bytes"]]
    with tarfile.open(fileobj=io.BytesIO(data + shards.END)) as tar:
        members = {info.name: tar.extractfile(info).read() for info in tar}
    assert list(members) == [f"part+of-a+film.{ending}" for ending in ("flac", "json", "mp4")]
    metadata = json.loads(members["part+of-a+film.json"])
    assert (metadata["id"], metadata["text"], metadata["fps"], metadata["frames"]) == (
        "part.of-a.film",
        "a man talks",
        "16",
        9,
    )
    assert (metadata["annotated_start"], metadata["start"], metadata["source_fps"]) == (0.4, 0.4, "30")
    frames, sound = frames_of(members["part+of-a+film.mp4"]), sound_of(members["part+of-a+film.flac"])
    assert frames.shape == (9, 32, 40, 3)
    assert len(sound) == metadata["samples"] == 9000
    assert [number_of(frame) for frame in frames] == [12 + round(k * 30 / 16 - 0.01) for k in range(9)]
    assert [n for n in range(9000) if sound[n] > 0.2] == pytest.approx([3200, 7200], abs=1)


def test_a_second_run_touches_nothing_but_says_the_same(reference, manifest, videos):
    out, done = reference
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    ticks = []
    assert prepare(manifest, videos, out, "folder", CONFIG, shard_clips=4, tick=ticks.append) == done
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before
    assert len(ticks) == len(manifest.clips)


def killed(monkeypatch, moment: int, *arguments) -> None:
    """In a process of its own: prepare, ended as by SIGKILL at the rename number `moment`, half of them just before it."""
    rename, count = os.replace, 0

    def replace_and_die(source, target):
        nonlocal count
        count += 1
        if count == moment and moment % 2:
            os._exit(9)
        rename(source, target)
        if count == moment:
            os._exit(9)

    monkeypatch.setattr("os.replace", replace_and_die)
    prepare(*arguments, shard_clips=2)
    os._exit(0)


def in_a_fork(function, *arguments) -> int:
    gc.collect()  # codecs of other tests, whose threads the fork would not have and wait for
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def test_killed_at_any_rename_and_run_again_is_as_never_killed(reference, manifest, videos, tmp_path, monkeypatch):
    few = Manifest(tuple(clip for clip in manifest.clips if clip.id in ("good_0", "text", "vfr")))
    whole = tmp_path / "whole"
    prepare(few, videos, whole, "folder", CONFIG, shard_clips=2)
    out, moments = tmp_path / "out", 0
    for moment in range(1, 40):
        shutil.rmtree(out, ignore_errors=True)
        if in_a_fork(killed, monkeypatch, moment, few, videos, out, "folder", CONFIG) == 0:
            break
        moments += 1
        prepare(few, videos, out, "folder", CONFIG, shard_clips=2)
        assert content(out) == content(whole), f"killed at rename {moment}"
    assert moments == 1 + 2 + 3 + 4 + 3  # the request, fragments, records, shards with indices, manifest with checksums


def test_killed_at_random_and_run_again_is_as_never_killed(reference, manifest, videos, tmp_path):
    rng, out, kills = random.Random(0), tmp_path / "out", 0
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        arguments = (manifest, videos, out, "folder", CONFIG, 4)
        process = context.Process(target=prepare, args=arguments)
        process.start()
        # by what is written, not by time: a fast machine would be done before it is killed
        until = len(list(out.glob("*"))) + rng.randint(1, 3)
        while process.is_alive() and len(list(out.glob("*"))) < until:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))
        kills += process.is_alive()
        process.kill()
        process.join()
    prepare(manifest, videos, out, "folder", CONFIG, shard_clips=4)
    assert kills >= 2
    assert content(out) == content(reference[0])


def crash(task: Task):
    """As `make_sample`, but one clip kills its process each time."""
    if task.clip.id == "good_1":
        os.kill(os.getpid(), signal.SIGKILL)
    return make_sample(task)


def test_two_processes_and_a_crash_change_nothing_but_the_clip_that_crashes(
    reference, manifest, videos, tmp_path, monkeypatch
):
    few = Manifest(tuple(clip for clip in manifest.clips if clip.id in ("good_0", "good_1", "vfr", "rotated", "text")))
    with monkeypatch.context() as patch:
        patch.setattr("distill.data.prepare.prepare.make_sample", crash)
        done = prepare(few, videos, tmp_path / "crashed", "folder", CONFIG, shard_clips=1, workers=2)
    assert {row.id: row.reason for row in done.refused if row.id != "text"} == {"good_1": "its decoder crashed"}
    again = prepare(few, videos, tmp_path / "crashed", "folder", CONFIG, shard_clips=1, retry=True)
    assert [row.id for row in again.refused] == ["text"]
    prepare(few, videos, tmp_path / "whole", "folder", CONFIG, shard_clips=1)
    assert content(tmp_path / "crashed") == content(tmp_path / "whole")


def test_retry_takes_a_film_that_was_mended(videos, tmp_path):
    films, clips = tmp_path / "videos", [Clip(id=name, dataset="folder", source=f"{name}.mov") for name in ("a", "b")]
    films.mkdir()
    shutil.copy(videos / "good_0.mov", films / "a.mov")
    shutil.copy(videos / "truncated.mov", films / "b.mov")
    out = tmp_path / "out"
    assert len(prepare(Manifest(tuple(clips)), films, out, "folder", CONFIG).refused) == 1
    shutil.copy(videos / "good_1.mov", films / "b.mov")
    assert len(prepare(Manifest(tuple(clips)), films, out, "folder", CONFIG).refused) == 1
    assert len(prepare(Manifest(tuple(clips)), films, out, "folder", CONFIG, retry=True).refused) == 0
    prepare(Manifest(tuple(clips)), films, tmp_path / "fresh", "folder", CONFIG)
    assert content(out) == content(tmp_path / "fresh")


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["the film", "the fragment", "the shard"])
def test_a_full_disk_stops_the_run_which_then_goes_on(reference, manifest, videos, tmp_path, monkeypatch, where):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        if where == "the film":
            patch.setattr(cutting._Encoder, "write", full_disk)
        else:
            calls = []
            last = {"the fragment": 2, "the shard": 9}[where]
            patch.setattr("os.fsync", lambda _: calls.append(0) or (full_disk() if len(calls) >= last else None))
        with pytest.raises(UserError, match="the disk is full"):
            prepare(manifest, videos, out, "folder", CONFIG, shard_clips=4)
    assert not [name for name in content(out) if name.endswith((".tmp", ".mp4"))]
    prepare(manifest, videos, out, "folder", CONFIG, shard_clips=4)
    assert content(out) == content(reference[0])


def test_a_disk_that_fails_stops_the_run_which_then_goes_on(reference, manifest, videos, tmp_path, monkeypatch):
    """Refused, every clip that it holds would be missing in the data, and nobody would know."""
    out, cut, calls = tmp_path / "out", cutting.cut, []

    def failing(*given):
        calls.append(0)
        if len(calls) > 2:
            raise OSError(errno.ESTALE, "Stale file handle")
        return cut(*given)

    with monkeypatch.context() as patch:
        patch.setattr(cutting, "cut", failing)
        with pytest.raises(UserError, match=r"stopped at .*Stale file handle\); run the same command again"):
            prepare(manifest, videos, out, "folder", CONFIG, shard_clips=4)
    prepare(manifest, videos, out, "folder", CONFIG, shard_clips=4)
    assert content(out) == content(reference[0])


def test_another_request_or_another_folder_is_refused(reference, manifest, videos, tmp_path):
    with pytest.raises(UserError, match=r"another request \(fps differ\)"):
        prepare(manifest, videos, reference[0], "folder", replace(CONFIG, fps=Fraction(25)), shard_clips=4)
    with pytest.raises(UserError, match=r"another request \(clips differ\)"):
        prepare(Manifest(manifest.clips[1:]), videos, reference[0], "folder", CONFIG, shard_clips=4)
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(UserError, match="contains something else"):
        prepare(manifest, videos, tmp_path, "folder", CONFIG)
    assert os.listdir(tmp_path) == ["precious"]


def test_only_one_prepares_at_a_time(manifest, videos, tmp_path):
    held = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="in use: "):
        prepare(manifest, videos, tmp_path, "folder", CONFIG)
    os.close(held)


def run(*words: str) -> int:
    parser = Parser()
    data.add_arguments(parser)
    arguments = parser.parse_args(list(map(str, words)))
    assert isinstance(arguments, argparse.Namespace)
    return data.run(arguments)


def test_the_command_says_what_was_refused_and_its_status_tells(videos, tmp_path, capsys):
    films = tmp_path / "videos"
    films.mkdir()
    shutil.copy(videos / "good_0.mov", films)
    words = ["prepare", "folder", "--videos", films, "--workers", 0]
    assert run(*words, "--out", tmp_path / "a", "--size", "32x40", "--fps", "25") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a'}: 1 clips, 1.2 s in 1 shards; 0 refused\n"
    assert run("check", tmp_path / "a", "--workers", 0, "--quick") == 0
    shutil.copy(videos / "truncated.mov", films)
    assert run(*words, "--out", tmp_path / "b", "--size", "32x40") == SOME_REFUSED
    printed = capsys.readouterr()
    assert "1 clips" in printed.out
    assert "1 refused (1 x video file cannot be read" in printed.out
    assert "refused truncated: video file cannot be read" in printed.err


def test_a_manifest_stands_for_annotations(videos, tmp_path):
    one = Clip(id="one", dataset="hdtf", source="good_0.mov", identity="x", split="test")
    Manifest((one,)).save(tmp_path / "test.parquet")
    words = ["--annotations", tmp_path / "test.parquet", "--videos", videos, "--workers", 0]
    assert run("prepare", "hdtf", *words, "--out", tmp_path / "out") == 0
    assert Manifest.load(tmp_path / "out" / "manifest.parquet").clips == (one,)
    assert (tmp_path / "out" / "hdtf-000000.tar").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["folder", "--size", "32"], "not a height and a width"),
        (["folder", "--fps", "x"], "not a number of frames"),
        (["folder", "--fps", "-2"], "fps must be above 0"),
        (["folder", "--shard-clips", "0"], "must be 1 or more"),
        (["hdtf"], "--annotations is missing"),
        (["folder", "--full-frame"], "--full-frame is for hdtf"),
        (["other"], "invalid choice"),
    ],
)
def test_a_users_mistake_is_one_line_and_writes_nothing(videos, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        run("prepare", *words, "--videos", videos, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="not found"):
        run("prepare", "folder", "--videos", tmp_path / "gone", "--out", tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="folder"):
        run("prepare", "folder", "--videos", tmp_path / "file", "--out", tmp_path / "out")
    with pytest.raises(UserError, match="cannot make the folder"):
        prepare(Manifest(()), tmp_path, tmp_path / "file" / "out", "folder", CONFIG)
