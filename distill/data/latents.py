"""Clips as training data: resumable shards of latents and features, and how batches are read from them. The embedded world."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import ConcatDataset
from tqdm import tqdm

from distill.data.codec_training import fit_codec, psnr
from distill.data.config import ClipsConfig
from distill.data.procedural import duplex, render
from distill.data.source import Clips, ClipSource
from distill.methods import Batch
from distill.training.engine import Engine
from teachers.checkpoints.weights import read_json
from teachers.codecs.dc_ae import DCAEConfig
from teachers.codecs.linear import CodecConfig, EigenCodec, to_float, to_uint8
from teachers.conditions import BUILT_IN, Conditions, known, pack_rows, side_by_side
from teachers.encoders.small import TextConfig, TextEncoder
from teachers.errors import UserError
from teachers.files import load_tensors, save_tensors
from teachers.flow import keyed_generator
from teachers.registry import AudioEncoder, Codec, Text

CPU = torch.device("cpu")
PIXELS_AT_ONCE = 2**25
"""Pixels that are encoded or decoded at once: one clip of 81 frames at 512x512, 1,310 of the embedded world's."""


def pieces(frames: int, height: int, width: int) -> int:
    """Clips of this size that are worked on at once."""
    return max(1, PIXELS_AT_ONCE // (frames * height * width))


@dataclass(frozen=True)
class ConditionEncoders:
    """Everything that turns clips into tensors for a network: codec, audio encoder, text encoder (all frozen).

    They work on `device`; what they give lies on the CPU. `reference`: the first latent of a clip is given to the network;
    `negative`: the prompt in the place of a dropped text. `mark`: which fitted files they were read from (`fitted_fingerprint`).
    """

    codec: Codec
    audio_encoder: AudioEncoder
    text: Text
    reference: bool = True
    negative: str | None = None
    device: torch.device = CPU
    mark: str = ""

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """uint8 [N, 3, T, H, W] -> latents fp32 [N, C, F, h, w], a few clips at a time."""
        parts = video.split(pieces(*video.shape[2:]))
        return torch.cat([self.codec.encode(to_float(part.to(self.device))).float().cpu() for part in parts])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, C, F, h, w] -> uint8 [N, 3, T, H, W], a few clips at a time."""
        config, (frames, height, width) = self.codec.config, latents.shape[2:]
        size = pieces(1 + config.stride * (frames - 1), height * config.patch, width * config.patch)
        return torch.cat([to_uint8(self.codec.decode(part.to(self.device))).cpu() for part in latents.split(size)])

    @torch.no_grad()
    def conditions(
        self,
        audio: Tensor,
        text: list[str],
        reference: Tensor,
        num_frames: int,
        pose: Tensor | None = None,
        features: Mapping[str, Tensor] | None = None,
    ) -> Conditions:
        """audio [N, S] or [N, 2, S]; reference latents [N, C, 1, h, w]; num_frames pixel frames; pose rows [N, T, P]; `features` as
        `Clips` has them."""
        audio, stride = audio.to(self.device), self.codec.config.stride
        rows, whole = self.audio_encoder(audio, 0, num_frames), self.audio_encoder.of_clip(audio, num_frames)
        if audio.ndim == 3:
            rows, whole = side_by_side(rows), None if whole is None else side_by_side(whole)
        packed = pack_rows(rows.float().cpu(), stride)
        return Conditions(
            features,
            text=self.read(text),
            audio=packed,
            reference=reference if self.reference else None,
            negative=self.negatives(len(text)),
            clip_audio=None if whole is None else pack_rows(whole.float().cpu(), stride),
            pose=None if pose is None else pack_rows(pose, stride),
        )

    @torch.no_grad()
    def read(self, text: list[str]) -> Tensor:
        """Token features fp32 [N, L, D]."""
        return self.text(text).float().cpu()

    def negatives(self, count: int) -> Tensor | None:
        """Features [N, L, D] of the negative prompt, None without one."""
        return None if self.negative is None else self.read([self.negative]).expand(count, -1, -1)

    def of_clips(self, clips: Clips) -> tuple[Tensor, Conditions]:
        """Latents [N, C, F, h, w] and conditions of whole clips. UserError for features that are not declared, or not of as many
        rows or latent frames as the clips."""
        x0 = self.encode(clips.video)
        _check_features(clips.features, Conditions(clips.features), len(x0), x0.shape[2])
        frames, features = clips.video.shape[2], clips.features
        return x0, self.conditions(clips.audio, clips.text, x0[:, :, :1], frames, clips.pose, features)


def _check_features(features: Mapping[str, Tensor], given: Conditions, num: int, frames: int) -> None:
    for name, value in features.items():
        if name in BUILT_IN:
            raise UserError(f"Clips.features: {name} is made by the encoders; declare a name of your own")
        counts, axis = {"clips": (value.shape[0], num)}, known(name).axis
        if name in given.timed and axis is not None:
            counts["latent frames"] = (value.shape[axis], frames)
        for what, (own, needed) in counts.items():
            if own != needed:
                raise UserError(f"Clips.features: {name} {tuple(value.shape)} has {own} {what}, the video has {needed}")


class Stored:
    """Rows of tensors [n, ...] that stay on disk (safetensors maps its files into memory); indexed by rows [B] as one tensor is."""

    def __init__(self, parts: Sequence[Any]):
        self.rows: ConcatDataset[Tensor] = ConcatDataset(parts)
        self.shape = torch.Size((len(self.rows), *parts[0].shape[1:]))

    def __getitem__(self, rows: Tensor) -> Tensor:
        return torch.stack([self.rows[row] for row in rows.tolist()])


@dataclass(frozen=True)
class TrainSet:
    """The training set: x0 fp16 [N, C, F, h, w]; `features`, the stored conditions by name, a row a clip; `shared`, those that are
    one for all clips, [1, ..] (the negative prompt). `reference`: the first latent of a clip is given to the network."""

    x0: Tensor | Stored
    features: Mapping[str, Tensor | Stored]
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    reference: bool = True

    def __len__(self) -> int:
        return self.x0.shape[0]

    def batch(self, rows: Tensor, device: torch.device | str = "cpu") -> Batch:
        """The clips number `rows` [B]."""
        x0 = self.x0[rows].float()
        features = {name: value[rows] for name, value in self.features.items()}
        shared = {name: value.expand(len(rows), *value.shape[1:]) for name, value in self.shared.items()}
        conditions = Conditions(features | shared, reference=x0[:, :, :1] if self.reference else None)
        return Batch(conditions=conditions.to(device), x0=x0.to(device))


def prepare(config: ClipsConfig, source: ClipSource, seed: int, folder: Path, engine: Engine) -> dict:
    """Write codec and text encoder, where they are fitted, and training shards; what is there is not made again. Shards are
    split over processes."""
    source.verify(engine.rank, engine.world_size)
    (first,) = source.train(seed, [0])
    if engine.is_main:
        codec_file = folder / "codec.safetensors"
        if isinstance(config.codec, CodecConfig) and not codec_file.is_file():
            codec = EigenCodec(config.codec, *config.world.size).fit(to_float(first.video))
            save_tensors(codec_file, codec.state_dict())
        if isinstance(config.codec, DCAEConfig) and config.codec.fitted and not codec_file.is_file():
            learned = range(1, min(config.codec.fit.shards, source.num_shards))
            videos = (clips.video for part in ((first,), source.train(seed, learned)) for clips in part)
            fit_codec(config.codec, videos, source.draw(seed, "admit", 64).video, seed, folder, engine.device)
        if isinstance(config.text, TextConfig) and not (folder / "text" / "done").is_file():
            rng = keyed_generator(seed, "text")
            fit_text(config.text, first.text, source.meanings(first), config.text_steps, rng).save(folder / "text")
            (folder / "text" / "done").touch()
    engine.barrier()
    encoders = load_encoders(config, folder, device=engine.device)

    def clips_of(numbers: Sequence[int]) -> Iterator[Clips]:
        yield from [first] if 0 in numbers else []
        yield from source.train(seed, [i for i in numbers if i], workers=0 if engine.device.type == "cpu" else 2)

    clips = write_shards(source, folder, engine, encoders, clips_of)
    original = to_float(first.video[:64])
    decoded = to_float(encoders.decode(encoders.encode(first.video[:64])))
    stages = read_json(folder / "codec.json")  # of a codec that was trained
    found = {"clips": clips, "codec_psnr_db": psnr(decoded, original), **source.facts}
    return found | ({"codec": stages} if stages else {})


def write_shards(
    source: ClipSource,
    folder: Path,
    engine: Engine,
    encoders: ConditionEncoders,
    clips_of: Callable[[Sequence[int]], Iterable[Clips]],
) -> int:
    """Write the shards that are not there, of the clips that `clips_of` gives for their numbers (ascending) and their mirror
    images, and the negative prompt; returns the number of clips."""
    mine, mark = range(engine.rank, source.num_shards, engine.world_size), encoders.mark
    files = [folder / f"shard-{i:05d}.safetensors" for i in mine]
    missing = [i for i, file in zip(mine, files, strict=True) if not file.is_file()]
    done = len(mine) - len(missing)
    bar = tqdm(missing, desc=folder.name, total=len(mine), initial=done, disable=not engine.is_main)
    for i, clips in zip(bar, clips_of(missing), strict=True):
        file = folder / f"shard-{i:05d}.safetensors"
        both = []
        for shown in (clips, _mirrored(clips)):
            x0, conditions = encoders.of_clips(shown)
            both.append({"x0": x0.half(), **conditions.stored})
        save_tensors(file, {name: torch.cat([part[name] for part in both]) for name in both[0]}, {"senses": mark})
    engine.barrier()
    negative = encoders.negatives(1)
    if engine.is_main and negative is not None:
        save_tensors(folder / "negative.safetensors", {"text": negative})
    engine.barrier()
    return 2 * source.num_train


def _mirrored(clips: Clips) -> Clips:
    """The mirror images of clips."""
    features = {name: known(name).mirrored(value) for name, value in clips.features.items()}
    return replace(clips, video=clips.video.flip(-1), pose=duplex.mirrored(clips.pose), features=features)


def load_encoders(
    config: ClipsConfig, folder: Path, reference: bool = True, device: torch.device = CPU
) -> ConditionEncoders:
    """Codec, audio encoder and text encoder of a finished data stage, on `device`."""
    codec = config.codec.load(folder, *config.world.size)
    audio_encoder, text = config.audio.load(render.samples_per_frame(config.world)), config.text.load(folder)
    for part in (codec, audio_encoder, text):
        part.to(device)
    return ConditionEncoders(codec, audio_encoder, text, reference, config.negative, device, fitted_fingerprint(folder))


def fitted_fingerprint(folder: Path) -> str:
    """Which fitted codec and text encoder a data stage holds: a hash of their files. Those given are in the stage's fingerprint."""
    digest = hashlib.sha256()
    for file in (folder / "codec.safetensors", *sorted((folder / "text").glob("*"))):
        if file.is_file():
            digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def load_train_set(folder: Path, mark: str, reference: bool = True) -> TrainSet:
    """All shards of a finished data stage; they stay on disk. UserError for one that encoders of another `mark` made, or that holds
    a condition which is not declared."""
    files = sorted(folder.glob("shard-*.safetensors"))
    for file in files:
        if (made := _made_by(file)) not in (None, mark):
            raise UserError(
                f"stale features: {file} was made by another codec or text encoder ({made[:12]}) than the data stage holds "
                f"({mark[:12]}); delete {folder} and run again"
            )
    parts = [load_tensors(file) for file in files]
    whole = {name: Stored([part[name] for part in parts]) for name in parts[0]}
    x0 = whole.pop("x0")
    for name in whole:
        known(name)
    file = folder / "negative.safetensors"
    shared = {"negative": load_tensors(file)["text"]} if file.is_file() else {}
    return TrainSet(x0, whole, shared, reference)


def _made_by(file: Path) -> str | None:
    """The mark of the encoders that made a shard, None where it states none."""
    with safe_open(file, "pt") as content:
        return (content.metadata() or {}).get("senses")


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
