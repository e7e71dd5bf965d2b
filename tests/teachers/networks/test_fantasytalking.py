"""FantasyTalking: its forward equals the equations, faults in them are seen, its sound's window, size, weights and folders."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.compose import RECIPES
from distill.pipeline.pretrained import load_given
from distill.pipeline.tiny import write_weights
from distill.recipe import load_recipe, spec_of
from students.history import History
from students.weights.checkpoint import make_student
from teachers.checkpoints import layouts
from teachers.checkpoints.convert import plan
from teachers.codecs.linear import CodecConfig
from teachers.conditions import Conditions, pack_rows
from teachers.encoders.image import WanImageConfig
from teachers.encoders.wav2vec import Wav2VecConfig
from teachers.errors import UserError
from teachers.networks.fantasytalking import FantasyTalkingConfig, inside
from teachers.networks.kind import AvatarTeacher, Dims
from teachers.teacher import load_teacher
from tests.support.faults import deviations, published
from tests.support.networks.streams import check_stream
from tests.support.tiny import make_spec, randn, randomise
from tests.teachers.networks.test_echomimic import CHANNELS, DIMS, HEADS, IMAGE, SIDE, SIGMA, STATE, TEXT, rows_of
from tests.teachers.reference.fantasytalking import FAULTS, FantasyTalking, ranges

FRAMES = 5
CONFIG = FantasyTalkingConfig(num_layers=2, num_heads=HEADS, head_dim=24, ffn_dim=64, freq_dim=32, audio_hidden=20)
PUBLISHED = Dims(latent_channels=16, stride=4, text_dim=4096, audio_dim=11 * 768, image_dim=1280)
ADAPTER, BASE = 840_437_760, 16_394_878_784
"""Parameters of what FantasyTalking adds, 768 x 2048 + 2 x 2048 + 40 x 2 x 5120 x 2048, and of Wan2.1-I2V-14B."""


def a_net(seed: int = 0):
    return randomise(CONFIG.new(DIMS), seed).eval().requires_grad_(False)


def inputs(frames: int = FRAMES, extra: int = -1, batch: int = 2):
    """Latents, the conditions, and the parts of these as the reference takes them; the sound has two states a pixel frame and
    `extra`."""
    pixel_frames = 1 + 4 * (frames - 1)
    states = randn(batch, 2 * pixel_frames + extra, STATE, seed=5)
    mask = torch.zeros(batch, 4, frames, SIDE, SIDE)
    mask[:, :, 0] = 1.0
    latents, text = randn(batch, CHANNELS, frames, SIDE, SIDE, seed=6), randn(batch, 5, TEXT, seed=7)
    image = randn(batch, 6, IMAGE, seed=8)
    audio = pack_rows(rows_of(torch.nn.functional.pad(states, (0, 0, 0, 1), value=50.0), pixel_frames), 4)
    given = Conditions(text=text, audio=audio, image=image, beside=torch.cat([mask, latents], dim=1))
    x = randn(batch, CHANNELS, frames, SIDE, SIDE, seed=9)
    return x, given, (mask, latents, SIGMA[:batch], text, image, states, None)


def velocity(x: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    return (x - x0) / SIGMA.view(-1, 1, 1, 1, 1)


def test_the_forward_equals_the_equations():
    net, (x, given, parts) = a_net(), inputs()
    expected = FantasyTalking(published(net), HEADS)(x, *parts)
    assert expected.std() > 0.3
    assert (velocity(x, AvatarTeacher(net).denoise(x, SIGMA, given)) - expected).abs().max() < 1e-5


deviation = deviations(FantasyTalking, a_net, inputs, SIGMA, HEADS)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_equations_is_seen(fault):
    assert deviation() < 2e-6
    assert deviation(fault) > 10 * deviation()


def test_dropped_sound_is_no_audio_attention_at_all():
    net, (x, given, parts) = a_net(), inputs()
    expected = FantasyTalking(published(net), HEADS, silent=True)(x, *parts)
    assert (velocity(x, AvatarTeacher(net).denoise(x, SIGMA, given.drop("audio"))) - expected).abs().max() < 1e-5
    assert given.known == ()  # frame 0 is drawn


def test_windows_are_the_published_ones():
    """At two states a pixel frame; at its own 23 fps, 175 states of 81 frames, they are as wide, and as far on at frame 0 and 1."""
    assert ranges(0, 81, 2.0) == [(8 * i - 11, 8 * i + 5) for i in range(21)]
    own = ranges(175, 81)
    assert {last - first for first, last in own} == {16}
    assert own[:2] == [(-11, 5), (-3, 13)]
    assert own[20] == (161, 177)  # 8 states on, 160 ms, as 4 pixel frames of 23 a second are 174
    assert inside(None, 3) == [range(11, 17), range(3, 17), range(12)]  # of 17 states
    assert inside((0, 1, 2, 2), 4) == [range(11, 17), range(3, 17), range(17), range(17)]


def test_a_latent_frame_reads_its_seventeen_states_and_no_other():
    """State by state: 80 ms beyond its last pixel frame's two."""
    net, (_, _, parts) = a_net(), inputs(frames=6, extra=10)
    states = parts[5]

    def output(values):
        audio = net.read_audio(pack_rows(rows_of(values, 21), 4), tuple(min(i, 2) for i in range(6)))[1]
        kept = torch.arange(17) < audio.seen.unsqueeze(1)
        return audio.key * kept[..., None, None]

    before = output(states)
    for t in range(states.shape[1]):
        changed = states.clone()
        changed[:, t] += 1.0
        moved = (output(changed) - before).abs().amax(dim=(0, 2, 3, 4)) > 0
        assert moved.tolist() == [8 * i - 11 <= t <= 8 * i + 5 for i in range(6)], t


def a_student(history: History, chunk_frames: int = 2):
    spec = make_spec(
        history,
        network=CONFIG,
        codec=CodecConfig(stride=4, patch=4, channels=CHANNELS),
        audio=Wav2VecConfig(features=11 * STATE, states="last", rate=50, window=(5, 5)),
        text=replace(make_spec().text, dim=TEXT),
        image=WanImageConfig(dim=IMAGE, tokens=6),
        chunk_frames=chunk_frames,
        horizon_frames=6,
    )
    return randomise(make_student(spec), 3).eval().requires_grad_(False)


def test_a_stream_is_its_masked_forward_and_sees_nothing_later():
    student, (x, given, _) = a_student(History(sinks=1, window=1)), inputs(frames=6, extra=10)
    together, again = check_stream(student, x, given)
    for frame in (2, 4):
        audio = given.audio.clone()
        audio[:, frame] += 1.0
        moved = (again(x, replace(given, audio=audio)) - together).abs().amax((0, 1, 3, 4))
        assert not moved[:frame].any()
        assert (moved[frame : frame + 2] > 0).all()


# ---- size and weights


def test_the_published_size():
    """Wan2.1-I2V-14B and 840,437,760 parameters; the adapter's 83 tensors."""
    with torch.device("meta"):
        net = FantasyTalkingConfig().new(PUBLISHED)
    assert sum(p.numel() for p in net.parameters()) == BASE + ADAPTER
    architecture = layouts.infer({name: tuple(p.shape) for name, p in net.named_parameters()}, "here")
    names = layouts.tensors(architecture, "wan")
    own = layouts.apart("fantasytalking", names)
    assert len(own) == 83
    assert sum(torch.Size(names[name]).numel() for name in own) == ADAPTER
    assert names["proj_model.proj.weight"] == (2048, 768)
    assert names["audio_processor.blocks.39.cross_attn.processor.k_proj.weight"] == (5120, 2048)
    assert names["patch_embedding.weight"] == (5120, 36, 1, 2, 2)


CHECKPOINT = replace(CONFIG, head_dim=128)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Its README's folder of models: the base in a folder of its own, beside it fantasytalking_model.ckpt with two state dicts."""
    folder = tmp_path_factory.mktemp("models")
    tensors = {}
    for i, (name, value) in enumerate(published(randomise(CHECKPOINT.new(DIMS), 4)).items()):
        tensors[name] = (value.bfloat16() if i % 3 == 0 else value).detach().contiguous()
    own = {name: tensors[name] for name in layouts.apart("fantasytalking", tensors)}
    parts = {}
    for name, value in own.items():
        entry, _, rest = name.partition(".")
        parts.setdefault(entry, {})[rest] = value
    torch.save(parts, folder / "fantasytalking_model.ckpt")
    (folder / "base").mkdir()
    plain = {name: value for name, value in tensors.items() if name not in own}
    save_file(plain, folder / "base" / "diffusion_pytorch_model.safetensors")
    return folder, tensors, own


def test_the_converter_is_bit_equal_both_ways(models, tmp_path):
    folder, tensors, own = models
    made = plan(folder, "ours", base=folder / "base")
    assert made.architecture.kind == "fantasytalking"
    made.write(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["audio_hidden"] == 20
    plan(tmp_path / "ours", "wan").write(tmp_path / "again")
    found = load_file(tmp_path / "again" / "fantasytalking.safetensors")
    assert found.keys() == own.keys()
    found |= load_file(tmp_path / "again" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == x.dtype and torch.equal(found[name], x) for name, x in tensors.items())
    plan(tmp_path / "again", "ours").write(tmp_path / "third")  # the adapter's file is found beside the base's
    net = load_teacher(tmp_path / "third").denoiser.net
    assert net.kind == CHECKPOINT
    name = "audio_processor.blocks.1.cross_attn.processor.v_proj.weight"
    assert torch.equal(net.blocks[1].attn2.audio_v_proj.weight, tensors[name].float())


def test_parts_that_lack_something_are_one_line(models, tmp_path):
    folder, _, own = models
    with pytest.raises(UserError, match=r"missing .*; give the weights that these replace a part of as --base"):
        plan(folder, "ours")
    own = {
        name: value
        for name, value in own.items()
        if name != "audio_processor.blocks.1.cross_attn.processor.v_proj.weight"
    }
    save_file(own, tmp_path / "fantasytalking_fp16.safetensors")
    with pytest.raises(UserError, match=r"missing audio_processor\.blocks\.1\.cross_attn\.processor\.v_proj\.weight"):
        plan(tmp_path, "ours", base=folder / "base")
    for change in ({"audio_dim": 10752 + 1}, {"stride": 2}, {"audio_dim": 0}):
        with pytest.raises(UserError, match=r"give data\.audio states: last, rate: 50, window: \[5, 5\]"):
            CONFIG.new(replace(DIMS, **change))


def test_the_recipe_reads_the_folders_of_its_readme(tmp_path):
    """Random small weights where its paths point; what is missing is one line that names it and where to get it."""
    words = ["size=tiny", f"run_dir={tmp_path}"]
    recipe = load_recipe(RECIPES / "fantasytalking.yaml", words)
    spec = spec_of(recipe)
    write_weights(recipe, spec)
    path = recipe.teacher.path
    assert sorted(file.name for file in path.iterdir()) == [
        "Wan2.1-I2V-14B-720P", "fantasytalking.safetensors", "wav2vec2-base-960h"
    ]  # fmt: skip
    net = load_given(recipe.teacher, spec, torch.device("cpu"))
    assert net.kind.audio_hidden == 8
    assert set(recipe.lora.targets) == set(CONFIG.lora_targets)
    (path / "fantasytalking.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"get fantasytalking_model\.ckpt of acvlab/FantasyTalking and Wan-AI/Wan2\.1-I2V-14B-720P"
    ):
        load_given(recipe.teacher, spec, torch.device("cpu"))
