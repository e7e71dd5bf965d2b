"""The avatar DiT: it is diffusers' Wan where nothing is added, and what is added does what the design says."""

from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel

from teachers import flow
from teachers.networks.kind import AvatarTeacher, to_x0
from teachers.networks.wan import AvatarTransformer, NetworkConfig, build_network, with_reference
from tests.support.tiny import (
    AUDIO,
    CHANNELS,
    NETWORK,
    STRIDE,
    TEXT,
    a_student,
    a_teacher,
    make_net,
    randn,
    randomise,
    some_conditions,
    some_latents,
)

SIGMA = torch.tensor([0.9, 0.4])


@pytest.fixture(scope="module")
def pair():
    """diffusers' Wan and our network without audio and reference, with one state dict."""
    theirs = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
    )
    randomise(theirs, 3)
    ours = AvatarTransformer(
        latent_channels=CHANNELS, text_dim=TEXT, audio_dim=0, stride=STRIDE, reference=False,
        **{k: v for k, v in NETWORK.items() if k != "audio_hidden"},
    )  # fmt: skip
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


@torch.no_grad()
@pytest.mark.parametrize("per_frame", [False, True])
def test_without_additions_it_is_diffusers_wan(pair, per_frame):
    theirs, ours = pair
    x, text = some_latents(2, 3), randn(2, 5, TEXT, seed=1)
    if per_frame:
        sigma = torch.tensor([[0.0, 0.5, 1.0], [0.3, 0.7, 0.2]])
        timestep = (sigma * 1000).repeat_interleave(4, dim=1)  # diffusers wants one a token
    else:
        sigma, timestep = SIGMA, SIGMA * 1000
    expected = theirs(x, timestep, text).sample
    out, cache = ours(x, sigma, text)
    assert expected.abs().mean() > 0.1
    assert torch.allclose(out, expected, atol=1e-5)
    assert len(cache) == 2
    assert cache[0][0].shape == (2, 12, 2, 16)


def test_time_is_a_thousand_sigma():
    """The network tells sigmas apart that differ by tenths: with time in 0..1 the slow sinusoids hardly move."""
    teacher, given, x = a_teacher(prediction="reference"), some_conditions(), some_latents()
    outs = [teacher.denoise(x, torch.full((2,), s), given) for s in (0.9, 0.6)]
    assert (outs[0] - outs[1]).abs().mean() > 0.05
    seen = []
    teacher.net.condition_embedder.timesteps_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    teacher.denoise(x, SIGMA, given)
    assert torch.allclose(seen[0], SIGMA * 1000)


@pytest.mark.parametrize("name", ["audio", "text"])
def test_a_given_modality_acts_and_learns_and_a_dropped_one_does_not(name):
    teacher, x, given = a_teacher(), some_latents(), some_conditions()
    out = teacher.denoise(x, SIGMA, given)
    dropped = teacher.denoise(x, SIGMA, given.drop(name))
    assert (out - dropped)[:, :, 1:].abs().mean() > 1e-3
    other = some_conditions(seed=50)
    other = replace(given, **{name: getattr(other, name)}).drop(name)
    assert torch.equal(teacher.denoise(x, SIGMA, other), dropped), "what was dropped still has an effect"
    first = teacher.net.audio_proj.proj if name == "audio" else teacher.net.condition_embedder.text_embedder.linear_1
    for conditions, reaches in [(given, True), (given.drop(name), False)]:
        teacher.zero_grad()
        teacher.denoise(x, SIGMA, conditions)[:, :, 1:].square().mean().backward()
        assert bool(first.weight.grad.any()) == reaches
    if name == "audio":
        teacher.zero_grad()
        teacher.denoise(x, SIGMA, given)[:, :, 1:].square().mean().backward()
        assert all(p.weight.grad.any() for p in teacher.net.audio_cond_projs)


def test_audio_acts_at_its_own_frame_first():
    """With one block after the audio is added every frame depends on it, but its own frame the most."""
    teacher, x, given = a_teacher(), some_latents(1), some_conditions(1)
    louder = given.audio.clone()
    louder[:, 5] += 2.0
    changed = replace(given, audio=louder)
    out = teacher.denoise(x, SIGMA[:1], given)
    moved = (teacher.denoise(x, SIGMA[:1], changed) - out).abs().mean((0, 1, 3, 4))
    assert int(moved.argmax()) == 5
    assert moved[2] > 0


def test_mask_zero_is_known_and_the_noise_of_a_known_frame_is_not_seen():
    given, x = some_conditions(), some_latents()
    shown, inputs = with_reference(x, given)
    assert inputs.shape[1] == 2 * CHANNELS + 1
    assert not inputs[:, -1, 0].any()
    assert (inputs[:, -1, 1:] == 1).all()
    assert torch.equal(shown[:, :, :1], given.reference)
    assert torch.equal(shown[:, :, 1:], x[:, :, 1:])
    assert torch.equal(inputs[:, CHANNELS : 2 * CHANNELS, 5], given.reference[:, :, 0])
    free, inputs = with_reference(x, given, known=())
    assert torch.equal(free, x)
    assert (inputs[:, -1] == 1).all()
    teacher, other = a_teacher(), x.clone()
    other[:, :, 0] += 3.0
    assert torch.equal(teacher.denoise(other, SIGMA, given), teacher.denoise(x, SIGMA, given))


@pytest.mark.parametrize("prediction", ["velocity", "reference"])
def test_the_known_frame_comes_back_and_predictions_are_what_they_say(prediction):
    teacher, given, x = a_teacher(prediction=prediction), some_conditions(), some_latents()
    x0 = teacher.denoise(x, SIGMA, given)
    assert torch.equal(x0[:, :, :1], given.reference)
    shown, inputs = with_reference(x, given)
    raw, _ = teacher.net(inputs, SIGMA, given.text, given.audio)
    if prediction == "velocity":
        expected = shown - flow.expand(SIGMA, x) * raw
    else:
        expected = given.reference + raw
    assert torch.allclose(x0[:, :, 1:], expected[:, :, 1:], atol=1e-6)
    assert to_x0(raw.bfloat16(), shown.bfloat16(), SIGMA, given, prediction, ()).dtype == torch.float32


def test_a_fresh_network_predicts_nothing_yet():
    config = NetworkConfig(**NETWORK, audio_blocks=(1,), prediction="reference")
    net = build_network(config, latent_channels=CHANNELS, stride=STRIDE, text_dim=TEXT, audio_dim=AUDIO)
    given = some_conditions()
    out = AvatarTeacher(net).denoise(some_latents(), SIGMA, given)
    assert torch.allclose(out, given.reference.expand_as(out))


def test_audio_enters_where_the_published_rule_says():
    assert make_net(num_layers=6, audio_blocks=None).audio_at == (2, 3)
    assert make_net(audio_blocks=(0, 1)).audio_at == (0, 1)


def test_positions_past_the_table_are_refused():
    with pytest.raises(ValueError, match="latent frame 1030: the network has positions for 1024 that attend at once"):
        make_net().rope_table(1020, 10, 2, 2)


def test_a_bidirectional_network_sees_the_whole_clip_and_a_causal_one_does_not():
    teacher, student, given = a_teacher(), a_student(), some_conditions()
    other = replace(given, clip_audio=given.audio.roll(1, 0))
    x, sigma = some_latents(), torch.tensor([0.7, 0.4])
    assert torch.equal(teacher(x, sigma, other), teacher(x, sigma, replace(given, audio=other.clip_audio)))
    assert not torch.equal(teacher(x, sigma, other), teacher(x, sigma, given))
    levels = sigma.unsqueeze(1).expand(-1, student.spec.num_chunks)
    assert torch.equal(student.denoise_clip(x, levels, other), student.denoise_clip(x, levels, given))
