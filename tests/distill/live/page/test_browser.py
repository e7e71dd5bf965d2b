"""A real headless Chromium drives the page: sound and picture as they come out of it."""

import numpy as np
import pytest

from distill.live.talkers import Voice
from tests.support.live import serving
from tests.support.live.browser import RATE, record, tapes, until


@pytest.fixture(scope="module")
def served():
    with serving.serving(serving.a_puppet(), Voice("formant"), viewers=2) as (address, engine):
        yield address, engine


@pytest.fixture
def page(chromium, served):
    address, engine = served
    page = chromium.new_page(bypass_csp=True)  # for the tape; test_live_page has the policy
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.goto(f"http://{address}/")
    until(page, "page.hello")
    yield page
    page.close()
    serving.eventually(lambda: not engine.viewers, 20.0)
    assert faults == []


def start(page) -> None:
    page.click("#start")
    until(page, "page.conversation.avatar?.shown > 4")
    record(page, "page.conversation.avatar")


def say(page, text: str) -> None:
    page.fill("#say", text)
    page.keyboard.press("Enter")
    until(page, "page.conversation.state === 'talking'")


def test_a_typed_sentence_is_seen_and_heard_together(page):
    start(page)
    say(page, "Papa! Mama? Hello, hello.")
    until(page, "page.conversation.state === 'listening'")
    sound, began, drawn = tapes(page)
    frame = 1280 / RATE
    assert np.abs(sound).max() > 0.1
    assert np.ptp(drawn[:, 2]) > 150, "the mouth does not move"
    steps = np.diff(drawn[:, 1])
    assert steps.all(), "a frame is drawn twice"
    assert (steps < 0).sum() <= 1, (
        "frames are drawn late"
    )  # a page that gets the message that speech begins late goes back there

    def loudness(offset: float) -> np.ndarray:  # of the sound played while each frame stood
        starts = ((drawn[:-1, 0] - began + offset) * RATE).astype(int)
        ok = (starts >= 0) & (starts + 1280 <= len(sound))
        levels = [
            np.sqrt(np.mean(sound[s : s + 1280] ** 2)) if good else 0.0 for s, good in zip(starts, ok, strict=True)
        ]
        return np.log(np.array(levels) + 1e-3)

    lags = np.arange(-12, 13) / 50
    curve = [np.corrcoef(loudness(lag), drawn[:-1, 2])[0, 1] for lag in lags]
    best = lags[int(np.argmax(curve))]
    assert max(curve) > 0.8
    assert abs(best) <= frame, f"sound and mouth are {1000 * best:.0f} ms apart"
    assert page.evaluate("page.conversation.latency") < 6000  # on a machine that does other things too
    assert {"encode", "denoise", "decode", "talker"} <= set(page.evaluate("page.conversation.answers[0].parts_ms"))


def test_interrupt_makes_it_quiet_and_idle_is_alive(page):
    start(page)
    say(page, "This is a very long sentence, and it goes on, and on, and on, and nobody wants to hear all of it.")
    page.wait_for_timeout(500)
    page.click("#stop")
    until(page, "page.conversation.state === 'listening'", 20)
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
    page.click("#direction summary")
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
    until(page, "page.handsFree")
    until(
        page, "page.conversation.turns.size >= 1", 40
    )  # the sound comes around again; a busy machine misses its pauses
    until(page, "page.conversation.state === 'talking' || page.conversation.turns.size >= 2", 40)
    page.click("#microphone")
    until(page, "!page.handsFree")
    epoch = page.evaluate("page.conversation.avatar.epoch")
    page.click("#tiles .tile:nth-child(3)")
    until(page, f"page.conversation.avatar.epoch > {epoch} && page.conversation.avatar.shown >= 3", 20)


def test_a_picture_that_is_none_is_refused_in_words(page, tmp_path):
    start(page)
    wrong = tmp_path / "face.png"
    wrong.write_bytes(b"PK\x03\x04 not a picture")
    page.set_input_files("#picture", wrong)
    until(page, "document.getElementById('cropNote').textContent.includes('image cannot be read')", 60)
    assert page.is_disabled("#cropUse")
    page.click("#cropCancel")
    huge = tmp_path / "huge.png"
    huge.write_bytes(b"\x89PNG" + bytes(9 * 2**20))
    page.set_input_files("#picture", huge)
    until(page, "document.getElementById('cropNote').textContent.includes('too large')", 20)
    page.click("#cropCancel")
    shown = page.evaluate("page.conversation.avatar.shown")
    until(page, f"page.conversation.avatar.shown > {shown}")


def test_a_third_viewer_is_refused_since_the_maximum_is_reached(chromium, served):
    address, engine = served
    pages = [chromium.new_page() for _ in range(3)]
    for page, state in zip(pages, ("listening", "listening", "full"), strict=True):
        page.goto(f"http://{address}/")
        until(page, "page.hello")
        page.click("#start")
        until(page, f"page.conversation.state === '{state}'")
    assert "maximum number of viewers reached (2)" in pages[2].inner_text("#notice")
    pages[0].click("#end")
    serving.eventually(lambda: len(engine.viewers) < 2, 20.0)
    pages[2].click("#start")
    until(pages[2], "page.conversation.state === 'listening'")
    for page in pages:
        page.close()
    serving.eventually(lambda: not engine.viewers, 20.0)
