"""Encoding in pieces is encoding the whole, for every codec of the package."""

import pytest
import torch

from teachers.codecs.streamed import pull_back
from teachers.errors import UserError
from tests.support.tiny import fitted_codec, randn
from tests.teachers.codecs import test_convolutional, test_dc_ae, test_taehv, test_wan_vae

CODECS = {
    "eigen": fitted_codec,
    "conv": test_convolutional.a_codec,
    "dc_ae": test_dc_ae.a_codec,
    "wan_vae": test_wan_vae.a_codec,
    "taehv": test_taehv.a_codec,
}
LATENTS = 7


@pytest.fixture(params=CODECS)
def codec(request):
    return CODECS[request.param]()


def a_video(codec) -> torch.Tensor:
    frames = 1 + codec.config.stride * (LATENTS - 1)
    return (0.5 * randn(2, 3, frames, 16, 16, seed=4)).clamp(-1, 1).to(next(iter(codec.state_dict().values())).dtype)


def padded(codec, video):
    return torch.cat([video, video[:, :, -1:].expand(-1, -1, codec.encode_ahead, -1, -1)], dim=2)


def pieces(codec, video, cuts):
    """Latents of each piece of so many latent frames, and the states after them."""
    stride, ahead = codec.config.stride, codec.encode_ahead
    counts = [stride * cut for cut in cuts]
    counts[0] += 1 - stride + ahead
    latents, states, state = [], [], None
    for part in padded(codec, video).split(counts, dim=2):
        made, state = codec.encode_chunk(part, state)
        latents.append(made)
        states.append(state)
    return latents, states


@pytest.mark.parametrize("cuts", [[1] * LATENTS, [1, 2, 4], [3, 1, 3]])
def test_pieces_equal_the_whole(codec, cuts):
    video = a_video(codec)
    whole, parts = codec.encode(video), pieces(codec, video, cuts)[0]
    assert [part.shape[2] for part in parts] == cuts
    assert torch.allclose(torch.cat(parts, dim=2), whole, rtol=0, atol=2e-5)
    assert float(whole.std(dim=2).mean()) > 0.05, "latents without motion prove little"


def test_a_state_can_be_gone_on_from_twice(codec):
    video = a_video(codec)
    latents, states = pieces(codec, video, [3, 2, 2])
    rest = padded(codec, video)[:, :, 1 + 2 * codec.config.stride + codec.encode_ahead :]
    again = codec.encode_chunk(rest[:, :, : 2 * codec.config.stride], states[0])[0]
    assert torch.equal(again, latents[1])
    assert torch.equal(codec.encode_chunk(rest[:, :, : 2 * codec.config.stride], states[0])[0], again)


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_piece_of_no_whole_latents_is_refused(codec):
    if codec.config.stride == 1:
        return
    video = a_video(codec)
    _, states = pieces(codec, video, [LATENTS])
    with pytest.raises((UserError, ValueError), match="video: got"):
        codec.encode_chunk(video[:, :, : codec.config.stride + 1], states[0])


@pytest.mark.parametrize("chunk", [1, 3, LATENTS])
def test_a_gradient_pulled_back_chunk_by_chunk_is_that_of_the_whole_decode(codec, chunk):
    codec.requires_grad_(False)
    latents = codec.encode(a_video(codec)).detach()
    weight = torch.randn(codec.decode(latents).shape, generator=torch.Generator().manual_seed(8)).to(latents)
    leaf = latents.clone().requires_grad_()
    (weight * codec.decode(leaf).square()).sum().backward()
    found = pull_back(codec.decode_chunk, latents, lambda video: 2 * weight * video, chunk)
    assert float(leaf.grad.abs().mean()) > 1e-3
    assert torch.allclose(found, leaf.grad, rtol=1e-4, atol=1e-4 * float(leaf.grad.abs().max()))


def test_a_decoder_that_records_nothing_is_named():
    codec = fitted_codec()
    latents = torch.zeros(1, codec.config.channels, 2, *codec.cells)
    with pytest.raises(UserError, match="records no graph"):
        pull_back(torch.no_grad()(codec.decode_chunk), latents, torch.zeros_like, 1)
