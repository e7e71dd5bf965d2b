"""Who answers: a talker turns what the user typed or said into sound, piece by piece.

A talker is any object with `conversation()`, which gives a viewer's own `turn(utterance)`: an iterator of float samples [n] in
[-1, 1] at 16 kHz, given out as they are made, with `Words` between them where it knows any; `utterance` is a typed sentence or the
user's sound [S] at 16 kHz. A talker of one's own: `my_file:Thing`, a frozen dataclass whose `load()` gives it; a voice alone
inherits from `Puppet`.
"""

import json
import math
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from distill.live import voice
from teachers.checkpoints.local_model import load_local
from teachers.encoders.small import SAMPLE_RATE
from teachers.errors import UserError
from teachers.media.streams import resample
from teachers.resolve import Registry, in_users_file, resolve

PIECE = SAMPLE_RATE // 10
BUILT_IN = ("auto", "espeak", "formant", "echo")
OMNI = {
    "qwen2_5_omni": ("Qwen2_5OmniForConditionalGeneration", "Qwen2_5OmniProcessor"),
    "qwen3_omni_moe": ("Qwen3OmniMoeForConditionalGeneration", "Qwen3OmniMoeProcessor"),
}
COMMAND = "cmd:"
OWN = Registry("talker", "talkers", methods={"load": "def load(self): return a talker"}, default=False)


@dataclass(frozen=True)
class Words:
    """What `who`, "user" or "avatar", says, for the transcript."""

    who: str
    text: str


class Conversation(Protocol):
    """One viewer's talker; turns come one after the other."""

    def turn(self, utterance: str | Tensor) -> Iterator[Tensor | Words]: ...


class Talker(Protocol):
    """What `distill serve --talker` names. `model`: who answers, "" where what the user says is said again (echo mode);
    `takes_speech`: whether speech is understood, or said again."""

    @property
    def name(self) -> str: ...

    @property
    def model(self) -> str: ...

    @property
    def takes_speech(self) -> bool: ...

    def conversation(self) -> Conversation: ...


def spoken(pieces: Iterator[Tensor | Words], tell: Callable[[Words], None]) -> Iterator[Tensor]:
    """The sound of a turn; its words go to `tell`."""
    for piece in pieces:
        if isinstance(piece, Words):
            tell(piece)
        else:
            yield piece


def load_talker(name: str) -> Talker:
    """`auto` (espeak-ng where it is installed, else formant), `espeak`, `formant`, `echo`, `cmd:PROGRAM ARGUMENTS` (text in, WAV
    out), `my_file:Thing` of the working directory, or a folder with a transformers audio language model or text-to-speech model,
    which runs on the CPU. UserError for anything else."""
    if name == "auto":
        name = "espeak" if voice.has_espeak() else "formant"
    if name == "espeak" and not voice.has_espeak():
        raise UserError("talker espeak: espeak-ng is not installed; apt-get install espeak-ng, or use --talker formant")
    if name in ("espeak", "formant"):
        return Voice(name)
    if name == "echo":
        return Echo()
    if name.startswith(COMMAND):
        return Command.find(name.removeprefix(COMMAND))
    if ":" in name:
        config = resolve(OWN, name, "--talker", Path.cwd())()
        with in_users_file(config):
            return config.load()
    folder = Path(name)
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"no talker: {name} is none of {', '.join(BUILT_IN)}, no {COMMAND}PROGRAM, no my_file:Thing and no folder with a "
            "config.json; download the model there"
        ) from error
    if kind in OMNI:
        return Omni.load(folder, kind)
    if kind == "vits":
        return TextToSpeech.load(folder)
    raise UserError(f"talker of model_type {kind!r}: {folder}; known are {', '.join([*OMNI, 'vits'])}")


class Puppet:
    """A voice: a typed sentence is spoken (`speak`), spoken sound is said again."""

    name: str
    model, takes_speech = "", True

    def conversation(self) -> Conversation:
        return self

    def turn(self, utterance: str | Tensor) -> Iterator[Tensor]:
        yield from utterance.split(PIECE) if isinstance(utterance, Tensor) else self.speak(utterance)

    def speak(self, text: str) -> Iterator[Tensor]:
        raise NotImplementedError


@dataclass
class Voice(Puppet):
    """One of the voices of `distill.live.voice`; `name`: espeak or formant."""

    name: str

    def speak(self, text: str) -> Iterator[Tensor]:
        return (voice.espeak_voice if self.name == "espeak" else voice.formant_voice)(text)


@dataclass
class Command(Puppet):
    """A program that reads a text and writes a WAV file, started for each sentence."""

    name: str
    command: tuple[str, ...]

    @classmethod
    def find(cls, line: str) -> "Command":
        """Of a command line, which no shell reads. UserError where there is no such program."""
        try:
            words = tuple(shlex.split(line))
        except ValueError as error:
            raise UserError(f"talker {COMMAND}{line}: {error}; close it") from error
        if not words or shutil.which(words[0]) is None:
            raise UserError(f"talker {COMMAND}{line}: no such program; install it, or write its path")
        return cls(Path(words[0]).name, words)

    def speak(self, text: str) -> Iterator[Tensor]:
        return voice.command_voice(self.command, text)


@dataclass
class Echo(Puppet):
    """For tests: a sentence comes back as a beep of 200 ms a word with 200 ms of silence after it."""

    name: str = "echo"

    def speak(self, text: str) -> Iterator[Tensor]:
        beep = 0.4 * torch.sin(torch.arange(SAMPLE_RATE // 5) * (2 * math.pi * 400 / SAMPLE_RATE))
        for _ in text.split():
            yield beep
            yield torch.zeros_like(beep)


@dataclass
class TextToSpeech(Puppet):
    """A local VITS model: each clause is spoken as it is ready."""

    name: str
    network: Any
    tokenizer: Any

    @classmethod
    def load(cls, folder: Path) -> "TextToSpeech":
        from transformers import VitsModel, VitsTokenizer

        return cls(folder.name, *load_local("talker", folder, VitsModel, VitsTokenizer, "cpu"))

    @torch.inference_mode()
    def speak(self, text: str) -> Iterator[Tensor]:
        for clause in text.replace("!", ".").replace("?", ".").split("."):
            if clause.strip():
                inputs = self.tokenizer(clause, return_tensors="pt").to(self.network.device)
                if inputs["input_ids"].shape[1]:
                    yield from _at_16k(self.network(**inputs).waveform[0], self.network.config.sampling_rate)


@dataclass
class Omni:
    """A local Qwen-Omni model: thinker writes the answer, talker speaks it. transformers gives the sound of a whole answer at once,
    so its latency is that of the answer; a streaming vocoder would come in as another `turn`.

    `history`: a conversation's turns so far, which every answer is made from; the last `max_turns` are kept.
    """

    name: str
    network: Any
    processor: Any
    options: dict[str, Any] = field(
        default_factory=lambda: {"thinker_max_new_tokens": 128, "talker_max_new_tokens": 1024}
    )
    max_turns: int = 8
    history: list[dict] = field(default_factory=list)
    takes_speech = True

    @property
    def model(self) -> str:
        return self.name

    @classmethod
    def load(cls, folder: Path, kind: str) -> "Omni":
        import transformers

        model_class, processor_class = (getattr(transformers, name) for name in OMNI[kind])
        return cls(folder.name, *load_local("talker", folder, model_class, processor_class, "cpu"))

    def conversation(self) -> "Omni":
        return replace(self, history=[])

    @torch.inference_mode()
    def turn(self, utterance: str | Tensor) -> Iterator[Tensor | Words]:
        if isinstance(utterance, str):
            part = {"type": "text", "text": utterance}
        else:
            part = {"type": "audio", "audio": utterance.numpy()}
        messages = [*self.history, {"role": "user", "content": [part]}]
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        sounds = [p["audio"] for message in messages for p in message["content"] if p["type"] == "audio"]
        inputs = self.processor(text=prompt, audio=sounds or None, return_tensors="pt", padding=True)
        inputs = inputs.to(self.network.device)
        answer, sound = self.network.generate(**inputs, generation_mode="audio", **self.options)
        new = answer[:, inputs["input_ids"].shape[1] :]
        text = self.processor.batch_decode(new, skip_special_tokens=True)[0]
        answered = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        self.history = [*messages, answered][-2 * self.max_turns :]
        yield Words("avatar", text)
        yield from _at_16k(sound.flatten(), 24_000)


def _at_16k(samples: Tensor, rate: int) -> Iterator[Tensor]:
    samples = samples.detach().float().cpu().clamp(-1, 1)
    samples = resample(samples, rate, SAMPLE_RATE)
    yield from samples.split(PIECE)
