"""AVSpeech: its headerless csv files as a manifest."""

import pytest

from distill.data.datasets.avspeech import cut_name, read
from teachers.errors import UserError
from tests.support.media.films import put_film

TRAIN = b"-abcdefghi0,90.000000,93.500000,0.5,0.25\r\nAbCdEfGhIj1,0,3.003,0,1\r\n"
TEST = b"_bcdefghij2,12.345678,17.345678,0.332812,0.180556"


def put_files(folder, train: bytes = TRAIN, test: bytes = TEST):
    folder.mkdir(exist_ok=True)
    (folder / "avspeech_train.csv").write_bytes(train)
    (folder / "avspeech_test.csv").write_bytes(test)
    return folder


def test_lines_become_the_expected_clips(tmp_path):
    manifest = read(put_files(tmp_path))
    assert manifest.refused == ()
    assert [(c.id, c.source, c.start, c.end, c.split, c.identity) for c in manifest.clips] == [
        ("-abcdefghi0_090_000000-093_500000", "-abcdefghi0.mp4", 90.0, 93.5, "train", "-abcdefghi0"),
        ("AbCdEfGhIj1_000_000000-003_003000", "AbCdEfGhIj1.mp4", 0.0, 3.003, "train", "AbCdEfGhIj1"),
        ("_bcdefghij2_012_345678-017_345678", "_bcdefghij2.mp4", 12.345678, 17.345678, "test", "_bcdefghij2"),
    ]
    assert {(c.dataset, c.crop) for c in manifest.clips} == {("avspeech", None)}
    assert cut_name("-abcdefghi0", 90, 93.5) == "-abcdefghi0_090.000000-093.500000"


def test_one_split_or_one_file(tmp_path):
    folder = put_files(tmp_path)
    assert {clip.split for clip in read(folder / "avspeech_test.csv").clips} == {"test"}
    assert len(read(folder / "avspeech_train.csv").clips) == 2
    (folder / "avspeech_train.csv").rename(folder / "mine.csv")
    with pytest.raises(UserError, match="neither train nor test"):
        read(folder / "mine.csv")
    assert len(read(folder).clips) == 1
    with pytest.raises(UserError, match=r"no avspeech_train\.csv or avspeech_test\.csv"):
        read(tmp_path / "nothing")


def test_whole_videos_come_first_and_a_cut_that_moved_is_refused(tmp_path):
    annotations = put_files(
        tmp_path / "a",
        b"-abcdefghi0,90,90.4,0.5,0.5\n-abcdefghi0,95,95.4,0.5,0.5\n-abcdefghi0,99,99.4,0.5,0.5\nAbCdEfGhIj1,1,1.4,0,1\n",
        b"",
    )
    videos = tmp_path / "v"
    put_film(videos / "AbCdEfGhIj1.webm", frames=50)
    put_film(videos / f"{cut_name('AbCdEfGhIj1', 1, 1.4)}.mp4", frames=10)
    put_film(videos / "x" / f"{cut_name('-abcdefghi0', 90, 90.4)}.mp4", frames=10)
    put_film(videos / f"{cut_name('-abcdefghi0', 95, 95.4)}.mp4", frames=45)
    manifest = read(annotations, videos)
    assert [(clip.source, clip.start, clip.end) for clip in manifest.clips] == [
        ("x/-abcdefghi0_090.000000-090.400000.mp4", 0.0, pytest.approx(0.4)),
        ("AbCdEfGhIj1.webm", 1.0, 1.4),
    ]
    assert "cut is 1.80 s long, the segment 0.40 s" in manifest.refused[0].reason
    assert "video not found" in manifest.refused[1].reason


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"#NAME?,1,4,0.5,0.5", "no YouTube id"),
        (b"../../etc/pw,1,4,0.5,0.5", "no YouTube id"),
        (b"AbCdEfGhIj1,1,4,0.5", "5 values are needed, got 4"),
        (b"AbCdEfGhIj1,1,4,0.5,0.5,0.5", "5 values are needed, got 6"),
        (b"AbCdEfGhIj1,one,4,0.5,0.5", "could not convert"),
        (b"AbCdEfGhIj1,4,1,0.5,0.5", "end must lie after"),
        (b"AbCdEfGhIj1,-1,4,0.5,0.5", "start must be"),
        (b"AbCdEfGhIj1,1,4,1.5,0.5", "face centre"),
        (b"AbCdEfGhIj1,1,4,nan,0.5", "face centre"),
        (b"AbCdEfGhIj\xff,1,4,0.5,0.5", "not UTF-8"),
        (b"_bcdefghij2,12.345678,17.345678,0.3,0.1", "duplicate id"),
    ],
)
def test_a_bad_line_is_refused_alone(tmp_path, line, words):
    manifest = read(put_files(tmp_path, TRAIN, TEST + b"\n" + line + b"\nlastlastla3,1,4,0.5,0.5\n"))
    assert [clip.identity for clip in manifest.clips] == ["-abcdefghi0", "AbCdEfGhIj1", "_bcdefghij2", "lastlastla3"]
    assert len(manifest.refused) == 1
    assert words in manifest.refused[0].reason
