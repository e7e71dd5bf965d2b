"""Training of the embedded extractors on the procedural world; all randomness comes from one generator."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from eval.embedded.extractors import (
    DIM,
    MOUTH,
    TEMPOS,
    AudioProbe,
    ClipProbe,
    FrameProbe,
    Probes,
    Progress,
    as_float,
    blur,
    change_map,
)
from eval.embedded.protocol import EvalConfig
from teachers.errors import UserError

Network = TypeVar("Network", bound=nn.Module)
CLIP_BATCH = 64
CLIP_ROWS = 448  # clips whose frame features are cached for the clip probe
NOISE = 0.2  # standard deviation of the strongest added noise, in units where pixels span 2
NO_IDENTITY = {"identity_mean": torch.zeros(0), "identity_std": torch.ones(0)}
WEIGHTS = {"mouth_open": 2.0, "mouth_width": 4.0}  # all other per-frame labels count once


def fit(
    video: UInt8[Tensor, "n 3 t h w"],
    labels: Mapping[str, Tensor],
    audio_features: Float[Tensor, "m u a"],
    config: EvalConfig,
    generator: torch.Generator,
    progress: Progress | None = None,
    degraded_video: UInt8[Tensor, "n 3 t h w"] | None = None,
    device: torch.device | str = "cpu",
) -> Probes:
    """Train all three probes on real clips and their codec-decoded copies, both blurred and noised.

    Clips stay where they are, batches are computed on `device`. The result is a function of `generator`, which is the CPU's,
    and of the device. labels: every float [N, T] is read a frame; `expression` and
    `gesture` [N] long, `identity` [N, I] float. Clips without all of these and the mouth's have none of them.
    Raises UserError when labels are missing or counts do not agree.
    """
    names = _label_names(video, labels, audio_features)
    num = [int(labels[key].max()) + 1 if key in labels else 0 for key in ("expression", "gesture")]
    per_frame = torch.stack([labels[name].float() for name in names], dim=2)
    scales = {
        **_scale("label", per_frame),
        **(_scale("identity", labels["identity"].float()) if "identity" in labels else NO_IDENTITY),
        **_scale("audio", audio_features.float()),
    }
    frame = _build(lambda: FrameProbe(len(names), num[0], scales["identity_mean"].shape[0]), generator)
    clip = _build(lambda: ClipProbe(len(names), num[1]), generator)
    audio_probe = _build(lambda: AudioProbe(audio_features.shape[2]), generator)
    probes = Probes(frame, clip, audio_probe, names, scales).to(device)
    sources = (video, video if degraded_video is None else degraded_video)
    labels, audio_features = {name: value.to(device) for name, value in labels.items()}, audio_features.to(device)
    targets = (per_frame.to(device) - probes.scales["label_mean"]) / probes.scales["label_std"]
    if probes.knows_mouth:
        _train(audio_probe, _audio_loss(probes, audio_features, targets, generator), config, 0, progress)
    _train(frame, _frame_loss(probes, sources, labels, targets, config.probe_batch, generator), config, 1, progress)
    _train(clip, _clip_loss(probes, sources, labels, targets, generator), config, 2, progress)
    return probes


def _label_names(video: Tensor, labels: Mapping[str, Tensor], audio_features: Tensor) -> tuple[str, ...]:
    num, frames, height, width = video.shape[0], *video.shape[2:]
    wanted = (*MOUTH, "expression", "gesture", "identity")
    missing = [key for key in wanted if key not in labels]
    if missing and (len(missing) < len(wanted) or not labels):
        raise UserError(
            f"the probes need the label {missing[0]}: the clips have {', '.join(sorted(labels))}; render it"
        )
    if height % 16 or width % 16:
        raise UserError(f"the embedded probes need sides in multiples of 16: got {height}x{width}; choose 32 or 64")
    if audio_features.shape[:2] != (num, frames):
        got = tuple(audio_features.shape[:2])
        raise UserError(f"the probes need one audio row a pixel frame: got {got} for {num} clips of {frames} frames")
    per_frame = (
        key for key, value in labels.items() if key not in ("identity", "expression", "gesture") and value.ndim == 2
    )
    return tuple(sorted(per_frame))


def _scale(name: str, values: Tensor) -> dict[str, Tensor]:
    flat = values.flatten(0, -2)
    return {f"{name}_mean": flat.mean(0), f"{name}_std": flat.std(0).clamp_min(1e-3)}


def _build(make: Callable[[], Network], rng: torch.Generator) -> Network:
    """Construct on the meta device (no global randomness), then sample He-normal weights from `rng`."""
    with torch.device("meta"):
        network = make()
    network = network.to_empty(device="cpu")
    for layer in network.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear):
            fan_in = layer.weight[0].numel()
            layer.weight.data.normal_(0, (2 / fan_in) ** 0.5, generator=rng)
            if layer.bias is not None:
                layer.bias.data.zero_()
        elif isinstance(layer, nn.BatchNorm2d | nn.LayerNorm):
            layer.reset_parameters()
    for name, layer in network.named_children():
        if name == "heads" and isinstance(layer, nn.Linear):
            layer.weight.data.mul_(0.1)
    return network


def _train(
    network: nn.Module, loss: Callable[[], Tensor], config: EvalConfig, part: int, progress: Progress | None
) -> None:
    """AdamW on one cosine with a short warm-up, the same for each network; `part` of 3 is this one."""
    steps = config.probe_steps
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.probe_lr, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.probe_lr, total_steps=steps + 1, pct_start=0.15)
    for step in range(steps):
        value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 2.0)
        optimizer.step()
        schedule.step()
        if progress is not None and (step + 1) % 25 == 0:
            progress(part * steps + step + 1, float(value.detach()))
    network.eval().requires_grad_(False)


def _frame_loss(probes, sources, labels, targets: Tensor, batch: int, rng: torch.Generator) -> Callable[[], Tensor]:
    num, frames, num_labels = targets.shape
    identity = None
    if "identity" in labels:
        identity = (labels["identity"].float() - probes.scales["identity_mean"]) / probes.scales["identity_std"]
    weights = torch.tensor([WEIGHTS.get(name, 1.0) for name in probes.names], device=targets.device)
    probes.frame.to(memory_format=torch.channels_last)

    def loss() -> Tensor:
        source = torch.randint(2, (batch,), generator=rng)
        clip = torch.randint(num, (batch,), generator=rng)
        time = torch.randint(frames, (batch,), generator=rng)
        natural, decoded = (one[clip, :, time] for one in sources)
        chosen = torch.where((source == 0)[:, None, None, None], natural, decoded)
        shown, quality = _degrade(as_float(chosen.to(targets.device)), rng)
        clip, time = clip.to(targets.device), time.to(targets.device)
        _, read, expression, who, degraded = probes.frame(shown.contiguous(memory_format=torch.channels_last))
        value = (weights * F.mse_loss(read, targets[clip, time], reduction="none")).sum() / (batch * num_labels)
        if "expression" in labels:
            late = (time >= frames // 3).float()  # the expression fades in after the portrait
            named = F.cross_entropy(expression, labels["expression"][clip], reduction="none")
            value = value + 0.2 * (named * late).mean()
        if identity is not None:
            value = value + 0.4 * F.mse_loss(who, identity[clip])
        return value + 0.5 * F.mse_loss(degraded, quality)

    return loss


def _audio_loss(probes, audio_features: Tensor, targets: Tensor, rng: torch.Generator) -> Callable[[], Tensor]:
    scaled = (audio_features.float() - probes.scales["audio_mean"]) / probes.scales["audio_std"]
    target = targets[:, :, [probes.names.index(name) for name in MOUTH]]

    def loss() -> Tensor:
        rows = torch.randint(len(scaled), (CLIP_BATCH,), generator=rng).to(scaled.device)
        return F.mse_loss(probes.audio_probe(scaled[rows])[:, 1:], target[rows, 1:])  # frame 0 is the reference

    return loss


def _clip_loss(probes, sources, labels, targets: Tensor, rng: torch.Generator) -> Callable[[], Tensor]:
    """Speeds and known gestures on natural clips; shuffled, frozen and flickering copies classified, 3 of 8 in a batch."""
    num = min(len(targets), CLIP_ROWS)
    natural, corrupt = _sequences(probes, [source[:num] for source in sources], rng)
    speed = targets.diff(dim=1).abs().mean(1)
    tempo = torch.arange(CLIP_BATCH, device=targets.device) % 8
    tempo = torch.where(tempo < len(TEMPOS), tempo, 0)
    is_natural = (tempo == 0).float()

    def loss() -> Tensor:
        rows = torch.randint(num, (CLIP_BATCH,), generator=rng).to(targets.device)
        variant = torch.randint(len(natural), (CLIP_BATCH,), generator=rng).to(targets.device)
        broken = corrupt[(tempo - 1).clamp_min(0), rows]
        sequence = torch.where((tempo == 0)[:, None, None], natural[variant, rows], broken)
        _, gesture, seen_tempo, seen_speed = probes.clip(sequence)
        drift = F.mse_loss(seen_speed, speed[rows], reduction="none").mean(1)
        if "gesture" in labels:
            drift = F.cross_entropy(gesture, labels["gesture"][rows], reduction="none") + drift
        return (is_natural * drift).mean() + 0.3 * F.cross_entropy(seen_tempo, tempo)

    return loss


@torch.inference_mode()
def _sequences(probes, sources, rng: torch.Generator, rows: int = 48) -> tuple[Tensor, Tensor]:
    """Inputs of the clip probe: natural [4, N, T, C], corrupt [3 tempos, N, T, C] (real and decoded in turn)."""
    naturals, corrupts = [], []
    for turn, parts in enumerate(zip(*(source.split(rows) for source in sources), strict=True)):
        variants = []
        for part in parts:
            clips = as_float(part.to(probes.device))
            amount = torch.rand(len(clips), 1, 2, generator=rng) * (torch.rand(len(clips), 1, 2, generator=rng) < 0.5)
            degraded = _degrade_clips(clips, 0.6 * amount.expand(-1, clips.shape[2], -1), rng)
            variants += [_embed(probes, clips), _embed(probes, degraded)]
        naturals.append(torch.stack(variants))
        clips, features = as_float(parts[turn % 2].to(probes.device)), variants[2 * (turn % 2)][..., :DIM]
        num, frames = features.shape[:2]
        order = torch.rand(num, frames, generator=rng).argsort(1).to(probes.device)
        held = torch.randint(frames, (num, 1), generator=rng).to(probes.device).expand(-1, frames)
        flicker = _degrade_clips(clips, torch.rand(num, frames, 2, generator=rng), rng)
        corrupts.append(
            torch.stack([_retime(clips, features, order), _retime(clips, features, held), _embed(probes, flicker)])
        )
    return torch.cat(naturals, dim=1), torch.cat(corrupts, dim=1)


def _retime(clips: Tensor, features: Tensor, times: Tensor) -> Tensor:
    """Sequence of clips whose frames are shown at times [N, T]."""
    shown = clips.gather(2, times[:, None, :, None, None].expand_as(clips))
    return torch.cat((features.gather(1, times[:, :, None].expand_as(features)), change_map(shown)), dim=2)


def _embed(probes, clips: Tensor) -> Tensor:
    flat = clips.transpose(1, 2).flatten(0, 1)
    features = probes.frame(flat)[0].unflatten(0, (clips.shape[0], clips.shape[2]))
    return torch.cat((features, change_map(clips)), dim=2)


def _degrade(frames: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Half the frames partly blurred, half noised -> (frames, quality [N, 2]: blur 0..1, noise 0..1)."""
    amount = torch.rand(len(frames), 2, generator=rng) * (torch.rand(len(frames), 2, generator=rng) < 0.5)
    return _corrupt(frames, amount, rng), amount.to(frames.device)


def _degrade_clips(clips: Tensor, amount: Tensor, rng: torch.Generator) -> Tensor:
    """Clips [N, 3, T, H, W] degraded frame by frame with amount [N, T, 2]."""
    flat = _corrupt(clips.transpose(1, 2).flatten(0, 1), amount.flatten(0, 1), rng)
    return flat.unflatten(0, amount.shape[:2]).transpose(1, 2)


def _corrupt(frames: Tensor, amount: Tensor, rng: torch.Generator) -> Tensor:
    noise = torch.randn(frames.shape, generator=rng).to(frames.device)
    amount = amount.to(frames.device)
    noise = noise * (NOISE * amount[:, 1, None, None, None])
    return frames + amount[:, 0, None, None, None] * (blur(frames) - frames) + noise
