"""Clips as training data: resumable shards of latents and features, and how batches are read from them. The embedded world."""

import hashlib
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
from distill.data.procedural import duplex, render
from distill.data.source import Clips, ClipSource
from distill.data.stored import TEXTS_A_FILE, Stored, Texts, files_of, opener, packed_texts
from distill.methods import Batch
from distill.training.engine import Engine
from students.weights.coverage import FILE, Coverage
from teachers.codecs.convolutional import ConvCodecConfig
from teachers.codecs.linear import CodecConfig, EigenCodec, to_float, to_uint8
from teachers.conditions import BUILT_IN, OF_IMAGE, Conditions, known, pack_rows, side_by_side
from teachers.disk.read import read_json
from teachers.encoders.small import TextConfig, TextEncoder
from teachers.errors import UserError
from teachers.files import atomic_write, load_tensors, read_facts, remove_folder, save_tensors, staged
from teachers.flow import keyed_generator
from teachers.registry import AudioEncoder, Codec, ImageEncoder, Text

CPU = torch.device("cpu")
MANIFEST = "manifest.json"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
SOUND = ("audio", "clip_audio")
HALF = ("beside", "anchors")  # made of latents and stored like them
TEXTS_AT_ONCE = 16
COVERAGE_CLIPS = 32  # held-out clips whose first frames are compared with the training set's
PIXELS_AT_ONCE = 2**25
"""Pixels that are encoded or decoded at once: one clip of 81 frames at 512x512, 1,310 of the embedded world's."""


def pieces(frames: int, height: int, width: int) -> int:
    """Clips of this size that are worked on at once."""
    return max(1, PIXELS_AT_ONCE // (frames * height * width))


@dataclass(frozen=True)
class ConditionEncoders:
    """Everything that turns clips into tensors for a network: codec, audio encoder, text encoder (all frozen).

    They work on `device`; what they give lies on the CPU. `reference`: the first latent of a clip is given to the network;
    `negative`: the prompt in the place of a dropped text. `lead`: so many first latent frames of a clip are the portrait's and no
    part of its x0 and conditions (`NetworkKind.lead`). `mark`: which fitted files they were read from (`fitted_fingerprint`).
    `precision`: that of features of sound and text in a training set.
    """

    codec: Codec
    audio_encoder: AudioEncoder
    text: Text
    reference: bool = True
    negative: str | None = None
    device: torch.device = CPU
    mark: str = ""
    precision: torch.dtype = torch.float32
    image: ImageEncoder | None = None
    lead: int = 0

    @torch.no_grad()
    def of_image(self, image: Tensor, num_frames: int) -> dict[str, Tensor]:
        """The features of reference images [N, 3, H, W] in [-1, 1] for clips of so many latent frames; {} without an encoder."""
        if self.image is None:
            return {}
        parts = [self.image(part.to(self.device), self.codec, num_frames) for part in image.split(1)]
        return {name: torch.cat([part[name].float().cpu() for part in parts]) for name in parts[0]}

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """uint8 [N, 3, T, H, W] -> latents fp32 [N, C, F, h, w], the lead among them, a few clips at a time."""
        parts = video.split(pieces(*video.shape[2:]))
        return torch.cat([self.codec.encode(to_float(part.to(self.device))).float().cpu() for part in parts])

    @torch.no_grad()
    def decode(self, latents: Tensor, lead: Tensor | None = None) -> Tensor:
        """Latents [N, C, F, h, w] behind their `lead` [N, C, 1, h, w] -> uint8 [N, 3, T, H, W], a few clips at a time."""
        latents = latents if lead is None else torch.cat([lead.to(latents), latents], dim=2)
        config, (frames, height, width) = self.codec.config, latents.shape[2:]
        size = pieces(1 + config.stride * (frames - 1), height * config.patch, width * config.patch)
        return torch.cat([to_uint8(self.codec.decode(part.to(self.device))).cpu() for part in latents.split(size)])

    @torch.no_grad()
    def conditions(
        self,
        audio: Tensor,
        text: list[str] | None,
        reference: Tensor,
        num_frames: int,
        pose: Tensor | None = None,
        features: Mapping[str, Tensor] | None = None,
        image: Tensor | None = None,
    ) -> Conditions:
        """audio [N, S] or [N, 2, S]; text, None for conditions without; reference latents [N, C, 1, h, w]; num_frames pixel frames,
        the lead's among them; pose rows [N, T, P]; `features` as `Clips` has them; reference images [N, 3, H, W] in [-1, 1], for an
        image encoder."""
        audio = audio.to(self.device)
        rows, whole = self.audio_encoder(audio, 0, num_frames), self.audio_encoder.of_clip(audio, num_frames)
        if audio.ndim == 3:
            rows, whole = side_by_side(rows), None if whole is None else side_by_side(whole)
        packed = self._packed(rows)
        of_image = {} if image is None else self.of_image(image, packed.shape[1])
        return Conditions(
            {**of_image, **(features or {})},
            text=None if text is None else self.read(text),
            audio=packed,
            reference=reference if self.reference else None,
            lead=reference if self.lead else None,
            negative=None if text is None else self.negatives(len(text)),
            clip_audio=None if whole is None else self._packed(whole),
            pose=None if pose is None else self._packed(pose),
        )

    def _packed(self, rows: Tensor) -> Tensor:
        """Rows of pixel frames [N, T, A] -> those of the clip's latent frames [N, F, stride, A] on the CPU."""
        return pack_rows(rows.float().cpu(), self.codec.config.stride)[:, self.lead :]

    @torch.no_grad()
    def read(self, text: list[str]) -> Tensor:
        """Token features fp32 [N, L, D]."""
        return self.text(text).float().cpu()

    def negatives(self, count: int) -> Tensor | None:
        """Features [N, L, D] of the negative prompt, None without one."""
        return None if self.negative is None else self.read([self.negative]).expand(count, -1, -1)

    def of_clips(self, clips: Clips, with_text: bool = True) -> tuple[Tensor, Conditions]:
        """Latents [N, C, F, h, w] and conditions of whole clips, those of the text only `with_text`. UserError for features that
        are not declared, or not of as many rows or latent frames as the clips."""
        latents = self.encode(clips.video)
        x0 = latents[:, :, self.lead :]
        _check_features(clips.features, Conditions(clips.features), len(x0), x0.shape[2])
        frames, text = clips.video.shape[2], clips.text if with_text else None
        image = to_float(clips.video[:, :, 0])
        return x0, self.conditions(clips.audio, text, latents[:, :, :1], frames, clips.pose, clips.features, image)


def _check_features(features: Mapping[str, Tensor], given: Conditions, num: int, frames: int) -> None:
    for name, value in features.items():
        if name in BUILT_IN and name != "regions":
            raise UserError(f"Clips.features: {name} is made by the encoders; declare a name of your own")
        counts, axis = {"clips": (value.shape[0], num)}, known(name).axis
        if name in given.timed and axis is not None:
            counts["latent frames"] = (value.shape[axis], frames)
        for what, (own, needed) in counts.items():
            if own != needed:
                raise UserError(f"Clips.features: {name} {tuple(value.shape)} has {own} {what}, the video has {needed}")


@dataclass(frozen=True)
class TrainSet:
    """The training set: x0 fp16 [N, C, F, h, w]; `features`, the stored conditions by name, a row a clip; `shared`, those that are
    one for all clips, [1, ..] (the negative prompt). `reference`: the first latent of a clip is given to the network. Batches are
    fp32."""

    x0: Tensor | Stored
    features: Mapping[str, Tensor | Stored | Texts]
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    reference: bool = True

    def __len__(self) -> int:
        return self.x0.shape[0]

    def batch(self, rows: Tensor, device: torch.device | str = "cpu") -> Batch:
        """The clips number `rows` [B]."""
        x0 = self.x0[rows].float()
        features = {name: _widened(value[rows]) for name, value in self.features.items()}
        shared = {name: value.expand(len(rows), *value.shape[1:]) for name, value in self.shared.items()}
        conditions = Conditions(features | shared, reference=x0[:, :, :1] if self.reference else None)
        return Batch(conditions=conditions.to(device), x0=x0.to(device))


def _widened(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


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
            learned = range(1, min(shards_for(config.codec), source.num_shards))
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

    clips, texts = write_shards(source, folder, engine, encoders, clips_of)
    if engine.is_main and not (folder / FILE).is_file():
        cover(source, seed, first, texts, encoders).save(folder / FILE)
    original = to_float(first.video[:64])
    decoded = to_float(encoders.decode(encoders.encode(first.video[:64])))
    stages = read_json(folder / "codec.json")  # of a codec that was trained
    found = {"clips": clips, "codec_psnr_db": psnr(decoded, original), **source.facts}
    return found | ({"codec": stages} if stages else {})


def cover(source: ClipSource, seed: int, first: Clips, texts: Iterable[str], encoders: ConditionEncoders) -> Coverage:
    """What the training set covers: first frames of its first shard and of clips that are held out, decoded a few at a time."""
    count = source.available(seed, "admit", COVERAGE_CLIPS)
    _, _, frames, height, width = first.video.shape
    step = max(1, PIXELS_AT_ONCE * 8 // (frames * height * width))
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
) -> tuple[int, list[str]]:
    """Write the shards that are not there, of the clips that `clips_of` gives for their numbers (ascending) and (`data.mirror`)
    their mirror images, which are rows of their own but share what is equal; the features of each distinct text once; the
    negative prompt; last the manifest, by which all are found. Returns the number of rows and the distinct texts. UserError for a
    shard that other encoders made."""
    mine, mark, precision = range(engine.rank, source.num_shards, engine.world_size), encoders.mark, encoders.precision
    files = files_of(folder, "shard", source.num_shards)
    missing = [i for i in mine if not files[i].is_file()]
    bar = tqdm(missing, folder.name, len(mine), initial=len(mine) - len(missing), disable=not engine.is_main)
    for i, clips in zip(bar, clips_of(missing), strict=True):
        x0, conditions = encoders.of_clips(clips, with_text=False)
        rows = conditions.stored
        if source.config.mirror:
            x0 = torch.cat([x0, encoders.encode(clips.video.flip(-1))[:, :, encoders.lead :]])
            again = encoders.of_image(to_float(clips.video[:, :, 0].flip(-1)), x0.shape[2])
            again.pop("regions", None)  # who is where is not to be seen in the image: it is flipped
            rows = {name: _with_mirrored(name, value, again.get(name)) for name, value in rows.items()}
        rows = {name: value.to(_precision(name, precision, value)) for name, value in rows.items()}
        rows = {"x0": x0.half(), **rows}
        _check_finite(rows, source, i)
        save_tensors(files[i], rows, {"clips": json.dumps([mark, clips.text])})
    engine.barrier()
    said = engine.in_turns([_text_of(files[i], mark) for i in mine], source.num_shards)
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
        facts |= {"tokens": encoders.read(texts[:1]).shape[1], "text": [[number[one] for one in own] for own in said]}
        atomic_write(folder / MANIFEST, json.dumps(facts) + "\n")
    engine.barrier()
    return (1 + source.config.mirror) * source.num_train, texts


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


def _precision(name: str, precision: torch.dtype, value: Tensor) -> torch.dtype:
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


def _text_of(file: Path, mark: str) -> list[str]:
    made, text = json.loads(read_facts(file).get("clips", '["", []]'))
    _check_mark(file, made, mark)
    return text


def _check_mark(file: Path, made: str, mark: str) -> None:
    if made != mark:
        raise UserError(
            f"stale features: {file} was made by another codec or text encoder ({made[:12]}) than the data stage holds "
            f"({mark[:12]}); delete {file.parent} and run again"
        )


def load_encoders(
    config: ClipsConfig, folder: Path, reference: bool = True, device: torch.device = CPU
) -> ConditionEncoders:
    """Codec, audio encoder and text encoder of a finished data stage, on `device`."""
    codec = config.codec.load(folder, *config.world.size)
    audio_encoder, text = config.audio.load(render.samples_per_frame(config.world)), config.text.load(folder)
    image = None if config.image is None else config.image.load()
    for part in (codec, audio_encoder, text, *([] if image is None else [image])):
        part.to(device)
    mark, precision = fitted_fingerprint(folder), PRECISIONS[config.precision]
    given = (config.negative, device, mark, precision, image, config.lead)
    return ConditionEncoders(codec, audio_encoder, text, reference, *given)


def fitted_fingerprint(folder: Path) -> str:
    """Which fitted codec and text encoder a data stage holds: a hash of their files. Those given are in the stage's fingerprint."""
    digest = hashlib.sha256()
    for file in (folder / "codec.safetensors", *sorted((folder / "text").glob("*"))):
        if file.is_file():
            digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


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
    whole = {name: Stored(files, rows, name, opened) for name in opened(files[0])}
    x0 = whole.pop("x0")
    for name in whole:
        known(name)
    texts = Texts(text_files, torch.tensor([k for own in said for k in copies * own]), facts["tokens"], opened)
    file = folder / "negative.safetensors"
    shared = {"negative": load_tensors(file)["text"]} if file.is_file() else {}
    return TrainSet(x0, {**whole, "text": texts}, shared, reference)


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
