"""What a conversation and a hand on the wheel add to the embedded world: turns of two speakers, and where the head is sent.

Both are conditions: who speaks when is heard, the direction is given frame by frame. What follows of them is visible: the mouth
moves with its own voice alone, the head nods with the other's syllables, the eyes look at the other while he speaks, and the
head goes where it is sent, with a lag.
"""

import torch
from torch import Tensor

from distill.data.procedural.speech import HOP, REST, SAMPLE_RATE, Speech, smooth

OWN, OTHER, NO_ONE = 0, 1, -1
POSE_DIM = 3  # a row: right and down in [-1, 1], and 1 for "steered"; a dropped pose is zeros
REACH, NOD = 1.5, 1.2  # of a full direction and of the loudest syllable, in units of head_x and head_y
LAG_SECONDS = 0.12  # of the head behind what moves it


def draw_turns(num: int, num_ticks: int, rng: torch.Generator) -> Tensor:
    """Who speaks at each tick of 10 ms, [N, K] of OWN, OTHER, NOBODY: turns of 0.5 to 2 s, pauses of 0.05 to 0.3 s between."""
    ticks_a_second = SAMPLE_RATE // HOP
    count = num_ticks // (ticks_a_second // 2) + 2
    first = torch.randint(0, 2, (num, 1), generator=rng)
    turn = (torch.rand(num, count, generator=rng) * 1.5 + 0.5) * ticks_a_second
    pause = (torch.rand(num, count, generator=rng) * 0.25 + 0.05) * ticks_a_second
    begun = torch.rand(num, 1, generator=rng) * turn[:, :1]  # a clip begins within a turn
    start = (turn + pause).cumsum(1) - turn - pause - begun
    ticks = torch.arange(num_ticks).expand(num, -1).contiguous().to(start)
    index = torch.searchsorted(start.contiguous(), ticks, right=True) - 1
    inside = ticks - start.gather(1, index) < turn.gather(1, index)
    return torch.where(inside, (first + index) % 2, NO_ONE)


def in_turn(said: Speech, turn: Tensor, speaker: int) -> Speech:
    """The speech of one of two: silence, and a mouth at rest, while it is not his turn [N, K]."""
    gate = smooth((turn == speaker).float(), 5)
    loud = torch.nn.functional.interpolate(gate.unsqueeze(1), size=said.audio.shape[1], mode="linear").squeeze(1)
    opening, width = (
        rest + (shape - rest) * gate for rest, shape in zip(REST, (said.opening, said.width), strict=True)
    )
    return Speech(audio=said.audio * loud, opening=opening, width=width)


def draw_directions(num: int, num_frames: int, fps: float, rng: torch.Generator) -> Tensor:
    """Pose rows [N, T, POSE_DIM]: a direction is held for 0.25 to 1.2 s, then another, a third of them straight ahead; in half
    of the clips it jumps, in the others it wanders from one to the next."""
    count = int(num_frames / fps / 0.25) + 2
    held = torch.rand(num, count, generator=rng) * 0.95 + 0.25
    target = torch.rand(num, count + 1, 2, generator=rng) * 2 - 1
    target = target * (torch.rand(num, count + 1, 1, generator=rng) > 1 / 3)
    wanders = torch.rand(num, 1, 1, generator=rng) < 0.5
    start = held.cumsum(1) - held
    time = (torch.arange(num_frames) / fps).expand(num, -1).contiguous()
    index = torch.searchsorted(start.contiguous(), time, right=True) - 1
    share = ((time - start.gather(1, index)) / held.gather(1, index)).unsqueeze(2)
    here, then = (target.gather(1, (index + i).unsqueeze(2).expand(-1, -1, 2)) for i in (0, 1))
    direction = torch.where(wanders, here + (then - here) * share, here)
    return torch.cat([direction, torch.ones(num, num_frames, 1)], dim=2)


def follow(target: Tensor, fps: float) -> Tensor:
    """What the head makes of `target` [N, T, ..]: from rest in frame 0 it comes nearer by a constant share every frame."""
    share = 1 - torch.exp(torch.tensor(-1 / (fps * LAG_SECONDS)))
    place = [torch.zeros_like(target[:, 0])]
    for t in range(1, target.shape[1]):
        place.append(place[-1] + share * (target[:, t] - place[-1]))
    return torch.stack(place, dim=1)


def mirrored(pose: Tensor | None) -> Tensor | None:
    """The pose rows of a clip's mirror image."""
    return None if pose is None else pose * pose.new_tensor([-1.0, 1.0, 1.0])
