"""A student of two speakers is conditioned on the user's microphone beside its own voice, while it listens and while it talks."""

import pytest
import torch

from distill.live.turns import Listening
from tests.distill.live.test_viewer import PER_FRAME, Stage
from tests.support.tiny import a_bundle, randn

MICROPHONE = 160  # samples that come in 10 ms


class Duplex(Stage):
    """A viewer with a microphone that is always on; `own` and `other` are what its session was given."""

    def __init__(self, speakers):
        super().__init__(a_bundle(speakers=speakers))
        self.own, self.other, self.said = [], [], []

    def open(self):
        super().open()
        push = self.viewer.session.push

        def pushed(audio=None, other=None):
            push(audio=audio, other=other)
            size = len(audio if audio is not None else other)
            self.own.append(torch.zeros(size) if audio is None else audio)
            self.other.append(other)

        self.viewer.session.push = pushed

    def run(self, seconds):
        for _ in range(round(seconds * 100)):
            if self.viewer.session is not None:
                self.said.append(1e-3 * randn(MICROPHONE, seed=len(self.said)))  # too soft for a turn
                self.viewer.feed(self.said[-1], self.now)
            super().run(0.01)


def test_the_microphone_arrives_whole_and_in_order():
    stage = Duplex(2)
    stage.open()
    stage.run(3)
    other, said = torch.cat(stage.other), torch.cat(stage.said)
    begin = next(i for i, x in enumerate(other) if x != 0)
    start = next(i for i, x in enumerate(said) if x == other[begin])
    assert len(other) - begin > 2 * 16_000
    assert torch.equal(other[begin:], said[start : start + len(other) - begin]), "no gap and nothing twice"
    waiting = len(said) - start - (len(other) - begin)
    assert waiting <= 8 * PER_FRAME, "no further behind than the chunk that is drawn next, and the slack"
    assert not torch.cat(stage.own).any()


def test_while_it_talks_it_gets_both():
    stage = Duplex(2)
    stage.open()
    speech = 0.5 * randn(64_000, seed=3).clamp(-1, 1)
    stage.say(speech)
    stage.run(6)
    own, other = torch.cat(stage.own), torch.cat(stage.other)
    talking = own.abs() > 0
    assert torch.equal(own[talking], speech[speech.abs() > 0])
    received = (other[talking].abs() > 0).float()
    assert received[16_000:].mean() > 0.95
    assert received[:16_000].mean() < 0.9, "the first second is drawn ahead of what the microphone has recorded"
    assert stage.late == []


def test_a_student_of_one_speaker_is_pushed_nothing_else():
    stage = Duplex(1)
    stage.open()
    stage.say(0.5 * randn(16_000, seed=3).clamp(-1, 1))
    stage.run(2)
    assert set(map(type, stage.other)) == {type(None)}
    assert len(stage.viewer.listening.kept) == 0


@pytest.mark.parametrize("count", [100, 400, 5000])
def test_listening_neither_falls_behind_nor_grows(count):
    """Twice as much comes as is taken; then nothing comes."""
    listening, sound = Listening(slack=200), torch.arange(1.0, 200_001)
    for i in range(20):
        listening.put(sound[2 * count * i : 2 * count * (i + 1)])
        taken = listening.take(count)
        assert len(taken) == count
        assert len(listening.kept) <= 200
        last = 2 * count * (i + 1)
        assert taken[-1] >= last - 200 - count, "the newest"
    assert torch.equal(listening.take(300)[: 300 - 200], torch.zeros(100))
    assert not listening.take(50).any()
    listening.put(sound)
    assert len(listening.kept) == 16_000
