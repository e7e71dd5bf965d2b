"""The plain loop that the session is measured against draws the same film, and repeats what published code repeats."""

import pytest
import torch

from benchmarks.plain_loop import can_run, compare, naive_loop
from eval.speed.latency import Scene, stream
from students.history import History
from teachers.errors import UserError
from tests.support.tiny import MIDAS, a_bundle, a_portrait, some_sound

HISTORIES = [
    History(sinks=1, window=2),
    History(sinks=0, window=2),
    History(sinks=3, window=1),
    History(sinks=2, window=0),
    History(sinks=0, window=None),
    History(sinks=1, window=2, level=0.1),
]


@pytest.fixture(scope="module")
def bundle():
    return a_bundle()


@pytest.fixture(scope="module")
def scene():
    return Scene(a_portrait(), "a person nods", some_sound(60 * 1280), seed=4)


def film(streamed):
    return torch.cat([chunk.frames for chunk in streamed.chunks])


@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_the_plain_loop_draws_what_the_session_draws(history, scene):
    bundle = a_bundle(history)
    shown = film(stream(bundle, scene, 9)).int()
    assert shown.float().std() > 5
    for keep_text in (False, True):
        frames = naive_loop(bundle, scene, 9, keep_text)
        assert frames.dtype == torch.uint8
        assert frames.shape == shown.shape
        assert (frames.int() - shown).abs().max() <= 1


def test_the_plain_loop_repeats_what_published_code_repeats(bundle, scene, monkeypatch):
    """Text read in every call or once, the window turned in every call, one context pass a chunk."""
    net = bundle.student.net
    calls = {"text": 0, "time": 0, "net": 0}

    def counted(name, function):
        def call(*inputs, **named):
            calls[name] += 1
            return function(*inputs, **named)

        return call

    reader = net.condition_embedder.text_embedder
    monkeypatch.setattr(reader, "forward", counted("text", reader.forward))
    monkeypatch.setattr(net, "read_time", counted("time", net.read_time))
    monkeypatch.setattr(net, "forward", counted("net", net.forward))
    naive_loop(bundle, scene, 5)
    assert calls == {"text": 20, "time": 20, "net": 20}
    calls.update(text=0, time=0, net=0)
    naive_loop(bundle, scene, 5, keep_text=True)
    assert calls == {"text": 1, "time": 20, "net": 20}
    calls.update(text=0, time=0, net=0)
    stream(bundle, scene, 5)
    assert calls == {"text": 1, "time": 4, "net": 20}


def test_the_plain_loop_drops_a_pose_as_the_stream_does(scene):
    bundle = a_bundle(pose_dim=3)
    shown = film(stream(bundle, scene, 5)).int()
    assert (naive_loop(bundle, scene, 5).int() - shown).abs().max() <= 1


@pytest.mark.parametrize(
    "history",
    [
        History(sinks=1, window=1, memory=2, memory_every=2),
        History(sinks=1, window=2, commit="same_level"),
        History(window=(1, 2)),
    ],
    ids=str,
)
def test_the_plain_loop_refuses_a_history_that_it_does_not_know(history, scene):
    bundle = a_bundle(history)
    assert not can_run(bundle.spec)
    with pytest.raises(UserError, match=r"^plain loop: it knows no History"):
        naive_loop(bundle, scene, 3)


def test_the_plain_loop_knows_no_language_model_student():
    assert not can_run(a_bundle(network=MIDAS).spec)


def test_the_table_compares_a_chunk_of_each(bundle):
    rows = compare(bundle, 5, 2).splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == ["session", "plain loop", "plain loop, text kept"]
    assert float(rows[0].split("|")[3]) == 1.0
    assert all(float(row.split("|")[2]) > 0 and int(row.split("|")[4]) <= 1 for row in rows)
