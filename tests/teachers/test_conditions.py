"""Conditions and guidance: what is dropped is gone, scales are effective ones, and no pass is spent for nothing."""

from dataclasses import replace

import pytest
import torch

from teachers.conditions import Guidance, pack_rows
from tests.support.tiny import randn, some_conditions


def test_a_dropped_modality_is_zero_and_the_rest_is_untouched():
    given = some_conditions()
    for name, other in [("text", "audio"), ("audio", "text")]:
        dropped = given.drop(name)
        assert not getattr(dropped, name).any()
        assert torch.equal(getattr(dropped, other), getattr(given, other))
        assert torch.equal(dropped.reference, given.reference)
    assert given.text.any()
    assert given.audio.any()


def test_rows_are_dropped_one_by_one():
    given = some_conditions(batch=3)
    dropped = given.drop_rows(text=torch.tensor([True, False, False]), audio=torch.tensor([False, False, True]))
    assert [bool(row.any()) for row in dropped.text] == [False, True, True]
    assert [bool(row.any()) for row in dropped.audio] == [True, True, False]
    assert torch.equal(dropped.text[1:], given.text[1:])


def test_what_bidirectional_networks_hear_goes_with_the_audio():
    given = some_conditions(batch=3)
    given = replace(given, clip_audio=given.audio + 1)
    assert not given.drop("audio").clip_audio.any()
    assert torch.equal(given.drop("text").clip_audio, given.clip_audio)
    dropped = given.drop_rows(audio=torch.tensor([False, True, False]))
    assert [bool(row.any()) for row in dropped.clip_audio] == [True, False, True]
    assert torch.equal(given.frames(2, 4).clip_audio, given.clip_audio[:, 2:4])
    assert torch.equal(given.index([1]).clip_audio, given.clip_audio[1:2])


def test_frames_and_rows_are_selected():
    given = some_conditions(batch=3, frames=8)
    part = given.frames(2, 4)
    assert part.num_frames == 2
    assert torch.equal(part.audio, given.audio[:, 2:4])
    assert torch.equal(part.text, given.text)
    one = given.index(torch.tensor([2]))
    assert torch.equal(one.reference, given.reference[2:])
    assert one.to(torch.float64).audio.dtype == torch.float64


def test_audio_rows_are_packed_on_the_latent_clock():
    """Latent i covers pixel frames stride i - (stride - 1) .. stride i; the first row is repeated in front."""
    rows = torch.arange(1.0, 8.0).view(1, 7, 1)
    assert pack_rows(rows, 2)[0, :, :, 0].tolist() == [[1, 1], [2, 3], [4, 5], [6, 7]]
    assert pack_rows(rows[:, :5], 4)[0, :, :, 0].tolist() == [[1, 1, 1, 1], [2, 3, 4, 5]]
    with pytest.raises(ValueError, match=r"got T=6, need T = 1 \+ 2 \(F - 1\)"):
        pack_rows(rows[:, :6], 2)


@pytest.mark.parametrize(
    ("text", "audio", "passes"), [(1, 1, 1), (4.5, 4.5, 2), (1, 3, 2), (2, 3, 3), (2, 1, 3), (0, 0, 2), (0, 1, 3)]
)
def test_guidance_is_effective_and_counts_its_passes(text, audio, passes):
    given = some_conditions()
    calls = []

    def predict(c):
        calls.append(c)
        return 1.0 + 10.0 * c.text.any() + 100.0 * c.audio.any()

    value = Guidance(text=text, audio=audio)(predict, given)
    assert float(value) == pytest.approx(1 + 10 * text + 100 * audio)
    assert len(calls) == passes == Guidance(text=text, audio=audio).passes


def test_guidance_moves_nothing_where_conditions_do_nothing():
    constant = randn(2, 3)
    assert torch.allclose(Guidance(text=3.0, audio=7.0)(lambda c: constant, some_conditions()), constant, atol=1e-5)
