"""Conversations and head steering for the embedded world: turns of two speakers, and a direction signal for the head.

Both are conditions: the turns are in the audio, the direction is given frame by frame. Their visible effects: the mouth moves with
its own voice alone, the head nods with the other's syllables, the eyes look at the other while he speaks, and the head follows
the direction with a lag.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.data.procedural.speech import HOP, REST, SAMPLE_RATE, Speech, smooth

OWN, OTHER, NONE = 0, 1, -1
POSE_DIM = 3  # a row: right and down in [-1, 1], and 1 for "steered"; a dropped pose is zeros
REACH, NOD = 1.5, 1.2  # of a full direction and of the loudest syllable, in units of head_x and head_y
LAG_SECONDS = 0.12  # time constant of the head's motion


def draw_turns(num: int, num_ticks: int, rng: torch.Generator) -> Int[Tensor, "{num} {num_ticks}"]:
    """Who speaks at each tick of 10 ms, [N, K] of OWN, OTHER, NONE: turns of 0.5 to 2 s, pauses of 0.05 to 0.3 s between."""
    ticks_a_second = SAMPLE_RATE // HOP
    count = num_ticks // (ticks_a_second // 2) + 2
    first = torch.randint(0, 2, (num, 1), generator=rng)
    turn = (torch.rand(num, count, generator=rng) * 1.5 + 0.5) * ticks_a_second
    pause = (torch.rand(num, count, generator=rng) * 0.25 + 0.05) * ticks_a_second
    offset = torch.rand(num, 1, generator=rng) * turn[:, :1]  # a clip starts within a turn
    start = (turn + pause).cumsum(1) - turn - pause - offset
    ticks = torch.arange(num_ticks).expand(num, -1).contiguous().to(start)
    index = torch.searchsorted(start.contiguous(), ticks, right=True) - 1
    inside = ticks - start.gather(1, index) < turn.gather(1, index)
    return torch.where(inside, (first + index) % 2, NONE)


def in_turn(voice: Speech, turn: Int[Tensor, "n k"], speaker: int) -> Speech:
    """One speaker's speech, silent and with the mouth at rest outside his turns [N, K]."""
    gate = smooth((turn == speaker).float(), 5)
    gain = torch.nn.functional.interpolate(gate.unsqueeze(1), size=voice.audio.shape[1], mode="linear").squeeze(1)
    opening, width = (
        rest + (shape - rest) * gate for rest, shape in zip(REST, (voice.opening, voice.width), strict=True)
    )
    return Speech(audio=voice.audio * gain, opening=opening, width=width)


def draw_directions(
    num: int, num_frames: int, fps: float, rng: torch.Generator
) -> Float[Tensor, "{num} {num_frames} 3"]:
    """Pose rows [N, T, POSE_DIM]: a direction lasts 0.25 to 1.2 s, a third of them are straight ahead; in half of the clips the
    direction is piecewise constant, in the others it is interpolated."""
    count = int(num_frames / fps / 0.25) + 2
    duration = torch.rand(num, count, generator=rng) * 0.95 + 0.25
    target = torch.rand(num, count + 1, 2, generator=rng) * 2 - 1
    target = target * (torch.rand(num, count + 1, 1, generator=rng) > 1 / 3)
    interpolated = torch.rand(num, 1, 1, generator=rng) < 0.5
    start = duration.cumsum(1) - duration
    time = (torch.arange(num_frames) / fps).expand(num, -1).contiguous()
    index = torch.searchsorted(start.contiguous(), time, right=True) - 1
    share = ((time - start.gather(1, index)) / duration.gather(1, index)).unsqueeze(2)
    here, then = (target.gather(1, (index + i).unsqueeze(2).expand(-1, -1, 2)) for i in (0, 1))
    direction = torch.where(interpolated, here + (then - here) * share, here)
    return torch.cat([direction, torch.ones(num, num_frames, 1)], dim=2)


def follow(target: Float[Tensor, "n t *rest"], fps: float) -> Float[Tensor, "n t *rest"]:
    """Head position for `target` [N, T, ..]: a first-order low-pass with time constant LAG_SECONDS, at rest in frame 0."""
    share = 1 - torch.exp(torch.tensor(-1 / (fps * LAG_SECONDS)))
    place = [torch.zeros_like(target[:, 0])]
    for t in range(1, target.shape[1]):
        place.append(place[-1] + share * (target[:, t] - place[-1]))
    return torch.stack(place, dim=1)


def mirrored(pose: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3"]:
    """The pose rows of a clip's mirror image."""
    return pose * pose.new_tensor([-1.0, 1.0, 1.0])
