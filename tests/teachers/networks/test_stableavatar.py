"""StableAvatar: its forward equals the equations, faults in them are seen, its sound's window, a causal student, size, weights."""

import json
from dataclasses import replace

import pytest
import torch

from distill.compose import RECIPES
from distill.pipeline.pretrained import load_given
from distill.pipeline.tiny import write_weights
from distill.recipe import load_recipe, spec_of
from students.history import History
from students.weights.checkpoint import make_student
from teachers.checkpoints import layouts, weights
from teachers.checkpoints.convert import plan
from teachers.codecs.linear import CodecConfig
from teachers.conditions import pack_rows
from teachers.encoders.image import WanImageConfig
from teachers.encoders.wav2vec import Wav2VecConfig
from teachers.errors import UserError
from teachers.networks.kind import AvatarTeacher
from teachers.networks.stableavatar import StableAvatarConfig
from teachers.teacher import load_teacher
from tests.support.faults import deviations, published
from tests.support.networks.streams import check_stream
from tests.support.tiny import make_spec, randomise
from tests.teachers.networks.test_echomimic import CHANNELS, DIMS, HEADS, IMAGE, SIGMA, STATE, TEXT, rows_of
from tests.teachers.networks.test_fantasytalking import PUBLISHED, inputs, velocity
from tests.teachers.reference.stableavatar import FAULTS, StableAvatar

CONFIG = StableAvatarConfig(num_layers=2, num_heads=HEADS, head_dim=24, ffn_dim=64, freq_dim=32)
BASE, WIDTH = 1_564_428_608, 1536
"""Parameters of Wan2.1-Fun-V1.1-1.3B-InP, and its width."""


def a_net(seed: int = 0):
    return randomise(CONFIG.new(DIMS), seed).eval().requires_grad_(False)


def test_the_forward_equals_the_equations():
    net, (x, given, parts) = a_net(), inputs()
    expected = StableAvatar(published(net), HEADS)(x, *parts)
    assert expected.std() > 0.3
    assert (velocity(x, AvatarTeacher(net).denoise(x, SIGMA, given)) - expected).abs().max() < 1e-5
    assert given.known == ()  # frame 0 is drawn


deviation = deviations(StableAvatar, a_net, inputs, SIGMA, HEADS)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_equations_is_seen(fault):
    assert deviation() < 2e-6
    assert deviation(fault) > 10 * deviation()


def test_dropped_sound_is_tokens_of_zeros():
    """Whose keys and values are the biases, as in the published sampler; its training dropped the states before the projection."""
    net, (x, given, parts) = a_net(), inputs()
    expected = StableAvatar(published(net), HEADS, mute=True)(x, *parts)
    assert (velocity(x, AvatarTeacher(net).denoise(x, SIGMA, given.drop("audio"))) - expected).abs().max() < 1e-5


def test_a_latent_frame_reads_its_seventeen_states_and_no_other():
    net, states = a_net(), inputs(frames=6, extra=10)[2][5]

    def output(values):
        audio = net.read_audio(pack_rows(rows_of(values, 21), 4), tuple(min(i, 2) for i in range(6)))
        return audio[1].tokens

    before = output(states)
    for t in range(states.shape[1]):
        changed = states.clone()
        changed[:, t] += 1.0
        moved = (output(changed) - before).abs().amax(dim=(0, 2, 3)) > 0
        assert moved.tolist() == [8 * i - 11 <= t <= 8 * i + 5 for i in range(6)], t


def a_student(history: History):
    spec = make_spec(
        history,
        network=CONFIG,
        codec=CodecConfig(stride=4, patch=4, channels=CHANNELS),
        audio=Wav2VecConfig(features=11 * STATE, states="last", rate=50, window=(5, 5)),
        text=replace(make_spec().text, dim=TEXT),
        image=WanImageConfig(dim=IMAGE, tokens=6),
        chunk_frames=2,
        horizon_frames=6,
    )
    return randomise(make_student(spec), 3).eval().requires_grad_(False)


def test_a_stream_is_its_masked_forward_and_sees_nothing_later():
    """With a sigma for each chunk: the tokens of a frame are made with the time and the patch tokens of that frame."""
    student, (x, given, _) = a_student(History(sinks=1, window=1)), inputs(frames=6, extra=10)
    together, again = check_stream(student, x, given)
    for frame in (2, 4):
        audio, other = given.audio.clone(), x.clone()
        audio[:, frame] += 1.0
        other[:, :, frame] += 1.0
        moved = (again(other, replace(given, audio=audio)) - together).abs().amax((0, 1, 3, 4))
        assert not moved[:frame].any()
        assert (moved[frame : frame + 2] > 0).all()
    with pytest.raises(UserError, match=r"engine\.sequence_parallel: .*StableAvatar.* cannot share a sequence"):
        student.net.kind.check_sequence(2, 4)


def test_the_published_size():
    """Wan2.1-Fun-1.3B-InP, the maps of 30 blocks, and the projector: states, two blocks, a head."""
    with torch.device("meta"):
        net = StableAvatarConfig().new(PUBLISHED)
    square, wide = WIDTH * WIDTH + WIDTH, 2 * WIDTH
    block = 4 * square + wide * WIDTH + wide + WIDTH * wide + WIDTH + 6 * WIDTH + 4 * WIDTH
    own = 30 * 2 * square + 768 * WIDTH + wide + 2 * block + square + wide
    assert sum(p.numel() for p in net.parameters()) == BASE + own == 1_747_426_112
    architecture = layouts.infer({name: tuple(p.shape) for name, p in net.named_parameters()}, "here")
    names = layouts.tensors(architecture, "wan")
    assert names["vocal_projector.proj_model.proj.weight"] == (1536, 768)
    assert names["vocal_projector.blocks.1.ffn.0.weight"] == (3072, 1536)
    assert names["blocks.29.cross_attn.k_vocal.bias"] == (1536,)
    assert names["patch_embedding.weight"] == (1536, 36, 1, 2, 2)
    assert sum("vocal" in name for name in names) == 3 + 2 * 17 + 3 + 30 * 4


def test_the_converter_is_bit_equal_both_ways(tmp_path):
    """From one .pt archive of the whole, found in its folder."""
    whole, kind = {}, replace(CONFIG, head_dim=128)
    for i, (name, value) in enumerate(published(randomise(kind.new(DIMS), 4)).items()):
        whole[name] = (value.bfloat16() if i % 3 == 0 else value).detach().contiguous()
    (tmp_path / "StableAvatar-1.3B").mkdir()
    torch.save(whole, tmp_path / "StableAvatar-1.3B" / "transformer3d-square.pt")
    made = plan(tmp_path / "StableAvatar-1.3B", "ours")
    assert made.architecture.kind == "stableavatar"
    made.write(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["_class_name"] == "StableAvatar"
    plan(tmp_path / "ours", "wan").write(tmp_path / "again")
    found = weights.read_safetensors(tmp_path / "again" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == whole.keys()
    assert all(found[name].dtype == x.dtype and torch.equal(found[name].read(), x) for name, x in whole.items())
    assert load_teacher(tmp_path / "ours").denoiser.net.kind == kind
    del whole["vocal_projector.blocks.1.norm3.bias"]
    torch.save(whole, tmp_path / "StableAvatar-1.3B" / "transformer3d-square.pt")
    with pytest.raises(UserError, match=r"missing vocal_projector\.blocks\.1\.norm3\.bias"):
        plan(tmp_path / "StableAvatar-1.3B", "ours")


def test_sizes_that_cannot_be_are_one_line():
    for change in ({"audio_dim": 10752 + 1}, {"stride": 2}, {"audio_dim": 0}):
        with pytest.raises(UserError, match=r"give data\.audio states: last, rate: 50, window: \[5, 5\]"):
            CONFIG.new(replace(DIMS, **change))
    with pytest.raises(UserError, match=r"width 44: .* 8 heads"):
        replace(CONFIG, head_dim=22, num_heads=2).check()


def test_the_recipe_reads_the_folders_of_its_readme(tmp_path):
    recipe = load_recipe(RECIPES / "stableavatar.yaml", ["size=tiny", f"run_dir={tmp_path}"])
    spec = spec_of(recipe)
    write_weights(recipe, spec)
    net = load_given(recipe.teacher, spec, torch.device("cpu"))
    assert type(net.kind) is StableAvatarConfig
    assert set(recipe.lora.targets) == set(CONFIG.lora_targets)
