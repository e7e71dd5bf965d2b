"""What a student draws for the conditions of real clips: their first frame, their sound and their text."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from pathlib import Path

import torch
import torch.nn.functional as F

from distill.scoring.clip_sets import Entry, facts_of, read_clip, write_clip
from eval.cards import Card
from students.serving.session import Session
from students.weights.checkpoint import Bundle, load_student
from teachers.encoders.small import SAMPLE_RATE
from teachers.errors import UserError
from teachers.flow import keyed_generator
from teachers.media.read import fit_image


@dataclass(frozen=True)
class GenerateJob:
    """A student, the noise, the text for clips that have none, and where what it draws goes."""

    student: Path
    seed: int
    text: str | None
    folder: Path
    device: str


@lru_cache(maxsize=1)
def _loaded(folder: Path, device: str) -> Bundle:
    return load_student(folder).to(device)


def generate_clip(task: GenerateJob, entry: Entry, card: Card) -> Path:
    """Draw the student's clip for one real clip and keep it as tensors, unless it is there already.

    The stream's noise is that of (seed, name of the clip), so no order and no number of processes changes a frame. Raises UserError
    where the real clip cannot be read, has no sound, or shows what the student cannot take.
    """
    bundle = _loaded(task.student, task.device)
    spec = bundle.spec
    text = entry.text or task.text
    mark = f"{bundle.fingerprint} {entry.identity} {card.sha256} {task.seed} {text}"
    path = task.folder / f"{entry.clip.id}.safetensors"
    made = facts_of(path).get("drawn")
    if made == mark:
        return path
    if made is None and path.exists():
        raise UserError(f"{path} was not drawn by distill eval; choose another --out")
    real = read_clip(entry, card, generated=False)
    if real.sound is None:
        raise UserError("no sound: a student draws to it; give the film a track or NAME.wav beside it")
    if not text:
        raise UserError(
            "no text: a student is told what happens; write NAME.txt beside the film, or give --text for all"
        )
    still = fit_image(real.video[:, 0].permute(1, 2, 0), (spec.height, spec.width))
    seconds = real.video.shape[1] / real.fps
    sound = F.pad(real.sound, (0, max(0, round(seconds * SAMPLE_RATE) - len(real.sound))))
    seed = keyed_generator(task.seed, "eval", entry.clip.id).initial_seed()
    portrait = still.to(task.device) if spec.network.reference else None
    session = Session(bundle, portrait, text, seed, drop=("pose",))
    session.push(audio=sound)
    session.close()
    frames = torch.cat([chunk.frames.cpu() for chunk in session.frames()])
    count = -(-len(sound) // spec.samples_per_frame)
    video = frames[:count].permute(3, 0, 1, 2)
    starts = (spec.pixel_frames(chunk)[0] for chunk in range(1, count))
    chunks = " ".join(map(str, takewhile(lambda frame: frame < video.shape[1], starts)))
    write_clip(path, video, spec.fps, sound, text, drawn=mark, chunks=chunks)
    return path
