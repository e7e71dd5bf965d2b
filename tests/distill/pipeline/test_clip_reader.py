"""Rollouts that are decoded and scored in training: the metrics' own numbers, what is refused, metrics of the user's, hacking."""

import copy
import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from distill.compose import RECIPES
from distill.data import latents
from distill.data.encoders import load_encoders
from distill.methods import Batch
from distill.methods.rewards import Reward
from distill.pipeline import clip_reader
from distill.pipeline.clip_reader import ClipReader
from distill.pipeline.evaluation.reward_watch import hacked
from distill.pipeline.stages import facts, stages
from distill.recipe import Recipe, load_recipe, spec_of, to_dict
from eval.embedded.extractors import Probes
from eval.metrics.identity import Identity
from eval.metrics.lip_sync import SyncNetSync
from eval.metrics.sharpness import Sharpness
from eval.metrics.sync import Sync, mouth_sync
from teachers.config import convert
from teachers.errors import UserError
from tests.support.tiny import Ranks, fitted_codec

SYNC = Reward(metric=Sync(max_lag=4, sound="own"))
PUBLISHED = Reward(metric=SyncNetSync(resample="nearest", max_lag=15, crop_scale=0.4, sound="own"), score="sync_c")
BRIGHTNESS = """
from dataclasses import dataclass
from eval.metric import Metric, Score

@dataclass(frozen=True, kw_only=True)
class Brightness(Metric):
    name = "brightness"

    def features(self, clip, real, networks):
        return {"luma": clip.video.float().mean() / FULL}

    def score(self, features, reference):
        return {"brightness": Score.over([clip["luma"] for clip in features])}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run's artifacts as far as a reader needs them, and four clips of the world."""
    recipe = load_recipe(RECIPES / "dmd_avatar.yaml", ["method@distill=dmd_reward"])
    folder = tmp_path_factory.mktemp("data")
    latents._take_over(recipe.data, folder)
    encoders = load_encoders(recipe.data, folder)
    given = {"engine": Ranks(), "encoders": encoders, "recipe": recipe, "spec": spec_of(recipe)}
    artifacts = SimpleNamespace(**given, probes=Probes.load(recipe.eval.probes))
    return artifacts, recipe.data.open().draw(3, "rewards", 4)


def hearing(artifacts, **changes):
    """The same with other settings of the data."""
    data = replace(artifacts.recipe.data, **changes)
    return SimpleNamespace(**vars(artifacts) | {"recipe": replace(artifacts.recipe, data=data)})


@pytest.mark.slow
def test_rewards_are_the_metrics_own_numbers_of_each_clip(world):
    artifacts, clips = world
    reader = ClipReader(artifacts, 4)
    x0, conditions = artifacts.encoders.of_clips(clips)
    rewards = artifacts.recipe.distill.method.rewards
    reader.check(rewards, None)
    found = reader.read(rewards, x0, conditions, Batch(conditions))
    decoded = artifacts.encoders.decode(x0)
    reading, audio = artifacts.probes.read(decoded), artifacts.encoders.audio_encoder(clips.voice, 0, 31)
    mouth = artifacts.probes.mouth_from_audio(audio)
    for i in range(4):
        sync = mouth_sync(reading.mouth[i : i + 1], mouth[i : i + 1])["sync"]
        assert float(found[0, i]) == pytest.approx(sync, abs=1e-4)
        faces = reading.identity[i].double()
        distance = (faces[1:] - faces[0]).square().sum(1).mean()
        assert float(found[1, i]) == pytest.approx(1 - float(distance) / (2 * faces.shape[1]), abs=2e-2)
    assert list(rewards) == ["sync", "identity", "sharpness"]
    assert found[0].mean() > 0.6
    other = conditions.roll_rows("audio")
    assert reader.read({"sync": SYNC}, x0, other, Batch(other)).mean() < 0.5
    kept = Batch(conditions, sound=clips.voice)
    assert torch.allclose(reader.read({"sync": SYNC}, x0, conditions, kept), found[:1], atol=1e-3)


def test_the_gradient_is_that_of_the_whole_decode_and_raises_the_metrics_own_number(world):
    """Of two rewards with factors, for each clip its own; and a clip that a metric refuses to score has none."""
    artifacts, clips = world
    reader = ClipReader(artifacts, 4)
    x0, conditions = artifacts.encoders.of_clips(clips)
    width = Reward(metric=Sync(max_lag=4, sound="own"), score="sync_width")
    rewards, batch = {"sync": (SYNC, 1.0), "width": (width, -0.5)}, Batch(conditions)
    found = reader.gradient(rewards, x0, conditions, batch)
    leaf, probes = x0.clone().requires_grad_(), artifacts.probes
    rows = conditions.features["audio"].flatten(1, 2)[:, artifacts.spec.codec.stride - 1 :]
    audio = probes.mouth_from_audio(rows)[:, 1:].double()
    with torch.enable_grad():
        mouth = probes.mouth_in(artifacts.encoders.codec.decode(leaf))[:, 1:].double()
        a, v = (x - x.mean(1, keepdim=True) for x in (audio, mouth))
        r = (a * v).sum(1) / (a.square().sum(1) * v.square().sum(1)).sqrt()
        (r[:, 0] - 0.5 * r[:, 1]).sum().backward()
    assert torch.allclose(found, leaf.grad, rtol=1e-3, atol=1e-3 * float(leaf.grad.abs().max()))
    other = conditions.roll_rows("audio")  # the mouths follow another sound
    before = reader.read({"sync": SYNC}, x0, other, Batch(other))[0]
    uphill = reader.gradient({"sync": (SYNC, 1.0)}, x0, other, Batch(other))
    after = reader.read({"sync": SYNC}, x0 + 0.03 * uphill / uphill.square().mean().sqrt(), other, Batch(other))[0]
    assert (after > before).all()
    assert float((after - before).mean()) > 0.01
    faceless = Batch(conditions, sound=clips.voice)
    with pytest.raises(UserError, match="no face box"):  # a value and no gradient would be a fault of the metric
        reader.gradient({"lips": (PUBLISHED, 1.0)}, x0, conditions, faceless)
    assert reader.read({"lips": PUBLISHED}, x0, conditions, faceless).isnan().all()
    assert torch.equal(reader.gradient({"lips": (PUBLISHED, 1.0)}, x0, conditions, faceless), torch.zeros_like(x0))


def test_values_are_read_in_fp32_whatever_the_engine_computes_in(world):
    artifacts, clips = world
    reader, (x0, conditions) = ClipReader(artifacts, 4), artifacts.encoders.of_clips(clips)
    given = ({"sync": SYNC}, x0, conditions, Batch(conditions))
    plain, slope = reader.read(*given), reader.gradient({"sync": (SYNC, 1.0)}, *given[1:])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reader.read(*given), plain)
        assert torch.equal(reader.gradient({"sync": (SYNC, 1.0)}, *given[1:]), slope)
    assert torch.equal(reader.gradient({}, *given[1:]), torch.zeros_like(x0))


@pytest.mark.parametrize(("device", "sizes"), [("cpu", [2, 2]), ("cuda", [1, 1, 1, 1])])
def test_a_graph_is_held_of_one_clip_at_a_time_but_for_a_cpu(world, monkeypatch, device, sizes):
    """Decoding with a graph takes far more than `clips_at_once`, which is of decoding alone, allows for."""
    artifacts, clips = world
    reader, (x0, conditions) = ClipReader(artifacts, 4), artifacts.encoders.of_clips(clips)
    monkeypatch.setattr(clip_reader, "clips_at_once", lambda *_: 2)
    seen = []
    monkeypatch.setattr(clip_reader, "pull_back", lambda _, latents, *rest: seen.append(len(latents)) or latents)
    reader.engine = SimpleNamespace(device=SimpleNamespace(type=device))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    reader.gradient({"sync": (SYNC, 1.0)}, x0, conditions, Batch(conditions))
    assert seen == sizes


def test_a_gradient_may_go_through_another_codec_of_the_same_latents(world):
    artifacts, clips = world
    reader, codec = ClipReader(artifacts, 4), copy.deepcopy(artifacts.encoders.codec)
    with torch.no_grad():
        next(codec.decoder.parameters()).mul_(0.5)
    x0, conditions = artifacts.encoders.of_clips(clips)
    given = ({"sync": (SYNC, 1.0)}, x0, conditions, Batch(conditions))
    plain, values = reader.gradient(*given), reader.read({"sync": SYNC}, *given[1:])
    reader.differentiate_through(None)
    assert torch.equal(reader.gradient(*given), plain)
    reader.differentiate_through(SimpleNamespace(load=lambda folder, height, width: codec))
    assert not torch.allclose(reader.gradient(*given), plain, rtol=0.1)
    assert torch.equal(reader.read({"sync": SYNC}, *given[1:]), values)
    with pytest.raises(UserError, match=r"method\.decoder: \(stride, patch, channels\) is"):
        reader.differentiate_through(SimpleNamespace(load=lambda folder, height, width: fitted_codec()))


def test_a_clip_may_be_compared_with_the_datas_own(world):
    """A relative sharpness needs the real clip, which is decoded too."""
    artifacts, clips = world
    reward, (x0, conditions) = Reward(metric=Sharpness(relative=True)), artifacts.encoders.of_clips(clips)
    own = x0.clone()
    own[1] = x0[2]
    found = ClipReader(artifacts, 4).read({"sharpness": reward}, own, conditions, Batch(conditions, x0))
    assert reward.compares
    assert not SYNC.compares
    assert torch.allclose(found[0, [0, 2, 3]], torch.ones(3, dtype=torch.float64), atol=1e-6)
    assert abs(float(found[0, 1]) - 1) > 1e-3


@pytest.mark.parametrize(
    ("reward", "changes", "face", "batch", "words"),
    [
        (PUBLISHED, {}, (0.2, 0.2, 0.8, 0.9), 4, "rewards.one: lip_sync needs sound; set data.keep_sound=true"),
        (PUBLISHED, {"keep_sound": True}, None, 4, "rewards.one: lip_sync needs box; give method.face"),
        (PUBLISHED, {"keep_sound": True}, (0.2, 0.2, 0.8, 0.9), 4, "syncnet_v2.model"),
        (SYNC, {}, None, 1, "rewards.one: 1 clip in an update"),
    ],
)
def test_what_a_reward_lacks_is_named(world, monkeypatch, tmp_path, reward, changes, face, batch, words):
    monkeypatch.setenv("AVATAR_DISTILL_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match=words):
        ClipReader(hearing(world[0], **changes), batch).check({"one": reward}, face)


@pytest.mark.slow
def test_a_metric_of_the_users_is_a_reward(world, tmp_path):
    """`name: my_file:Thing` beside the recipe; what fails in it is its reason, by file and line."""
    artifacts, clips = world
    for full, broken in (("255", False), ("(0 // 0)", True)):
        (tmp_path / f"own{int(broken)}.py").write_text(BRIGHTNESS.replace("FULL", full))
        name = f"{tmp_path / f'own{int(broken)}.py'}:Brightness"
        words = ["method@distill=dmd_reward", f'distill.method.rewards={{luma: {{metric: {{name: "{name}"}}}}}}']
        rewards = load_recipe(RECIPES / "dmd_avatar.yaml", words).distill.method.rewards
        reader, (x0, conditions) = ClipReader(artifacts, 4), artifacts.encoders.of_clips(clips)
        reader.check(rewards, None)
        found = reader.read(rewards, x0, conditions, Batch(conditions))
        if broken:
            assert found[-1].isnan().all()
            assert f"{tmp_path}/own1.py:10: ZeroDivisionError" in reader.reasons["luma"]
        else:
            luma = artifacts.encoders.decode(x0).float().mean((1, 2, 3, 4)) / 255
            assert torch.allclose(found[-1].float(), luma, atol=1e-6)


def test_a_recipe_with_rewards_reads_back_and_knows_the_users_file(tmp_path):
    """What a run saves is the same recipe; an edit of the metric's file is another fingerprint."""
    file, found = tmp_path / "mine.py", []
    for luma in ("255", "256"):
        file.write_text(BRIGHTNESS.replace("FULL", luma))
        words = [
            "method@distill=dmd_reward",
            f'distill.method.rewards={{luma: {{metric: {{name: "{file}:Brightness"}}}}}}',
        ]
        recipe = load_recipe(RECIPES / "dmd_avatar.yaml", words)
        assert to_dict(convert(Recipe, to_dict(recipe))) == to_dict(recipe)
        stage = next(stage for stage in stages(recipe) if stage.name == "distill")
        found.append(facts(stage, recipe, {}))
        assert "extractors" in stage.inputs
    assert found[0] != found[1]


def logged(**ends: tuple[float, float]) -> list[dict[str, float]]:
    """Eight student updates in which each reward goes from one number to another; one standard deviation is 0.1."""
    steps = [i / 7 for i in range(8)]
    values = {name: [a + (b - a) * t for t in steps] for name, (a, b) in ends.items()}
    rows = [{f"student/reward_{k}": v[i] for k, v in values.items()} for i in range(8)]
    return [row | {key.replace("reward", "spread"): 0.1 for key in row} for row in rows]


def watched(sync=(0.8, 0.9), identity=(0.9, 0.9), start=None, now=None, wrong=()) -> list[str]:
    rewards = {"sync": SYNC, "identity": Reward(metric=Identity(), weight=0.0)}
    return hacked(rewards, logged(sync=sync, identity=identity), start or {}, now or {}, wrong)


def test_a_hacked_reward_is_named():
    """It rises, and something that was not rewarded gets worse: a watched reward, a score of the validation, or health."""
    assert watched() == []
    (line,) = watched(identity=(0.9, 0.6))
    assert line.startswith(
        "reward sync is hacked: it rose from 0.807 to 0.893 while these got worse: identity 0.879 -> 0.621"
    )
    assert "fvd 20 -> 30" in watched(start={"fid": 5.0, "fvd": 20.0}, now={"fid": 5.5, "fvd": 30.0})[0]
    assert "sharpness 0.9 -> 1.4" in watched(start={"sharpness": 0.9}, now={"sharpness": 1.4})[0]
    assert "black frames" in watched(wrong=["black frames 0.2"])[0]
    assert watched(sync=(0.8, 0.81), identity=(0.9, 0.6)) == [], "nothing was gained"
    assert watched(sync=(0.9, 0.8), identity=(0.9, 0.6)) == [], "the reward fell"
    assert watched(start={"sync": 0.9}, now={"sync": 0.8}) == [], "it is the reward itself"
    assert hacked({"sync": SYNC}, [], {}, {}, ["black frames"]) == [], "nothing was logged"


def test_less_of_a_reward_of_negative_weight_is_a_gain():
    rewards = {
        "blur": Reward(metric=Sharpness(relative=False), weight=-1.0),
        "identity": Reward(metric=Identity(), weight=0.0),
    }
    rows = logged(blur=(0.9, 0.6), identity=(0.9, 0.5))
    assert [line.split()[1] for line in hacked(rewards, rows, {}, {}, ())] == ["blur"]
    assert math.isclose(rewards["blur"].value({"sharpness": 2.0}), 2.0)
