"""Save, load and interrupt: what follows equals never having done it."""

import copy
import dataclasses
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from students.history import History
from students.schedule import Schedule
from students.serving.session import Session
from students.serving.snapshot import load_session, save_session
from students.weights.checkpoint import load_student, save_student
from teachers.errors import UserError
from tests.students.serving.test_session import HISTORIES, PER_FRAME, film
from tests.support import processes
from tests.support.tiny import a_bundle, a_portrait, some_sound


@pytest.fixture(scope="module")
def bundle():
    return a_bundle(History(sinks=1, window=2))


def a_session(bundle, **options):
    return Session(bundle, a_portrait(), "a person nods", seed=4, **options)


@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_a_loaded_session_goes_on_bit_for_bit(history, tmp_path):
    bundle, sound = a_bundle(history), some_sound(47 * PER_FRAME)
    for chunks in (0, 1, 7):
        session = a_session(bundle, lead=20)
        session.set(text="someone smiles", at=9)
        session.push(sound[: (4 * chunks + 3) * PER_FRAME])
        early = list(session.frames())
        save_session(session, tmp_path / "session")
        others = [session, load_session(a_bundle(history), tmp_path / "session")]
        late = []
        for other in others:
            other.push(sound[(4 * chunks + 3) * PER_FRAME :])
            other.close()
            late.append(list(other.frames()))
        assert len(early) >= chunks
        assert len(late[0]) > 3
        assert [chunk.first_frame for chunk in late[0]] == [chunk.first_frame for chunk in late[1]]
        assert torch.equal(film(late[0]), film(late[1]))
        assert all(torch.equal(a.audio, b.audio) for a, b in zip(*late, strict=True))
    assert os.listdir(tmp_path) == ["session"]


def test_a_light_session_is_small_and_exact_before_anything_left_the_window(bundle, tmp_path):
    sound, sizes, films = some_sound(31 * PER_FRAME), {}, {}
    for chunks in (3, 6):
        session = a_session(bundle)
        session.push(sound[: (4 * chunks - 1) * PER_FRAME + bundle.audio_encoder.lookahead])
        assert len(list(session.frames())) == chunks
        for how in ("exact", "light"):
            save_session(session, tmp_path / how, how)
            sizes[how] = (tmp_path / how).stat().st_size
            again = load_session(bundle, tmp_path / how)
            again.push(sound[(4 * chunks - 1) * PER_FRAME + bundle.audio_encoder.lookahead :])
            films[how] = film(again.frames())
        assert sizes["light"] < sizes["exact"]
        gap = (films["light"].int() - films["exact"].int()).abs().float().mean()
        assert (gap == 0) == (chunks == 3), "a sinks=1, window=2 history forgets from chunk 4 on"


def test_a_session_saves_sound_that_is_not_resampled_yet(bundle, tmp_path):
    sound = some_sound(48000 * 2)
    session = a_session(bundle)
    session.push(sound[:50001], rate=48000)
    save_session(session, tmp_path / "session")
    again, films = load_session(bundle, tmp_path / "session"), []
    for one in (session, again):
        one.push(sound[50001:], rate=48000)
        one.close()
        films.append(film(one.frames()))
    assert torch.equal(*films)


@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_interrupt_is_never_having_drawn_the_dropped_chunks(history):
    """Frames after a barge-in equal those of a session that stopped in time; its audio is that up to there."""
    bundle = a_bundle(history)
    old, new = some_sound(40 * PER_FRAME), some_sound(20 * PER_FRAME, seed=5)
    edge = bundle.spec.pixel_frames(4)[0]
    films = []
    for ahead in (0, 3):
        session = a_session(bundle, lead=8)
        session.push(old[: (edge + 4 * ahead) * PER_FRAME + bundle.audio_encoder.lookahead])
        assert len(list(session.frames())) == 4 + ahead
        assert session.interrupt(played=edge - 2) == edge
        assert session.inputs.audio.end == edge * PER_FRAME
        session.push(new)
        films.append(film(session.frames()))
    assert len(films[0]) >= 16
    assert torch.equal(*films)


@pytest.mark.parametrize("keep_input", [False, True])
def test_chunks_in_flight_start_anew_without_their_input(keep_input):
    """Of a diagonal schedule: three forwards to the next chunk, as to the first one; with the input kept they go on, one."""
    bundle, forwards = a_bundle(History(sinks=1, window=1), schedule=Schedule(depth=3)), []
    session = a_session(bundle, lead=8)
    session.push(some_sound(40 * PER_FRAME))
    assert len(list(session.frames())) == 8
    edge = session.interrupt(played=10, keep_input=keep_input)
    assert len(session.point.state.flight) == (2 if keep_input else 0)
    bundle.student.net.register_forward_pre_hook(lambda *_: forwards.append(1))
    if not keep_input:
        session.push(some_sound(20 * PER_FRAME, seed=5))
    chunk = session.step()
    assert chunk.first_frame == edge
    assert len(forwards) == (1 if keep_input else 3)


def test_a_loaded_session_knows_what_was_viewed(bundle, tmp_path):
    """The lead is counted from there, and an interrupt goes back there."""
    session = a_session(bundle, lead=2)
    session.push(some_sound(30 * PER_FRAME))
    first = session.step()
    session.played(len(first.frames))
    save_session(session, tmp_path / "one")
    session.step()
    session.played(len(first.frames) + 1)
    save_session(session, tmp_path / "two")
    ahead = [len(list(load_session(bundle, tmp_path / name).frames())) for name in ("one", "two")]
    assert ahead == [2, 1]
    again = load_session(bundle, tmp_path / "two")
    assert again.interrupt() == session.interrupt() == again.point.frame


def test_going_back_and_drawing_again_gives_the_same_frames(bundle):
    session = a_session(bundle, lead=6)
    session.set(text="someone smiles", at=3)
    session.push(some_sound(30 * PER_FRAME))
    chunks = list(session.frames())
    assert len(chunks) == 6
    start = session.interrupt(played=5, keep_input=True)
    assert start == chunks[1].first_frame + 4 == 7
    again = list(session.frames())
    assert torch.equal(film(again)[:16], film(chunks[2:]))


def test_too_late_to_interrupt(bundle):
    session = a_session(bundle, lead=1)
    session.push(some_sound(30 * PER_FRAME))
    for chunk in (session.step() for _ in range(3)):
        session.played(chunk.first_frame + len(chunk.frames))
    with pytest.raises(
        UserError, match=r"^interrupt: frame 3 is too long ago, the earliest to return to is 7; [^\n]*$"
    ):
        session.interrupt(played=3)
    assert session.interrupt(played=5) == 7
    assert session.point.chunk == 2


def test_an_interrupt_opens_a_closed_session(bundle):
    session = a_session(bundle, lead=9)
    session.push(some_sound(12 * PER_FRAME))
    session.close()
    list(session.frames())
    session.interrupt(played=3)
    session.push(some_sound(12 * PER_FRAME, seed=2))
    assert len(list(session.frames())) == 2


def test_what_cannot_be_loaded_is_one_line(bundle, tmp_path):
    session = a_session(bundle)
    session.push(some_sound(12 * PER_FRAME))
    list(session.frames())
    path = tmp_path / "session"
    save_session(session, path)
    with pytest.raises(UserError, match=r"^another student's session: [^\n]*$"):
        load_session(a_bundle(History(sinks=1, window=2), seed=1), path)
    with pytest.raises(UserError, match=r"^another student's session: [^\n]*$"):
        load_session(a_bundle(History(sinks=1, window=1)), path)
    with pytest.raises(UserError, match=r"^no session: [^\n]*$"):
        load_session(bundle, tmp_path / "none")
    data = path.read_bytes()
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    (tmp_path / "text").write_text("hello")
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "other").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    for name, says in [("cut", "damaged session"), ("text", "damaged session"), ("other", "not a session of format 4")]:
        with pytest.raises(UserError, match=rf"^{says}: [^\n]*$"):
            load_session(bundle, tmp_path / name)
    with pytest.raises(UserError, match=r"^session not saved: [^\n]*$"):
        save_session(session, tmp_path / "none" / "session")
    with pytest.raises(UserError, match=r"^save how='small': exact or light$"):
        save_session(session, path, "small")
    assert sorted(os.listdir(tmp_path)) == ["cut", "other", "session", "text"]


def elsewhere(folder: Path) -> None:
    """The rest of the stream, with one thread and with two."""
    for threads in (1, 2):
        torch.set_num_threads(threads)
        session = load_session(load_student(folder / "student"), folder / "session")
        session.push(load_file(folder / "sound")["sound"])
        save_file({"frames": film(session.frames())}, folder / f"frames-{threads}")


def test_another_process_draws_the_same(tmp_path):
    """Bit for bit with as many threads; another number adds up in another order, which is a grey level here and there."""
    sound = some_sound(40 * PER_FRAME)
    bundle = a_bundle()
    save_student(tmp_path / "student", bundle, "# A card\n")
    session = a_session(bundle)
    session.push(sound[: 15 * PER_FRAME])
    list(session.frames())
    save_session(session, tmp_path / "session")
    save_file({"sound": sound[15 * PER_FRAME :].clone()}, tmp_path / "sound")
    processes.call(elsewhere, tmp_path)
    session.push(sound[15 * PER_FRAME :])
    frames = film(session.frames()).int()
    for threads in (1, 2):
        gap = (frames - load_file(tmp_path / f"frames-{threads}")["frames"].int()).abs()
        assert gap.max() <= (0 if threads == torch.get_num_threads() else 1)
        assert gap.float().mean() < 0.01


def test_a_closed_session_stays_closed(bundle, tmp_path):
    session = a_session(bundle)
    session.push(some_sound(12 * PER_FRAME))
    session.close()
    session.step()
    save_session(session, tmp_path / "session")
    again = load_session(bundle, tmp_path / "session")
    with pytest.raises(UserError, match=r"^push after close[^\n]*$"):
        again.push(torch.zeros(10))
    films = [film(one.frames()) for one in (session, again)]
    assert len(films[0]) == 12
    assert torch.equal(*films)


def test_a_decoder_that_is_a_network_works_beside_the_commit():
    """The worker thread changes no frame, whether the next step waits for it, a save or an interrupt does."""
    sound, films = some_sound(27 * PER_FRAME), []
    for threaded in (False, True):
        bundle = a_bundle()
        codec = copy.deepcopy(bundle.codec)
        if threaded:
            codec.weight = torch.nn.Parameter(torch.zeros(1))
        session = a_session(dataclasses.replace(bundle, codec=codec), lead=9)
        assert (session.beside.pool is not None) == threaded
        session.push(sound)
        frames = [film(session.frames())]
        session.interrupt(played=9, keep_input=True)
        frames.append(film(session.frames()))
        films.append(torch.cat(frames))
    assert torch.equal(*films)
