"""The loader: rows to samples, an order that is a function of (seed, position), positions that come back, and damage by name."""

import gc
import io
import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from distill.data.loader import Bucket, Index, Loader, Windows, turn
from distill.data.order import batch_rows
from distill.data.prepare import shards
from distill.data.prepare.cutting import encode_flac
from teachers.errors import UserError
from tests.support.films import number_of, numbered, write_film

FPS, FRAMES, PER_FRAME = Fraction(25, 2), 5, 1280
SMALL, LARGE = (64, 80), (128, 160)


def sound_of(number: int, frames: int) -> torch.Tensor:
    """A ramp that says which sample and which moment it is."""
    return (torch.arange(frames * PER_FRAME) % 30011 + 40 * number).float() / 32768


def film_members(tmp, number: int, frames: int, size=SMALL, with_sound: bool = True) -> dict:
    """A film whose pictures are numbered from 40 * number on, with key frames before every fourth."""
    pictures = [numbered(40 * number + k) for k in range(frames)]
    if size == LARGE:
        pictures = [picture.repeat(2, axis=0).repeat(2, axis=1) for picture in pictures]
    path = write_film(tmp / "film.mp4", pictures, FPS, g="4")
    facts = {"id": f"film_{number}", "text": f"number {number}", "fps": str(FPS), "frames": frames, "size": list(size)}
    facts["samples"] = frames * PER_FRAME if with_sound else 0
    sound = {"flac": encode_flac(sound_of(number, frames))} if with_sound else {}
    return {"mp4": path.read_bytes(), "json": json.dumps(facts).encode(), **sound}


def write_shards(folder, groups, indexed=()):
    """Shards a-000000.tar ... of these groups of (key, members); those in `indexed` get the index that `prepare` writes."""
    folder.mkdir()
    sums = {}
    for number, group in enumerate(groups):
        fragments, rows = [], []
        for key, members in group:
            fragments.append(folder / f"{key}.part")
            rows.append({"key": key, "bytes": shards.write_fragment(fragments[-1], key, members)})
        name = f"a-{number:06d}.tar"
        offsets, sums[name] = shards.join(fragments, folder / name)
        for fragment in fragments:
            fragment.unlink()
        if number in indexed:
            for row, offset, (_, members) in zip(rows, offsets, group, strict=True):
                facts = json.loads(members["json"])
                row |= {"offset": offset, "frames": facts["frames"], "size": facts["size"], "sound": "flac" in members}
            (folder / f"a-{number:06d}.json").write_text(json.dumps({"samples": rows}))
    shards.write_checksums(folder, sums)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eleven films of 20 and 23 frames, four large ones, one without sound, three pictures, two sounds; in four shards."""
    tmp = tmp_path_factory.mktemp("shards")
    films = [(f"film_{n}", film_members(tmp, n, 20 + 3 * (n % 2))) for n in range(11)]
    large = [(f"large_{n}", film_members(tmp, n, 12, LARGE)) for n in range(11, 15)]
    silent = [("silent", film_members(tmp, 15, 7, with_sound=False))]
    other = []
    for number in range(3):
        content = io.BytesIO()
        Image.fromarray(np.full((24, 32, 3), 80 * number, np.uint8)).save(content, "png")
        other.append((f"picture_{number}", {"png": content.getvalue(), "txt": f"picture {number}".encode()}))
    for number in (20, 21):
        other.append((f"sound_{number}", {"flac": encode_flac(sound_of(number, 11)), "txt": b"someone talks"}))
    return write_shards(tmp / "data", [films[:6], films[6:], [*large, *silent], other], indexed=(0, 2))


@pytest.fixture(scope="module")
def index(data):
    return Index.read(data, FPS)


@pytest.fixture(scope="module")
def windows(index):
    return Windows(index, FRAMES, FPS)


@pytest.fixture(scope="module")
def small(index):
    """The eleven films of one size alone: 11 * 4 clips."""
    wanted = index.buckets.index(Bucket(("video", "audio"), *SMALL))
    return Windows(index, FRAMES, FPS, np.flatnonzero(index.bucket == wanted).tolist())


def test_a_row_is_its_frames_and_the_sound_under_them(windows):
    seen = set()
    for row in range(len(windows)):
        sample, bucket = windows[row], windows.bucket(row)
        if "video" not in bucket.parts:
            continue
        number = int(sample.facts["id"].removeprefix("film_"))
        assert sample.text == f"number {number}"
        assert sample.video.shape == (3, FRAMES, bucket.height, bucket.width)
        shown = [number_of(frame) for frame in sample.video.permute(1, 2, 3, 0).numpy()]
        assert shown == [40 * number + sample.first + k for k in range(FRAMES)]
        if bucket.parts == ("video", "audio"):
            whole = sound_of(number, 23)
            assert torch.equal(sample.audio, whole[sample.first * PER_FRAME :][: FRAMES * PER_FRAME])
        seen.add((number, sample.first))
    assert seen == {(n, first) for n in range(11) for first in (0, 5, 10, 15)} | {
        *((n, first) for n in range(11, 15) for first in (0, 5)),
        (15, 0),
    }


def test_an_index_and_a_list_of_members_say_the_same(data, index, tmp_path):
    for file in data.iterdir():
        if file.suffix != ".json":
            (tmp_path / file.name).symlink_to(file)
    listed = Index.read(tmp_path, FPS)
    for name in ("shard", "offset", "num_bytes", "frames", "keys"):
        assert (getattr(listed, name) == getattr(index, name)).all(), name
    assert [listed.buckets[n] for n in listed.bucket] == [index.buckets[n] for n in index.bucket]


def test_samples_without_film_are_what_they_are(windows):
    found = {windows.bucket(row).parts: windows.batch(torch.tensor([row])) for row in range(len(windows))}
    assert set(found) == {("video", "audio"), ("video",), ("image",), ("audio",)}
    picture, sound, film = found[("image",)], found[("audio",)], found[("video",)]
    assert (picture.video, picture.audio, picture.text) == (None, None, ["picture 2"])
    assert picture.image.shape == (1, 3, 24, 32)
    assert int(picture.image[0, 0, 0, 0]) == 160
    assert (sound.video, sound.image, sound.text) == (None, None, ["someone talks"])
    assert torch.equal(sound.audio[0], sound_of(21, 11)[5 * PER_FRAME : 10 * PER_FRAME])
    assert (film.audio, film.image) == (None, None)


def stream(windows, batch: int, world: int, num: int, seed: int = 3) -> list[list[int]]:
    """The first `num` batches of all ranks, by arithmetic."""
    loaders = [Loader(windows, batch, seed, rank, world) for rank in range(world)]
    return [loaders[n % world].rows(n // world).tolist() for n in range(num)]


@pytest.mark.parametrize(("world", "batch"), [(1, 4), (2, 3), (3, 5), (5, 7)])
def test_every_row_once_an_epoch_whatever_does_not_divide(small, world, batch):
    size = len(small)
    rows = [row for rows in stream(small, batch, world, 3 * size // batch + 1) for row in rows]
    epochs = [rows[start : start + size] for start in (0, size, 2 * size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert rows == [row for part in stream(small, batch, 1, 3 * size // batch + 1) for row in part], (
        "ranks only share it"
    )
    assert rows != [row for part in stream(small, batch, world, 3 * size // batch + 1, seed=4) for row in part]


def test_one_bucket_is_the_order_of_training(small):
    loader = Loader(small, 6, 9, rank=1, world_size=2)
    for position in (0, 1, 17):
        assert torch.equal(loader.rows(position), batch_rows(len(small), 6, position, 9, 1, 2))


def test_two_ranks_of_two_workers_read_every_sample_once_an_epoch(small):
    loaders = [Loader(small, 4, 0, rank, 2, workers=2) for rank in (0, 1)]
    parts = [loader.take(11) for loader in loaders]  # 2 * 11 * 4 rows are two epochs of 44
    found = [samples for pair in zip(*parts, strict=True) for samples in pair]
    seen = [(name, row) for samples in found for name, row in zip(samples.ids, samples.rows.tolist(), strict=True)]
    assert len(set(seen[:44])) == len(set(seen[44:])) == 44
    assert set(seen[:44]) == set(seen[44:]) == {(small[row].facts["id"], row) for row in range(44)}
    assert seen[:44] != seen[44:]
    alone = [row for samples in Loader(small, 4, 0).take(22) for row in samples.rows.tolist()]
    assert alone == [row for _, row in seen]


def test_a_batch_never_mixes_buckets_and_each_bucket_has_its_share(windows):
    batches = stream(windows, 2, 2, 400)
    assert all(len({windows.bucket(row) for row in rows}) == 1 for rows in batches)
    for members in windows.members():
        own = [row for rows in batches for row in rows if row in set(members.tolist())]
        assert abs(len(own) / 800 - len(members) / len(windows)) < 0.01
        for start in range(0, len(own) - len(members), len(members)):
            assert sorted(own[start : start + len(members)]) == members.tolist()


def test_turns_are_in_proportion_and_none_is_left_out():
    sizes, next_of = (7, 1, 3, 40), [0, 0, 0, 0]
    for number in range(500):
        bucket, own = turn(sizes, number)
        assert own == next_of[bucket]
        next_of[bucket] += 1
        assert all(abs(next_of[b] - (number + 1) * size / 51) < 3 for b, size in enumerate(sizes))


@pytest.mark.parametrize(("workers", "then"), [(0, 2), (2, 0), (2, 1)])
def test_a_restored_loader_goes_on_with_the_next_sample(windows, workers, then):
    loader = Loader(windows, 3, 5, rank=1, world_size=2, workers=workers)
    whole = Loader(windows, 3, 5, rank=1, world_size=2).take(9)
    for samples, expected in zip(loader, whole[:4], strict=False):
        assert torch.equal(samples.rows, expected.rows)
        if loader.position == 4:
            break
    state = json.loads(json.dumps(loader.state_dict()))  # workers have read ahead
    again = Loader(windows, 3, 5, rank=1, world_size=2, workers=then)
    again.load_state_dict(state)
    for samples, expected in zip(again.take(5), whole[4:], strict=True):
        assert (samples.ids, samples.bucket) == (expected.ids, expected.bucket)
        for name in ("rows", "video", "image", "audio"):
            own, other = getattr(samples, name), getattr(expected, name)
            assert own is other is None or torch.equal(own, other)


def test_a_position_is_of_all_ranks(windows):
    loader = Loader(windows, 3, 5, rank=0, world_size=2)
    loader.take(3)
    state = loader.state_dict()
    assert state["batches"] == 6
    for world in (1, 3):
        other = Loader(windows, 3, 5, rank=world - 1, world_size=world)
        other.load_state_dict(state)
        assert other.rows(other.position).tolist() == stream(windows, 3, 1, 6 + world, seed=5)[-1]
    with pytest.raises(UserError, match=r"after 6 batches: 4 ranks never reach it"):
        Loader(windows, 3, 5, world_size=4).load_state_dict(state)
    for changed in (Loader(windows, 4, 5), Loader(windows, 3, 6)):
        with pytest.raises(UserError, match=r"position of another stream: (batch_size|seed) was"):
            changed.load_state_dict(state)
    with pytest.raises(UserError, match="position of another stream: data was"):
        loader.load_state_dict({**state, "data": "0" * 64})


def test_nothing_decoded_is_kept_and_the_global_generator_stays(small):
    torch.manual_seed(1)
    before, others = torch.random.get_rng_state(), frames_alive()
    for workers in (0, 1):
        Loader(small, 4, 0, workers=workers).take(6)
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


def rows_of_shard(index, number: int) -> Windows:
    return Windows(index, FRAMES, FPS, np.flatnonzero(index.shard == number).tolist())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_is_named_in_one_line(damaged, workers):
    folder, shard = damaged
    index = Index.read(folder, FPS)
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
            Loader(rows_of_shard(index, 1), 4, 0, workers=workers).take(6)
        assert str(shard) in str(caught.value)
        assert "Traceback" not in str(caught.value)
        with pytest.raises(UserError, match=f"differs from its checksum: {shard}"):
            index.verify()
    shard.unlink()
    with pytest.raises(UserError, match=f"shard not found: {shard}"):
        Loader(rows_of_shard(index, 1), 4, 0, workers=workers).take(6)
    index.verify(rank=0, world_size=2)  # the share of rank 0 is whole
    with pytest.raises(UserError, match="differs from its checksum"):
        index.verify(rank=1, world_size=2)


def test_a_sample_at_another_place_is_not_taken_for_the_one_asked_for(damaged):
    """The index of a shard that was made anew with other samples."""
    folder, _ = damaged
    path = folder / "a-000000.json"
    rows = json.loads(path.read_text())
    rows["samples"][0]["key"], rows["samples"][1]["key"] = rows["samples"][1]["key"], rows["samples"][0]["key"]
    path.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"shard is damaged \(sample film_1 is not at byte 0\)"):
        Windows(Index.read(folder, FPS), FRAMES, FPS)[0]


def test_what_cannot_be_loaded_is_said_in_one_line(data, index, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no prepared data"):
        Index.read(tmp_path / "empty", FPS)
    with pytest.raises(UserError, match="does not divide 16000 Hz"):
        Windows(index, FRAMES, Fraction(30))
    with pytest.raises(UserError, match=r"no clip of 60 frames"):
        Loader(Windows(index, 60, FPS, [0, 1]), 2, 0)
    with pytest.raises(UserError, match=r"film_0 .*has 25/2 frames a second, 25 are asked for"):
        Windows(index, FRAMES, Fraction(25))[0]
    nothing = write_shards(tmp_path / "bad", [[("a", {"json": b"{}"})]])
    with pytest.raises(UserError, match="neither video, image nor sound"):
        Index.read(nothing, FPS)
    torn = write_shards(tmp_path / "torn", [[("a", {"json": b"{", "png": b""})]])
    with pytest.raises(UserError, match="facts cannot be read"):
        Index.read(torn, FPS)
