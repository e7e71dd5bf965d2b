"""Conditions that the package does not know, in a stream: given once, seen by every chunk, kept in a snapshot."""

from types import SimpleNamespace

import pytest
import torch

from students.history import History
from students.networks.causal_wan import CausalWan
from students.serving.inputs import given_features
from students.serving.session import Session
from students.serving.snapshot import load_session, save_session
from students.weights.checkpoint import Bundle
from teachers.errors import UserError
from tests.students.serving.test_session import PER_FRAME, drawn, film
from tests.support.tiny import MOOD, a_bundle, a_portrait, declared, some_mood, some_sound


class MoodyStudent(CausalWan):
    """A student that adds its moods to what it draws."""

    def denoise(self, state, plan, x, sigma, conditions, step=0):
        x0, entry = super().denoise(state, plan, x, sigma, conditions, step)
        mood = conditions.mood.mean() + conditions.idol.mean() + conditions.scenery.mean()
        return x0 + mood + conditions.mood_track.mean(dim=2)[:, None, :, None, None], entry


@pytest.fixture
def bundle():
    with declared(*MOOD):
        plain = a_bundle(History(sinks=1, window=2))
        student = MoodyStudent(plain.student.net, plain.spec).eval()
        yield Bundle(student, plain.codec, plain.audio_encoder, plain.text)


def moods(frames=6, seed=0):
    return {name: value[0] for name, value in some_mood(1, frames, seed).items()}


def opened(bundle, **options):
    return Session(bundle, a_portrait(), "a person nods", seed=4, **options)


def test_every_chunk_sees_what_the_stream_was_given(bundle):
    """A latent frame its own row, the last one held; other values are other frames; a dropped one is zeros."""
    given, sound = moods(), some_sound(23 * PER_FRAME)
    session = opened(bundle, conditions=given)
    session.push(sound)
    frames, seen = [], []
    for chunk in session.frames():
        frames.append(chunk.frames)
        seen.append(drawn(session).conditions)
    assert len(seen) > 4
    for c in seen:
        assert torch.equal(c.mood[0], given["mood"])
        assert torch.equal(c.idol[0], given["idol"])
    track = torch.cat([c.mood_track[0] for c in seen])
    assert torch.equal(track[:6], given["mood_track"])
    assert torch.equal(track[6:], given["mood_track"][-1:].expand(len(track) - 6, -1))
    assert torch.equal(torch.cat([c.scenery[0] for c in seen], dim=1)[:, :6], given["scenery"])
    for name in given:
        other = opened(bundle, conditions=given | {name: given[name] + 1})
        other.push(sound)
        assert not torch.equal(film(other.frames()), torch.cat(frames)), name
    silent = opened(bundle, conditions=given, drop=("mood",))
    silent.push(sound)
    assert silent.step()
    assert not drawn(silent).conditions.mood.any()


@pytest.mark.parametrize("how", ["exact", "light"])
def test_a_snapshot_keeps_them(bundle, how, tmp_path):
    sound = some_sound(23 * PER_FRAME)
    session = opened(bundle, conditions=moods(20))
    session.push(sound[: 8 * PER_FRAME])
    assert list(session.frames())
    save_session(session, tmp_path / "session", how)
    late = []
    for other in (session, load_session(bundle, tmp_path / "session")):
        other.push(sound[8 * PER_FRAME :])
        late.append(film(other.frames()))
    assert len(late[0]) > 8
    assert torch.equal(*late) if how == "exact" else late[0].shape == late[1].shape
    past, own = (s.point.seen[-1].conditions for s in (other, session))
    for name in moods():
        assert torch.equal(getattr(past, name), getattr(own, name)), name


def test_what_a_network_takes_and_nobody_gives_is_zeros():
    takes = SimpleNamespace(network=SimpleNamespace(takes=("text", "mood", "mood_track")))
    with declared(*MOOD):
        given = given_features(takes, {"mood_track": torch.ones(4, 3)})
        assert tuple(given.mood.shape) == (1, 7)
        assert not given.mood.any()
        assert tuple(given.mood_track.shape) == (1, 4, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"conditions": {"mod": torch.zeros(7)}}, "unknown condition 'mod': did you mean 'mood'"),
        ({"conditions": {"mood": torch.zeros(6)}}, r"mood \(6,\) does not fit its declared size \(7,\)"),
        ({"conditions": {"scenery": torch.zeros(2, 5, 4, 3)}}, r"scenery \(2, 5, 4, 3\) does not fit"),
        ({"conditions": {"mood_track": torch.zeros(5, 4)}}, r"mood_track \(5, 4\) does not fit"),
        ({"conditions": {"audio": torch.zeros(2, 20)}}, "conditions: audio is not given there"),
        ({"drop": ("mod",)}, "unknown condition 'mod'"),
    ],
)
def test_wrong_features_are_one_line(bundle, options, words):
    with pytest.raises(UserError, match=words) as error:
        opened(bundle, **options)
    assert "\n" not in str(error.value)
