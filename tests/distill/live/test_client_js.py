"""client.js in a real browser, embedded as docs/serving.md says, against the real server."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from distill.commands.serving import read_portraits
from distill.live.scheduler import Engine
from distill.live.server import CLIENT, Options
from distill.live.talkers import Echo
from tests.support.live import serving
from tests.support.live.browser import record, tapes, until
from tests.support.live.serving import running

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "serving.md"
FRAME = 0.08
CONNECT = """async url => {
  const {Avatar} = await import(url);
  try { (window.kept ??= []).push(await Avatar.connect(document.createElement("canvas"))); return "in"; }
  catch (error) { return error.message; }
}"""
CUT = """async url => {
  const {Avatar} = await import(url), stopped = {};
  const node = first => ({first, node: {stop: when => stopped[first] = when}});
  const held = {frames: new Map(), awaited: new Map(), nodes: [8, 16, 24].map(node)};
  const avatar = Object.assign(new Avatar(), {...held, origin: 2, frame: 0.08, last: 31});
  avatar.cut(20);
  return [stopped, avatar.last, avatar.nodes.map(({first}) => first)];
}"""
SPEAK = "avatarClient.speak(Int16Array.from({length: 16000 * %d}, (_, i) => 12000 * Math.sin(i * 0.157)))"

SCREEN = """() => {
  const times = window.screen_ms = [];
  const tick = now => { if (times === window.screen_ms) { times.push(now); requestAnimationFrame(tick); } };
  requestAnimationFrame(tick);
}"""


def guide(language: str, marker: str) -> str:
    """The guide's block of a language that holds a marker."""
    blocks = re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    (found,) = (block for block in blocks if marker in block)
    return found


class Embedded:
    """The guide's snippet on the server's own host, and a client of another version."""

    def routes(self) -> list[Route]:
        snippet = guide("html", "/client.js")
        other = CLIENT.read_text(encoding="utf-8").replace("VERSION = 1,", "VERSION = 2,")
        return [
            Route("/embed", lambda _: HTMLResponse(f"<!doctype html>{snippet}")),
            Route("/other.js", lambda _: Response(other, media_type="text/javascript")),
        ]

    async def run(self) -> None:
        pass


@pytest.fixture
def page(chromium):
    engine = Engine(serving.a_puppet(), Echo(), 2)
    with running(engine, read_portraits([], (16, 16)), Options(doors=[Embedded()])) as address:
        page, faults = chromium.new_page(), []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(f"http://{address}/embed")
        yield page
        page.close()
        serving.eventually(lambda: not engine.viewers, 20.0)
        assert faults == []


def speech_and_lips(page) -> tuple[float, float]:
    """Two seconds of speech: seconds between what is heard and the lips, at its start or its end, or that it lasts too long,
    whichever is most; and seconds between two frames of the screen, but for the slowest twentieth."""
    before = page.evaluate("avatarClient.context.currentTime")
    page.evaluate(SPEAK % 2)
    page.evaluate("avatarClient.spoken()")
    page.evaluate(SCREEN)
    page.wait_for_timeout(3500)
    sound, began, drawn = tapes(page)
    times = began + np.arange(len(sound)) / 16000
    heard = times[(np.abs(sound) > 0.05) & (times > before)][[0, -1]]
    drawn = drawn[drawn[:, 0] > before]
    opened = drawn[drawn[:, 2] > 60, 0]
    closed = drawn[drawn[:, 0] > opened[-1], 0][0]
    apart = float(max(*np.abs(np.array([opened[0], closed]) - heard), abs(heard[1] - heard[0] - 2)))
    return apart, float(np.quantile(np.diff(page.evaluate("screen_ms")), 0.95)) / 1000


def test_an_embedded_avatar_talks_in_sync(page):
    page.click("#talk")
    until(page, "window.avatarClient && avatarClient.shown > 4")
    record(page, "avatarClient")
    # a frame, and three of the screen's: one until it is drawn, one until it is taped, one that a busy machine draws late
    allowed, found = FRAME + 0.05, [speech_and_lips(page)]
    while found[-1][0] > allowed and len(found) < 3:
        found.append(speech_and_lips(page))
    apart, screen = found[-1]
    if apart > allowed and screen > 2 / 60:
        pytest.skip(f"the machine is too busy to time anything: it draws the screen every {1000 * screen:.0f} ms")
    assert apart <= allowed, found


def test_an_embedded_avatar_is_interrupted(page):
    page.click("#talk")
    until(page, "window.avatarClient && avatarClient.shown > 4")
    record(page, "avatarClient")
    page.evaluate(SPEAK % 30)
    page.wait_for_timeout(1500)
    assert np.abs(tapes(page)[0][-1600:]).max() > 0.05
    page.evaluate("avatarClient.interrupt()")
    page.wait_for_timeout(1500)
    assert np.abs(tapes(page)[0][-8000:]).max() < 0.01


def test_a_chunk_that_is_cut_is_heard_to_there(page):
    stopped, last, kept = page.evaluate(CUT, "/client.js")
    assert stopped == pytest.approx({"8": 2 + 20 * 0.08, "16": 2 + 20 * 0.08, "24": 0})
    assert (last, kept) == (19, [8, 16])


def test_another_version_and_one_too_many_are_rejected_in_words(page):
    assert page.evaluate(CONNECT, "/other.js") == "the server speaks protocol 1, this client 2; update the older one"
    answers = [page.evaluate(CONNECT, "/client.js") for _ in range(3)]
    assert answers == ["in", "in", "maximum number of viewers reached (2); try again later"]
    page.evaluate("kept.forEach(avatar => avatar.close())")


@pytest.mark.slow
def test_the_guides_app_answers_on_a_page_of_its_own(chromium, tmp_path):
    engine = Engine(serving.a_puppet(), Echo(), 2)
    with running(engine, read_portraits([], (16, 16))) as address, socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        app = guide("python", "uvicorn.run").replace("127.0.0.1:8800", address).replace("port=8000", f"port={port}")
        assert len([line for line in app.splitlines() if line.strip()]) <= 45
        (tmp_path / "app.py").write_text(app, encoding="utf-8")
        with subprocess.Popen([sys.executable, tmp_path / "app.py"], stderr=subprocess.PIPE, text=True) as process:
            try:
                while "running on" not in process.stderr.readline():
                    assert process.poll() is None
                page = chromium.new_page()
                page.goto(f"http://127.0.0.1:{port}/")
                page.fill("#question", "one two three")
                page.click("button")
                until(page, "window.avatarClient && avatarClient.shown > 4")
                record(page, "avatarClient")
                page.click("button")
                page.wait_for_timeout(3000)
                sound, _, drawn = tapes(page)
                assert np.abs(sound).max() > 0.1
                assert np.ptp(drawn[:, 2]) > 100
                assert page.inner_text("#answer") == "You asked: one two three"
                page.close()
                serving.eventually(lambda: not engine.viewers, 20.0)
            finally:
                process.kill()


def test_the_guides_program_talks_through_the_avatar(capsys):
    engine = Engine(serving.a_puppet(), Echo(), 2)
    with running(engine, read_portraits([], (16, 16))) as address:
        code = guide("python", "import Client").replace("127.0.0.1:8800", address)
        exec(compile(code, str(GUIDE), "exec"), {})
    assert "(16, 16, 3)" in capsys.readouterr().out
