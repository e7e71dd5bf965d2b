"""Wan 2.1 image-to-video is a config of the avatar DiT: it is diffusers' own, and the image is attended to beside the text."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from teachers.networks.wan import AvatarTransformer, NetworkConfig, build_network
from tests.support.tiny import CHANNELS, NETWORK, TEXT, make_net, randn, randomise, some_latents

IMAGE, STRIDE = 24, 4
SIGMA = torch.tensor([0.9, 0.4])


@pytest.fixture(scope="module")
def pair():
    """diffusers' image-to-video Wan and ours, with one state dict."""
    theirs = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=2 * CHANNELS + STRIDE,
        out_channels=CHANNELS,
        text_dim=TEXT,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        image_dim=IMAGE,
        added_kv_proj_dim=32,
    )
    randomise(theirs, 3)
    ours = AvatarTransformer(
        latent_channels=CHANNELS, text_dim=TEXT, audio_dim=0, stride=STRIDE, image_dim=IMAGE, **NETWORK
    )
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


def some_inputs():
    """[noisy | mask, 1 = known | latent of the image], 512 text tokens (diffusers knows no other number), image features."""
    mask, latent = torch.zeros(2, STRIDE, 3, 4, 4), randn(2, CHANNELS, 3, 4, 4, seed=4)
    mask[:, :, 0] = 1.0
    return torch.cat([some_latents(2, 3), mask, latent], 1), randn(2, 512, TEXT, seed=1), randn(2, 7, IMAGE, seed=2)


@torch.no_grad()
@pytest.mark.parametrize("per_frame", [False, True])
def test_it_is_diffusers_image_to_video(pair, per_frame):
    theirs, ours = pair
    x, text, image = some_inputs()
    sigma, timestep = SIGMA, SIGMA * 1000
    if per_frame:
        sigma = torch.tensor([[0.0, 0.5, 1.0], [0.3, 0.7, 0.2]])
        timestep = (sigma * 1000).repeat_interleave(4, dim=1)  # diffusers wants one a token
    expected = theirs(x, timestep, text, image).sample
    out, _ = ours(x, sigma, text, image=image)
    assert expected.abs().mean() > 0.1
    assert torch.allclose(out, expected, atol=1e-5)
    kept, _ = ours(x, sigma, ours.read_text(text), image=image)
    assert torch.allclose(kept, expected, atol=1e-5)


def test_the_image_acts_and_every_layer_of_its_path_learns(pair):
    _, ours = pair
    x, text, image = some_inputs()
    out, _ = ours(x, SIGMA, text, image=image)
    other, _ = ours(x, SIGMA, text, image=image.flip(1))
    assert torch.allclose(other, out, atol=1e-5), "the order of the image's tokens is not defined"
    other, _ = ours(x, SIGMA, text, image=randn(2, 7, IMAGE, seed=3))
    assert (other - out).abs().mean() > 1e-2
    found = []
    for checkpointing in (False, True):
        (ours.enable_gradient_checkpointing if checkpointing else ours.disable_gradient_checkpointing)()
        ours.zero_grad()
        ours(x, SIGMA, text, image=image)[0].square().mean().backward()
        path = {
            n: p.grad
            for n, p in ours.named_parameters()
            if "image_embedder" in n or "attn2.add_" in n or "norm_added" in n
        }
        assert len(path) == 8 + 2 * 5
        assert all(grad is not None and grad.any() for grad in path.values())
        found.append(path)
    ours.disable_gradient_checkpointing()
    assert all(torch.allclose(found[0][name], grad, atol=1e-6) for name, grad in found[1].items())


def test_an_image_that_is_missing_or_not_wanted_is_refused(pair):
    x, text, image = some_inputs()
    with pytest.raises(ValueError, match=r"image features missing: give \[B, K, image_dim\]"):
        pair[1](x, SIGMA, text)
    with pytest.raises(ValueError, match="image features given, image_dim is 0: remove them"):
        make_net()(x[:, :9], SIGMA, text, image=image)


def test_the_input_channels_follow_from_the_config():
    dims = {"latent_channels": 16, "stride": 4, "text_dim": TEXT, "audio_dim": 0}
    for reference, given, channels in [(False, {}, 16), (True, {}, 33), (True, {"image_dim": IMAGE}, 36)]:
        net = build_network(NetworkConfig(**NETWORK, reference=reference), **dims, **given)
        assert net.patch_embedding.in_channels == channels
        assert AvatarTransformer.from_config(net.config).patch_embedding.in_channels == channels
