"""Any folder of clips: what is found, what metadata may say, and what is refused."""

import json
import os
from pathlib import Path

import pytest

from distill.data.datasets.folder import Videos, read, safe_id
from distill.data.datasets.manifest import SAFE_ID
from teachers.errors import UserError
from teachers.media.film import probe
from tests.support.media.films import put_film


def put_clips(folder: Path, *names: str) -> Path:
    """Files of these names whose content is never read."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"not looked at")
    return folder


def reasons(manifest) -> dict[str, str]:
    return {row.id: row.reason for row in manifest.refused}


def test_every_video_is_a_clip_and_one_of_another_format_is_named(tmp_path):
    put_clips(tmp_path, "b.mp4", "a.MOV", "in/c.mkv", "d.webm", "e.avi", "notes.pdf", ".hidden.mp4", ".git/f.mp4")
    for name, head in (
        ("film.mxf", ""),
        ("film", "\x1aE\xdf\xa3"),
        ("take.MPV9", "0000ftypisom"),
        ("voice.m4a", "0000ftypM4A "),
    ):
        (tmp_path / name).write_bytes(head.encode("latin-1"))
    (tmp_path / "b.txt").write_text("\ufeffA woman speaks.\n", encoding="utf-8")
    manifest = read(None, tmp_path)
    assert manifest == read(tmp_path) == read(tmp_path, tmp_path)
    assert [(c.id, c.source, c.text, c.identity) for c in manifest.clips] == [
        ("a", "a.MOV", "", "a.MOV"),
        ("b", "b.mp4", "A woman speaks.", "b.mp4"),
        ("d", "d.webm", "", "d.webm"),
        ("in__c", "in/c.mkv", "", "in/c.mkv"),
    ]
    assert {(c.dataset, c.start, c.end, c.crop) for c in manifest.clips} == {("folder", 0.0, None, None)}
    message = "not one of .mp4, .mov, .mkv, .webm; convert it, ffmpeg -i IN OUT.mp4"
    assert reasons(manifest) == dict.fromkeys(("e.avi", "film.mxf", "film", "take.MPV9"), message)


def test_names_that_are_no_ids_get_safe_ones(tmp_path):
    put_clips(tmp_path, "a b.mp4", "a-b.mp4", "видео.mp4", "v1.2.mp4", "-dash.mp4", "x" * 240 + ".mp4", "in/a..b.mp4")
    manifest = read(tmp_path)
    assert manifest.refused == ()
    ids = {clip.source: clip.id for clip in manifest.clips}
    assert ids["a-b.mp4"] == "a-b"
    assert ids["v1.2.mp4"] == "v1_2"
    assert ids["a b.mp4"].startswith("a-b-")
    assert len(set(ids.values())) == 7
    assert all(SAFE_ID.fullmatch(key) and "." not in key for key in ids.values())
    assert safe_id("видео.mp4") == ids["видео.mp4"] != safe_id("звук.mp4")


def test_one_name_twice_is_refused_once(tmp_path):
    manifest = read(put_clips(tmp_path, "a.mp4", "a.webm", "in__c.mp4", "in/c.mp4"))
    assert [clip.source for clip in manifest.clips] == ["a.mp4", "in/c.mp4"]
    assert {row.source: row.reason for row in manifest.refused} == {
        "a.webm": "duplicate id, first used for a.mp4",
        "in__c.mp4": "duplicate id, first used for in/c.mp4",
    }


def test_names_and_texts_in_another_encoding_are_refused(tmp_path):
    put_clips(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.mp4")).write_bytes(b"x")
    manifest = read(tmp_path)
    assert [clip.id for clip in manifest.clips] == ["b"]
    assert "save it as UTF-8" in reasons(manifest)["a"]
    assert any("source is not UTF-8" in row.reason for row in manifest.refused)


def test_links_pipes_and_unreadable_folders_are_refused(tmp_path, monkeypatch):
    put_clips(tmp_path / "v", "a.mp4", "shut/b.mp4")
    (tmp_path / "v" / "link").symlink_to(tmp_path)
    (tmp_path / "v" / "gone.mp4").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "v" / "pipe.mp4")
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    manifest = read(tmp_path / "v")
    assert [clip.id for clip in manifest.clips] == ["a"]
    assert reasons(manifest) == {
        "link": "a link to a folder is not followed",
        "gone.mp4": "not a regular file",
        "pipe.mp4": "not a regular file",
        "shut": "folder cannot be read: Permission denied",
    }
    with pytest.raises(UserError, match="cannot be read"):
        Videos(tmp_path / "v" / "shut")
    for path in (tmp_path / "none", tmp_path / "v" / "a.mp4"):
        with pytest.raises(UserError, match="folder of videos"):
            Videos(path)
    with pytest.raises(UserError, match="neither"):
        read(None, None)
    with pytest.raises(UserError, match="annotations not found"):
        read(tmp_path / "none", tmp_path / "v")


ROWS = [
    {"file_name": "a.mp4", "end": 2.5, "text": "first", "identity": "Ann", "split": "test"},
    {"file_name": "a.mp4", "start": 2.5, "crop": [1, 2, 30, 40], "crop_size": [64, 48]},
    {"file_name": "in/b.mp4", "id": "mine", "licence": "CC0", "start": 1, "text": None},
    {"file_name": "c.mp4", "crop": [0, 0, 48, 48]},
]
CSV = """\ufefffile_name,id,start,end,crop,crop_size,text,licence,split,identity
a.mp4,,,2.5,,,first,,test,Ann
a.mp4,,2.5,,1 2 30 40,64 48,,,,
in/b.mp4,mine,1,,,,,CC0,,
c.mp4,,,,0 0 48 48,,,,,
"""


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.json", "metadata.jsonl", "apart/mine.jsonl"])
def test_metadata_of_any_form_say_the_same(tmp_path, name):
    folder = put_clips(tmp_path / "v", "a.mp4", "in/b.mp4", "left_out.mp4")
    put_film(folder / "c.mp4", 64, 48)
    (folder / "a.txt").write_text("beside")
    path = folder / name if "/" not in name else tmp_path / name
    path.parent.mkdir(exist_ok=True)
    text = {"csv": CSV, "json": json.dumps(ROWS), "jsonl": "\n\n".join(map(json.dumps, ROWS))}[path.suffix[1:]]
    path.write_text(text, encoding="utf-8")
    manifest = read(path if "/" in name else None, folder)
    found = [
        (c.id, c.start, c.end, c.crop, c.crop_size, c.text, c.licence, c.split, c.identity) for c in manifest.clips
    ]
    assert found == [
        ("a_000", 0.0, 2.5, None, None, "first", "", "test", "Ann"),
        ("a_001", 2.5, None, (1, 2, 30, 40), (64, 48), "beside", "", "", "a.mp4"),
        ("mine", 1.0, None, None, None, "", "CC0", "", "in/b.mp4"),
        ("c", 0.0, None, (0, 0, 48, 48), (64, 48), "", "", "", "c.mp4"),
    ]
    assert reasons(manifest) == {"left_out.mp4": f"no row in {path.name}"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"file_name": "../../etc/passwd"}, "not there"),
        ({"file_name": "none.mp4"}, "not there"),
        ({"file_name": "b.mp4", "id": "../../x"}, "no safe file name"),
        ({"file_name": "b.mp4", "id": 7}, "no safe file name"),
        ({"file_name": "b.mp4", "id": "a"}, "duplicate id"),
        ({"file_name": "b.mp4", "start": "soon"}, "cannot be read"),
        ({"file_name": "b.mp4", "end": -1}, "end must lie after"),
        ({"file_name": "b.mp4", "crop": [0, 0, 0, 0]}, "1 pixel or more"),
        ({"file_name": "b.mp4", "crop": [60, 0, 10, 10]}, "outside the frame"),
        ({"file_name": "b.mp4", "crop": [0, 0, 10, 10], "crop_size": [9, 9]}, "outside the frame"),
        ({"file_name": "b.mp4", "crop": "0 0 x 9"}, "cannot be read"),
        ({"file_name": "b.mp4", "crop": 5}, "cannot be read"),
        ({"file_name": "broken.mp4", "crop": [0, 0, 9, 9]}, "video file cannot be read"),
        ({"file_name": "b.mp4", "text": ["x"]}, "must be text"),
        ({"text": "no name"}, "must have a file_name"),
        ({"file_name": 3}, "must have a file_name"),
        ([1], "must have a file_name"),
    ],
)
def test_a_bad_row_is_refused_alone(tmp_path, row, words):
    put_film(tmp_path / "b.mp4", 64, 48, frames=1)
    put_clips(tmp_path, "a.mp4", "broken.mp4", "last.mp4")
    rows = [{"file_name": "a.mp4"}, row, {"file_name": "last.mp4"}]
    (tmp_path / "metadata.json").write_text(json.dumps(rows))
    manifest = read(tmp_path)
    assert [clip.id for clip in manifest.clips] == ["a", "last"]
    assert [words in found for found in reasons(manifest).values() if not found.startswith("no row")] == [True]


def test_a_line_in_another_encoding_or_no_json_is_refused_alone(tmp_path):
    put_clips(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "metadata.jsonl").write_bytes(
        b'{"file_name": "a.mp4"}\n{"file_name\n{"text": "\xff"}\n{"file_name": "b.mp4"}'
    )
    manifest = read(tmp_path)
    assert [clip.id for clip in manifest.clips] == ["a", "b"]
    assert [
        words in reason for words, reason in zip(("file_name", "UTF-8"), reasons(manifest).values(), strict=True)
    ] == [True] * 2
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\na.mp4,caf\xe9\nb.mp4,fine")
    manifest = read(tmp_path)
    assert [(clip.id, clip.text) for clip in manifest.clips] == [("b", "fine")]
    assert "line 2 is not UTF-8" in reasons(manifest)["metadata.csv:2"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("metadata.json", "{}", "list of rows"),
        ("metadata.json", "[", "cannot be read"),
        ("metadata.csv", "file_name,txet\na.mp4,x", r"unknown column 'txet': metadata\.csv:2; did you mean 'text'"),
        ("metadata.csv", "file_name,text\n\na.mp4,x\na.mp4,x,y", r"unknown column.*metadata\.csv:4"),
        ("metadata.csv", 'file_name,text\na.mp4,"x', "not a csv"),
    ],
)
def test_metadata_that_are_wrong_as_a_whole(tmp_path, name, text, words):
    (put_clips(tmp_path, "a.mp4") / name).write_text(text)
    with pytest.raises(UserError, match=words):
        read(tmp_path)


def test_two_metadata_files_are_one_too_many(tmp_path):
    put_clips(tmp_path, "a.mp4", "metadata.csv", "metadata.jsonl")
    with pytest.raises(UserError, match=r"several metadata files: metadata\.csv, metadata\.jsonl"):
        read(tmp_path)


@pytest.mark.parametrize(("turned", "size"), [(0, (64, 48)), (90, (48, 64)), (180, (64, 48)), (-90, (48, 64))])
def test_the_size_is_that_of_the_upright_picture(tmp_path, turned, size):
    assert probe(put_film(tmp_path / "a.mp4", 64, 48, frames=10, turned=turned)) == (size, 0.4)


def test_what_is_no_film_cannot_be_probed(tmp_path):
    film = put_film(tmp_path / "a.mp4")
    (tmp_path / "cut.mp4").write_bytes(film.read_bytes()[:100])
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {film}\n")
    for name in ("cut.mp4", "empty.mp4", "list.mp4", "none.mp4"):
        with pytest.raises(UserError, match=f"video file .*{name}; "):
            probe(tmp_path / name)
