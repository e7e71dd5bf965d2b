"""A live session: lead, idling, texts that change on the way, mistakes that end nothing."""

from dataclasses import replace

import pytest
import torch

from students.history import History
from students.schedule import advance
from students.serving.session import Session, Starved, chunk_noise
from teachers.errors import UserError
from tests.students.serving.test_session import PER_FRAME, drawn, film, play
from tests.support.tiny import a_bundle, a_portrait, some_sound


@pytest.fixture(scope="module")
def bundle():
    return a_bundle(History(sinks=1, window=2))


def test_lead_holds_the_engine_back(bundle):
    session = Session(bundle, a_portrait(), "a person nods", lead=2)
    session.push(some_sound(40 * PER_FRAME))
    assert len(list(session.frames())) == 2
    assert session.step() == Starved("lead")
    session.played(3)
    assert [chunk.first_frame for chunk in session.frames()] == [7]
    session.played(11)
    assert [chunk.first_frame for chunk in session.frames()] == [11, 15]


def test_idle_live_goes_on_in_silence_and_speech_follows(bundle):
    session = Session(bundle, a_portrait(), "a person nods", lead=1, idle="live")
    sound, chunks = some_sound(4 * PER_FRAME), []
    for i in range(8):
        if i == 3:
            session.push(sound)
        chunk = session.step()
        session.played(chunk.first_frame + len(chunk.frames))
        chunks.append(chunk)
    assert [chunk.idle for chunk in chunks] == ["live"] * 3 + [""] + ["live"] * 4
    received = torch.cat([chunk.audio for chunk in chunks])
    assert not received[: 11 * PER_FRAME + bundle.audio_encoder.lookahead].any()
    assert torch.equal(received[11 * PER_FRAME + bundle.audio_encoder.lookahead :][: len(sound)], sound)
    same = Session(bundle, a_portrait(), "a person nods")
    same.push(received)
    assert torch.equal(film(same.frames()), film(chunks)[: 4 * 7 - 1]), "idle life differs from pushed silence"


def test_idle_hold_repeats_the_last_frame_and_draws_nothing(bundle):
    session = Session(bundle, a_portrait(), "a person nods", lead=1, idle="hold")
    sound = some_sound(11 * PER_FRAME + bundle.audio_encoder.lookahead)
    assert session.step() == Starved("audio", 3 * PER_FRAME + bundle.audio_encoder.lookahead), (
        "there is nothing to hold yet"
    )
    session.push(sound[: 3 * PER_FRAME + bundle.audio_encoder.lookahead])
    chunks = []
    for i in range(5):
        if i == 3:
            session.push(sound[3 * PER_FRAME + bundle.audio_encoder.lookahead :])
        chunk = session.step()
        session.played(chunk.first_frame + len(chunk.frames))
        chunks.append(chunk)
    assert [chunk.idle for chunk in chunks] == ["", "hold", "hold", "", ""]
    assert [chunk.first_frame for chunk in chunks] == [0, 3, 7, 11, 15]
    assert [chunk.index for chunk in chunks] == [0, 0, 0, 1, 2]
    assert all(torch.equal(frame, chunks[0].frames[-1]) for frame in chunks[2].frames)
    assert torch.equal(film([chunks[0], *chunks[3:]]), film(play(bundle, sound, close=False)))


def test_a_text_switch_touches_no_earlier_frame(bundle):
    sound, films = some_sound(23 * PER_FRAME), {}
    for how in (None, "keep", "recache"):
        session = Session(bundle, a_portrait(), "a person nods")
        session.push(sound)
        if how is not None:
            session.set(text="someone smiles", at=3, how=how)
        films[how] = film(session.frames())
    edge = bundle.spec.pixel_frames(3)[0]
    for how in ("keep", "recache"):
        assert torch.equal(films[how][:edge], films[None][:edge])
        assert not torch.equal(films[how][edge : edge + 4], films[None][edge : edge + 4])
    assert not torch.equal(films["keep"], films["recache"])


def test_next_is_the_chunk_after_the_last_drawn(bundle):
    sound, films = some_sound(23 * PER_FRAME), []
    for at in ("next", 2):
        session = Session(bundle, a_portrait(), "a person nods")
        session.push(sound[: 7 * PER_FRAME + bundle.audio_encoder.lookahead])
        if at != "next":
            session.set(text="someone smiles", at=at)
        chunks = list(session.frames())
        if at == "next":
            session.set(text="someone smiles", at=at)
        session.push(sound[7 * PER_FRAME + bundle.audio_encoder.lookahead :])
        films.append(film([*chunks, *session.frames()]))
        with pytest.raises(UserError, match=r"^text at chunk 1: chunk \d is already drawn; give a later one$"):
            session.set(text="a person nods", at=1)
    assert torch.equal(*films)


def test_recache_is_a_session_that_had_the_new_text_for_the_window(bundle):
    """Before anything left the window, recaching commits the same latents under the new text: so does a stream by hand."""
    session = Session(bundle, a_portrait(), "a person nods", seed=5)
    session.push(some_sound(19 * PER_FRAME + bundle.audio_encoder.lookahead))
    latents, received = [], []
    for i in range(5):
        if i == 3:
            session.set(text="someone smiles", how="recache")
        session.step()
        latents.append(drawn(session).x0)
        received.append(drawn(session).conditions)
    with torch.inference_mode():
        text, student = bundle.text(["someone smiles"]), bundle.student
        state = student.open(text)
        for x0, conditions in zip(latents[:3], received[:3], strict=True):
            state = student.commit(state, x0, replace(conditions, text=text))
        for i in (3, 4):  # the text is set once: chunk 4 follows from the state after chunk 3
            x0, steps = advance(
                student,
                state,
                received[i],
                lambda _, step, i=i: chunk_noise(bundle.spec, 5, i, step),
                bundle.spec.sigmas,
            )
            assert torch.equal(x0, latents[i])
            state = student.commit(state, x0, received[i], steps)


def test_mistakes_are_one_line_and_the_session_goes_on(bundle):
    sound = some_sound(12 * PER_FRAME)
    session = Session(bundle, a_portrait(), "a person nods", seed=0)
    session.push(sound[:5000])
    for wrong, says in [
        (torch.tensor([0.0, float("nan")]), "finite"),
        (torch.tensor([float("inf")]), "finite"),
        (torch.zeros(2, 3, 4), "shape|got"),
        (torch.zeros(100, 2), "got"),
        (torch.zeros(100, dtype=torch.int16), "int16"),
        (torch.full((9,), 20000.0), "peak of 20000"),
    ]:
        with pytest.raises(UserError, match=rf"^audio must [^\n]*({says})[^\n]*$"):
            session.push(wrong)
    with pytest.raises(UserError, match=r"^audio rate: got 0 Hz[^\n]*$"):
        session.push(torch.zeros(10), rate=0)
    with pytest.raises(UserError, match=r"^pose: this student takes none[^\n]*$"):
        session.push(audio=torch.zeros(10), pose=torch.zeros(1, 3))
    with pytest.raises(UserError, match=r"^text how='blend': keep or recache$"):
        session.set(text="someone smiles", how="blend")
    with pytest.raises(UserError, match=r"^played=99: 0 frames were drawn[^\n]*$"):
        session.interrupt(played=99)
    session.push(sound[5000:])
    session.close()
    assert torch.equal(film(session.frames()), film(play(bundle, sound)))
    with pytest.raises(UserError, match=r"^push after close[^\n]*$"):
        session.push(torch.zeros(10))
    with pytest.raises(UserError, match=r"^reference image: got \(3, 8, 16\)[^\n]*\(3, 16, 16\); resize it$"):
        Session(bundle, torch.zeros(3, 8, 16), "a person nods")
    for options in ({"idle": "live"}, {"idle": "asleep"}, {"lead": 0}):
        with pytest.raises(UserError, match=r"^session: [^\n]*$"):
            Session(bundle, a_portrait(), "a person nods", **options)


def test_a_long_text_is_cut_with_a_warning_and_a_clipped_sound_is_drawn(bundle):
    with pytest.warns(UserWarning, match=r"^text of \d+ tokens: the student reads the first 5$"):
        session = Session(bundle, a_portrait(), "a person nods " * 700)
    session.push((some_sound(8 * PER_FRAME) * 90).clamp(-1, 1))
    assert len(list(session.frames())) == 2


def test_silence_is_drawn(bundle):
    frames = film(play(bundle, torch.zeros(12 * PER_FRAME)))
    assert torch.isfinite(frames.float()).all()
    assert frames.float().std() > 5
