"""The page as people meet it: on a desktop, on a phone, with the keyboard alone, with a screen reader (axe-core), in the dark."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.live.answering.talker import Answering
from distill.live.server import PAGE
from distill.live.talkers import Voice
from students.weights.coverage import Coverage
from teachers.guidance import EmbeddedScales, GuidanceRange
from tests.support import tiny
from tests.support.live import serving
from tests.support.live.browser import record, tapes, until

PORTRAIT = Path(__file__).resolve().parents[4] / "docs" / "portrait.png"
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
COUNT = "window.clicks = 0; addEventListener('click', event => { if (event.isTrusted) clicks++; }, true)"
FOCUS = "document.activeElement.id || document.activeElement.textContent || document.activeElement.tagName"
SEEN = """id => { const box = document.getElementById(id).getBoundingClientRect();
  return box.width > 0 && box.top >= 0 && box.bottom <= innerHeight && box.left >= 0 && box.right <= innerWidth; }"""
READY = "document.getElementById('cropper').open && !document.getElementById('cropUse').disabled"
SMALL = """() => [...document.querySelectorAll("button, .button, input[type=range], .tile img, summary")]
  .filter(one => one.getBoundingClientRect().width && one.getBoundingClientRect().height < 24).map(one => one.outerHTML)"""


class Parrot:
    """A language model that answers in two sentences."""

    name = "parrot"

    def answer(self, messages):
        yield from ("You said ", messages[-1]["content"], ". And", " what else?")

    def transcribe(self, sound):
        return f"{len(sound) / 16000:.0f} seconds"


def narrow() -> Coverage:
    """Of a student that was trained on grey pictures."""
    grey = torch.randint(126, 130, (12, 3, 16, 16), generator=tiny.rng(1)).byte()
    return Coverage.fit(grey, grey[:4], ["a person nods"], tiny.fitted_codec())


@pytest.fixture(scope="module")
def served():
    with serving.serving(serving.a_puppet(), Answering(Voice("formant"), Parrot(), Parrot()), viewers=2) as found:
        yield found


@pytest.fixture
def visit(chromium, served):
    """A function that opens the page in a context of its own; nothing may be said on its console."""
    address, engine = served
    contexts, faults = [], []

    def visit(viewport=DESKTOP, **options):
        contexts.append(chromium.new_context(viewport=viewport, **options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.goto(f"http://{address}/")
        until(page, "page.hello && document.querySelector('#sentences button')")
        return page

    yield visit
    for context in contexts:
        context.close()
    serving.eventually(lambda: not engine.viewers, 20.0)
    assert faults == []


def state(page, name: str, seconds: float = 30.0) -> None:
    until(page, f"page.conversation.state === '{name}'", seconds)


def test_a_newcomer_hears_it_talk_after_one_click_and_reads_what_was_said(visit):
    page = visit()
    page.evaluate(COUNT)
    assert not page.locator("#guidance input").count()
    page.click("#sentences button")
    state(page, "talking")
    assert page.evaluate("clicks") <= 3
    assert page.inner_text("#mode") == "Conversation: parrot answers. Voice: formant."
    until(page, "document.querySelectorAll('#transcript p').length === 2")
    assert page.locator("#transcript p").all_inner_texts()[0] == "You: Hello, who are you?"
    state(page, "listening")
    said = "Avatar: You said Hello, who are you?. And what else?"
    assert page.locator("#transcript p").all_inner_texts()[1] == said
    page.click("#statistics summary")
    until(page, "document.querySelector('#panel td')?.textContent.endsWith(' ms')")


def test_a_student_that_takes_guidance_has_a_slider_for_each_scale(chromium):
    """What is moved is felt by the stream, and by the next one; a student without has none."""
    scales = EmbeddedScales(text=GuidanceRange(most=4.0, served=2.25), audio=GuidanceRange(most=3.0, served=1.5))
    with serving.serving(serving.a_puppet(guidance=scales), Answering(Voice("formant"), Parrot(), Parrot())) as (
        at,
        engine,
    ):
        page = chromium.new_page(viewport=PHONE)
        page.goto(f"http://{at}/")
        until(page, "page.hello && document.querySelector('#sentences button')")
        page.click("#sentences button")
        state(page, "listening")
        page.click("#direction summary")
        sliders = page.locator("#guidance input")
        assert [one.get_attribute("id") for one in sliders.all()] == ["guidance-text", "guidance-audio"]
        page.focus("#guidance-audio")
        for _ in range(30):  # a key that is held
            page.keyboard.press("ArrowLeft")
        page.keyboard.press("End")
        assert page.inner_text("#guidance div:nth-child(2) output") == "3.00"
        own = {"text": 2.25, "audio": 3.0}
        serving.eventually(lambda: [viewer.session.guidance for viewer in engine.viewers] == [own], 10.0)
        page.click("#end")
        serving.eventually(lambda: not engine.viewers, 10.0)
        page.click("#start")
        state(page, "listening")
        serving.eventually(lambda: [viewer.session.guidance for viewer in engine.viewers] == [own], 10.0)
        page.close()


def test_the_keyboard_alone_starts_talks_stops_chooses_and_ends(visit):
    page = visit()
    order = []
    while "Full screen" not in order and len(order) < 12:
        page.keyboard.press("Tab")
        order.append(page.evaluate(FOCUS))
        if order[-1] == "fullscreen":
            break
    assert order[0] == "start"
    page.keyboard.press("Tab")
    assert page.evaluate(FOCUS) == "say"
    page.keyboard.insert_text("One, two, three, four, five, six, seven, eight, nine, ten. " * 10)  # for half a minute
    page.keyboard.press("Enter")
    state(page, "talking")
    page.keyboard.press("Escape")
    state(page, "listening", 15)
    epoch = page.evaluate("page.conversation.avatar.epoch")
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.type") == "radio":
            break
    page.keyboard.press("ArrowRight")
    until(page, f"page.conversation.avatar.epoch > {epoch} && page.chosen.portrait === 1")
    rest = []
    while "BODY" not in rest and len(rest) < 20:
        page.keyboard.press("Tab")
        rest.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert [one for one in rest if one != "BODY"] == ["picture", "transcript", "SUMMARY", "SUMMARY"]
    page.focus("#end")
    page.keyboard.press("Enter")
    state(page, "closed")
    assert page.evaluate(FOCUS) == "start"
    assert page.inner_text("#stateText") == "Closed"


def test_on_a_phone_everything_needed_is_seen_at_once_and_fits(visit):
    page = visit(PHONE, has_touch=True, is_mobile=True, color_scheme="dark")
    for name in ("canvas", "state", "start", "say", "stop", "voiceRow"):
        assert page.evaluate(SEEN, name), name
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert page.evaluate(SMALL) == []
    page.tap("#sentences button")
    state(page, "talking")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.tap("#stop")
    state(page, "listening")


@pytest.mark.slow
def test_sound_is_muted_turned_down_and_recorded(visit):
    page = visit()
    page.click("#start")
    state(page, "listening")
    page.fill("#volume", "40")
    assert page.evaluate("page.conversation.avatar.out.gain.value") == pytest.approx(0.4)
    page.click("#mute")
    assert page.evaluate("page.conversation.avatar.out.gain.value") == 0
    page.click("#mute")
    page.click("#microphone")
    until(page, "page.handsFree")
    page.click("#microphone")
    until(page, "!page.handsFree")
    page.click("#record")
    until(page, "page.recording")
    page.wait_for_timeout(3500)  # the microphone's sentence comes around
    page.click("#record")
    until(page, "document.querySelectorAll('#transcript p').length >= 1", 60)  # a process begins that reads it
    until(page, "document.querySelector('#transcript p').textContent.includes(' seconds')")


def test_a_lost_connection_comes_back_and_an_end_is_an_end(visit):
    page = visit()
    page.click("#start")
    state(page, "listening")
    page.evaluate("page.conversation.avatar.socket.close()")
    state(page, "connecting")
    assert "trying again" in page.inner_text("#notice")
    state(page, "listening")
    assert "trying again" not in page.inner_text("#notice")
    page.click("#end")
    page.wait_for_timeout(1500)
    assert page.evaluate("page.conversation.state") == "closed"
    page.fill("#say", "Hello again.")
    page.keyboard.press("Enter")
    state(page, "talking")


def test_a_picture_is_cropped_shown_warned_of_and_used(chromium):
    bundle = replace(serving.a_puppet(), codec=tiny.fitted_codec(), coverage=narrow())
    with serving.serving(bundle, viewers=1) as (address, _):
        page = chromium.new_page()
        page.goto(f"http://{address}/")
        until(page, "page.hello")
        assert page.inner_text("#mode").startswith("Echo mode: the avatar repeats")
        page.set_input_files("#picture", PORTRAIT)
        until(page, "page.conversation.state === 'listening'")
        page.evaluate("page.conversation.avatar.socket.close()")  # the picture is sent again
        until(page, READY, 60)  # a process begins that reads it
        assert "unlike what this student was trained on" in page.inner_text("#cropNote")
        assert page.get_attribute("#cropNote", "class") == "warning"
        first = page.get_attribute("#cropSeen", "src")
        page.focus("#cropFrame")
        for key in ("+", "+", "+", "ArrowRight"):
            page.keyboard.press(key)
        assert page.is_disabled("#cropUse")
        until(page, READY)
        assert page.get_attribute("#cropSeen", "src") != first
        epoch = page.evaluate("page.conversation.avatar.epoch")
        page.click("#cropUse")
        until(page, f"page.conversation.avatar.epoch > {epoch}")
        assert page.get_attribute("#tiles .tile:last-child img", "alt") == "Your picture"
        assert page.is_checked("#tiles .tile:last-child input")
        page.close()


@pytest.mark.parametrize("decodes", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_large_frames_come_as_vp8_where_the_browser_decodes_it(chromium, decodes):
    """Over rewinds too, whose old frames are decoded and not shown."""
    with serving.serving(serving.a_puppet(height=160, width=160), Voice("formant"), viewers=1) as (address, engine):
        page, faults = chromium.new_page(bypass_csp=True), []
        page.on("pageerror", lambda error: faults.append(str(error)))
        if not decodes:
            page.add_init_script("delete window.VideoDecoder")
        page.goto(f"http://{address}/")
        page.click("#sentences button")
        state(page, "talking")
        assert page.evaluate("page.conversation.avatar.format") == (2 if decodes else 1)
        record(page, "page.conversation.avatar")
        for _ in range(3):
            page.click("#sentences button")
            page.wait_for_timeout(300)
        until(page, "page.conversation.turns.size === 4")
        state(page, "talking")
        state(page, "listening")
        _, _, drawn = tapes(page)
        assert np.ptp(drawn[:, 2]) > 150, "the mouth does not move"
        assert len(drawn) > 10
        page.close()
        serving.eventually(lambda: not engine.viewers, 20.0)
        assert faults == []


@pytest.mark.parametrize(("viewport", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")])
def test_axe_finds_nothing_serious(visit, viewport, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = visit(viewport, color_scheme=scheme)

    def check() -> None:
        found = axe.run(page).response["violations"]
        assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found if one["impact"] != "minor"] == []

    check()
    page.click("#sentences button")
    state(page, "talking")
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    check()
    page.set_input_files("#picture", PORTRAIT)
    until(page, READY, 60)
    check()


def test_the_page_is_small_and_nothing_of_it_comes_from_elsewhere():
    for file in PAGE.iterdir():
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 400, file
        assert not any(word in text for word in ("http://", "https://", "eval(", "innerHTML", "style=", 'onclick="')), (
            file
        )
