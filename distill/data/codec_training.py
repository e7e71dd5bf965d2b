"""MIDAS' three-stage training of a video codec (2508.19320): images, the temporal modules alone, all of it on short windows."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from teachers.checkpoints.strict import load_strict
from teachers.codecs.dc_ae import DCAE, DCAEConfig, load_dc_ae
from teachers.codecs.linear import to_float
from teachers.disk.digests import written
from teachers.errors import UserError
from teachers.files import atomic_write, load_tensors, save_tensors
from teachers.flow import keyed_generator
from teachers.registry import Codec

STAGES = ("images", "temporal", "windows")
SCALES = (1, 2, 4)
WARMUP = 20


def fit_codec(
    config: DCAEConfig,
    clips: Iterable[Tensor],
    held_out: UInt8[Tensor, "n 3 t h w"],
    seed: int,
    folder: Path,
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """Write codec.safetensors, and codec.json with the scores of each stage on the clips `held_out`, which it returns.

    Clips are uint8 [N, 3, T, H, W]. A stage that finished before a kill is not trained again; stages have random generators of
    their own, so the codec is the same. Raises UserError where a loss is not finite.
    """
    codec, scores = _start(config, seed), {}
    files = [folder / f"codec-{stage}.safetensors" for stage in STAGES]
    video = None
    for number, (stage, file) in enumerate(zip(STAGES, files, strict=True)):
        if not file.is_file():
            video = torch.cat(list(clips)) if video is None else video
            if number:
                _load(codec, files[number - 1])
            _train(codec.to(device), config, number, video, seed)
            if number == len(STAGES) - 1:
                _normalise(codec, video)
            save_tensors(file, codec.state_dict())
        _load(codec, file)
        scores[stage] = measure(codec.to(device), held_out)
    atomic_write(folder / "codec.json", json.dumps(scores, indent=1) + "\n")
    files[-1].rename(folder / "codec.safetensors")
    written(folder / "codec.safetensors")
    for file in files[:-1]:
        file.unlink()
    return scores


def _load(codec: DCAE, file: Path) -> None:
    load_strict(codec, load_tensors(file), file, "delete it and run again")


def _start(config: DCAEConfig, seed: int) -> DCAE:
    """The published image codec of `config.path`, or an untrained one."""
    if config.path is not None:
        return load_dc_ae(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_generator(seed, "codec").initial_seed())
        return DCAE(config).eval()


def set_trained(codec: DCAE, number: int) -> list[torch.nn.Parameter]:
    """Freeze all but what stage `number` trains (the image codec, the temporal modules, both) and return its parameters."""
    for part, numbers in ((codec.network, (0, 2)), (codec.temporal, (1, 2))):
        part.requires_grad_(number in numbers)
    return [parameter for parameter in codec.parameters() if parameter.requires_grad]


def _train(codec: DCAE, config: DCAEConfig, number: int, video: Tensor, seed: int) -> None:
    """Train one stage by AdamW with a linear warm-up and a cosine decay to 0."""
    fit, stage = config.fit, STAGES[number]
    rng, steps = keyed_generator(seed, "codec", stage), fit.steps[number]
    optimizer = torch.optim.AdamW(set_trained(codec, number), lr=fit.lr[number], betas=(0.9, 0.99), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / max(steps, 1))) / 2
    )
    bar = tqdm(range(steps), desc=f"codec {stage}")
    for step in bar:
        clip = windows(video, fit.batch, 1 if number == 0 else fit.window, rng).to(codec.mean.device)
        if number == 0:
            output = codec.network(clip[:, :, 0]).sample.unsqueeze(2)
        else:
            output = codec.decode_raw(codec.encode_raw(clip)[0])[0]
        loss = multiscale(output, clip)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        scheduler.step()
        if step % 20 == 0:
            if not bool(loss.isfinite()):
                raise UserError(f"codec.fit: the loss is {float(loss)} at step {step} of {stage}; lower codec.fit.lr")
            bar.set_postfix(
                loss=f"{float(loss.detach()):.4f}", psnr=f"{psnr(output.detach(), clip):.1f}", refresh=False
            )
    codec.requires_grad_(False)


def windows(
    video: UInt8[Tensor, "n 3 t h w"], num_frames: int, window: int, rng: torch.Generator
) -> Float[Tensor, "m 3 u h w"]:
    """`num_frames` frames in random windows of the clips uint8 [N, 3, T, H, W], half of them mirrored: [n, 3, window, H, W] in
    [-1, 1]; of a shorter clip all frames."""
    window = min(window, video.shape[2])
    count = max(1, num_frames // window)
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
def _normalise(codec: DCAE, video: Tensor, num: int = 256) -> None:
    """Mean and deviation of each latent channel over the first `num` clips, stored in the codec."""
    raw = [codec.encode_raw(to_float(part).to(codec.mean.device))[0] for part in video[:num].split(32)]
    values = torch.cat(raw).transpose(0, 1).flatten(1)
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
