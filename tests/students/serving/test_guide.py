"""A student of two guidance scales, text's and audio's: closed forms of both, changed within a stream, taken back, saved."""

from dataclasses import replace

import pytest
import torch

from distill.methods import Batch, dmd, ode_init
from distill.pipeline.trajectories import load, make
from distill.recipe import TrajectoriesConfig
from students.history import History
from students.serving.session import Chunk, Session
from students.serving.snapshot import load_session, save_session
from teachers import flow
from teachers.errors import UserError
from teachers.guidance import EmbeddedGuidance, EmbeddedScales, Guidance, GuidanceRange, guided
from teachers.networks.wan import NetworkConfig
from tests.students.test_flowact import recorded
from tests.support.tiny import (
    NETWORK,
    Ranks,
    a_bundle,
    a_portrait,
    a_student,
    a_teacher,
    a_train_set,
    randn,
    randomise,
    rng,
    some_conditions,
    some_latents,
    some_sound,
)

SCALES = EmbeddedScales(
    text=GuidanceRange(least=1.0, most=4.0, served=2.0), audio=GuidanceRange(least=0.5, most=3.0, served=1.5)
)
EMBEDDED = {
    "network": NetworkConfig(**NETWORK, audio_blocks=(1,), prediction="reference", guidance=2),
    "guidance": SCALES,
}
ROWS = torch.tensor([[1.25, 3.0], [2.5, 0.5]])
PER_FRAME = 1280


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("first", ["text", "audio"])
def test_rows_of_two_scales_are_each_that_guidance(first, batched):
    teacher, given, x, sigma = a_teacher(), some_conditions(), some_latents(), torch.tensor([0.9, 0.3])
    guidance = replace(SCALES, first=first).of(ROWS, batched)
    assert guidance.passes == 3
    rows = guided(teacher.denoise, x, sigma, given, guidance)
    for i, (text, audio) in enumerate(ROWS.tolist()):
        alone = guided(teacher.denoise, x, sigma, given, Guidance(text=text, audio=audio, first=first))
        assert torch.allclose(rows[i], alone[i], atol=1e-5)


def test_each_scale_is_drawn_in_its_own_range():
    drawn = SCALES.draw(4000, rng(0))
    assert drawn.shape == (4000, 2)
    for column, own in zip(drawn.unbind(1), SCALES.ranges.values(), strict=True):
        assert own.least <= column.min() < own.least + 0.01
        assert own.most - 0.01 < column.max() <= own.most
    assert drawn.T.corrcoef()[0, 1].abs() < 0.05, "one is no function of the other"


def test_pairs_init_and_dmd_take_both_scales(tmp_path):
    teacher, pool, student = a_teacher(1, "reference"), a_train_set(), a_student(**EMBEDDED)
    config = TrajectoriesConfig(num_pairs=4, num_steps=8, shift=3.0, batch_size=4)
    sigmas = flow.sigma_grid(4, 3.0)[:-1]
    facts = make(lambda _: teacher, "abc", pool, config, sigmas, seed=0, folder=tmp_path, engine=Ranks(), scales=SCALES)
    assert facts["nfe"] == 8 * 3
    pairs = load(tmp_path, sigmas, "abc")
    assert pairs.guidance.shape == (4, 2)
    assert torch.equal(pairs.batch(pool, torch.tensor([2]), "cpu").conditions.guidance, pairs.guidance[[2]])

    called, count = recorded(student.net, "read_time"), len(student.spec.sigmas)
    states = randn(2, count + 1, *some_latents(1).shape[1:], seed=5)
    method = ode_init.build(ode_init.Config(), {"student": student}, (*student.spec.sigmas, 0.0))
    batch = Batch(replace(some_conditions(2), guidance=ROWS), states=states)
    method.loss("student", batch, rng(0), rng(3)).value.backward()
    assert called
    assert all(torch.equal(args[1], ROWS) for args in called)

    fake = a_teacher(2, "reference")
    fake.net.add_guidance(2)
    roles = {"student": student, "teacher": teacher.requires_grad_(False), "fake_score": fake}
    method = dmd.build(dmd.Config(exit_step="last"), roles)
    compared, asked = recorded(method, "_scores"), recorded(teacher, "denoise")
    method.loss("student", pool.batch(torch.arange(2)), rng(1), rng(9)).value.backward()
    ((found,),) = compared
    assert torch.equal(found.conditions.guidance, SCALES.draw(2, rng(1)))
    assert len(asked) == 3, "full, nothing and text alone"
    real, _ = method._scores(replace(found, x0=found.x0.detach()))
    noisy = flow.add_noise(found.x0.detach(), found.eps, found.sigma)
    expected = guided(
        teacher.denoise, noisy, found.sigma, found.conditions, EmbeddedGuidance(found.conditions.guidance)
    )
    assert torch.allclose(real, expected, atol=1e-5)


def test_the_network_reads_each_row_s_own_scales():
    net, sigma = a_student(**EMBEDDED).net, torch.tensor([[0.9], [0.9]])
    randomise(net.guidance_embedder, 3)
    both, _ = net.read_time(sigma, ROWS)
    for i in range(2):
        alone, _ = net.read_time(sigma[:1], ROWS[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], alone)
    one, other = (net.read_time(sigma[:1], ROWS[:1] + torch.tensor(by))[0] for by in ([[1.0, 0.0]], [[0.0, 1.0]]))
    assert min((x - both[:1]).abs().mean() for x in (one, other, one - other + both[:1])) > 0.01, (
        "each has its own part"
    )


def a_session(bundle, chunks=6, **options):
    session = Session(bundle, a_portrait(), "a person nods", **options)
    session.push(some_sound(bundle.spec.pixel_frames(chunks - 1)[1] * PER_FRAME + bundle.audio_encoder.lookahead))
    return session


@pytest.fixture(scope="module")
def bundle():
    return a_bundle(History(sinks=1, window=2), **EMBEDDED)


def film(session):
    return torch.cat([chunk.frames for chunk in session.frames()])


def test_scales_change_while_it_talks(bundle):
    """From the chunk that is named on: frames before are those without the change, the chunk itself sees the new scales alone."""
    plain, calls = a_session(bundle), recorded(bundle.student.net, "read_time")
    changed = a_session(bundle)
    changed.guide({"audio": 3.0}, at=2)
    changed.guide({"text": 4.0}, at=2)
    changed.guide({"audio": 1.0}, at=4)
    with_it, without = film(changed), film(plain)
    start = bundle.spec.pixel_frames(2)[0]
    assert torch.equal(with_it[:start], without[:start])
    assert not torch.equal(with_it[start:], without[start:])
    seen = [tuple(args[1][0].tolist()) for args in calls]
    assert list(dict.fromkeys(seen)) == [(2.0, 1.5), (4.0, 3.0), (4.0, 1.0)]
    assert changed.guidance == {"text": 4.0, "audio": 1.0}
    assert plain.guidance == {"text": 2.0, "audio": 1.5}


def test_from_the_first_chunk_on_it_is_what_the_session_was_opened_with(bundle):
    changed = a_session(bundle)
    changed.guide(2.5)
    assert torch.equal(film(changed), film(a_session(bundle, guidance={"text": 2.5, "audio": 2.5})))


def test_an_interrupt_takes_scales_back(bundle):
    one, never = a_session(bundle, lead=8), a_session(bundle, lead=8)
    for session in (one, never):
        session.step()
    one.guide({"audio": 3.0}, at=4)
    film(one)
    assert one.guidance["audio"] == 3.0
    one.interrupt(one.points[1].frame, keep_input=True)
    never.guide({"audio": 3.0}, at=4)
    assert one.guidance["audio"] == 1.5
    assert torch.equal(film(one), film(never))


def test_the_last_word_holds_after_a_stream_was_taken_back(bundle):
    """What was meant for a next chunk that was then taken back does not return; what was put at a chunk is."""
    session = a_session(bundle, chunks=8, lead=8)
    for _ in range(4):
        session.step()
    session.set("a person frowns")
    session.guide({"audio": 3.0})
    session.set("a person nods", at=6)
    session.step()
    session.interrupt(session.points[2].frame, keep_input=True)
    session.set("a person smiles")
    session.guide({"text": 4.0})
    found = []
    while isinstance(session.step(), Chunk):
        found.append((session.point.text, tuple(session.guidance.values())))
    assert found == [("a person smiles", (4.0, 3.0))] * 4 + [("a person nods", (4.0, 3.0))] * 2


def test_what_was_put_at_a_chunk_stays_there_beside_a_change_for_the_next(bundle):
    session = a_session(bundle, chunks=8, lead=8)
    session.guide({"audio": 3.0}, at=3)
    for _ in range(3):
        session.step()
    session.guide({"text": 4.0})
    session.interrupt(session.points[1].frame, keep_input=True)
    session.guide({"text": 3.0})
    found = []
    while isinstance(session.step(), Chunk):
        found.append(tuple(session.guidance.values()))
    assert found == [(3.0, 1.5)] * 2 + [(3.0, 3.0)] * 5


@pytest.mark.parametrize("how", ["exact", "light"])
def test_a_saved_session_keeps_its_scales_and_those_that_wait(bundle, tmp_path, how):
    session = a_session(bundle, guidance={"audio": 1.0})
    session.guide({"text": 3.0}, at=1)
    session.guide({"audio": 2.0}, at=3)
    session.set("a person smiles", at=3)
    session.set("a person nods", at=4)
    session.step(), session.step()
    save_session(session, tmp_path / "saved", how=how)
    again = load_session(bundle, tmp_path / "saved")
    assert again.guidance == {"text": 3.0, "audio": 1.0}
    waiting = [(e.at, e.text, e.guidance) for e in again.events]
    assert waiting == [(3, "", {"audio": 2.0}), (3, "a person smiles", {}), (4, "a person nods", {})]
    calls = recorded(bundle.student.net, "read_time")
    frames = film(again)
    if how == "exact":
        assert torch.equal(frames, film(session))
    assert calls[-1][1].tolist() == [[3.0, 2.0]]


@pytest.mark.parametrize("how", ["exact", "light"])
def test_seen_chunks_of_a_saved_session_keep_the_scales_they_were_drawn_under(bundle, tmp_path, how):
    session = a_session(bundle)
    session.guide({"text": 3.0}, at=1)
    session.step(), session.step()
    save_session(session, tmp_path / "saved", how=how)
    again = load_session(bundle, tmp_path / "saved")
    assert [past.conditions.guidance.tolist() for past in again.point.seen] == [[[2.0, 1.5]], [[3.0, 1.5]]]


def test_a_mistake_changes_nothing(bundle):
    session = a_session(bundle)
    session.step()
    for act, words in (
        (lambda: session.guide({"pose": 1.0}), "guidance: got pose; this student's scales: text, audio"),
        (
            lambda: session.guide({"audio": 3.5}),
            r"guidance of audio: got 3\.5; this student was trained from 0\.5 to 3\.0",
        ),
        (lambda: session.guide({"text": float("nan")}), "guidance of text: got nan"),
        (lambda: session.guide({"text": "2"}), "guidance of text: got 2;"),
        (lambda: session.guide(0.75), r"guidance of text: got 0\.75"),
        (lambda: session.guide(2.0, at=0), "guidance at chunk 0: chunk 0 is already drawn"),
        (lambda: a_session(a_bundle(History(sinks=1, window=2))).guide(1.0), "this student embeds none"),
    ):
        with pytest.raises(UserError, match=words) as error:
            act()
        assert "\n" not in str(error.value)
    assert session.events == ()
    assert session.guidance == {"text": 2.0, "audio": 1.5}
