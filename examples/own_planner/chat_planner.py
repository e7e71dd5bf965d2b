"""A local chat model that says what the avatar does next, as FlowAct-R1's planner does (2601.10103).

    distill sample ... --timeline timeline.yaml     # planner: {name: "chat_planner:Chat", folder: DIR, every: 2}

The model is shown the portrait, where it takes images, and the loudness of the last seconds; it must answer with the
name of a behaviour. Any transformers model of the class is read, in the layout that `save_pretrained` writes. Nothing is
downloaded, no pickle is read and no code of a folder is run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from students.serving.timeline import Cue
from teachers.checkpoints.local_model import ask, load_local
from teachers.codecs.linear import to_uint8
from teachers.encoders.small import SAMPLE_RATE
from teachers.errors import UserError

WINDOW = SAMPLE_RATE // 50
VOICE_DBFS = -45.0
"""A window of 20 ms that is louder is taken for voice."""
ASK = (
    "The avatar is in a conversation. Its own sound in the last {seconds:.1f} s: loudness {loudness:.0f} dBFS, voice "
    "{active:.0f} % of the time, silent for {silent:.1f} s now. What does it do next? Answer with one word of: {names}"
)
MAX_NEW_TOKENS = 8


def audio_facts(audio: Tensor) -> dict[str, float]:
    """Of samples [S] at 16 kHz: `seconds`, `loudness` (RMS in dBFS, -100 at least), `active` (% of 20 ms windows with voice) and
    `silent` (seconds since the last of those)."""
    windows = torch.nn.functional.pad(audio.double(), (0, -len(audio) % WINDOW)).unflatten(0, (-1, WINDOW))
    level = 10 * torch.log10(windows.square().mean(dim=1).clamp(min=1e-10))
    voiced = (level > VOICE_DBFS).nonzero().flatten()
    power = float(audio.double().square().mean()) if len(audio) else 0.0
    return {
        "seconds": len(audio) / SAMPLE_RATE,
        "loudness": 10 * float(torch.tensor(max(power, 1e-10)).log10()),
        "active": 100 * len(voiced) / max(1, len(windows)),
        "silent": (len(windows) - 1 - int(voiced[-1]) if len(voiced) else len(windows)) * WINDOW / SAMPLE_RATE,
    }


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A local chat model in `folder` that is called every `every` seconds; `how` its texts take effect (see Session.set)."""

    folder: Path
    every: Fraction = Fraction(2)
    how: Literal["keep", "recache"] = "keep"

    def __post_init__(self):
        if self.every <= 0:
            raise ValueError(f"every: got {self.every}; give seconds above 0")

    def load(self, behaviours: Mapping[str, str]) -> "ChatPlanner":
        """UserError where the model cannot be read."""
        return ChatPlanner(self.folder, behaviours, self.every, self.how)


class ChatPlanner:
    """Asks AutoModelForMultimodalLM (image-text-to-text or audio-language) of a folder for one of `behaviours`, name -> text, its
    likeliest words; any other answer keeps what is."""

    def __init__(
        self, folder: Path, behaviours: Mapping[str, str], every: Fraction, how: Literal["keep", "recache"] = "keep"
    ):
        self.behaviours, self.every = {**behaviours}, every
        self.how: Literal["keep", "recache"] = how
        self.model, self.processor = _loaded(folder)
        self.sees = getattr(self.processor, "image_processor", None) is not None

    def next(self, seconds: Fraction, recent_audio: Tensor, reference: Tensor | None) -> Cue | None:
        """The behaviour that the model names."""
        asked = ASK.format(**audio_facts(recent_audio), names=", ".join(self.behaviours))
        name = named(self.ask(asked, reference), self.behaviours)
        return None if name is None else Cue(self.behaviours[name], self.how)

    @torch.inference_mode()
    def ask(self, question: str, reference: Tensor | None) -> str:
        """The model's words to a question about a picture [3, H, W] in [-1, 1]."""
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if self.sees and reference is not None:
            from PIL import Image

            picture = Image.fromarray(to_uint8(reference).permute(1, 2, 0).cpu().numpy())
            content.insert(0, {"type": "image", "image": picture})
        return ask(self.model, self.processor, content, MAX_NEW_TOKENS)


def named(answer: str, names: Mapping[str, str]) -> str | None:
    """The name that an answer consists of, in any case, with quotes or a full stop around it; None for anything more or else."""
    word = answer.strip().strip("\"'`*.").casefold()
    return next((name for name in names if name.casefold() == word), None)


def _loaded(folder: Path) -> tuple[Any, Any]:
    """The model of a folder, ready to be asked, and its processor; UserError in one line where it cannot be read."""
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    model, processor = load_local("planner", folder, AutoModelForMultimodalLM, AutoProcessor)
    if getattr(processor, "chat_template", None) is None:
        raise UserError(f"planner has no chat template: {folder}; give a model that was taught to answer")
    return model, processor
