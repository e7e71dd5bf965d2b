"""CelebV-HQ: its json file as a manifest, and the authors' crop."""

import copy
import json

import pytest

from distill.data.datasets.celebvhq import read, square_crop
from teachers.errors import UserError
from tests.support.media.films import put_film

BOX = {"top": 0.0, "bottom": 0.8815, "left": 0.1964, "right": 0.6922}
CLIP = {
    "ytb_id": "M2Ohb0FAaJU",
    "duration": {"start_sec": 81.62, "end_sec": 86.17},
    "bbox": BOX,
    "attributes": {"appearance": [1, 0, 1], "action": [0, 1], "emotion": {"sep_flag": False, "labels": "neutral"}},
    "version": "v0.1",
}
LABELS = [{"emotion": name, "start_sec": start, "end_sec": start + 2} for start, name in ((0, "neutral"), (2, "happy"))]
INFO = {
    "meta_info": {"appearance_mapping": ["young", "bald", "wavy_hair"], "action_mapping": ["blow", "talk"]},
    "clips": {
        "M2Ohb0FAaJU_1": CLIP,
        "-x_y-zAaJU0_0": CLIP
        | {
            "ytb_id": "-x_y-zAaJU0",
            "attributes": CLIP["attributes"] | {"emotion": {"sep_flag": True, "labels": LABELS}},
        },
    },
}


def put_info(folder, clips=None):
    folder.mkdir(exist_ok=True)
    path = folder / "celebvhq_info.json"
    path.write_text(json.dumps(INFO if clips is None else INFO | {"clips": clips}))
    return path


def test_both_forms_of_emotion_become_the_expected_clips(tmp_path):
    manifest = read(put_info(tmp_path))
    assert manifest == read(tmp_path)
    assert manifest.refused == ()
    first, second = manifest.clips
    assert (first.id, first.source, first.start, first.end) == ("M2Ohb0FAaJU_1", "M2Ohb0FAaJU.mp4", 81.62, 86.17)
    assert (first.dataset, first.identity, first.crop, first.split) == ("celebvhq", "M2Ohb0FAaJU", None, "")
    assert "non-commercial" in first.licence
    assert first.text == "young, wavy hair; talk; neutral"
    assert (second.source, second.text) == ("-x_y-zAaJU0.mp4", "young, wavy hair; talk; neutral then happy")


@pytest.mark.parametrize(
    ("box", "size", "crop"),
    [
        # out by 0.02, the top clamped at 0: rows 0..649 (0.9015 * 720), columns 226..912; half = 649 // 2, centre 324.5, 569
        ((0.0, 0.8815, 0.1964, 0.6922), (1280, 720), (245, 0, 648, 648)),
        # all sides move: rows 38..62, columns 28..72 of 100; side 24 about (50, 50)
        ((0.4, 0.6, 0.3, 0.7), (100, 100), (38, 38, 24, 24)),
        # clamped on all sides: the whole frame's middle square
        ((0.0, 1.0, 0.0, 1.0), (640, 360), (140, 0, 360, 360)),
        # an odd short side, rows 38..63, loses a row, and a centre of 50.5 means the square that starts half a pixel up
        ((0.4, 0.61, 0.3, 0.7), (100, 100), (38, 38, 24, 24)),
        ((0.4, 0.615, 0.1, 0.7), (100, 200), (15, 76, 50, 50)),
    ],
)
def test_the_crop_is_the_authors(box, size, crop):
    found = square_crop(dict(zip(("top", "bottom", "left", "right"), box, strict=True)), *size)
    assert found == crop


def test_the_crop_stays_in_the_frame_and_near_the_box():
    for k in range(50):
        box = {"top": k / 100, "bottom": k / 100 + 0.3, "left": 0.9 - k / 60, "right": 1 - k / 70}
        x, y, width, height = square_crop(box, 1279, 721)
        assert width == height
        assert min(x, y) >= 0
        assert x + width <= 1279
        assert y + height <= 721
        centre = (
            (max(box["left"] - 0.02, 0) + min(box["right"] + 0.02, 1)) / 2 * 1279,
            (box["top"] + box["bottom"]) / 2 * 721,
        )
        assert abs(x + width / 2 - centre[0]) < 2
        assert k < 3 or abs(y + height / 2 - centre[1]) < 2  # nearer the edge the clamp moves it


def test_whole_videos_cut_clips_and_cropped_clips(tmp_path):
    clips = {f"Video{k}_0": CLIP | {"ytb_id": f"Video{k}"} for k in range(4)}
    put_film(tmp_path / "v" / "Video0.mp4", 64, 48)
    put_film(tmp_path / "v" / "Video1_0.mp4", 64, 48)
    put_film(tmp_path / "v" / "Video2_0.mp4", 48, 48)
    manifest = read(put_info(tmp_path, clips), tmp_path / "v")
    crop = square_crop(BOX, 64, 48)
    assert [(c.source, c.start, c.end, c.crop, c.crop_size) for c in manifest.clips] == [
        ("Video0.mp4", 81.62, 86.17, crop, (64, 48)),
        ("Video1_0.mp4", 0.0, None, crop, (64, 48)),
        ("Video2_0.mp4", 0.0, None, None, None),
    ]
    assert [row.id for row in manifest.refused] == ["Video3_0"]
    assert "video not found: Video3 or Video3_0" in manifest.refused[0].reason


def changed(*path, value=None) -> dict:
    """CLIP with one entry replaced, or removed where no value is given."""
    clip = copy.deepcopy(CLIP)
    place = clip
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return clip


@pytest.mark.parametrize(
    ("key", "metadata", "words"),
    [
        ("../../etc/passwd", CLIP, "no safe file name"),
        ("a", CLIP | {"ytb_id": "../x"}, "video not found"),
        ("a", CLIP | {"ytb_id": 7}, "TypeError"),
        ("a", changed("bbox"), "KeyError 'bbox'"),
        ("a", changed("bbox", "left"), "KeyError 'left'"),
        ("a", changed("bbox", "left", value=0.9), "empty or outside"),
        ("a", changed("bbox", "right", value=1.5), "empty or outside"),
        ("a", changed("bbox", "top", value=-0.1), "empty or outside"),
        ("a", changed("bbox", "top", value=float("nan")), "empty or outside"),
        ("a", changed("bbox", "top", value="x"), "ValueError"),
        ("a", changed("bbox", value={"top": 0.5, "bottom": 0.5, "left": 0.5, "right": 0.5}), "empty or outside"),
        ("a", changed("duration", "end_sec", value=81.0), "end must lie after"),
        ("a", changed("duration", "start_sec", value=[1]), "TypeError"),
        ("a", changed("attributes", "action", value=[1]), "action has 1 values for 2 names"),
        ("a", changed("attributes", "emotion"), "KeyError 'emotion'"),
        ("a", changed("attributes", "emotion", "labels", value=3), "TypeError"),
        ("a", [], "TypeError"),
        ("a", None, "TypeError"),
    ],
)
def test_a_bad_clip_is_refused_alone(tmp_path, key, metadata, words):
    put_film(tmp_path / "v" / "M2Ohb0FAaJU.mp4", 640, 480, frames=1)
    manifest = read(put_info(tmp_path, {"first_1": CLIP, key: metadata, "last_1": CLIP}), tmp_path / "v")
    assert [clip.id for clip in manifest.clips] == ["first_1", "last_1"]
    assert [row.id for row in manifest.refused] == [key]
    assert words in manifest.refused[0].reason


def test_a_crop_of_no_pixels_is_refused(tmp_path):
    put_film(tmp_path / "v" / "M2Ohb0FAaJU.mp4", 16, 16, frames=1)
    box = {"top": 0.5, "bottom": 0.51, "left": 0.5, "right": 0.51}
    manifest = read(put_info(tmp_path, {"a": CLIP | {"bbox": box}}), tmp_path / "v")
    assert "1 pixel or more" in manifest.refused[0].reason


def test_a_key_in_the_file_twice_and_a_text_that_is_not_utf8(tmp_path):
    text = json.dumps(
        INFO | {"clips": {"a": CLIP, "b": CLIP, "c": changed("attributes", "emotion", "labels", value="sad")}}
    )
    path = tmp_path / "celebvhq_info.json"
    path.write_bytes(b"\xef\xbb\xbf" + text.replace('"b":', '"a":').encode().replace(b"sad", b"\xff\xfe"))
    manifest = read(path)
    assert [clip.id for clip in manifest.clips] == ["a"]
    assert {row.id: row.reason.partition(":")[0] for row in manifest.refused} == {
        "a": "a is in the file twice; the first is used",
        "c": "clip text is not UTF-8",
    }


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"clips": [], "meta_info": {}}', '{"clips": {}, "meta_info": {}}', "3"]
)
def test_another_file_is_refused_as_a_whole(tmp_path, text):
    (tmp_path / "celebvhq_info.json").write_text(text)
    with pytest.raises(UserError, match="not CelebV-HQ's"):
        read(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read.*celebvhq_info\.json"):
        read(tmp_path)
