"""The session: pushes may be split anywhere, streams never mix, memory is bounded, training's rollout is the same."""

from collections import deque
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise

import pytest
import torch

from distill.methods.rollout import rollout
from students.history import History
from students.kv_cache import InplaceKVCache
from students.serving.session import Session, Starved, chunk_noise
from teachers.codecs.linear import to_uint8
from teachers.conditions import Conditions, pack_rows
from teachers.errors import UserError
from teachers.media.streams import Stream
from tests.support.tiny import a_bundle, a_portrait, randn, rng, some_sound

PER_FRAME = 1280
HISTORIES = [
    History(sinks=1, window=2),
    History(sinks=0, window=None),
    History(sinks=1, window=1),
    History(sinks=3, window=1),
    History(sinks=1, window=2, level=0.1),
    History(sinks=1, window=1, memory=2, memory_every=2),
    History(sinks=1, window=2, commit="same_level"),
    History(sinks=1, window=(1, 3)),
]


@pytest.fixture(scope="module")
def bundle():
    return a_bundle(History(sinks=1, window=2))


def play(bundle, sound, cuts=(), seed=0, text="a person nods", close=True):
    """All chunks of a session that gets `sound` in the pieces between the cuts."""
    session, chunks = Session(bundle, a_portrait(), text, seed), []
    edges = [0, *cuts, len(sound)]
    for start, stop in pairwise(edges):
        session.push(sound[start:stop])
        chunks += session.frames()
    if close:
        session.close()
        chunks += session.frames()
    return chunks


def drawn(session):
    """What the session drew last."""
    return session.point.seen[-1]


def film(chunks):
    return torch.cat([chunk.frames for chunk in chunks])


def test_frames_come_in_order_and_cover_the_sound(bundle):
    chunks = play(bundle, some_sound(20 * PER_FRAME + 100))
    assert [chunk.index for chunk in chunks] == list(range(6))
    assert [len(chunk.frames) for chunk in chunks] == [3, 4, 4, 4, 4, 4]
    assert [chunk.first_frame for chunk in chunks] == [0, 3, 7, 11, 15, 19]
    frames = film(chunks)
    assert frames.dtype == torch.uint8
    assert frames.shape[1:] == (16, 16, 3)
    assert 0.1 < (frames.float() / 255).mean() < 0.9
    assert frames.float().std() > 5, "a saturated picture proves nothing"
    assert set(chunks[0].seconds) == {"wait", "encode", "denoise", "decode"}


def test_any_split_of_the_sound_gives_the_same_frames(bundle):
    sound = some_sound(12 * PER_FRAME + 77)
    whole = film(play(bundle, sound))
    for seed in range(4):
        cuts = torch.randint(0, len(sound), (3 + 8 * seed,), generator=rng(seed)).sort().values.tolist()
        assert torch.equal(film(play(bundle, sound, cuts)), whole)
    assert torch.equal(film(play(bundle, sound, range(160, len(sound), 160))), whole)
    open_end = film(play(bundle, sound, close=False))
    assert torch.equal(open_end, whole[: len(open_end)])


def test_two_sessions_never_mix(bundle):
    sounds = [some_sound(12 * PER_FRAME, seed=i) for i in range(2)]
    alone = [film(play(bundle, sounds[i], seed=i, close=False)) for i in range(2)]
    sessions = [Session(bundle, a_portrait(), "a person nods", seed=i) for i in range(2)]
    together = [[], []]
    for start in range(0, 12 * PER_FRAME, 1000):
        for i, session in enumerate(sessions):
            session.push(sounds[i][start : start + 1000])
            together[i] += session.frames()
    assert all(torch.equal(film(together[i]), alone[i]) for i in range(2))
    assert not torch.equal(alone[0], alone[1])


def test_noise_is_a_function_of_seed_chunk_and_step(bundle):
    keys = [(seed, chunk, step) for seed in (0, 1) for chunk in (0, 1, 10) for step in (0, 1)]
    forward = {key: chunk_noise(bundle.spec, *key) for key in keys}
    backward = {key: chunk_noise(bundle.spec, *key) for key in reversed(keys)}
    assert all(torch.equal(forward[key], backward[key]) for key in keys)
    assert len({float(noise.sum()) for noise in forward.values()}) == len(keys)


def test_what_is_asked_changes_what_is_shown(bundle):
    sound = some_sound(8 * PER_FRAME)
    shown = film(play(bundle, sound))
    others = [play(bundle, sound, seed=1), play(bundle, sound, text="someone smiles"), play(bundle, 0.2 * sound)]
    assert all(not torch.equal(film(other), shown) for other in others)
    session = Session(bundle, -a_portrait(), "a person nods")
    session.push(sound)
    assert not torch.equal(film(session.frames()), shown[:7])


def test_the_future_is_not_heard_and_the_margin_is(bundle):
    """Sound after a chunk's last frame plus the audio encoder's margin cannot change it, to the bit; sound just before can."""
    sound, margin = some_sound(16 * PER_FRAME), bundle.audio_encoder.lookahead
    chunks = play(bundle, sound)
    for index in (0, 1, 2):
        edge = bundle.spec.pixel_frames(index)[1] * PER_FRAME + margin
        late, early = sound.clone(), sound.clone()
        late[edge:] = some_sound(len(sound) - edge, seed=9)
        early[edge - 2 * margin : edge - margin] += 0.5
        assert torch.equal(play(bundle, late)[index].frames, chunks[index].frames)
        assert not torch.equal(play(bundle, early)[index].frames, chunks[index].frames)
        session = Session(bundle, a_portrait(), "a person nods")
        session.push(sound[: edge - 1])
        assert len(list(session.frames())) == index, "a chunk was drawn before its sound was there"
        session.push(sound[edge - 1 : edge])
        assert len(list(session.frames())) == 1


@torch.no_grad()
@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_the_training_rollout_is_the_stream_bit_for_bit(history):
    bundle = a_bundle(history)
    session, latents, received = Session(bundle, a_portrait(), "a person nods", seed=3), [], []
    sound = some_sound(35 * PER_FRAME + 200)
    session.push(sound)
    frames = []
    for chunk in session.frames():
        latents.append(drawn(session).x0)
        received.append(drawn(session).conditions)
        frames.append(chunk.frames)
    assert len(latents) == 9
    given = Conditions(
        text=received[0].text,
        reference=received[0].reference,
        audio=torch.cat([part.audio for part in received], dim=1),
    )
    whole = pack_rows(bundle.audio_encoder(sound[None], 0, 35), 2)
    assert torch.allclose(given.audio, whole, atol=1e-4), "a stream is conditioned on other audio than training"
    x0 = rollout(bundle.student, given, lambda chunk, step: chunk_noise(bundle.spec, 3, chunk, step))
    assert torch.equal(x0, torch.cat(latents, dim=2))
    pixels = to_uint8(bundle.codec.decode(x0))[0].permute(1, 2, 3, 0)
    assert (pixels.int() - torch.cat(frames).int()).abs().max() <= 1, "stream decode is not whole decode"
    reference = bundle.codec.encode(a_portrait()[None, :, None])
    assert torch.equal(x0[:, :, :1], reference)


def test_an_impulse_lands_on_its_frame_at_any_time(bundle):
    """A click in pixel frame k is in the audio row of frame k: at the start, inside and long after."""
    clicks = (1, 2, 3, 6, 11, 38, 203)
    sound = torch.zeros(210 * PER_FRAME)
    for k in clicks:
        sound[k * PER_FRAME + PER_FRAME // 2] = 1.0
    session = Session(bundle, a_portrait(), "a person nods")
    rows = []
    for start in range(0, len(sound), 3 * PER_FRAME):
        session.push(sound[start : start + 3 * PER_FRAME])
        for _ in session.frames():
            rows.append(drawn(session).conditions.audio[0].flatten(0, 1).sum(dim=1))
    rows = torch.cat(rows)[1:]  # the first row is repeated in front
    quiet = rows.median()
    assert tuple((rows > quiet + 1.0).nonzero().flatten().tolist()) == clicks


def stored_bytes(value) -> int:
    """Bytes of every tensor storage that is reachable through containers and objects of this project."""
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes()
    if is_dataclass(value):
        return sum(stored_bytes(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, dict):
        return sum(stored_bytes(item) for item in value.values())
    if isinstance(value, tuple | list | deque):
        return sum(stored_bytes(item) for item in value)
    return stored_bytes(vars(value)) if isinstance(value, Stream | InplaceKVCache) else 0


@pytest.mark.parametrize("history", [history for history in HISTORIES if isinstance(history.window, int)], ids=str)
def test_what_a_session_holds_does_not_grow(history):
    session, sizes, longest = Session(a_bundle(history), a_portrait(), "a person nods", lead=2), [], 0
    sound = some_sound(4 * PER_FRAME)
    for _ in range(60):
        session.push(sound)
        for chunk in session.frames():
            session.played(chunk.first_frame + len(chunk.frames))
            session.settle()
            sizes.append(stored_bytes({k: v for k, v in vars(session).items() if k not in ("bundle", "spec")}))
        longest = max(longest, session.inputs.audio.end - session.inputs.audio.start)
    assert len(sizes) == 60
    assert len(set(sizes[20:])) == 1, "what a session holds grows"
    assert longest <= 20 * PER_FRAME
    assert len(session.point.state.cached) == history.capacity


def test_an_empty_or_short_sound(bundle):
    session = Session(bundle, a_portrait(), "a person nods")
    starved = session.step()
    assert not starved
    assert starved == Starved("audio", 3 * PER_FRAME + bundle.audio_encoder.lookahead)
    session.push(torch.zeros(0))
    session.close()
    assert session.step() == Starved("end")
    assert [len(chunk.frames) for chunk in play(bundle, some_sound(10))] == [3]
    assert [len(chunk.frames) for chunk in play(bundle, some_sound(3 * PER_FRAME))] == [3]
    assert [len(chunk.frames) for chunk in play(bundle, some_sound(3 * PER_FRAME + 1))] == [3, 4]


def test_a_chunk_carries_its_sound(bundle):
    sound = some_sound(11 * PER_FRAME)
    chunks = play(bundle, sound)
    assert all(len(chunk.audio) == len(chunk.frames) * PER_FRAME for chunk in chunks)
    assert torch.equal(torch.cat([chunk.audio for chunk in chunks]), sound)


@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (44100, 1), (48000, 2)])
def test_other_rates_are_heard_the_same_however_they_are_cut(bundle, rate, channels):
    sound = some_sound(rate * 2).expand(channels, -1)
    films = []
    for cuts in ([], [333, 4000, 4001, rate]):
        session, chunks = Session(bundle, a_portrait(), "a person nods"), []
        for start, stop in pairwise([0, *cuts, rate * 2]):
            session.push(sound[:, start:stop], rate=rate)
            chunks += session.frames()
        session.close()
        films.append(film([*chunks, *session.frames()]))
        assert session.inputs.audio.end == 32000
    assert torch.equal(*films)
    assert len(films[0]) == 27  # 25 frames of sound end inside the seventh chunk


def test_pose_steers_and_waits_and_can_be_left_out():
    bundle = a_bundle(pose_dim=3)
    sound, pose, films = some_sound(12 * PER_FRAME), randn(12, 3, seed=4), []
    for rows in (pose, pose.flip(0), None):
        session = Session(bundle, a_portrait(), "a person nods", drop=() if rows is not None else ("pose",))
        session.push(sound)
        if rows is not None:
            assert session.step() == Starved("pose", 3)
            with pytest.raises(UserError, match=r"^pose must be finite rows \[T, 3\][^\n]*got \(4, 2\)$"):
                session.push(pose=torch.zeros(4, 2))
            session.push(pose=rows[:5])
            chunks = list(session.frames())
            assert len(chunks) == 1
            session.push(pose=rows[5:])
        else:
            chunks = []
        films.append(film([*chunks, *session.frames()]))
    assert len(films[0]) == len(films[2]) == 11
    assert len({frames.sum().item() for frames in films}) == 3


def test_first_chunks_take_their_own_steps_in_rollout_and_stream():
    """JoyAvatar's first sigmas: served as they are rolled out, bit for bit, and another film than without them."""
    first = (1.0, 0.9, 0.8, 0.5)
    films = []
    for changes in ({"first_sigmas": first, "first_chunks": 1}, {}):
        bundle = a_bundle(**changes)
        session = Session(bundle, a_portrait(), "a person nods", seed=4)
        session.push(audio=some_sound(6 * 2 * 2 * 1280))
        drawn = [session.step() and session.point.seen[-1].x0 for _ in range(2)]
        films.append(torch.cat(drawn, dim=2))
        given = [past.conditions for past in session.point.seen]
        whole = replace(given[0], audio=torch.cat([part.audio for part in given], dim=1))
        with torch.inference_mode():
            made = rollout(bundle.student, whole, lambda chunk, step, b=bundle: chunk_noise(b.spec, 4, chunk, step))
        assert torch.equal(made, films[-1])
    assert not torch.equal(*films)
