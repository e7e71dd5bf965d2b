"""A small Wan2.2-S2V with random weights, and conditions for it."""

from torch import Tensor

from teachers.conditions import Conditions
from teachers.networks.kind import Dims
from teachers.networks.s2v import S2V, S2VConfig
from tests.support.tiny import randn, randomise

CHANNELS, STRIDE, TEXT, STATES, ROW = 4, 4, 16, 3, 5
HEIGHT, WIDTH = 8, 16  # 4 x 8 tokens
AFTER = (0, 2)
SMALL = S2VConfig(
    num_layers=3, num_heads=2, head_dim=24, ffn_dim=48, freq_dim=32, inject_after=AFTER, audio_states=STATES
)
DIMS = Dims(latent_channels=CHANNELS, stride=STRIDE, text_dim=TEXT, audio_dim=STATES * ROW)


def an_s2v_net(seed: int = 3) -> S2V:
    return randomise(SMALL.new(DIMS), seed).eval()


def some_rows(batch: int = 2, frames: int = 3, seed: int = 0) -> Tensor:
    """Random states of the pixel frames of a clip [B, 4 F, STATES, ROW]."""
    return randn(batch, STRIDE * frames, STATES, ROW, seed=seed + 1)


def s2v_conditions(rows: Tensor, motion: int = 0, pose: bool = False, seed: int = 0) -> Conditions:
    """Random conditions with the audio of these rows, and so many latents of motion behind the reference."""
    batch, frames = len(rows), rows.shape[1] // STRIDE
    return Conditions(
        text=randn(batch, 5, TEXT, seed=seed + 4),
        audio=rows.flatten(2).unflatten(1, (frames, STRIDE)),
        anchors=randn(batch, CHANNELS, 1 + motion, HEIGHT, WIDTH, seed=seed + 5),
        pose_latents=randn(batch, CHANNELS, frames, HEIGHT, WIDTH, seed=seed + 6) if pose else None,
    )


def s2v_latents(batch: int = 2, frames: int = 3, seed: int = 0) -> Tensor:
    return randn(batch, CHANNELS, frames, HEIGHT, WIDTH, seed=seed + 11)
