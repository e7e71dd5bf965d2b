"""What a duplex, steered student does with two voices and a direction: correlations, answers and reaction time, and two demos.

    python benchmarks/serving/duplex.py RUN_DIR [--stage distill] [--clips 24] [--out DIR]

Streams of five seconds for held-out conditions of the run's world, by the rollout that serving equals bit for bit, read by the
run's own probes; beside them what the same probes read of the world's own films through the codec. Controls use the same noise:
the voices swapped, the direction reversed, the other silenced. With --out the demos steer and talk lie there as mp4 and PNG.
A script, not a test.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import yaml
from PIL import Image
from torch import Tensor

from distill.data.encoders import ConditionEncoders, load_encoders
from distill.data.procedural import duplex
from distill.data.procedural.source import held_out
from distill.data.source import Clips
from distill.pipeline.generate import stream_noise, student_clips
from distill.recipe import Recipe, spec_of
from eval.embedded.extractors import Probes
from eval.metrics.sync import correlation
from students.student import Student
from students.weights.adapter import HINT
from students.weights.checkpoint import make_student
from teachers import media
from teachers.checkpoints.strict import load_strict
from teachers.conditions import Conditions
from teachers.config import convert
from teachers.errors import UserError
from teachers.files import load_tensors

FRAMES, SWITCH = 61, 31  # pixel frames of a stream; where the reaction test turns, the first frame of a chunk of two
COLOURS = {duplex.OWN: (60, 200, 60), duplex.OTHER: (200, 60, 60), duplex.NONE: (60, 60, 60)}


@dataclass(frozen=True)
class Bench:
    """A run's student and what reads it; `read` of uint8 [N, 3, T, H, W] gives the probes' labels [N, T]."""

    recipe: Recipe
    student: Student
    encoders: ConditionEncoders
    probes: Probes

    @classmethod
    def load(cls, run: Path, stage: str) -> "Bench":
        file = run / "recipe.yaml"
        if not file.is_file():
            raise UserError(f"no run folder: {run}; give the run_dir of a run of recipes/midas_duplex.yaml")
        recipe = convert(Recipe, yaml.safe_load(file.read_text(encoding="utf-8")))
        spec, weights = spec_of(recipe), run / "stages" / stage / "model.safetensors"
        if spec.speakers != 2 or not spec.pose_dim:
            raise UserError(f"no duplex and steered student: {run}; give a run of recipes/midas_duplex.yaml")
        if not weights.is_file():
            raise UserError(f"no weights: {weights}; let the stage end, or give another --stage")
        student = make_student(spec)
        load_strict(student.net, load_tensors(weights), weights, HINT)
        encoders = load_encoders(recipe.data, run / "stages" / "data")
        return cls(recipe, student.eval().requires_grad_(False), encoders, Probes.load(run / "stages" / "extractors"))

    def world(self, name: str, num: int) -> Clips:
        """Held-out clips of FRAMES."""
        data = replace(self.recipe.data, world=replace(self.recipe.data.world, num_frames=FRAMES))
        return held_out(data, self.recipe.eval.condition_seed, name, num)

    def draw(self, conditions: Conditions) -> Tensor:
        noise = stream_noise(self.student.spec, 0, "duplex")
        return self.encoders.decode(student_clips(self.student, conditions, noise, 12))

    def read(self, video: Tensor) -> dict[str, Tensor]:
        return self.probes.read(video).labels


def conditions_of(bench: Bench, clips: Clips, **changes: Tensor) -> Conditions:
    """The conditions of clips whose audio [N, 2, S] or pose [N, T, P] is another."""
    return bench.encoders.of_clips(replace(clips, **changes))[1]


def table(rows: dict[str, tuple[float, ...]], heads: tuple[str, ...]) -> str:
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |" for name, values in rows.items()]
    return "\n".join(lines) + "\n\n"


def steering(pose: Tensor, seen: dict[str, Tensor], fps: float) -> tuple[float, ...]:
    """Correlation of the head seen with where the signal sends it, right and down, and across."""
    sent = duplex.follow(pose[..., :2], fps)
    x, y = (seen[name][:, 1:] for name in ("head_x", "head_y"))
    return tuple(correlation(a, sent[:, 1:, i]) for a, i in ((x, 0), (y, 1), (x, 1), (y, 0)))


def talking(clips: Clips, seen: dict[str, Tensor]) -> tuple[float, ...]:
    """The mouth seen against each voice; its opening in own and in the other's turns; |gaze| in both."""
    turn, mouth, gaze = (x[:, 1:] for x in (clips.talk["turn"], seen["mouth_open"], seen["gaze"].abs()))
    own, other = (x[:, 1:] for x in (clips.labels["mouth_open"], clips.talk["other_open"]))
    mine, theirs = turn == duplex.OWN, turn == duplex.OTHER
    means = (float(x[rows].mean()) for x in (mouth, gaze) for rows in (mine, theirs))
    return correlation(mouth[mine], own[mine]), correlation(mouth[theirs], other[theirs]), *means


def nodding(clips: Clips, with_audio: Tensor, without: Tensor, fps: float) -> tuple[float, ...]:
    """The nod is where the head lies lower than with the other silenced: its correlation with the other's syllables, and how
    much of the world's own size it has."""
    target = duplex.NOD * duplex.follow(clips.talk["other_open"], fps)[:, 1:]
    nod, rows = (with_audio - without)[:, 1:], clips.talk["turn"][:, 1:] == duplex.OTHER
    size = float((nod[rows] * target[rows]).sum() / target[rows].square().sum())
    return correlation(nod[rows], target[rows]), size


def reaction(bench: Bench, clips: Clips) -> Tensor:
    """The share of the way that the head has gone in the frames from SWITCH on [n], when a direction is reversed there."""
    steady = torch.tensor([-0.8, 0.0, 1.0]).expand(len(clips.text), FRAMES, -1).clone()
    turned = steady.clone()
    turned[:, SWITCH:, 0] = 0.8
    films = [bench.draw(conditions_of(bench, clips, pose=pose)) for pose in (steady, turned)]
    if not torch.equal(*(film[:, :, :SWITCH] for film in films)):
        raise AssertionError("a direction was followed before it was given")
    before, after = (bench.read(film)["head_x"] for film in films)
    gone = (after - before).mean(0)[SWITCH:]
    return gone / gone[10:].mean()


def measure(bench: Bench, num: int, out: Callable[[str], object]) -> None:
    clips, fps = bench.world("duplex", num), float(bench.student.spec.fps)
    draw = partial(conditions_of, bench, clips)
    asked = bench.draw(draw())
    ceiling, seen = bench.read(bench.encoders.decode(bench.encoders.encode(clips.video))), bench.read(asked)
    back = bench.read(bench.draw(draw(pose=clips.pose * torch.tensor([-1.0, -1.0, 1.0]))))
    swapped = bench.read(bench.draw(draw(audio=clips.audio.flip(1))))
    deaf = bench.read(bench.draw(draw(audio=clips.audio * torch.tensor([1.0, 0.0]).view(1, 2, 1))))
    rows = {
        "the world, through the codec": steering(clips.pose, ceiling, fps),
        "student": steering(clips.pose, seen, fps),
        "student, direction reversed": steering(clips.pose, back, fps),
    }
    out(table(rows, ("x", "y", "x by the y signal", "y by the x signal")))
    rows = {
        "the world, through the codec": talking(clips, ceiling),
        "student": talking(clips, seen),
        "student, voices swapped": talking(clips, swapped),
    }
    heads = ("mouth, own voice", "mouth, other's voice", "open, own turn", "open, other's turn")
    out(table(rows, (*heads, "gaze aside, own turn", "gaze aside, other's turn")))
    nod = nodding(clips, seen["head_y"], deaf["head_y"], fps)
    out(f"nods with the other's syllables: correlation {nod[0]:.3f}, size {nod[1]:.2f} of the world's\n\n")
    measured = reaction(bench, clips)
    law = 1 - torch.exp(-torch.arange(1, 9) / (fps * duplex.LAG_SECONDS))
    shares = {"student": measured[:8], "the world's law": law}
    out(table({k: tuple(v.tolist()) for k, v in shares.items()}, tuple(f"frame {i}" for i in range(8))))


def demos(bench: Bench, folder: Path) -> None:
    """steer: left, right, up, down and ahead; talk: a conversation of the world. The first clip whose text holds still, if any."""
    folder.mkdir(parents=True, exist_ok=True)
    clips = bench.world("demo", 24)
    still = int((clips.labels["gesture"] == 0).int().argmax())
    one = Clips(
        video=clips.video[still : still + 1],
        audio=clips.audio[still : still + 1],
        text=[clips.text[still]],
        labels={},
        talk={name: value[still : still + 1] for name, value in clips.talk.items()},
    )
    ways = torch.tensor([[-1.0, 0], [1, 0], [0, -1], [0, 1], [0, 0]]).repeat_interleave(12, 0)
    ways = torch.cat([ways, ways[-1:]])
    steer = torch.cat([ways, torch.ones(FRAMES, 1)], dim=1)[None]
    ahead = torch.tensor([0.0, 0.0, 1.0]).expand(1, FRAMES, 3)
    for name, pose in (("steer", steer), ("talk", ahead)):
        film = bench.draw(conditions_of(bench, one, pose=pose))[0].permute(1, 2, 3, 0).contiguous()
        media.write_video(folder / f"{name}.mp4", film, bench.student.spec.fps, one.mixed[0], upscale=6, smooth=True)
        sheet(film[::2], pose[0, ::2], one.talk["turn"][0, ::2]).save(folder / f"{name}.png")


def sheet(film: Tensor, pose: Tensor, turn: Tensor, columns: int = 10) -> Image.Image:
    """Frames [T, H, W, 3] twice their size, each over a bar: green own turn, red the other's; a white mark the direction."""
    big = film.repeat_interleave(2, 1).repeat_interleave(2, 2)
    side = big.shape[2]
    bars = torch.tensor([COLOURS[int(who)] for who in turn], dtype=torch.uint8)
    bars = bars.view(-1, 1, 1, 3).repeat(1, 16, side, 1)
    for bar, (right, down, _) in zip(bars, pose.tolist(), strict=True):
        x, y = round((right + 1) / 2 * (side - 4)), round((down + 1) / 2 * 12)
        bar[y : y + 4, x : x + 4] = 255
    tiles = torch.cat([big, bars], dim=1)
    tiles = tiles[: len(tiles) // columns * columns].unflatten(0, (-1, columns))
    return Image.fromarray(tiles.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1).contiguous().numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--stage", default="distill", choices=("init", "distill"))
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    bench = Bench.load(args.run, args.stage)
    measure(bench, args.clips, sys.stdout.write)
    if args.out is not None:
        demos(bench, args.out)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"measure_duplex: {error}")
