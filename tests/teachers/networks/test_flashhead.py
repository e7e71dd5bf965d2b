"""SoulX-FlashHead: its forward equals the equations, faults in them are seen, its sound's window, its stream, size and weights."""

import json
import wave
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from distill.cli import main
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
from teachers.encoders.small import NoTextConfig
from teachers.encoders.still import StillConfig
from teachers.encoders.wav2vec import Wav2VecConfig
from teachers.errors import UserError
from teachers.networks.flashhead import FlashHeadConfig
from teachers.networks.kind import AvatarTeacher, Dims
from teachers.teacher import load_teacher
from tests.support.faults import deviations, published
from tests.support.networks.streams import check_stream
from tests.support.networks.talk import windows
from tests.support.tiny import fitted_codec, make_spec, randn, randomise, some_sound
from tests.teachers.reference.flashhead import FAULTS, FlashHead

FRAMES, CHANNELS, SIDE, ROW, TEXT, STATE, HEADS, TOKENS = 4, 3, 4, 10, 12, 6, 2, 3
SIZES = {"num_heads": HEADS, "head_dim": 24, "ffn_dim": 64, "freq_dim": 32, "audio_hidden": 16, "audio_tokens": TOKENS}
CONFIG = FlashHeadConfig(num_layers=2, **SIZES, text_dim=TEXT, audio_state=STATE)
DIMS = Dims(latent_channels=CHANNELS, stride=4, text_dim=0, audio_dim=5 * ROW)
LITE = replace(CONFIG, patch=1), replace(DIMS, stride=8)
SIGMA = torch.tensor([0.9, 0.4])
PRO_SIZES = Dims(latent_channels=16, stride=4, text_dim=0, audio_dim=5 * 12 * 768)
LITE_SIZES = Dims(latent_channels=128, stride=8, text_dim=0, audio_dim=5 * 12 * 768)


def a_net(config: FlashHeadConfig = CONFIG, dims: Dims = DIMS, seed: int = 0):
    return randomise(config.new(dims), seed).eval().requires_grad_(False)


def inputs(frames: int = FRAMES, stride: int = 4, batch: int = 2):
    """Latents with the given frame in its place, the conditions, and the parts of these as the reference takes them."""
    rows = randn(batch, 1 + stride * (frames - 1), ROW, seed=5)
    latents = randn(batch, CHANNELS, frames, SIDE, SIDE, seed=6)
    given = Conditions(
        text=torch.zeros(batch, 1, 0),
        audio=pack_rows(windows(rows), stride),
        beside=latents,
        reference=latents[:, :, :1],
    )
    x = torch.cat([latents[:, :, :1], randn(batch, CHANNELS, frames - 1, SIDE, SIDE, seed=9)], dim=2)
    return x, given, (latents, SIGMA[:batch], rows)


def output(net, x: torch.Tensor, given: Conditions, sigma: torch.Tensor = SIGMA) -> torch.Tensor:
    return net.kind.run(net, net.kind.compose(x, given, given.known)[1], sigma, given)


@pytest.mark.parametrize(("config", "dims"), [(CONFIG, DIMS), LITE], ids=["pro", "lite"])
def test_the_forward_equals_the_equations(config, dims):
    net, (x, given, parts) = a_net(config, dims), inputs(stride=dims.stride)
    expected = FlashHead(published(net), HEADS, stride=dims.stride)(x, *parts)
    assert expected.std() > 0.3
    assert (output(net, x, given) - expected).abs().max() < 1e-5


deviation = deviations(FlashHead, a_net, inputs, SIGMA, HEADS)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_equations_is_seen(fault):
    assert deviation() < 2e-6
    assert deviation(fault) > 100 * deviation()


def test_zero_rows_are_no_audio_and_text_is_not_read():
    net, (x, given, (latents, sigma, rows)) = a_net(), inputs()
    silent = FlashHead(published(net), HEADS)(x, latents, sigma, torch.zeros_like(rows))
    assert (output(net, x, given.drop("audio")) - silent).abs().max() < 1e-5
    expected = output(net, x, given)
    assert (expected - silent).abs().max() > 0.05
    for text in (None, randn(2, 5, TEXT, seed=1)):
        assert torch.equal(output(net, x, replace(given, text=text)), expected)


def test_frame_0_is_given():
    net, (x, given, _) = a_net(), inputs()
    other = x.clone()
    other[:, :, 0] += 1.0
    one, two = (AvatarTeacher(net).denoise(value, SIGMA, given) for value in (x, other))
    assert torch.equal(one, two)
    assert torch.equal(one[:, :, :1], given.reference)


@pytest.mark.parametrize(("config", "dims"), [(CONFIG, DIMS), LITE], ids=["pro", "lite"])
def test_a_latent_frame_reads_its_rows_and_no_other(config, dims):
    """Row by row, of the sound without neighbours: two rows beyond its last pixel frame, in the teacher's clip and in a stream."""
    net, frames, stride = a_net(config, dims), 4, dims.stride
    rows = randn(2, 1 + stride * (frames - 1), ROW, seed=5)

    def keys(values, numbers):
        return net.read_audio(pack_rows(windows(values), stride), numbers)[1].key

    for numbers in (None, (0, 1, 1, 1)):
        before = keys(rows, numbers)
        for t in range(rows.shape[1]):
            changed = rows.clone()
            changed[:, t] += 1.0
            moved = (keys(changed, numbers) - before).abs().amax(dim=(0, 2, 3, 4)) > 0
            spans = [(stride * i - stride - 1 if i else -2, stride * i + 2) for i in range(frames)]
            assert moved.tolist() == [first <= t <= last for first, last in spans], t


def a_student(history: History, chunk_frames: int = 2):
    spec = make_spec(
        history,
        network=CONFIG,
        codec=CodecConfig(stride=4, patch=4, channels=CHANNELS),
        audio=Wav2VecConfig(features=5 * ROW, states="layers", window=(2, 2), lookahead_frames=6),
        text=NoTextConfig(),
        image=StillConfig(),
        chunk_frames=chunk_frames,
        horizon_frames=6,
    )
    return randomise(make_student(spec), 3).eval().requires_grad_(False)


def test_a_stream_is_its_masked_forward_and_sees_nothing_later():
    student, (x, given, _) = a_student(History(sinks=1, window=1)), inputs(frames=6)
    together, again = check_stream(student, x, given)
    for frame in (2, 4):
        audio = given.audio.clone()
        audio[:, frame] += 1.0
        moved = (again(x, replace(given, audio=audio)) - together).abs().amax((0, 1, 3, 4))
        assert not moved[:frame].any()
        assert (moved[frame : frame + 2] > 0).all()


def test_streams_together_are_each_alone():
    """Two streams of other ages and texts in one batch, which have no text to join."""
    student, (x, given, _) = a_student(History(sinks=1, window=1)), inputs(frames=6)
    states = []
    for row, age in enumerate((1, 2)):
        own, state = given.index(slice(row, row + 1)), student.open(given.text[:1])
        for k in range(age):
            cut = slice(2 * k, 2 * k + 2)
            state = student.commit(state, x[row : row + 1, :, cut], own.frames(2 * k, 2 * k + 2))
        states.append((state, own.frames(2 * age, 2 * age + 2)))
    joined = student.join([state for state, _ in states])
    parts = Conditions.join_rows([part for _, part in states])
    x0, _ = student.denoise(joined, student.plan(joined, parts), x[:, :, :2], 0.5, parts)
    for row, (state, part) in enumerate(states):
        alone, _ = student.denoise(state, student.plan(state, part), x[row : row + 1, :, :2], 0.5, part)
        assert (x0[row] - alone[0]).abs().max() < 1e-5


def test_the_still_video_is_the_image_in_every_pixel_frame():
    codec = fitted_codec()
    image = (0.3 * randn(2, 3, 16, 16, seed=4)).clamp(-1, 1)
    given = {
        name: StillConfig(grey=grey).load()(image, codec, 4)["beside"]
        for name, grey in (("still", False), ("grey", True))
    }
    frames = 1 + 3 * codec.config.stride
    for name, rest in (("still", image), ("grey", torch.zeros_like(image))):
        video = torch.stack([image, *[rest] * (frames - 1)], dim=2)
        assert torch.allclose(given[name], codec.encode(video), atol=1e-6)
    sizes = StillConfig().sizes(codec.config.stride, codec.config.channels, 4, 4, 4)["beside"]
    assert given["still"].shape[1:] == sizes


# ---- size and weights


def file_size(architecture: layouts.Architecture) -> int:
    """Bytes of a safetensors file of the published layout in fp32, header included."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in sorted(layouts.tensors(architecture, "wan").items()):
        start, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    size = len(json.dumps(header, separators=(",", ":")))
    return 8 + size + -size % 8 + end


@pytest.mark.parametrize(
    ("config", "dims", "parameters", "size"),
    [
        (FlashHeadConfig(), PRO_SIZES, 1_507_694_912, 6_030_864_656),
        (FlashHeadConfig(patch=1), LITE_SIZES, 1_526_864_256, 6_107_542_048),
    ],
    ids=["pro", "lite"],
)
def test_the_published_size(config, dims, parameters, size):
    """Parameters of the published module, the unused ones included; bytes of the published files."""
    with torch.device("meta"):
        net = config.new(dims)
    assert sum(p.numel() for p in net.parameters()) == parameters
    architecture = layouts.infer({name: tuple(p.shape) for name, p in net.named_parameters()}, "here")
    names = layouts.tensors(architecture, "wan")
    assert architecture.kind == "flashhead"
    assert (len(names), file_size(architecture)) == (843, size)
    assert names["audio_proj.proj1_vf.weight"] == (512, (5 + dims.stride - 1) * 12 * 768)
    assert names["text_embedding.0.weight"] == (1536, 4096)
    unused = [name for name in names if name.startswith(("text_embedding", "audio_emb"))]
    assert len(unused) == 12


PUBLISHED = {"dim": 256, "ffn_dim": 64, "freq_dim": 32, "text_dim": TEXT, "num_heads": 2, "num_layers": 2, "eps": 1e-6}


@pytest.fixture(scope="module", params=["pro", "lite"])
def model(request, tmp_path_factory):
    """A folder as Model_Pro or Model_Lite, with random weights of several types."""
    lite = request.param == "lite"
    config, dims = replace(CONFIG, head_dim=128, patch=1 if lite else 2), LITE[1] if lite else DIMS
    folder, tensors = tmp_path_factory.mktemp(request.param), {}
    for i, (name, value) in enumerate(published(a_net(config, dims, 4)).items()):
        tensors[name] = (value.bfloat16() if i % 3 == 0 else value).detach().contiguous()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    stride, cell, patch = dims.stride, 32 if lite else 8, config.patch
    facts = {"_class_name": "WanModelAudioProject", **PUBLISHED, "in_dim": 2 * CHANNELS, "out_dim": CHANNELS}
    facts |= {"vae_stride": [stride, cell, cell], "patch_size": [1, patch, patch], "has_image_input": False}
    (folder / "config.json").write_text(json.dumps(facts))
    return folder, tensors, config, facts


def test_the_converter_is_bit_equal_both_ways(model, tmp_path):
    folder, tensors, config, facts = model
    plan(folder, "ours").write(tmp_path / "ours")
    plan(tmp_path / "ours", "wan").write(tmp_path / "again")
    found = load_file(tmp_path / "again" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == x.dtype and torch.equal(found[name], x) for name, x in tensors.items())
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {name: again[name] for name in facts} == facts
    for source in (folder, tmp_path / "ours", tmp_path / "again"):
        net = load_teacher(source).denoiser.net
        assert net.kind == config
        assert torch.equal(net.audio_emb["proj"][3].weight, tensors["audio_emb.proj.3.weight"].float())
    stride = facts["vae_stride"][0]
    x, given, parts = inputs(stride=stride)
    expected = FlashHead({name: x.float() for name, x in tensors.items()}, 2, stride=stride)(x, *parts)
    assert (output(net, x, given) - expected).abs().max() < 1e-5


def test_weights_of_lite_want_their_config(model, tmp_path):
    _, tensors, _, facts = model
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    if facts["vae_stride"][0] == 4:
        assert plan(tmp_path, "ours").architecture.stride == 4
        return
    with pytest.raises(UserError, match=r"no window of rows at 4 pixel frames a latent; copy the config\.json"):
        plan(tmp_path, "ours")


def test_sizes_that_do_not_fit_are_one_line():
    for change, fix in (
        ({"text_dim": 8}, r"data\.text=\{name: none\}"),
        ({"image_dim": 8}, r"data\.image=\{name: still\}"),
        ({"audio_dim": 5 * ROW + 1}, r"window: \[2, 2\]"),
        ({"audio_dim": 0}, r"states: layers"),
        ({"audio_dim": 10 * ROW, "speakers": 2}, "one speaker"),
    ):
        with pytest.raises(UserError, match=fix):
            CONFIG.new(replace(DIMS, **change))
    with pytest.raises(UserError, match="give an odd number"):
        replace(CONFIG, window=4).check()


def test_the_recipe_reads_the_folders_of_its_readme(tmp_path, capsys):
    """Random small weights where its paths point: the teacher samples, Pro may start the student, and what is missing is one line
    that says where to get it."""
    words = ["size=tiny", f"run_dir={tmp_path}", "teacher.sampler.num_steps=2"]
    recipe = load_recipe(RECIPES / "flashhead.yaml", words)
    spec = spec_of(recipe)
    write_weights(recipe, spec)
    parts = recipe.teacher.path, recipe.data.codec.path, recipe.data.audio.path
    net = load_given(recipe.teacher, spec, torch.device("cpu"))
    assert all(path.is_dir() for path in parts)
    assert (net.kind.audio_tokens, net.kind.text_dim, net.kind.window) == (3, 12, 5)
    assert recipe.lora.targets == net.kind.lora_targets
    files = {name: str(tmp_path / name) for name in ("face.png", "a.wav", "t.mp4")}
    Image.new("RGB", (40, 40), (90, 60, 30)).save(files["face.png"])
    with wave.open(files["a.wav"], "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((some_sound(16_000) * 20_000).short().numpy().tobytes())
    sample = ["sample", "--teacher", str(RECIPES / "flashhead.yaml"), *words, "--text", "", "--out", files["t.mp4"]]
    assert main([*sample, "--image", files["face.png"], "--audio", files["a.wav"]]) == 0
    assert "21 frames, 0.84 s, 2 steps of 2 passes" in capsys.readouterr().out
    (recipe.teacher.path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"get Soul-AILab/SoulX-FlashHead-1_3B"):
        load_given(recipe.teacher, spec, torch.device("cpu"))
    words = ["teacher.path=a", "origin=few_step", "base.path=b", "base.wan=null", "lora=null"]
    started = load_recipe(RECIPES / "flashhead.yaml", words)
    assert started.base.network == started.teacher.network
    assert spec_of(started).sigmas == pytest.approx((1.0, 0.9375, 5 / 6, 0.625))  # Pro's own
