"""The talker of conversation mode: what the user says is answered by a language model, sentence after sentence by a voice."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from torch import Tensor

from distill.live.answering.endpoint import connect
from distill.live.answering.local import LocalChat, LocalTranscriber
from distill.live.talkers import Puppet, Talker, Words
from teachers.errors import UserError

PROMPT = (
    "You are a friendly person in a video call. What you write is spoken aloud: answer in one to three short sentences, as one "
    "talks, without lists, markup or emojis."
)
MAX_TURNS = 12  # that the model is reminded of
END = re.compile(r"(?<=[.!?;:…])\s+|(?<=[\u3002\uff01\uff1f])|\n+")  # the latter Chinese and Japanese marks
THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
MARKUP = re.compile(r"[*_`#|~]+")
BULLET = re.compile(r"^[-+•]\s+")


class Chat(Protocol):
    """A language model."""

    @property
    def name(self) -> str: ...

    def answer(self, messages: list[dict[str, str]]) -> Iterator[str]: ...


class Transcriber(Protocol):
    """Speech to text."""

    def transcribe(self, sound: Tensor) -> str: ...


@dataclass
class Answering:
    """`voice` speaks what `chat` answers. Without a `transcriber` only what is typed is understood. `history`: what the user said
    and what the avatar has begun to say since, turn by turn."""

    voice: Puppet
    chat: Chat
    transcriber: Transcriber | None = None
    prompt: str = PROMPT
    history: list[tuple[str, list[str]]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.voice.name

    @property
    def model(self) -> str:
        return self.chat.name

    @property
    def takes_speech(self) -> bool:
        return self.transcriber is not None

    def conversation(self) -> "Answering":
        return replace(self, history=[])

    def turn(self, utterance: str | Tensor) -> Iterator[Tensor | Words]:
        """Sound of the answer, piece by piece, each sentence's words before it; the user's own first, where they were spoken."""
        if isinstance(utterance, Tensor):
            if self.transcriber is None:
                raise UserError("speech is not understood here (--transcribe); type instead")
            utterance = self.transcriber.transcribe(utterance)
            if not utterance:
                return
            yield Words("user", utterance)
        messages, said = self._messages(utterance), list[str]()
        self.history.append((utterance, said))
        for sentence in sentences(self.chat.answer(messages)):
            said.append(sentence)
            yield Words("avatar", sentence)
            yield from self.voice.speak(sentence)

    def _messages(self, utterance: str) -> list[dict[str, str]]:
        """The conversation so far, without turns that came to nothing."""
        self.history = [(user, said) for user, said in self.history if said][-MAX_TURNS:]
        pairs = (
            ({"role": "user", "content": user}, {"role": "assistant", "content": " ".join(said)})
            for user, said in self.history
        )
        past = [message for pair in pairs for message in pair]
        return [{"role": "system", "content": self.prompt}, *past, {"role": "user", "content": utterance}]


def sentences(pieces: Iterable[str]) -> Iterator[str]:
    """Sentences of a text that comes in pieces, as soon as each is complete, without markup and a model's thoughts."""
    held = ""
    for piece in pieces:
        held = THOUGHT.sub("", held + MARKUP.sub("", piece))
        if "<think>" not in held:
            *whole, held = END.split(held)
            yield from filter(None, map(plain, whole))
    if "<think>" not in held and (rest := plain(held)):
        yield rest


def plain(text: str) -> str:
    """A sentence as it is spoken: without the mark of a list, in one line."""
    return BULLET.sub("", " ".join(text.split()))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The options of conversation mode: each of `answer` and `transcribe` is an API's URL or a folder."""

    answer: str | None = None
    answer_model: str | None = None
    prompt: str = PROMPT
    transcribe: str | None = None
    transcribe_model: str | None = None

    def join(self, voice: Talker, environment: Mapping[str, str]) -> Talker:
        """The talker: `voice` alone (echo mode) where nothing answers. UserError for what does not belong together or cannot be
        reached; tokens are ANSWER_TOKEN and TRANSCRIBE_TOKEN of `environment`."""
        if self.answer is None:
            if given := next(
                (name for name in ("answer_model", "transcribe", "transcribe_model") if getattr(self, name)), None
            ):
                raise UserError(f"--{given.replace('_', '-')} is of conversation mode; give --answer URL|DIR too")
            return voice
        if not isinstance(voice, Puppet):
            raise UserError(f"--answer wants a voice, and talker {voice.name} answers by itself; give another --talker")
        chat = (
            connect("--answer", self.answer, self.answer_model, environment, "ANSWER_TOKEN")
            if "://" in self.answer
            else LocalChat.load(Path(self.answer))
        )
        transcriber = None
        if self.transcribe is not None:
            transcriber = (
                connect("--transcribe", self.transcribe, self.transcribe_model, environment, "TRANSCRIBE_TOKEN")
                if "://" in self.transcribe
                else LocalTranscriber.load(Path(self.transcribe))
            )
        return Answering(voice, chat, transcriber, self.prompt)
