"""A stream goes on within a chunk: numbers change, and nothing else; what the viewer saw and what the context holds is known."""

import random
from fractions import Fraction

import pytest
import torch

from students.history import History
from students.schedule import Schedule
from students.serving.session import Session, Starved
from students.serving.snapshot import load_session, save_session
from students.serving.timeline import Director
from teachers.errors import UserError
from tests.students.serving.test_session import HISTORIES, PER_FRAME, film
from tests.students.serving.test_timeline import Noted
from tests.support.tiny import a_bundle, a_portrait, some_sound


@pytest.fixture(scope="module")
def bundle():
    return a_bundle(History(sinks=1, window=2))


def a_session(bundle, **options):
    return Session(bundle, a_portrait(), "a person nods", seed=4, **{"lead": 4, **options})


class Tape:
    """The frames and samples that a viewer saw, by number: what is taken back is gone, what comes again lies over it."""

    def __init__(self):
        self.frames, self.sound = {}, {}

    def cut(self, frame: int) -> None:
        for shown in (self.frames, self.sound):
            for number in [number for number in shown if number >= frame]:
                del shown[number]

    def put(self, chunk, first: int) -> None:
        assert first == len(self.frames), "a gap or an overlap"
        for i, (frame, sound) in enumerate(zip(chunk.frames, chunk.audio.split(PER_FRAME), strict=True)):
            self.frames[first + i], self.sound[first + i] = frame, sound


def conversation(bundle, seed: int) -> tuple[Session, Tape, list[tuple[torch.Tensor, int]], list[int]]:
    """A viewer who interrupts six times, each time anywhere, and is shown what follows as soon as it is drawn: the session, what
    was seen, for each stretch of sound how many of its chunks were kept, and the frames that were left out each time."""
    rng, session, tape = random.Random(seed), a_session(bundle), Tape()
    kept, left_out, place = [], [], 0
    for turn in range(6):
        sound = some_sound(40 * PER_FRAME, seed=100 * seed + turn)
        session.push(sound)
        start = session.point.chunk
        for i in range(rng.randrange(1, 4)):
            end = session.point.frame
            chunk = session.step()
            if i == 0 and turn:
                first = max(session.points[-2].began, place)
                place = rng.choice((first, rng.randint(first, end)))
                session.skip(place)
                tape.cut(place)
                left_out.append(end - place)
                assert session.point.began == place
                tape.put(chunk, place)
            else:
                tape.put(chunk, chunk.first_frame)
        assert len(tape.frames) == session.point.frame
        place = rng.randint(max(place, session.points[0].began + 1), session.point.frame)
        session.played(place)
        if turn < 5:
            tape.cut(session.interrupt())
        kept.append((sound, session.point.chunk - start))
    return session, tape, kept, left_out


@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_what_follows_equals_a_session_that_never_drew_what_was_dropped(history):
    """Bit for bit, frames, sound and context; the tape of the viewer is that session's, without the frames that were left out."""
    bundle = a_bundle(history)
    session, tape, kept, left_out = conversation(bundle, seed=10 + HISTORIES.index(history))
    other = a_session(bundle, lead=10**6)
    ends = iter([*left_out, 0])
    frames, sounds = [], []
    for sound, count in kept:
        other.push(sound)
        chunks = [other.step() for _ in range(count)]
        if sound is not kept[-1][0]:
            other.interrupt(played=other.point.frame)
        stretch = torch.cat([chunk.frames for chunk in chunks]) if chunks else torch.zeros(0, 16, 16, 3)
        voice = torch.cat([chunk.audio for chunk in chunks]) if chunks else torch.zeros(0)
        frames.append(stretch)
        sounds.append(voice)
        cut = next(ends)
        for parts, each in (
            (frames, 1),
            (sounds, PER_FRAME),
        ):  # a stretch without a chunk of its own cuts the one before
            whole = torch.cat(parts)
            parts[:] = [whole[: len(whole) - cut * each]]
    assert sum(left_out) > 3, "nothing was left out"
    assert torch.equal(torch.stack([tape.frames[n] for n in sorted(tape.frames)]), torch.cat(frames))
    assert torch.equal(torch.cat([tape.sound[n] for n in sorted(tape.sound)]), torch.cat(sounds))
    assert session.shift == -sum(left_out)
    assert session.point.frame == other.point.frame - sum(left_out)
    assert session.inputs.audio.end == other.inputs.audio.end
    assert [past.chunk for past in session.point.seen] == [past.chunk for past in other.point.seen]
    for mine, theirs in zip(session.point.seen, other.point.seen, strict=True):
        assert torch.equal(mine.x0, theirs.x0)
        assert torch.equal(mine.conditions.audio, theirs.conditions.audio)
    for one in (session, other):
        one.played(one.point.frame)
    assert torch.equal(session.step().frames, other.step().frames)


def cut_short(bundle, at: int, **options) -> Session:
    """Chunks of frames 0..2, 3..6 and one that follows frame `at` - 1, which lies in the second."""
    session = a_session(bundle, **options)
    session.push(some_sound(40 * PER_FRAME))
    list(session.frames())
    session.played(at)
    assert session.interrupt() == 7
    session.push(some_sound(40 * PER_FRAME, seed=5))
    session.step()
    session.skip(at)
    return session


@pytest.mark.parametrize("how", ["exact", "light"])
@pytest.mark.parametrize("at", [4, 5, 7])
def test_a_session_that_was_saved_after_it_goes_on(bundle, tmp_path, how, at):
    session = cut_short(bundle, at)
    save_session(session, tmp_path / "session", how)
    again = load_session(bundle, tmp_path / "session")
    assert (again.point.frame, again.point.began, again.shift) == (at + 4, at, at - 7)
    for one in (session, again):
        one.played(at + 4)
    mine, theirs = list(session.frames()), list(again.frames())
    assert [chunk.first_frame for chunk in mine] == [at + 4 + 4 * i for i in range(4)]
    assert [chunk.first_frame for chunk in theirs] == [chunk.first_frame for chunk in mine]
    assert torch.equal(film(mine), film(theirs))
    assert all(torch.equal(a.audio, b.audio) for a, b in zip(mine, theirs, strict=True))
    session.skip(at + 4 + 8 + 1)
    again.skip(at + 4 + 8 + 1)
    assert again.interrupt(played=at + 5) == session.interrupt(played=at + 5) == at + 8


def test_it_can_be_taken_back_to_any_place_and_drawn_again(bundle):
    session = cut_short(bundle, 5)
    session.played(5)
    more = list(session.frames())
    assert [chunk.first_frame for chunk in more] == [9, 13, 17]
    assert session.interrupt(played=6, keep_input=True) == 9
    assert torch.equal(film(session.frames()), film(more))
    assert session.interrupt(played=5) == 5, "the chunk that follows has not been begun"
    session.push(some_sound(20 * PER_FRAME, seed=6))
    chunk = session.step()
    assert (chunk.index, chunk.first_frame) == (2, 5)
    session.skip(5)
    assert session.interrupt(played=4) == 5
    assert session.points[-1].chunk == 2


def test_the_lead_is_counted_in_chunks_that_are_not_seen(bundle):
    session = cut_short(bundle, 5, lead=2)
    assert isinstance(session.step().first_frame, int)
    assert session.step() == Starved("lead")
    session.played(9)
    assert session.step().first_frame == 13


def test_held_frames_count_up_and_skipped_ones_down(bundle):
    session = a_session(bundle, lead=3, idle="hold")
    session.push(some_sound(11 * PER_FRAME + bundle.audio_encoder.lookahead))
    list(session.frames())
    session.played(11)
    held = [session.step() for _ in range(2)]
    assert [chunk.idle for chunk in held] == ["hold", "hold"]
    assert session.shift == 8
    session.played(13)
    assert session.interrupt() == 15
    session.push(some_sound(20 * PER_FRAME, seed=3))
    chunk = session.step()
    session.skip(13)
    assert session.shift == 2
    assert (chunk.index, session.point.began, session.point.frame) == (3, 13, 17)
    assert [chunk.first_frame for chunk in session.frames()] == [17, 21]


def test_chunks_in_flight_follow_at_once_too():
    bundle = a_bundle(History(sinks=1, window=1), schedule=Schedule(depth=3))
    session = a_session(bundle, lead=8)
    films = []
    for place in (7, 5):
        session = a_session(bundle, lead=8)
        session.push(some_sound(40 * PER_FRAME))
        list(session.frames())
        session.interrupt(played=5)
        session.push(some_sound(30 * PER_FRAME, seed=5))
        first = session.step()
        session.skip(place)
        films.append(film([first, *session.frames()]))
        assert session.shift == place - 7
    assert torch.equal(*films)


def test_only_what_was_not_seen_of_the_chunk_before_can_be_left_out(bundle):
    session = cut_short(bundle, 5)
    for frame in (2, 4, 6, 7, 99):  # in an earlier chunk, seen, shown already, the last one's own, never drawn
        with pytest.raises(UserError, match=rf"^skip to frame {frame}: [^\n]* it is 5\.\.5$"):
            session.skip(frame)
    session.skip(5)
    with pytest.raises(UserError, match=r"^skip to frame: got 1.5; it is a whole number$"):
        session.skip(1.5)
    fresh = a_session(bundle, lead=None)
    fresh.push(some_sound(20 * PER_FRAME))
    list(fresh.frames())
    with pytest.raises(
        UserError, match=r"^skip to frame 9: a chunk that is kept, before the last one, has to be [^\n]*$"
    ):
        fresh.skip(9)
    assert session.point.frame == 9


def test_a_planner_is_given_what_was_played(bundle):
    session, planner = a_session(bundle), Noted(Fraction(1))
    director, played = Director(session, planner), Tape()
    session.push(some_sound(40 * PER_FRAME))
    for _ in range(3):
        chunk = director.step()
        played.put(chunk, chunk.first_frame)
    session.played(5)
    played.cut(session.interrupt())
    session.push(some_sound(60 * PER_FRAME, seed=5))
    chunk = director.step()
    director.skip(5)
    played.cut(5)
    played.put(chunk, 5)
    planner.asked.clear()
    for _ in range(4):
        chunk = director.step()
        if planner.asked and len(played.sound) == chunk.first_frame:
            _, received, _ = planner.asked.pop()
            whole = torch.cat([played.sound[n] for n in sorted(played.sound)])
            assert torch.equal(received, whole[-len(received) :])
            assert len(received) == 16000
            break
        played.put(chunk, chunk.first_frame)
        session.played(chunk.first_frame)
    else:
        raise AssertionError("the planner was not asked")
