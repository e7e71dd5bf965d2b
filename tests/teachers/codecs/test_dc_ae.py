"""MIDAS' codec: causal both ways, chunks that equal the whole, a bounded state, three stages that train what they should."""

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from distill.compose import RECIPES
from distill.data import codec_training
from distill.data.codec_training import fit_codec, measure, multiscale, windows
from distill.pipeline.evaluation.health import seam_frames
from distill.recipe import load_recipe
from students.serving.session import Session
from students.serving.snapshot import load_session, save_session
from students.spec import Spec
from students.weights.checkpoint import load_student, save_student
from teachers.codecs.dc_ae import DCAE, DCAEConfig, FitConfig, TemporalCache, diffusers_config
from teachers.codecs.linear import CodecConfig
from teachers.config import convert, to_plain
from teachers.errors import UserError
from tests.support.tiny import MIDAS, a_bundle, randn, randomise, some_sound

CPU = torch.device("cpu")
SIZES = {
    "patch": 4,
    "channels": 8,
    "widths": (16, 16, 32),
    "encoder_layers": (0, 1, 1),
    "decoder_layers": (0, 1, 2),
    "attention_stages": 1,
    "decoder_norm": "rms_norm",
    "temporal_window": 4,
}
SMALL = DCAEConfig(**SIZES, fit=FitConfig(steps=(3, 3, 3), batch=8, window=4, shards=1))


@lru_cache(maxsize=1)
def a_codec() -> DCAE:
    """Random weights, the temporal modules' among them, and a scale that is not 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec = DCAE(SMALL)
    randomise(codec.temporal, seed=1, scale=0.7)
    codec.mean.copy_(0.2 * randn(8, seed=2))
    codec.std.copy_(0.5 + randn(8, seed=3).abs())
    return codec.eval().requires_grad_(False)


def some_latents(batch: int = 2, frames: int = 19, seed: int = 0) -> torch.Tensor:
    return randn(batch, 8, frames, 4, 6, seed=seed + 5)


def a_video(batch: int = 2, frames: int = 19, seed: int = 0, side: tuple[int, int] = (16, 24)) -> torch.Tensor:
    return (0.5 * randn(batch, 3, frames, *side, seed=seed + 9)).clamp(-1, 1)


def stream(codec, latents, cuts, state=None):
    """Pixels of each chunk and the state after it."""
    pixels, states = [], []
    for part in latents.split(cuts, dim=2):
        made, state = codec.decode_chunk(part, state)
        pixels.append(made)
        states.append(state)
    return pixels, states


@pytest.mark.parametrize("cuts", [1, [1, 2, 16], [9, 10], [3, 3, 1, 8, 4]])
def test_chunks_equal_the_whole(cuts):
    for codec, atol in ((DCAE(SMALL).double(), 1e-10), (a_codec(), 2e-5)):
        codec.requires_grad_(False).load_state_dict(a_codec().state_dict())
        latents = some_latents().to(codec.std.dtype)
        whole = codec.decode(latents)
        assert whole.shape == (2, 3, 19, 16, 24)
        assert whole.dtype == codec.std.dtype
        assert float(whole.std(dim=2).mean()) > 0.05, "pictures without motion prove little"
        assert torch.allclose(torch.cat(stream(codec, latents, cuts)[0], dim=2), whole, rtol=0, atol=atol)


def test_both_ways_are_causal_and_reach_as_far_as_they_should():
    codec, video, latents = a_codec(), a_video(), some_latents()
    later, other = video.clone(), latents.clone()
    later[:, :, 11:] *= -1
    other[:, :, 11:] *= -1
    for turn, before, after in ((codec.encode, video, later), (codec.decode, latents, other)):
        one, two = turn(before), turn(after)
        assert torch.equal(one[:, :, :11], two[:, :, :11])
        assert float((one - two)[:, :, 11:].abs().amax(dim=(0, 1, 3, 4)).min()) > 1e-3
        first = before.clone()
        first[:, :, :1] *= -1
        changed = (turn(first) - one).abs().amax(dim=(0, 1, 3, 4))
        reach = (
            1 + 2 * (3 if turn == codec.decode else 2) + 3
        )  # two frames a convolution, three of attention, and its own
        assert bool((changed[:reach] > 0).all())
        assert float(changed[reach:].max()) == 0


def test_the_reference_alone_is_the_first_latent():
    video = a_video()
    assert torch.allclose(a_codec().encode(video[:, :, :1]), a_codec().encode(video)[:, :, :1], rtol=0, atol=1e-5)


def test_a_still_picture_stays_still():
    """Before a clip its first frame stands still, so the beginning is no different from what follows."""
    codec, still = a_codec(), some_latents(frames=1).expand(-1, -1, 9, -1, -1)
    pixels = codec.decode(still)
    assert torch.allclose(pixels, pixels[:, :, :1].expand_as(pixels), rtol=0, atol=1e-5)


def test_attention_knows_a_frame_by_its_age():
    attention, x = a_codec().temporal["decoder_attention"], randn(12, 32, 1, 1, seed=4)

    def last(frames):
        return attention(frames, 1, TemporalCache(None))[-1]

    swapped = x[[*range(8), 10, 9, 8, 11]]
    assert not torch.allclose(last(swapped), last(x), atol=1e-3), "the order of the past makes no difference"
    assert torch.allclose(last(x[3:]), last(x), rtol=0, atol=1e-6), "it counts from the start of the stream"


def test_the_state_is_a_value_of_one_size():
    codec, latents, others = a_codec(), some_latents(frames=40), some_latents(frames=3, seed=7)
    pixels, states = stream(codec, latents, 1)
    sizes = [[tuple(slot.shape) for slot in state] for state in states]
    assert all(size == sizes[0] for size in sizes), "it grows with the stream"
    assert (
        sum(len(slot[0]) for slot in states[0]) == 2 * 3 + 3 * 2
    )  # keys and values of 3 frames; 2 frames a convolution
    kept = [slot.clone() for slot in states[3]]
    astray = codec.decode_chunk(others, states[3])[0]
    again = torch.cat(stream(codec, latents[:, :, 4:9], 1, states[3])[0], dim=2)
    assert not torch.allclose(astray, again[:, :, :3], atol=1e-3)
    assert torch.equal(again, torch.cat(pixels[4:9], dim=2))
    assert all(torch.equal(slot, old) for slot, old in zip(states[3], kept, strict=True)), "a state was written to"
    assert torch.equal(codec.decode_chunk(latents[:, :, :2], ())[0], codec.decode_chunk(latents[:, :, :2])[0])


def test_untrained_temporal_modules_leave_diffusers_image_codec():
    codec, video = DCAE(SMALL).eval(), a_video(frames=10)
    frames = video.transpose(1, 2).flatten(0, 1)
    with torch.no_grad():
        image = codec.network.encode(frames).latent
        assert torch.equal(codec.encode(video).transpose(1, 2).flatten(0, 1), image)
        pixels = codec.network.decode(image).sample.clamp(-1, 1)
        assert torch.equal(codec.decode(codec.encode(video)).transpose(1, 2).flatten(0, 1), pixels)


def test_latents_are_normalised_and_gradients_pass():
    codec, video = a_codec(), a_video(frames=3)
    raw = codec.encode_raw(video)[0]
    expected = (raw - codec.mean.view(1, -1, 1, 1, 1)) / codec.std.view(1, -1, 1, 1, 1)
    assert torch.allclose(codec.encode(video), expected, atol=1e-5)
    latents = some_latents(frames=3).requires_grad_()
    (back,) = torch.autograd.grad(codec.decode(latents)[:, :, 2].sum(), latents)
    assert bool((back.abs().amax(dim=(0, 1, 3, 4)) > 0).all())
    assert not any(parameter.requires_grad for parameter in codec.parameters())


def clips() -> torch.Tensor:
    """Squares that move, uint8 [6, 3, 9, 16, 16]."""
    video = torch.zeros(6, 3, 9, 16, 16, dtype=torch.uint8)
    for i in range(6):
        for t in range(9):
            video[i, i % 3, t, 2 + i : 6 + i, t : t + 4] = 255
    return video


def made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def test_each_stage_trains_what_it_should(tmp_path):
    scores = fit_codec(SMALL, [clips()[:4]], clips()[4:], 0, made(tmp_path / "a"), CPU)
    assert list(scores) == ["images", "temporal", "windows"]
    assert not list((tmp_path / "a").glob("codec-*")), "stages are left behind"
    assert json.loads((tmp_path / "a" / "codec.json").read_text()) == scores
    codec, start = SMALL.load(tmp_path / "a", 16, 16), codec_training._start(SMALL, 0)
    assert not torch.equal(codec.mean, start.mean)
    latents = codec.encode(codec_training.to_float(clips()[:4]))
    assert torch.allclose(latents.transpose(0, 1).flatten(1).mean(dim=1), torch.zeros(8), atol=1e-2)
    assert torch.allclose(latents.transpose(0, 1).flatten(1).std(dim=1), torch.ones(8), atol=1e-2)
    assert measure(codec, clips()[4:]) == pytest.approx(scores["windows"], rel=1e-4)


@pytest.mark.parametrize(("number", "parts"), [(0, {"network"}), (1, {"temporal"}), (2, {"network", "temporal"})])
def test_a_stage_leaves_the_rest_bit_equal(number, parts, tmp_path):
    codec = DCAE(SMALL).eval()
    before = {name: value.clone() for name, value in codec.state_dict().items()}
    codec_training._train(codec, codec_training._stages(codec)[number], clips(), 0, tmp_path / "state")
    changed = {name.split(".")[0] for name, value in codec.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == parts
    assert not any(parameter.requires_grad for parameter in codec.parameters())


def test_a_killed_training_goes_on_and_ends_with_the_same_bits(tmp_path, monkeypatch):
    whole, seen, draw = fit_codec(SMALL, [clips()], clips(), 0, made(tmp_path / "a"), CPU), [], windows

    def stumbling(video, count, window, rng):
        seen.append(window)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return draw(video, count, window, rng)

    monkeypatch.setattr(codec_training, "windows", stumbling)
    with pytest.raises(KeyboardInterrupt):
        fit_codec(SMALL, [clips()], clips(), 0, made(tmp_path / "b"), CPU)
    assert [file.name for file in (tmp_path / "b").iterdir()] == ["codec-images.safetensors"]
    assert fit_codec(SMALL, [clips()], clips(), 0, made(tmp_path / "b"), CPU) == whole
    assert seen[5:] == [4] * 6, "a finished stage was trained again"
    one, two = (load_file(tmp_path / name / "codec.safetensors") for name in "ab")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_windows_and_loss():
    rng = torch.Generator().manual_seed(0)
    assert windows(clips(), 2, 4, rng).shape == (2, 3, 4, 16, 16)
    assert windows(clips(), 3, 16, rng).shape == (3, 3, 9, 16, 16), "a clip shorter than the window comes whole"
    real, zero = torch.ones(1, 3, 2, 8, 8), torch.zeros(1, 3, 2, 8, 8)
    assert float(multiscale(real, real)) == 0
    assert float(multiscale(0.5 * real, zero)) == pytest.approx(0.75)  # the same at every scale
    checks = torch.ones(8, 8)
    checks[::2, ::2] = checks[1::2, 1::2] = -1
    assert float(multiscale(checks.expand(1, 3, 2, 8, 8), zero)) == pytest.approx(2 / 3), "coarser scales see no checks"
    flicker = {name: measure(fake, clips()) for name, fake in {"same": Fake(0.0), "jumps": Fake(0.1)}.items()}
    assert flicker["same"]["flicker"] == 0
    assert flicker["jumps"]["flicker"] == pytest.approx(127.5 * 0.2, rel=1e-4)
    assert flicker["jumps"]["psnr_db"] == pytest.approx(26.02, abs=0.01)


class Fake(torch.nn.Module):
    """Every other frame is off by plus, every other by minus `jump`."""

    config = CodecConfig()

    def __init__(self, jump: float):
        super().__init__()
        self.jump = torch.nn.Parameter(torch.tensor(jump), requires_grad=False)

    def encode(self, video):
        return video

    def decode(self, latents):
        signs = (-1.0) ** torch.arange(latents.shape[2])
        return latents + self.jump * signs.view(-1, 1, 1)

    def decode_chunk(self, latents, state=None):
        return self.decode(latents), state


def a_film(bundle, seconds=1.6):
    session = Session(bundle, a_video(1, 1, side=(16, 16))[0, :, 0], "a person nods", seed=3, lead=3)
    session.push(audio=some_sound(int(16000 * seconds)))
    return session


def midas_bundle():
    codec = a_codec()
    bundle = a_bundle(codec=codec.config, network=replace(MIDAS, patch=4), chunk_frames=1)
    return replace(bundle, codec=codec)


def test_a_session_streams_saves_goes_back_and_comes_from_disk(tmp_path):
    bundle = midas_bundle()
    save_student(tmp_path / "student", bundle, "card")
    again, session = load_student(tmp_path / "student"), a_film(bundle)
    assert convert(Spec, to_plain(bundle.spec)) == again.spec
    first = [session.step() for _ in range(3)]
    session.played(3)
    save_session(session, tmp_path / "s.safetensors")
    rest = [session.step().frames for _ in range(3)]
    copy = load_session(again, tmp_path / "s.safetensors")
    copy.played(3)
    assert [len(chunk.frames) for chunk in first] == [1, 1, 1]
    assert all(torch.equal(copy.step().frames, frames) for frames in rest)
    session.interrupt(keep_input=True)  # the three that were not seen are taken back, the decoder with them
    assert all(torch.equal(session.step().frames, frames) for frames in rest)


def test_chunks_of_one_pixel_frame_have_no_seams():
    spec = midas_bundle().spec
    assert [spec.pixel_frames(chunk) for chunk in range(2)] == [(0, 1), (1, 2)]
    assert seam_frames(spec) == []
    assert seam_frames(replace(spec, chunk_frames=2)) == [2, 4, 6]


def test_the_recipe_gives_one_token_a_frame():
    recipe = load_recipe(RECIPES / "midas_dc_ae.yaml", ["preset=smoke"])
    assert recipe.data.codec.fit.steps == (6, 2, 2)
    assert recipe.data.codec.fit.batch > 1
    assert recipe.data.latent_frames == 15
    sides = [side // recipe.data.codec.patch for side in recipe.data.world.size]
    assert sides == [recipe.teacher.network.patch] * 2 == [recipe.student.network.patch] * 2
    with pytest.raises(UserError, match=r"unknown key 'data\.codec\.fit'"):
        load_recipe(RECIPES / "midas_avatar.yaml", ["data.codec.fit.steps=[1,1,1]", "preset=smoke"])


def test_the_published_size_on_the_meta_device():
    """systems.md: 412 M parameters, 2.6 TFLOP a frame at 384 x 640 for the image decoder; at most 60 tokens."""
    with torch.device("meta"):
        codec = DCAE(DCAEConfig(path=Path("published")))
        video = torch.empty(1, 3, 1, 384, 640)
        with FlopCounterMode(display=False) as encoding:
            latents, _ = codec.encode_raw(video)
        with FlopCounterMode(display=False) as decoding:
            pixels, state = codec.decode_raw(latents)
        with FlopCounterMode(display=False) as image:
            codec.network.decoder(latents[:, :, 0])
    assert latents.shape[1:] == (128, 1, 6, 10)
    assert pixels.shape == video.shape
    assert sum(p.numel() for p in codec.network.decoder.parameters()) / 1e6 == pytest.approx(412, abs=1)
    assert image.get_total_flops() / 1e12 == pytest.approx(2.62, abs=0.01)
    assert decoding.get_total_flops() / 1e12 == pytest.approx(3.02, abs=0.01)
    assert encoding.get_total_flops() / 1e12 == pytest.approx(2.30, abs=0.01)
    assert sum(slot.numel() * 4 for slot in state) / 2**30 == pytest.approx(1.23, abs=0.01)


def published(folder: Path, **changes) -> Path:
    network = AutoencoderDC(**(diffusers_config(SMALL) | changes), scaling_factor=0.5)
    network.save_pretrained(folder)
    return folder


def test_a_published_folder_loads_and_can_be_trained_on(tmp_path):
    folder = published(tmp_path / "published")
    given = DCAEConfig(**SIZES, path=folder)
    codec, network, video = given.load(tmp_path, 16, 16), AutoencoderDC.from_pretrained(folder), a_video(frames=2)
    with torch.no_grad():
        expected = 0.5 * network.encode(video.transpose(1, 2).flatten(0, 1)).latent
    assert torch.allclose(codec.encode(video).transpose(1, 2).flatten(0, 1), expected, atol=1e-5)
    assert not given.fitted
    further = replace(given, fit=FitConfig(steps=(0, 2, 0), batch=8, window=4))
    fit_codec(further, [clips()], clips(), 0, made(tmp_path / "fit"), CPU)
    again = further.load(tmp_path / "fit", 16, 16)
    own = network.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in again.network.state_dict().items())
    assert float(again.temporal["decoder_attention"].out.weight.abs().max()) > 0


@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_input_is_refused_in_one_line(tmp_path):
    def refused(words: str, make, *args, **options):
        with pytest.raises(UserError, match=words) as caught:
            make(*args, **options)
        assert "\n" not in str(caught.value)

    refused("dc_ae has no weights; give path=FOLDER", DCAEConfig, **SIZES)
    refused("the first is 0 without a path", DCAEConfig, **SIZES, fit=FitConfig(steps=(0, 1, 1)))
    refused("got stride=1, patch=8; DC-AE has stride 1 and halves 3 widths to patch 4", replace, SMALL, patch=8)
    refused("got stride=2", replace, SMALL, stride=2)
    refused("3 widths, 2 encoder_layers", replace, SMALL, encoder_layers=(0, 1))
    refused("got 32 at the deepest stage", replace, SMALL, channels=6)
    refused("both from 2", replace, SMALL, temporal_window=1)
    refused("batch a multiple of window", FitConfig, steps=(1, 1, 1), batch=12, window=8)
    given = DCAEConfig(**SIZES, path=tmp_path / "nothing")
    refused(
        "no DC-AE: .*nothing has no config.json of AutoencoderDC; get .*dc-ae-f64c128", given.load, tmp_path, 16, 16
    )
    other = published(tmp_path / "other", latent_channels=16)
    refused(
        r"codec: latent_channels is 16 in .*config.json, the recipe's",
        replace(given, path=other).load,
        tmp_path,
        16,
        16,
    )
    half = published(tmp_path / "half")
    (half / "diffusion_pytorch_model.safetensors").unlink()
    refused(r"no weights: .*half.*safetensors; get .*dc-ae-f64c128", replace(given, path=half).load, tmp_path, 16, 16)
    refused("export the student again", SMALL.load, tmp_path / "nowhere", 16, 16)
    refused(
        r"video: got .*\[2, 3, 2, 16, 18\], the codec takes floats", a_codec().encode, a_video(frames=2, side=(16, 18))
    )
    refused(r"latents: got .*\[2, 7, 19, 4, 6\]", a_codec().decode, some_latents()[:, 1:])
    state = a_codec().decode_chunk(some_latents(batch=1))[1]
    refused(r"^state: it is \[1, ", a_codec().decode_chunk, some_latents(batch=2), state)
    with pytest.raises(UserError, match=r"is no multiple of codec\.patch=8"):
        load_recipe(RECIPES / "midas_dc_ae.yaml", ["data.world.resolution=36"])
