"""The methods: what they ask of a student, whose weights their gradient reaches, and when it vanishes."""

import copy
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from distill.methods import Batch, losses
from distill.methods.dmd import DMD
from distill.methods.dmd import Config as DMDConfig
from distill.methods.flow_matching import Config as FlowConfig
from distill.methods.flow_matching import FlowMatching
from distill.methods.ode_init import Config as ODEConfig
from distill.methods.ode_init import ODEInit
from students.schedule import Schedule
from students.spec import student_sigmas
from teachers import flow
from teachers.errors import UserError
from teachers.guidance import Guidance
from tests.support.tiny import a_student, a_teacher, a_train_set, rng, some_conditions, some_latents

SIGMAS = student_sigmas(3, 3.0)


class RecordingStudent:
    """Keeps what denoise_clip was given and answers with the clean end."""

    def __init__(self, answer):
        self.spec = SimpleNamespace(schedule=Schedule(), sigmas=SIGMAS, chunk_frames=2, num_chunks=4)
        self.answer = answer

    def denoise_clip(self, x, sigma, conditions, clean=None):
        self.x, self.sigma, self.clean = x, sigma, clean
        return self.answer


def labelled_states(batch: int = 3):
    """states[b, k, c, f] = 1000 b + 100 k + 10 f + c: every entry says where it comes from."""
    axes = [torch.arange(n) for n in (batch, 4, 2, 8)]
    b, k, c, f = torch.meshgrid(*axes, indexing="ij")
    return (1000.0 * b + 100 * k + 10 * f + c)[..., None, None].expand(-1, -1, -1, -1, 2, 2)


@pytest.mark.parametrize("context", ["clean", "noisy"])
def test_ode_init_gives_each_chunk_the_state_of_its_sigma(context):
    states = labelled_states()
    student = RecordingStudent(states[:, -1])
    method = ODEInit(ODEConfig(context=context), student, (*SIGMAS, 0.0))
    batch = Batch(conditions=some_conditions(3), states=states)
    seen = Counter()
    for seed in range(20):
        loss = method.loss("student", batch, rng(seed), rng(99))
        assert loss.value == 0, "the target is not the end of the trajectory"
        for b in range(3):
            for f in range(8):
                level = SIGMAS.index(pytest.approx(float(student.sigma[b, f // 2])))
                seen[level] += 1
                assert student.x[b, 1, f, 0, 0] == 1000 * b + 100 * level + 10 * f + 1
        if context == "clean":
            assert torch.equal(student.clean, states[:, -1])
        else:
            assert student.clean is None
    assert min(seen[i] for i in range(3)) > 100
    assert method.roles_to_update(7) == ("student",)


def test_ode_init_refuses_other_sigmas():
    student = RecordingStudent(None)
    with pytest.raises(UserError, match="is not on the teacher's grid"):
        ODEInit(ODEConfig(), student, (1.0, 0.9, 0.5, 0.0))
    with pytest.raises(ValueError, match="trajectories hold sigmas"):
        ODEInit(ODEConfig(), student, (*SIGMAS, 0.1, 0.0))


def test_ode_init_trains_a_real_student():
    student = a_student()
    states = torch.stack([some_latents(2, 8, seed=i) for i in range(4)], dim=1)
    method = ODEInit(ODEConfig(), student, (*SIGMAS, 0.0))
    batch = Batch(conditions=some_conditions(), states=states)
    first = method.loss("student", batch, rng(1), rng(2))
    first.value.backward()
    assert all(p.grad.any() for p in student.parameters())
    assert set(first.metrics) == {"loss"}
    assert torch.equal(first.value, method.loss("student", batch, rng(1), rng(2)).value)
    assert not torch.equal(first.value, method.loss("student", batch, rng(3), rng(2)).value)


def make_dmd(**config):
    student, teacher = a_student(), a_teacher(1).requires_grad_(False)
    return DMD(DMDConfig(**config), student, teacher, a_teacher(2))


def batch_of_pool() -> Batch:
    return a_train_set().batch(torch.arange(2))


def test_the_cadence_of_dmd():
    method = make_dmd(fake_updates=5, warmup=3)
    assert method.roles_to_update(0) == ("fake_score",) * 8 + ("student",)
    assert all(method.roles_to_update(step) == ("fake_score",) * 5 + ("student",) for step in (1, 2, 50))


@pytest.mark.parametrize("role", ["student", "fake_score"])
def test_a_dmd_gradient_reaches_its_own_role_only(role):
    method = make_dmd()
    loss = method.loss(role, batch_of_pool(), rng(1), rng(2))
    loss.value.backward()
    nets = {"student": method.student, "fake_score": method.fake_score, "teacher": method.teacher}
    grads = {name: [p.grad for p in net.parameters()] for name, net in nets.items()}
    reached = {name for name, all_of in grads.items() if any(grad is not None and grad.any() for grad in all_of)}
    assert reached == {role}
    assert all(grad is not None and grad.any() for grad in grads[role])
    assert all(not value.requires_grad for value in loss.metrics.values())


def test_dmd_vanishes_if_and_only_if_fake_is_real():
    method, batch = make_dmd(), batch_of_pool()
    method.fake_score = copy.deepcopy(method.teacher)
    loss = method.loss("student", batch, rng(1), rng(2))
    loss.value.backward()
    assert loss.metrics["dmd_grad_abs"] == 0
    assert not any(p.grad.any() for p in method.student.parameters())
    with torch.no_grad():
        method.fake_score.net.proj_out.bias += 0.1
    assert method.loss("student", batch, rng(1), rng(2)).metrics["dmd_grad_abs"] > 1e-3


def test_dmd_descends_from_fake_to_real():
    """The step on x0 is real - fake: x0 rises where the teacher's prediction is higher; frame 0 is never moved."""
    method, batch = make_dmd(), batch_of_pool()
    grads = []

    def constant(value):
        return SimpleNamespace(denoise=lambda x, sigma, conditions: torch.full_like(x, value))

    method.teacher, method.fake_score = constant(2.0), constant(-1.0)
    keep = losses.surrogate

    def spy(x0, gradient):
        x0.register_hook(grads.append)
        return keep(x0, gradient)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "surrogate", spy)
        method.loss("student", batch, rng(1), rng(2)).value.backward()
    assert (grads[0][:, :, 1:] < 0).all()
    assert not grads[0][:, :, 0].any()


def test_dmd_compares_scores_of_one_noisy_clip():
    """Teacher and fake score see the same x at the same sigma, one a clip, within the configured range."""
    method, batch = make_dmd(sigma_min=0.3, sigma_max=0.6, guidance=Guidance(text=2.0, audio=3.0)), batch_of_pool()
    seen = []

    def recorder(name):
        def denoise(x, sigma, conditions):
            seen.append((name, x, sigma, bool(conditions.text.any()), bool(conditions.audio.any())))
            return x + 1.0

        return SimpleNamespace(denoise=denoise)

    method.teacher, method.fake_score = recorder("teacher"), recorder("fake_score")
    method.loss("student", batch, rng(1), rng(2))
    listed = [(name, *given) for name, _, _, *given in seen]
    assert sorted(listed) == [
        ("fake_score", True, True), ("teacher", False, False), ("teacher", True, False), ("teacher", True, True),
    ]  # fmt: skip
    assert all(torch.equal(x, seen[0][1]) and torch.equal(sigma, seen[0][2]) for _, x, sigma, *_ in seen)
    sigma = seen[0][2]
    assert sigma.shape == (2,)
    assert ((sigma >= 0.3) & (sigma <= 0.6)).all()
    with pytest.raises(UserError, match="dmd sigmas"):
        DMDConfig(sigma_min=0.5, sigma_max=0.4)


def test_dmd_draws_its_exit_step_from_the_shared_generator():
    method, batch = make_dmd(), batch_of_pool()
    exits = []
    method.student.denoise = lambda state, plan, x, sigma, conditions, step: (exits.append(sigma) or x, None)
    method.student.commit = lambda state, x0, conditions, steps: state
    for own, shared in [(1, 2), (9, 2), (1, 3), (1, 5)]:
        exits.clear()
        method.loss("fake_score", batch, rng(own), rng(shared))
        index = int(torch.randint(3, (1,), generator=rng(shared)))
        assert exits == pytest.approx(list(SIGMAS[: index + 1]) * 4)


def test_flow_matching_trains_on_interpolations():
    """x_sigma = (1 - sigma) x0 + sigma eps with one sigma in each stratum; an exact teacher has no loss."""
    batch, config = a_train_set(16).batch(torch.arange(16)), FlowConfig(shift=1.0, drop={"text": 0.25, "audio": 0.5})
    seen = {}

    def exact(x, sigma, conditions):
        seen.update(x=x, sigma=sigma, conditions=conditions)
        return batch.x0

    method = FlowMatching(config, SimpleNamespace(denoise=exact))
    assert method.loss("teacher", batch, rng(1), rng(2)).value == 0
    assert sorted((seen["sigma"] * 16).long().tolist()) == list(range(16))
    eps = (seen["x"] - (1 - flow.expand(seen["sigma"], batch.x0)) * batch.x0) / flow.expand(seen["sigma"], batch.x0)
    assert float(eps[seen["sigma"] > 0.2].std()) == pytest.approx(1.0, abs=0.05)
    dropped = Counter()
    for seed in range(20):
        method.loss("teacher", batch, rng(seed), rng(2))
        for name in ("text", "audio"):
            dropped[name] += sum(not row.any() for row in getattr(seen["conditions"], name))
    assert dropped["text"] / 320 == pytest.approx(0.25, abs=0.08)
    assert dropped["audio"] / 320 == pytest.approx(0.5, abs=0.08)
    teacher = a_teacher()
    FlowMatching(FlowConfig(), teacher).loss("teacher", batch, rng(1), rng(2)).value.backward()
    assert all(p.grad.any() for p in teacher.parameters())


def test_a_loss_touches_no_global_generator():
    before = torch.random.get_rng_state()
    method = make_dmd()
    torch.random.set_rng_state(before)
    for role in ("fake_score", "student"):
        method.loss(role, batch_of_pool(), rng(1), rng(2))
    assert torch.equal(torch.random.get_rng_state(), before)
