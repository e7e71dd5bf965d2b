"""Sessions stepped together: each gives the frames that it gives alone, whoever comes, goes, is interrupted or asked for more."""

import random

import pytest
import torch

from students import Chunk, Session, step_together
from students.history import History
from students.schedule import Schedule
from students.serving import draw
from teachers.guidance import EmbeddedScales, GuidanceRange
from teachers.networks.kind import RaggedPast
from teachers.networks.wan import NetworkConfig
from tests.support.faults import around
from tests.support.tiny import MIDAS, NETWORK, a_bundle, a_portrait, some_sound

TEXTS = ("a person nods", "someone smiles", "x", "a person nods and smiles")
HISTORIES = {
    "window": History(sinks=1, window=2),
    "level": History(sinks=1, window=1, level=0.1),
    "memory": History(sinks=1, window=1, memory=2, memory_every=2),
    "all": History(sinks=0, window=None),
    "same_level": History(sinks=1, window=2, commit="same_level"),
    "refined": History(sinks=1, window=2, refine_every=2),
}
CHANGES = {
    "other steps at first": {"first_sigmas": (1.0, 0.9, 0.7, 0.3), "first_chunks": 2},
    "embedded guidance": {
        "network": NetworkConfig(**NETWORK, audio_blocks=(1,), prediction="reference", guidance=2),
        "guidance": EmbeddedScales(text=GuidanceRange(), audio=GuidanceRange(most=3.0)),
    },
}
ALONE = {
    "diagonal": {"history": History(sinks=1, window=1), "schedule": Schedule(depth=3)},
    "midas": {"history": History(sinks=1, window=2), "network": MIDAS},
}
LEAD = 3


def script(rng: random.Random, rounds: int = 14, viewers: int = 4) -> list[list[tuple]]:
    """What is done in each round: some leave and come, push, change texts or interrupt, then some of them step."""
    out, serial = [], viewers
    here = list(range(viewers))
    for _ in range(rounds):
        deeds: list[tuple] = []
        if rng.random() < 0.3:
            gone = rng.randrange(viewers)
            here[gone], serial = serial, serial + 1
        for one in here:
            what = rng.random()
            if what < 0.15:
                deeds.append(("set", one, rng.choice(TEXTS), rng.choice(("keep", "recache"))))
            elif what < 0.3:
                deeds.append(("interrupt", one, rng.random()))
            elif what < 0.7:
                deeds.append(("push", one, rng.randrange(1, 6000)))
            elif what < 0.8:
                deeds.append(("settle", one))
        stepping = [one for one in here if rng.random() < 0.8]
        rng.shuffle(stepping)
        out.append([*deeds, ("step", *stepping)])
    return out


class Hall:
    """Sessions by number; `together`: those that step in a round do it as one batch."""

    def __init__(self, bundle, together: bool):
        self.bundle, self.together = bundle, together
        self.sessions: dict[int, Session] = {}
        self.films: dict[int, list[torch.Tensor]] = {}
        self.latents: dict[int, list[torch.Tensor]] = {}

    def of(self, one: int) -> Session:
        if one not in self.sessions:
            portrait = a_portrait(one % 3)
            self.sessions[one] = Session(self.bundle, portrait, TEXTS[one % 4], one, lead=LEAD, idle="live")
            self.films[one], self.latents[one] = [], []
        return self.sessions[one]

    def do(self, what: str, *given) -> None:
        if what == "step":
            sessions = [self.of(one) for one in given]
            found = step_together(sessions) if self.together else [session.step() for session in sessions]
            for one, session, chunk in zip(given, sessions, found, strict=True):
                if isinstance(chunk, Chunk):
                    self.films[one].append(chunk.frames.clone())
                    self.latents[one].append(session.point.seen[-1].x0.clone())
                session.played(max(session.viewed, session.point.frame - 3))
            return
        session = self.of(given[0])
        if what == "push":
            session.push(some_sound(given[1], seed=given[0] + given[1]))
        elif what == "set":
            keep = session.spec.history.commit != "clean"
            session.set(given[1], how="keep" if keep else given[2])
        elif what == "settle":
            session.settle()
        else:
            unseen = session.point.frame - session.viewed
            session.interrupt(session.viewed + round(given[1] * unseen))


def played(bundle, together: bool, seed: int) -> Hall:
    hall = Hall(bundle, together)
    for deeds in script(random.Random(seed)):
        for deed in deeds:
            hall.do(*deed)
    return hall


@pytest.mark.parametrize("name", [*HISTORIES, *CHANGES])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_each_session_gives_what_it_gives_alone(name, seed, monkeypatch):
    bundle = a_bundle(HISTORIES.get(name, HISTORIES["window"]), **CHANGES.get(name, {}))
    sizes, padded = [], []
    alone = played(bundle, False, seed)
    for owner, what, note in (
        (draw, "decode_rows", lambda given: sizes.append(len(given[2]))),
        (RaggedPast, "before", lambda given: padded.append(1)),
    ):
        around(monkeypatch, owner, what, lambda original, *given, note=note: note(given) or original(*given))
    together = played(bundle, True, seed)
    assert max(sizes) >= 3, "nothing was a batch"
    assert padded, "all streams were of one age"
    assert together.films.keys() == alone.films.keys()
    for one, latents in alone.latents.items():
        assert len(latents) == len(together.latents[one])
        for ours, theirs in zip(together.latents[one], latents, strict=True):
            assert (ours - theirs).abs().max() <= 2e-5 * max(1.0, float(theirs.abs().max()))
        for ours, theirs in zip(together.films[one], alone.films[one], strict=True):
            assert (ours.int() - theirs.int()).abs().max() <= 1
    films = [torch.cat(film)[:3] for film in alone.films.values() if film]
    assert all(not torch.equal(a, b) for i, a in enumerate(films) for b in films[:i]), "one stream twice proves nothing"


@pytest.mark.parametrize("name", list(ALONE))
def test_a_student_that_cannot_be_joined_draws_one_by_one(name, monkeypatch):
    bundle, sizes = a_bundle(**ALONE[name]), []
    assert bundle.student.one_by_one
    alone = played(bundle, False, 1)
    around(monkeypatch, draw, "decode_rows", lambda original, *given: sizes.append(len(given[2])) or original(*given))
    together = played(bundle, True, 1)
    assert set(sizes) == {1}
    assert all(
        torch.equal(a, b) for one, film in alone.films.items() for a, b in zip(film, together.films[one], strict=True)
    )


def test_equal_ages_are_not_padded(monkeypatch):
    bundle, padded = a_bundle(HISTORIES["window"]), []
    around(monkeypatch, RaggedPast, "before", lambda original, *given: padded.append(1) or original(*given))
    hall = Hall(bundle, True)
    for _ in range(5):
        hall.do("step", 0, 1, 2)
    assert len(hall.films[0]) >= 3
    assert not padded


def test_a_session_that_has_nothing_to_draw_holds_no_other_up():
    bundle = a_bundle(HISTORIES["window"])
    waiting = Session(bundle, a_portrait(), "x", lead=2)
    ready = [Session(bundle, a_portrait(), "x", seed, lead=2, idle="live") for seed in (1, 2)]
    held = Session(bundle, a_portrait(), "x", lead=2, idle="hold")
    held.push(some_sound(5 * 1280))
    assert isinstance(held.step(), Chunk)
    found = step_together([ready[0], waiting, held, ready[1]])
    assert [getattr(one, "reason", one.idle if one else "") for one in found] == ["live", "audio", "hold", "live"]
