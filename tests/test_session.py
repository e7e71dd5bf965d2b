"""The session: pushes may be split anywhere, streams never mix, memory is bounded, training's rollout is the same."""

from dataclasses import fields, is_dataclass
from itertools import pairwise

import pytest
import torch
from tiny import a_bundle, a_portrait, rng, some_sound

from distill.rollout import rollout
from students.history import History
from students.session import Session, chunk_noise
from teachers.codecs import to_uint8
from teachers.conditions import Conditions, pack_audio
from teachers.errors import UserError

PER_FRAME = 1280


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
    assert set(chunks[0].seconds) == {"commit", "encode", "denoise", "decode"}


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
    """Sound after a chunk's last frame plus the ears' margin cannot change it, to the bit; sound just before can."""
    sound, margin = some_sound(16 * PER_FRAME), bundle.ears.margin
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
@pytest.mark.parametrize(("sinks", "window"), [(1, 2), (0, None), (1, 1)])
def test_the_training_rollout_is_the_stream_bit_for_bit(sinks, window):
    bundle = a_bundle(History(sinks=sinks, window=window))
    session, latents, heard = Session(bundle, a_portrait(), "a person nods", seed=3), [], []
    sound = some_sound(19 * PER_FRAME + 200)
    session.push(sound)
    frames = []
    for chunk in session.frames():
        latents.append(session.pending[0])
        heard.append(session.pending[1])
        frames.append(chunk.frames)
    assert len(latents) == 5
    given = Conditions(
        text=heard[0].text, reference=heard[0].reference, audio=torch.cat([part.audio for part in heard], dim=1)
    )
    whole = pack_audio(bundle.ears(sound[None], 0, 19), 2)
    assert torch.allclose(given.audio, whole, atol=1e-4), "a stream hears something else than training"
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
            rows.append(session.pending[1].audio[0].flatten(0, 1).sum(dim=1))
    rows = torch.cat(rows)[1:]  # the first row is repeated in front
    quiet = rows.median()
    assert tuple((rows > quiet + 1.0).nonzero().flatten().tolist()) == clicks


def stored_bytes(value) -> int:
    """Bytes of every tensor storage that is reachable through tuples, dataclasses and dicts."""
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes()
    if is_dataclass(value):
        return sum(stored_bytes(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, dict):
        return sum(stored_bytes(item) for item in value.values())
    return sum(stored_bytes(item) for item in value) if isinstance(value, tuple | list) else 0


def test_two_hundred_chunks_in_constant_memory(bundle):
    session, sizes, longest = Session(bundle, a_portrait(), "a person nods"), [], 0
    sound = some_sound(4 * PER_FRAME)
    for _ in range(200):
        session.push(sound)
        for _ in session.frames():
            session_parts = {k: v for k, v in vars(session).items() if k not in ("bundle", "spec")}
            sizes.append(stored_bytes(session_parts))
        longest = max(longest, len(session.samples))
    assert len(sizes) == 200
    assert len(set(sizes[10:])) == 1, "what a session holds grows"
    assert longest <= 8 * PER_FRAME
    assert session.state.past_frames == 6
    assert len(session.state.kept) == 3


def test_an_empty_or_short_sound(bundle):
    session = Session(bundle, a_portrait(), "a person nods")
    assert session.step() is None
    session.push(torch.zeros(0))
    session.close()
    assert list(session.frames()) == []
    assert [len(chunk.frames) for chunk in play(bundle, some_sound(10))] == [3]
    assert [len(chunk.frames) for chunk in play(bundle, some_sound(3 * PER_FRAME))] == [3]
    assert [len(chunk.frames) for chunk in play(bundle, some_sound(3 * PER_FRAME + 1))] == [3, 4]


def test_mistakes_are_one_line(bundle):
    session = Session(bundle, a_portrait(), "a person nods")
    for wrong in (torch.tensor([0.0, float("nan")]), torch.tensor([float("inf")]), torch.zeros(2, 100)):
        with pytest.raises(UserError, match=r"^audio must be finite samples \[S\][^\n]*$"):
            session.push(wrong)
    session.close()
    with pytest.raises(UserError, match=r"^push after close[^\n]*$"):
        session.push(torch.zeros(10))
    with pytest.raises(UserError, match=r"^reference image: got \(3, 8, 16\)[^\n]*\(3, 16, 16\)$"):
        Session(bundle, torch.zeros(3, 8, 16), "a person nods")
