"""FlowAct-R1's training: the fake-causal mask in one pass, generated memory, an embedded guidance scale, refined memory."""

from dataclasses import replace

import pytest
import torch

from benchmarks.plain_loop import can_run
from distill.methods import Batch, dmd, forcing, losses, ode_init
from distill.methods.rollout import context, draw_noise, rollout
from distill.pipeline.generate import solve_states
from distill.pipeline.trajectories import load, make
from distill.recipe import TrajectoriesConfig
from students.history import History
from students.schedule import Schedule
from students.serving.pipeline import AvatarPipeline
from students.serving.session import Session
from students.serving.snapshot import load_session, save_session
from students.weights.checkpoint import load_student, make_student, save_student
from teachers import flow
from teachers.errors import UserError
from teachers.guidance import EmbeddedGuidance, EmbeddedScales, Guidance, GuidanceRange, guided
from teachers.networks.kind import AvatarTeacher
from teachers.networks.wan import NetworkConfig
from tests.support.tiny import (
    NETWORK,
    Ranks,
    a_bundle,
    a_portrait,
    a_student,
    a_teacher,
    a_train_set,
    make_net,
    make_spec,
    randn,
    randomise,
    rng,
    some_conditions,
    some_latents,
    some_sound,
)

N = 2
BOTH = GuidanceRange(least=1.0, most=3.0, served=1.5)
SCALES = EmbeddedScales(both=BOTH)
EMBEDDED = {
    "network": NetworkConfig(**NETWORK, audio_blocks=(1,), prediction="reference", guidance=1),
    "guidance": SCALES,
}
HISTORIES = [
    History(sinks=1, window=1),
    History(sinks=0, window=2, level=0.1),
    History(sinks=1, window=1, memory=2, memory_every=2),
]


def diagonal(history=HISTORIES[0], depth=3, **changes):
    return a_student(history, schedule=Schedule(depth=depth), **changes).eval()


def double(given):
    return given.to(torch.float64)


def a_batch(num=3, chunks=4):
    return Batch(some_conditions(num, chunks * N), x0=some_latents(num, chunks * N))


def recorded(student, name):
    """Every call of the student's method `name`: its arguments."""
    calls, keep = [], getattr(student, name)

    def spy(*args):
        calls.append(args)
        return keep(*args)

    setattr(student, name, spy)
    return calls


# ---- the mask


@pytest.mark.parametrize("embedded", [False, True], ids=["plain", "embedded"])
@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_one_masked_pass_equals_the_stream(history, embedded):
    """fp64, every forward of a stream of five chunks at the served sigmas, the context made by the stream's own commits."""
    student, chunks = diagonal(history, **(EMBEDDED if embedded else {})).double(), 5
    given, clean = double(some_conditions(2, chunks * N)), some_latents(2, chunks * N).double()
    given = replace(given, guidance=torch.tensor([[1.0], [2.5]]).double()) if embedded else given
    with torch.no_grad():
        for front, done in student.spec.schedule.walk(chunks, len(student.spec.sigmas)):
            start, stop = front * N, (front + len(done)) * N
            levels = [student.spec.sigmas[i] for i in done]
            x = randn(2, *clean.shape[1:2], stop - start, *clean.shape[3:], seed=front).double()
            state = context(student, clean, given, front)
            streamed, _ = student.denoise_diagonal(state, None, x, levels, given.frames(start, stop))
            sigma = torch.tensor(levels, dtype=torch.float64).expand(2, -1)
            masked = student.denoise_diagonal_train(x, sigma, given.frames(0, stop), clean[:, :, :start])
            assert masked.std() > 0.1
            assert (masked - streamed).abs().max() < 1e-9, (front, done)


def test_a_flight_that_does_not_fit_its_conditions_is_refused():
    student, given = diagonal(), some_conditions(2, 8)
    with pytest.raises(ValueError, match="the conditions have 8"):
        student.denoise_diagonal_train(some_latents(2, 4), torch.ones(2, 2), given, some_latents(2, 2))


# ---- forcing


def test_without_generated_memory_nothing_is_drawn_for_it():
    """The loss as it was before there was any, spelt out to the bit."""
    student, batch = a_student(), a_batch()
    student.spec = replace(student.spec, history=History(sinks=1, window=2))
    found = forcing.Forcing(forcing.Config(), student).loss("student", batch, rng(4), rng(5)).value
    draws = rng(4)
    sigma = flow.shift_sigma(forcing.strata((3, 4), draws), 3.0)
    text, audio = (torch.rand(3, generator=draws) < 0.1 for _ in range(2))
    given = batch.conditions.drop_rows(text=text, audio=audio)
    levels = sigma.repeat_interleave(N, dim=1)
    x = flow.add_noise(batch.x0, torch.randn(batch.x0.shape, generator=draws), levels)
    x0 = student.denoise_clip(x, sigma, given, batch.x0)
    assert torch.equal(found, losses.denoising(x0, batch.x0, levels, 1.0, 0.15, 1))


@pytest.mark.parametrize("name", ["clean", "stream"])
def test_generated_memory_is_the_student_s_own_rollout_noised(name):
    student, batch = diagonal(), a_batch(6)
    calls = recorded(student, "denoise_clip" if name == "clean" else "denoise_diagonal_train")
    method = forcing.build(forcing.Config(context=name, generated=0.5, renoise=0.2), {"student": student})
    mixed = 0
    for seed in range(8):
        calls.clear()
        loss = method.loss("student", batch, rng(seed), rng(seed + 50))
        given = calls[-1][3]
        if not given.shape[2]:
            continue  # the first chunk has no memory
        shared = rng(seed + 50)
        if name == "stream":
            torch.randint(len(list(student.spec.schedule.walk(4, 3))), (1,), generator=shared)
        picked = torch.rand(6, generator=shared) < 0.5
        data = batch.x0[:, :, : given.shape[2]]
        same = (given == data).flatten(1).all(dim=1)
        assert torch.equal(~same, picked), "the rows that the shared generator picks, and no other"
        mixed += int(picked.any() and not picked.all())
        assert torch.isfinite(loss.value)
        loss.value.backward()
    assert mixed > 2

    draws, shared = rng(9), rng(10)
    own = method._memory(batch.x0, batch.conditions, draws, shared)
    rows = torch.nonzero(torch.rand(6, generator=rng(10)) < 0.5).flatten()
    draws = rng(9)
    with torch.no_grad():
        made = rollout(student, batch.conditions.index(rows), draw_noise(student, len(rows), draws))
    expected = flow.add_noise(made, torch.randn(made.shape, generator=draws), 0.2)
    assert torch.equal(own[rows], expected)
    assert not own.requires_grad


def test_a_stream_is_trained_between_the_steps_of_its_sampler():
    student, batch, seen = diagonal(), a_batch(4), set()
    calls = recorded(student, "denoise_diagonal_train")
    method = forcing.build(forcing.Config(context="stream"), {"student": student})
    steps = (*student.spec.sigmas, 0.0)
    for seed in range(60):
        method.loss("student", batch, rng(seed), rng(seed + 100))
        _, sigma, received, clean, level = calls[-1]
        done = tuple(max(i for i in range(3) if steps[i] >= float(s)) for s in sigma[0])
        for row in sigma:
            assert all(steps[i + 1] < float(s) <= steps[i] + 1e-6 for i, s in zip(done, row, strict=True))
        assert torch.equal(clean, batch.x0[:, :, : clean.shape[2]])
        assert level is None
        front = clean.shape[2] // N
        assert received.num_frames == (front + len(done)) * N
        seen.add((front, done))
    assert seen == set(student.spec.schedule.walk(4, 3))


def test_the_loss_of_a_stream_is_that_of_its_flight():
    """Zero for a student that answers with the data; the reference frame carries none."""
    student, batch = diagonal(), a_batch(4)

    def answer(x, sigma, conditions, clean, level):
        truth = batch.x0[:, :, clean.shape[2] : conditions.num_frames].clone()
        if not clean.shape[2]:
            truth[:, :, 0] += 7.0
        return truth

    student.denoise_diagonal_train = answer
    method = forcing.build(forcing.Config(context="stream"), {"student": student})
    assert all(method.loss("student", batch, rng(seed), rng(seed)).value == 0 for seed in range(30))


# ---- guidance


def test_an_embedding_that_starts_at_zero_changes_nothing():
    plain = make_net(prediction="reference")
    embedded = make_net(prediction="reference")
    before = {name: value.clone() for name, value in embedded.state_dict().items()}
    assert not any("guidance" in name for name in before)
    embedded.add_guidance(1)
    assert set(embedded.state_dict()) - set(before) == {"guidance_embedder.weight", "guidance_embedder.bias"}
    given, x, sigma = some_conditions(), some_latents(), torch.tensor([0.9, 0.3])
    own = AvatarTeacher(plain).denoise(x, sigma, given)
    scaled = replace(given, guidance=torch.tensor([[1.0], [3.0]]))
    assert torch.equal(own, AvatarTeacher(embedded).denoise(x, sigma, scaled))
    with pytest.raises(ValueError, match="embeds guidance scales"):
        AvatarTeacher(embedded).denoise(x, sigma, given)
    randomise(embedded.guidance_embedder, 3)
    assert (own - AvatarTeacher(embedded).denoise(x, sigma, scaled)).abs().mean() > 1e-3
    assert torch.equal(own, AvatarTeacher(plain).denoise(x, sigma, scaled)), (
        "a network that knows none does not read it"
    )


def test_a_new_network_that_is_told_starts_as_one_that_is_not():
    given, x, sigma = some_conditions(), some_latents(), torch.tensor([0.9, 0.3])
    teacher = AvatarTeacher(make_student(make_spec(**EMBEDDED)).net)
    randomise(teacher.net.blocks)
    randomise(teacher.net.proj_out)
    one, other = (teacher.denoise(x, sigma, replace(given, guidance=torch.full((2, 1), s))) for s in (1.0, 3.0))
    assert torch.equal(one, other)
    assert (one - given.reference).abs().mean() > 0.01


def test_a_scale_for_each_row_is_that_row_s_guidance():
    teacher, given, x, sigma = a_teacher(), some_conditions(), some_latents(), torch.tensor([0.9, 0.3])
    rows = guided(teacher.denoise, x, sigma, given, EmbeddedGuidance(torch.tensor([[1.25], [3.0]])))
    for i, scale in enumerate((1.25, 3.0)):
        alone = guided(teacher.denoise, x, sigma, given, Guidance(text=scale, audio=scale))
        assert torch.allclose(rows[i], alone[i], atol=1e-6)


def test_trajectories_keep_the_scale_they_were_solved_with(tmp_path):
    sigmas, teacher, pool = flow.sigma_grid(4, 3.0)[:-1], a_teacher(), a_train_set()
    config = TrajectoriesConfig(num_pairs=10, num_steps=8, shift=3.0, batch_size=4)
    make(lambda _: teacher, "abc", pool, config, sigmas, seed=0, folder=tmp_path, engine=Ranks(), scales=SCALES)
    pairs = load(tmp_path, sigmas, "abc")
    assert pairs.guidance.shape == (10, 1)
    assert pairs.guidance.min() >= BOTH.least
    assert pairs.guidance.max() <= BOTH.most
    assert pairs.guidance.std() > 0.3
    batch = pairs.batch(pool, torch.tensor([7, 2]), "cpu")
    assert torch.equal(batch.conditions.guidance, pairs.guidance[[7, 2]])
    grid, scale = flow.sigma_grid(8, 3.0), float(batch.conditions.guidance[0])
    noise = batch.states[:, 0]  # fp16 on the disk
    again = solve_states(teacher, batch.conditions, noise, grid, (8,), Guidance(text=scale, audio=scale))[0, 0]
    assert (again - batch.states[0, -1]).abs().max() < 0.05
    other = solve_states(teacher, batch.conditions, noise, grid, (8,), Guidance())[0, 0]
    assert (other - batch.states[0, -1]).abs().mean() > 5 * (again - batch.states[0, -1]).abs().mean()


def test_init_learns_the_scale_that_its_pairs_had():
    student = diagonal(**EMBEDDED)
    calls = recorded(student.net, "read_time")
    scales = torch.tensor([[1.0], [2.0], [3.0]])
    batch = Batch(replace(some_conditions(3), guidance=scales), states=randn(3, 4, *some_latents(1).shape[1:], seed=5))
    method = ode_init.build(ode_init.Config(), {"student": student}, (*student.spec.sigmas, 0.0))
    method.loss("student", batch, rng(0), rng(3)).value.backward()
    assert calls
    assert all(torch.equal(args[1], scales) for args in calls), "context and flight alike"
    assert student.net.guidance_embedder.weight.grad.abs().sum() > 0


def test_dmd_tells_student_and_fake_score_what_the_teacher_is_guided_with():
    student, fake, teacher = (
        diagonal(**EMBEDDED),
        a_teacher(2, "reference"),
        a_teacher(1, "reference").requires_grad_(False),
    )
    fake.net.add_guidance(1)
    method = dmd.build(dmd.Config(exit_step="last"), {"student": student, "teacher": teacher, "fake_score": fake})
    batch, drawn = a_train_set().batch(torch.arange(2)), set()
    for seed in range(3):
        calls = [recorded(net, "read_time") for net in (student.net, fake.net)]
        compared, guides = recorded(method, "_scores"), recorded(teacher, "denoise")
        method.loss("student", batch, rng(seed), rng(9)).value.backward()
        ((found,),), scale = compared, SCALES.draw(2, rng(seed))
        x0, sigma, given = found.x0.detach(), found.sigma, found.conditions
        assert all(torch.equal(args[1], scale) for some in calls for args in some)
        assert torch.equal(given.guidance, scale)
        assert len(guides) == 2, "full and without"
        real, _ = method._scores(replace(found, x0=x0))
        noisy = flow.add_noise(x0, found.eps, sigma)
        for i in range(2):
            alone = Guidance(text=float(scale[i]), audio=float(scale[i]))
            assert torch.allclose(real[i], guided(teacher.denoise, noisy, sigma, given, alone)[i], atol=1e-5)
        drawn.add(round(float(scale[0]), 3))
    assert len(drawn) == 3
    assert student.net.guidance_embedder.weight.grad.abs().sum() > 0


def talk(bundle, chunks=5, **options):
    session = Session(bundle, a_portrait(), "a person nods", **options)
    stop = bundle.spec.pixel_frames(chunks - 1 + bundle.spec.schedule.ahead)[1]
    session.push(some_sound(stop * 1280 + bundle.audio_encoder.lookahead))
    return torch.cat([chunk.frames for chunk in session.frames()])


def test_a_session_serves_any_trained_scale_at_one_forward_a_chunk():
    bundle, counts = a_bundle(HISTORIES[0], schedule=Schedule(depth=3), **EMBEDDED), []
    bundle.student.net.register_forward_pre_hook(lambda *_: counts.append(1))
    films = {scale: talk(bundle, guidance=scale) for scale in (None, 1.0, 1.5, 3.0)}
    assert len(counts) == 4 * (5 + 2)
    assert torch.equal(films[None], films[1.5]), "the spec's"
    assert not torch.equal(films[1.0], films[3.0])
    with pytest.raises(UserError, match=r"guidance: got 3\.1; this student was trained from 1\.0 to 3\.0") as error:
        talk(bundle, guidance=3.1)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="this student embeds none"):
        talk(a_bundle(HISTORIES[0]), guidance=1.0)


def test_the_pipeline_takes_diffusers_guidance_scale():
    bundle, sound = a_bundle(HISTORIES[0], schedule=Schedule(depth=3), **EMBEDDED), some_sound(11 * 1280)
    pipe = AvatarPipeline(bundle.student, bundle.codec, bundle.audio_encoder, bundle.text)
    pipe.set_progress_bar_config(disable=True)
    session = Session(bundle, a_portrait(), "a person nods", guidance=3.0)
    session.push(sound)
    session.close()
    film = torch.cat([chunk.frames for chunk in session.frames()])[:11]
    assert torch.equal(pipe(a_portrait(), sound, "a person nods", output_type="pt", guidance_scale=3.0).frames, film)
    assert not torch.equal(pipe(a_portrait(), sound, "a person nods", output_type="pt").frames, film)


def test_a_saved_session_keeps_its_scale(tmp_path):
    bundle = a_bundle(HISTORIES[0], schedule=Schedule(depth=3), **EMBEDDED)
    session = Session(bundle, a_portrait(), "a person nods", guidance=2.5)
    session.push(some_sound(40 * 1280))
    session.step()
    save_session(session, tmp_path / "saved")
    rest = torch.cat([chunk.frames for chunk in session.frames()])
    again = load_session(bundle, tmp_path / "saved")
    assert again.guidance == {"both": 2.5}
    assert torch.equal(torch.cat([chunk.frames for chunk in again.frames()]), rest)


def test_the_checkpoint_remembers_the_range(tmp_path):
    bundle = a_bundle(HISTORIES[0], schedule=Schedule(depth=3), **EMBEDDED)
    save_student(tmp_path, bundle, "")
    again = load_student(tmp_path)
    assert again.spec.guidance == SCALES
    gap = (talk(again, guidance=2.0).int() - talk(bundle, guidance=2.0).int()).abs()
    assert gap.max() <= 1  # small matrix products round by where a tensor lies in memory, on some CPUs
    assert gap.float().mean() < 0.01
    spec = (tmp_path / "spec.json").read_text()
    (tmp_path / "spec.json").write_text(spec.replace('"most": 3.0', '"most": 9.0'))
    with pytest.raises(UserError, match="not trained for this sampler: guidance"):
        load_student(tmp_path)


def test_the_plain_loop_of_bench_knows_neither_scales_nor_refinement():
    assert can_run(make_spec())
    assert not can_run(make_spec(**EMBEDDED))
    assert not can_run(make_spec(History(sinks=1, window=2, refine_every=2)))
