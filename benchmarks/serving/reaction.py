"""How soon a stream answers a new text: chunks from the switch until its frames change, and until half of the change is there.

    python benchmarks/serving/reaction.py RUN [RUN ...] [--streams 16]

Every stream runs twice with the same sound and noise, once under its first text and once with another from chunk 8 on, said when
chunk 7 has been drawn. Counted from the first chunk drawn after that: 0 is that chunk itself. The change is the mean absolute
difference of the two films within a chunk, averaged over the streams; the whole of it is that of chunks 16 to 39 after the switch.
"""

import argparse
import statistics
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from distill.commands.drift import data_config
from distill.data.procedural import speech
from distill.data.procedural.source import held_out
from students.serving.session import Chunk, Session
from students.weights.checkpoint import Bundle, load_student
from teachers.codecs.linear import to_float
from teachers.flow import keyed_generator

How = Literal["keep", "recache"]
SWITCH, LAST = 8, 48
TEXT_ENCODERS = ("a person, neutral, talks and holds still", "a person, smiling, talks and nods")


def film(bundle: Bundle, portrait: Tensor, sound: Tensor, seed: int, how: How | None) -> list[Tensor]:
    """Chunks [T, H, W, 3] of one stream; `how` None: without a switch."""
    session = Session(bundle, portrait, TEXT_ENCODERS[0], seed=seed)
    session.push(sound)
    chunks = []
    for index in range(LAST):
        if index == SWITCH and how is not None:
            session.set(text=TEXT_ENCODERS[1], how=how)
        chunk = session.step()
        assert isinstance(chunk, Chunk)
        chunks.append(chunk.frames.float())
    return chunks


def changes(bundle: Bundle, portrait: Tensor, sound: Tensor, seed: int, how: How) -> list[float]:
    """How much each chunk from the switch on differs."""
    pairs = zip(film(bundle, portrait, sound, seed, None), film(bundle, portrait, sound, seed, how), strict=True)
    return [float((a - b).abs().mean()) for a, b in pairs][SWITCH:]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--streams", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for run in args.runs:
        bundle = load_student(run / "student")
        spec = bundle.spec
        size = (
            spec.pixel_frames(LAST + spec.schedule.ahead)[1] * spec.samples_per_frame + bundle.audio_encoder.lookahead
        )
        shown = held_out(data_config(run), 0, "reaction", args.streams).video[:, :, 0]
        for how in get_args(How):
            curves = []
            for i in range(args.streams):
                sound = speech.synthesise(1, size, keyed_generator(0, "reaction", i)).audio[0]
                curves.append(changes(bundle, to_float(shown[i]), sound, i, how))
            first = [next(k for k, change in enumerate(curve) if change > 0) for curve in curves]
            mean = [statistics.mean(column) for column in zip(*curves, strict=True)]
            whole = statistics.mean(mean[16:])
            half = next(k for k, change in enumerate(mean) if change > whole / 2)
            frames = spec.chunk_frames * spec.codec.stride
            print(
                f"{run.name}, {how}: first change after {set(first)} chunks of {frames} frames, half of it after {half}"
            )


if __name__ == "__main__":
    main()
