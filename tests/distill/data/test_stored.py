"""Training data at size: files that are opened on demand, what is stored once, the bytes of a clip, batches made ahead."""

import json
import os
import threading
import time
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch

from distill.compose import RECIPES
from distill.data import latents, stored
from distill.data.encoders import PRECISIONS, ConditionEncoders, fitted_fingerprint, load_encoders
from distill.data.order import Positions, made_ahead
from distill.data.procedural.render import WorldConfig
from distill.data.procedural.source import DataConfig
from distill.data.source import Clips, ClipSource
from distill.data.stored import Stored, Texts, opener, packed_texts
from distill.recipe import load_recipe
from teachers.codecs.linear import CodecConfig
from teachers.encoders.small import AudioConfig, TextConfig
from teachers.errors import UserError
from teachers.files import load_tensors, save_tensors
from tests.support.tiny import Ranks, randn

WORLD = WorldConfig(num_train=10, shard_clips=4)
DATA = DataConfig(
    world=WORLD, codec=CodecConfig(), audio=AudioConfig(), text=TextConfig(vocab_size=300, num_layers=1), text_steps=2
)


def test_rows_of_many_files_are_those_of_one_tensor(tmp_path, monkeypatch):
    """Of ten files two are mapped; a tensor with fewer rows than its file goes round."""
    monkeypatch.setattr(stored, "OPEN_FILES", 2)
    files, lengths = [tmp_path / f"{i}.safetensors" for i in range(10)], [4, 2] * 5
    parts = [{"x": randn(n, 3, seed=i), "half": randn(n // 2, 2, seed=i + 20)} for i, n in enumerate(lengths)]
    for file, part in zip(files, parts, strict=True):
        save_tensors(file, part)
    opened = opener()
    x, half = (Stored(files, lengths, name, opened) for name in ("x", "half"))
    rows = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    assert x.shape == (30, 3)
    assert torch.equal(x[rows], torch.cat([part["x"] for part in parts])[rows])
    assert torch.equal(half[rows], torch.cat([part["half"].repeat(2, 1) for part in parts])[rows])
    assert (
        len({line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line})
        <= 2
    )


def test_texts_come_back_with_their_padding(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "TEXTS_A_FILE", 2)
    whole = randn(5, 6, 3)
    for row, length in zip(whole, (6, 2, 0, 1, 4), strict=True):
        row[length:] = 0
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for i, file in enumerate(files):
        save_tensors(file, packed_texts([*whole[2 * i : 2 * i + 2]], torch.float32))
    texts, of = Texts(files, torch.tensor([4, 0, 0, 2, 3, 1]), 6, opener()), [4, 0, 0, 2, 3, 1]
    assert torch.equal(texts[torch.arange(6)], whole[of])
    assert sum(len(load_tensors(file)["features"]) for file in files) == 13


class Counting:
    """An encoder that counts the clips or texts that it was given."""

    def __init__(self, encoder):
        self.encoder, self.seen = encoder, []

    def __getattr__(self, name):
        return getattr(self.encoder, name)

    def __call__(self, given, *more):
        self.seen += [*given]
        return self.encoder(given, *more)


def test_sound_once_a_clip_and_a_text_once(tmp_path, monkeypatch):
    """Mirror images encode neither again, and are rows of their own. The head of a file is read once."""
    folder, once, other = (tmp_path / name for name in ("counted", "once", "plain"))
    for new in (folder, once, other):
        new.mkdir()
    heads, read_facts = [], latents.read_facts
    monkeypatch.setattr(latents, "read_facts", lambda file: (heads.append(file.name), read_facts(file))[1])
    latents.prepare(DATA, DATA.open(), 0, once, Ranks())
    assert heads == [f"shard-{i:05d}.safetensors" for i in range(3)]
    encoders = load_encoders(DATA, once)
    audio, text = Counting(encoders.audio_encoder), Counting(encoders.text)
    clips = [*DATA.open().train(0, range(3))]
    clips = [
        replace(own, text=["a person nods" if i % 2 else name for i, name in enumerate(own.text)]) for own in clips
    ]
    counted = replace(encoders, audio_encoder=audio, text=text)
    distinct = {name for own in clips for name in own.text}
    made = latents.write_shards(DATA.open(), folder, Ranks(), counted, lambda numbers: [clips[i] for i in numbers])
    assert (made.rows, set(made.texts)) == (20, distinct)
    assert len(audio.seen) == 10
    assert sorted(text.seen[:-1]) == sorted(distinct)
    pool, row = latents.load_train_set(folder, encoders.mark), 0
    for own in clips:
        n = len(own.text)
        batch = pool.batch(torch.arange(row, row + 2 * n))
        x0, given = encoders.of_clips(own)
        mirrored, _ = encoders.of_clips(replace(own, video=own.video.flip(-1)))
        assert torch.equal(batch.x0, torch.cat([x0, mirrored]).half().float())
        assert torch.equal(batch.conditions.audio, given.audio.repeat(2, 1, 1, 1))
        assert torch.allclose(batch.conditions.text, given.text.repeat(2, 1, 1), atol=1e-5)
        row += 2 * n
    plain = replace(DATA, mirror=False, keep_sound=True).open()
    assert latents.prepare(plain.config, plain, 0, other, Ranks())["clips"] == 10
    assert pool.batch(torch.arange(2)).sound is None
    kept = latents.load_train_set(other, fitted_fingerprint(other))
    assert len(kept) == 10
    sound = kept.batch(torch.arange(4)).sound
    assert sound is not None
    assert torch.allclose(sound, clips[0].voice, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "expected"), [("x0", "x0 of clip 1 of shard 0, which the codec made of"), ("audio", "audio encoder")]
)
def test_data_that_are_not_finite_are_named_and_not_stored(tmp_path, name, expected):
    latents.prepare(DATA, DATA.open(), 0, tmp_path, Ranks())
    encoders = load_encoders(DATA, tmp_path)
    real = encoders.of_clips

    class Broken:
        mark, precision = encoders.mark, encoders.precision

        def of_clips(self, clips, with_text=True, frames=None):
            x0, conditions = real(clips, with_text, frames)
            (x0 if name == "x0" else conditions.audio)[1].fill_(float("nan"))
            return x0, conditions

    (tmp_path / "other").mkdir()
    source = replace(DATA, mirror=False).open()
    with pytest.raises(UserError, match=rf"^the data are not finite: [^\n]*{expected}[^\n]*$"):
        latents.write_shards(source, tmp_path / "other", Ranks(), Broken(), lambda numbers: source.train(0, numbers))
    assert not list((tmp_path / "other").iterdir())


class Sizes:
    """Encoders of livetalk.yaml that give zeros of its real sizes; a caption has 60 tokens."""

    def __init__(self, data):
        self.data, self.config, self.dim = data, data.codec, data.audio.dim(1000)

    def encode(self, video):
        n, _, frames, height, width = video.shape
        patch, stride = self.config.patch, self.config.stride
        return torch.zeros(n, self.config.channels, 1 + (frames - 1) // stride, height // patch, width // patch)

    def rows(self, first, last):
        return torch.ones(2, last - first, self.dim)

    def of_clip(self, audio, num_frames):
        return self.rows(0, num_frames)

    def __call__(self, given, first=0, last=0):
        if isinstance(given, list):
            rows = torch.zeros(len(given), self.data.text.max_tokens, self.data.text.dim, dtype=torch.bfloat16)
            rows[:, :60] = 1
            return rows
        return self.rows(first, last)


@pytest.mark.slow
@pytest.mark.parametrize(("mirror", "most"), [(True, 9.7), (False, 7.0)])
def test_bytes_of_a_clip_of_81_frames_at_512x512(tmp_path, mirror, most):
    """livetalk's own sizes: latents 2.75 MB each, two tensors of wav2vec2 rows 1.8 MB each, text 0.5 MB."""
    data = load_recipe(RECIPES / "livetalk.yaml", ["teacher.path=anywhere"]).data
    assert not data.mirror, "as shipped a clip takes less than 8 MB"
    data = replace(data, mirror=mirror, world=replace(data.world, num_train=2))
    source, sizes = ClipSource(data), Sizes(data)
    clips = Clips(
        video=torch.zeros(2, 3, 81, *data.world.size, dtype=torch.uint8),
        audio=torch.zeros(2, 81 * 1000),
        text=["one", "two"],
        labels={},
    )
    encoders = ConditionEncoders(sizes, sizes, sizes, precision=PRECISIONS[data.precision])
    latents.write_shards(source, tmp_path, Ranks(), encoders, lambda _: [clips])
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) / 2 < most * 1e6


def test_50_000_clips_open_in_seconds_and_one_shard_is_read(tmp_path, monkeypatch):
    """12,500 shards of four clips and their mirror images, of which one is opened and none is mapped for long."""
    latents.prepare(DATA, DATA.open(), 0, tmp_path, Ranks())
    facts = json.loads((tmp_path / "manifest.json").read_text())
    first = tmp_path / "shard-00000.safetensors"
    for i in range(3, 12_500):
        os.link(first, tmp_path / f"shard-{i:05d}.safetensors")
    for i in (1, 2):
        (tmp_path / f"shard-{i:05d}.safetensors").unlink()
        os.link(first, tmp_path / f"shard-{i:05d}.safetensors")
    (tmp_path / "manifest.json").write_text(json.dumps({**facts, "text": facts["text"][:1] * 12_500}))
    mark, read = fitted_fingerprint(tmp_path), []
    monkeypatch.setattr(stored, "load_tensors", lambda file: read.append(file.name) or load_tensors(file))
    began = time.process_time()
    pool = latents.load_train_set(tmp_path, mark)
    assert time.process_time() - began < 3
    assert (len(pool), read) == (100_000, ["shard-00000.safetensors"])
    batch, same = pool.batch(torch.tensor([99_998, 8 * 77])), pool.batch(torch.tensor([6, 0]))
    assert torch.equal(batch.x0, same.x0)
    assert torch.equal(batch.conditions.text, same.conditions.text)
    assert len(read) == 4, "two shards and the texts"


def test_batches_are_made_ahead_and_depend_on_their_position_alone():
    made, names = [], set()

    def make(position):
        names.add(threading.current_thread().name)
        made.append(position)
        if position == 9:
            raise UserError("nine")
        return 10 * position

    with closing(Positions(make)) as batches:
        assert batches(3) == 30
        deadline = time.monotonic() + 5
        while made != [3, 4, 5] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert made == [3, 4, 5], "two more than were asked for"
        assert [batches(position) for position in (4, 5, 1, 2, 3, 8)] == [40, 50, 10, 20, 30, 80]
        with pytest.raises(UserError, match="nine"):
            batches(9)
    assert threading.current_thread().name not in names
    assert not any(thread.name.startswith("made-ahead") for thread in threading.enumerate())
    made.clear()
    with closing(Positions(make, ahead=0)) as batches:
        assert [batches(position) for position in (3, 4, 1)] == [30, 40, 10]
    assert made == [3, 4, 1], "none before it is asked for"
    assert threading.current_thread().name in names
    assert [*made_ahead(str, range(5), workers=3)] == ["0", "1", "2", "3", "4"]
    endless = made_ahead(str, count())
    assert [next(endless), next(endless)] == ["0", "1"]
    endless.close()
