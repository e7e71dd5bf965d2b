"""Few films and many drawn conditions: the folders that `lab_conditions` trains on, written from the procedural world.

    python benchmarks/lab/drawn_conditions.py [--films 64] [--others 256] [--out runs/lab_conditions]
    python benchmarks/lab/few_steps.py lab_conditions --seeds 0 1 2 --conditions 48

OUT/films is what `distill data prepare` makes of films of some people. Of other people, as many as `--others`, there are
one picture in OUT/portraits, speech of half a minute a file in OUT/speech, whose voice changes every clip, and the prompts in
OUT/prompts.txt.
"""

import argparse
import wave
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from PIL import Image

from distill.compose import RECIPES
from distill.data.datasets.folder import read
from distill.data.prepare.cutting import CutConfig
from distill.data.prepare.prepare import prepare
from distill.data.procedural import render
from distill.data.source import Clips
from distill.recipe import load_recipe
from teachers import media
from teachers.errors import UserError
from teachers.files import make_folder
from teachers.flow import keyed_generator
from teachers.media.sound import SAMPLE_RATE

TOGETHER = 12
"""Clips whose sound makes one recording: half a minute of the shipped world's."""


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--films", type=int, default=64)
    parser.add_argument("--others", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("runs/lab_conditions"))
    args = parser.parse_args(words)
    if args.out.exists():
        raise UserError(f"--out: {args.out} exists; remove it, or choose another folder")
    world = load_recipe(RECIPES / "lab_avatar.yaml", []).data.world
    write_films(world, args.films, args.out)
    write_others(world, args.others, args.out)
    return 0


def made(world: render.WorldConfig, num: int, key: str) -> Clips:
    """Clips of people of their own."""
    scene = render.draw_conditions(world, num, keyed_generator(0, "drawn conditions", key))
    return render.make_clips(world, scene, keyed_generator(0, "drawn conditions", key, "motion"))


def write_films(world: render.WorldConfig, num: int, out: Path) -> None:
    """OUT/films, prepared, of the films and texts in OUT/recorded."""
    clips, fps, recorded = made(world, num, "films"), Fraction(world.fps), out / "recorded"
    make_folder(recorded)
    for number, text in enumerate(clips.text):
        path = recorded / f"{number:04d}.mp4"
        media.write_video(path, clips.video[number].permute(1, 2, 3, 0).contiguous(), fps, clips.audio[number])
        path.with_suffix(".txt").write_text(text)
    config = CutConfig(fps=fps, size=world.size, crf=0)
    prepare(read(None, recorded), recorded, out / "films", "folder", config)


def write_others(world: render.WorldConfig, num: int, out: Path) -> None:
    """OUT/portraits, OUT/speech and OUT/prompts.txt, each from clips of its own."""
    for name in ("portraits", "speech"):
        make_folder(out / name)
    for number, picture in enumerate(made(world, num, "portraits").video[:, :, 0]):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(out / "portraits" / f"{number:04d}.png")
    clips = made(world, num, "speech")
    for number, sound in enumerate(clips.audio.split(TOGETHER)):
        with wave.open(str(out / "speech" / f"{number:04d}.wav"), "wb") as file:
            file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
            file.writeframes((sound.flatten().clamp(-1, 1) * 32767).short().numpy().tobytes())
    (out / "prompts.txt").write_text("\n".join(clips.text) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
