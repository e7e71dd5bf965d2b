"""Conditions that the package does not know go from the data source into shards, batches, training and its guidance drop."""

from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load_file

from distill.data import latents
from distill.data.encoders import fitted_fingerprint
from distill.data.procedural.render import WorldConfig
from distill.data.procedural.source import DataConfig
from distill.methods import Batch, check_drop, dmd, drop_conditions, flow_matching, forcing
from distill.methods.rollout import of_length
from distill.pipeline.generate import solve_states
from teachers.codecs.linear import CodecConfig, to_float
from teachers.conditions import FEATURES, Feature
from teachers.encoders.small import AudioConfig, TextConfig
from teachers.errors import UserError
from teachers.flow import sigma_grid
from teachers.guidance import Guidance
from teachers.networks.kind import AvatarTeacher
from tests.support.tiny import MOOD, Ranks, a_student, declared, make_net, rng, some_conditions, some_latents, some_mood

WORLD = WorldConfig(num_train=6, shard_clips=4)
DATA = DataConfig(
    world=WORLD, codec=CodecConfig(), audio=AudioConfig(), text=TextConfig(vocab_size=300, num_layers=1), text_steps=2
)
FRAMES = DATA.latent_frames


class MoodySource:
    """The procedural world, each of whose clips has a mood."""

    def __init__(self, change=lambda features: features):
        self.world, self.change = DATA.open(), change

    def __getattr__(self, name):
        return getattr(self.world, name)

    def train(self, seed, numbers, workers=0):
        for number, clips in zip(numbers, self.world.train(seed, numbers), strict=True):
            yield replace(clips, features=self.change(some_mood(len(clips.video), FRAMES, seed=number)))


class MoodyTeacher(AvatarTeacher):
    """A teacher that reads every mood."""

    def forward(self, x, sigma, conditions):
        x0 = super().forward(x, sigma, conditions)
        mood = conditions.mood.mean(dim=1).view(-1, 1, 1, 1, 1) + conditions.idol.mean()
        return x0 + mood + conditions.mood_track.mean(dim=2)[:, None, :, None, None] + conditions.scenery.mean()


class Halves(torch.nn.Module):
    """An image encoder: brightness of the left and the right half, as tokens, beside the noise, and as a region."""

    def forward(self, image, codec, num_frames):
        half = image.shape[-1] // 2
        sides = torch.stack([image[..., :half].mean(dim=(1, 2, 3)), image[..., half:].mean(dim=(1, 2, 3))], dim=1)
        grid = sides[:, None, None, None].expand(-1, 1, num_frames, 2, -1)
        return {"image": sides.unsqueeze(1), "beside": grid, "regions": grid[:, :, 0]}


@dataclass(frozen=True)
class HalvesConfig:
    gives = ("image", "beside", "regions")

    def load(self) -> Halves:
        return Halves()


def test_features_of_the_image_are_stored_and_made_anew_for_its_mirror_image(tmp_path):
    data = replace(DATA, image=HalvesConfig(), precision="bf16")
    source = data.open()
    latents.prepare(data, source, 0, tmp_path, Ranks())
    stored = load_file(latents.files_of(tmp_path, "shard", source.num_shards)[0])
    kept = (torch.bfloat16, torch.float16, torch.float32)
    assert tuple(stored[name].dtype for name in HalvesConfig.gives) == kept
    given = latents.load_train_set(tmp_path, fitted_fingerprint(tmp_path)).batch(torch.tensor([1, 5])).conditions
    clip = next(iter(source.train(0, [0]))).rows(range(1, 2))
    own = Halves()(to_float(clip.video[:, :, 0]), None, FRAMES)
    for name, value in own.items():
        found, mirrored = getattr(given, name)
        assert found.dtype == torch.float32
        assert torch.allclose(found, value[0], atol=4e-3)
        assert torch.allclose(mirrored, value[0].flip(-1), atol=4e-3)
    assert (own["image"][0, 0, 0] - own["image"][0, 0, 1]).abs() > 0.01, "the halves differ"


def test_who_is_where_is_flipped_and_may_be_the_source_s_own(tmp_path):
    """Regions of two speakers: of a clip's mirror image they are mirrored, for nothing in the image says who is who."""
    regions = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    source = MoodySource(lambda given: {"regions": regions.expand(len(given["mood"]), -1, -1, -1)})
    with declared(*MOOD):
        latents.prepare(DATA, source, 0, tmp_path, Ranks())
        given = latents.load_train_set(tmp_path, fitted_fingerprint(tmp_path))
        own, mirrored = given.batch(torch.tensor([1, 5])).conditions.regions
    assert torch.equal(own, regions)
    assert torch.equal(mirrored, regions.flip(-1))


def test_a_source_s_own_features_are_trained_on(tmp_path):
    """Through the shards into a batch, images of a mirrored clip mirrored."""
    with declared(*MOOD):
        latents.prepare(DATA, MoodySource(), 0, tmp_path, Ranks())
        pool = latents.load_train_set(tmp_path, fitted_fingerprint(tmp_path))
        given = pool.batch(torch.tensor([1, 5])).conditions  # a clip of the first shard and its mirror image
        for name, value in some_mood(4, FRAMES, seed=0).items():
            own, mirrored = getattr(given, name)
            assert torch.equal(own, value[1]), name
            assert torch.equal(mirrored, value[1].flip(-1) if name in ("scenery", "idol") else value[1]), name
    with pytest.raises(UserError, match=r"unknown condition '(mood|mood_track|scenery|idol)'"):
        latents.load_train_set(tmp_path, fitted_fingerprint(tmp_path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda given: given | {"mood": given["mood"][1:]}, r"mood \(3, 7\) has 3 clips, the video has 4"),
        (lambda given: given | {"mood_track": given["mood_track"][:, 1:]}, "has 7 latent frames, the video has 8"),
        (lambda given: given | {"mod": given["mood"]}, "unknown condition 'mod': did you mean 'mood'"),
        (lambda given: {"text": given["mood"]}, "Clips.features: text is made by the encoders"),
    ],
)
def test_features_that_do_not_fit_the_clips_are_one_line(change, words, tmp_path):
    with declared(*MOOD), pytest.raises(UserError, match=words) as error:
        latents.prepare(DATA, MoodySource(change), 0, tmp_path, Ranks())
    assert "\n" not in str(error.value)


def test_training_drops_what_is_configured():
    """In the order of the table, whatever that of the config; nothing is drawn for what is absent or never dropped."""
    with declared(*MOOD):
        given = replace(some_conditions(64, 8), **some_mood(64, 8))
        dropped = drop_conditions(given, {"mood": 0.5, "audio": 0.25}, rng(1))
        other = drop_conditions(given, {"audio": 0.25, "mood": 0.5, "pose": 0.9, "text": 0.0}, rng(1))
        for name in given.features:
            assert torch.equal(getattr(dropped, name), getattr(other, name))
        assert 20 < sum(not row.any() for row in dropped.mood) < 44
        assert 6 < sum(not row.any() for row in dropped.audio) < 28
        assert torch.equal(dropped.mood_track, given.mood_track)
        for config in (flow_matching.Config, forcing.Config):
            assert config(drop={"mood": 0.5}).drop == {"mood": 0.5}
    for config in (flow_matching.Config, forcing.Config):
        with pytest.raises(UserError, match="unknown condition 'mood'"):
            config(drop={"mood": 0.5})
    with pytest.raises(UserError, match=r"forcing\.drop\.text: got 1\.5; it is a probability"):
        check_drop("forcing.drop", {"text": 1.5})


def test_every_method_hands_a_feature_on():
    """Flow matching, DMD and the solver reach the teacher's reading of it: its gradient, and another value another solution."""
    with declared(*MOOD):
        teacher, given = MoodyTeacher(make_net()), replace(some_conditions(), **some_mood(2, 8))
        given.features["mood"].requires_grad_()
        batch = Batch(conditions=given, x0=some_latents())
        value = flow_matching.FlowMatching(flow_matching.Config(drop={}), teacher).loss(
            "teacher", batch, rng(1), rng(2)
        )
        assert torch.autograd.grad(value.value, given.mood)[0].any()
        method = dmd.DMD(dmd.Config(guidance=Guidance(text=2.0)), a_student(), teacher, MoodyTeacher(make_net(2)))
        value = method.loss("fake_score", batch, rng(1), rng(2)).value
        assert torch.autograd.grad(value, given.mood)[0].any()
        assert method.loss("student", batch, rng(1), rng(2)).value.requires_grad
        noise, grid = some_latents(), sigma_grid(2, 3.0)
        for name in ("mood", "mood_track", "scenery", "idol"):
            other = replace(given, **{name: getattr(given, name) + 1})
            one, two = (
                solve_states(teacher, c, noise, grid, (2,), Guidance(text=2.0, audio=3.0)) for c in (given, other)
            )
            assert (one - two).abs().mean() > 1e-3, name


def test_guidance_drops_a_feature_that_follows_the_text():
    tone = Feature(name="tone", clock="stream", follows="text")
    with declared(tone):
        given = replace(some_conditions(), tone=torch.ones(2, 3))
        full, nothing, middle = Guidance(text=2.0, audio=3.0).branches(given)
        assert [bool(c.tone.any()) for c in (full, nothing, middle)] == [True, False, True]
    assert "tone" not in FEATURES


def test_a_longer_stream_goes_on_with_the_next_row_s():
    with declared(*MOOD):
        given = replace(some_conditions(3, 4), **some_mood(3, 4))
        longer = of_length(given, 9)
        expected = torch.cat(
            [given.mood_track, given.mood_track.roll(-1, 0)[:, 1:], given.mood_track.roll(-2, 0)[:, 1:]], 1
        )
        assert torch.equal(longer.mood_track, expected[:, :9])
        assert longer.scenery.shape[2] == longer.audio.shape[1] == 9
        assert torch.equal(longer.mood, given.mood)
        assert torch.equal(of_length(given, 2).scenery, given.scenery[:, :, :2])
