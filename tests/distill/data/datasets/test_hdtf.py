"""HDTF: its 15 annotation files, with every irregularity of the official ones, as a manifest.

Put the official files (github.com/MRzzm/HDTF, folder HDTF_dataset) anywhere and name their folder in AVATAR_DISTILL_HDTF: then
the counts are checked on them too. Without it they are checked on made files of the published sizes.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from distill.data.datasets.hdtf import GROUPS, _tables, identity_of, read
from teachers.errors import UserError
from tests.support.media.films import put_film


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Of one group: videos with an address, videos with clips, clips, clips with a crop, hours of all clips."""

    urls: int
    annotated: int
    clips: int
    crops: int
    hours: float


PUBLISHED = {
    "RD": Counts(urls=57, annotated=56, clips=66, crops=64, hours=1.20),
    "WDA": Counts(urls=183, annotated=183, clips=195, crops=189, hours=11.10),
    "WRA": Counts(urls=130, annotated=130, clips=175, crops=168, hours=4.77),
}
OFFICIAL = os.environ.get("AVATAR_DISTILL_HDTF")
WITHOUT_CROP = {
    "RD": ("Radio6_0", "Radio15_0"),
    "WDA": ("ByronDorgan0_0", "DeanPhillips_0", "JeffMerkley0_0", "JimMcGovern_0", "JimMcGovern1_0", "LindaSnchez_0"),
    "WRA": (
        *("BillCassidy_0", "CandiceMiller_0", "DuncanHunter_1", "JaimeHerreraBeutler_0", "KevinBrady0_0"),
        *("MittRomney_1", "RudyGiuliani_0"),
    ),
}
MINI = {
    "RD_video_url": b"Radio11 https://www.youtube.com/watch?v=AAAAAAAAAAA\nRadio6 https://x/watch?v=B&t=6s\nRadio24 https://x\n",
    "RD_resolution": b"Radio11.mp4 720\nRadio6.mp4 720\nRadio24.mp4 720\n",
    "RD_annotion_time": b"Radio11.mp4 00:30-01:00 01:30-02:30\nRadio6.mp4 00:00-00:20\n",
    "RD_crop_wh": b"Radio11_0.mp4 412 599 0 599\nRadio11_1.mp4 400 500 100 500\n",
    "RD_crop_ratio": b"Radio11_0.mp4 1.2\nRadio11_1.mp4 1.2\n",
    "WDA_video_url": b"\xef\xbb\xbfCarolynMaloney2 https://x/1\nAmyKlobuchar0 https://x/2\nAmyKlobuchar1 https://x/3",
    "WDA_resolution": b"CarolynMaloney2.mp4 1080\nAmyKlobuchar0.mp4 1080\nAmyKlobuchar1.mp4 360\n",
    "WDA_annotion_time": b"CarolynMaloney2.mp4 00:01-01:02\nAmyKlobuchar0.mp4 10:00-12:00\nAmyKlobuchar1.mp4 00:00-00:09",
    "WDA_crop_wh": b"CarolynMaloney2_0.mp4 1 300 2 300\nAmyKlobuchar0_0.mp4 0 1080 0 1080\nAmyKlobuchar1_0.mp4 4 240 0 240\n",
    "WDA_crop_ratio": b"",
    "WRA_video_url": b"KevinMcCarthy1 https://x/4\nReneeEllmers https://x/5",
    "WRA_resolution": b"KevinMcCarthy1.mp4 0\nReneeEllmers.mp4 714\n",
    "WRA_annotion_time": b"KevinMcCarthy1.mp4 00:00-01:00\nReneeEllmers.mp4 00:00-01:00 \n",
    "WRA_crop_wh": b"KevinMcCarthy1_0.mp4 0 300 0 300\nReneeEllmers_0.mp4 10 714 0 714\n",
    "WRA_crop_ratio": b"",
}
MINI_COUNTS = {
    "RD": Counts(urls=3, annotated=2, clips=3, crops=2, hours=0.03),
    "WDA": Counts(urls=3, annotated=3, clips=3, crops=3, hours=0.05),
    "WRA": Counts(urls=2, annotated=2, clips=2, crops=2, hours=0.03),
}


def count(annotations: Path) -> dict[str, Counts]:
    """What the annotation files hold, by group; of the official files these are `PUBLISHED`."""
    clips = read(annotations, full_frame=True).clips
    counts = {}
    for group in GROUPS:
        table = _tables(annotations, group)
        own = [clip for clip in clips if clip.id.startswith(f"{group}_")]
        keys = [f"{name}_{index}" for name, ranges in table.ranges.items() for index in range(len(ranges))]
        counts[group] = Counts(
            urls=len(table.urls),
            annotated=len(table.ranges),
            clips=len(own),
            crops=sum(key in table.crops for key in keys),
            hours=round(sum((clip.end or 0) - clip.start for clip in own) / 3600, 2),
        )
    return counts


def put_files(folder: Path, **changes: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (MINI | changes).items():
        (folder / f"{name}.txt").write_bytes(data)
    return folder


def put_published(folder: Path) -> Path:
    """Files of the published sizes: the published names where they are known, `Person_` with letters elsewhere."""
    folder.mkdir(parents=True)
    for group, published in PUBLISHED.items():
        pairs = [key.rpartition("_") for key in WITHOUT_CROP[group]]
        num_clips = {name: int(index) + 1 for name, _, index in pairs}
        while len(num_clips) < published.annotated:
            num_clips["Person" + "".join("abcdefghij"[int(d)] for d in f"{len(num_clips):03d}")] = 1
        for name in list(num_clips):
            num_clips[name] += 1 if sum(num_clips.values()) < published.clips else 0
        seconds, more = divmod(round(published.hours * 3600), published.clips)
        length = {name: seconds + more * (place == 0) // num_clips[name] for place, name in enumerate(num_clips)}
        unused = ["Radio24"] if group == "RD" else []
        keys = [f"{name}_{index}" for name, num in num_clips.items() for index in range(num)]
        texts = {
            "video_url": [f"{name} https://x" for name in [*num_clips, *unused]],
            "resolution": [f"{name}.mp4 720" for name in [*num_clips, *unused]],
            "annotion_time": [
                f"{name}.mp4" + f" 00:00-{length[name] // 60:02d}:{length[name] % 60:02d}" * num
                for name, num in num_clips.items()
            ],
            "crop_wh": [f"{key}.mp4 0 300 0 300" for key in keys if key not in WITHOUT_CROP[group]],
            "crop_ratio": [],
        }
        for name, lines in texts.items():
            (folder / f"{group}_{name}.txt").write_text("\n".join(lines), encoding="utf-8-sig")
    return folder


def reasons(manifest) -> dict[str, str]:
    return {row.id: row.reason for row in manifest.refused}


def test_mini_files_become_the_expected_clips(tmp_path):
    manifest = read(put_files(tmp_path))
    found = {clip.id: (clip.start, clip.end, clip.crop, clip.identity) for clip in manifest.clips}
    assert found == {
        "RD_Radio11_000": (30.0, 60.0, (412, 0, 599, 599), "Radio"),
        "RD_Radio11_001": (90.0, 150.0, (400, 100, 500, 500), "Radio"),
        "WDA_CarolynMaloney2_000": (1.0, 62.0, (1, 2, 300, 300), "CarolynMaloney"),
        "WDA_AmyKlobuchar0_000": (600.0, 720.0, (0, 0, 1080, 1080), "AmyKlobuchar"),
        "WDA_AmyKlobuchar1_000": (0.0, 9.0, (4, 0, 240, 240), "AmyKlobuchar"),
        "WRA_ReneeEllmers_000": (0.0, 60.0, (10, 0, 714, 714), "ReneeEllmers"),
    }
    assert all(clip.dataset == "hdtf" and "CC BY 4.0" in clip.licence and clip.split == "" for clip in manifest.clips)
    assert set(reasons(manifest)) == {"RD_Radio6_000", "RD_Radio24", "WRA_KevinMcCarthy1_000"}
    assert "no row in crop_wh" in reasons(manifest)["RD_Radio6_000"]
    assert "no clip" in reasons(manifest)["RD_Radio24"]
    assert "resolution is not known (listed: 0)" in reasons(manifest)["WRA_KevinMcCarthy1_000"]
    assert count(tmp_path) == MINI_COUNTS


def test_the_full_frame_needs_no_crop(tmp_path):
    manifest = read(put_files(tmp_path), full_frame=True)
    assert len(manifest.clips) == 8
    assert {clip.crop for clip in manifest.clips} == {None}
    assert set(reasons(manifest)) == {"RD_Radio24"}


def test_the_published_totals():
    """436 clips, 421 crops, 17.07 h; the 15 clips without a crop are those of the table."""
    totals = {
        name: sum(getattr(published, name) for published in PUBLISHED.values()) for name in ("clips", "crops", "urls")
    }
    assert totals == {"clips": 436, "crops": 421, "urls": 370}
    assert sum(published.hours for published in PUBLISHED.values()) == pytest.approx(17.07)
    for group, published in PUBLISHED.items():
        assert published.clips - published.crops == len(WITHOUT_CROP[group])


def check_published(folder: Path) -> None:
    counts = count(folder)
    for group, published in PUBLISHED.items():
        assert counts[group] == published, group
    whole, cropped = read(folder, full_frame=True), read(folder)
    assert len(whole.clips) == 436
    assert set(reasons(whole)) == {"RD_Radio24"}
    without = {
        f"{group}_{name}_{int(index):03d}"
        for group, keys in WITHOUT_CROP.items()
        for name, _, index in (key.rpartition("_") for key in keys)
    }
    assert {key for key, reason in reasons(cropped).items() if "no row in crop_wh" in reason} == without
    assert {clip.id for clip in cropped.clips} | set(reasons(cropped)) - {"RD_Radio24"} == {
        clip.id for clip in whole.clips
    }


def test_counts_are_the_published_ones(tmp_path):
    check_published(put_published(tmp_path / "made"))
    if OFFICIAL:
        check_published(Path(OFFICIAL))


def test_one_clip_more_is_seen(tmp_path):
    folder = put_published(tmp_path / "made")
    with (folder / "WRA_annotion_time.txt").open("a") as file:
        file.write(" 00:00-00:01")
    with pytest.raises(AssertionError, match="WRA"):
        check_published(folder)


def test_a_crop_holds_at_its_resolution_only(tmp_path):
    annotations = put_files(
        tmp_path / "a",
        RD_resolution=b"Radio11.mp4 48\nRadio6.mp4 48\n",
        RD_crop_wh=b"Radio11_0.mp4 8 40 4 40\nRadio11_1.mp4 30 40 4 40\n",
        WRA_resolution=b"KevinMcCarthy1.mp4 96\nReneeEllmers.mp4 96\n",
        WRA_crop_wh=b"KevinMcCarthy1_0.mp4 40 80 8 80\nReneeEllmers_0.mp4 49 80 8 80\n",
    )
    videos = tmp_path / "v"
    for name in ("RD_Radio11.mp4", "deep/Radio6.mp4", "KevinMcCarthy1.webm", "ReneeEllmers.mkv"):
        put_film(videos / name, 64, 48)
    manifest, why = read(annotations, videos), reasons(read(annotations, videos))
    assert [(clip.id, clip.crop, clip.crop_size) for clip in manifest.clips] == [
        ("RD_Radio11_000", (8, 4, 40, 40), (64, 48))
    ]
    assert "outside the frame" in why["RD_Radio11_001"]
    assert "measured at 96 lines, the video has 48" in why["WRA_KevinMcCarthy1_000"]
    assert "video not found: WDA_AmyKlobuchar0 or AmyKlobuchar0" in why["WDA_AmyKlobuchar0_000"]
    scaled, why = read(annotations, videos, scale_crops=True), reasons(read(annotations, videos, scale_crops=True))
    found = {clip.id: (clip.source, clip.crop, clip.crop_size) for clip in scaled.clips}
    assert found["WRA_KevinMcCarthy1_000"] == ("KevinMcCarthy1.webm", (40, 8, 80, 80), (128, 96))
    assert "outside the frame" in why["WRA_ReneeEllmers_000"]
    assert {clip.source for clip in read(annotations, videos, full_frame=True).clips} == {
        *("RD_Radio11.mp4", "deep/Radio6.mp4", "KevinMcCarthy1.webm", "ReneeEllmers.mkv")
    }


def test_an_unreadable_video_and_two_of_one_name_refuse_their_clips(tmp_path):
    videos = tmp_path / "v"
    put_film(videos / "RD_Radio11.mp4").write_bytes(b"no film")
    put_film(videos / "ReneeEllmers.mp4")
    put_film(videos / "b" / "ReneeEllmers.mkv")
    why = reasons(read(put_files(tmp_path / "a"), videos))
    assert "video file cannot be read" in why["RD_Radio11_000"]
    assert "several videos of one name: ReneeEllmers.mp4, b/ReneeEllmers.mkv" in why["WRA_ReneeEllmers_000"]


def test_a_name_in_two_groups_needs_the_group_in_front(tmp_path):
    annotations = put_files(
        tmp_path / "a",
        WRA_annotion_time=b"AmyKlobuchar0.mp4 00:00-00:05\n",
        WRA_resolution=b"AmyKlobuchar0.mp4 1080\n",
        WRA_video_url=b"",
        WRA_crop_wh=b"",
    )
    put_film(tmp_path / "v" / "AmyKlobuchar0.mp4")
    put_film(tmp_path / "v" / "WRA_AmyKlobuchar0.mp4")
    manifest = read(annotations, tmp_path / "v", full_frame=True)
    assert [(clip.id, clip.source) for clip in manifest.clips] == [("WRA_AmyKlobuchar0_000", "WRA_AmyKlobuchar0.mp4")]


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        (
            {
                "RD_annotion_time": b"../x.mp4 0:0-0:9\n",
                "RD_resolution": b"../x 720\n",
                "RD_crop_wh": b"../x_0 0 9 0 9\n",
            },
            "RD_../x_000",
            "no safe file name",
        ),
        ({"RD_annotion_time": b"Radio6.mp4 00:10-00:10\n"}, "RD_Radio6_000", "end must lie after"),
        ({"RD_annotion_time": b"Radio6.mp4 0:1:00\n"}, "RD_Radio6_000", "time is not"),
        ({"RD_annotion_time": b"Radio6.mp4 00:10-99999999999999:10\n"}, "RD_Radio6_000", "time is not"),
        ({"RD_annotion_time": b"Radio6\xff.mp4 00:10-00:20\n"}, "RD_annotion_time.txt:1", "not UTF-8"),
        ({"RD_annotion_time": b"Radio6.mp4 00:10-00:20\nRadio6.mp4 00:30-00:40\n"}, "Radio6", "again"),
        ({"RD_crop_wh": b"Radio6_0.mp4 0 0 0 0\n"}, "RD_Radio6_000", "1 pixel or more"),
        ({"RD_crop_wh": b"Radio6_0.mp4 0 300 500 300\n"}, "RD_Radio6_000", "outside the frame"),
        ({"RD_crop_wh": b"Radio6_0.mp4 -4 300 0 300\n"}, "RD_Radio6_000", "x width y height"),
        ({"RD_crop_wh": b"Radio6_0.mp4 300 0 300\n"}, "RD_Radio6_000", "x width y height"),
        ({"RD_crop_wh": b"Radio6_0.mp4 0 300 0 " + b"9" * 5000 + b"\n"}, "RD_Radio6_000", "x width y height"),
        ({"RD_crop_wh": b"Radio6_7.mp4 0 300 0 300\n"}, "RD_Radio6_7", "no clip in annotion_time"),
        ({"RD_resolution": b""}, "RD_Radio6_000", "resolution is not known (listed: nothing)"),
        ({"RD_resolution": b"Radio6.mp4 720p\n"}, "RD_Radio6_000", "resolution is not known (listed: 720p)"),
    ],
)
def test_a_bad_line_is_refused_alone(tmp_path, changes, key, words):
    base = {"RD_annotion_time": b"Radio6.mp4 00:10-00:20\n", "RD_crop_wh": b"Radio6_0.mp4 0 300 0 300\n"}
    manifest = read(put_files(tmp_path, **(base | changes)))
    assert words in reasons(manifest)[key]
    assert sum(clip.id.startswith(("WDA", "WRA")) for clip in manifest.clips) == 4


def test_a_missing_file_and_a_missing_folder_are_named(tmp_path):
    annotations = put_files(tmp_path / "a")
    with pytest.raises(UserError, match="folder of videos not found"):
        read(annotations, tmp_path / "none")
    (annotations / "WDA_crop_wh.txt").unlink()
    with pytest.raises(UserError, match=r"cannot be read.*WDA_crop_wh\.txt"):
        read(annotations)


def test_identities():
    assert [identity_of(name) for name in ("AmyKlobuchar0", "AmyKlobuchar12", "Mary2Lou", "007")] == [
        *("AmyKlobuchar", "AmyKlobuchar", "Mary2Lou", "007")
    ]
    assert tuple(PUBLISHED) == GROUPS
