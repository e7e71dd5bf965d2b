"""EchoMimicV3 preview: its forward equals the equations, faults in them are seen, its sound's window, size and weights."""

import json
import wave
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from distill.cli import main
from distill.compose import RECIPES
from distill.data.encoders import load_encoders
from distill.pipeline.tiny import write_weights
from distill.recipe import load_recipe, spec_of
from students.history import History
from students.serving.session import Session
from students.serving.snapshot import load_session, save_session
from students.weights.checkpoint import Bundle, make_student
from teachers.checkpoints import layouts
from teachers.checkpoints.convert import plan
from teachers.codecs.linear import CodecConfig
from teachers.conditions import Conditions, pack_rows
from teachers.encoders.image import WanImageConfig
from teachers.encoders.wav2vec import Wav2VecConfig
from teachers.errors import UserError
from teachers.networks import echomimic
from teachers.networks.echomimic import EchoMimicConfig
from teachers.networks.kind import AvatarTeacher, Dims
from teachers.teacher import load_teacher
from tests.support.faults import deviations, published
from tests.support.networks.streams import check_stream
from tests.support.tiny import make_spec, randn, randomise, some_sound
from tests.teachers.reference.echomimic import FAULTS, EchoMimic

FRAMES, CHANNELS, SIDE, STATE, TEXT, IMAGE, HEADS = 4, 3, 4, 10, 12, 14, 2
CONFIG = EchoMimicConfig(num_layers=2, num_heads=HEADS, head_dim=24, ffn_dim=64, freq_dim=32)
DIMS = Dims(latent_channels=CHANNELS, stride=4, text_dim=TEXT, audio_dim=11 * STATE, image_dim=IMAGE)
SIGMA = torch.tensor([0.9, 0.4])
TEACHER = EchoMimicConfig(num_layers=30, num_heads=12, head_dim=128, ffn_dim=8960, freq_dim=256)
PUBLISHED = Dims(latent_channels=16, stride=4, text_dim=4096, audio_dim=11 * 768, image_dim=1280)


def a_net(seed: int = 0):
    return randomise(CONFIG.new(DIMS), seed).eval().requires_grad_(False)


def rows_of(states: torch.Tensor, pixel_frames: int) -> torch.Tensor:
    """Rows [B, T, 11 E] of states 2 p - 5 .. 2 p + 5; what lies outside is large, so that a network that read it would show it."""
    padded = torch.nn.functional.pad(states, (0, 0, 5, 5), value=50.0)
    return torch.stack([padded[:, 2 * p : 2 * p + 11].flatten(1) for p in range(pixel_frames)], dim=1)


def inputs(frames: int = FRAMES, extra: int = 0, batch: int = 2):
    """Latents, the parts of the conditions, and those as a network takes them."""
    pixel_frames = 1 + 4 * (frames - 1)
    states = randn(batch, 2 * pixel_frames + extra, STATE, seed=5)
    mask = torch.zeros(batch, 4, frames, SIDE, SIDE)
    mask[:, :, 0] = 1.0
    latents, face = randn(batch, CHANNELS, frames, SIDE, SIDE, seed=6), torch.zeros(batch, 1, SIDE, SIDE)
    face[0, :, 2:, :2] = face[1, :, :2] = 1.0
    text, image = randn(batch, 5, TEXT, seed=7), randn(batch, 6, IMAGE, seed=8)
    audio = pack_rows(rows_of(states, pixel_frames), 4)
    given = Conditions(text=text, audio=audio, image=image, beside=torch.cat([mask, latents], dim=1), regions=face)
    x = randn(batch, CHANNELS, frames, SIDE, SIDE, seed=9)
    tokens = face[:, 0, ::2, ::2].flatten(1)
    return x, given, (mask, latents, SIGMA[:batch], text, image, states, tokens)


def test_the_forward_equals_the_equations():
    net, (x, given, parts) = a_net(), inputs()
    x0 = AvatarTeacher(net).denoise(x, SIGMA, given)
    expected = EchoMimic(published(net), HEADS)(x, *parts)
    assert expected.std() > 0.3
    assert ((x - x0) / SIGMA.view(-1, 1, 1, 1, 1) - expected).abs().max() < 1e-5


deviation = deviations(EchoMimic, a_net, inputs, SIGMA, HEADS)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_equations_is_seen(fault):
    """In fp64 (norms and modulation stay in fp32) nothing is left of rounding that could hide one."""
    assert deviation() < 2e-6
    assert deviation(fault) > 10 * deviation()


def test_frame_0_is_drawn():
    """A given reference is no known frame: the noise of frame 0 matters, and nothing is written over what is drawn."""
    net, (x, given, _) = a_net(), inputs()
    assert given.known == ()
    other = x.clone()
    other[:, :, 0] += 1.0
    one, two = (AvatarTeacher(net).denoise(value, SIGMA, given) for value in (x, other))
    assert (one - two)[:, :, 0].abs().max() > 0.1


def test_zero_rows_are_no_audio():
    """Dropped sound is rows of zeros before the projection, whose norm's bias stays, and no sound at the ends."""
    net, (x, given, parts) = a_net(), inputs()
    silent = (*parts[:5], torch.zeros_like(parts[5]), parts[6])
    x0 = AvatarTeacher(net).denoise(x, SIGMA, given.drop("audio"))
    expected = EchoMimic(published(net), HEADS)(x, *silent)
    assert ((x - x0) / SIGMA.view(-1, 1, 1, 1, 1) - expected).abs().max() < 1e-5


def test_a_latent_frame_reads_its_seventeen_states_and_no_other():
    """Row by row: latent i reads states 8 i - 11 .. 8 i + 5, so 80 ms beyond its last pixel frame's two states."""
    net, (_, given, parts) = a_net(), inputs(frames=6, extra=10)
    states, pixel_frames = parts[5], 21

    def from_audio(values):
        audio = pack_rows(rows_of(values, pixel_frames), 4)
        keys, _, _ = net.read_audio(audio, tuple(min(i, 2) for i in range(6)), given.regions)[1]
        return keys

    before = from_audio(states)
    for t in range(states.shape[1]):
        changed = states.clone()
        changed[:, t] += 1.0
        moved = (from_audio(changed) - before).abs().amax(dim=(0, 2, 3, 4)) > 0
        assert moved.tolist() == [8 * i - 11 <= t <= 8 * i + 5 for i in range(6)], t


def test_a_clip_that_ends_has_no_states_beyond_it():
    whole, stream = echomimic.inside(None, 3)[0], echomimic.inside((0, 1, 2), 3)[0]
    first = [8 * i - 11 for i in range(3)]
    assert whole.tolist() == [[0 <= t < 18 for t in range(a, a + 17)] for a in first]
    assert stream.tolist() == [[t >= 0 for t in range(a, a + 17)] for a in first]


# ---- its causal student


def a_student(history: History, chunk_frames: int = 2, frames: int = 6):
    spec = make_spec(
        history,
        network=CONFIG,
        codec=CodecConfig(stride=4, patch=4, channels=CHANNELS),
        audio=Wav2VecConfig(features=11 * STATE, states="last", rate=50, window=(5, 5)),
        text=replace(make_spec().text, dim=TEXT),
        image=WanImageConfig(dim=IMAGE, tokens=6, face="box"),
        chunk_frames=chunk_frames,
        horizon_frames=frames,
    )
    return randomise(make_student(spec), 3).eval().requires_grad_(False)


def test_one_chunk_that_holds_the_clip_is_the_bidirectional_network():
    """But for the sound, which goes on beyond the clip in a stream."""
    student, (x, given, parts) = a_student(History(), 6), inputs(frames=6, extra=10)
    x0, _ = student.denoise(student.open(given.text), None, x, SIGMA, given)
    expected = EchoMimic(published(student.net), HEADS, ends=False)(x, *parts)
    assert ((x - x0) / SIGMA.view(-1, 1, 1, 1, 1) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("history", [History(sinks=1, window=1), History(sinks=0, window=None)], ids=str)
def test_a_stream_is_its_masked_forward(history):
    """Read ahead (`plan`) and chunk by chunk, or a whole clip at once behind the clean chunks: the same x0."""
    student, (x, given, _) = a_student(history), inputs(frames=6, extra=10)
    check_stream(student, x, given)


def test_a_chunk_sees_nothing_of_later_ones():
    student, (x, given, _) = a_student(History(sinks=1, window=2)), inputs(frames=6, extra=10)
    sigma, clean = torch.full((2, 3), 0.7), randn(*x.shape, seed=11)
    before = student.denoise_clip(x, sigma, given, clean)
    for frame in range(6):
        audio, beside, other = given.audio.clone(), given.beside.clone(), x.clone()
        audio[:, frame] += 1.0
        beside[:, :, frame] += 1.0
        other[:, :, frame] += 1.0
        changed = student.denoise_clip(other, sigma, replace(given, audio=audio, beside=beside), clean)
        moved = ((changed - before).abs().amax(dim=(0, 1, 3, 4)) > 0).tolist()
        first = frame // 2 * 2
        assert not any(moved[:first]), frame
        assert all(moved[first : first + 2]), frame


# ---- size and weights


def test_the_published_size():
    """1,707,215,168 parameters, as the published code prints; 93 tensors more than its base, Wan2.1-Fun-1.3B-InP."""
    with torch.device("meta"):
        net = TEACHER.new(PUBLISHED)
    assert sum(p.numel() for p in net.parameters()) == 1_707_215_168
    architecture = layouts.infer({name: tuple(p.shape) for name, p in net.named_parameters()}, "here")
    assert (architecture.kind, architecture.beyond) == ("echomimic", (("E", 768),))
    names = layouts.tensors(architecture, "wan")
    plain = layouts.tensors(replace(architecture, kind="wan", beyond=()), "wan")
    assert len(names) - len(plain) == 93
    assert names["audio2token.proj.weight"] == (1536, 768)
    assert names["blocks.29.cross_attn.k_audio.weight"] == (1536, 1536)
    assert names["blocks.0.cross_attn.norm_k_audio.weight"] == (1536,)
    assert "blocks.0.cross_attn.k_audio.bias" not in names
    assert names["patch_embedding.weight"] == (1536, 36, 1, 2, 2)


CHECKPOINT = replace(CONFIG, head_dim=128)


def weights(tmp_path, name: str = "published"):
    """The published layout: a transformer file under the published names, some in bf16."""
    tensors = {}
    for i, (key, value) in enumerate(published(randomise(CHECKPOINT.new(DIMS), 4)).items()):
        tensors[key] = (value.bfloat16() if i % 3 == 0 else value).detach().contiguous()
    (tmp_path / name).mkdir()
    save_file(tensors, tmp_path / name / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return tmp_path / name, tensors


def same(folder, tensors) -> None:
    found = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def test_the_converter_is_bit_equal_both_ways(tmp_path):
    path, tensors = weights(tmp_path)
    assert plan(path, "ours").architecture.kind == "echomimic"
    plan(path, "ours").write(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["_class_name"] == "EchoMimicTransformer"
    plan(tmp_path / "ours", "wan").write(tmp_path / "again")
    same(tmp_path / "again", tensors)
    with pytest.raises(UserError, match=r"layout diffusers cannot represent kind echomimic"):
        plan(path, "diffusers")
    net = load_teacher(tmp_path / "ours").denoiser.net
    assert type(net.kind) is EchoMimicConfig
    assert net.kind == CHECKPOINT
    assert torch.equal(net.blocks[1].attn2.to_k_audio.weight, tensors["blocks.1.cross_attn.k_audio.weight"].float())


def test_weights_that_are_a_part_of_others_go_over_them(tmp_path):
    """An adapter of the audio path and another output bias, merged by name over the image-to-video base, is the whole."""
    path, tensors = weights(tmp_path)
    own = {name: value for name, value in tensors.items() if "audio" in name}
    plain = {k: v + 1 if k == "head.head.bias" else v for k, v in tensors.items() if k not in own}
    own["head.head.bias"] = tensors["head.head.bias"]
    for name, part in {"base": plain, "part": own}.items():
        (tmp_path / name).mkdir()
        save_file(part, tmp_path / name / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    plan(tmp_path / "part", "wan", base=tmp_path / "base").write(tmp_path / "whole")
    same(tmp_path / "whole", tensors)
    with pytest.raises(UserError, match=r"missing .*; give the weights that these replace a part of as --base"):
        plan(tmp_path / "part", "ours")
    with pytest.raises(UserError, match=r"--base has no effect"):
        plan(path, "ours", base=tmp_path / "base")
    lacking = {name: value for name, value in tensors.items() if name != "blocks.1.cross_attn.v_audio.weight"}
    save_file(lacking, path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing blocks\.1\.cross_attn\.v_audio\.weight"):
        plan(path, "ours")


def test_sizes_that_cannot_be_are_one_line():
    for change in ({"audio_dim": 10752 + 1}, {"stride": 2}, {"audio_dim": 0}):
        with pytest.raises(UserError, match=r"give data\.audio states: last, rate: 50, window: \[5, 5\]"):
            CONFIG.new(replace(DIMS, **change))


def test_every_matrix_of_cross_attention_takes_a_lora():
    net, targets = a_net(), CONFIG.lora_targets
    found = {
        name.partition("attn2.")[2]
        for name, module in net.named_modules()
        if name.endswith(targets) and "attn2" in name
    }
    assert found == {"to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "to_k_audio", "to_v_audio"}


# ---- from the folders of the recipe, small


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The recipe with random small weights where its paths point, and the words that name it."""
    words = ["size=tiny", f"run_dir={tmp_path_factory.mktemp('echomimic')}", "teacher.sampler.num_steps=2"]
    recipe = load_recipe(RECIPES / "echomimic.yaml", words)
    write_weights(recipe, spec_of(recipe))
    return recipe, words


@pytest.mark.slow
def test_the_teacher_samples_from_the_folders_of_its_download(tiny, tmp_path, capsys):
    """A missing part is one line that names it and where to get it."""
    recipe, words = tiny
    Image.new("RGB", (40, 40), (90, 60, 30)).save(tmp_path / "face.png")
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((some_sound(16_000) * 20_000).short().numpy().tobytes())
    sample = ["sample", "--teacher", str(RECIPES / "echomimic.yaml"), *words, "--text", "a person nods"]
    sample += [
        "--image",
        str(tmp_path / "face.png"),
        "--audio",
        str(tmp_path / "a.wav"),
        "--out",
        str(tmp_path / "t.mp4"),
    ]
    assert main(sample) == 0
    assert "21 frames, 0.84 s, 2 steps of 3 passes" in capsys.readouterr().out
    (recipe.data.image.path / "image_encoder").rename(tmp_path / "gone")
    try:
        assert main(sample) == 2
    finally:
        (tmp_path / "gone").rename(recipe.data.image.path / "image_encoder")
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert "missing models_clip" in err
    assert "get models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth of" in err


def test_a_session_streams_with_what_it_made_of_the_portrait(tiny, tmp_path):
    """CLIP's tokens, the channels beside the noise and the face follow the portrait through a stream and its snapshot."""
    recipe, _ = tiny
    spec = spec_of(recipe)
    own = load_encoders(recipe.data, tmp_path, spec.network.reference)
    student = randomise(make_student(spec), 5).eval().requires_grad_(False)
    bundle = Bundle(student, own.codec, own.audio_encoder, own.text, None, own.image)
    sound, portraits = some_sound(40 * 640), [randn(3, 16, 16, seed=i).clamp(-1, 1) for i in (1, 2)]

    def opened(portrait):
        session = Session(bundle, portrait, "a person nods", seed=1)
        session.push(audio=sound)
        session.close()
        return session

    session, other = (opened(portrait) for portrait in portraits)
    first = [session.step() for _ in range(2)]
    save_session(session, tmp_path / "session.safetensors")
    assert not torch.equal(first[0].frames, other.step().frames)
    again = load_session(bundle, tmp_path / "session.safetensors")
    rest = [chunk.frames for chunk in session.frames()]
    assert len(rest) >= 2
    assert all(torch.equal(a, b.frames) for a, b in zip(rest, again.frames(), strict=True))
    with pytest.raises(UserError, match="reference image is missing: give one"):
        Session(bundle, None, "a person nods")
