"""Two minutes in a maze: sessions of a `midas_world` student whose keys are pushed live, beside the true views of the renderer.

    python benchmarks/lab/midas_world.py STUDENT [--streams 4] [--seconds 120] [--memoryless STUDENT] [--out FILE] [--frames PNG]

Every stream has a maze of its own and walks laps in it: a full turn to the right, ahead and back again, a full turn to the left,
then keys at random. The student without memory is the same weights behind `History(sinks=0, window=2)`, or another student.

    next chunk      share of turn keys that are felt in the first chunk after them: its picture moves by half the true shift or
                    more to the right side, and does not where the session is taken back and the key is not pressed
    within 3        the same of the first three chunks
    steering        share of the frames under a turn key whose picture moves to its side, over the whole stream
    true view       agreement with the renderer's view under the same keys, by seconds of the stream
    full turn       agreement of the frame after a full turn with the one before it; and of half a turn, where they should differ
    away and back   the same of a walk ahead and back, of the walks that no wall stops; and where it turns round

Agreement is the correlation of two pictures less the mean true view. `floor` is that of true views of different mazes, `codec` that
of the true view behind the codec. Means over streams with the standard error of the mean.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from distill.data.procedural import maze
from eval.report.tables import grid
from students.history import History
from students.serving.session import Chunk, Session
from students.weights.checkpoint import Bundle, load_student
from teachers.codecs.linear import to_float, to_uint8
from teachers.errors import UserError
from teachers.flow import keyed_generator

TURN, WALK, STAND, REST, ROAM, HELD = maze.FULL_TURN, 10, 2, 4, 20, 5  # frames
LAP = 2 * TURN + 2 * WALK + STAND + 3 * REST + ROAM
AHEAD = 3  # chunks that are drawn with a key and without it
SHIFTS, MIDDLE = 16, slice(22, 42)  # pixels to both sides that are searched, and columns that are compared
LEAST = 5  # pixels that count as a turn; a key's true shift is 32 tan(18 degrees) = 10.4
SPANS = ((0, 1), (1, 2), (2, 5), (5, 15), (15, 60), (60, 120))  # seconds
SHORT = History(sinks=0, window=2)


@dataclass(frozen=True)
class Walks:
    """Keys [T, 3] of all streams; true views uint8 [N, T, 3, H, W] and places [N, T, 2]; where turns and walks begin."""

    keys: Tensor
    video: Tensor
    places: Tensor
    text: list[str]

    @property
    def laps(self) -> list[int]:
        """The first frame of each whole lap; frame 0 is the reference."""
        return list(range(1, len(self.keys) - LAP + 1, LAP))

    @property
    def turns(self) -> list[int]:
        """The first frame of each full turn."""
        later = TURN + REST + 2 * WALK + STAND + REST
        return sorted([lap + first for lap in self.laps for first in (0, later)])


def lap_keys(frames: int, rng: torch.Generator) -> Tensor:
    """Keys [frames, 3] of laps that begin in frame 1, which begins a chunk."""
    rows = [(0.0, 0.0)]
    moves = ((0.0, 1.0), (1.0, 0.0), (-1.0, 0.0), (1.0, 1.0), (-1.0, 1.0))
    while len(rows) < frames:
        rows += [(1.0, 0.0)] * TURN + [(0.0, 0.0)] * REST
        rows += [(0.0, 1.0)] * WALK + [(0.0, 0.0)] * STAND + [(0.0, -1.0)] * WALK + [(0.0, 0.0)] * REST
        rows += [(-1.0, 0.0)] * TURN + [(0.0, 0.0)] * REST
        for pick in torch.randint(len(moves), (ROAM // HELD,), generator=rng).tolist():
            rows += [moves[pick]] * HELD
    return torch.tensor([(*row, 1.0) for row in rows[:frames]])


def draw_walks(streams: int, frames: int, size: tuple[int, int], seed: int) -> Walks:
    """Mazes of their own under the same keys."""
    rng = keyed_generator(seed, "midas world")
    world, keys = maze.draw_mazes(streams, rng), lap_keys(frames, rng)
    places, headings = maze.follow(world, *maze.draw_start(world, rng), keys.expand(streams, -1, -1))
    video = maze.film(world, places, headings, size).transpose(1, 2)
    text = [f"a maze of {[*maze.HUES][hue]} walls" for hue in world.hue.tolist()]
    return Walks(keys=keys, video=video, places=places, text=text)


def shift_of(before: Tensor, after: Tensor) -> int:
    """By how many pixels the middle of a picture uint8 [3, H, W] comes from the right: positive in a turn to the right."""
    wanted = after[..., MIDDLE].float()
    errors = [
        (before[..., MIDDLE.start + s : MIDDLE.stop + s].float() - wanted).abs().mean()
        for s in range(-SHIFTS, SHIFTS + 1)
    ]
    return int(torch.stack(errors).argmin()) - SHIFTS


def turned(frames: Tensor, before: Tensor, side: float) -> bool:
    """Whether a chunk uint8 [t, 3, H, W] turns to a side: the mean of its frames' shifts."""
    pairs = zip((before, *frames[:-1]), frames, strict=True)
    shifts = [side * shift_of(*pair) for pair in pairs]
    return sum(shifts) / len(shifts) >= LEAST


def advance(session: Session, keys: Tensor) -> Tensor:
    """The next chunk uint8 [t, 3, H, W] under its keys [t, 3], pushed now."""
    session.push(pose=keys)
    chunk = session.step()
    if not isinstance(chunk, Chunk):
        raise UserError(
            f"the session gives no chunk: it waits for {chunk.reason}; give a run of recipes/midas_world.yaml"
        )
    return chunk.frames.permute(0, 3, 1, 2)


def stream(bundle: Bundle, walks: Walks, number: int) -> tuple[Tensor, list[int | None]]:
    """Frames uint8 [T, 3, H, W] of a session under the keys, and of each turn key after how many chunks it is felt (None: in none
    of AHEAD). At each the session draws AHEAD chunks without the key first, and is taken back."""
    spec, keys, reference = bundle.spec, walks.keys, to_float(walks.video[number, 0])
    session = Session(bundle, reference, walks.text[number], seed=number, lead=AHEAD + 1, drop=("audio",))
    parts, delays, chunk = [], [], 0
    while (start := spec.pixel_frames(chunk)[0]) < len(keys):
        if start in walks.turns:
            own = [spec.pixel_frames(chunk + i) for i in range(AHEAD)]
            still = torch.tensor([[0.0, 0.0, 1.0]])
            other = [advance(session, still.expand(last - first, -1)) for first, last in own]
            session.interrupt(start)
            drawn = [advance(session, keys[first:last]) for first, last in own]
            before, side = parts[-1][-1], float(keys[start, 0])
            felt = []
            for i, (mine, without) in enumerate(zip(drawn, other, strict=True)):
                last = [before if i == 0 else made[i - 1][-1] for made in (drawn, other)]
                felt.append(turned(mine, last[0], side) and not turned(without, last[1], side))
            delays.append(felt.index(True) if True in felt else None)
            parts += drawn
            chunk += AHEAD
        else:
            parts.append(advance(session, keys[slice(*spec.pixel_frames(chunk))]))
            chunk += 1
        session.played(session.point.frame)
    return torch.cat(parts)[: len(keys)], delays


def agreement(first: Tensor, second: Tensor, mean: Tensor) -> Tensor:
    """Correlations [..] of pictures uint8 [.., 3, H, W] less the mean picture [3, H, W]."""
    one, two = ((picture.float() - mean).flatten(-3) for picture in (first, second))
    return (one * two).sum(-1) / (one.norm(dim=-1) * two.norm(dim=-1)).clamp_min(1e-6)


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Decibels [..] of pictures uint8 [.., 3, H, W]."""
    error = (first.float() - second.float()).square().flatten(-3).mean(-1).clamp_min(0.1)
    return 10 * torch.log10(255**2 / error)


def returns(walks: Walks) -> list[tuple[int, int, int]]:
    """(before, furthest, after) of each walk ahead and back."""
    first = [lap + TURN + REST for lap in walks.laps]
    return [(start - 1, start + WALK - 1, start + 2 * WALK + STAND - 1) for start in first]


def scores(video: Tensor, walks: Walks, mean: Tensor, fps: float, other: int = 0) -> dict[str, Tensor]:
    """Rows of the table [N] of video uint8 [N, T, 3, H, W], NaN where a stream has nothing of the kind. `other`: compared with the
    streams so many places on."""
    true, keys, found = walks.video.roll(other, 0), walks.keys, {}
    under = [t for t in range(1, len(keys)) if keys[t, 0]]
    sides = [[keys[t, 0] * shift_of(own[t - 1], own[t]) >= LEAST for t in under] for own in video]
    found["steering"] = torch.tensor(sides).float().mean(1)
    for first, last in SPANS:
        cut = slice(1 + int(first * fps), 1 + int(last * fps))
        if len(keys[cut]):
            found[f"true view, {first} to {last} s"] = agreement(video[:, cut], true[:, cut], mean).mean(1)
            found[f"true view, {first} to {last} s, dB"] = psnr(video[:, cut], true[:, cut]).mean(1)
    pairs = [(t - 1, t + TURN // 2 - 1, t + TURN - 1) for t in walks.turns]
    for name, own in (("full turn", pairs), ("away and back", returns(walks))):
        before, middle, after = torch.tensor(own).T
        back = (walks.places[:, before] - walks.places[:, after]).norm(dim=-1) < 1e-3
        weights = back.float() / back.sum(1, keepdim=True)
        here = video[:, before].roll(other, 0)
        found[name] = (agreement(here, video[:, after], mean) * weights).sum(1)
        found[f"{name}, dB"] = (psnr(here, video[:, after]) * weights).sum(1)
        found[f"{name}, half way"] = (agreement(here, video[:, middle], mean) * weights).sum(1)
    return found


def shown(values: Tensor) -> str:
    """Mean and standard error of the mean of the streams that have a value."""
    values = values[~values.isnan()]
    if not len(values):
        return "none"
    error = f" ± {float(values.std() / len(values) ** 0.5):.2f}" if len(values) > 1 else ""
    return f"{float(values.mean()):.2f}{error}"


def with_history(bundle: Bundle, history: History | None) -> Bundle:
    """The student behind another history; None: its own."""
    if history is not None:
        bundle.student.spec = replace(bundle.spec, history=history)
    return bundle


def measure(bundle: Bundle, walks: Walks, mean: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Frames of all streams and the rows of one student."""
    made = [stream(bundle, walks, number) for number in range(len(walks.video))]
    video = torch.stack([frames for frames, _ in made])
    delays = [delays for _, delays in made]
    found = {
        "next chunk": torch.tensor([[delay == 0 for delay in own] for own in delays]).float().mean(1),
        f"within {AHEAD}": torch.tensor([[delay is not None for delay in own] for own in delays]).float().mean(1),
    }
    return video, found | scores(video, walks, mean, float(bundle.spec.fps))


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("student", type=Path, help="its folder, such as runs/midas_world/student")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--memoryless", type=Path, help="the folder of a student without memory, in the place of a short window"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--frames", type=Path, help="a contact sheet: the first lap of the first streams, true and generated"
    )
    args = parser.parse_args(words)
    own = load_student(args.student)
    frames = 1 + 2 * int(args.seconds * own.spec.fps / 2)  # whole chunks
    if args.streams < 2 or frames <= LAP:
        raise UserError(f"--streams, --seconds: got {args.streams}, {args.seconds:g}; give 2 or more, and a lap of 8 s")
    if own.spec.pose_dim != 3 or own.spec.pixel_frames(1) != (1, 3):
        raise UserError(
            f"{args.student}: keys and chunks of two frames are needed; give a student of recipes/midas_world.yaml"
        )
    walks = draw_walks(args.streams, frames, (own.spec.height, own.spec.width), args.seed)
    mean = walks.video.float().mean((0, 1))
    other = load_student(args.memoryless or args.student)
    students = {"memory": own, "no memory": with_history(other, None if args.memoryless else SHORT)}
    made = {name: measure(bundle, walks, mean) for name, bundle in students.items()}
    rows = {name: found for name, (_, found) in made.items()}
    with torch.inference_mode():
        coded = [own.codec.decode(own.codec.encode(to_float(one.transpose(0, 1))[None])) for one in walks.video]
    rows["codec"] = scores(to_uint8(torch.cat(coded)).transpose(1, 2), walks, mean, float(own.spec.fps))
    rows["floor"] = scores(walks.video, walks, mean, float(own.spec.fps), other=1)
    names = list(rows["memory"])
    cells = [[name, *(shown(found[name]) if name in found else "" for found in rows.values())] for name in names]
    table = "\n".join(grid(["", *rows], cells)) + "\n"
    sys.stdout.write(table)
    if args.out is not None:
        args.out.write_text(table, encoding="utf-8")
    if args.frames is not None:
        write_sheet(args.frames, [walks.video, *(video for video, _ in made.values())])
    return 0


def write_sheet(path: Path, videos: Sequence[Tensor], streams: int = 3, every: int = 5) -> None:
    """The first lap of the first streams, each of the videos uint8 [N, T, 3, H, W] in a line of its own."""
    lines = [video[i, :LAP:every].permute(2, 0, 3, 1).flatten(1, 2) for i in range(streams) for video in videos]
    Image.fromarray(torch.cat(lines).numpy()).save(path)


if __name__ == "__main__":
    raise SystemExit(main())
