"""Who is served first, and with whom: deadlines, batches, greed; what is drawn together is what is drawn alone."""

import math
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from distill.live import scheduler
from distill.live.client import Client
from distill.live.operations.capacity import Capacity
from distill.live.scheduler import Engine
from distill.live.talkers import Echo
from tests.support import tiny
from tests.support.faults import around
from tests.support.live.serving import a_puppet, eventually, serving


@dataclass
class Waiting:
    """Stands for a viewer: when its next chunk is due, what it has cost, what it can be drawn with."""

    name: str
    when: float | None
    spent: float = 0.0
    kind: str = "later"

    def due(self, now: float) -> float | None:
        return None if self.when is None else now + self.when

    @property
    def session(self):
        return SimpleNamespace(batch_key=self.kind)


def chosen(*viewers: Waiting, one_by_one: str = "") -> list[str]:
    """Names of the batch on a machine that draws a chunk in 20 ms, 16 in 170."""
    engine = Engine(tiny.a_bundle(), Echo())
    engine.bundle.student.one_by_one = one_by_one
    engine.capacity = Capacity(0.64, {1: 0.02, 16: 0.17})
    engine.viewers = list(viewers)
    return [viewer.name for viewer in engine._choose(100.0)]


def test_the_most_urgent_is_first_and_whoever_waits_for_nothing_is_left():
    assert chosen(Waiting("a", None)) == []
    assert chosen(Waiting("a", 0.9), Waiting("b", 0.3, kind="x"), Waiting("c", None))[0] == "b"
    assert chosen(Waiting("a", 0.3), Waiting("b", -math.inf, kind="x"))[0] == "b"


def test_those_with_time_are_one_batch():
    assert chosen(*(Waiting(str(i), 1.0 - i / 100) for i in range(16))) == [str(i) for i in reversed(range(16))]
    assert len(chosen(*(Waiting(str(i), 1.0) for i in range(40)))) == 16, "the largest batch that was measured"


def test_a_batch_is_as_large_as_the_first_has_time_for():
    alone = chosen(Waiting("a", 0.025), *(Waiting(str(i), 1.0) for i in range(8)))
    assert alone == ["a"]
    some = chosen(Waiting("a", 0.055), *(Waiting(str(i), 1.0) for i in range(8)))
    assert 3 <= len(some) <= 5
    assert chosen(Waiting("a", -math.inf), *(Waiting(str(i), 1.0) for i in range(8))) == ["a"], "an answer waits"


def test_whoever_would_be_late_behind_a_batch_is_of_it():
    late = chosen(Waiting("a", 0.01), Waiting("b", 0.03), Waiting("c", 0.04), Waiting("d", 1.0))
    assert late == ["a", "b", "c"]
    assert set(chosen(*(Waiting(str(i), -math.inf) for i in range(6)))) == set("012345"), "six answers at once"


def test_only_what_can_be_joined_is():
    assert chosen(Waiting("a", 0.8), Waiting("b", 0.9, kind="first"), Waiting("c", 1.0)) == ["a", "c"]
    assert chosen(Waiting("a", 0.8), Waiting("b", 0.9), one_by_one="a diagonal schedule") == ["a"]


def test_the_greedy_come_after_all_others():
    others = [Waiting(str(i), 0.9, spent=0.1) for i in range(3)]
    assert "greedy" not in chosen(Waiting("greedy", -math.inf, spent=0.9), *others)
    assert chosen(Waiting("greedy", -math.inf, spent=0.9), *(Waiting(str(i), None, 0.1) for i in range(3))) == [
        "greedy"
    ]
    assert chosen(Waiting("talks much", -math.inf, spent=0.15), *others) == ["talks much"]


def test_who_joined_before_all_others_and_was_drawn_alone_is_not_greedy():
    others = [Waiting(str(i), 0.4, spent=0.024) for i in range(15)]
    assert chosen(Waiting("first", 0.1, spent=0.118), *others)[0] == "first"


def test_who_goes_on_asking_waits_for_a_batch():
    engine, done = Engine(a_puppet(), Echo(), 1), []

    def ask():
        done.append(len(done))
        if len(done) < 100:
            engine.call(ask)

    engine.call(ask)
    engine._answer()
    assert done == [0]
    engine._answer()
    assert done == [0, 1]


def test_what_a_viewer_asks_for_is_charged_to_it():
    engine = Engine(a_puppet(), Echo(), 2)
    one, two = engine.join(lambda message: None), engine.join(lambda message: None)
    engine.call(one.open, tiny.a_portrait(), "x", 0, 0.0, of=one)
    engine._answer()
    assert one.spent > 0
    assert two.spent == 0
    assert engine.totals.busy == pytest.approx(one.spent)
    for viewer in (one, two):
        engine.leave(viewer)


def test_viewers_are_drawn_in_batches_and_see_what_each_sees_alone(monkeypatch):
    with serving(tiny.a_bundle(), viewers=None) as (address, engine):
        assert engine.max_viewers >= 1
        engine.fixed = 6
        url, films = f"ws://{address}/live", {}

        def watch(number: int, together: threading.Barrier | None) -> None:
            client = Client(url)
            if together is not None:
                together.wait(20)
            client.open(portrait=number, text=("a person nods", "x")[number % 2], seed=number)
            client.until(lambda: client.last >= 22, 30)
            films[number, together is not None] = np.stack([client.frames[n] for n in range(20)])
            client.close()

        for number in range(3):
            watch(number, None)
            eventually(lambda: not engine.viewers, 10)
        # a machine that is so slow that several wait
        around(monkeypatch, scheduler, "step_together", lambda original, given: time.sleep(0.06) or original(given))
        barrier = threading.Barrier(3)
        threads = [threading.Thread(target=watch, args=(number, barrier)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        eventually(lambda: not engine.viewers, 10)
        assert sum(engine.totals.batches.counts[1:]) > 0, "nothing was a batch"
        assert engine.totals.errors == 0
        for number in range(3):
            gap = np.abs(films[number, True].astype(int) - films[number, False].astype(int))
            assert gap.max() <= 1
        assert np.abs(films[0, True].astype(int) - films[1, True].astype(int)).max() > 20


def test_a_fault_in_a_batch_ends_one_viewer(monkeypatch):
    with serving(tiny.a_bundle(), viewers=4) as (address, engine):
        url = f"ws://{address}/live"
        clients = [Client(url) for _ in range(3)]
        for number, client in enumerate(clients):
            client.open(seed=number)
        broken = engine.viewers[1].session

        def fail(*_, **__):
            raise RuntimeError("planted")

        monkeypatch.setattr(broken.inputs, "conditions", fail)

        def all_play(enough) -> None:
            def played():
                for client in clients:
                    client.pump(0.02)
                return enough()

            eventually(played, 20)

        all_play(lambda: engine.totals.errors == 1)
        lasts = [client.last for client in clients]
        all_play(lambda: all(clients[number].last > lasts[number] + 8 for number in (0, 2)))
        assert any("the stream failed (RuntimeError)" in m.get("message", "") for m in clients[1].messages)
        assert engine.viewers[1].session is None
        for client in clients:
            client.close()
