"""Dubbing: outside the region every pixel and latent is the film's, inside the student draws; a stream like any other."""

from dataclasses import replace

import pytest
import torch

from students import schedule
from students.history import History
from students.serving.dubbing import FilmInput
from students.serving.session import Session, Starved
from students.serving.snapshot import load_session, save_session
from students.serving.together import step_together
from teachers.codecs.linear import CodecConfig, to_float
from teachers.errors import UserError
from tests.students.test_every_student import STUDENTS
from tests.support.tiny import a_bundle, a_portrait, randn, rng, some_sound
from tests.teachers.codecs import test_taehv

PER_FRAME = 1280
MOUTH = torch.tensor([0.25, 0.5, 0.75, 1.0])
EVERYWHERE, NOWHERE = torch.tensor([-2.0, -2.0, 3.0, 3.0]), torch.tensor([2.0, 2.0, 3.0, 3.0])


@pytest.fixture(scope="module", params=list(STUDENTS))
def bundle(request):
    history, schedule, *changes = STUDENTS[request.param]
    return a_bundle(history, schedule=schedule, **(changes[0] if changes else {}))


@pytest.fixture(scope="module")
def plain():
    return a_bundle(History(sinks=1, window=2))


def a_film(frames: int, seed: int = 0, side: int = 16) -> torch.Tensor:
    return (128 + 40 * randn(frames, side, side, 3, seed=seed + 41)).clamp(0, 255).to(torch.uint8)


def opened(bundle, **options):
    return Session(bundle, a_portrait(), "a person nods", seed=3, **{"film": True, **options})


def length(bundle, chunks: int) -> int:
    return bundle.spec.pixel_frames(chunks - 1)[1]


def played(session) -> torch.Tensor:
    return torch.cat([chunk.frames for chunk in session.frames()])


def dubbed(bundle, film, region, chunks: int = 4, **options) -> tuple[torch.Tensor, Session]:
    """Frames of `chunks` chunks, and the session."""
    session = opened(bundle, **options)
    session.push(some_sound(length(bundle, chunks) * PER_FRAME), film=film, region=region)
    session.close()
    return played(session), session


def test_outside_the_region_every_pixel_is_the_films(bundle):
    count = length(bundle, 4)
    film = a_film(count)
    frames, _ = dubbed(bundle, film, MOUTH)
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[8:, 4:12] = True
    assert torch.equal(frames[:, ~inside], film[:, ~inside])
    changed = (frames != film).any(dim=-1)[:, inside].float().mean(dim=1)
    assert (changed > 0.5).all(), "of the region most pixels are drawn, in every frame"


def test_a_region_that_holds_everything_is_a_stream_without_a_film(bundle):
    count = length(bundle, 4)
    frames, _ = dubbed(bundle, a_film(count), EVERYWHERE)
    free = opened(bundle, film=False)
    free.push(some_sound(count * PER_FRAME))
    free.close()
    assert torch.equal(frames, played(free))


def test_the_context_holds_the_films_latents(bundle):
    """Those of the codec's whole encode, at their places, also where chunks are in flight and where the history is refined."""
    count = length(bundle, 4)
    film = a_film(count)
    frames, session = dubbed(bundle, film, NOWHERE)
    assert torch.equal(frames, film)
    session.settle()
    latents = bundle.codec.encode(to_float(film).permute(3, 0, 1, 2)[None])
    n = bundle.spec.chunk_frames
    assert session.point.seen
    for past in session.point.seen:
        assert torch.allclose(past.x0, latents[:, :, past.chunk * n : (past.chunk + 1) * n], atol=1e-4)


def test_noise_is_added_to_the_films_latents(bundle, monkeypatch):
    """Between steps too, also of the chunks in flight."""
    lowered, count = [], length(bundle, 4)
    lower = schedule._lower
    monkeypatch.setattr(schedule, "_lower", lambda spec, x, x0, *rest: lowered.append(x0) or lower(spec, x, x0, *rest))
    film = a_film(count)
    dubbed(bundle, film, NOWHERE)
    latents = bundle.codec.encode(to_float(film).permute(3, 0, 1, 2)[None])
    known = latents.split(bundle.spec.chunk_frames, dim=2)
    assert len(lowered) >= 4 * (len(bundle.spec.sigmas) - 1)
    assert all(any(torch.allclose(x0, chunk, atol=1e-4) for chunk in known) for x0 in lowered)


def test_a_latent_cell_with_a_pixel_of_the_region_is_drawn(plain):
    """4 x 4 pixels a cell, chunk 0's first frame a latent alone, then two frames each."""
    boxes = torch.tensor([[0.3, 0.3, 0.45, 0.45]] + 6 * [[0.8, 0.8, 0.9, 0.9]])  # the cells 1, 1 and 3, 3
    boxes[4] = torch.tensor([0.8, 0.05, 0.95, 0.2])  # and 0, 3: frame 4 is of latent 2
    session = opened(plain)
    session.push(some_sound(7 * PER_FRAME), film=a_film(7), region=boxes)
    first, state = session.inputs.film.kept(0, 3, None, session.device)
    second, _ = session.inputs.film.kept(1, 7, state, session.device)
    drawn = ~torch.cat([first.where, second.where], dim=2)[0, 0]
    assert drawn.nonzero().tolist() == [[0, 1, 1], [1, 3, 3], [2, 0, 3], [2, 3, 3], [3, 3, 3]]


def test_a_region_may_move(plain):
    film, count = a_film(7), 7
    boxes = torch.stack([torch.tensor([0.0, 0.0, 0.5, 0.5]) + 0.5 * (t % 2) for t in range(count)])
    frames, _ = dubbed(plain, film, boxes, chunks=2)
    for t in range(count):
        part = frames[t] != film[t]
        low, high = (part[:8, :8], part[8:, 8:]) if t % 2 == 0 else (part[8:, 8:], part[:8, :8])
        assert low.any()
        assert not high.any()


def test_any_split_gives_the_same_frames(bundle):
    count = length(bundle, 4)
    film, sound = a_film(count), some_sound(count * PER_FRAME)
    whole, _ = dubbed(bundle, film, MOUTH)
    session, frames = opened(bundle), []
    cuts = torch.randint(0, count, (5,), generator=rng(1)).sort().values.tolist()
    for start, stop in zip([0, *cuts], [*cuts, count], strict=True):
        session.push(film=film[start:stop], region=MOUTH)
        frames += session.frames()
        session.push(sound[start * PER_FRAME : stop * PER_FRAME])
        frames += session.frames()
    session.close()
    frames += session.frames()
    assert torch.equal(torch.cat([chunk.frames for chunk in frames]), whole)


def test_a_chunk_waits_for_the_film(bundle):
    session = opened(bundle)
    stop = bundle.spec.pixel_frames(bundle.spec.schedule.ahead)[1]
    session.push(some_sound(40 * PER_FRAME), film=a_film(stop - 1), region=MOUTH)
    assert session.step() == Starved("film", 1)
    session.push(film=a_film(1), region=MOUTH)
    assert len(session.step().frames)


def test_what_was_taken_back_is_drawn_again(bundle):
    count = length(bundle, 6)
    session = opened(bundle, lead=3)
    session.push(some_sound(count * PER_FRAME), film=a_film(count), region=MOUTH)
    first = [chunk.frames for chunk in session.frames()]
    assert len(first) == 3
    session.interrupt(played=bundle.spec.pixel_frames(0)[1], keep_input=True)
    again = [chunk.frames for chunk in session.frames()]
    assert all(torch.equal(*pair) for pair in zip(first[1:], again[:2], strict=True))


def test_after_an_interrupt_another_film_goes_on(plain):
    """As if the first one had ended there."""
    count, place = length(plain, 5), length(plain, 2)
    film, other, sound = a_film(count), a_film(count, seed=9), some_sound((count + 1) * PER_FRAME)
    rest = []
    for shown in (place, count):
        session = opened(plain, lead=4)
        session.push(sound[: (shown + 1) * PER_FRAME], film=film[:shown], region=MOUTH)
        assert played(session).shape[0] >= place
        session.interrupt(played=place)
        session.push(sound[place * PER_FRAME :], film=other[place:], region=MOUTH)
        rest.append(played(session))
    assert torch.equal(*rest)
    assert torch.equal(rest[0][:, :8], other[place : place + len(rest[0]), :8])


@pytest.mark.parametrize("how", ["exact", "light"])
def test_a_saved_stream_goes_on(plain, tmp_path, how):
    film, sound = a_film(length(plain, 6)), some_sound(length(plain, 6) * PER_FRAME)
    session = opened(plain)
    session.push(sound[: 9 * PER_FRAME], film=film[:12], region=MOUTH)
    before = played(session)
    save_session(session, tmp_path / "s.safetensors", how)
    rest = []
    for one in (session, load_session(plain, tmp_path / "s.safetensors")):
        one.push(sound[9 * PER_FRAME :], film=film[12:], region=MOUTH)
        one.close()
        rest.append(played(one))
    assert len(before) + len(rest[0]) == length(plain, 6)
    if how == "exact":
        assert torch.equal(*rest)
    assert torch.equal(rest[1][:, :8], film[len(before) :, :8])


def test_streams_together_are_those_alone(plain):
    """Two dubbed ones and one that is not, in one call."""
    count = length(plain, 4)

    def some():
        made = [opened(plain, film=i < 2) for i in range(3)]
        for i, one in enumerate(made):
            given = {"film": a_film(count, seed=i), "region": MOUTH} if i < 2 else {}
            one.push(some_sound(count * PER_FRAME, seed=i), **given)
            one.close()
        return made

    alone = [played(one) for one in some()]
    together, sessions = [[], [], []], some()
    for _ in range(4):
        for frames, chunk in zip(together, step_together(sessions), strict=True):
            frames.append(chunk.frames)
    for a, b in zip(alone, together, strict=True):
        assert (a.float() - torch.cat(b).float()).abs().max() <= 1


def test_behind_its_end_the_last_frame_is_held(plain):
    film = a_film(5)
    frames, _ = dubbed(plain, film, NOWHERE, chunks=4)
    assert torch.equal(frames, torch.cat([film, film[-1:].expand(len(frames) - 5, -1, -1, -1)]))
    live = opened(plain, idle="live", lead=4)
    live.push(some_sound(4 * PER_FRAME), film=film[:3], region=NOWHERE)
    assert [live.step().idle for _ in range(2)] == ["", "live"]


def test_memory_is_bounded(plain):
    session = opened(plain)
    for i in range(30):
        session.push(some_sound(4 * PER_FRAME, seed=i), film=a_film(4, seed=i), region=MOUTH)
        played_frames = list(session.frames())
        assert len(played_frames) <= 1 + (i > 0)
        held = session.inputs.film.frames
        assert sum(len(block) for block in held.blocks) <= 12


def test_a_codec_that_looks_ahead_gets_its_frames():
    """TAEHV reads three frames ahead."""
    codec = test_taehv.a_codec()
    geometry = CodecConfig(stride=4, patch=8, channels=codec.config.channels)
    bundle = replace(a_bundle(History(sinks=1, window=2), codec=geometry, height=32, width=32), codec=codec)
    count = length(bundle, 3)
    film = a_film(count + 3, side=32)
    session = Session(bundle, torch.zeros(3, 32, 32), "a person nods", film=True)
    session.push(some_sound((count + 1) * PER_FRAME), film=film[:count], region=NOWHERE)
    assert len(list(session.frames())) == 2
    assert session.step() == Starved("film", 3)
    session.push(film=film[count:], region=NOWHERE)
    assert session.step()
    latents = bundle.codec.encode(to_float(film[:count]).permute(3, 0, 1, 2)[None])
    own = session.point.seen[-1]
    assert own.chunk == 2
    assert torch.allclose(own.x0[:, :, 0], latents[:, :, 4], atol=1e-4)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"film": a_film(3).float(), "region": MOUTH}, r"film: got torch.float32 .*uint8 \[T, 16, 16, 3\]"),
        ({"film": a_film(3, side=8), "region": MOUTH}, r"film: got torch.uint8 \(3, 8, 8, 3\)"),
        ({"film": a_film(3)}, "region is missing"),
        ({"film": a_film(3), "region": torch.zeros(2, 4)}, "region: got .*box of 4"),
        ({"film": a_film(3), "region": torch.tensor([0.5, 0.0, 0.4, 1.0])}, "left, top, right, bottom"),
        ({"film": a_film(3), "region": torch.tensor([float("nan"), 0.0, 0.4, 1.0])}, "region: got .*finite"),
        ({"region": MOUTH}, "push film too"),
    ],
)
def test_what_is_no_film_is_refused(plain, given, message):
    session = opened(plain)
    with pytest.raises(UserError, match=message):
        session.push(some_sound(PER_FRAME), **given)
    assert session.inputs.audio.end == session.inputs.film.frames.end == 0


def test_a_film_for_nobody_and_a_codec_that_cannot(plain):
    with pytest.raises(UserError, match=r"open it with Session\(\.\., film=True\)"):
        opened(plain, film=False).push(film=a_film(1), region=MOUTH)

    class Old:
        pass

    with pytest.raises(UserError, match="Old has no encode_chunk"):
        FilmInput(plain.spec, Old())
    session = opened(plain)
    with pytest.raises(UserError, match="at most 60 are kept"):
        session.push(film=a_film(1).expand(800, -1, -1, -1), region=MOUTH)
