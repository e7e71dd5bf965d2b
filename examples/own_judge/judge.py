"""A multimodal model as judge of whole conversations: nine dimensions, raw scores kept.

    distill eval multiturn --student DIR --out multiturn
    python examples/own_judge/judge.py multiturn --model models/qwen-vl     # judge.jsonl beside multiturn.json

The dimensions are LiveTalk's (2512.23576, sec. 5 and appendix; the questions are ours, theirs are not published), asked one at a
time about at most 32 frames and the transcript, at temperature 0.1 and top-p 0.9, answered as \\boxed{0..10}. LiveTalk turns scores
into percentiles of z-scores over all systems, which change whenever a system is added; here every answer is stored as it came.

A judge is any object with `ask(frames, question) -> str`; frames are uint8 [n, H, W, 3].
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from teachers import media
from teachers.checkpoints.local_model import ask, load_local
from teachers.errors import UserError
from teachers.files import atomic_write

MAX_FRAMES = 32
DIMENSIONS = {
    "EA": "emotional appropriateness: do face and manner fit what is said?",
    "NI": "nonverbal interaction: do gaze, nods and idle behaviour belong to a person who listens and talks?",
    "MVC": "multi-turn coherence: do identity, light and framing stay the same from turn to turn?",
    "CN": "conversational naturalness: does it look like a real conversation, without jumps or standing pictures?",
    "SR": "semantic relevance: does each answer belong to what the user said?",
    "IC": "information completeness: is what the user asked for given in full?",
    "LC": "logical consistency: do the answers agree with each other and with themselves?",
    "CU": "context understanding: do later answers take up what was said before?",
    "OIE": "overall interactive experience",
}
ASK = (
    "These are frames, in order, of an avatar in a conversation. The user said, turn by turn:\n{turns}\n"
    "Rate from 0 (worst) to 10 (best) its {question} Answer with \\boxed{{score}} alone."
)


class Judge(Protocol):
    """What `judged` asks."""

    def ask(self, frames: np.ndarray, question: str) -> str: ...


def judged(judge: Judge, conversations: Sequence[tuple[str, Sequence[str], np.ndarray]], path: Path) -> dict[str, Any]:
    """Ask about (name, user's turns, frames [T, H, W, 3]) of each conversation, write every answer to `path` (JSON lines) and
    return the mean raw score of each dimension; an answer without a score counts in `unanswered` and in no mean."""
    lines, scores = [], {name: [] for name in DIMENSIONS}
    for name, turns, frames in conversations:
        some = frames[np.linspace(0, len(frames) - 1, min(MAX_FRAMES, len(frames))).round().astype(int)]
        listed = "\n".join(f"{i}. {turn}" for i, turn in enumerate(turns, start=1))
        for dimension, question in DIMENSIONS.items():
            answer = judge.ask(some, ASK.format(turns=listed, question=question))
            score = read_score(answer)
            lines.append({"conversation": name, "dimension": dimension, "score": score, "answer": answer})
            if score is not None:
                scores[dimension].append(score)
    atomic_write(path, "".join(json.dumps(line) + "\n" for line in lines))
    means = {dimension: statistics.fmean(values) for dimension, values in scores.items() if values}
    return {"mean_raw": means, "unanswered": sum(line["score"] is None for line in lines)}


def read_score(answer: str) -> float | None:
    """The last \\boxed{score} in 0..10."""
    found = re.findall(r"\\boxed\{\s*(\d+(?:\.\d+)?)\s*\}", answer)
    return float(found[-1]) if found and float(found[-1]) <= 10 else None


class LocalJudge:
    """An image-text-to-text model of transformers in a local folder (Qwen-VL and its like), safetensors alone; UserError where it
    cannot be read."""

    def __init__(self, folder: Path, max_tokens: int = 64):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model, self.processor = load_local("judge", folder, AutoModelForImageTextToText, AutoProcessor)
        self.max_tokens = max_tokens

    def ask(self, frames: np.ndarray, question: str) -> str:
        """The model's words to a question about pictures uint8 [n, H, W, 3]."""
        pictures = [{"type": "image", "image": Image.fromarray(frame)} for frame in frames]
        content = [*pictures, {"type": "text", "text": question}]
        return ask(self.model, self.processor, content, self.max_tokens, temperature=0.1, top_p=0.9)


def read_conversations(folder: Path) -> list[tuple[str, list[str], np.ndarray]]:
    """(name, user's turns, frames uint8 [T, H, W, 3]) of every conversation that `distill eval multiturn` left in a folder."""
    try:
        rows = json.loads((folder / "multiturn.json").read_text(encoding="utf-8"))["turns"]
    except OSError as error:
        raise UserError(
            f"no conversations: {folder} has no multiturn.json; run distill eval multiturn first"
        ) from error
    starts = [i for i, row in enumerate(rows) if row["turn"] == 0]
    found = []
    for number, (start, stop) in enumerate(pairwise([*starts, len(rows)])):
        frames, _ = media.read_video(folder / f"{number:03d}.mp4")
        found.append((rows[start]["conversation"], [row["text"] for row in rows[start:stop]], frames.numpy()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="the --out of distill eval multiturn")
    parser.add_argument("--model", type=Path, required=True, help="local multimodal model")
    args = parser.parse_args()
    found = judged(LocalJudge(args.model), read_conversations(args.folder), args.folder / "judge.jsonl")
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
