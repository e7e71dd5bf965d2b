"""InfiniteTalk's published files: an adapter over the shards of Wan2.1 image-to-video, and few-step LoRAs over both."""

import json
from dataclasses import replace
from math import prod

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file

from distill.compose import RECIPES
from distill.pipeline.pretrained import fill_given
from distill.recipe import TeacherStage, load_recipe, spec_of
from teachers import load_teacher
from teachers.checkpoints import layouts
from teachers.checkpoints.convert import plan
from teachers.errors import UserError
from teachers.networks.infinitetalk import InfiniteTalk, InfiniteTalkConfig
from teachers.networks.kind import Dims
from tests.support.checkpoints import IMAGE, assert_equal, convert, put, read_back, some_weights
from tests.support.networks.talk import some_people, talk_conditions, talk_latents
from tests.support.tiny import randn

BEYOND = {"2D": 512, "later": 8 * 6, "near": 5 * 6, "tokens": 3 * 12, "wide": 12}
TALK = replace(IMAGE, image_dim=20, packed=16, kind="infinitetalk", beyond=tuple(BEYOND.items()))
FULL = Dims(latent_channels=16, stride=4, text_dim=4096, audio_dim=46080, image_dim=1280)


def own(architecture=TALK):
    """The adapter's tensors."""
    tensors = some_weights(architecture, seed=5)
    return {name: tensors[name] for name in layouts.apart("infinitetalk", tensors)}


def put_published(folder, adapter="single"):
    """weights/Wan2.1-I2V-14B-480P in shards with their index, and weights/InfiniteTalk/single/infinitetalk.safetensors."""
    plain = replace(IMAGE, image_dim=20)
    put(folder / "whole", some_weights(plain), layouts.make_config(plain, "wan"))
    base = folder / "Wan2.1-I2V-14B-480P"
    convert(folder / "whole", base, "wan", shard_bytes=200_000)
    assert len([*base.glob("diffusion_pytorch_model-0*.safetensors")]) > 3
    target = folder / "InfiniteTalk" / adapter
    target.mkdir(parents=True)
    save_file(own(), target / "infinitetalk.safetensors")
    return base, target


@pytest.mark.parametrize(
    ("given", "speakers", "reference"),
    [
        ((), 1, True),
        (("teacher=multitalk",), 1, False),
        (("data.world.speakers=2", "data.image.name=wan_speakers"), 2, True),
        (("origin=few_step", "base.path=l.safetensors", "base.wan=it", "lora=null", "engine.kind=fsdp2"), 1, True),
    ],
    ids=["infinitetalk", "multitalk", "two speakers", "few-step start"],
)
def test_the_recipe_has_the_published_sizes(given, speakers, reference):
    recipe = load_recipe(RECIPES / "infinitetalk.yaml", ["teacher.path=weights/InfiniteTalk/single", *given])
    spec, network = spec_of(recipe), recipe.teacher.network
    with init_empty_weights():
        net = network.new(spec.dims)
    assert sum(p.numel() for p in net.parameters()) == 18_882_046_784
    assert spec.dims == replace(FULL, audio_dim=speakers * 46080, speakers=speakers)
    assert (net.kind, network.reference) == (network, reference)
    assert spec.network == network
    guidance = recipe.distill.method.guidance
    assert (guidance.first, guidance.audio, guidance.text) == ("audio", 4.0, 5.0)
    assert recipe.teacher.sampler.grid == "closed"
    assert str(recipe.teacher.wan.resolve()).endswith("/weights/Wan2.1-I2V-14B-480P")
    assert str(spec.audio.path).endswith("/weights/chinese-wav2vec2-base")
    assert spec.history.sinks == 1
    assert (recipe.base is None) == ("origin=few_step" not in given)


def test_the_published_number_of_parameters():
    with init_empty_weights():
        net = InfiniteTalkConfig().new(FULL)
    shapes = {name: tuple(x.shape) for name, x in net.state_dict().items()}
    adapter = layouts.apart("infinitetalk", shapes)
    assert sum(p.numel() for p in net.parameters()) == 18_882_046_784
    assert sum(prod(shapes[name]) for name in adapter) == 2_487_168_000
    assert len(adapter) == 10 + 40 * 8
    architecture = layouts.with_config(layouts.infer(shapes, "here"), {"speakers": 2}, "here")
    assert layouts.tensors(architecture) == shapes
    config = layouts.make_config(architecture, "ours")
    with init_empty_weights():
        made = InfiniteTalk.from_config(config)
    assert {name: tuple(x.shape) for name, x in made.state_dict().items()} == shapes
    assert made.speakers == 2
    assert made.config.audio_dim == 2 * 46080


@pytest.mark.parametrize("adapter", ["single", "multi"])
def test_there_and_back_is_bit_equal(tmp_path, adapter):
    base, folder = put_published(tmp_path, adapter)
    convert(folder, tmp_path / "ours", "ours", base=base, shard_bytes=300_000)
    found = read_back(tmp_path / "ours")
    published = read_back(base) | own()
    assert_equal({layouts.rename(name, layouts.TO_WAN): x for name, x in found.items()}, published)
    convert(tmp_path / "ours", tmp_path / "back", "wan")
    assert_equal(load_file(tmp_path / "back" / "infinitetalk.safetensors"), own())
    assert_equal(load_file(tmp_path / "back" / "diffusion_pytorch_model.safetensors"), read_back(base))
    again = plan(tmp_path / "back", "ours")  # both files are read
    assert again.architecture == plan(folder, "ours", base=base).architecture
    assert {name: x.read().sum() for name, x in again.tensors.items()} == {n: x.sum() for n, x in found.items()}


def test_what_is_missing_is_named(tmp_path):
    base, folder = put_published(tmp_path)
    with pytest.raises(
        UserError, match=r"missing patch_embedding\.weight, .*give the weights that these replace a part of as --base"
    ):
        plan(folder, "ours")
    text = replace(IMAGE, image_dim=0, in_channels=4)
    put(tmp_path / "t2v", some_weights(text), layouts.make_config(text, "wan"))
    with pytest.raises(
        UserError, match=r"infinitetalk goes with Wan's image-to-video weights, these have no image path"
    ):
        plan(folder, "ours", base=tmp_path / "t2v")
    tensors = own()
    del tensors["blocks.2.norm_x.bias"]
    tensors["blocks.1.audio_cross_attn.kv_linear.weight"] = randn(2 * 256, 11)
    tensors["blocks.1.audio_cross_attn.q_norm.weight"] = randn(128)
    save_file(tensors, folder / "infinitetalk.safetensors")
    with pytest.raises(UserError) as error:
        plan(folder, "ours", base=base)
    assert "missing blocks.2.norm_x.bias; unexpected blocks.1.audio_cross_attn.q_norm.weight; " in str(error.value)
    assert "kv_linear.weight is [512, 11] where [512, 12] is needed" in str(error.value)
    next(base.glob("*-00002-of-*")).unlink()
    with pytest.raises(UserError, match="-00002-of-"):
        plan(folder, "ours", base=base)


def test_where_missing_weights_are_to_be_had_is_said(tmp_path):
    base, folder = put_published(tmp_path)
    for stage in (
        TeacherStage(network=InfiniteTalkConfig(), path=tmp_path / "none", wan=base),
        TeacherStage(network=InfiniteTalkConfig(), path=folder, wan=tmp_path / "none"),
    ):
        with pytest.raises(
            UserError, match=r"^no weights: .*/none does not exist; .*get MeiGen-AI/InfiniteTalk .* hub$"
        ):
            fill_given(None, stage)


def test_it_is_loaded_as_a_teacher(tmp_path):
    base, folder = put_published(tmp_path)
    teacher = load_teacher(folder, base=base)
    assert isinstance(teacher.denoiser.net, InfiniteTalk)
    given = talk_conditions(some_people())
    x0 = teacher.sample(given, talk_latents(), num_steps=2, shift=7.0)
    assert x0.isfinite().all()
    assert torch.allclose(x0[:, :, :1], given.reference, atol=1e-5), "frame 0 is given, not drawn"
    convert(folder, tmp_path / "ours", "ours", base=base)
    again = load_teacher(tmp_path / "ours").sample(given, talk_latents(), num_steps=2, shift=7.0)
    assert torch.equal(again, x0)


# ---- few-step LoRAs

CHANGED = {"self_attn.q": 4, "cross_attn.k_img": 6, "ffn.2": 4}


def few_step() -> dict[str, torch.Tensor]:
    """lightx2v's names: pairs without alpha, each of its own rank, and differences of biases, norms and modulations."""
    shapes, found = layouts.tensors(replace(IMAGE, image_dim=20), "wan"), {}
    for block in range(4):
        for i, (module, rank) in enumerate(CHANGED.items()):
            rows, columns = shapes[f"blocks.{block}.{module}.weight"]
            name, seed = f"diffusion_model.blocks.{block}.{module}", 10 * block + i
            found[f"{name}.lora_down.weight"] = randn(rank, columns, seed=seed) / columns**0.5
            found[f"{name}.lora_up.weight"] = randn(rows, rank, seed=seed + 1)
            found[f"{name}.diff_b"] = randn(rows, seed=seed + 2)
        found[f"diffusion_model.blocks.{block}.diff_m"] = randn(1, 6, 256, seed=block)
        found[f"diffusion_model.blocks.{block}.cross_attn.norm_k_img.diff"] = randn(256, seed=block + 3)
    return found | {
        "diffusion_model.head.head.diff_b": randn(16, seed=5),
        "diffusion_model.head.diff_m": randn(1, 2, 256),
    }


def test_a_few_step_lora_is_folded_strictly(tmp_path):
    base, folder = put_published(tmp_path)
    convert(folder, tmp_path / "ours", "ours", base=base)
    lora = few_step()
    save_file(lora, tmp_path / "lora.safetensors")
    convert(tmp_path / "lora.safetensors", tmp_path / "fast", "wan", base=tmp_path / "ours")
    before = read_back(base) | own()
    after = {name: x for file in (tmp_path / "fast").glob("*.safetensors") for name, x in load_file(file).items()}
    assert after.keys() == before.keys()
    changed = 0
    for name, weight in before.items():
        stem, _, kind = name.rpartition(".")
        stem = f"diffusion_model.{stem}"
        change = lora.get(f"{stem}.{ {'weight': 'diff', 'bias': 'diff_b', 'modulation': 'diff_m'}[kind] }")
        if kind == "weight" and f"{stem}.lora_up.weight" in lora:
            change = lora[f"{stem}.lora_up.weight"] @ lora[f"{stem}.lora_down.weight"]
        changed += change is not None
        expected = weight if change is None else (weight.double() + change.double()).to(weight.dtype)
        assert torch.allclose(after[name].float(), expected.float(), atol=1e-5, rtol=1e-2), name
        assert change is not None or torch.equal(after[name], weight)
    assert changed == 4 * (3 + 3 + 2) + 2


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            {"diffusion_model.blocks.0.self_attn.w.diff_b": (256,)},
            r"unexpected blocks\.0\.self_attn\.w\.bias \(difference\)",
        ),
        (
            {"diffusion_model.blocks.1.diff_m": (1, 5, 256)},
            r"blocks\.1\.modulation \(difference\) is \[1, 5, 256\] where \[1, 6,",
        ),
        ({"diffusion_model.blocks.9.ffn.0.lora_down.weight": (4, 256)}, r"unexpected blocks\.9\.ffn\.0\.lora_A"),
        (
            {"diffusion_model.blocks.0.self_attn.k.lora_down.weight": (4, 256)},
            r"missing blocks\.0\.self_attn\.k\.lora_B",
        ),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(tmp_path, wrong, words):
    base, folder = put_published(tmp_path)
    convert(folder, tmp_path / "ours", "ours", base=base)
    save_file(few_step() | {name: randn(*shape) for name, shape in wrong.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=words):
        plan(tmp_path / "lora.safetensors", "ours", base=tmp_path / "ours")


def test_a_lora_with_differences_cannot_be_kept_apart(tmp_path):
    base, folder = put_published(tmp_path)
    convert(folder, tmp_path / "ours", "ours", base=base)
    save_file(few_step(), tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="differences of whole tensors; fold it"):
        plan(tmp_path / "lora.safetensors", "ours", base=tmp_path / "ours", lora="adapter")
    (tmp_path / "ours" / "config.json").write_text(json.dumps({"num_layers": 40}))
    with pytest.raises(UserError, match=r"config\.json states 40 layers, the weights have 4"):
        plan(tmp_path / "ours", "ours")
