"""Sets of clips are the same in one piece and in many, by one rank and by two, and are not made twice."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from distill.compose import RECIPES
from distill.data.encoders import ConditionEncoders
from distill.data.source import Clips, ClipSource
from distill.pipeline import record
from distill.pipeline.evaluation import clip_sets
from distill.recipe import load_recipe, spec_of
from teachers.codecs.linear import EigenCodec, to_float
from teachers.conditions import Conditions
from tests.support.tiny import Ranks, text_encoder

NUM = 7


@pytest.fixture(scope="module")
def artifacts() -> Any:
    recipe = load_recipe(RECIPES / "scratch_avatar.yaml", ["preset=smoke", "run_dir=unused"])
    spec = spec_of(recipe)
    audio = recipe.data.audio.load(spec.samples_per_frame)
    source = recipe.data.open()
    codec = EigenCodec(recipe.data.codec, *recipe.data.world.size).fit(to_float(source.draw(0, "fit", 32).video))
    encoders = ConditionEncoders(codec, audio, text_encoder(), negative="still")
    return SimpleNamespace(recipe=recipe, spec=spec, encoders=encoders, engine=Ranks(), source=source)


def of_rank(artifacts: Any, rank: int, world_size: int, looked: dict[str, list[int]]) -> Any:
    engine = Ranks(rank=rank, world_size=world_size, is_main=rank == 0, looked=looked)
    return SimpleNamespace(**{**vars(artifacts), "engine": engine})


def small_pieces(monkeypatch, artifacts, clips: int) -> None:
    world = artifacts.recipe.data.world
    monkeypatch.setattr("teachers.machine.PIXELS_AT_ONCE", clips * world.num_frames * world.size[0] * world.size[1])


def test_pieces_are_the_whole(artifacts, tmp_path, monkeypatch):
    whole = clip_sets.draw(artifacts, tmp_path / "whole", "test", NUM, samples=3)
    clips = artifacts.source.draw(artifacts.recipe.eval.condition_seed, "test", NUM)
    assert torch.equal(whole.clips.video, clips.video)
    assert whole.clips.text == clips.text
    small_pieces(monkeypatch, artifacts, 2)
    parts = clip_sets.draw(artifacts, tmp_path / "parts", "test", NUM, samples=3)
    assert len(list((tmp_path / "parts").rglob("*.safetensors"))) == 4
    assert torch.equal(parts.clips.video, clips.video)
    assert torch.equal(parts.clips.audio, clips.audio)
    assert all(torch.equal(parts.clips.labels[name], value) for name, value in clips.labels.items())
    assert (parts.decoded.int() - whole.decoded.int()).abs().max() <= 1
    assert torch.equal(parts.samples, clips.video[:3])
    rows = torch.tensor([5, 0, 6])
    ours, theirs = parts.conditions.index(rows), artifacts.encoders.of_clips(clips)[1].index(rows)
    assert isinstance(ours, Conditions)
    assert set(ours.features) == set(theirs.features)
    assert all(torch.allclose(ours.features[name], x, atol=1e-5) for name, x in theirs.features.items())
    picked = parts.conditions.select(rows).index(slice(1, 3))
    assert torch.equal(picked.text, ours.text[1:])


def test_a_source_of_ones_own_makes_a_set_once(artifacts, tmp_path, monkeypatch):
    """Not once a piece: it makes sets whole."""
    small_pieces(monkeypatch, artifacts, 2)
    calls: list[str] = []

    class Own(ClipSource):
        def clips(self, seed: int, name: str, num: int) -> Clips:
            calls.append(name)
            return artifacts.source.draw(seed, name, num)

    source = Own(artifacts.source.config)
    own = SimpleNamespace(**{**vars(artifacts), "source": source})
    found = clip_sets.draw(own, tmp_path, "test", NUM)
    assert calls == ["test"]
    assert source._whole is None, "nothing is held once the set is there"
    clips = artifacts.source.draw(artifacts.recipe.eval.condition_seed, "test", NUM)
    assert torch.equal(found.clips.video, clips.video)
    assert torch.equal(found.clips.audio, clips.audio)


def test_two_ranks_make_half_each_and_nothing_is_made_twice(artifacts, tmp_path, monkeypatch):
    small_pieces(monkeypatch, artifacts, 2)
    drawn: list[range] = []
    draw = artifacts.source.draw
    monkeypatch.setattr(
        artifacts.source, "draw", lambda *words, rows: (drawn.append(rows), draw(*words, rows=rows))[1], raising=False
    )
    looked: dict[str, list[int]] = {}
    second, first = of_rank(artifacts, 1, 2, looked), of_rank(artifacts, 0, 2, looked)
    with pytest.raises(Exception, match="no tensor file"):  # there is no barrier here: the other half is not made yet
        clip_sets.draw(second, tmp_path, "test", NUM)
    assert drawn == [range(2, 4), range(6, 7)]
    drawn.clear()
    found = clip_sets.draw(first, tmp_path, "test", NUM)
    assert drawn == [range(0, 2), range(4, 6)]
    assert torch.equal(found.clips.video, draw(artifacts.recipe.eval.condition_seed, "test", NUM).video)
    drawn.clear()
    looked.clear()
    assert len(clip_sets.draw(second, tmp_path, "test", NUM).clips.text) == NUM
    assert drawn == [], "a stage that was killed goes on"
    made = {file.relative_to(tmp_path).parts[0] for file in tmp_path.rglob("*.safetensors")}
    assert made <= set(record.SCRATCH), "deleted when the stage is done"


def test_clips_are_scored_at_a_small_size():
    video = torch.randint(0, 256, (2, 3, 5, 512, 512), dtype=torch.uint8)
    small = clip_sets.scored(video)
    assert small.shape == (2, 3, 5, 128, 128)
    assert torch.equal(small, F.avg_pool2d(video.flatten(0, 2).float()[:, None], 4).round().byte().view(small.shape))
    assert clip_sets.scored(video[..., :480, :416]).shape[-2:] == (128, 112)
    same = video[..., :64, :128]
    assert clip_sets.scored(same) is same


def test_large_clips_are_generated_one_at_a_time(artifacts):
    real = load_recipe(RECIPES / "livetalk.yaml", ["teacher.path=anywhere"])
    assert clip_sets.generated_at_once(real, spec_of(real)) == 1
    assert clip_sets.generated_at_once(artifacts.recipe, artifacts.spec) == artifacts.recipe.eval.batch_size
    few = replace(artifacts.recipe, eval=replace(artifacts.recipe.eval, batch_size=2))
    assert clip_sets.generated_at_once(few, artifacts.spec) == 2
