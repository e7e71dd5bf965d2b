import argparse
import json
import tarfile
from fractions import Fraction

import pytest

from distill.data.datasets import folder
from distill.data.prepare import check as checking
from distill.data.prepare import shards
from distill.data.prepare.check import INCOMPLETE, check, check_sample, summary
from distill.data.prepare.cutting import CutConfig
from distill.data.prepare.prepare import prepare
from teachers.errors import UserError
from tests.support.media.films import counting_film


@pytest.fixture
def data(tmp_path):
    """Three clips in two shards, and a refused one."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for name, fps in (("a", 25), ("b", 30), ("c", 25)):
        counting_film(videos / f"{name}.mov", 0.8, fps)
    (videos / "d.mp4").write_text("no film")
    config = CutConfig(fps=Fraction(16), size=(32, 40), min_seconds=0.5)
    prepare(folder.read(None, videos), videos, tmp_path / "out", "folder", config, shard_clips=2)
    return tmp_path / "out"


def test_whole_data_are_counted(data):
    checked = check(data)
    assert checked.problems == []
    totals = summary(checked)
    assert (totals["clips"], totals["refused"], totals["identities"]) == (3, 1, 3)
    assert totals["source_fps"] == {"25": 2, "30": 1}
    assert totals["sizes"] == {"32x40": 3}
    assert totals["source_sizes"] == {"64x80": 3}
    assert totals["clip_seconds"] == {"least": 0.75, "median": 0.75, "most": 0.75}
    assert totals["hours"] == round(3 * 0.75 / 3600, 4)


def problems(data, decode=True) -> str:
    return "\n".join(check(data, decode=decode).problems)


def test_a_changed_byte_a_missing_and_a_foreign_file_are_found(data):
    path = data / "folder-000000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    assert "folder-000000.tar: differs from its checksum" in problems(data, decode=False)
    path.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in problems(data)
    path.unlink()
    assert "folder-000000.tar: missing" in problems(data)
    path.write_bytes(whole)
    assert problems(data) == ""
    (data / "more.tar").write_bytes(b"")
    assert problems(data) == "more.tar: not in SHA256SUMS"
    (data / "more.tar").unlink()
    (data / "manifest.parquet").write_bytes(b"")
    assert "manifest.parquet: differs from its checksum" in problems(data)


def test_a_shard_that_lacks_a_sample_is_found_though_its_checksum_fits(data):
    path = data / "folder-000000.tar"
    with tarfile.open(path) as tar:
        second = next(info.offset for info in tar if info.name.startswith("b."))
    path.write_bytes(path.read_bytes()[:second] + shards.END)
    sums = shards.read_checksums(data)
    shards.write_checksums(data, {**sums, path.name: shards.sha256(path)})
    assert problems(data, decode=False) == "folder-000000.tar: b: missing"


def members_of(data) -> dict[str, bytes]:
    return next(shards.samples(data / "folder-000000.tar"))[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"frames": 11}, "do not fill"),
        ({"frames": 24, "samples": 24000}, "video is"),
        ({"size": [40, 32]}, "video is"),
        ({"fps": "25", "samples": 7680}, "video is"),
        ({"samples": 12001}, "do not fill"),
        ({"fps": "0"}, "cannot be read"),
        ({"size": 5}, "cannot be read"),
        ({"sample_rate": None}, "members"),
    ],
)
def test_facts_that_differ_from_the_film_are_found(data, change, words):
    members = members_of(data)
    metadata = json.loads(members["json"])
    assert check_sample(members)[0] == []
    found = check_sample({**members, "json": json.dumps({**metadata, **change}).encode()})[0]
    assert any(words in problem for problem in found)


def test_a_film_or_sound_cut_short_is_found(data):
    members = members_of(data)
    for name in ("mp4", "flac"):
        for part in (0.4, 0.9):
            short = members[name][: int(part * len(members[name]))]
            assert check_sample({**members, name: short})[0], (name, part)
    assert "members" in check_sample({name: members[name] for name in ("mp4", "json")})[0][0]
    assert "cannot be read" in check_sample({"mp4": members["mp4"], "flac": members["flac"]})[0][0]


def test_the_command(data, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    checking.add_arguments(parser)
    words = [str(data), "--workers", "0", "--json", str(tmp_path / "report.json")]
    assert checking.run(parser.parse_args(words)) == 0
    assert json.loads((tmp_path / "report.json").read_text())["clips"] == 3
    assert "clips: 3\n" in capsys.readouterr().out
    (data / "folder-000001.json").unlink()
    assert checking.run(parser.parse_args(words)) == INCOMPLETE
    assert "folder-000001.json: missing" in capsys.readouterr().err
    with pytest.raises(UserError, match="SHA256SUMS is missing"):
        checking.run(parser.parse_args([str(tmp_path)]))
