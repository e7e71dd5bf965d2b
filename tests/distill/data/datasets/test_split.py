"""Splits that share no identity, and test lists that are the same everywhere."""

import argparse
import hashlib
import random
from collections import defaultdict
from dataclasses import replace

import pytest

from distill.data.datasets import split
from distill.data.datasets.manifest import Clip, Manifest, Refused
from distill.data.datasets.split import ClipList, Window, assign, livetalk_list, omniavatar_list, place, select
from teachers.errors import UserError
from tests.distill.data.datasets import test_hdtf
from tests.support.media.films import put_film

HALVES = {"train": 0.5, "test": 0.5}


def people(num: int, clips: int = 3, seconds: float = 12.0, **changes) -> list[Clip]:
    """`clips` clips of each of `num` people."""
    fields = {"dataset": "hdtf", "end": seconds} | changes
    return [
        Clip(**({"id": f"P{person}_{k}", "source": f"P{person}.mp4", "identity": f"P{person}"} | fields))
        for person in range(num)
        for k in range(clips)
    ]


def sides(manifest: Manifest) -> dict[str, str]:
    return {clip.id: clip.split for clip in manifest.clips}


def test_an_identity_is_placed_by_sha256_alone():
    digest = hashlib.sha256(b"salt\nAmyKlobuchar").hexdigest()
    assert place("AmyKlobuchar", "salt") == pytest.approx(int(digest[:12], 16) / 16**12, abs=1e-12)
    assert place("AmyKlobuchar", "salt") == 0.46876845689429925
    places = [place(f"person {k}") for k in range(2000)]
    assert all(0 <= value < 1 for value in places)
    assert sum(value < 0.3 for value in places) == pytest.approx(600, abs=60)


@pytest.mark.parametrize("fractions", [{"train": 0.9, "test": 0.1}, {"train": 0.5, "validation": 0.2, "test": 0.3}])
def test_no_identity_is_on_two_sides_and_the_shares_are_kept(fractions):
    made = assign(Manifest(tuple(people(1000))), fractions)
    found = defaultdict(set)
    for clip in made.clips:
        found[clip.identity].add(clip.split)
    assert all(len(names) == 1 for names in found.values())
    for name, share in fractions.items():
        assert sum(names == {name} for names in found.values()) / 1000 == pytest.approx(share, abs=0.04)
    assert len(made.clips) == 3000
    assert made.refused == ()


def test_order_other_clips_and_a_growing_test_split_move_nobody():
    clips = people(200)
    before = sides(assign(Manifest(tuple(clips)), {"train": 0.8, "test": 0.2}))
    shuffled = random.Random(0).sample(clips, 300)
    after = sides(assign(Manifest(tuple(shuffled)), {"train": 0.8, "test": 0.2}))
    assert all(before[key] == name for key, name in after.items())
    more = sides(assign(Manifest(tuple(clips)), {"train": 0.6, "test": 0.4}))
    assert {key for key, name in before.items() if name == "test"} < {
        key for key, name in more.items() if name == "test"
    }
    assert before != sides(assign(Manifest(tuple(clips)), {"train": 0.8, "test": 0.2}, salt="other"))


@pytest.mark.parametrize("name", ["train", "test"])
def test_a_whole_and_an_empty_share(name):
    fractions = {"train": 0.0, "test": 0.0} | {name: 1.0}
    assert set(sides(assign(Manifest(tuple(people(300))), fractions)).values()) == {name}


def test_without_an_identity_the_source_counts():
    clips = [replace(clip, identity="") for clip in people(50)]
    named = sides(assign(Manifest(tuple(replace(clip, identity=clip.source) for clip in clips)), HALVES))
    assert sides(assign(Manifest(tuple(clips)), HALVES)) == named


def test_an_official_split_stands_and_nobody_is_on_both_sides_of_it():
    official = {0: "train", 1: "test"}
    clips = [replace(clip, split=official.get(k // 3, "")) for k, clip in enumerate(people(6))]
    clips[0] = replace(clips[0], split="")  # of P0: goes where the others of P0 are
    clips[4] = replace(clips[4], split="train")  # of P1: on both sides
    made = assign(Manifest(tuple(clips), (Refused("old", "", "why"),)), {"train": 0.01, "test": 0.99})
    assert [sides(made)[f"P0_{k}"] for k in range(3)] == ["train"] * 3
    assert [sides(made)[f"P1_{k}"] for k in (0, 2)] == ["test"] * 2
    assert [row.id for row in made.refused] == ["old", "P1_1"]
    assert "officially in 'train', but identity P1 is in 'test' too" in made.refused[1].reason
    assert len(made.clips) + len(made.refused) == len(clips) + 1
    with pytest.raises(UserError, match="officially in 'test', which has no fraction"):
        assign(Manifest(tuple(clips)), {"train": 1.0})


@pytest.mark.parametrize("fractions", [{}, {"train": 0.9}, {"a": 1.5, "b": -0.5}, {"": 1.0}, {"a": float("nan")}])
def test_shares_that_are_none(fractions):
    with pytest.raises(UserError, match="fractions must"):
        assign(Manifest(tuple(people(1))), fractions)


def test_a_hundred_windows_of_five_seconds_from_the_test_side():
    made = assign(Manifest(tuple(people(100, seconds=23.0, start=3.0))), HALVES)
    chosen = livetalk_list(made, "hdtf")
    assert (len(chosen.windows), len(set(chosen.windows)), chosen.seconds, chosen.name) == (
        100,
        100,
        5.0,
        "livetalk_hdtf",
    )
    assert {window.offset for window in chosen.windows} == {0.0, 5.0, 10.0, 15.0}
    assert {sides(made)[window.id] for window in chosen.windows} == {"test"}
    clips = select(made, chosen).clips
    assert {(round(clip.end - clip.start, 9), clip.split) for clip in clips} == {(5.0, "test")}
    assert all(clip.start >= 3.0 and clip.end <= 23.0 for clip in clips)
    again = Manifest(tuple(random.Random(1).sample(made.clips, len(made.clips))))
    assert livetalk_list(again, "hdtf") == chosen
    assert livetalk_list(made, "hdtf", num=7).windows == chosen.windows[:7]
    assert set(livetalk_list(made, "hdtf", salt="other").windows) != set(chosen.windows)
    with pytest.raises(UserError, match="100000 windows of 5 s are needed"):
        livetalk_list(made, "hdtf", num=100000)
    with pytest.raises(UserError, match="avspeech test has 0"):
        livetalk_list(made, "avspeech")


def test_clips_shorter_than_a_window_are_not_drawn_and_exact_ones_are():
    clips = [
        *people(3, seconds=4.99, split="test"),
        Clip(id="exact", dataset="hdtf", source="e", end=8.2, start=3.2, split="test"),
    ]
    assert livetalk_list(Manifest(tuple(clips)), "hdtf", num=1).windows == (Window(id="exact"),)


def test_a_clip_without_an_end_is_measured(tmp_path):
    put_film(tmp_path / "v.mp4", frames=260)
    manifest = Manifest((Clip(id="a", dataset="folder", source="v.mp4", split="test"),))
    chosen = livetalk_list(manifest, "folder", num=2, videos=tmp_path)
    assert {window.offset for window in chosen.windows} == {0.0, 5.0}
    assert [(clip.start, clip.end) for clip in select(manifest, replace(chosen, seconds=15.0)).clips] == [
        (window.offset, window.offset + 15.0) for window in chosen.windows
    ]
    with pytest.raises(UserError, match="clip a has no end"):
        livetalk_list(manifest, "folder", num=2)


def test_the_first_fifteen_seconds_of_every_hdtf_clip():
    clips = [*people(2, seconds=40.0, start=10.0), Clip(id="short", dataset="hdtf", source="s", end=9.0)]
    manifest = Manifest((*clips, Clip(id="other", dataset="avspeech", source="o", end=9.0)))
    chosen = omniavatar_list(manifest)
    assert (len(chosen.windows), chosen.seconds) == (7, 15.0)
    made = select(manifest, chosen)
    assert [(clip.id, clip.start, clip.end) for clip in made.clips[5:]] == [
        ("P1_2_at0ms", 10.0, 25.0),
        ("short_at0ms", 0.0, 9.0),
    ]


def test_what_a_list_names_and_the_manifest_lacks_is_refused():
    chosen = ClipList(
        name="l",
        dataset="hdtf",
        protocol="",
        seconds=5.0,
        salt="",
        windows=(Window(id="P0_0"), Window(id="gone"), Window(id="lost"), Window(id="P0_1", offset=50.0)),
    )
    made = select(Manifest(tuple(people(1)), (Refused("lost", "x.mp4", "video not found"),)), chosen)
    assert [clip.id for clip in made.clips] == ["P0_0_at0ms"]
    assert [row.id for row in made.refused] == ["gone_at0ms", "lost_at0ms", "P0_1_at50000ms"]
    assert "no clip gone of hdtf" in made.refused[0].reason
    assert made.refused[1].reason == "video not found"


def test_a_list_comes_back_and_is_a_line_for_each_window(tmp_path):
    chosen = ClipList(
        name="l",
        dataset="hdtf",
        protocol="how: 'so'",
        seconds=5.0,
        salt="s",
        windows=(Window(id="1e5"), Window(id="-x", offset=12.5)),
    )
    chosen.save(tmp_path / "l.yaml")
    assert ClipList.load(tmp_path / "l.yaml") == chosen
    assert "- {id: -x, offset: 12.5}" in (tmp_path / "l.yaml").read_text().splitlines()
    for text, words in (("a: [", "not YAML"), ("{}", "missing"), ("nam: x", "name"), ("- 3", "l.yaml")):
        (tmp_path / "l.yaml").write_text(text)
        with pytest.raises(UserError, match=words):
            ClipList.load(tmp_path / "l.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        ClipList.load(tmp_path / "none.yaml")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make the folder"):
        chosen.save(tmp_path / "file" / "l.yaml")
    with pytest.raises(UserError, match="no safe file name"):
        replace(chosen, name="../../l")


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    split.add_arguments(parser)
    return split.run(parser.parse_args([str(word) for word in words]))


def test_the_command_splits_writes_lists_and_selects(tmp_path, capsys):
    annotations = test_hdtf.put_published(tmp_path / "a")
    out, lists = tmp_path / "split.parquet", tmp_path / "lists"
    assert (
        command(annotations, "--dataset", "hdtf", "--out", out, "--fraction", "train=0.7", "test=0.3", "--lists", lists)
        == 0
    )
    made = Manifest.load(out)
    counts = {name: sum(clip.split == name for clip in made.clips) for name in ("train", "test")}
    assert len(made.clips) == 421
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{out}: {counts['test']} test, {counts['train']} train clips, 16 refused"
    assert said[1] == f"{lists}/livetalk_hdtf.yaml: 100 windows"
    assert said[2] == f"{lists}/omniavatar_hdtf.yaml: 421 windows"
    assert ClipList.load(lists / "livetalk_hdtf.yaml") == livetalk_list(made, "hdtf")
    assert command(out, "--select", lists / "livetalk_hdtf.yaml", "--out", tmp_path / "test.parquet") == 0
    assert len(Manifest.load(tmp_path / "test.parquet").clips) == 100
    assert command(out, "--out", tmp_path / "again.parquet", "--fraction", "train=0.1", "test=0.9") == 0
    assert Manifest.load(tmp_path / "again.parquet") == made


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--fraction", "train"], "shares are written as"),
        (["--fraction", "a=0.5", "a=0.5"], "named twice"),
        (["--select", "x", "--lists", "y"], "not both"),
        (["--lists", "y", "--fraction", "test=1"], "100 windows of 5 s are needed"),
        (["--fraction", "train=0.99", "test=0.01"], "split test has no clip: 9 clips of 3 identities, .*--salt"),
    ],
)
def test_a_mistake_writes_nothing(tmp_path, words, said):
    Manifest(tuple(people(3))).save(tmp_path / "m.parquet")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=said):
        command(tmp_path / "m.parquet", "--out", tmp_path / "o.parquet", *words)
    assert sorted(tmp_path.iterdir()) == before
