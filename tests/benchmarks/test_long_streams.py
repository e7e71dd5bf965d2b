"""Windows of long streams are scored where they lie, and a damage shows in its column and its window alone."""

import pytest
import torch

from benchmarks.lab.long_streams import COLUMNS, light_of, scores, windows
from distill.compose import RECIPES
from distill.data.procedural.source import DataConfig, held_out
from distill.recipe import load_recipe
from eval.embedded.extractors import Probes
from eval.metrics.quality import measure

LENGTH = 12


@pytest.fixture(scope="module")
def world():
    recipe = load_recipe(RECIPES / "lab_avatar.yaml", ["data.world.num_frames=25"])
    assert isinstance(recipe.data, DataConfig)
    return held_out(recipe.data, 0, "long streams test", 6), Probes.load(recipe.eval.probes)


def rows(clips, video, probes):
    still = clips.video[:, :, :1].expand(-1, -1, 2, -1, -1)
    portrait = torch.cat([probes.read(still).identity[:, 0], measure(still).colour[:, :, 0].float()], dim=1)
    reference = probes.read(clips.video).frame_features
    mouth = torch.stack([clips.labels[name] for name in ("mouth_open", "mouth_width")], dim=-1).split(LENGTH, dim=1)
    light = light_of(probes.read(windows(video, LENGTH)[0]))
    pairs = zip(windows(video, LENGTH), mouth, strict=False)
    return [scores(part, portrait, own, clips.labels["gesture"], reference, probes, light) for part, own in pairs]


@pytest.mark.slow
def test_each_damage_shows_in_its_window(world):
    clips, probes = world
    real = rows(clips, clips.video, probes)
    assert len(real) == 2
    assert set(real[0]) == set(COLUMNS)
    second = slice(LENGTH, 2 * LENGTH)
    for column, damage, direction in (
        ("black", lambda x: x * 0, 1),
        ("saturation", lambda x: x.float().mean(1, keepdim=True).expand_as(x).to(torch.uint8), -1),
        ("identity", lambda x: x.roll(1, 0), -1),
        ("light", lambda x: x.flip(4), -1),
        ("frozen", lambda x: x[:, :, :1].expand_as(x), 1),
        ("sync", lambda x: x.flip(2), -1),
        ("colour", lambda x: (x.float() + 40).clamp(0, 255).to(torch.uint8), 1),
    ):
        video = clips.video.clone()
        video[:, :, second] = damage(video[:, :, second])
        found = rows(clips, video, probes)
        assert found[0] == real[0], column
        assert direction * (found[1][column] - real[1][column]) > 0.1 * abs(real[1][column]) + 1e-3, column
