from fractions import Fraction

import yaml

from students.weights.card import model_card
from tests.support.tiny import a_bundle


def test_the_card_has_front_matter_limits_and_the_word_about_consent():
    spec = a_bundle().spec
    card = model_card(spec, "Student of x", "drawn faces", {"seed": 3}, {"fid": 1.23456, "step": 4})
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "avatar-distill"
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        *("# Student of x", "## Training", "## Validation", "## Limits", "## People and consent")
    ]
    assert f"{spec.width}x{spec.height}" in text
    assert f"{float(Fraction(spec.fps)):g} frames a second" in text
    assert "| fid | 1.235 |" in text
    assert "| seed | 3 |" in text
    assert "only with that person's consent" in text
    assert "## Training" not in model_card(spec)
