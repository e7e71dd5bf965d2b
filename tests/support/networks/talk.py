"""A small InfiniteTalk with random weights, and conditions for it."""

import torch
from torch import Tensor

from teachers.conditions import Conditions, pack_rows, side_by_side
from teachers.networks.infinitetalk import InfiniteTalk, InfiniteTalkConfig
from teachers.networks.kind import Dims
from tests.support.tiny import randn, randomise

CHANNELS, STRIDE, TEXT, IMAGE, ROW, WINDOW = 4, 4, 16, 20, 6, 5
HEIGHT, WIDTH = 4, 8  # 2 x 4 tokens
SMALL = InfiniteTalkConfig(
    num_layers=2,
    num_heads=2,
    head_dim=24,
    ffn_dim=48,
    freq_dim=32,
    audio_hidden=16,
    audio_tokens=3,
    audio_width=12,
)


def dims(speakers: int = 1) -> Dims:
    audio = speakers * WINDOW * ROW
    sizes = {"latent_channels": CHANNELS, "stride": STRIDE, "text_dim": TEXT, "image_dim": IMAGE}
    return Dims(**sizes, audio_dim=audio, speakers=speakers)


def a_talk_net(speakers: int = 1, seed: int = 3, config: InfiniteTalkConfig = SMALL) -> InfiniteTalk:
    return randomise(config.new(dims(speakers)), seed).eval()


def windows(rows: Tensor) -> Tensor:
    """Rows [.., T, C] with `WINDOW` neighbours side by side [.., T, WINDOW C], beyond both ends those there."""
    half, last = WINDOW // 2, rows.shape[-2] - 1
    index = (torch.arange(last + 1)[:, None] + torch.arange(-half, half + 1)).clamp(0, last)
    return rows[..., index, :].flatten(-2)


def audio_of(people: Tensor) -> Tensor:
    """Rows [B, P, T, C] as the conditions have them, [B, F, stride, P WINDOW C]."""
    return pack_rows(side_by_side(windows(people)), STRIDE)


def some_people(batch: int = 2, speakers: int = 1, frames: int = 3, seed: int = 0) -> Tensor:
    """Random audio rows [B, P, T, C] of pixel frames, without their neighbours."""
    return randn(batch, speakers, 1 + STRIDE * (frames - 1), ROW, seed=seed + 1)


def some_regions(batch: int = 2) -> Tensor:
    """Regions [B, 2, h, w] on the latent grid: the left half, and the upper right quarter."""
    regions = torch.zeros(batch, 2, HEIGHT, WIDTH)
    regions[:, 0, :, :4], regions[:, 1, :2, 4:] = 1.0, 1.0
    return regions


def talk_conditions(people: Tensor, regions: Tensor | None = None, seed: int = 0) -> Conditions:
    """Random conditions with the audio of these rows [B, P, T, C]."""
    batch, frames = len(people), 1 + (people.shape[2] - 1) // STRIDE
    mask = torch.zeros(batch, STRIDE, frames, HEIGHT, WIDTH)
    mask[:, :, 0] = 1.0
    given = randn(batch, CHANNELS, frames, HEIGHT, WIDTH, seed=seed + 2)
    return Conditions(
        text=randn(batch, 5, TEXT, seed=seed + 4),
        audio=audio_of(people),
        image=randn(batch, 7, IMAGE, seed=seed + 5),
        beside=torch.cat([mask, given], dim=1),
        reference=randn(batch, CHANNELS, 1, HEIGHT, WIDTH, seed=seed + 6),
        regions=regions,
    )


def talk_latents(batch: int = 2, frames: int = 3, seed: int = 0) -> Tensor:
    return randn(batch, CHANNELS, frames, HEIGHT, WIDTH, seed=seed + 11)


def stream(student, x, sigma, given, clean, planned: bool = True, cache: str = "value") -> Tensor:
    """x0 of noisy x [B, C, F, H, W] at sigma [B, chunks], chunk by chunk, each behind the clean ones before it."""
    n = student.spec.chunk_frames
    state, out = student.open(given.text, cache), []
    for i in range(x.shape[2] // n):
        part, frames = given.frames(i * n, (i + 1) * n), slice(i * n, (i + 1) * n)
        plan = student.plan(state, part) if planned else None
        out.append(student.denoise(state, plan, x[:, :, frames], sigma[:, i], part)[0])
        state = student.commit(state, clean[:, :, frames], part, plan=plan)
    return torch.cat(out, dim=2)
