"""Windows of long films: what stays is level, what goes wrong is seen, and the slope is a closed form."""

import re

import pytest
import torch

from distill.cli import main
from distill.commands import drift
from eval.embedded.drift import cut, window_scores
from eval.metrics.quality import slope
from students.history import History
from teachers.errors import UserError
from tests.support.tiny import randn


def test_a_slope_is_the_least_squares_one():
    assert slope([1.0, 3.0, 5.0]) == pytest.approx(2.0)
    assert slope([2.0, 2.0, 2.0, 2.0]) == 0
    assert slope([0.0, 1.0, 0.0]) == pytest.approx(0.0)
    assert slope([5.0]) != slope([5.0])


def test_pieces_are_cut_in_order():
    films = torch.arange(24).view(2, 12)
    assert cut(films, 3, 2, 4).tolist()[:4] == [[3, 4], [5, 6], [7, 8], [9, 10]]


class FakeReading:
    def __init__(self, clips):
        level = clips.float().mean((1, 3, 4)) / 255
        self.identity = torch.stack([level, 1 - level], dim=2)
        self.mouth = torch.stack([level, level], dim=2)
        self.gesture = torch.stack([1 - level.mean(1), level.mean(1)], dim=1)


class FakeProbes:
    """Reads the brightness as everything."""

    def read(self, clips):
        return FakeReading(clips)

    def mouth_from_audio(self, rows):
        return rows[..., :2]


@pytest.mark.usefixtures("unchecked_shapes")  # the probes are a stand-in
def test_a_film_that_fades_away_from_its_portrait_drifts():
    portraits = torch.tensor([40, 120, 200], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    wobble = (randn(3, 120, seed=1) * 6).round()
    still = portraits.permute(0, 2, 3, 1)[:, None] + wobble[:, :, None, None, None]
    fade = torch.linspace(0, 60, 120).view(1, 120, 1, 1, 1)
    audio = torch.stack([wobble, wobble], dim=2)
    gesture = torch.tensor([0, 0, 1])
    scores = {}
    for name, film in (("still", still), ("fading", still + fade)):
        films = film.clamp(0, 255).to(torch.uint8)
        scores[name] = [
            window_scores(FakeProbes(), films, portraits, audio, gesture, start, 60, 15) for start in (0, 60)
        ]
    assert abs(scores["still"][1]["identity"] - scores["still"][0]["identity"]) < 0.01
    assert scores["fading"][1]["identity"] < scores["fading"][0]["identity"] - 0.05
    assert scores["fading"][1]["colour"] > scores["fading"][0]["colour"] + 20 > scores["still"][1]["colour"] + 20
    assert scores["still"][0]["sync"] > 0.99
    with pytest.raises(UserError, match=r"^drift window 90\.\.150: videos have 120 frames; make longer ones$"):
        window_scores(FakeProbes(), films, portraits, audio, gesture, 90, 60, 15)


@pytest.mark.parametrize(("options", "table"), [(["--streams", "1"], None), (["--minutes", "0"], None), ([], 1)])
def test_too_few_streams_are_refused_before_any_is_drawn(options, table, tmp_path, capsys):
    """And the table of one minute has no change a minute."""
    if table is None:
        assert main(["drift", "--run", str(tmp_path / "nowhere"), *options]) == 2
        assert re.match(
            r"distill: --streams must be at least 3, [^\n]*--minutes at least 1: got ", capsys.readouterr().err
        )
        return
    drift.print_table([dict.fromkeys(drift.COLUMNS, 0.5)] * table, History())
    assert "nan" not in capsys.readouterr().out
    drift.print_table([dict.fromkeys(drift.COLUMNS, 0.5)] * 2, History())
    assert "| change a minute | +0.0000 |" in capsys.readouterr().out
