"""Clips as training data: resumable shards of latents and features, and how batches are read from them. The embedded world."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from distill.data.codec_training import TrainableConfig, fit_codec, psnr, shards_for
from distill.data.config import ClipsConfig
from distill.data.encoders import ConditionEncoders, load_encoders
from distill.data.procedural import duplex
from distill.data.source import Clips, ClipSource
from distill.data.stored import TEXTS_A_FILE, Stored, Texts, files_of, opener, packed_texts
from distill.methods import Batch
from distill.training.engines.engine import Engine
from students.weights.coverage import FILE, Coverage
from teachers.codecs.convolutional import ConvCodecConfig
from teachers.codecs.linear import CodecConfig, EigenCodec, to_float
from teachers.conditions import OF_IMAGE, Conditions, known
from teachers.disk.read import read_json
from teachers.encoders.small import TextConfig, TextEncoder
from teachers.errors import UserError
from teachers.files import atomic_write, load_tensors, read_facts, remove_folder, save_tensors, staged
from teachers.flow import keyed_generator
from teachers.machine import clips_at_once

MANIFEST = "manifest.json"
SOUND = ("audio", "clip_audio")
HALF = ("beside", "anchors")  # made of latents and stored like them
TEXTS_AT_ONCE = 16
SKIPPED_NAMED = 20  # in the report, of the files that were skipped
COVERAGE_CLIPS = 32  # held-out clips whose first frames are compared with the training set's


@dataclass(frozen=True)
class TrainSet:
    """The training set: x0 fp16 [N, C, F, h, w]; `features`, the stored conditions by name, a row a clip; `shared`, those that are
    one for all clips, [1, ..] (the negative prompt). `reference`: the first latent of a clip is given to the network. `sound` int16
    [N, S], where it is kept (`data.keep_sound`). Of the rows the first `films` are clips, the others portraits alone (None: all
    are clips). Batches are fp32."""

    x0: Tensor | Stored
    features: Mapping[str, Tensor | Stored | Texts]
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    reference: bool = True
    sound: Stored | None = None
    films: int | None = None

    @property
    def num_films(self) -> int:
        """Rows whose x0 is a clip; they come first."""
        return len(self) if self.films is None else self.films

    def __len__(self) -> int:
        return self.x0.shape[0]

    def batch(self, rows: Tensor, device: torch.device | str = "cpu") -> Batch:
        """The clips number `rows` [B]."""
        x0 = self.x0[rows].float()
        features = {name: _widened(value[rows]) for name, value in self.features.items()}
        shared = {name: value.expand(len(rows), *value.shape[1:]) for name, value in self.shared.items()}
        conditions = Conditions(features | shared, reference=x0[:, :, :1] if self.reference else None)
        sound = None if self.sound is None else from_int16(self.sound[rows]).to(device)
        filmed = None if self.films is None else (rows < self.films).to(device)
        return Batch(conditions=conditions.to(device), x0=x0.to(device), sound=sound, filmed=filmed)


@dataclass(frozen=True)
class Written:
    """What `write_shards` wrote, on all ranks and in earlier starts: rows, distinct texts, and the files that were skipped."""

    rows: int
    texts: list[str]
    skipped: list[str]


def _widened(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


def to_int16(sound: Tensor) -> Tensor:
    """Samples in [-1, 1] as 16 bits."""
    return (sound.clamp(-1, 1) * 32767).round().to(torch.int16)


def from_int16(sound: Tensor) -> Tensor:
    """16 bits as fp32 samples in [-1, 1]."""
    return sound.float() / 32767


def prepare(config: ClipsConfig, source: ClipSource, seed: int, folder: Path, engine: Engine) -> dict:
    """Write codec and text encoder, where they are fitted, and training shards; what is there is not made again. Shards are
    split over processes."""
    if engine.is_main and (words := source.how_many()):
        tqdm.write(f"distill: data: {words}", file=sys.stderr)
    source.verify(engine.rank, engine.world_size)
    (first,) = source.train(seed, [0])
    if engine.is_main:
        codec_file = folder / "codec.safetensors"
        if isinstance(config.codec, CodecConfig) and not codec_file.is_file():
            codec = EigenCodec(config.codec, *config.world.size).fit(to_float(first.video))
            save_tensors(codec_file, codec.state_dict())
        _take_over(config, folder)
        if isinstance(config.codec, TrainableConfig) and config.codec.fitted and not codec_file.is_file():
            learned = range(1, min(shards_for(config.codec), source.num_film_shards))
            videos = (clips.video for part in ((first,), source.train(seed, learned)) for clips in part)
            fit_codec(config.codec, videos, source.draw(seed, "admit", 64).video, seed, folder, engine.device)
        if isinstance(config.text, TextConfig) and not (folder / "text" / "config.json").is_file():
            rng = keyed_generator(seed, "text")
            remove_folder(folder / "text")  # a part of it, without what was damaged
            with staged(folder / "text") as temporary:
                fit_text(config.text, first.text, source.meanings(first), config.text_steps, rng).save(temporary)
    engine.barrier()
    encoders = load_encoders(config, folder, device=engine.device)

    def clips_of(numbers: Sequence[int]) -> Iterator[Clips]:
        yield from [first] if 0 in numbers else []
        yield from source.train(seed, [i for i in numbers if i], workers=0 if engine.device.type == "cpu" else 2)

    written = write_shards(source, folder, engine, encoders, clips_of)
    if engine.is_main and not (folder / FILE).is_file():
        cover(source, seed, first, written.texts, encoders).save(folder / FILE)
    original = to_float(first.video[:64])
    decoded = to_float(encoders.decode(encoders.encode(first.video[:64])))
    stages = read_json(folder / "codec.json")  # of a codec that was trained
    found = {"clips": written.rows, "codec_psnr_db": psnr(decoded, original), **source.facts}
    if written.skipped:
        found |= {"skipped_files": len(written.skipped), "skipped": written.skipped[:SKIPPED_NAMED]}
    return found | ({"codec": stages} if stages else {})


def cover(source: ClipSource, seed: int, first: Clips, texts: Iterable[str], encoders: ConditionEncoders) -> Coverage:
    """What the training set covers: first frames of its first shard and of clips that are held out, decoded a few at a time."""
    count = source.available(seed, "admit", COVERAGE_CLIPS)
    world = source.config.world
    step = 8 * clips_at_once(world.num_frames, *world.size)
    parts = (
        source.draw(seed, "admit", count, rows=range(start, min(count, start + step)))
        for start in range(0, count, step)
    )
    held_out = torch.cat([part.video[:, :, 0] for part in parts])
    own = first.video[:, :, 0]
    own = torch.cat([own, own.flip(-1)]) if source.config.mirror else own
    return Coverage.fit(own, held_out, texts, encoders.codec, encoders.device)


def _take_over(config: ClipsConfig, folder: Path) -> None:
    """Copy the codec and the text encoder that are given by a path and lie in the student's folder. UserError where they do not."""
    codec, text = config.codec, config.text
    if isinstance(codec, ConvCodecConfig) and codec.path is not None and codec.train is None:
        read = codec.load(codec.path, *config.world.size)
        save_tensors(folder / "codec.safetensors", read.state_dict())
    if isinstance(text, TextConfig) and text.path is not None:
        remove_folder(folder / "text")
        with staged(folder / "text") as temporary:
            text.load(text.path).save(temporary)


def write_shards(
    source: ClipSource,
    folder: Path,
    engine: Engine,
    encoders: ConditionEncoders,
    clips_of: Callable[[Sequence[int]], Iterable[Clips]],
) -> Written:
    """Write the shards that are not there, of the clips that `clips_of` gives for their numbers (ascending) and (`data.mirror`)
    their mirror images, which are rows of their own but share what is equal; the features of each distinct text once; the
    negative prompt; last the manifest, by which all are found. UserError for a shard that other encoders made."""
    mine, mark, precision = range(engine.rank, source.num_shards, engine.world_size), encoders.mark, encoders.precision
    files = files_of(folder, "shard", source.num_shards)
    missing = engine.missing(files, apart=True)
    there = max(0, len(mine) - len(missing))
    bar = tqdm(missing, folder.name, there + len(missing), initial=there, disable=not engine.is_main)
    for i, clips in zip(bar, clips_of(missing), strict=True):
        x0, conditions = encoders.of_clips(clips, with_text=False, frames=source.config.world.num_frames)
        rows = conditions.stored
        if source.config.mirror:
            x0 = torch.cat([x0, encoders.encode(clips.video.flip(-1))[:, :, encoders.lead :]])
            again = encoders.of_image(to_float(clips.video[:, :, 0].flip(-1)), source.config.latent_frames)
            again.pop("regions", None)  # who is where is not to be seen in the image: it is flipped
            rows = {name: _with_mirrored(name, value, again.get(name)) for name, value in rows.items()}
        rows = {name: value.to(stored_type(name, precision, value)) for name, value in rows.items()}
        rows = {"x0": x0.half(), **rows} | ({"sound": to_int16(clips.voice)} if source.config.keep_sound else {})
        _check_finite(rows, source, i)
        save_tensors(files[i], rows, {"clips": json.dumps([mark, clips.text, sorted({*clips.skipped})])})
    engine.barrier()
    made = engine.in_turns([_of_shard(files[i], mark) for i in mine], source.num_shards)
    said, skipped = [text for text, _ in made], sorted({name for _, names in made for name in names})
    texts = list(dict.fromkeys(text for own in said for text in own))
    text_files = files_of(folder, "text", -(-len(texts) // TEXTS_A_FILE))
    for i in range(engine.rank, len(text_files), engine.world_size):
        if not text_files[i].is_file():
            own = texts[i * TEXTS_A_FILE : (i + 1) * TEXTS_A_FILE]
            parts = (encoders.read(own[k : k + TEXTS_AT_ONCE]) for k in range(0, len(own), TEXTS_AT_ONCE))
            save_tensors(text_files[i], packed_texts([one for part in parts for one in part], precision))
    engine.barrier()
    if engine.is_main:
        if (negative := encoders.negatives(1)) is not None:
            save_tensors(folder / "negative.safetensors", {"text": negative})
        number = {text: k for k, text in enumerate(texts)}
        facts = {"encoders": mark, "copies": 1 + source.config.mirror, "texts": len(texts)}
        if source.num_films < source.num_train:
            facts |= {"films": facts["copies"] * source.num_films, "frames": source.config.latent_frames}
        facts |= {"tokens": encoders.read(texts[:1]).shape[1], "text": [[number[one] for one in own] for own in said]}
        atomic_write(folder / MANIFEST, json.dumps(facts) + "\n")
    engine.barrier()
    return Written((1 + source.config.mirror) * source.num_train, texts, skipped)


def _check_finite(rows: Mapping[str, Tensor], source: ClipSource, shard: int) -> None:
    """UserError that names the first clip of a shard with a number that is not finite, and what made it."""
    for name, value in rows.items():
        good = value.flatten(1).isfinite().all(dim=1)
        if not bool(good.all()):
            made = "the codec" if name == "x0" else "the audio encoder" if name in SOUND else "the data source"
            made = "the image encoder" if name in OF_IMAGE else made
            clip = int((~good).nonzero()[0])
            raise UserError(
                f"the data are not finite: {name} of clip {clip} of shard {shard}, which {made} made of {source.description}; "
                f"remove that clip, or check {made}"
            )


def stored_type(name: str, precision: torch.dtype, value: Tensor) -> torch.dtype:
    """The type that a condition is stored in: that of the latents for what is made of them, `precision` for features."""
    if name in HALF:
        return torch.float16
    return precision if name in (*SOUND, "image") else value.dtype


def _with_mirrored(name: str, value: Tensor, again: Tensor | None) -> Tensor:
    """A condition of clips and of their mirror images [2 N, ..], made `again` where it is of the image, or [N, ..] where it is the
    same."""
    mirrored = duplex.mirrored(value) if name == "pose" else known(name).mirrored(value)
    mirrored = mirrored if again is None else again
    return value if torch.equal(value, mirrored) else torch.cat([value, mirrored])


def _of_shard(file: Path, mark: str) -> tuple[list[str], list[str]]:
    """The texts of a shard's clips, and the files that were skipped for them."""
    made, text, skipped = json.loads(read_facts(file).get("clips", '["", [], []]'))
    _check_mark(file, made, mark)
    return text, skipped


def _check_mark(file: Path, made: str, mark: str) -> None:
    if made != mark:
        raise UserError(
            f"stale features: {file} was made by another codec or text encoder ({made[:12]}) than the data stage holds "
            f"({mark[:12]}); delete {file.parent} and run again"
        )


def load_train_set(folder: Path, mark: str, reference: bool = True) -> TrainSet:
    """What `write_shards` wrote; it stays on disk, and only the manifest and one shard are read now. UserError for one that
    encoders of another `mark` made, one of whose files is lost, or that holds a condition which is not declared."""
    manifest = folder / MANIFEST
    facts = read_json(manifest)
    if not facts:
        raise UserError(f"training set without a list of its files: {manifest}; delete {folder} and run again")
    _check_mark(manifest, facts["encoders"], mark)
    copies, said = facts["copies"], facts["text"]
    files, opened = files_of(folder, "shard", len(said)), opener(folder)
    text_files = files_of(folder, "text", -(-facts["texts"] // TEXTS_A_FILE))
    rows = [copies * len(own) for own in said]
    films, frames = facts.get("films"), facts.get("frames")
    names = [name for name in opened(files[0]) if name != "x0"]
    whole, x0 = {name: Stored(files, rows, name, opened) for name in names}, Stored(files, rows, "x0", opened, frames)
    sound = whole.pop("sound", None)
    for name in whole:
        known(name)
    texts = Texts(text_files, torch.tensor([k for own in said for k in copies * own]), facts["tokens"], opened)
    file = folder / "negative.safetensors"
    shared = {"negative": load_tensors(file)["text"]} if file.is_file() else {}
    return TrainSet(x0, {**whole, "text": texts}, shared, reference, sound, films)


def fit_text(
    size: TextConfig, texts: list[str], meanings: Mapping[str, tuple[Tensor, int]], steps: int, rng: torch.Generator
) -> TextEncoder:
    """Tokenizer and text encoder, trained for `steps` to classify texts by `ClipSource.meanings`, words dropped at random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.initial_seed())
        encoder = TextEncoder.build(size, texts)
        heads = nn.ModuleDict({name: nn.Linear(size.dim, num) for name, (_, num) in meanings.items()})
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=3e-3)
    for _ in range(steps):
        rows = torch.randint(0, len(texts), (32,), generator=rng)
        shortened = []
        for i in rows.tolist():
            words = texts[i].split()
            keep = torch.rand(len(words), generator=rng) > 0.05
            shortened.append(" ".join(word for word, kept in zip(words, keep.tolist(), strict=True) if kept))
        pooled = encoder(shortened).mean(dim=1)
        losses = [nn.functional.cross_entropy(heads[name](pooled), of[rows]) for name, (of, _) in meanings.items()]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return encoder.eval().requires_grad_(False)
