"""Language models behind an OpenAI-compatible HTTP API (llama.cpp, Ollama, vLLM, a hosted one): answers as they are written, and
speech to text.

The token comes from the environment, goes into the Authorization header of this one server, and nowhere else: redirects are not
followed, and whatever the server says is shown without it.
"""

import io
import json
import time
import wave
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from torch import Tensor

from teachers.encoders.small import SAMPLE_RATE
from teachers.errors import UserError

SILENT_SECONDS = 30.0  # without a byte of the server
ANSWER_SECONDS = 120.0  # of one answer
MAX_LINE = 2**16  # bytes
MAX_ANSWER = 8000  # characters
MAX_BODY = 2**20
MAX_TOKENS = 400


@dataclass(frozen=True)
class Endpoint:
    """`url` is the base of the API, such as http://127.0.0.1:11434/v1; `name` the model's."""

    url: str
    name: str
    token: str = field(default="", repr=False)

    def answer(self, messages: list[dict[str, str]]) -> Iterator[str]:
        """The model's answer to a conversation ({"role", "content"} each), in pieces as they come. UserError where it fails."""
        body = {"model": self.name, "messages": messages, "stream": True, "max_tokens": MAX_TOKENS}
        until, left = time.monotonic() + ANSWER_SECONDS, MAX_ANSWER
        with self._request("POST", "chat/completions", json.dumps(body).encode(), "application/json") as response:
            if "json" in response.headers.get_content_type():  # a server that does not stream
                yield _text(json.loads(response.read(MAX_BODY)), "message")[:left]
                return
            while left > 0 and time.monotonic() < until and (line := response.readline(MAX_LINE)):
                if not line.startswith(b"data:") or (data := line[5:].strip()) == b"[DONE]":
                    continue
                piece = _text(json.loads(data), "delta")[:left]
                left -= len(piece)
                yield piece

    def transcribe(self, sound: Tensor) -> str:
        """The words of samples [S] in [-1, 1] at 16 kHz; "" where there are none. UserError where it fails."""
        edge = uuid4().hex
        fields = {"model": self.name, "response_format": "json"}
        parts = [f'--{edge}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields.items()]
        head = 'Content-Disposition: form-data; name="file"; filename="speech.wav"\r\nContent-Type: audio/wav\r\n\r\n'
        body = "".join([*parts, f"--{edge}\r\n", head]).encode() + to_wav(sound) + f"\r\n--{edge}--\r\n".encode()
        kind = f"multipart/form-data; boundary={edge}"
        with self._request("POST", "audio/transcriptions", body, kind) as response:
            return str(json.loads(response.read(MAX_BODY)).get("text", "")).strip()[:MAX_ANSWER]

    def models(self) -> list[str]:
        """Names of the models that the server has."""
        with self._request("GET", "models") as response:
            return [str(model["id"]) for model in json.loads(response.read(MAX_BODY))["data"]]

    @contextmanager
    def _request(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> Iterator[HTTPResponse]:
        parts = urlsplit(self.url)
        connection_class = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        connection = connection_class(parts.hostname or "", parts.port, timeout=SILENT_SECONDS)
        headers = {"Content-Type": kind} if kind else {}
        headers |= {"Authorization": f"Bearer {self.token}"} if self.token else {}
        try:
            connection.request(method, f"{parts.path.rstrip('/')}/{path}", body, headers)
            response = connection.getresponse()
            if response.status != 200:
                reason = _reason(response.read(2000).decode("utf-8", "replace")) or response.reason
                raise UserError(f"{response.status} {self._shown(reason)}: {parts.netloc}")
            yield response
        except UserError:
            raise
        except (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
            why = f"{type(error).__name__}: {self._shown(str(error))}"
            raise UserError(f"no answer ({why}): {parts.netloc}") from None  # its frames hold the token
        finally:
            connection.close()

    def _shown(self, words: str) -> str:
        """A server's words in a line, without the token."""
        words = words.replace(self.token, "(token)") if self.token else words
        return " ".join(words.split())[:150]


def connect(option: str, url: str, model: str | None, environment: Mapping[str, str], variable: str) -> Endpoint:
    """The endpoint that `option` names, its token from `variable` of the environment. UserError where it does not answer, or where
    no model is named and it has not just one."""
    parts = urlsplit(url)
    try:
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid or "@" in parts.netloc:
        raise UserError(
            f"{option}: {parts.scheme}://{parts.netloc.rpartition('@')[2]} is no address of an API; give http(s)://HOST:PORT/v1"
        )
    found = Endpoint(url, model or "", environment.get(variable, ""))
    if model is not None:
        return found
    try:
        names = found.models()
    except UserError as error:
        raise UserError(f"{option}: {error}; start that server, or name a model by {option}-model") from error
    if len(names) != 1:
        raise UserError(
            f"{option}: {len(names)} models at {parts.netloc} ({', '.join(names[:8])}); choose by {option}-model"
        )
    return Endpoint(url, names[0], found.token)


def _reason(body: str) -> str:
    """What a server says of its refusal."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body


def _text(reply: Any, part: str) -> str:
    """The text of a reply's first choice."""
    if error := reply.get("error"):
        raise ValueError(error.get("message", error) if isinstance(error, dict) else error)
    choices = reply.get("choices") or [{}]
    return (choices[0].get(part) or {}).get("content") or ""


def to_wav(sound: Tensor) -> bytes:
    """Samples [S] in [-1, 1] at 16 kHz as a file, s16."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(SAMPLE_RATE)
        out.writeframes((sound.clamp(-1, 1) * 32767).round().short().numpy().astype("<i2").tobytes())
    return file.getvalue()
