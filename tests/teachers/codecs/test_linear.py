"""The embedded codec: exact where it keeps everything, causal, and a stream of it equals the whole."""

import pytest
import torch

from teachers.codecs.linear import CodecConfig, EigenCodec, to_float, to_uint8
from tests.support.tiny import fitted_codec, randn


def a_video(num: int = 2, frames: int = 9, side: int = 16):
    return (0.3 * randn(num, 3, frames, side, side, seed=5)).clamp(-1, 1)


def small_codec(channels: int) -> EigenCodec:
    """4 x 4 pixels in 4 cells: 96 numbers a frame group, 24 channels keep them all."""
    return EigenCodec(CodecConfig(stride=2, patch=2, channels=channels), 4, 4).fit(a_video(64, 9, 4))


def test_shapes_and_scale():
    video = a_video(32, 7)
    latents = fitted_codec().encode(video)
    assert latents.shape == (32, 4, 4, 4, 4)
    assert float(latents.square().mean()) == pytest.approx(1.0, rel=0.15)
    assert fitted_codec().decode(latents).shape == video.shape
    assert fitted_codec().encode(video[:, :, :1]).shape == (32, 4, 1, 4, 4)


@pytest.mark.parametrize("wrong", [a_video(frames=8), a_video(side=12), a_video()[:, :2]])
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_video_without_latents_is_refused(wrong):
    with pytest.raises(
        ValueError, match=r"^video: got \[C, T, H, W\] = .*the codec takes \(3, '1 \+ 2 \(F - 1\)', 16, 16\)"
    ):
        fitted_codec().encode(wrong)


def test_all_components_lose_nothing():
    codec, video = small_codec(24), a_video(64, 9, 4)
    assert torch.allclose(codec.decode(codec.encode(video)), video, atol=1e-3)


def test_fewer_components_are_the_best_of_their_number():
    """The error of principal components is the sum of the eigenvalues left out; no other basis does better."""
    codec, video = small_codec(20), a_video(64, 9, 4)
    groups = codec._groups(video).flatten(0, 1).double()
    values = torch.linalg.eigvalsh(torch.cov(groups.T, correction=0))
    centred, basis = groups - codec.mean, codec.basis.double()
    assert torch.allclose(basis @ basis.T, torch.eye(80, dtype=torch.float64), atol=1e-5)
    error = (centred - centred @ basis.T @ basis).square().sum(1).mean()
    assert float(error) == pytest.approx(float(values[:-80].sum()), rel=1e-3)
    variances = (centred @ basis.T).square().mean(0)
    assert torch.allclose(variances, values.flip(0)[:80], rtol=1e-3)
    latents = codec.encode(video).transpose(1, 2).flatten(2).flatten(0, 1).square().mean(0).double()
    assert torch.allclose(latents, variances.sqrt() / variances.sqrt().mean(), rtol=1e-3), "not half whitened"


def test_fitting_is_seeded():
    before = torch.random.get_rng_state()
    assert torch.equal(small_codec(10).basis, small_codec(10).basis), "the sign of a component is not fixed"
    assert torch.equal(torch.random.get_rng_state(), before)


def test_too_few_clips_leave_components_silent():
    codec = EigenCodec(CodecConfig(stride=2, patch=2, channels=24), 4, 4).fit(a_video(2, 9, 4))
    video = a_video(2, 9, 4)
    assert torch.isfinite(codec.encode(video)).all()
    assert torch.allclose(codec.decode(codec.encode(video)), video, atol=1e-3)


def test_encoding_is_causal_and_the_first_latent_holds_one_frame():
    codec, video = fitted_codec(), a_video()
    changed = video.clone()
    changed[:, :, 5:] += 0.2
    before, after = codec.encode(video), codec.encode(changed)
    assert torch.equal(before[:, :, :3], after[:, :, :3])
    assert not torch.equal(before[:, :, 3], after[:, :, 3])
    assert torch.allclose(codec.encode(video[:, :, :1]), before[:, :, :1], atol=1e-5)


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_stream_decode_equals_whole_decode(cut):
    codec = fitted_codec()
    latents = codec.encode(a_video())
    whole = codec.decode(latents)
    pieces, state = [], None
    for i in range(0, latents.shape[2], cut):
        pixels, state = codec.decode_chunk(latents[:, :, i : i + cut], state)
        pieces.append(pixels)
    assert torch.allclose(torch.cat(pieces, dim=2), whole, atol=1e-5)


def test_bytes_round_trip():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(values)), values)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
