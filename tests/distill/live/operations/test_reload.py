"""Another student while viewers are served."""

import asyncio
from dataclasses import replace

import pytest

from distill.live.client import Client
from distill.live.operations.reload import reload
from distill.live.scheduler import misfit
from students.history import History
from teachers.errors import UserError
from tests.support import tiny
from tests.support.live.serving import eventually, serving


def test_streams_that_are_opened_later_are_the_new_students(capsys):
    old, new = tiny.a_bundle(), tiny.a_bundle(seed=5)
    with serving(old) as (address, engine):
        first, second = (Client(f"ws://{address}/live") for _ in range(2))
        first.open(seed=1)
        asyncio.run(reload(engine, lambda: new, tiny.a_portrait()))
        assert "is taken by streams that are opened from now on" in capsys.readouterr().err
        second.open(seed=1)
        last = first.last
        first.until(lambda: first.last > last + 4, 10)
        drawn_by = [viewer.session.bundle for viewer in engine.viewers]
        assert drawn_by[0] is old
        assert drawn_by[1] is new
        assert (first.frames[1] != second.frames[1]).any(), "the same student twice proves nothing"
        first.send(type="open", portrait=0, text="a person talks", seed=1)
        eventually(lambda: engine.viewers[0].session.bundle is new, 10)
        first.until(lambda: bool((first.frames[1] == second.frames[1]).all()), 10)
        for client in (first, second):
            client.close()


def test_what_cannot_be_taken_changes_nothing(capsys):
    def broken():
        raise UserError("no student: nowhere; export one")

    def odd():
        raise KeyError("spec")

    with serving(tiny.a_bundle()) as (_, engine):
        before = engine.bundle
        for load, words in (
            (broken, "the student stays what it was: no student"),
            (odd, "the student stays what it was (KeyError"),
            (lambda: tiny.a_bundle(chunk_frames=4), "another student's length of chunks"),
        ):
            asyncio.run(reload(engine, load, tiny.a_portrait()))
            lines = capsys.readouterr().err.strip().splitlines()
            assert len(lines) == 1
            assert words in lines[0]
            assert engine.bundle is before


@pytest.mark.parametrize(
    ("changes", "words"),
    [({}, ""), ({"history": History(sinks=0, window=1)}, ""), ({"chunk_frames": 4}, "length of chunks")],
)
def test_a_misfit_is_named(changes, words):
    before = tiny.a_bundle()
    history = changes.pop("history", None)
    assert misfit(before, tiny.a_bundle(history, **changes)) == words
    assert misfit(before, replace(before)) == ""
