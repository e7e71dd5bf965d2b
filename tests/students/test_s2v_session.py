"""LiveAvatar's kind of student in a session: the portrait leads the stream, four Euler steps, anchors, flat memory."""

from dataclasses import replace

import psutil
import pytest
import torch
from jaxtyping import config

from students.history import History
from students.serving.session import Session, chunk_noise
from students.serving.snapshot import load_session, save_session
from students.weights.checkpoint import Bundle
from teachers.codecs.linear import EigenCodec
from teachers.encoders.anchors import AnchorsConfig
from teachers.encoders.small import AudioConfig
from teachers.errors import UserError
from tests.students.networks.test_causal_s2v import LIVE, N, a_spec
from tests.support.networks.s2v import AFTER, HEIGHT, SMALL, STATES, WIDTH, an_s2v_net
from tests.support.tiny import make_spec, randn, some_sound, text_encoder
from tests.teachers.reference.s2v import S2VReference

SIZE, FRAME = (HEIGHT * 4, WIDTH * 4), 1000
SIGMAS = (1.0, 0.857692, 0.602151, 0.008929)
CHUNK = 4 * N


@pytest.fixture(scope="module")
def live() -> Bundle:
    spec = replace(
        a_spec(ahead=25, **LIVE), audio=AudioConfig(num_mels=3, hop=200, window=200), text=make_spec().text,
        image=AnchorsConfig(reference=5, motion=9),
    )  # fmt: skip
    codec = EigenCodec(spec.codec, *SIZE).fit(0.3 * randn(32, 3, 9, *SIZE, seed=5))
    parts = (codec, spec.audio.load(FRAME), text_encoder())
    student = SMALL.student(an_s2v_net().requires_grad_(False), spec)
    return Bundle(student.eval(), *parts, image_encoder=spec.image.load())


def portrait() -> torch.Tensor:
    return (0.3 * randn(3, *SIZE, seed=17)).clamp(-1, 1)


def opened(bundle: Bundle, chunks: int, **given) -> Session:
    session = Session(bundle, portrait(), "a person nods", seed=1, **given)
    session.push(audio=some_sound((1 + CHUNK * chunks) * FRAME))
    session.close()
    return session


def test_its_steps_are_the_published_ones(live):
    assert live.spec.sigmas == pytest.approx(SIGMAS, abs=1e-6)
    assert live.spec.nfe_per_chunk == 4


@torch.no_grad()
def test_the_stream_is_plain_euler_over_all_chunks_at_one_level(live):
    """By the independent forward: at each of the four levels every chunk sees the three before it at the same one."""
    spec, net, chunks = live.spec, live.student.net, 3
    session = opened(live, chunks)
    assert sum(1 for _ in session.frames()) == chunks
    session.settle()
    anchors = session.inputs.given.anchors
    rows = (
        torch.cat([past.conditions.audio for past in session.point.seen], dim=1)
        .flatten(1, 2)
        .unflatten(2, (STATES, -1))
    )
    x = torch.cat([chunk_noise(spec, 1, k, 0) for k in range(chunks)], dim=2)
    reference = S2VReference(net.state_dict(), 2, AFTER, joint=False)
    groups = [(range(i * N, (i + 1) * N), range(max(0, i - 3) * N, i * N), max(0, i * N - 5)) for i in range(chunks)]
    clips = [range(i * N, (i + 1) * N) for i in range(chunks)]
    for sigma, following in zip(SIGMAS, (*SIGMAS[1:], 0.0), strict=True):
        level = torch.full((1, chunks * N), sigma)
        text = session.point.features
        x = x + (following - sigma) * reference.run(x, level, text, rows, anchors, None, groups, clips)
    found = torch.cat([past.x0 for past in session.point.seen], dim=2)
    assert (found - x).abs().max() <= 1e-4 * float(x.abs().max())


def test_the_portrait_leads_the_stream(live):
    """Frame 0 is the codec's first frame, of the portrait; then four pixel frames a latent, as decoded in one."""
    session = opened(live, 2)
    first, second = session.step(), session.step()
    assert (len(first.frames), len(second.frames), second.first_frame) == (1 + CHUNK, CHUNK, 1 + CHUNK)
    assert [len(chunk.audio) for chunk in (first, second)] == [(1 + CHUNK) * FRAME, CHUNK * FRAME]
    lead = live.codec.encode(portrait()[None, :, None])
    latents = torch.cat([lead, *(past.x0 for past in session.point.seen)], dim=2)
    whole = live.codec.decode(latents)[0].add(1).mul(127.5).clamp(0, 255).permute(1, 2, 3, 0)
    assert (torch.cat([first.frames, second.frames]).float() - whole).abs().max() <= 0.51


def test_pushes_of_any_size_and_an_interrupt_give_the_same_frames(live):
    once = torch.cat([chunk.frames for chunk in opened(live, 3).frames()])
    session, sound = Session(live, portrait(), "a person nods", seed=1, lead=3), some_sound((1 + CHUNK * 3) * FRAME)
    for part in sound.split(7001):
        session.push(audio=part)
    session.close()
    chunks = [session.step(), session.step()]
    assert session.interrupt(0, keep_input=True) == 0
    chunks = [session.step(), session.step(), session.step()]
    assert torch.equal(torch.cat([chunk.frames for chunk in chunks]), once)


def test_a_saved_stream_goes_on_bit_for_bit(live, tmp_path):
    session = opened(live, 4)
    session.step()
    save_session(session, tmp_path / "s.safetensors")
    again = load_session(live, tmp_path / "s.safetensors")
    for one, two in zip(session.frames(), again.frames(), strict=True):
        assert torch.equal(one.frames, two.frames)
    fresh = opened(live, 2)
    save_session(fresh, tmp_path / "0.safetensors")
    assert torch.equal(load_session(live, tmp_path / "0.safetensors").step().frames, fresh.step().frames)


def test_after_the_first_clip_the_anchors_are_what_was_drawn(live, tmp_path):
    """The reference is the first latent, the motion the newest 19 of still film and drawn ones; a saved stream has them too."""
    spec = replace(live.spec, horizon_frames=2 * N, history=replace(live.spec.history, anchors_roll=2 * N))
    rolling = replace(live, student=SMALL.student(live.student.net, spec))
    session, still = opened(rolling, 4), opened(live, 4)
    drawn = []
    for number in range(4):
        if number in (1, 2):
            save_session(session, tmp_path / "s.safetensors")
            session = load_session(rolling, tmp_path / "s.safetensors")
        one, other = session.step(), still.step()
        assert torch.equal(one.frames, other.frames) == (number < 2)
        drawn.append(session.point.seen[-1].x0)
    given, found = session.inputs.given.anchors, session.point.state.read.anchors[0]
    expected = torch.cat([drawn[0][:, :, :1], given[:, :, 1 + 2 * N :], drawn[0], drawn[1]], dim=2)
    assert torch.equal(found, expected)
    again = session.bundle.student.set_text(session.point.state, session.point.features)
    assert session.bundle.student.plan(again, session.point.seen[-1].conditions).anchors[0] is found


@pytest.mark.slow
@pytest.mark.long
def test_ten_minutes_of_a_rolling_stream_in_constant_memory(live, monkeypatch):
    """9,600 frames at 16 fps, sound pushed as they are shown; RSS grows < 0.5 MB per 500 chunks after a minute."""
    spec = replace(live.spec, horizon_frames=2 * N, history=replace(live.spec.history, anchors_roll=2 * N))
    session = Session(replace(live, student=SMALL.student(live.student.net, spec)), portrait(), "a person nods", lead=2)
    monkeypatch.setattr(config, "jaxtyping_disable", True)
    sound, process, resident = some_sound(CHUNK * FRAME), psutil.Process(), []
    session.push(audio=torch.cat([some_sound((1 + CHUNK) * FRAME), some_sound(live.audio_encoder.lookahead)]))
    for i in range(800):
        chunk = session.step()
        session.played(chunk.first_frame + len(chunk.frames))
        session.push(audio=sound)
        if i % 80 == 79:
            resident.append(process.memory_info().rss)
    assert (chunk.index, chunk.first_frame + len(chunk.frames)) == (799, 1 + 800 * CHUNK)
    assert chunk.frames.float().std() > 1, "still a picture"
    assert resident[-1] - resident[0] < 720 / 500 * 2**19, [size >> 10 for size in resident]


def test_what_a_rolling_reference_cannot_do_is_refused(live, tmp_path):
    with pytest.raises(UserError, match=r"anchors_roll: got 12 with commit=clean; .* same_level"):
        History(anchors_roll=12)
    with pytest.raises(UserError, match=r"anchors_roll: got 6; give whole chunks of 3, at least the 12 latent frames"):
        replace(live.spec, history=replace(live.spec.history, anchors_roll=6))
    with pytest.raises(UserError, match=r"anchors_ahead: got 0"):
        History(anchors_ahead=0)
    with pytest.raises(UserError, match=r"how=light: this student's history has no clean pass"):
        save_session(opened(live, 1), tmp_path / "s.safetensors", how="light")


def test_the_context_and_the_tables_stop_growing(live):
    session, sizes = Session(live, portrait(), "a person nods", lead=2), []
    session.push(audio=some_sound((1 + CHUNK) * FRAME + live.audio_encoder.lookahead))
    for _ in range(12):
        chunk = session.step()
        session.played(chunk.first_frame + len(chunk.frames))
        session.push(audio=some_sound(CHUNK * FRAME))
        session.settle()
        state = session.point.state
        sizes.append(
            (
                len(state.cached),
                len(live.student.net._rope_cache),
                session.inputs.audio.end - session.inputs.audio.start,
            )
        )
    assert len(set(sizes[5:])) == 1
    assert sizes[-1][0] == 3
