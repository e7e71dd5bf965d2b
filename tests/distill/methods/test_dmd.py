"""The options of DMD: rollouts, exits, context, scores, SiD and the GAN term; the default is the plain algorithm, bit for bit."""

import inspect
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from distill.methods import Batch, dmd, losses
from distill.methods import rollout as rollouts
from distill.methods.critics.discriminator import build_discriminator
from distill.methods.dmd import DMD, Config, Rollouts
from distill.methods.rollout import draw_noise, of_length, rollout
from students.history import History
from students.schedule import Schedule, advance
from students.spec import StudentConfig
from teachers import flow
from teachers.conditions import Conditions
from teachers.errors import UserError
from teachers.guidance import Guidance
from tests.support.tiny import (
    CHANNELS,
    a_student,
    a_teacher,
    a_train_set,
    make_spec,
    randn,
    rng,
    some_conditions,
    some_latents,
)

STEPS, CHUNKS = 3, 4


def make_dmd(student=None, **config) -> DMD:
    nets = {
        "student": student or a_student(),
        "teacher": a_teacher(1).requires_grad_(False),
        "fake_score": a_teacher(2),
    }
    if config.get("gan"):
        nets["discriminator"] = build_discriminator(make_spec().network)
    return dmd.build(Config(**config), nets)


def a_batch(num: int = 2) -> Batch:
    return a_train_set().batch(torch.arange(num))


def gradients(net: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in net.parameters()]


@pytest.mark.parametrize("role", ["student", "fake_score"])
def test_the_default_is_the_plain_algorithm_bit_for_bit(role):
    """Self Forcing spelt out: one exit for all chunks, clean commits, one sigma a clip, eqs. 7-8 or the denoising loss."""
    config, batch, values = {"guidance": Guidance(text=2.0, audio=3.0), "shift": 3.0}, a_batch(), []
    for plainly in (False, True):
        method, own, shared = make_dmd(**config), rng(1), rng(2)
        if plainly:
            value = plain_loss(method, role, batch.conditions, own, shared)
        else:
            value = method.loss(role, batch, own, shared).value
        value.backward()
        values.append([value.detach(), *gradients(getattr(method, role))])
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))


@pytest.mark.parametrize(("role", "options"), [("discriminator", {}), ("fake_score", {"gan_critic": 0.1})])
def test_the_discriminator_learns_from_films_alone(role, options):
    """Whatever x0 a condition without a film has; that of a film counts."""
    given, method = replace(a_batch(), filmed=torch.tensor([True, False])), make_dmd(gan=0.1, **options)

    def value(changed: int | None) -> Tensor:
        x0 = given.x0.clone()
        if changed is not None:
            x0[changed] += 5.0
        return method.loss(role, replace(given, x0=x0), rng(1), rng(2)).value

    assert torch.equal(value(changed=1), value(changed=None))
    assert not torch.equal(value(changed=0), value(changed=None))


def test_a_batch_that_is_moved_keeps_which_rows_are_films():
    moved = replace(a_batch(), filmed=torch.tensor([True, False])).map(Tensor.clone)
    assert moved.filmed is not None
    assert moved.filmed.tolist() == [True, False]


def plain_loss(method, role, given, own, shared):
    student, n = method.student, 2
    exit_step = int(torch.randint(STEPS, (1,), generator=shared))
    table = torch.randn(CHUNKS, STEPS, 2, CHANNELS, n, 4, 4, generator=own)
    state, chunks = student.open(given.text), []
    with torch.set_grad_enabled(role == "student"):
        for j in range(CHUNKS):
            part = given.frames(j * n, (j + 1) * n)
            noise, grad = (lambda _, i, j=j: table[j, i]), role == "student"
            x0, _ = advance(student, state, part, noise, student.spec.sigmas, exit_step, grad=grad)
            chunks.append(x0)
            if j + 1 < CHUNKS:
                state = student.commit(state, x0, part)
    x0 = torch.cat(chunks, dim=2)
    sigma = flow.shift_sigma(torch.rand(2, generator=own), 3.0).clamp(0.02, 0.98)
    x = flow.add_noise(x0, torch.randn(x0.shape, generator=own), sigma)
    if role == "fake_score":
        return losses.denoising(method.fake_score.denoise(x, sigma, given), x0, sigma, 1.0, 0.02)
    with torch.no_grad():
        full, text, none = (
            method.teacher.denoise(x, sigma, c) for c in (given, given.drop("audio"), given.drop("text", "audio"))
        )
        real = none + 2.0 * (text - none) + 3.0 * (full - text)
        gradient = losses.dmd_gradient(x0, real, method.fake_score.denoise(x, sigma, given))
    return losses.surrogate(x0, gradient)


class CellStudent(nn.Module):
    """One weight for each (chunk, step) cell and a context: a gradient tells which calls it came through."""

    def __init__(self, num_chunks: int = 12, num_steps: int = 6):
        super().__init__()
        self.spec = SimpleNamespace(
            guidance=None,
            schedule=Schedule(),
            sigmas=(1.0, 0.75, 0.5),
            step="renoise",
            chunk_frames=1,
            num_chunks=CHUNKS,
            latent_size=(2, 1, 1),
            history=History(),
        )
        self.cells = nn.Parameter(torch.linspace(0.3, 0.6, num_chunks * num_steps).view(num_chunks, num_steps))
        self.seen, self.graphs, self.committed = [], [], []

    def open(self, text=None):
        self.seen.clear()
        self.graphs.clear()
        self.committed.clear()
        return 0, None

    def plan(self, state, conditions, grad=False):
        return None

    def denoise(self, state, plan, x, sigma, conditions, step):
        chunk, past = state
        self.seen.append((chunk, sigma))
        self.graphs += [chunk] if torch.is_grad_enabled() else []
        x0 = self.cells[chunk, step] * x
        return (x0 if past is None else x0 + 0.5 * past), None

    def commit(self, state, x0, conditions, steps):
        self.committed.append(x0)
        return state[0] + 1, x0.detach()

    def reached(self) -> list[list[int]]:
        """Cells with gradient."""
        assert self.cells.grad is not None
        return self.cells.grad.nonzero().tolist()


def sound(batch: int, frames: int) -> Conditions:
    """audio[b, f] = 100 b + f says where it comes from."""
    audio = (100.0 * torch.arange(batch).view(-1, 1) + torch.arange(frames)).view(batch, frames, 1, 1)
    return Conditions(text=torch.zeros(batch, 1, 1), audio=audio, reference=randn(batch, 2, 1, 1, 1))


def scorer(scored: list, answer=torch.ones_like):
    def denoise(x, sigma, conditions):
        scored.append((x, sigma, conditions))
        return answer(x)

    return SimpleNamespace(denoise=denoise)


def cell_dmd(first: tuple[float, ...] = (), **config) -> DMD:
    """With `first` the first two chunks take those sigmas."""
    nets = {"student": CellStudent(), "teacher": scorer([]), "fake_score": scorer([], torch.zeros_like)}
    spec = nets["student"].spec
    spec.first_sigmas, spec.steps = first, lambda chunk: first if first and chunk < 2 else spec.sigmas
    return dmd.build(Config(**config), nets)


def drawn(shared: torch.Generator, count: int) -> int:
    return int(torch.randint(count, (1,), generator=shared))


def test_the_first_chunks_take_more_steps():
    """Their own sigmas; a random exit is drawn for them apart, for they have more."""
    first = (1.0, 0.9, 0.8, 0.6, 0.3)
    method = cell_dmd(exit_step="last", first=first)
    method.loss("student", Batch(conditions=sound(2, CHUNKS)), rng(1), rng(2)).value.backward()
    steps = {j: tuple(s for chunk, s in method.student.seen if chunk == j) for j in range(CHUNKS)}
    assert steps == {0: first, 1: first, 2: (1.0, 0.75, 0.5), 3: (1.0, 0.75, 0.5)}
    assert method.student.reached() == [[1, 4], [2, 2], [3, 2]]
    method, pairs = cell_dmd(first=first), set()
    for seed in range(12):
        method.student.zero_grad()
        method.loss("student", Batch(conditions=sound(2, CHUNKS)), rng(1), rng(seed)).value.backward()
        (_, early), (_, late), (_, same) = method.student.reached()
        assert late == same
        pairs.add((early, late))
    assert {early for early, _ in pairs} > {early for early, late in pairs if early == late}
    assert max(early for early, _ in pairs) == 4


@pytest.mark.parametrize("exit_step", ["last", "random"])
def test_a_long_rollout_carries_its_loss_on_the_last_window(exit_step):
    """Its length is drawn for all ranks; chunks before the window run to their end without gradient; the scores see the window's
    sound and take its first frame as given."""
    method, lengths = cell_dmd(exit_step=exit_step, rollout_chunks=9), set()
    for seed in range(8):
        scored: list = []
        method.teacher = scorer(scored)
        method.student.zero_grad()
        method.loss("student", Batch(conditions=sound(2, CHUNKS)), rng(seed, 5), rng(seed)).value.backward()
        count = CHUNKS + drawn(rng(seed), 9 - CHUNKS + 1)
        start = count - CHUNKS
        lengths.add(count)
        assert [j for j, _ in method.student.reached()] == list(range(start + 1, count))
        assert method.student.graphs == list(range(start, count)), "a graph that no loss asks for"
        before = [s for chunk, s in method.student.seen if chunk < start]
        assert before == list(method.student.spec.sigmas) * start
        x, _, conditions = scored[0]
        assert x.shape[2] == CHUNKS
        assert (
            conditions.audio.flatten(1).tolist()
            == of_length(sound(2, CHUNKS), count).audio[:, start:].flatten(1).tolist()
        )
        given = sound(2, CHUNKS).reference
        own = method.student.committed[start][:, :, :1]
        assert torch.equal(conditions.reference, own if start else given)
        assert not conditions.reference.requires_grad
    assert lengths == set(range(CHUNKS, 10))


def test_longer_conditions_make_a_longer_rollout():
    """Clips of data that are longer than the window are rolled out to their end."""
    method = cell_dmd(exit_step="last")
    method.loss("student", Batch(conditions=sound(2, 7)), rng(1), rng(2)).value.backward()
    assert method.student.reached() == [[j, 2] for j in (4, 5, 6)]


def test_a_stream_goes_on_with_the_sound_of_the_next_rows():
    given = replace(sound(3, 4), pose=sound(3, 4).audio)
    longer = of_length(given, 9)
    expected = [0, 1, 2, 3, 101, 102, 103, 201, 202]
    assert longer.audio[0].flatten().tolist() == expected
    assert longer.pose[0].flatten().tolist() == expected
    assert longer.audio[2].flatten().tolist() == [200, 201, 202, 203, 1, 2, 3, 101, 102]
    assert torch.equal(longer.reference, given.reference)
    assert of_length(given, 3).num_frames == 3
    assert of_length(sound(1, 4), 9).audio[0].flatten().tolist() == [0, 1, 2, 3, 1, 2, 3, 1, 2]


def test_context_noise_is_put_on_what_is_committed():
    method, x0s = cell_dmd(exit_step="last", context_noise=0.3), []
    keep = rollouts.advance

    def spy(*args, **named):
        out = keep(*args, **named)
        x0s.append(out[0])
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts, "advance", spy)
        method.loss("student", Batch(conditions=sound(400, CHUNKS)), rng(1), rng(2))
    noises = [(c - 0.7 * x0).detach() / 0.3 for c, x0 in zip(method.student.committed, x0s, strict=False)]
    assert len(noises) == CHUNKS - 1
    assert all(float(noise.std()) == pytest.approx(1.0, abs=0.1) for noise in noises)
    assert float((noises[0] * noises[1]).mean()) == pytest.approx(0.0, abs=0.15)


@pytest.mark.parametrize(("start", "chunk"), [(0, 0), (0, 3), (2, 2), (2, 3)])
def test_no_gradient_runs_through_the_context(start, chunk):
    """Of the real student: a chunk's x0 depends on its own noise, at its own exit step alone; its loss reaches every weight."""
    student, exits = a_student(History(sinks=1, window=None)), [2, 0, 1, 2]
    tables = {(j, i): some_latents(1, 2, seed=10 * j + i).requires_grad_() for j in range(CHUNKS) for i in range(STEPS)}
    x0 = rollout(student, some_conditions(1), lambda j, i: tables[j, i], exits, start=start)
    assert x0.shape[2] == 2 * (CHUNKS - start)
    x0[:, :, 2 * (chunk - start) :][:, :, :2].square().sum().backward()
    with_gradient = {key for key, table in tables.items() if table.grad is not None and table.grad.any()}
    assert with_gradient == {(chunk, exits[chunk])}
    assert all(grad is not None and grad.any() for grad in gradients(student))


def test_a_window_is_the_end_of_the_whole_rollout():
    """x0 from `start` on is bit for bit what a rollout without a window makes there."""
    student, given = a_student(), some_conditions(2)
    noise = draw_noise(student, 2, rng(1))
    with torch.no_grad():
        whole, window = (rollout(student, given, noise, start=start) for start in (0, 2))
    assert torch.equal(whole[:, :, 4:], window)


def test_guidance_within_its_band_only():
    """Clips inside the band are guided, the others are the teacher's full prediction; as many passes for every sigma."""
    method, scored = cell_dmd(exit_step="last", guidance=Guidance(text=3.0, audio=3.0), guidance_band=(0.4, 0.6)), []
    method.teacher = scorer(scored)
    sigma, x = torch.tensor([0.3, 0.5, 0.7]), some_latents(3, 4)
    batch = replace(sound(3, 4), text=torch.ones(3, 1, 1))

    def denoise(x, sigma, conditions):
        scored.append(conditions)
        return torch.full_like(x, 1.0 if conditions.text.any() else 0.0)

    method.teacher = SimpleNamespace(denoise=denoise)
    real, _ = method._scores(Rollouts(x, sigma, sigma, torch.zeros_like(x), batch, Batch(batch)))
    assert real[:, 0, 1, 0, 0].tolist() == [1.0, 3.0, 1.0]
    assert len(scored) == 2


def test_wrong_options_are_one_line():
    student = {"student": a_student(), "teacher": None, "fake_score": None}
    level = {**student, "student": a_student(History(commit="same_level"))}
    for make, words in (
        (lambda: Config(context_noise=1.0), r"dmd\.context_noise"),
        (lambda: Config(gan=-1.0), r"dmd\.gan"),
        (lambda: Config(gan_critic=0.1), r"dmd\.gan_critic"),
        (lambda: StudentConfig(chunk_frames=2, num_steps=3, first_sigmas=(0.9, 0.5)), r"student\.first_sigmas"),
        (lambda: StudentConfig(chunk_frames=2, num_steps=3, first_sigmas=(1.0, 0.5, 0.5)), r"student\.first_sigmas"),
        (lambda: Config(guidance_band=(0.7, 0.3)), r"dmd\.guidance_band"),
        (lambda: dmd.build(Config(rollout_chunks=2), student), r"dmd\.rollout_chunks"),
        (lambda: dmd.build(Config(gan=0.1), student), r"dmd\.gan: there is no role discriminator"),
        (lambda: dmd.build(Config(exit_step="random"), level), r"dmd\.exit_step"),
        (lambda: dmd.build(Config(exit_step="last", context_noise=0.1), level), r"dmd\.context_noise"),
        (lambda: dmd.build(Config(exit_step="last", context_gradient=True), level), r"dmd\.context_gradient"),
    ):
        with pytest.raises(UserError, match=rf"^[^\n]*{words}[^\n]*$"):
            make()


def test_a_student_step_is_followed_in_two_files_and_250_lines():
    path = (DMD.loss, DMD._generate, DMD._exits, DMD._student, DMD._scores, rollout, draw_noise, of_length)
    assert len({inspect.getsourcefile(function) for function in path}) == 2
    assert sum(len(inspect.getsourcelines(function)[0]) for function in path) < 250
