"""One viewer's stream on a clock of its own: turns, rewinds, back-pressure, and that nothing is lost or shifted."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from distill.live import protocol
from distill.live.turns import Turn
from distill.live.viewer import FIRST_FRAME, Viewer
from students.history import History
from teachers.errors import UserError
from teachers.guidance import EmbeddedScales, GuidanceRange
from tests.support import tiny
from tests.support.live.serving import a_puppet

FPS, PER_FRAME = 12.5, 1280
SCALES = EmbeddedScales(text=GuidanceRange(), audio=GuidanceRange())


SOON = 0.03 * FPS + 2  # frames: the way to the page, a report's and a chunk's rounding up
AT_FIRST = 0.08 * FPS + 2  # until the way was measured


class Stage:
    """A viewer whose page plays what it gets, on a clock that the test moves. A chunk takes `drawing` seconds, in which the engine
    does nothing else, a message `way` seconds, there or back."""

    def __init__(self, bundle=None, lead=2, drawing=0.0, way=0.0):
        self.now, self.messages, self.seen, self.sound_of = 0.0, [], {}, {}
        self.drawing, self.way = drawing, way
        self.there, self.back, self.drawn = [], [], None
        self.started: list[tuple[Turn, object]] = []
        self.viewer = Viewer(
            bundle or a_puppet(),
            lead,
            lambda message: self.there.append((self.now + self.way, message)) if self.way else self.take(message),
            lambda turn, sound: self.started.append((turn, sound)),
            lambda: max(0.05, drawing),
        )
        self.origin, self.last, self.epoch, self.late = None, -1, 0, []

    def take(self, message):
        if isinstance(message, bytes):
            chunk = protocol.read_chunk(message, (16, 16))
            assert chunk.epoch == self.epoch
            assert chunk.first_frame == self.last + 1, "a gap or an overlap"
            if self.origin is None:
                self.origin = self.now - chunk.first_frame / FPS
            if self.origin + chunk.first_frame / FPS < self.now - 1e-9:
                self.late.append(chunk.first_frame)
            self.last += len(chunk.frames)
            for i, (frame, sound) in enumerate(
                zip(chunk.frames, np.split(chunk.sound, len(chunk.frames)), strict=True)
            ):
                self.seen[chunk.first_frame + i], self.sound_of[chunk.first_frame + i] = frame, sound
            return
        self.messages.append(message)
        if message["type"] == "opened":
            self.epoch, self.origin, self.last = message["epoch"], None, -1
        if message["type"] == "rewind":
            if message["frame"] < min(self.place(), self.last + 1) - 1e-9:  # what was seen is taken back
                self.late.append(message["frame"])
            self.epoch, self.last = message["epoch"], message["frame"] - 1
            for shown in (self.seen, self.sound_of):
                for number in [number for number in shown if number > self.last]:
                    del shown[number]

    def place(self):
        return 0 if self.origin is None else (self.now - self.origin) * FPS

    def run(self, seconds: float):
        """The engine and the page, 10 ms at a time."""
        for _ in range(round(seconds * 100)):
            self.draw()
            self.now += 0.01
            while self.there and self.there[0][0] <= self.now:
                self.take(self.there.pop(0)[1])
            if self.origin is not None:
                self.ask(self.viewer.played, min(int(self.place()) + 1, self.last + 1), self.epoch)
            while self.drawn is None and self.back and self.back[0][0] <= self.now:
                came, function, given = self.back.pop(0)
                function(*given, came)

    def ask(self, function, *given):
        """What the page says; the engine reads it between two chunks, with the time at which it came."""
        self.back.append((self.now + self.way, function, given))

    def draw(self):
        """The engine: a chunk that is ready is handed over, and the next one begun."""
        while True:
            if self.drawn is not None:
                began, found = self.drawn
                if self.now < began + self.drawing - 1e-9:
                    return
                self.drawn = None
                self.viewer.deliver(found, began, began, self.now)
            if (due := self.viewer.due(self.now)) is None:
                return
            assert due < self.now + 5
            self.drawn = self.now, self.viewer.prepare(self.now).step()

    def open(self):
        self.viewer.open(tiny.a_portrait(), "a person nods", 7, self.now)
        self.run(1)

    def say(self, sound, done=True):
        self.viewer.say(self.viewer.answer("something", self.now), self.now)
        turn = self.started[-1][0]
        for piece in sound.split(1600):
            turn.put(piece, self.now)
        turn.finished = done
        return turn

    def types(self):
        return [message["type"] for message in self.messages]

    def loud(self):
        return [n for n, sound in sorted(self.sound_of.items()) if np.abs(sound).max() > 0.05]


def a_tone(seconds: float):
    return 0.4 * torch.sin(torch.arange(round(seconds * 16000)) * 0.157)


def test_a_stream_that_shows_nothing_may_wait_a_little_and_runs_from_its_first_chunk_on():
    stage = Stage()
    viewer, now = stage.viewer, stage.now
    viewer.open(tiny.a_portrait(), "a person nods", 7, now)
    assert viewer.due(now + 0.1) == pytest.approx(now + FIRST_FRAME)
    chunk = viewer.deliver(viewer.prepare(now).step(), now, now, now + 0.2)
    assert viewer.due(now + 0.3) == pytest.approx(now + 0.2 + len(chunk.frames) / 12.5)
    viewer.played(2, viewer.epoch, now + 0.5)
    assert viewer.due(now + 0.6) == pytest.approx(now + 0.5 + (len(chunk.frames) - 2) / 12.5)


def test_an_interrupt_knows_what_a_player_here_has_handed_out_though_its_report_came_too_late():
    """Reports of an earlier epoch do not count; without the frames seen since, the session would wait for them for ever."""
    shown, messages = [0], []
    viewer = Viewer(a_puppet(), 2, messages.append, lambda *_: None, local=lambda: shown[0])
    viewer.open(tiny.a_portrait(), "a person nods", 7, 0.0)
    for _ in range(2):
        viewer.deliver(viewer.prepare(0.0).step(), 0.0, 0.0, 0.0)
    drawn = viewer.session.point.frame
    shown[0] = drawn - 1
    viewer.played(drawn - 1, viewer.epoch + 1, 0.1)
    viewer.interrupt(0.1)
    assert viewer.session.viewed == drawn - 1
    assert viewer.deliver(viewer.prepare(0.1).step(), 0.1, 0.1, 0.1) is not None, "starved by what it does not know of"


def test_it_idles_in_bounded_advance_and_waits_for_a_viewer_who_stops():
    stage = Stage()
    stage.open()
    assert stage.last >= 12
    assert stage.late == []
    stage.viewer.played = lambda *_: None  # the page falls silent
    stage.run(5)
    assert stage.viewer.session.point.frame - stage.viewer.session.viewed <= 3 * 4


def test_an_answer_begins_at_the_next_frame_that_can_reach_the_viewer_and_every_sample_is_played():
    stage = Stage()
    stage.open()
    stage.run(0.12)
    asked, sound = stage.place(), a_tone(1.0)
    turn = stage.say(sound)
    stage.run(3)
    first = turn.first_frame
    assert 0 < first - asked <= AT_FIRST
    played = np.concatenate([stage.sound_of[n] for n in range(first, first + 13)])
    assert np.abs(played[: len(sound)] - sound.numpy()).max() < 1e-4
    assert stage.loud() == list(range(first, first + 13))
    bright = [n for n in sorted(stage.seen) if stage.seen[n][11, 8, 0] > 100]
    assert bright == stage.loud()  # the mouth is open in just those frames
    assert stage.late == []
    assert stage.viewer.session.shift < 0, "nothing was left out"
    assert stage.types().index("turn") < stage.types().index("answer") < stage.types().index("done")
    assert [m["frame"] for m in stage.messages if m["type"] in ("turn", "done")] == [first, first + 13]
    assert stage.viewer.turn is None


def test_speech_that_comes_piece_by_piece_has_no_hole_while_there_is_time():
    stage = Stage()
    stage.open()
    sound = a_tone(1.6)
    pieces = list(sound.split(3200))
    turn = stage.say(torch.cat(pieces[:2]), done=False)
    for piece in pieces[2:]:
        stage.run(0.15)  # faster than it is spoken
        turn.put(piece, stage.now)
    turn.finished = True
    stage.run(2)
    first = turn.first_frame
    assert stage.loud() == list(range(first, first + 20))
    assert stage.late == []


@pytest.mark.parametrize("drawing", [0.0, 0.1])
def test_a_talker_that_stops_in_the_middle_does_not_stop_the_picture(drawing):
    stage = Stage(drawing=drawing)
    stage.open()
    turn = stage.say(a_tone(0.5), done=False)
    stage.run(3)
    assert stage.late == []
    assert stage.last > turn.first_frame + 20
    turn.put(a_tone(0.5), stage.now)
    turn.finished = True
    stage.run(2)
    assert len(stage.loud()) >= 12
    assert stage.viewer.turn is None


def test_interrupt_is_felt_within_a_chunk_and_a_new_sentence_interrupts_too():
    stage = Stage()
    stage.open()
    turn = stage.say(a_tone(8.0))
    stage.run(1)
    asked = stage.place()
    stage.viewer.interrupt(stage.now)
    assert turn.cancelled.is_set()
    assert stage.viewer.due(stage.now) == -math.inf, "silence waits for nobody's pictures"
    stage.run(2)
    assert max(n for n in stage.loud() if n >= turn.first_frame) < asked + AT_FIRST
    first = stage.say(a_tone(8.0))
    stage.run(1)
    second = stage.say(a_tone(0.4))
    assert first.cancelled.is_set()
    stage.run(2)
    assert second.first_frame > first.first_frame
    assert stage.late == []
    assert max(stage.loud()) < second.first_frame + 6


def test_nothing_happens_where_a_silent_avatar_is_interrupted():
    stage = Stage()
    stage.open()
    said, frame = len(stage.messages), stage.viewer.session.point.frame
    stage.viewer.interrupt(stage.now)
    assert (len(stage.messages), stage.viewer.session.point.frame) == (said, frame)
    assert stage.viewer.due(stage.now) != -math.inf


@pytest.mark.parametrize(("drawing", "way"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1), (0.05, 0.02)])
def test_speech_and_silence_follow_as_soon_as_they_are_drawn_at_every_place_in_a_chunk(drawing, way):
    """And the picture never stands still for it; a mouth is open in just the frames with sound."""
    stage = Stage(drawing=drawing, way=way)
    stage.open()
    heard = []
    for wait in range(1, 34, 2):
        stage.run(0.6 + wait / 100)
        asked = stage.place()
        stage.ask(lambda _: stage.say(a_tone(8.0)))
        stage.run(0.7)
        heard.append(stage.started[-1][0].first_frame - asked)
        asked, before = stage.place(), dict(stage.sound_of)
        stage.ask(lambda _: stage.viewer.interrupt(stage.now))
        stage.run(0.7)
        still = [n for n in stage.loud() if n >= asked]
        heard.append(max(still, default=asked) - asked)
        assert all(np.array_equal(stage.sound_of[n], before[n]) for n in before if n <= asked)
        bright = [n for n in sorted(stage.seen) if stage.seen[n][11, 8, 0] > 100]
        assert bright == stage.loud() != []
        if wait == 1 and 2 * way > AT_FIRST / FPS - 0.16:
            stage.late.clear()  # the way was not measured yet
    assert stage.late == []
    # a chunk may be being drawn already, and what was kept of the old ones is seen to its last chunk; reports are as old as the way
    assert max(heard[2:]) <= SOON + (2 * drawing + 3 * way) * FPS + (drawing > 0) + 1e-6


def test_another_text_keeps_the_speech_and_is_felt_at_once():
    stage = Stage()
    stage.open()
    turn = stage.say(a_tone(2.0))
    stage.run(0.6)
    asked = stage.place()
    stage.viewer.set_text("someone smiles", stage.now)
    stage.run(3)
    first = turn.first_frame
    assert stage.loud() == list(range(first, first + 25))
    walls = [int(stage.seen[n][5, 14, 0]) for n in range(stage.last)]
    changed = next(n for n in range(1, len(walls)) if walls[n] != walls[n - 1])
    assert asked < changed <= asked + 0.05 * FPS + SOON + 4  # no speech is left out, so that it takes a whole chunk


def test_other_guidance_keeps_the_speech_and_is_felt_at_once():
    """From the next chunk on that can still reach the viewer; a refusal takes nothing back."""
    embedded = {"network": replace(tiny.make_spec().network, guidance=2), "guidance": SCALES}
    bundle = tiny.a_bundle(History(sinks=1, window=2), **embedded)
    stage = Stage(bundle)
    stage.open()
    stage.say(a_tone(2.0))
    stage.run(0.6)
    asked, epoch = stage.place(), stage.epoch
    with pytest.raises(UserError, match="this student was trained from"):
        stage.viewer.guide({"audio": 9.0}, stage.now)
    assert stage.epoch == epoch
    stage.viewer.guide({"audio": 2.0}, stage.now)
    assert stage.epoch > epoch, "what was drawn ahead under the old scales is taken back"
    assert {"type": "guidance", "scales": {"audio": 2.0}} in stage.messages
    session = stage.viewer.session
    assert session.spec.pixel_frames(session.events[-1].at)[0] <= asked + 0.05 * FPS + SOON + 4
    stage.run(1)
    assert session.guidance == {"text": 1.25, "audio": 2.0}
    assert stage.late == []


def test_what_was_played_in_an_earlier_epoch_is_not_believed():
    stage = Stage()
    stage.open()
    viewed = stage.viewer.session.viewed
    stage.viewer.played(viewed + 3, stage.epoch - 1, stage.now)
    assert stage.viewer.session.viewed == viewed
    with pytest.raises(UserError, match="drawn"):
        stage.viewer.played(10**6, stage.epoch, stage.now)


def test_opening_again_begins_anew_even_while_the_engine_waits_for_the_viewer():
    stage = Stage()
    stage.open()
    while stage.viewer.due(stage.now) is not None:
        stage.viewer.step(stage.now, lambda: stage.now)
    assert stage.viewer.waited
    stage.open()
    assert stage.last >= 12
    assert stage.viewer.session.seed == 7


def test_a_voice_in_the_microphone_interrupts_and_its_end_is_a_turn():
    stage = Stage()
    stage.open()
    talking = stage.say(a_tone(9.0))
    stage.run(1)
    noise = 0.001 * tiny.randn(16000)
    said = a_tone(0.8)
    for piece in torch.cat([noise, said, noise]).split(640):
        stage.viewer.feed(piece, stage.now)
        stage.run(0.04)
    assert talking.cancelled.is_set()
    turn, recorded = stage.started[-1]
    assert turn is not talking
    assert 0.8 * 16000 <= len(recorded) <= 1.3 * 16000
    assert torch.equal(recorded[recorded.abs() > 0.1], said[said.abs() > 0.1])


def test_many_turns_keep_sound_and_picture_together_and_memory_bounded():
    stage = Stage()
    stage.open()
    for _ in range(10):
        stage.say(a_tone(0.5))
        stage.run(2.0)
        for n in [n for n in stage.seen if n < stage.last - 60]:
            del stage.seen[n], stage.sound_of[n]
    session = stage.viewer.session
    assert session.inputs.audio.end - session.inputs.audio.start < 20 * PER_FRAME
    bright = [n for n in sorted(stage.seen) if stage.seen[n][11, 8, 0] > 100]
    assert bright == stage.loud() != []
