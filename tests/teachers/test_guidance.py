"""Guidance: effective scales, either modality first, no pass spent for nothing, one batch as good as one branch at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from distill.pipeline.generate import many_step_clips, stream_noise
from teachers.errors import UserError
from teachers.guidance import EmbeddedGuidance, EmbeddedScales, Guidance, GuidanceRange, branch_outputs, guided
from tests.support.tiny import a_student, a_teacher, randn, some_conditions, some_latents

SIGMA = torch.tensor([0.9, 0.3])


def answer(calls=None):
    """A network whose answer is 1, 10 more with text, 100 more with audio, 1000 more with both."""

    def denoise(x, sigma, given):
        if calls is not None:
            calls.append(given)
        text, audio = (getattr(given, name).flatten(1).any(dim=1).float() for name in ("text", "audio"))
        return (1.0 + 10.0 * text + 100.0 * audio + 1000.0 * text * audio).view(-1, *[1] * (x.ndim - 1)).expand_as(x)

    return denoise


@pytest.mark.parametrize(
    ("text", "audio", "passes"), [(1, 1, 1), (4.5, 4.5, 2), (1, 3, 2), (2, 3, 3), (2, 1, 3), (0, 0, 2), (0, 1, 3)]
)
def test_guidance_is_effective_and_counts_its_passes(text, audio, passes):
    given, calls = some_conditions(), []

    def denoise(x, sigma, c):
        calls.append(c)
        return x.new_full(x.shape, 1.0 + 10.0 * bool(c.text.any()) + 100.0 * bool(c.audio.any()))

    value = guided(denoise, some_latents(), SIGMA, given, Guidance(text=text, audio=audio))
    assert torch.allclose(value, torch.tensor(1.0 + 10 * text + 100 * audio))
    assert len(calls) == passes == Guidance(text=text, audio=audio).passes
    assert calls[0] is given, "the full conditions come first"


@pytest.mark.parametrize("first", ["text", "audio"])
@pytest.mark.parametrize(
    ("text", "audio"), [(1.0, 1.0), (4.5, 4.5), (1.0, 3.0), (2.0, 3.0), (2.0, 1.0), (0.0, 0.0), (0.0, 1.0)]
)
def test_the_middle_branch_has_what_comes_first(first, text, audio):
    """u + s_first (middle - u) + s_second (full - middle), of an answer where text and audio are more than their sum."""
    u, t, a, full = 1.0, 11.0, 101.0, 1111.0
    closed = {
        "text": u + text * (t - u) + audio * (full - t),
        "audio": u + audio * (a - u) + text * (full - a),
    }[first]
    calls, guidance = [], Guidance(text=text, audio=audio, first=first)
    value = guided(answer(calls), some_latents(), SIGMA, some_conditions(), guidance)
    assert torch.allclose(value, torch.tensor(closed))
    assert len(calls) == guidance.passes
    own, other = (text, audio) if first == "text" else (audio, text)
    assert guidance.passes == (1 if own == other == 1 else 3 if own not in (1, other) else 2)


def test_the_negative_prompt_stands_in_the_audio_first_middle():
    given = replace(some_conditions(), negative=randn(2, 5, 16, seed=9))
    full, nothing, middle = Guidance(text=2.0, audio=3.0, first="audio").branches(given)
    assert full is given
    assert torch.equal(nothing.text, given.negative)
    assert torch.equal(middle.text, given.negative)
    assert torch.equal(middle.audio, given.audio)
    assert not nothing.audio.any()


def test_guidance_moves_nothing_where_conditions_do_nothing():
    constant = some_latents()
    value = guided(lambda *_: constant, constant, SIGMA, some_conditions(), Guidance(text=3.0, audio=7.0))
    assert torch.allclose(value, constant, atol=1e-5)


def test_every_row_has_its_own_scale():
    guidance = EmbeddedGuidance(torch.tensor([[1.0], [3.0]]))
    value = guided(answer(), some_latents(), SIGMA, some_conditions(), guidance)
    assert value[:, 0, 0, 0, 0].tolist() == [1111.0, 1.0 + 3.0 * 1110.0]
    assert guidance.passes == len(branch_outputs(answer(), some_latents(), SIGMA, some_conditions(), guidance)) == 2


@pytest.mark.parametrize("first", ["text", "audio"])
def test_one_batch_of_branches_equals_one_after_the_other(first):
    """Of a teacher, with rows of different sigmas; and of streams whose branches keep contexts of their own."""
    teacher, given, x = a_teacher(), some_conditions(), some_latents()
    apart, together = (Guidance(text=2.0, audio=3.0, first=first, batched=b) for b in (False, True))
    sizes = []

    def denoise(x, sigma, c):
        sizes.append((x.shape[0], sigma.shape[0], c.num_rows))
        return teacher.denoise(x, sigma, c)

    one, other = (guided(denoise, x, SIGMA, given, guidance) for guidance in (apart, together))
    assert sizes == [(2, 2, 2)] * 3 + [(6, 6, 6)]
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for scales in (torch.tensor([[1.5], [4.0]]), torch.tensor([[1.5, 2.0], [4.0, 1.0]])):
        rows = (EmbeddedGuidance(scales, first, batched) for batched in (False, True))
        one, other = (guided(teacher.denoise, x, SIGMA, given, guidance) for guidance in rows)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    student = a_student().eval()
    noise, grid = stream_noise(student.spec, 0, "test"), (1.0, 0.6, 0.0)
    one, other = (many_step_clips(student, given, noise, grid, guidance, batch=2) for guidance in (apart, together))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    off = many_step_clips(student, given, noise, grid, Guidance(), batch=2)
    assert (one - off).abs().max() > 0.01


def test_outputs_of_other_branches_are_refused():
    with pytest.raises(ValueError, match="got 1 outputs of 3 branches"):
        Guidance(text=2.0, audio=3.0).combine([some_latents()])


def test_a_scale_that_was_not_trained_is_refused():
    trained = EmbeddedScales(both=GuidanceRange(least=1.0, most=2.0, served=1.25))
    with pytest.raises(UserError, match="guidance: got text; this student's scales: both"):
        trained.check({"text": 1.5})
    assert [trained.check(scale)["both"] for scale in (1.0, 1.5, 2)] == [1.0, 1.5, 2.0]
    for scale in (0.99, 2.01):
        with pytest.raises(UserError, match=f"got {scale}; this student was trained from 1.0 to 2.0"):
            trained.check(scale)


def test_scales_that_are_not_named_stay_as_they_were():
    trained = EmbeddedScales(text=GuidanceRange(), audio=GuidanceRange(served=1.5))
    assert trained.check({}) == trained.served == {"text": 1.25, "audio": 1.5}
    assert trained.check({"audio": 2.0}) == {"text": 1.25, "audio": 2.0}
    assert trained.check(np.float32(1.5)) == {"text": 1.5, "audio": 1.5}
    for wrong in ("2", torch.tensor(1.5), None, True):
        with pytest.raises(UserError, match=r"^guidance of text: got .*; this student was trained from 1.0 to 2.0$"):
            trained.check(wrong)
