"""A multimodal model as judge of whole conversations: nine dimensions, raw scores kept.

The dimensions are LiveTalk's (2512.23576, sec. 5 and appendix; the questions are ours, theirs are not published), asked one at a
time about at most 32 frames and the transcript, at temperature 0.1 and top-p 0.9, answered as \\boxed{0..10}. LiveTalk turns scores
into percentiles of z-scores over all systems, which change whenever a system is added; here every answer is stored as it came.

A judge is any object with `ask(frames, question) -> str`; frames are uint8 [n, H, W, 3].
"""

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

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
    """What `--judge` loads."""

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


@dataclass
class LocalJudge:
    """An image-text-to-text model of transformers in a local folder (Qwen-VL and its like)."""

    model: Any
    processor: Any
    max_tokens: int = 64

    def ask(self, frames: np.ndarray, question: str) -> str:
        from PIL import Image

        pictures = [{"type": "image", "image": Image.fromarray(frame)} for frame in frames]
        message = [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}]
        inputs = self.processor.apply_chat_template(
            message, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        answer = self.model.generate(
            **inputs, max_new_tokens=self.max_tokens, do_sample=True, temperature=0.1, top_p=0.9
        )
        return self.processor.batch_decode(answer[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]


def load_judge(folder: Path) -> LocalJudge:
    """From a local folder, safetensors alone; UserError where it cannot be read."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        return LocalJudge(model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"judge cannot be read ({reason}): {folder}; download the whole model there") from error
