"""What the session promises, for every kind of student: one suite, one student a parameter."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from distill.methods.rollout import rollout
from students.history import History
from students.schedule import Schedule
from students.serving.optimize import Speed, prepare
from students.serving.session import Session, Starved, chunk_noise
from students.serving.snapshot import load_session, save_session
from teachers.conditions import Conditions
from teachers.guidance import EmbeddedScales, GuidanceRange
from teachers.networks.wan import NetworkConfig
from tests.support.tiny import MIDAS, NETWORK, a_bundle, a_portrait, rng, some_sound

PER_FRAME = 1280
SCALES = EmbeddedScales(both=GuidanceRange())
STUDENTS = {
    "sequential": (History(sinks=1, window=2), Schedule()),
    "same_level": (History(sinks=1, window=2, commit="same_level"), Schedule()),
    "diagonal": (History(sinks=1, window=1), Schedule(depth=3)),
    "diagonal with memory": (History(sinks=1, window=1, memory=2, memory_every=2), Schedule(depth=3)),
    "refined": (History(sinks=1, window=2, refine_every=2), Schedule()),
    "flowact, refined, with embedded guidance": (
        History(sinks=1, window=1, memory=2, memory_every=2, refine_every=2),
        Schedule(depth=3),
        {
            "network": NetworkConfig(**NETWORK, audio_blocks=(1,), prediction="reference", guidance=1),
            "guidance": SCALES,
        },
    ),
    "midas": (History(sinks=1, window=2), Schedule(), {"network": MIDAS, "chunk_frames": 1}),
    "midas, two frames a chunk": (History(sinks=1, window=2, memory=1), Schedule(), {"network": MIDAS}),
    "midas, refined": (History(sinks=1, window=2, refine_every=2), Schedule(), {"network": MIDAS}),
}


@pytest.fixture(scope="module", params=list(STUDENTS))
def bundle(request):
    history, schedule, *changes = STUDENTS[request.param]
    return a_bundle(history, schedule=schedule, **(changes[0] if changes else {}))


def sound_of(bundle, num_chunks, seed=0):
    """What a session must be given to draw `num_chunks`, and not one more."""
    stop = bundle.spec.pixel_frames(num_chunks - 1 + bundle.spec.schedule.ahead)[1]
    return some_sound(stop * PER_FRAME + bundle.audio_encoder.lookahead, seed)


def play(session, sound=None, close=False):
    """The frames [T, H, W, 3] that come after a push."""
    if sound is not None:
        session.push(sound)
    if close:
        session.close()
    return film(session.frames())


def film(chunks):
    frames = [chunk.frames for chunk in chunks]
    return torch.cat(frames) if frames else torch.zeros(0)


def opened(bundle, text="a person nods", **options):
    return Session(bundle, a_portrait(), text, **options)


def test_a_chunk_wants_the_sound_of_those_in_flight_and_no_more(bundle):
    session, sound = opened(bundle), sound_of(bundle, 3)
    session.push(sound[:-1])
    assert len(list(session.frames())) == 2
    assert session.step() == Starved("audio", 1)
    session.push(sound[-1:])
    assert session.step().index == 2
    assert not session.step()


@pytest.mark.parametrize("tail", [0, 1, 100, 3 * PER_FRAME])
def test_the_film_is_as_long_as_its_sound(bundle, tail):
    session = opened(bundle)
    session.push(some_sound(11 * PER_FRAME + tail))
    early = film(session.frames())
    session.close()
    frames = torch.cat([early, film(session.frames())])
    stops = [bundle.spec.pixel_frames(k)[1] for k in range(9)]
    assert len(frames) == next(stop for stop in stops if stop * PER_FRAME >= 11 * PER_FRAME + tail)
    assert frames.float().std() > 5, "a flat picture proves nothing"
    at_once = play(opened(bundle), some_sound(11 * PER_FRAME + tail), close=True)
    assert torch.equal(at_once, frames), "closing early and late are the same stream"


def test_any_split_of_the_sound_gives_the_same_frames(bundle):
    sound = sound_of(bundle, 6)
    whole = play(opened(bundle), sound)
    for seed in range(2):
        session, frames = opened(bundle), []
        cuts = torch.randint(0, len(sound), (9,), generator=rng(seed)).sort().values.tolist()
        for start, stop in zip([0, *cuts], [*cuts, len(sound)], strict=True):
            session.push(sound[start:stop])
            frames += session.frames()
        assert torch.equal(film(frames), whole)


def test_in_bf16_the_frames_stay_near(bundle):
    sound = sound_of(bundle, 6)
    narrow = replace(bundle, student=deepcopy(bundle.student))
    gap = play(opened(prepare(narrow, "cpu", Speed(dtype="bf16"))), sound).float() - play(opened(bundle), sound)
    assert 0 < gap.abs().mean() < 2, "grey levels of 255"


def test_two_sessions_never_mix(bundle):
    sounds = [sound_of(bundle, 5, seed) for seed in range(2)]
    alone = [play(opened(bundle, seed=i), sounds[i]) for i in range(2)]
    sessions, together = [opened(bundle, seed=i) for i in range(2)], [[], []]
    for start in range(0, len(sounds[0]), 1000):
        for i, session in enumerate(sessions):
            session.push(sounds[i][start : start + 1000])
            together[i] += session.frames()
    assert all(torch.equal(film(together[i]), alone[i]) for i in range(2))
    assert not torch.equal(*alone)


def test_the_future_is_not_heard_and_the_margin_is(bundle):
    """Sound after the horizon that a chunk declares cannot change it, to the bit; the sound just before does."""
    sound = sound_of(bundle, 6)
    frames = play(opened(bundle), sound)
    drawn = 0 if bundle.spec.chunk_frames > 1 else 1  # a first chunk of one frame is the reference, deaf
    for index in range(drawn, drawn + 3):
        edge, stop = len(sound_of(bundle, index + 1)), bundle.spec.pixel_frames(index)[1]
        for start, same in ((edge, True), (edge - 2 * PER_FRAME, False)):
            other = sound.clone()
            other[start:] = 0.7 * other[start:].flip(0)
            assert torch.equal(play(opened(bundle), other)[:stop], frames[:stop]) == same, (index, same)


def test_rollout_of_training_equals_the_stream_bitwise(bundle):
    session, latents, received = opened(bundle, seed=3), [], []
    session.push(some_sound(bundle.spec.pixel_frames(6)[0] * PER_FRAME))
    session.close()
    for _ in session.frames():
        latents.append(session.point.seen[-1].x0)
        received.append(session.point.seen[-1].conditions)
    audio = torch.cat([part.audio for part in received], dim=1)
    given = Conditions(text=received[0].text, audio=audio, reference=session.reference)
    with torch.inference_mode():
        x0 = rollout(bundle.student, given, lambda chunk, step: chunk_noise(bundle.spec, 3, chunk, step))
    assert len(latents) == 6
    assert torch.equal(x0, torch.cat(latents, dim=2))


def test_a_saved_session_goes_on(bundle, tmp_path):
    session, sound = opened(bundle, seed=2), sound_of(bundle, 8)
    session.push(sound)
    for _ in range(4):
        session.step()
    kinds = ["exact"] if bundle.spec.history.commit == "same_level" else ["exact", "light"]
    for how in kinds:
        save_session(session, tmp_path / how, how)
    rest = film(session.frames())
    assert torch.equal(film(load_session(bundle, tmp_path / "exact").frames()), rest)
    for how in kinds[1:]:
        again = film(load_session(bundle, tmp_path / how).frames())
        assert again.shape == rest.shape
        assert (again.float() - rest.float()).abs().mean() < 12, "it goes on from the same picture"


def test_taking_chunks_back_leaves_no_trace(bundle):
    sound = sound_of(bundle, 8)
    undisturbed = play(opened(bundle), sound)
    session = opened(bundle, lead=3)
    session.push(sound)
    seen = []
    for _ in range(3):
        seen.append(session.step())
    session.played(seen[0].first_frame + len(seen[0].frames))
    at = session.interrupt(keep_input=True)
    assert at == len(seen[0].frames)
    frames = [seen[0].frames]
    while chunk := session.step():
        frames.append(chunk.frames)
        session.played(chunk.first_frame + len(chunk.frames))
    assert torch.equal(torch.cat(frames), undisturbed)


def test_dropped_sound_is_not_heard(bundle):
    """After an interrupt without the input, what was dropped changes nothing, to the bit."""

    def barge_in(dropped):
        session, first = opened(bundle, lead=2), bundle.spec.pixel_frames(0)[1] * PER_FRAME
        session.push(torch.cat([some_sound(first), dropped]))
        shown = session.step()
        session.step()
        session.played(len(shown.frames))
        session.interrupt()
        session.push(sound_of(bundle, 8, seed=4))
        return film([session.step()])

    size = len(sound_of(bundle, 6))
    same, other = some_sound(size, seed=1), some_sound(size, seed=1)
    behind = (
        bundle.spec.schedule.ahead * 4 * PER_FRAME + bundle.audio_encoder.lookahead
    )  # what chunk 0 itself depends on of it
    other[behind:] *= 0.3
    assert torch.equal(barge_in(same), barge_in(other))


def test_a_text_switch_touches_no_earlier_frame(bundle):
    sound, at = sound_of(bundle, 6), 3
    plain = play(opened(bundle), sound)
    session = opened(bundle)
    session.set(text="someone smiles", at=at)
    frames, start = play(session, sound), bundle.spec.pixel_frames(at)[0]
    assert torch.equal(frames[:start], plain[:start])
    assert not torch.equal(frames[start : start + 4], plain[start : start + 4])


def test_an_impulse_lands_on_its_frame(bundle):
    """The clock of sound and frames never drifts: a chunk's sound is the pushed one at its frames."""
    session, sound = opened(bundle), sound_of(bundle, 40)
    session.push(sound)
    for chunk in session.frames():
        start = chunk.first_frame * PER_FRAME
        assert torch.equal(chunk.audio, sound[start : start + len(chunk.frames) * PER_FRAME])


def test_memory_is_bounded(bundle):
    session, held = opened(bundle, lead=2), []
    session.push(sound_of(bundle, 2))
    for i in range(60):
        chunk = session.step()
        session.played(chunk.first_frame + len(chunk.frames))
        session.push(some_sound(bundle.spec.chunk_frames * bundle.spec.codec.stride * PER_FRAME, seed=i))
        session.settle()
        point = session.point
        held.append(
            (len(point.state.cached), len(point.state.flight), sum(len(b) for b in session.inputs.audio.blocks))
        )
    assert held[-1] == held[20] == held[-7]
    assert chunk.index == 59


def test_a_student_of_another_schedule_refuses_the_session(bundle, tmp_path):
    session = opened(bundle)
    session.push(sound_of(bundle, 2))
    session.step()
    save_session(session, tmp_path / "saved")
    other = a_bundle(History(sinks=1, window=2), schedule=Schedule(depth=1), seed=1)
    with pytest.raises(Exception, match=r"another student's session"):
        load_session(replace(other), tmp_path / "saved")
