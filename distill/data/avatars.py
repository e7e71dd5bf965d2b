"""The embedded world as training data: resumable shards of latents and features, and fresh held-out clips on demand."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from distill.data import world
from distill.data.world import Clips, DataConfig
from distill.engine import Engine
from distill.methods import Batch
from distill.run_folder import load_tensors, save_tensors
from teachers.codecs import CodecConfig, EigenCodec, to_float, to_uint8
from teachers.conditions import Conditions, pack_rows
from teachers.flow import keyed_generator
from teachers.kinds import Codec, Ears, Text
from teachers.senses import TextConfig, TextEncoder

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Senses:
    """Everything that turns clips into tensors for a network: codec, ears, text encoder (all frozen).

    They work on `device`; what they give lies on the CPU. `reference`: the first latent of a clip is given to the network;
    `negative`: the prompt in the place of a dropped text.
    """

    codec: Codec
    ears: Ears
    text: Text
    reference: bool = True
    negative: str | None = None
    device: torch.device = CPU

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """uint8 [N, 3, T, H, W] -> latents fp32 [N, C, F, h, w]."""
        return self.codec.encode(to_float(video.to(self.device))).float().cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, C, F, h, w] -> uint8 [N, 3, T, H, W]."""
        return to_uint8(self.codec.decode(latents.to(self.device))).cpu()

    @torch.no_grad()
    def conditions(self, audio: Tensor, text: list[str], reference: Tensor, num_frames: int) -> Conditions:
        """audio [N, S]; reference latents [N, C, 1, h, w]; num_frames pixel frames."""
        rows = self.ears(audio.to(self.device), 0, num_frames).float().cpu()
        packed = pack_rows(rows, self.codec.config.stride)
        given = reference if self.reference else None
        return Conditions(text=self.read(text), audio=packed, reference=given, negative=self.negatives(len(text)))

    @torch.no_grad()
    def read(self, text: list[str]) -> Tensor:
        """Token features fp32 [N, L, D]."""
        return self.text(text).float().cpu()

    def negatives(self, count: int) -> Tensor | None:
        """Features [N, L, D] of the negative prompt, None without one."""
        return None if self.negative is None else self.read([self.negative]).expand(count, -1, -1)

    def of_clips(self, clips: Clips) -> tuple[Tensor, Conditions]:
        """Latents and conditions of whole clips."""
        x0 = self.encode(clips.video)
        return x0, self.conditions(clips.audio, clips.text, x0[:, :, :1], clips.video.shape[2])


@dataclass(frozen=True)
class Pool:
    """The training set in memory: x0 fp16 [N, C, F, h, w], audio rows [N, F, stride, A], text features [N, L, D], and features
    [1, L, D] of the negative prompt where there is one."""

    x0: Tensor
    audio: Tensor
    text: Tensor
    negative: Tensor | None = None
    reference: bool = True

    def __len__(self) -> int:
        return self.x0.shape[0]

    def batch(self, rows: Tensor, device: torch.device | str = "cpu") -> Batch:
        x0 = self.x0[rows].float()
        negative = None if self.negative is None else self.negative.expand(len(rows), -1, -1)
        given = x0[:, :, :1] if self.reference else None
        conditions = Conditions(text=self.text[rows], audio=self.audio[rows], reference=given, negative=negative)
        return Batch(conditions=conditions.to(device), x0=x0.to(device))


def held_out(config: DataConfig, seed: int, name: str, num: int, motion: int = 0) -> Clips:
    """`num` fresh clips of the world named `name`; another `motion` is the same conditions with other nuisance."""
    asked = world.draw_conditions(config.world, num, keyed_generator(seed, "asked", name))
    return world.make_clips(config.world, asked, keyed_generator(seed, "motion", name, motion))


def prepare(config: DataConfig, seed: int, folder: Path, engine: Engine) -> dict:
    """Write codec and text encoder, where they are fitted, and training shards; what is there is not made again. Shards are
    split over processes."""
    size, total = config.world.shard_clips, config.world.num_train
    num_shards = -(-total // size)
    first = held_out(config, seed, "train/0", min(size, total))
    if engine.is_main:
        if isinstance(config.codec, CodecConfig) and not (folder / "codec.safetensors").is_file():
            codec = EigenCodec(config.codec, *config.world.size).fit(to_float(first.video))
            save_tensors(folder / "codec.safetensors", codec.state_dict())
        if isinstance(config.text, TextConfig) and not (folder / "text" / "done").is_file():
            fit_text(config, config.text, first, keyed_generator(seed, "text")).save(folder / "text")
            (folder / "text" / "done").touch()
    engine.barrier()
    senses = load_senses(config, folder, device=engine.device)
    mine = [i for i in range(num_shards) if i % engine.world_size == engine.rank]
    for i in tqdm(mine, desc="data", disable=not engine.is_main):
        file = folder / f"shard-{i:05d}.safetensors"
        if file.is_file():
            continue
        clips = first if i == 0 else held_out(config, seed, f"train/{i}", min(size, total - i * size))
        both = []
        for video in (clips.video, clips.video.flip(-1)):
            x0, conditions = senses.of_clips(Clips(video=video, audio=clips.audio, text=clips.text, labels={}))
            both.append((x0.half(), conditions.audio, conditions.text))
        x0, audio, text = (torch.cat(part) for part in zip(*both, strict=True))
        save_tensors(file, {"x0": x0, "audio": audio, "text": text})
    engine.barrier()
    negative = senses.negatives(1)
    if engine.is_main and negative is not None:
        save_tensors(folder / "negative.safetensors", {"text": negative})
    engine.barrier()
    original = to_float(first.video[:64])
    error = (to_float(senses.decode(senses.encode(first.video[:64]))) - original).square().mean() / 4
    return {"clips": 2 * total, "codec_psnr_db": float(-10 * torch.log10(error))}


def load_senses(config: DataConfig, folder: Path, reference: bool = True, device: torch.device = CPU) -> Senses:
    """Codec, ears and text encoder of a finished data stage, on `device`."""
    codec = config.codec.load(folder, *config.world.size)
    ears, text = config.audio.load(world.samples_per_frame(config.world)), config.text.load(folder)
    for part in (codec, ears, text):
        part.to(device)
    return Senses(codec, ears, text, reference, config.negative, device)


def load_pool(folder: Path, reference: bool = True) -> Pool:
    """All shards of a finished data stage."""
    parts = [load_tensors(file) for file in sorted(folder.glob("shard-*.safetensors"))]
    whole = {key: torch.cat([part[key] for part in parts]) for key in ("x0", "audio", "text")}
    file = folder / "negative.safetensors"
    return Pool(**whole, negative=load_tensors(file)["text"] if file.is_file() else None, reference=reference)


def fit_text(config: DataConfig, size: TextConfig, clips: Clips, rng: torch.Generator) -> TextEncoder:
    """Tokenizer and text encoder, taught to tell what the world's texts mean (expression and gesture, words dropped at random)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.initial_seed())
        encoder = TextEncoder.build(size, clips.text)
        heads = nn.ModuleDict(
            {
                "expression": nn.Linear(size.dim, len(world.EXPRESSIONS)),
                "gesture": nn.Linear(size.dim, len(world.GESTURES)),
            }
        )
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=3e-3)
    for _ in range(config.text_steps):
        rows = torch.randint(0, len(clips.text), (32,), generator=rng)
        said = []
        for i in rows.tolist():
            words = clips.text[i].split()
            keep = torch.rand(len(words), generator=rng) > 0.05
            said.append(" ".join(word for word, kept in zip(words, keep.tolist(), strict=True) if kept))
        pooled = encoder(said).mean(dim=1)
        losses = [nn.functional.cross_entropy(heads[name](pooled), clips.labels[name][rows]) for name in heads]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return encoder.eval().requires_grad_(False)
