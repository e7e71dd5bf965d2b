"""FlowAct's memory refinement: what is refined is remembered and not shown, counted, and off the path to the screen."""

import pytest
import torch

from distill.compose import RECIPES
from distill.methods import forcing
from distill.methods.rollout import draw_noise, rollout
from distill.pipeline.stages import Pipeline
from distill.recipe import load_recipe
from students.history import History
from students.schedule import Schedule
from students.serving.session import Session
from students.student import State
from teachers import flow
from teachers.errors import UserError
from teachers.guidance import EmbeddedScales, GuidanceRange
from tests.students.test_flowact import EMBEDDED, N, diagonal, recorded
from tests.support.tiny import (
    Ranks,
    a_bundle,
    a_portrait,
    a_student,
    rng,
    some_conditions,
    some_sound,
)

# ---- memory that is refined


@pytest.mark.parametrize("depth", [1, 3])
def test_what_is_refined_is_remembered_and_not_shown(depth):
    """Against the same rollout whose refined chunks are computed by hand and committed in the place of those shown."""
    history = History(sinks=1, window=2, refine_every=2, refine_level=0.4)
    student = diagonal(history, depth)
    plain = diagonal(History(sinks=1, window=2), depth)
    plain.load_state_dict(student.state_dict())
    given, noise = some_conditions(2, 6 * N), draw_noise(student, 2, rng(1), 6)
    states = recorded(student, "commit")
    with torch.no_grad():
        shown = rollout(student, given, noise)
        unrefined = rollout(plain, given, noise)
        for state, x0, part, diagonal_step, *_ in states:
            j = state.chunk
            own = shown[:, :, j * N : (j + 1) * N]
            if (j + 1) % 2:
                assert torch.equal(x0, own)
                continue
            if depth > 1:
                state = student.settle(state, diagonal_step.entry) if diagonal_step.entry else state
            alone = State(chunk=j, cached=state.cached, context_kv=state.context_kv, read=state.read)
            expected, _ = student.denoise(alone, None, flow.add_noise(own, noise(j, 3), 0.4), 0.4, part)
            assert (x0 - expected).abs().max() < 1e-5
            assert (x0 - own).abs().mean() > 0.01
    assert torch.equal(shown[:, :, : 2 * N], unrefined[:, :, : 2 * N]), "nothing refined is seen yet"
    assert not torch.equal(shown[:, :, 2 * N :], unrefined[:, :, 2 * N :])


@pytest.mark.parametrize(
    ("every", "expected"), [(0, [3, 1, 1, 1, 1, 1]), (2, [3, 2, 1, 2, 1, 2]), (3, [3, 1, 2, 1, 1, 2])]
)
def test_refinement_is_counted(every, expected):
    bundle, counts = a_bundle(History(sinks=1, window=1, refine_every=every), schedule=Schedule(depth=3)), []
    bundle.student.net.register_forward_pre_hook(lambda *_: counts.append(1))
    session, forwards = Session(bundle, a_portrait(), "a person nods"), []
    session.push(some_sound(60 * 1280))
    for _ in expected:
        before = len(counts)
        session.step()
        session.settle()
        forwards.append(len(counts) - before)
    assert forwards == expected
    assert bundle.spec.nfe_per_chunk == (1 + 1 / every if every else 1)


def test_refinement_is_off_the_path_to_the_screen():
    """A chunk is handed over before its memory is refined: its frames do not wait for that forward."""
    bundle, order = a_bundle(History(sinks=1, window=1, refine_every=1), schedule=Schedule(depth=3)), []
    bundle.student.net.register_forward_pre_hook(lambda *_: order.append("forward"))
    keep = bundle.codec.decode_chunk
    bundle.codec.decode_chunk = lambda *args: order.append("decode") or keep(*args)
    try:
        session = Session(bundle, a_portrait(), "a person nods")
        session.push(some_sound(60 * 1280))
        session.step()
        session.settle()
    finally:
        del bundle.codec.decode_chunk
    assert order == ["forward", "forward", "forward", "decode", "forward"]


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("midas_avatar", ["+student.guidance={both: {most: 3.0}}"], r"student\.guidance: only a whole DiT"),
        ("flowact_full", ["+teacher.network.guidance=1"], r"teacher\.network\.guidance: a student alone"),
        (
            "guided_avatar",
            ["student.guidance.audio={least: 2.0, most: 1.0}"],
            r"'student\.guidance\.audio': .*; got least=2\.0",
        ),
        ("flowact_full", ["method@init=forcing"], r"student\.guidance: init learns it from trajectories"),
        ("flowact_full", ["+distill.start=ar_teacher"], "unknown key 'distill.start'"),
        ("scratch_avatar", ["+init.start=ar_teacher"], "init asks for an autoregressive teacher"),
        (
            "flowact_full",
            ["student.guidance.both.served=9.0"],
            r"'student\.guidance\.both': .*; got least=1\.0, served=9\.0",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_is_one_line(name, words, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        Pipeline(load_recipe(RECIPES / f"{name}.yaml", [*words, f"run_dir={tmp_path / 'run'}"]), Ranks())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("build_it", "message"),
    [
        (lambda: History(refine_every=-1), r"student\.history\.refine_every"),
        (lambda: History(refine_every=1, refine_level=0.0), r"refine_level: got 1, 0\.0"),
        (lambda: History(refine_every=1, commit="same_level"), r"same_level keeps the steps"),
        (
            lambda: a_student(network=EMBEDDED["network"]),
            r"network\.guidance: the network embeds 1 guidance scale\(s\), student\.guidance has 0",
        ),
        (lambda: EmbeddedScales(both=GuidanceRange(), first="audio"), r"student\.guidance\.first: got audio"),
        (EmbeddedScales, r"student\.guidance: got no range; give both, or text and audio"),
        (lambda: EmbeddedScales(text=GuidanceRange()), r"student\.guidance: got text; give both, or text and audio"),
        (lambda: forcing.Config(generated=1.5), r"forcing\.generated"),
        (lambda: forcing.Config(renoise=0.1), r"forcing\.renoise: it is for generated memory"),
        (lambda: forcing.Config(context="noisy", generated=0.5), r"no clean memory"),
        (
            lambda: forcing.build(forcing.Config(context="stream"), {"student": a_student()}),
            r"stream is for chunks in flight",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(build_it, message):
    with pytest.raises(UserError, match=message) as error:
        build_it()
    assert "\n" not in str(error.value)
