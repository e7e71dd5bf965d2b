"""A language model behind HTTP: a stand-in server on loopback that says what it was asked."""

import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from distill.live.answering.endpoint import Endpoint, connect, to_wav
from teachers.errors import UserError

TOKEN = "a-secret-token-of-somebody"
MODELS = {"data": [{"id": "small"}]}


class StandIn(BaseHTTPRequestHandler):
    """Of the server: `asked`, what came; `answers`, path -> status, content type and body."""

    def do_GET(self):
        self.do_POST()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.path, dict(self.headers), body))
        status, kind, answer = self.server.answers[self.path]
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if status in (301, 307):
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/v1/models")
        self.end_headers()
        self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), StandIn) as found:
        found.asked, found.answers = [], {"/v1/models": (200, "application/json", MODELS)}
        found.url = f"http://127.0.0.1:{found.server_port}/v1"
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def stream(*pieces: str) -> bytes:
    """Server-sent events as OpenAI's API has them."""
    deltas = [{"choices": [{"delta": {"role": "assistant"}}]}]
    deltas += [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    lines = [f"data: {json.dumps(one)}\n\n" for one in [*deltas, {"choices": [], "usage": {}}]]
    return "".join([": a comment\n\n", *lines, "data: [DONE]\n\n"]).encode()


def test_an_answer_comes_in_pieces_and_the_token_goes_into_the_header_alone(server, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    server.answers["/v1/chat/completions"] = 200, "text/event-stream; charset=utf-8", stream("Good ", "morning.")
    endpoint = connect("--answer", server.url, None, {"ANSWER_TOKEN": TOKEN}, "ANSWER_TOKEN")
    assert endpoint.name == "small"
    assert "".join(endpoint.answer([{"role": "user", "content": "Hello"}])) == "Good morning."
    _, headers, body = server.asked[-1]
    assert headers["Authorization"] == f"Bearer {TOKEN}"
    asked = json.loads(body)
    assert (asked["model"], asked["stream"]) == ("small", True)
    assert asked["messages"] == [{"role": "user", "content": "Hello"}]
    assert TOKEN not in repr(endpoint) + caplog.text + "".join(capfd.readouterr())
    without = connect("--answer", server.url, "other", {}, "ANSWER_TOKEN")
    list(without.answer([]))
    assert "Authorization" not in server.asked[-1][1]


def test_a_server_that_does_not_stream_is_read_too(server):
    reply = {"choices": [{"message": {"role": "assistant", "content": "All at once."}}]}
    server.answers["/v1/chat/completions"] = 200, "application/json", reply
    assert list(Endpoint(server.url, "m").answer([])) == ["All at once."]


@pytest.mark.parametrize(
    ("status", "kind", "body", "words"),
    [
        (401, "application/json", {"error": {"message": f"wrong key {TOKEN}"}}, r"401 wrong key \(token\): 127"),
        (500, "text/html", b"<h1>broken</h1>", "500 <h1>broken</h1>: 127"),
        (307, "text/html", b"", "307 "),
        (200, "text/event-stream", b"data: {not json\n\n", "no answer .JSONDecodeError"),
        (200, "text/event-stream", b'data: {"error": {"message": "too long"}}\n\n', "no answer .*too long"),
        (200, "application/json", [1], "no answer"),
    ],
)
def test_what_a_server_refuses_is_one_line_without_the_token(server, status, kind, body, words):
    server.answers["/v1/chat/completions"] = status, kind, body
    with pytest.raises(UserError, match=words) as caught:
        list(Endpoint(server.url, "m", TOKEN).answer([]))
    assert TOKEN not in str(caught.value)
    assert len(server.asked) == 1, "a redirect was followed"


def test_an_endless_answer_is_cut(server):
    server.answers["/v1/chat/completions"] = 200, "text/event-stream", stream(*["word " * 100] * 50)
    assert len("".join(Endpoint(server.url, "m").answer([]))) == 8000


def test_speech_is_sent_as_a_wav_file(server):
    server.answers["/v1/audio/transcriptions"] = 200, "application/json", {"text": " Hello there. "}
    sound = 0.5 * torch.ones(1600)
    assert Endpoint(server.url, "whisper", TOKEN).transcribe(sound) == "Hello there."
    _, headers, body = server.asked[-1]
    assert headers["Content-Type"].startswith("multipart/form-data; boundary=")
    assert to_wav(sound) in body
    assert b'name="model"\r\n\r\nwhisper\r\n' in body


def test_addresses_and_models_that_do_not_fit_are_refused_in_one_line(server):
    for url in ("ftp://x/v1", "http://", "http://user:secret@host/v1", "http://host:99999/v1"):
        with pytest.raises(UserError, match="no address of an API") as caught:
            connect("--answer", url, None, {}, "ANSWER_TOKEN")
        assert "secret" not in str(caught.value)
    server.answers["/v1/models"] = 200, "application/json", {"data": [{"id": "a"}, {"id": "b"}]}
    with pytest.raises(UserError, match=r"2 models at .* \(a, b\); choose by --answer-model"):
        connect("--answer", server.url, None, {}, "ANSWER_TOKEN")
    with pytest.raises(UserError, match="start that server"):
        connect("--answer", "http://127.0.0.1:9/v1", None, {}, "ANSWER_TOKEN")
