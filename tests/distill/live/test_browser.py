"""A real headless Chromium drives the page: sound and picture as they come out of it."""

import os
import shutil
import time
import wave

import numpy as np
import pytest
import torch
from playwright.sync_api import sync_playwright

from distill.live.talkers import Voice
from distill.live.voice import formant_voice
from tests.support import serving
from tests.support.serving import MOUTH

HOW = "no browser: apt-get install chromium, or playwright install --with-deps chromium, or CHROMIUM=PATH of one"
REQUIRED = bool(os.environ.get("REQUIRE_BROWSER"))
"""Set by .ci/run where it has installed a browser: then a missing one is a failure."""
FLAGS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
RATE = 16000
RECORD = """
async mouth => {
  const {player} = avatar, {context} = player;
  const code = `registerProcessor("tape", class extends AudioWorkletProcessor {
    process([input]) { if (input[0]) this.port.postMessage([currentTime, Array.from(input[0])]); return true; } });`;
  await context.audioWorklet.addModule(URL.createObjectURL(new Blob([code], {type: "text/javascript"})));
  const tape = new AudioWorkletNode(context, "tape", {numberOfOutputs: 0});
  window.sounds = []; window.drawn = [];
  tape.port.onmessage = event => sounds.push(event.data);
  player.out.connect(tape);
  const look = () => {
    const shown = player.shown, all = player.pen.getImageData(0, 0, player.canvas.width, player.canvas.height).data;
    const at = (x, y) => all[4 * (y * player.canvas.width + x)];
    if (!drawn.length || drawn[drawn.length - 1][1] !== shown)
      drawn.push([context.currentTime - (context.outputLatency || 0), shown, at(8, mouth), at(14, 5), at(0, 0)]);
    requestAnimationFrame(look);
  };
  look();
}
"""


def find_chromium() -> str | None:
    """CHROMIUM, one on PATH, or one that playwright has installed; nothing is downloaded. None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    if path := os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None):
        return path
    with sync_playwright() as driver:
        path = driver.chromium.executable_path
    return path if os.path.isfile(path) else None


CHROMIUM = find_chromium()
if CHROMIUM is None and not REQUIRED:
    pytest.skip(HOW, allow_module_level=True)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    assert CHROMIUM is not None, HOW
    said = tmp_path_factory.mktemp("microphone") / "said.wav"
    microphone_gets(said)
    with sync_playwright() as driver:
        flags = [*FLAGS, f"--use-file-for-fake-audio-capture={said}"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served():
    with serving.serving(serving.a_puppet(), Voice("formant"), viewers=2) as (address, engine):
        yield address, engine


@pytest.fixture
def page(chromium, served):
    address, engine = served
    page = chromium.new_page()
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.goto(f"http://{address}/")
    until(page, "avatar.hello")
    yield page
    page.close()
    serving.eventually(lambda: not engine.viewers, 20.0)
    assert faults == []


def microphone_gets(file) -> None:
    """A sentence between two silences; the fake device repeats it."""
    speech = torch.cat([torch.zeros(RATE), *formant_voice("hello mama papa"), torch.zeros(2 * RATE)])
    with wave.open(str(file), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE)
        out.writeframes((speech * 32767).short().numpy().tobytes())


def until(page, condition: str, seconds: float = 30.0) -> None:
    """Wait for a JavaScript condition (wait_for_function would need eval, which the page forbids)."""
    end = time.monotonic() + seconds
    while not page.evaluate(f"Boolean({condition})"):
        assert time.monotonic() < end, (
            f"not after {seconds} s: {condition}; the page says {page.inner_text('#notice')!r}"
        )
        page.wait_for_timeout(20)


def start(page) -> None:
    page.click("#start")
    until(page, "avatar.player && avatar.player.shown > 4")
    page.evaluate(RECORD, MOUTH.start + 1)


def say(page, text: str) -> None:
    page.fill("#say", text)
    page.keyboard.press("Enter")
    until(page, "avatar.state === 'talking'")


def tapes(page) -> tuple[np.ndarray, float, np.ndarray]:
    """The sound that came out, the context's time of its first sample, and rows (time played, frame, mouth, wall, noise)."""
    received, drawn = page.evaluate("[sounds, drawn]")
    return np.concatenate([np.array(block) for _, block in received]), received[0][0], np.array(drawn)


def test_a_typed_sentence_is_seen_and_heard_together(page):
    start(page)
    say(page, "Papa! Mama? Hello, hello.")
    until(page, "avatar.state === 'listening'")
    sound, began, drawn = tapes(page)
    frame = 1280 / RATE
    assert np.abs(sound).max() > 0.1
    assert np.ptp(drawn[:, 2]) > 150, "the mouth does not move"
    assert np.diff(drawn[:, 1]).min() >= 1, "a frame is drawn twice or late"

    def loudness(offset: float) -> np.ndarray:  # of the sound played while each frame stood
        starts = ((drawn[:-1, 0] - began + offset) * RATE).astype(int)
        ok = (starts >= 0) & (starts + 1280 <= len(sound))
        levels = [
            np.sqrt(np.mean(sound[s : s + 1280] ** 2)) if good else 0.0 for s, good in zip(starts, ok, strict=True)
        ]
        return np.log(np.array(levels) + 1e-3)

    lags = np.arange(-0.24, 0.2401, 0.02)
    curve = [np.corrcoef(loudness(lag), drawn[:-1, 2])[0, 1] for lag in lags]
    best = lags[int(np.argmax(curve))]
    assert max(curve) > 0.8
    assert abs(best) <= frame, f"sound and mouth are {1000 * best:.0f} ms apart"
    assert page.evaluate("avatar.latency") < 6000  # on a machine that does other things too
    assert {"encode", "denoise", "decode", "talker"} <= set(page.evaluate("avatar.answers[0].parts_ms"))


def test_interrupt_makes_it_quiet_and_idle_is_alive(page):
    start(page)
    say(page, "This is a very long sentence, and it goes on, and on, and on, and nobody wants to hear all of it.")
    page.wait_for_timeout(500)
    page.click("#interrupt")
    until(page, "avatar.state === 'listening'", 20)
    page.wait_for_timeout(150)
    page.evaluate("sounds.length = drawn.length = 0")
    page.wait_for_timeout(1500)
    sound, _, drawn = tapes(page)
    assert np.abs(sound).max() < 0.01, "it still talks"
    assert len(drawn) >= 6, "idle stands still"
    assert len(set(drawn[:, 4])) > 3, "idle frames are all alike"
    assert np.ptp(drawn[:, 2]) < 20, "the mouth moves without sound"


def test_the_text_condition_changes_while_it_talks(page):
    start(page)
    say(page, "One, two, three, four, five, six, seven, eight, nine, ten, and so on and on.")
    before = page.evaluate("drawn[drawn.length - 1]")
    page.fill("#condition", "someone frowns")
    page.click("#setCondition")
    until(page, f"Math.abs(drawn[drawn.length - 1][3] - {before[3]}) > 3", 20)
    sound, _, drawn = tapes(page)
    change = drawn[np.abs(drawn[:, 3] - before[3]) > 3][0]
    assert change[1] - before[1] <= 20, "the text is felt late"
    page.wait_for_timeout(500)
    after, _, _ = tapes(page)
    assert np.abs(after[len(sound) :]).max() > 0.05, "the speech broke off"


def test_a_microphone_turn_is_answered_and_another_portrait_begins_anew(page):
    start(page)
    page.click("#microphone")
    until(page, "avatar.microphone")
    until(page, "avatar.turns.size >= 1", 40)  # the sound comes around again; a busy machine misses its pauses
    until(page, "avatar.state === 'talking' || avatar.turns.size >= 2", 40)
    page.click("#microphone")
    until(page, "!avatar.microphone")
    epoch = page.evaluate("avatar.player.epoch")
    page.click("#portraits img:nth-child(3)")
    until(page, f"avatar.player.epoch > {epoch} && avatar.player.shown >= 3", 20)


def test_a_picture_that_is_none_is_refused_in_words(page, tmp_path):
    start(page)
    wrong = tmp_path / "face.png"
    wrong.write_bytes(b"PK\x03\x04 not a picture")
    page.set_input_files("#picture", wrong)
    until(page, "document.getElementById('notice').textContent.includes('image cannot be read')", 20)
    huge = tmp_path / "huge.png"
    huge.write_bytes(b"\x89PNG" + bytes(9 * 2**20))
    page.set_input_files("#picture", huge)
    until(page, "document.getElementById('notice').textContent.includes('too large')", 20)
    shown = page.evaluate("avatar.player.shown")
    until(page, f"avatar.player.shown > {shown}")


def test_a_third_viewer_is_refused_since_the_maximum_is_reached(chromium, served):
    address, engine = served
    pages = [chromium.new_page() for _ in range(3)]
    for page in pages[:2]:
        page.goto(f"http://{address}/")
        until(page, "avatar.hello")
    pages[2].goto(f"http://{address}/")
    until(pages[2], "avatar.state === 'full'")
    for page in pages:
        page.close()
    serving.eventually(lambda: not engine.viewers, 20.0)
