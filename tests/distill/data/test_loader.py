"""Clips out of shards: rows to frames and sound, batches by workers, and damage by name."""

import gc
import json
from fractions import Fraction

import pytest
import torch

from distill.data.loader import Windows, read_sample
from distill.data.prepare import shards
from distill.data.prepare.cutting import encode_flac
from teachers.errors import UserError
from tests.support.media.films import number_of, numbered, write_film

FPS, FRAMES, PER_FRAME = Fraction(25, 2), 5, 1280
SIZE = (64, 80)


def sound_of(number: int, frames: int) -> torch.Tensor:
    """A ramp that says which sample and which moment it is."""
    return (torch.arange(frames * PER_FRAME) % 30011 + 40 * number).float() / 32768


def film_members(tmp, number: int, frames: int, with_sound: bool = True) -> dict:
    """A film whose pictures are numbered from 40 * number on, with key frames before every fourth."""
    path = write_film(tmp / "film.mp4", [numbered(40 * number + k) for k in range(frames)], FPS, g="4")
    facts = {"id": f"film_{number}", "text": f"number {number}", "fps": str(FPS), "frames": frames, "size": list(SIZE)}
    facts["samples"] = frames * PER_FRAME if with_sound else 0
    sound = {"flac": encode_flac(sound_of(number, frames))} if with_sound else {}
    return {"mp4": path.read_bytes(), "json": json.dumps(facts).encode(), **sound}


def write_shards(folder, groups):
    """Shards a-000000.tar ... of these groups of members, with the index that `prepare` writes."""
    folder.mkdir()
    sums = {}
    for number, group in enumerate(groups):
        fragments, rows = [], []
        for members in group:
            facts = json.loads(members["json"])
            key = facts["id"]
            fragments.append(folder / f"{key}.part")
            num_bytes = shards.write_fragment(fragments[-1], key, members)
            rows.append({"key": key, "bytes": num_bytes, "sound": "flac" in members, **facts})
        name = f"a-{number:06d}.tar"
        offsets, sums[name] = shards.join(fragments, folder / name)
        for fragment in fragments:
            fragment.unlink()
        rows = [{**row, "offset": offset} for row, offset in zip(rows, offsets, strict=True)]
        (folder / f"a-{number:06d}.json").write_text(json.dumps({"samples": rows}))
    shards.write_checksums(folder, sums)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eleven films of 20 and 23 frames in two shards."""
    tmp = tmp_path_factory.mktemp("shards")
    films = [film_members(tmp, n, 20 + 3 * (n % 2)) for n in range(11)]
    return write_shards(tmp / "data", [films[:6], films[6:]])


@pytest.fixture(scope="module")
def windows(data):
    return Windows(shards.read_indices(data), FRAMES, FPS)


def test_a_row_is_its_frames_and_the_sound_under_them(windows):
    seen = []
    for row in range(len(windows)):
        sample = windows[row]
        number = int(sample.facts["id"].removeprefix("film_"))
        assert sample.text == f"number {number}"
        assert sample.video.shape == (3, FRAMES, *SIZE)
        shown = [number_of(frame) for frame in sample.video.permute(1, 2, 3, 0).numpy()]
        assert shown == [40 * number + sample.first + k for k in range(FRAMES)]
        whole = sound_of(number, 23)
        assert torch.equal(sample.audio, whole[sample.first * PER_FRAME :][: FRAMES * PER_FRAME])
        seen.append((number, sample.first))
    assert seen == [(n, first) for n in range(11) for first in (0, 5, 10, 15)]


def test_a_film_without_sound_is_read_whole(tmp_path):
    folder = write_shards(tmp_path / "silent", [[film_members(tmp_path, 15, 7, with_sound=False)]])
    (stored,) = shards.read_indices(folder)
    sample = read_sample(stored, 0, stored.frames)
    assert (sample.video.shape, sample.fps, sample.audio) == ((3, 7, *SIZE), FPS, None)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_their_rows_whoever_decodes_them(windows, workers):
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(2)).split(5)
    found = list(windows.batches((rows.tolist() for rows in order), workers))
    assert [samples.ids for samples in found] == [[windows[row].facts["id"] for row in rows] for rows in order]
    for rows, samples in zip(order, found, strict=True):
        alone = windows.batch(rows.tolist())
        assert torch.equal(samples.video, alone.video)
        assert torch.equal(samples.audio, alone.audio)
        assert samples.text == alone.text


def test_nothing_decoded_is_kept_and_the_global_generator_stays(windows):
    torch.manual_seed(1)
    before, others = torch.random.get_rng_state(), frames_alive()
    for workers in (0, 1):
        assert len(list(windows.batches([[row] for row in range(6)], workers))) == 6
    assert torch.equal(torch.random.get_rng_state(), before)
    assert frames_alive() <= others


def frames_alive() -> set[int]:
    """Which decoded frames are held, by this test or another before it."""
    gc.collect()
    return {id(x) for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.dtype == torch.uint8 and x.ndim >= 4}


@pytest.fixture
def damaged(data, tmp_path):
    """A copy of the data in which shard 1 can be spoiled."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in data.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder, folder / "a-000001.tar"


def flipped(content: bytes, at: int) -> bytes:
    """Eight bytes of it with every bit turned."""
    return content[:at] + bytes(255 - byte for byte in content[at : at + 8]) + content[at + 8 :]


def read_second_shard(folder, workers: int) -> None:
    windows = Windows(shards.read_index(folder / "a-000001.tar"), FRAMES, FPS)
    list(windows.batches([[row] for row in range(len(windows))], workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_is_named_in_one_line(damaged, workers):
    folder, shard = damaged
    content = shard.read_bytes()
    for spoiled, words in (
        (content[: len(content) // 2], "shard is damaged"),
        (b"\1" * 512 + content[512:], "shard is damaged"),
        (content[512:], "shard is damaged"),
        (content.replace(b"moov", b"none"), "video cannot be decoded"),
        (flipped(content, content.index(b"fLaC") + 12000), "sound cannot be decoded"),
    ):
        shard.write_bytes(spoiled)
        with pytest.raises(UserError, match=rf"^[^\n]*{words}[^\n]*sample film_\d+[^\n]*$") as caught:
            read_second_shard(folder, workers)
        assert str(shard) in str(caught.value)
        assert "Traceback" not in str(caught.value)
        with pytest.raises(UserError, match=f"differs from its checksum: {shard}"):
            shards.verify(folder)
    shard.unlink()
    with pytest.raises(UserError, match=f"shard not found: {shard}"):
        read_second_shard(folder, workers)
    shards.verify(folder, rank=0, world_size=2)  # the share of rank 0 is whole
    with pytest.raises(UserError, match="differs from its checksum"):
        shards.verify(folder, rank=1, world_size=2)


def test_a_sample_at_another_place_is_not_taken_for_the_one_asked_for(damaged):
    """The index of a shard that was made anew with other samples."""
    folder, _ = damaged
    path = folder / "a-000000.json"
    rows = json.loads(path.read_text())
    rows["samples"][0]["key"], rows["samples"][1]["key"] = rows["samples"][1]["key"], rows["samples"][0]["key"]
    path.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"shard is damaged \(sample film_1 is not at byte 0\)"):
        Windows(shards.read_indices(folder), FRAMES, FPS)[0]


def test_what_cannot_be_loaded_is_said_in_one_line(data, windows, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no prepared data"):
        shards.read_indices(tmp_path / "empty")
    with pytest.raises(UserError, match=r"film_0 .*has 25/2 frames a second, 25 are asked for"):
        Windows(shards.read_indices(data), FRAMES, Fraction(25))[0]
    members = film_members(tmp_path, 1, 7)
    del members["flac"]
    torn = write_shards(tmp_path / "torn", [[{**members, "json": b'{"id": "a", "frames": 7, "size": [64, 80]}'}]])
    with pytest.raises(UserError, match="metadata cannot be read"):
        Windows(shards.read_indices(torn), FRAMES, FPS)[0]
    for content in ('{"samples": [{"key": "a"}]}', '{"samples": 5}', "{"):
        (torn / "a-000000.json").write_text(content)
        with pytest.raises(UserError, match=r"^index of a shard cannot be read [^\n]*$"):
            shards.read_indices(torn)
    (torn / "a-000000.json").unlink()
    with pytest.raises(UserError, match=r"index of a shard cannot be read .*No such file"):
        shards.read_indices(torn)
