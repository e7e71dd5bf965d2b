"""The convolutional codec: exact on a stream, trained with the same bits across a kill, taken over from a given folder."""

from dataclasses import replace

import pytest
import torch

from distill.data import codec_training, latents
from distill.data.codec_training import fit_codec, measure, shards_for
from distill.data.encoders import load_encoders
from distill.data.procedural.render import WorldConfig
from distill.data.procedural.source import DataConfig
from teachers.codecs.convolutional import ConvCodec, ConvCodecConfig, ConvTrainConfig
from teachers.encoders.small import AudioConfig, TextConfig
from teachers.errors import UserError
from teachers.files import load_tensors
from tests.support.tiny import Ranks, randn

CPU = torch.device("cpu")
SIZES = {"stride": 2, "patch": 8, "channels": 6, "widths": (8, 16), "blocks": (1, 1)}
TRAIN = ConvTrainConfig(num_steps=5, batch=2, window=3, lr=2e-3)
SMALL = ConvCodecConfig(**SIZES, train=TRAIN)


def a_codec(seed: int = 0) -> ConvCodec:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        codec = ConvCodec(SMALL)
        for parameter in codec.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    codec.mean.add_(0.3)
    codec.std.mul_(1.7)
    return codec.double().eval()


def squares() -> torch.Tensor:
    """Squares that move, uint8 [4, 3, 9, 16, 24]."""
    video = torch.zeros(4, 3, 9, 16, 24, dtype=torch.uint8)
    for i in range(4):
        for t in range(9):
            video[i, i % 3, t, 2 + i : 8 + i, t : t + 6] = 255
    return video


def test_shapes_and_streams():
    codec, video = a_codec(), randn(2, 3, 9, 16, 24, seed=1).double().clamp(-1, 1)
    latents = codec.encode(video)
    assert latents.shape == (2, 6, 5, 2, 3)
    assert torch.allclose(codec.encode(video[:, :, :5]), latents[:, :, :3], atol=1e-12), "the encoder is not causal"
    whole = codec.decode(latents)
    assert whole.shape == video.shape
    state, parts = None, []
    for chunk in latents.split([1, 2, 2], dim=2):
        pixels, state = codec.decode_chunk(chunk, state)
        parts.append(pixels)
    assert [part.shape[2] for part in parts] == [1, 4, 4]
    assert torch.allclose(torch.cat(parts, dim=2), whole, atol=1e-6)
    alone, _ = codec.decode_chunk(latents[:, :, 1:3])
    assert torch.allclose(alone[:, :, 1:], parts[1][:, :, 2:], atol=1e-6), "more than the latent before is read"
    assert not torch.allclose(alone[:, :, 0], parts[1][:, :, 1], atol=1e-3), "the latent before is not read"


def test_a_latent_is_seen_in_its_own_frames_and_those_of_the_next():
    codec, latents = a_codec(), randn(1, 6, 5, 2, 2, seed=2).double()
    changed = latents.clone()
    changed[:, :, 2] += 1
    moved = (codec.decode(changed) - codec.decode(latents)).abs().amax(dim=(0, 1, 3, 4)) > 0
    assert moved.tolist() == [False] * 3 + [True] * 4 + [False] * 2


def test_gradients_flow_to_latents():
    codec, latents = a_codec().requires_grad_(False), randn(1, 6, 3, 2, 2, seed=3).double().requires_grad_(True)
    (0.1 * codec.decode(0.1 * latents)).sum().backward()
    assert bool((latents.grad.abs().amax(dim=(0, 1, 3, 4)) > 0).all())


def test_training_reconstructs_and_goes_on_after_a_kill_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(codec_training, "SAVE_EVERY", 2)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    scores = fit_codec(SMALL, [squares()], squares(), 0, tmp_path / "a", CPU)
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["codec.json", "codec.safetensors"]
    assert measure(SMALL.load(tmp_path / "a", 16, 24), squares()) == pytest.approx(scores["reconstruction"], rel=1e-4)
    draw, seen = codec_training.windows, []

    def stumbling(*args):
        seen.append(args)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(codec_training, "windows", stumbling)
    with pytest.raises(KeyboardInterrupt):
        fit_codec(SMALL, [squares()], squares(), 0, tmp_path / "b", CPU)
    assert fit_codec(SMALL, [squares()], squares(), 0, tmp_path / "b", CPU) == scores
    assert len(seen) == 4 + 3, "it went on from step 2"
    one, two = (load_tensors(tmp_path / name / "codec.safetensors") for name in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_more_steps_reconstruct_better(tmp_path):
    found = []
    for steps in (1, 60):
        folder = tmp_path / str(steps)
        folder.mkdir()
        config = replace(SMALL, train=replace(TRAIN, num_steps=steps))
        found.append(fit_codec(config, [squares()], squares(), 0, folder, CPU)["reconstruction"]["psnr_db"])
    assert found[1] > found[0] + 3


def test_the_decoder_is_trained_on_over_latents_that_stay(tmp_path):
    """As for Stable Diffusion's ft-MSE decoders: teachers of the codec's latents go on with the better decoder."""
    train = replace(TRAIN, num_steps=20)
    for name, config in (
        ("a", replace(SMALL, train=train)),
        ("one run", replace(SMALL, train=replace(train, decoder_steps=40))),
    ):
        (tmp_path / name).mkdir()
        fit_codec(config, [squares()], squares(), 0, tmp_path / name, CPU)
    further = ConvCodecConfig(**SIZES, path=tmp_path / "a", train=replace(TRAIN, num_steps=0, decoder_steps=40))
    (tmp_path / "b").mkdir()
    scores = fit_codec(further, [squares().flip(0)[:2]], squares(), 0, tmp_path / "b", CPU)
    assert list(scores) == ["decoder"]
    video = randn(1, 3, 9, 16, 24, seed=4).clamp(-1, 1)
    one, two, three = (SMALL.load(tmp_path / name, 16, 24) for name in ("a", "b", "one run"))
    assert torch.equal(one.encode(video), two.encode(video)), (
        "the latents, and their scale, are those of the given codec"
    )
    assert torch.equal(one.encode(video), three.encode(video))
    for better in (two, three):
        assert measure(better, squares())["psnr_db"] > measure(one, squares())["psnr_db"] + 0.5


def test_the_data_stage_trains_it_or_takes_it_over(tmp_path):
    world = WorldConfig(resolution=16, num_frames=9, num_train=8, shard_clips=4)
    parts = {"world": world, "audio": AudioConfig(), "text_steps": 1}
    text = TextConfig(vocab_size=300, dim=16, num_layers=1, num_heads=2)
    trained = DataConfig(codec=SMALL, text=text, **parts)
    given = DataConfig(
        codec=ConvCodecConfig(**SIZES, path=tmp_path / "a"), text=replace(text, path=tmp_path / "a"), **parts
    )
    found = {}
    for name, config in (("a", trained), ("b", given)):
        (tmp_path / name).mkdir()
        found[name] = latents.prepare(config, config.open(), 0, tmp_path / name, Ranks())
    assert found["a"]["codec_psnr_db"] == pytest.approx(found["b"]["codec_psnr_db"], abs=1e-3)
    one, two = (load_encoders(config, tmp_path / n) for n, config in (("a", trained), ("b", given)))
    assert torch.equal(one.read(["a person nods"]), two.read(["a person nods"]))
    assert one.codec.state_dict().keys() == two.codec.state_dict().keys()
    assert all(torch.equal(value, two.codec.state_dict()[name]) for name, value in one.codec.state_dict().items())


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"patch=16, 2 widths, 2 blocks; give one of each per level"):
        ConvCodecConfig(**SIZES | {"patch": 16})
    with pytest.raises(UserError, match=r"codec\.train: got num_steps=0"):
        ConvTrainConfig(num_steps=0)
    with pytest.raises(UserError, match=r"codec\.train: num_steps=0 trains no encoder; give codec\.path=FOLDER"):
        ConvCodecConfig(**SIZES, train=ConvTrainConfig(num_steps=0, decoder_steps=2))
    with pytest.raises(UserError, match=r"conv has no weights; give path=FOLDER, or train\.num_steps"):
        shards_for(ConvCodecConfig(**SIZES))
    with pytest.raises(UserError, match=r"codec\.safetensors"):
        SMALL.load(tmp_path, 16, 16)
    with pytest.raises(UserError, match="video"):
        a_codec().encode(randn(1, 3, 4, 16, 16).double())
