"""The manifest: what a clip may be, both files on disk, and lines of annotation files in any state."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.data.datasets.manifest import Clip, Manifest, Refused, clip_or_refusal, gather, read_lines, refused_path
from teachers.errors import UserError

FULL = Clip(
    id="WDA_A-b.0_000",
    dataset="hdtf",
    source="sub dir/ü.mp4",
    start=1.5,
    end=2.0,
    crop=(1, 2, 3, 4),
    crop_size=(64, 48),
    text='says: "ünï", then\nsmiles',
    licence="CC BY 4.0",
    split="test",
    identity="A-b",
)
PLAIN = Clip(id="-starts_with_a_dash", dataset="avspeech", source="x.mp4")


def a_clip(**changes) -> Clip:
    return Clip(**({"id": "a", "dataset": "folder", "source": "a.mp4"} | changes))


def test_a_manifest_comes_back_as_it_was_saved(tmp_path):
    manifest = Manifest((FULL, PLAIN), (Refused("../x", "y.mp4", "bad\nid"), Refused("", "", "")))
    path = tmp_path / "not=partitioned" / "manifest.parquet"
    manifest.save(path)
    assert Manifest.load(path) == manifest
    assert sorted(file.name for file in path.parent.iterdir()) == ["manifest.parquet", "manifest.refused.jsonl"]
    rows = [json.loads(line) for line in refused_path(path).read_text().splitlines()]
    assert rows[0] == {"id": "../x", "source": "y.mp4", "reason": "bad\nid"}
    assert pq.read_table(path).to_pylist()[0]["crop"] == [1, 2, 3, 4]


def test_an_empty_manifest_is_one(tmp_path):
    Manifest(()).save(tmp_path / "m.parquet")
    assert Manifest.load(tmp_path / "m.parquet") == Manifest((), ())


def test_the_same_manifest_is_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        Manifest((FULL, PLAIN)).save(tmp_path / f"{name}.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


@pytest.mark.parametrize(
    "value",
    [
        "",
        ".",
        "..",
        ".hidden",
        "a/b",
        "a\\b",
        "../../etc/passwd",
        "/etc",
        "a..b",
        "a b",
        "a\n",
        "a\0",
        "ü",
        "a:b",
        "x" * 201,
    ],
)
def test_an_unsafe_id_is_refused(value):
    with pytest.raises(UserError, match=r"^clip id is no safe file name"):
        a_clip(id=value)


@pytest.mark.parametrize("value", ["a", "-a", "_", "0", "A.b-c_9", "x" * 200])
def test_a_safe_id_is_taken(value):
    assert a_clip(id=value).id == value


@given(st.text(max_size=12))
def test_an_id_that_is_taken_names_a_file_of_its_own_folder(value):
    made = clip_or_refusal(id=value, dataset="folder", source="a.mp4")
    if isinstance(made, Clip):
        assert not set(made.id) & set("/\\:\0\n ")
        assert not made.id.startswith(".")


@pytest.mark.parametrize(
    "value", ["", "/a.mp4", "../a.mp4", "a/../../b.mp4", "a\\..\\b.mp4", "\\a", "C:\\a.mp4", "C:a.mp4", "a\0"]
)
def test_a_source_outside_the_folder_is_refused(value):
    with pytest.raises(UserError, match="inside the folder of videos"):
        a_clip(source=value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"start": -0.1}, "start"),
        ({"start": float("nan")}, "start"),
        ({"start": 1.0, "end": 1.0}, "end must lie after"),
        ({"end": float("inf")}, "end must lie after"),
        ({"crop": (0, 0, 0, 0)}, "1 pixel or more"),
        ({"crop": (0, 0, 10, -1)}, "1 pixel or more"),
        ({"crop": (1, 2, 3)}, "x, y, width, height"),
        ({"crop": (0.5, 0, 10, 10)}, "whole pixels"),
        ({"crop": (True, 0, 10, 10)}, "whole pixels"),
        ({"crop": (0, 0, 2**31, 10)}, "whole pixels"),
        ({"crop": (-1, 0, 10, 10)}, "outside the frame"),
        ({"crop": (55, 0, 10, 10), "crop_size": (64, 48)}, "outside the frame"),
        ({"crop": (0, 39, 10, 10), "crop_size": (64, 48)}, "outside the frame"),
        ({"crop_size": (0, 48)}, "crop_size"),
        ({"crop_size": (64,)}, "crop_size"),
        ({"text": "\udcff"}, "text is not UTF-8"),
        ({"source": "\udcff.mp4"}, "source is not UTF-8"),
        ({"identity": 7}, "identity must be text"),
    ],
)
def test_what_cannot_be_a_clip_is_refused_in_one_line(changes, words):
    with pytest.raises(UserError, match=words) as caught:
        a_clip(**changes)
    assert "\n" not in str(caught.value)
    assert isinstance(clip_or_refusal(**({"id": "a", "dataset": "folder", "source": "a.mp4"} | changes)), Refused)


def test_a_crop_may_touch_the_edge():
    assert a_clip(crop=(54, 38, 10, 10), crop_size=(64, 48)).crop == (54, 38, 10, 10)


def test_gather_keeps_the_first_of_two_and_loses_nothing():
    other = a_clip(id="a", source="other.mp4")
    manifest = gather([a_clip(), Refused("z", "z", "why"), other, a_clip(id="b"), a_clip()])
    assert [clip.source for clip in manifest.clips] == ["a.mp4", "a.mp4"]
    assert [row.source for row in manifest.refused] == ["z", "other.mp4", "a.mp4"]
    assert "duplicate id, first used for a.mp4" in manifest.refused[1].reason
    with pytest.raises(UserError, match="twice"):
        Manifest((a_clip(), other))


def test_a_refusal_can_always_be_printed_and_saved(tmp_path):
    row = Refused("\ud800", "b\udcff", "c")
    row.source.encode("utf-8")
    Manifest((), (row,)).save(tmp_path / "m.parquet")
    assert Manifest.load(tmp_path / "m.parquet").refused == (row,)


def test_a_damaged_manifest_is_refused(tmp_path):
    path = tmp_path / "m.parquet"
    Manifest((FULL,), (Refused("a", "b", "c"),)).save(path)
    whole, lines = path.read_bytes(), refused_path(path).read_text()

    def refusal(match):
        with pytest.raises(UserError, match=match) as caught:
            Manifest.load(path)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)

    for broken in (b"", whole[:-1], whole[: len(whole) // 2], b"PAR1 no parquet PAR1"):
        path.write_bytes(broken)
        refusal("damaged")
    path.write_bytes(whole)
    for broken in ("{", '{"id": "a"}\n', "3\n"):
        refused_path(path).write_text(broken)
        refusal("damaged")
    refused_path(path).unlink()
    refusal("cannot be read")
    refused_path(path).write_text(lines)
    pq.write_table(pq.read_table(path).drop_columns(["text"]), path)
    refusal("not a manifest")
    path.unlink()
    refusal("not found")


def test_an_unsafe_clip_in_a_manifest_from_elsewhere_is_refused(tmp_path):
    path = tmp_path / "m.parquet"
    Manifest((FULL, PLAIN)).save(path)
    table = pq.read_table(path)
    for ids, words in ((["../../x", "b"], "no safe file name"), (["same", "same"], "twice")):
        pq.write_table(table.set_column(0, table.schema.field("id"), pa.array(ids)), path)
        with pytest.raises(UserError, match=words):
            Manifest.load(path)


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "m.parquet"
    Manifest((PLAIN,)).save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(UserError, match="disk is full"):
        Manifest((FULL,)).save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        Manifest((FULL,)).save(tmp_path / "file" / "m.parquet")


def test_lines_lose_their_mark_and_a_bad_one_is_refused(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbfone 1 \r\n\r\ncaf\xe9\nz\xc3\xbc")
    refused = []
    assert list(read_lines(path, refused)) == [(1, "one 1"), (4, "zü")]
    (bad,) = refused
    assert (bad.id, "line 3 is not UTF-8" in bad.reason) == ("x.txt:3", True)


def test_lines_of_no_text_file(tmp_path):
    (tmp_path / "utf16.txt").write_text("one 1\n", encoding="utf-16")
    with pytest.raises(UserError, match="UTF-16"):
        list(read_lines(tmp_path / "utf16.txt", []))
    with pytest.raises(UserError, match="cannot be read"):
        list(read_lines(tmp_path / "none.txt", []))
