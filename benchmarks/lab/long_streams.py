"""Quality by time window of streams far beyond the trained length, of students of finished runs.

    python benchmarks/lab/long_streams.py RUN [RUN ...] [--stages init distill] [--streams 32] [--clips 8] [--sinks N] [--window N]

Every stream is the rollout that serving runs, under the portrait, text and speech of a clip of the world as long as it; a window
is one trained clip long. All runs have the same conditions and noise. A row a stage and window, `real` first:

    fid         of the frames, against other clips of the world
    identity    agreement with the portrait (eval.metrics.identity), sync of the mouth with the sound, motion as in a report
    light       correlation over the streams of the side that the light comes from with that of window 0: the world draws it once a
                clip, and no condition says which
    energy, sharpness, saturation, flicker   over those of the real window
    colour      distance of the mean colour from the portrait's, in grey levels
    black, clipped, frozen   shares of frames, values, steps
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.data.encoders import load_encoders
from distill.data.procedural.source import DataConfig, held_out
from distill.data.source import Clips
from distill.pipeline.generate import stream_noise, student_clips
from distill.recipe import Recipe, spec_of
from eval.embedded.extractors import Probes, Reading
from eval.frechet import frechet_distance
from eval.metrics.identity import identity_agreement
from eval.metrics.motion import class_agreement, motion_energies, sharpness_energies
from eval.metrics.quality import Frames, failure_rates, flickers, measure
from eval.metrics.sync import correlation, mouth_sync
from eval.report.tables import grid
from students.weights.adapter import HINT
from students.weights.checkpoint import make_student
from teachers.checkpoints.strict import load_strict
from teachers.config import convert
from teachers.disk.read import read_yaml_mapping
from teachers.errors import UserError
from teachers.files import load_tensors
from teachers.machine import multiplies_bf16

RATIOS = ("energy", "sharpness", "saturation", "flicker")
STAGES = ("ar_teacher", "init", "distill", "export")
"""Those with a student; where the run trains a LoRA, the whole network is in `export` alone."""
COLUMNS = ("fid", "identity", "light", "sync", "motion", *RATIOS, "colour", "black", "clipped", "frozen")


def recipe_of(run: Path) -> Recipe:
    """The recipe of a run folder."""
    return convert(Recipe, read_yaml_mapping(run / "recipe.yaml", "give the folder of a finished run"))


def scores(
    video: Tensor, portrait: Tensor, mouth: Tensor, gesture: Tensor, reference: Tensor, probes: Probes, light: Tensor
) -> dict[str, float]:
    """The columns of a window uint8 [N, 3, T, H, W], the ratios as numbers of their own; portrait: identity [N, I] and mean colour
    [N, 3] side by side; mouth [N, T, 2] of the sound; reference: frame features [M, T, D]; light [N] of window 0."""
    reading: Reading = probes.read(video)
    frames: Frames = measure(video)
    rates = failure_rates(frames)
    identity, colour = portrait[:, :-3], portrait[:, -3:]
    return {
        "fid": frechet_distance(reading.frame_features, reference),
        "identity": identity_agreement(reading.identity, identity)[0],
        "light": correlation(light_of(reading), light),
        "sync": mouth_sync(reading.mouth, mouth)["sync"],
        "motion": class_agreement(reading.gesture, gesture)[0],
        "energy": float(motion_energies(video).mean()),
        "sharpness": float(sharpness_energies(video).mean()),
        "saturation": float(frames.saturation.mean()),
        "flicker": float(flickers(frames).mean()),
        "colour": float((frames.colour.mean(2) - colour).norm(dim=1).mean()),
        "black": float(rates["black"].mean()),
        "clipped": float(((video == 0) | (video == 255)).float().mean()),
        "frozen": float(rates["frozen"].mean()),
    }


def light_of(reading: Reading) -> Tensor:
    """Where the light comes from [N], after it has faded in."""
    values = reading.labels["light"]
    return values[:, values.shape[1] // 2 :].mean(1)


def windows(video: Tensor, length: int) -> tuple[Tensor, ...]:
    """The whole windows of `length` frames of uint8 [N, 3, T, H, W]."""
    return tuple(part for part in video.split(length, dim=2) if part.shape[2] == length)


class World:
    """Long clips of a run's world with what their windows are compared with."""

    def __init__(self, run: Path, streams: int, clips: int, seed: int):
        self.recipe, self.spec = recipe_of(run), spec_of(recipe_of(run))
        data, self.seed = self.recipe.data, seed
        if not isinstance(data, DataConfig):
            raise UserError(
                f"{run} was trained on films; give a run on the procedural world, whose clips can be longer"
            )
        self.length, stride = data.world.num_frames, data.codec.stride
        latents = clips * data.latent_frames
        long = replace(data, world=replace(data.world, num_frames=1 + stride * (latents - 1)))
        self.clips: Clips = held_out(long, seed, "long streams", streams)
        self.encoders = load_encoders(data, run / "stages" / "data")
        self.probes = Probes.load(run / "stages" / "extractors")
        first = replace(self.clips, video=self.clips.video[:, :, :1])
        reference = self.encoders.encode(first.video)
        frames = self.clips.video.shape[2]
        self.conditions = self.encoders.conditions(self.clips.audio, self.clips.text, reference, frames)
        still = first.video.expand(-1, -1, 2, -1, -1)
        identity = self.probes.read(still).identity[:, 0]
        self.portrait = torch.cat([identity, measure(still).colour[:, :, 0].float()], dim=1)
        self.reference = self.probes.read(held_out(data, seed, "long streams reference", 96).video).frame_features
        self.real = self.rows(self.clips.video)

    def rows(self, video: Tensor) -> list[dict[str, float]]:
        """Scores of each window, the ratios not yet over the real ones."""
        labels, parts, found = self.clips.labels, windows(video, self.length), []
        light = light_of(self.probes.read(parts[0]))
        for index, part in enumerate(parts):
            cut = slice(index * self.length, (index + 1) * self.length)
            mouth = torch.stack([labels[name][:, cut] for name in ("mouth_open", "mouth_width")], dim=-1)
            found.append(scores(part, self.portrait, mouth, labels["gesture"], self.reference, self.probes, light))
        return found

    def over_real(self, rows: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
        """Rows with their ratios."""
        pairs = zip(rows, self.real, strict=True)
        return [{**own, **{name: own[name] / real[name] for name in RATIOS}} for own, real in pairs]

    def stream(self, run: Path, stage: str, batch: int, **history: Any) -> Tensor:
        """Streams uint8 [N, 3, T, H, W] of the student of a run's stage, served with another history where one is given."""
        spec = spec_of(recipe_of(run))
        spec = replace(spec, history=replace(spec.history, **history))
        folder = run / "stages" / stage / ("student" if stage == "export" else "")
        student, file = make_student(spec), folder / "model.safetensors"
        load_strict(student.net, load_tensors(file), file, HINT)
        student.eval().requires_grad_(False)
        noise = stream_noise(spec, self.seed, "long streams")
        with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bf16()):
            x0 = student_clips(student, self.conditions, noise, batch)
        return self.encoders.decode(x0)


def table(name: str, rows: Sequence[Mapping[str, float]]) -> str:
    """A markdown table, a row a window."""
    cells = [[str(index), *(f"{row[column]:.3f}" for column in COLUMNS)] for index, row in enumerate(rows)]
    return "\n".join([f"\n{name}\n", *grid(["window", *COLUMNS], cells)])


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--stages", nargs="+", default=["distill"], choices=STAGES)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--clips", type=int, default=8, help="length of a stream in trained clips")
    parser.add_argument("--sinks", type=int, help="number of sink chunks (default: the student's)")
    parser.add_argument("--window", type=int, help="number of window chunks (default: the student's)")
    parser.add_argument("--seed", type=int, default=0, help="of conditions and noise")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("--videos", type=Path, help="also write the streams there, a safetensors file a run and stage")
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    world = World(args.runs[0], args.streams, args.clips, args.seed)
    found = {"real": world.over_real(world.real)}
    print(table("real", found["real"]), flush=True)
    history = {name: getattr(args, name) for name in ("sinks", "window") if getattr(args, name) is not None}
    for run in args.runs:
        for stage in args.stages:
            video = world.stream(run, stage, min(32, args.streams), **history)
            name = f"{run.name}/{stage}"
            found[name] = world.over_real(world.rows(video))
            print(table(name, found[name]), flush=True)
            if args.videos:
                from teachers.files import save_tensors

                args.videos.mkdir(parents=True, exist_ok=True)
                save_tensors(args.videos / f"{name.replace('/', '-')}.safetensors", {"video": video[:4].clone()})
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
