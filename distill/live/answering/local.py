"""Models of local folders, by transformers on the CPU: a chat model that answers, a speech-to-text model that understands."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teachers.checkpoints.local_model import load_local
from teachers.encoders.small import SAMPLE_RATE
from teachers.errors import UserError

MAX_NEW_TOKENS = 200


@dataclass
class LocalChat:
    """A causal language model with a chat template."""

    name: str
    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, folder: Path) -> "LocalChat":
        """UserError where it cannot be read or was not taught to answer."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model, tokenizer = load_local("chat model", folder, AutoModelForCausalLM, AutoTokenizer, "cpu")
        if not tokenizer.chat_template:
            raise UserError(f"chat model has no chat template: {folder}; give a model trained to answer in a chat")
        return cls(folder.name, model, tokenizer)

    def answer(self, messages: list[dict[str, str]]) -> Iterator[str]:
        """As `Endpoint.answer`; generation stops where nobody takes the next piece."""
        from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

        stop, failed = threading.Event(), list[Exception]()

        class Stopped(StoppingCriteria):
            def __call__(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:  # pyright: ignore
                return torch.full((len(input_ids),), stop.is_set())

        inputs = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)

        def generate() -> None:
            try:
                stopping = StoppingCriteriaList([Stopped()])
                options = {"max_new_tokens": MAX_NEW_TOKENS, "streamer": streamer, "stopping_criteria": stopping}
                self.model.generate(**inputs, **options)
            except Exception as error:  # raised again where the pieces are read
                failed.append(error)
                streamer.end()

        thread = threading.Thread(target=generate, name="chat model", daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            stop.set()
            thread.join()
        if failed:
            raise UserError(f"the chat model failed ({type(failed[0]).__name__}: {str(failed[0])[:100]})")


@dataclass
class LocalTranscriber:
    """A speech-to-text model, such as Whisper."""

    name: str
    model: Any
    processor: Any

    @classmethod
    def load(cls, folder: Path) -> "LocalTranscriber":
        """UserError where it cannot be read."""
        from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

        return cls(folder.name, *load_local("transcriber", folder, AutoModelForSpeechSeq2Seq, AutoProcessor, "cpu"))

    @torch.inference_mode()
    def transcribe(self, sound: Tensor) -> str:
        """As `Endpoint.transcribe`."""
        inputs = self.processor(sound.numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)
        return self.processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()
