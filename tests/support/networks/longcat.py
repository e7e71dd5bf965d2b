"""A small LongCat-Video-Avatar with random weights, and conditions for it; sizes are those of `tests.support.networks.talk`."""

from dataclasses import replace

from torch import Tensor

from teachers.conditions import Conditions
from teachers.networks.longcat import LongCat, LongCatConfig
from tests.support.networks.talk import audio_of, dims, talk_conditions
from tests.support.tiny import randomise

SMALL = LongCatConfig(
    num_layers=2,
    num_heads=2,
    head_dim=24,
    ffn_dim=48,
    freq_dim=32,
    time_dim=20,
    audio_hidden=16,
    audio_tokens=3,
    audio_width=12,
    row_states=2,
)
KNOWN = (0,)


def a_longcat(speakers: int = 1, seed: int = 3, config: LongCatConfig = SMALL) -> LongCat:
    return randomise(config.new(replace(dims(speakers), image_dim=0)), seed).eval()


def longcat_conditions(people: Tensor, regions: Tensor | None = None, seed: int = 0) -> Conditions:
    """Random conditions with the audio of these rows [B, P, T, C]; two of the five text tokens of the first row are padding."""
    given = talk_conditions(people, regions, seed)
    text = given.text.clone()
    text[0, 3:] = 0.0
    return Conditions(text=text, audio=audio_of(people), reference=given.reference, regions=regions)
