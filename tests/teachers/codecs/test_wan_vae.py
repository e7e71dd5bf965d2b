"""Wan's VAE as a codec: chunks equal the whole bit for bit, states are values, the published layouts load strictly."""

import copy
import json
from functools import lru_cache

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from teachers.codecs.linear import CodecConfig
from teachers.codecs.wan_vae import WanVAE, load_wan_vae
from teachers.errors import UserError
from tests.support.tiny import randn, randomise

FRAMES = 5
SPLITS = ((1, 1, 1, 1, 1), (2, 3), (3, 2), (1, 4), (4, 1), (2, 2, 1))
# The sixteen means and deviations published with Wan2.1.
MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508)
MEAN += (0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743)
STD += (3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


def row(values):
    return torch.tensor(values).view(1, -1, 1, 1, 1)


def lively(network: AutoencoderKLWan, seed: int) -> AutoencoderKLWan:
    """Random weights, with biases around 0: pictures that move and are not clamped."""
    randomise(network, seed, scale=1.0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.sub_(int(name.endswith("bias")))
    return network.eval()


@lru_cache(maxsize=1)
def network() -> AutoencoderKLWan:
    return lively(AutoencoderKLWan(base_dim=4), seed=3)


def a_codec() -> WanVAE:
    return WanVAE(network())


def some_latents(batch: int = 2, frames: int = FRAMES, seed: int = 0):
    return randn(batch, 16, frames, 2, 3, seed=seed + 1)


def a_video(batch: int = 1, frames: int = 9, seed: int = 0):
    return (0.4 * randn(batch, 3, frames, 16, 24, seed=seed + 2)).clamp(-1, 1)


def stream(codec, latents, split, state=None):
    """The pixels of every chunk and the state after it."""
    pixels, states = [], []
    for part in latents.split(split, dim=2):
        frames, state = codec.decode_chunk(part, state)
        pixels.append(frames)
        states.append(state)
    return pixels, states


def test_both_ways_are_those_of_diffusers_in_the_published_scale():
    latents, video, codec = some_latents(), a_video(), a_codec()
    with torch.no_grad():
        pixels = network().decode(latents * row(STD) + row(MEAN)).sample
        mean = network().encode(video).latent_dist.mode()
    assert torch.allclose(codec.decode(latents), pixels, atol=2e-5)
    assert torch.allclose(codec.encode(video), (mean - row(MEAN)) / row(STD), atol=2e-5)
    assert float((pixels.abs() < 1).float().mean()) > 0.5, "clamped pixels prove little"
    assert float(pixels.std(dim=2).mean()) > 0.01, "pictures without motion prove little"


@pytest.mark.parametrize("split", SPLITS)
def test_chunks_equal_the_whole(split):
    codec, latents = a_codec(), some_latents()
    pixels = stream(codec, latents, split)[0]
    assert [part.shape[2] for part in pixels] == [4 * n - 3 * (i == 0) for i, n in enumerate(split)]
    assert torch.equal(torch.cat(pixels, dim=2), codec.decode(latents))
    assert codec.decode(latents).shape == (2, 3, 17, 16, 24)


def test_a_fresh_state_at_each_chunk_is_seen():
    """What a stream must not do: without the past the frames differ."""
    codec, latents = a_codec(), some_latents()
    whole = codec.decode(latents)
    assert not torch.allclose(codec.decode(latents[:, :, 2:])[:, :, 1:], whole[:, :, 9:], atol=1e-3)


def frames_seen(layer, call) -> list[tuple[int, ...]]:
    """The shapes that reach a layer while `call` runs."""
    seen = []
    hook = layer.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape)))
    call()
    hook.remove()
    return seen


def test_a_clip_goes_through_one_latent_frame_at_a_time():
    """What makes chunks equal the whole on every device, and keeps the memory of a long clip that of a short one."""
    codec, network = a_codec(), a_codec().network
    assert frames_seen(network.decoder.conv_in, lambda: codec.decode(some_latents())) == [(2, 16, 1, 2, 3)] * FRAMES
    groups = [shape[2] for shape in frames_seen(network.encoder.conv_in, lambda: codec.encode(a_video()))]
    assert groups == [1, 4, 4]


def test_an_old_state_can_be_gone_on_from():
    codec, latents, others = a_codec(), some_latents(), some_latents(seed=7)
    whole = codec.decode(latents)
    states = stream(codec, latents, (1, 2, 2))[1]
    kept = [tuple(slot.clone() for slot in state) for state in states]
    astray = codec.decode_chunk(others[:, :, 1:], states[0])[0]
    assert not torch.allclose(astray, whole[:, :, 1:], atol=1e-3)
    for state, start in zip(states[:2], (1, 3), strict=True):
        again = torch.cat(stream(codec, latents[:, :, start:], 1, state)[0], dim=2)
        assert torch.equal(again, whole[:, :, 4 * start - 3 :])
    for state, before in zip(states, kept, strict=True):
        assert all(torch.equal(slot, old) for slot, old in zip(state, before, strict=True)), "a state was written to"


def test_streams_share_nothing_and_the_network_stays_clean():
    codec, ours, theirs = a_codec(), some_latents(), some_latents(batch=1, seed=9)
    before = dict(vars(network()))
    pixels, other, state, there = [], [], None, None
    for i in range(FRAMES):
        frames, state = codec.decode_chunk(ours[:, :, i : i + 1], state)
        pixels.append(frames)
        frames, there = codec.decode_chunk(theirs[:, :, i : i + 1], there)
        other.append(frames)
        codec.encode(a_video(frames=5))
    assert torch.equal(torch.cat(pixels, dim=2), codec.decode(ours))
    assert torch.equal(torch.cat(other, dim=2), codec.decode(theirs))
    after = vars(network())
    assert after.keys() == before.keys()
    assert all(after[name] is value for name, value in before.items()), "the network keeps a cache"


def test_a_state_is_small_tensors_and_survives_the_disk(tmp_path):
    codec, latents = a_codec(), some_latents()
    states = stream(codec, latents, 1)[1]
    assert len(states[0]) == 32  # the temporal convolutions of Wan2.1's decoder
    shapes = [[slot.shape for slot in state] for state in states]
    assert shapes[1] == shapes[2] == shapes[4]
    for i, state in enumerate(states[:2]):  # the first state, too, has slots that are still empty
        save_file({str(n): slot for n, slot in enumerate(state)}, tmp_path / "state.safetensors")
        tensors = load_file(tmp_path / "state.safetensors")
        loaded = tuple(tensors[str(n)] for n in range(len(state)))
        expected = codec.decode_chunk(latents[:, :, i + 1 :], state)[0]
        assert torch.equal(codec.decode_chunk(latents[:, :, i + 1 :], loaded)[0], expected)


def test_encoding_is_causal_and_takes_an_image():
    codec, video = a_codec(), a_video()
    latents = codec.encode(video)
    assert latents.shape == (1, 16, 3, 2, 3)
    assert torch.equal(codec.encode(video[:, :, :1]), latents[:, :, :1])
    changed = video.clone()
    changed[:, :, 5:] *= -1
    after = codec.encode(changed)
    assert torch.equal(after[:, :, :2], latents[:, :, :2])
    assert not torch.allclose(after[:, :, 2], latents[:, :, 2], atol=1e-3)


def test_nothing_is_recorded_but_a_decode_of_latents_that_ask_for_it():
    latents, video = some_latents(), a_video().requires_grad_()
    pixels, state = a_codec().decode_chunk(latents)
    assert not any(out.requires_grad for out in (pixels, a_codec().encode(video), *state))
    assert a_codec().decode(latents.requires_grad_()).requires_grad
    assert torch.is_grad_enabled()


def test_low_precision_weights_keep_the_scale_in_fp32():
    codec = WanVAE(copy.deepcopy(network())).to(torch.bfloat16)
    video, latents, seen = a_video(), some_latents(), []
    coded = codec.encode(video)
    raw = coded * row(STD) + row(MEAN)  # fp32 arithmetic of numbers that were bf16
    assert coded.dtype == torch.float32
    assert (
        float((raw - raw.bfloat16().float()).abs().max()) < 1e-6 < float((coded - coded.bfloat16().float()).abs().max())
    )
    hook = codec.network.post_quant_conv.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    pixels = codec.decode(latents)
    hook.remove()
    assert torch.equal(torch.cat(seen, dim=2), (latents * row(STD) + row(MEAN)).bfloat16())
    assert pixels.dtype == torch.float32
    assert torch.allclose(pixels, a_codec().decode(latents), atol=0.2)
    assert torch.equal(codec.decode(latents.double()), pixels)
    assert torch.equal(torch.cat(stream(codec, latents, (2, 3))[0], dim=2), pixels)


@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_shapes_are_refused():
    good = (1, 3, 9, 16, 24)
    frames, height, width, channels = (1, 3, 8, 16, 24), (1, 3, 9, 12, 24), (1, 3, 9, 16, 20), (1, 1, 9, 16, 24)
    wrong = [torch.zeros(shape) for shape in (frames, height, width, channels, good[1:], (1, 3, 0, 16, 24))]
    for video in (*wrong, torch.zeros(good, dtype=torch.uint8)):
        with pytest.raises(
            UserError, match=r"^video: got .* floats \[B, 3, 1 \+ 4 \(F - 1\), 8 h, 8 w\] in \[-1, 1\]$"
        ):
            a_codec().encode(video)
    wrong = [torch.zeros(shape) for shape in ((1, 15, 2, 2, 3), (16, 2, 2, 3), (1, 16, 0, 2, 3))]
    for latents in (*wrong, torch.zeros((1, 16, 2, 2, 3), dtype=torch.int64)):
        with pytest.raises(UserError, match=r"^latents: got .* floats \[B, 16, F, h, w\]$"):
            a_codec().decode(latents)


def test_the_state_of_another_stream_is_refused():
    codec = a_codec()
    state = codec.decode_chunk(some_latents(batch=1))[1]
    for latents, past in ((some_latents(batch=2), state), (some_latents(batch=1).mT, state), (some_latents(), ())):
        with pytest.raises(UserError, match=r"^state: it is .* pass the state of the same stream$"):
            codec.decode_chunk(latents, past)


# Published layouts.


def original_layout(dim: int, z: int = 16) -> dict[str, tuple[int, ...]]:
    """Names and shapes of Wan2.1_VAE.pth, from its structure: two residual blocks a level (three on the way up)."""
    table: dict[str, tuple[int, ...]] = {}

    def conv(name, outputs, inputs, *kernel):
        table.update({f"{name}.weight": (outputs, inputs, *kernel), f"{name}.bias": (outputs,)})

    def residual(name, inputs, outputs):
        table[f"{name}.residual.0.gamma"] = (inputs, 1, 1, 1)
        conv(f"{name}.residual.2", outputs, inputs, 3, 3, 3)
        table[f"{name}.residual.3.gamma"] = (outputs, 1, 1, 1)
        conv(f"{name}.residual.6", outputs, outputs, 3, 3, 3)
        if inputs != outputs:
            conv(f"{name}.shortcut", outputs, inputs, 1, 1, 1)

    def middle(name, width):
        residual(f"{name}.0", width, width)
        table[f"{name}.1.norm.gamma"] = (width, 1, 1)
        conv(f"{name}.1.to_qkv", 3 * width, width, 1, 1)
        conv(f"{name}.1.proj", width, width, 1, 1)
        residual(f"{name}.2", width, width)

    def head(name, width, outputs):
        table[f"{name}.0.gamma"] = (width, 1, 1, 1)
        conv(f"{name}.2", outputs, width, 3, 3, 3)

    conv("encoder.conv1", dim, 3, 3, 3, 3)
    names = iter(range(99))
    for inputs, width, halve, time in ((1, 1, 1, 0), (1, 2, 1, 1), (2, 4, 1, 1), (4, 4, 0, 0)):
        residual(f"encoder.downsamples.{next(names)}", inputs * dim, width * dim)
        residual(f"encoder.downsamples.{next(names)}", width * dim, width * dim)
        if halve:
            name = f"encoder.downsamples.{next(names)}"
            conv(f"{name}.resample.1", width * dim, width * dim, 3, 3)
            if time:
                conv(f"{name}.time_conv", width * dim, width * dim, 3, 1, 1)
    middle("encoder.middle", 4 * dim)
    head("encoder.head", 4 * dim, 2 * z)
    conv("conv1", 2 * z, 2 * z, 1, 1, 1)
    conv("conv2", z, z, 1, 1, 1)
    conv("decoder.conv1", 4 * dim, z, 3, 3, 3)
    middle("decoder.middle", 4 * dim)
    names = iter(range(99))
    for inputs, width, double, time in ((4, 4, 1, 1), (2, 4, 1, 1), (2, 2, 1, 0), (1, 1, 0, 0)):
        for i in range(3):
            residual(f"decoder.upsamples.{next(names)}", (width if i else inputs) * dim, width * dim)
        if double:
            name = f"decoder.upsamples.{next(names)}"
            conv(f"{name}.resample.1", width * dim // 2, width * dim, 3, 3)
            if time:
                conv(f"{name}.time_conv", 2 * width * dim, width * dim, 3, 1, 1)
    head("decoder.head", dim, 3)
    return table


def an_original(seed: int = 0) -> dict[str, torch.Tensor]:
    layout = original_layout(4)
    return {name: 0.3 * randn(*shape, seed=seed + 31 + i) for i, (name, shape) in enumerate(layout.items())}


def test_the_published_size():
    with torch.device("meta"):
        codec = WanVAE(AutoencoderKLWan())
    assert codec.config == CodecConfig(stride=4, patch=8, channels=16)
    count = sum(torch.Size(shape).numel() for shape in original_layout(96).values())
    assert count == sum(parameter.numel() for parameter in codec.parameters()) == 126_892_531
    assert len(original_layout(96)) == len(codec.network.state_dict())


@pytest.mark.parametrize("name", ["Wan2.1_VAE.pth", "wan_vae.safetensors"])
def test_the_original_file_loads(tmp_path, name):
    tensors = an_original()
    (save_file if name.endswith("safetensors") else torch.save)(tensors, tmp_path / name)
    codec = load_wan_vae(tmp_path if name == "Wan2.1_VAE.pth" else tmp_path / name)
    assert codec.config == CodecConfig(stride=4, patch=8, channels=16)
    assert (codec.mean, codec.std) == (MEAN, STD)
    assert not codec.network.training
    assert not any(parameter.requires_grad for parameter in codec.parameters())
    for ours, theirs in (
        ("encoder.conv_in.weight", "encoder.conv1.weight"),
        ("encoder.down_blocks.5.time_conv.weight", "encoder.downsamples.5.time_conv.weight"),
        ("encoder.mid_block.attentions.0.to_qkv.weight", "encoder.middle.1.to_qkv.weight"),
        ("quant_conv.weight", "conv1.weight"),
        ("post_quant_conv.weight", "conv2.weight"),
        ("decoder.up_blocks.0.upsamplers.0.time_conv.weight", "decoder.upsamples.3.time_conv.weight"),
        ("decoder.up_blocks.1.resnets.0.conv_shortcut.weight", "decoder.upsamples.4.shortcut.weight"),
        ("decoder.up_blocks.2.upsamplers.0.resample.1.bias", "decoder.upsamples.11.resample.1.bias"),
        ("decoder.up_blocks.3.resnets.2.conv2.weight", "decoder.upsamples.14.residual.6.weight"),
        ("decoder.conv_out.bias", "decoder.head.2.bias"),
    ):
        assert torch.equal(codec.network.state_dict()[ours], tensors[theirs]), ours
    assert codec.decode(codec.encode(a_video())).shape == (1, 3, 9, 16, 24)


def test_a_diffusers_folder_loads_with_its_own_scale(tmp_path):
    published = lively(AutoencoderKLWan(base_dim=4, latents_mean=[0.5] * 16), seed=8)
    published.save_pretrained(tmp_path / "vae")
    latents = some_latents()
    expected = WanVAE(published).decode(latents)
    for path in (tmp_path, tmp_path / "vae"):
        codec = load_wan_vae(path)
        assert codec.mean == (0.5,) * 16
        assert torch.equal(codec.decode(latents), expected)
    with torch.no_grad():  # a single file in diffusers' naming has the published scale
        shifted = (latents * row(STD) + 0.5 - row(MEAN)) / row(STD)
    codec = load_wan_vae(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    assert torch.allclose(codec.decode(shifted), expected, atol=1e-4)


class Touch:
    """Pickled, it would make a file when loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def refused(path, *parts: str, where: str = "Wan-AI/Wan2.1-T2V-1.3B") -> None:
    with pytest.raises(UserError) as caught:
        load_wan_vae(path)
    for part in (*parts, where):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path):
    refused(tmp_path / "nothing", "no Wan VAE", str(tmp_path / "nothing"))
    refused(tmp_path, "vae/config.json", "Wan2.1_VAE.pth")
    network().save_pretrained(tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    refused(tmp_path, "no weights", str(tmp_path / "vae" / "diffusion_pytorch_model.safetensors"))


def test_damaged_and_foreign_weights_are_refused(tmp_path):
    file, table = tmp_path / "vae.safetensors", an_original()
    save_file(table, file)
    file.write_bytes(file.read_bytes()[:-100])
    refused(file, "damaged weights", str(file), where="copy the file again")
    torch.save(table, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:5000])
    refused(tmp_path / "cut.pth", "damaged weights", where="copy the file again")
    torch.save(table | {"code": Touch(tmp_path / "touched")}, tmp_path / "code.pth")
    refused(tmp_path / "code.pth", "a pickle with code in it", where="which never runs here")
    assert not (tmp_path / "touched").exists()
    torch.save({"generator": table}, tmp_path / "nested.pth")
    refused(tmp_path / "nested.pth", "not a table of tensors")
    save_file({"blocks.0.self_attn.q.weight": torch.zeros(4, 4)}, file)
    refused(file, "not a Wan VAE")


def test_every_tensor_must_fit(tmp_path):
    file, table = tmp_path / "vae.safetensors", an_original()
    save_file({name: value for name, value in table.items() if name != "decoder.head.0.gamma"}, file)
    refused(file, "missing decoder.norm_out.gamma")
    save_file(table | {"discriminator.weight": torch.zeros(2)}, file)
    refused(file, "unexpected discriminator.weight")
    save_file(table | {"decoder.head.0.gamma": torch.zeros(7, 1, 1, 1)}, file)
    refused(file, "decoder.norm_out.gamma is [7, 1, 1, 1] where [4, 1, 1, 1] is needed")
    wider = original_layout(4, z=48)  # Wan2.2 has 48 channels
    save_file({name: torch.zeros(shape) for name, shape in wider.items()}, file)
    refused(file, "not Wan2.1's VAE", "z_dim 48")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "not that of AutoencoderKLWan"),
        ({"width": 4}, "width"),
        ({"patch_size": 2}, "patch_size 2"),
        ({"latents_std": [1.0] * 4}, "z_dim 16"),
    ],
)
def test_a_foreign_config_is_refused(tmp_path, change, message):
    network().save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refused(tmp_path, message)
    file.write_text("{")
    refused(tmp_path, "damaged file", str(file), where="copy it again")
