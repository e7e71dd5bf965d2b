"""A clip's lead: its first latent is the portrait's, primes the codec and is in no chunk (Wan2.2-S2V)."""

import pytest
import torch

from distill.compose import RECIPES
from distill.data.encoders import ConditionEncoders
from distill.data.source import Clips
from distill.recipe import load_recipe, spec_of
from teachers.codecs.linear import to_uint8
from teachers.conditions import pack_rows
from teachers.errors import UserError
from tests.support.tiny import STRIDE, fitted_codec, make_spec, randn, some_sound, text_encoder

FRAMES = 1 + STRIDE * 4


def encoders(lead: int) -> ConditionEncoders:
    spec = make_spec()
    return ConditionEncoders(fitted_codec(), spec.audio.load(spec.samples_per_frame), text_encoder(), False, lead=lead)


def clips() -> Clips:
    spec = make_spec()
    video = to_uint8(0.3 * randn(2, 3, FRAMES, spec.height, spec.width))
    sound = torch.stack([some_sound(FRAMES * spec.samples_per_frame, seed) for seed in (0, 1)])
    return Clips(
        video=video, audio=sound, text=["a person nods", "someone smiles"], labels={}, pose=randn(2, FRAMES, 3)
    )


def test_latents_and_rows_are_those_behind_it_and_the_codec_gets_it_back():
    plain, own, given = encoders(0), encoders(1), clips()
    whole, everything = plain.of_clips(given)
    x0, conditions = own.of_clips(given)
    assert everything.lead is None
    assert torch.equal(x0, whole[:, :, 1:])
    assert torch.equal(conditions.lead, whole[:, :, :1])
    assert torch.equal(conditions.audio, everything.audio[:, 1:])
    assert torch.equal(conditions.pose, pack_rows(given.pose, STRIDE)[:, 1:])
    assert torch.equal(own.decode(x0, conditions.lead), plain.decode(whole))
    assert "lead" not in conditions.stored


def test_a_recipe_whose_clips_have_no_lead_is_refused():
    words = ["teacher.path=anywhere"]
    assert spec_of(load_recipe(RECIPES / "s2v.yaml", words)).horizon_frames == 18
    with pytest.raises(
        UserError, match=r"^data\.lead: got 0; S2VConfig has a lead of 1 latent frames, set it to that$"
    ):
        spec_of(load_recipe(RECIPES / "s2v.yaml", [*words, "data.lead=0"]))
    with pytest.raises(UserError, match=r"^data\.lead: got 1; NetworkConfig has a lead of 0 latent frames"):
        spec_of(load_recipe(RECIPES / "livetalk.yaml", [*words, "data.lead=1"]))
