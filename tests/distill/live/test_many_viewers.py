"""Sixteen viewers in virtual time: the engine chooses, viewers are spliced, and batches cost what they cost on a real machine."""

import heapq
import random
import statistics
from types import SimpleNamespace

import pytest
import torch

from distill.live import protocol, scheduler
from distill.live.operations.capacity import Capacity
from distill.live.operations.limits import RATES
from distill.live.scheduler import Engine
from distill.live.talkers import Echo
from eval.speed.latency import percentile
from tests.support import tiny
from tests.support.live.serving import a_puppet

FPS = 12.5
COSTS = {1: 0.045, 2: 0.060, 4: 0.096, 8: 0.178, 16: 0.340}
"""Seconds of batches of the embedded student on one thread of a machine at a load of 16 (LOG.md, 2026-12-01)."""
OPEN, RECACHE = 0.012, 0.04  # seconds of a stream's begin and of a new text


class World:
    """A clock, what is to happen, and an engine whose batches take `COSTS`, give or take a third."""

    def __init__(self, monkeypatch, viewers: int = 16, seed: int = 0, way: float = 0.02, apart: float = 0.25):
        self.now, self.due, self.rng, self.way, self.apart = 0.0, [], random.Random(seed), way, apart
        bundle = a_puppet()
        bundle.student.spec, bundle.student.one_by_one = tiny.make_spec(chunk_frames=4, horizon_frames=16), ""
        bundle.student.batch_key = lambda chunk: min(chunk, 3)
        decode = bundle.codec.decode_chunk
        bundle.codec.decode_chunk = lambda x0, state: (decode(x0, state)[0], (torch.zeros(1),))
        self.engine = Engine(bundle, Echo(), viewers)
        self.costs, self.engine.capacity = Capacity(0.64, COSTS), Capacity(0.64, COSTS)
        monkeypatch.setattr(scheduler, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(scheduler, "step_together", self.draw)
        self.pages = [Page(self, i) for i in range(viewers)]

    def later(self, seconds: float, function, *given) -> None:
        heapq.heappush(self.due, (self.now + seconds, self.rng.random(), function, given))

    def spend(self, seconds: float) -> None:
        end = self.now + seconds
        while self.due and self.due[0][0] <= end:
            at, _, function, given = heapq.heappop(self.due)
            self.now = max(self.now, at)
            function(*given)
        self.now = max(self.now, end)

    def draw(self, sessions):
        found = [session.step() for session in sessions]
        if drawn := sum(map(bool, found)):
            self.spend(self.costs.cost(drawn) * self.rng.uniform(0.7, 1.3))
        return found

    def run(self, seconds: float) -> None:
        while self.now < seconds:
            self.engine._answer()
            if not self.engine._serve():
                self.spend(max(0.001, min(self.due[0][0] - self.now, 0.02)))


class Line:
    """Messages one way, in order, each up to `world.way` seconds on it."""

    def __init__(self, world: World, rng: random.Random):
        self.world, self.rng, self.last = world, rng, 0.0

    def put(self, function, *given) -> None:
        self.last = max(self.last + 1e-6, self.world.now + self.rng.uniform(0, self.world.way))
        self.world.later(self.last - self.world.now, function, *given)


class Page:
    """One who talks, interrupts now and then, and plays what comes."""

    def __init__(self, world: World, number: int):
        self.world, self.rng = world, random.Random(number)
        self.there, self.back = Line(world, self.rng), Line(world, self.rng)
        self.viewer = world.engine.join(lambda message: self.there.put(self.take, message))
        self.viewer.start = self.talk
        self.origin, self.last, self.epoch, self.end = None, -1, 0, None
        self.begins, self.asked, self.latencies, self.asking = {}, {}, [], 0.0
        self.stalls, self.stalled = 0, 0.0
        world.later(world.apart * number, self.ask, self.open, number)
        world.later(self.rng.uniform(0, 0.05), self.report)
        world.later(5 + self.rng.uniform(0, 3), self.act)

    def ask(self, function, *given) -> None:
        self.back.put(lambda: self.world.engine.call(function, *given, of=self.viewer))

    def open(self, number: int) -> None:
        self.viewer.open(tiny.a_portrait(), "a", number, self.world.now)
        self.world.spend(OPEN)

    def talk(self, turn, seconds: float) -> None:
        def fill() -> None:
            for piece in (0.1 * torch.ones(int(16000 * seconds))).split(1600):
                turn.put(piece, self.world.now)
            turn.finished = True

        self.world.later(0.01, fill)

    def act(self) -> None:
        self.asking, seconds = self.world.now, self.rng.uniform(1, 4)

        def arrived() -> None:
            turn = self.viewer.answer(seconds, self.world.now)
            self.world.engine.call(self.viewer.say, turn, self.world.now, of=self.viewer)

        self.back.put(arrived)
        if self.rng.random() < 0.2:
            self.world.later(self.rng.uniform(0.2, 1.5), self.ask, lambda: self.viewer.interrupt(self.world.now))

    def report(self) -> None:
        if self.origin is not None:
            seen, epoch = max(0, min(int(self.place()) + 1, self.last + 1)), self.epoch
            self.back.put(
                lambda: self.world.engine.call(self.viewer.played, seen, epoch, self.world.now, of=self.viewer)
            )
        self.world.later(0.05, self.report)

    def place(self) -> float:
        return (self.world.now - self.origin) * FPS

    def take(self, message) -> None:
        if isinstance(message, bytes):
            self.play(*protocol.HEADER.unpack_from(message)[2:5])
        elif message["type"] == "opened":
            self.epoch, self.origin, self.last = message["epoch"], None, -1
        elif message["type"] == "rewind":
            self.epoch, self.last = message["epoch"], message["frame"] - 1
        elif message["type"] == "thinking":
            self.asked[message["turn"]] = self.asking
        elif message["type"] == "turn":
            self.begins[message["turn"]] = message["frame"]
        elif message["type"] == "done":
            self.begins.pop(message["turn"], None)
            rests, self.end = self.end is not None, message["frame"]
            if not rests:
                self.rest()

    def play(self, count: int, first: int, epoch: int) -> None:
        if epoch != self.epoch:
            return
        assert first == self.last + 1, "a gap or an overlap"
        if self.origin is None:
            self.origin = self.world.now + 0.03
        elif (late := -(self.place() - first) / FPS) < 0:
            self.stalls, self.stalled, self.origin = self.stalls + 1, self.stalled - late, self.origin - late
        self.last = first + count - 1
        for turn, frame in list(self.begins.items()):
            if first <= frame <= self.last:
                self.latencies.append(self.origin + frame / FPS - self.asked[turn])
                del self.begins[turn]

    def rest(self) -> None:
        if self.place() < self.end:
            self.world.later(0.05, self.rest)
        else:
            self.end = None
            self.world.later(self.rng.uniform(0.5, 3), self.act)


def flood(page: Page) -> None:
    """All that the limits allow, at once and again."""
    viewer, world = page.viewer, page.world
    page.act = page.rest = lambda: None

    def text() -> None:
        viewer.set_text("b", world.now)
        world.spend(RECACHE)

    def again(kind: str, function) -> None:
        if viewer.session is not None:
            page.ask(function)
        world.later(1 / RATES[kind].each, again, kind, function)

    again("open", lambda: page.open(99))
    again("say", lambda: viewer.say(viewer.answer(3.0, world.now), world.now))
    again("text", text)
    again("interrupt", lambda: viewer.interrupt(world.now))


def latencies(world: World) -> list[float]:
    return [latency for page in world.pages[:-1] for latency in page.latencies]


def test_sixteen_get_their_answers_in_time_and_no_picture_stands_still(monkeypatch):
    world = World(monkeypatch)
    world.run(25.0)
    times = latencies(world)
    assert len(times) > 30
    assert percentile(times, 95) <= 0.45
    assert statistics.mean(times) <= 0.33
    assert sum(page.stalls for page in world.pages) == 0


@pytest.mark.parametrize("seed", range(4))
def test_sixteen_who_join_at_once_see_no_picture_stand_still(monkeypatch, seed):
    """First frames of the last wait for the second chunks of the first."""
    world = World(monkeypatch, seed=seed, apart=0.03)
    world.run(4.0)
    assert all(page.last > 0 for page in world.pages)
    assert [page.stalls for page in world.pages] == [0] * 16


@pytest.mark.slow
def test_one_who_floods_costs_the_others_little(monkeypatch):
    means, stalled = [], []
    for floods in (False, True):
        world = World(monkeypatch, viewers=10)
        if floods:
            flood(world.pages[-1])
        world.run(25.0)
        means.append(statistics.mean(latencies(world)))
        stalled.append(sum(page.stalled for page in world.pages[:-1]))
    assert means[1] <= 1.1 * means[0]  # 1.03 of many more turns
    assert stalled == pytest.approx([0, 0], abs=0.05)
