"""The embedded codec: exact where it keeps everything, causal, and a stream of it equals the whole."""

import pytest
import torch
from tiny import fitted_codec, randn

from teachers.codecs import CodecConfig, PatchCodec, to_float, to_uint8


def a_video(num: int = 2, frames: int = 9, seed: int = 5):
    return (0.3 * randn(num, 3, frames, 16, 16, seed=seed)).clamp(-1, 1)


def test_shapes_and_scale():
    video = (0.3 * randn(4, 3, 7, 16, 16, seed=5)).clamp(-1, 1)
    latents = fitted_codec().encode(video)
    assert latents.shape == (4, 4, 4, 4, 4)
    assert float(latents.square().mean()) == pytest.approx(1.0, rel=0.15)
    assert fitted_codec().decode(latents).shape == video.shape
    assert fitted_codec().encode(video[:, :, :1]).shape == (4, 4, 1, 4, 4)
    with pytest.raises(ValueError, match=r"got T=8, need T = 1 \+ 2 \(F - 1\)"):
        fitted_codec().encode(a_video(frames=8))


def test_all_components_lose_nothing():
    video = a_video(8, 9)
    codec = PatchCodec(CodecConfig(stride=2, patch=2, channels=24)).fit(video)
    assert torch.allclose(codec.decode(codec.encode(video)), video, atol=1e-4)


def test_fewer_components_are_the_best_of_their_number():
    """The error of principal components is the sum of the eigenvalues left out; no other basis does better."""
    video = a_video(8, 9)
    codec = PatchCodec(CodecConfig(stride=2, patch=2, channels=10)).fit(video)
    patches = codec._patches(codec._hold_first(video)).flatten(0, 3).double()
    values = torch.linalg.eigvalsh(torch.cov(patches.T, correction=0))
    kept = (patches - codec.mean) @ codec.basis.T.double() @ codec.basis.double()
    error = (patches - codec.mean - kept).square().sum(1).mean()
    assert float(error) == pytest.approx(float(values[:-10].sum()), rel=1e-4)
    assert torch.equal(codec.basis, PatchCodec(codec.config).fit(video).basis), "the sign of a component is not fixed"


def test_encoding_is_causal_and_the_first_latent_holds_one_frame():
    codec, video = fitted_codec(), a_video()
    changed = video.clone()
    changed[:, :, 5:] += 0.2
    before, after = codec.encode(video), codec.encode(changed)
    assert torch.equal(before[:, :, :3], after[:, :, :3])
    assert not torch.equal(before[:, :, 3], after[:, :, 3])
    assert torch.allclose(codec.encode(video[:, :, :1]), before[:, :, :1], atol=1e-6)


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_stream_decode_equals_whole_decode(cut):
    codec = fitted_codec()
    latents = codec.encode(a_video())
    whole = codec.decode(latents)
    pieces = [codec.decode(latents[:, :, i : i + cut], first=i == 0) for i in range(0, latents.shape[2], cut)]
    assert torch.allclose(torch.cat(pieces, dim=2), whole, atol=1e-6)
    assert torch.equal(to_uint8(torch.cat(pieces, dim=2)), to_uint8(whole))


def test_bytes_round_trip():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(values)), values)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
