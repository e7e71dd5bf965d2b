"""Training of a codec on the clips, in stages: MIDAS' three for DC-AE (2508.19320: images, the temporal modules alone, all of it on
short windows); of the convolutional codec, then of its decoder alone."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from teachers.checkpoints.strict import load_strict
from teachers.codecs.convolutional import ConvCodec, ConvCodecConfig
from teachers.codecs.dc_ae import DCAE, DCAEConfig, load_dc_ae
from teachers.codecs.linear import to_float
from teachers.disk.digests import written
from teachers.errors import UserError
from teachers.files import atomic_write, load_tensors, save_tensors
from teachers.flow import keyed_generator
from teachers.registry import Codec

SCALES = (1, 2, 4)
WARMUP = 20
SAVE_EVERY = 200  # steps between two states of a stage
LATENT_PENALTY = 1e-3  # of the mean square of the convolutional codec's latents, which keeps their scale

TrainableConfig = DCAEConfig | ConvCodecConfig
"""Codecs that are trained; the linear one is fitted in closed form."""


@dataclass(frozen=True)
class Stage:
    """`steps` of AdamW at `lr` on `parameters`; loss(frames in [-1, 1] [B, 3, T, H, W], generator) -> loss and reconstruction.
    `windows`: how many of how many frames a step takes."""

    name: str
    steps: int
    lr: float
    windows: tuple[int, int]
    parameters: Sequence[torch.nn.Parameter]
    loss: Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]


def shards_for(config: TrainableConfig) -> int:
    """Training shards that a codec is trained on. UserError where it has neither weights nor training."""
    if isinstance(config, DCAEConfig):
        return config.fit.shards
    if config.train is None:
        raise UserError(
            "data.codec: conv has no weights; give path=FOLDER, or train.num_steps to train it on the clips"
        )
    return config.train.shards


def fit_codec(
    config: TrainableConfig,
    clips: Iterable[Tensor],
    held_out: UInt8[Tensor, "n 3 t h w"],
    seed: int,
    folder: Path,
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """Write codec.safetensors, and codec.json with the scores of each stage on the clips `held_out`, which it returns.

    Clips are uint8 [N, 3, T, H, W]. A run that is killed goes on from its last state with the same result. Raises UserError where a
    loss is not finite.
    """
    codec, scores = _start(config, seed).to(device), {}
    names = [stage.name for stage in _stages(codec)]
    files = [folder / f"codec-{name}.safetensors" for name in names]
    video = None
    for number, (name, file) in enumerate(zip(names, files, strict=True)):
        if not file.is_file():
            video = torch.cat(list(clips)) if video is None else video
            if number:
                _load(codec, files[number - 1])
            stage = _stages(codec)[number]
            _train(codec, stage, video, seed, file.with_suffix(".state"))
            if number == len(names) - 1 and names != ["decoder"]:  # which leaves the latents as they are
                _normalise(codec, video)
            save_tensors(file, codec.state_dict())
        _load(codec, file)
        scores[name] = measure(codec, held_out)
    atomic_write(folder / "codec.json", json.dumps(scores, indent=1) + "\n")
    files[-1].rename(folder / "codec.safetensors")
    written(folder / "codec.safetensors")
    for file in files:
        file.unlink(missing_ok=True)
        file.with_suffix(".state").unlink(missing_ok=True)
    return scores


def _load(codec: torch.nn.Module, file: Path) -> None:
    load_strict(codec, load_tensors(file), file, "delete it and run again")


def _start(config: TrainableConfig, seed: int) -> Any:
    """What `config.path` holds (DC-AE: the published image codec), or an untrained one."""
    if config.path is not None:
        return load_dc_ae(config) if isinstance(config, DCAEConfig) else config.load(config.path, 0, 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_generator(seed, "codec").initial_seed())
        return (DCAE(config) if isinstance(config, DCAEConfig) else ConvCodec(config)).eval()


def _stages(codec: DCAE | ConvCodec) -> list[Stage]:
    """What a codec is trained by."""
    if isinstance(codec, ConvCodec):
        fit = codec.config.train
        assert fit is not None

        def reconstruct(clip: Tensor, rng: torch.Generator, encode: bool = True) -> tuple[Tensor, Tensor]:
            with torch.autocast(clip.device.type, torch.bfloat16, enabled=fit.precision == "bf16"):
                with torch.set_grad_enabled(encode):
                    raw = codec.encode_raw(clip)
                noise = torch.randn(raw.shape, generator=rng).to(raw.device)
                output = codec.decode_raw(raw + fit.noise * noise)[:, :, codec.config.stride - 1 :].float()
            return multiscale(output, clip) + LATENT_PENALTY * raw.float().square().mean(), output

        size = (fit.batch, 1 + codec.config.stride * (fit.window - 1))
        decoder = [*codec.decoder.parameters(), *codec.frame_decoder.parameters()]
        both = [
            Stage("reconstruction", fit.num_steps, fit.lr, size, list(codec.parameters()), reconstruct),
            Stage("decoder", fit.decoder_steps, fit.lr, size, decoder, partial(reconstruct, encode=False)),
        ]
        return [stage for stage in both if stage.steps]

    def images(clip: Tensor, _: torch.Generator) -> tuple[Tensor, Tensor]:
        output = codec.network(clip[:, :, 0]).sample.unsqueeze(2)
        return multiscale(output, clip), output

    def clips(clip: Tensor, _: torch.Generator) -> tuple[Tensor, Tensor]:
        output = codec.decode_raw(codec.encode_raw(clip)[0])[0]
        return multiscale(output, clip), output

    fit, image, time = codec.config.fit, list(codec.network.parameters()), list(codec.temporal.parameters())
    size = (max(1, fit.batch // fit.window), fit.window)
    parts = zip(("images", "temporal", "windows"), fit.steps, fit.lr, (image, time, image + time), strict=True)
    return [
        Stage(
            name, steps, lr, (fit.batch, 1) if name == "images" else size, part, images if name == "images" else clips
        )
        for name, steps, lr, part in parts
    ]


def _train(codec: Any, stage: Stage, video: Tensor, seed: int, state_file: Path) -> None:
    """Train one stage by AdamW with a linear warm-up and a cosine decay to 0; its state is written every SAVE_EVERY steps."""
    codec.requires_grad_(False)
    for parameter in stage.parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(stage.parameters, lr=stage.lr, betas=(0.9, 0.99), weight_decay=0.0)
    first = _resume(codec, optimizer, state_file) if state_file.is_file() else 0
    device = next(codec.parameters()).device
    bar = tqdm(range(first, stage.steps), f"codec {stage.name}", stage.steps, initial=first, mininterval=1.0)
    for step in bar:
        rng = keyed_generator(seed, "codec", stage.name, step)
        factor = min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / stage.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * factor
        clip = windows(video, *stage.windows, rng).to(device)
        loss, output = stage.loss(clip, rng)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stage.parameters, 1.0)
        optimizer.step()
        if step % 20 == 0:
            value = float(loss.detach())
            if not math.isfinite(value):
                raise UserError(f"data.codec: the loss is {value} at step {step} of {stage.name}; lower its lr")
            bar.set_postfix(loss=f"{value:.4f}", psnr=f"{psnr(output.detach(), clip):.1f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0 and step + 1 < stage.steps:
            _save(codec, optimizer, step + 1, state_file)
    codec.requires_grad_(False)


def _save(codec: Any, optimizer: torch.optim.AdamW, step: int, file: Path) -> None:
    tensors = {f"codec.{name}": value for name, value in codec.state_dict().items()}
    for number, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{number}.{name}": value for name, value in moments.items()}
    save_tensors(file, tensors | {"steps": torch.tensor(step)})


def _resume(codec: Any, optimizer: torch.optim.AdamW, file: Path) -> int:
    """The number of steps that are done; codec and moments as they were then."""
    tensors = load_tensors(file)
    step = int(tensors.pop("steps"))
    own = {name.removeprefix("codec."): value for name, value in tensors.items() if name.startswith("codec.")}
    load_strict(codec, own, file, "delete it and run again")
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("adam."):
            number, key = name.removeprefix("adam.").split(".")
            moments.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    return step


def windows(
    video: UInt8[Tensor, "n 3 t h w"], count: int, window: int, rng: torch.Generator
) -> Float[Tensor, "m 3 u h w"]:
    """`count` random windows of the clips uint8 [N, 3, T, H, W], half of them mirrored: [count, 3, window, H, W] in [-1, 1]; of a
    shorter clip all frames."""
    window = min(window, video.shape[2])
    rows = torch.randint(0, len(video), (count,), generator=rng).tolist()
    starts = torch.randint(0, video.shape[2] - window + 1, (count,), generator=rng).tolist()
    mirrored = torch.rand(count, generator=rng) < 0.5
    clips = torch.stack([video[row, :, start : start + window] for row, start in zip(rows, starts, strict=True)])
    return torch.where(mirrored.view(-1, 1, 1, 1, 1), to_float(clips.flip(-1)), to_float(clips))


def multiscale(output: Float[Tensor, "b 3 t h w"], real: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, ""]:
    """Mean absolute and squared error of [B, 3, T, H, W] at full, half and quarter size (no perceptual network)."""
    output, real = (part.transpose(1, 2).flatten(0, 1) for part in (output, real))
    losses = []
    for scale in SCALES:
        error = functional.avg_pool2d(output - real, scale)
        losses.append(error.abs().mean() + error.square().mean())
    return torch.stack(losses).mean()


@torch.no_grad()
def _normalise(codec: Any, video: Tensor, num: int = 256) -> None:
    """Mean and deviation of each latent channel over the first `num` clips, stored in the codec."""
    raw = [codec.encode_raw(to_float(part).to(codec.mean.device)) for part in video[:num].split(32)]
    values = torch.cat([part[0] if isinstance(part, tuple) else part for part in raw]).transpose(0, 1).flatten(1)
    codec.mean.copy_(values.mean(dim=1))
    codec.std.copy_(values.std(dim=1).clamp_min(1e-6))


def psnr(output: Float[Tensor, "*shape"], real: Float[Tensor, "*shape"]) -> float:
    """Peak signal-to-noise ratio in dB of videos in [-1, 1], at most 106."""
    return float(-10 * torch.log10((output - real).square().mean().clamp_min(1e-10) / 4))


@torch.no_grad()
def measure(codec: Codec, video: Tensor) -> dict[str, float]:
    """`psnr_db` of clips uint8 [N, 3, T, H, W] after encode and decode, and `flicker`: the root mean square error of the
    differences between successive frames, in levels of 0..255."""
    pairs = []
    for part in video.split(16):
        real = to_float(part).to(next(iter(codec.state_dict().values())).device)
        pairs.append((codec.decode(codec.encode(real)), real))
    output, real = (torch.cat([pair[i] for pair in pairs]) for i in (0, 1))
    flicker = (output - real).diff(dim=2).square().mean().sqrt()
    return {"psnr_db": psnr(output, real), "flicker": float(127.5 * flicker)}
