"""LongCat-Video-Avatar's published files: avatar_single/ in shards with their index and config.json, LongCat-Video beside it."""

import json
from dataclasses import replace
from math import prod

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file

from distill.compose import RECIPES
from distill.pipeline.pretrained import fill_given, load_given
from distill.pipeline.tiny import write_weights
from distill.recipe import TeacherStage, load_recipe, spec_of
from teachers import load_teacher
from teachers.checkpoints import layouts
from teachers.checkpoints.convert import plan
from teachers.checkpoints.layouts import Architecture
from teachers.errors import UserError
from teachers.networks.kind import Dims
from teachers.networks.longcat import LongCat, LongCatConfig
from tests.support.checkpoints import assert_equal, convert, put, read_back, some_weights
from tests.support.networks.longcat import SMALL, longcat_conditions
from tests.support.networks.talk import some_people, talk_latents
from tests.support.tiny import randn

PUBLISHED = {
    "_class_name": "LongCatVideoAvatarTransformer3DModel", "in_channels": 16, "out_channels": 16, "hidden_size": 4096, "depth": 48,
    "num_heads": 32, "caption_channels": 4096, "mlp_ratio": 4, "adaln_tembed_dim": 512, "frequency_embedding_size": 256,
    "patch_size": [1, 2, 2], "text_tokens_zero_pad": True, "audio_window": 5, "audio_block": 12, "audio_channel": 768,
    "intermediate_dim": 512, "output_dim": 768, "context_tokens": 32, "vae_scale": 4, "audio_prenorm": False, "class_range": 24,
    "class_interval": 4,
}  # fmt: skip
"""The published config.json, without the switches of its attention kernels."""
SIZES = {"2D": 96, "3D": 144, "E": 20, "d": 24, "later": 8 * 6, "near": 5 * 6, "tokens": 3 * 12, "wide": 12}
TINY = Architecture(
    width=48, in_channels=4, out_channels=4, patch=(1, 2, 2), num_layers=2, ffn_dim=48, text_dim=16, freq_dim=32, packed=16,
    head_dim=24, kind="longcat", beyond=tuple(SIZES.items()), own=(("time_dim", 20), ("audio_dim", 30), ("audio_width", 12),
    ("audio_tokens", 3), ("row_states", 2), ("window", 5), ("speakers", 1)),
)  # fmt: skip


ONE = Dims(latent_channels=16, stride=4, text_dim=4096, audio_dim=46080)


def full(audio_dim: int, states: int) -> LongCat:
    with init_empty_weights():
        return LongCatConfig(row_states=states).new(replace(ONE, audio_dim=audio_dim))


def put_published(folder, adapter="avatar_single"):
    """weights/LongCat-Video-Avatar/avatar_single in shards with their index."""
    put(folder / "whole", some_weights(TINY, "longcat"), layouts.make_config(TINY, "longcat"))
    target = folder / "LongCat-Video-Avatar" / adapter
    target.parent.mkdir(parents=True)
    convert(folder / "whole", target, "longcat", shard_bytes=100_000)
    assert len([*target.glob("diffusion_pytorch_model-0*.safetensors")]) > 2
    return target


@pytest.mark.parametrize(
    ("given", "speakers"),
    [((), 1), (("data.world.speakers=2", "data.image.name=regions"), 2)],
    ids=["one speaker", "two speakers"],
)
def test_the_recipe_has_the_published_sizes(given, speakers):
    recipe = load_recipe(RECIPES / "longcat.yaml", ["teacher.path=weights/LongCat-Video-Avatar/avatar_single", *given])
    spec, network = spec_of(recipe), recipe.teacher.network
    assert network == spec.network == LongCatConfig()
    assert spec.dims == replace(ONE, audio_dim=speakers * 46080, speakers=speakers)
    assert (spec.fps, spec.horizon_frames, spec.audio_dim) == (16, 24, speakers * 46080)
    guidance, sampler = recipe.distill.method.guidance, recipe.teacher.sampler
    assert (guidance.first, guidance.audio, guidance.text, guidance.passes) == ("audio", 4.0, 4.0, 2)
    assert (sampler.grid, sampler.shift, sampler.num_steps) == ("closed", 12.0, 50)
    assert str(spec.text.path.resolve()).endswith("/weights/LongCat-Video")
    assert str(spec.audio.path.resolve()).endswith("/weights/LongCat-Video-Avatar/chinese-wav2vec2-base")
    assert spec.takes_image


@pytest.mark.parametrize(
    ("audio_dim", "states", "numbers"),
    [
        (46080, 12, 15_871_660_096),
        (32000, 5, 31_705_833_600 // 2),
    ],  # the second: total_size of the published index, in bf16
    ids=["1.0", "1.5"],
)
def test_the_published_number_of_parameters(audio_dim, states, numbers):
    net = full(audio_dim, states)
    shapes = {name: tuple(x.shape) for name, x in net.state_dict().items()}
    assert len(shapes) == 1608
    assert sum(map(prod, shapes.values())) == numbers
    config = {**PUBLISHED, "audio_block": states, "audio_channel": audio_dim // (5 * states)}
    architecture = layouts.with_config(layouts.infer(shapes, "here"), config, "here")
    assert layouts.tensors(architecture, "longcat") == layouts.tensors(architecture) == shapes
    assert layouts.make_config(architecture, "longcat") == config
    with init_empty_weights():
        made = LongCat.from_config(layouts.make_config(architecture, "ours"))
    assert {name: tuple(x.shape) for name, x in made.state_dict().items()} == shapes
    assert made.kind == net.kind


def test_there_and_back_is_bit_equal(tmp_path):
    folder = put_published(tmp_path)
    convert(folder, tmp_path / "ours", "ours", shard_bytes=150_000)
    assert_equal(read_back(tmp_path / "ours"), some_weights(TINY, "longcat"))
    convert(tmp_path / "ours", tmp_path / "back", "longcat")
    assert_equal(read_back(tmp_path / "back"), read_back(folder))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
    found = plan(tmp_path / "ours", "longcat"), plan(folder, "ours")
    assert [conversion.source.layout for conversion in found] == ["ours", "longcat"]
    assert found[0].architecture == found[1].architecture


def test_it_is_loaded_as_a_teacher(tmp_path):
    folder = put_published(tmp_path)
    teacher = load_teacher(folder)
    assert isinstance(teacher.denoiser.net, LongCat)
    assert teacher.denoiser.net.kind == SMALL
    given = longcat_conditions(some_people())
    x0 = teacher.sample(given, talk_latents(), num_steps=2, shift=12.0, grid="closed")
    assert torch.allclose(x0[:, :, :1], given.reference, atol=1e-5), "frame 0 is given, not drawn"
    convert(folder, tmp_path / "ours", "ours")
    again = load_teacher(tmp_path / "ours").sample(given, talk_latents(), num_steps=2, shift=12.0, grid="closed")
    assert torch.equal(again, x0)


def test_what_is_missing_or_does_not_fit_is_named(tmp_path):
    folder = put_published(tmp_path)
    for to in ("wan", "diffusers", "self-forcing"):
        with pytest.raises(UserError, match=rf"layout {to} cannot represent .*a network of kind longcat"):
            plan(folder, to)
    with pytest.raises(UserError, match=r"--widen has no effect: .* takes latents alone; remove it"):
        plan(folder, "ours", widen=True)
    tensors = some_weights(TINY, "longcat")
    del tensors["blocks.1.ffn.w3.weight"]
    tensors["blocks.0.pre_audio_crs_attn_norm.weight"] = randn(12)
    put(tmp_path / "wrong", tensors, layouts.make_config(TINY, "longcat"))
    with pytest.raises(UserError) as error:
        plan(tmp_path / "wrong", "ours")
    assert "missing blocks.1.ffn.w3.weight; unexpected blocks.0.pre_audio_crs_attn_norm.weight" in str(error.value)
    put(
        tmp_path / "other",
        some_weights(TINY, "longcat"),
        layouts.make_config(TINY, "longcat") | {"text_tokens_zero_pad": False},
    )
    with pytest.raises(
        UserError, match=r"text_tokens_zero_pad is false, where text padding is left out; it is not built"
    ):
        plan(tmp_path / "other", "ours")
    next(folder.glob("*-00002-of-*")).unlink()
    with pytest.raises(UserError, match=r"missing shard: .*-00002-of-.*index\.json asks for"):
        plan(folder, "ours")
    with pytest.raises(
        UserError, match=r"^no weights: .*/none does not exist; .*get meituan-longcat/LongCat-Video-Avatar .* hub$"
    ):
        fill_given(None, TeacherStage(network=SMALL, path=tmp_path / "none"))


def test_tiny_weights_are_in_the_published_layout(tmp_path):
    """What size=tiny writes is read by the code that reads the real ones."""
    recipe = load_recipe(RECIPES / "longcat.yaml", ["size=tiny", f"run_dir={tmp_path}"])
    spec, folder = spec_of(recipe), recipe.teacher.path
    write_weights(recipe, spec)
    config = json.loads((folder / "config.json").read_text())
    assert config["_class_name"] == "LongCatVideoAvatarTransformer3DModel"
    assert (config["audio_block"], config["audio_channel"], config["depth"]) == (2, 4, 6)
    assert (
        load_teacher(folder).denoiser.net.kind
        == load_given(recipe.teacher, spec, torch.device("cpu")).kind
        == recipe.teacher.network
    )
    assert (folder / "../../LongCat-Video/vae/config.json").is_file()
    assert (folder / "../chinese-wav2vec2-base/model.safetensors").is_file()


# ---- the few-step LoRA of 1.5

MODULES = {"attn.qkv": 3, "cross_attn.kv_linear": 2, "ffn.w1": 1}


def few_step() -> dict[str, torch.Tensor]:
    """Its names: one down and an up of each matrix that is in one; alpha / rank beside them."""
    shapes, found, rank = layouts.tensors(TINY), {}, 4
    for block in range(2):
        for i, (module, parts) in enumerate(MODULES.items()):
            rows, columns = shapes[f"blocks.{block}.{module}.weight"]
            name = "___lorahyphen___".join(["lora", "blocks", str(block), *module.split(".")])
            found[f"{name}.lora_down.weight"] = randn(parts * rank, columns, seed=i)
            found[f"{name}.alpha_scale"] = torch.tensor(0.5)
            for k in range(parts):
                up = f"lora_up.blocks.{k}" if parts > 1 else "lora_up"
                found[f"{name}.{up}.weight"] = randn(rows // parts, rank, seed=10 * i + k)
    return found


def test_its_few_step_lora_is_folded_strictly(tmp_path):
    folder, lora = put_published(tmp_path), few_step()
    save_file(lora, tmp_path / "dmd_lora.safetensors")
    convert(tmp_path / "dmd_lora.safetensors", tmp_path / "fast", "ours", base=folder)
    before, after = read_back(folder), read_back(tmp_path / "fast")
    changed = 0
    for name, weight in before.items():
        stem = "___lorahyphen___".join(["lora", *name.removesuffix(".weight").split(".")])
        parts = MODULES.get(name.removeprefix("blocks.0.").removeprefix("blocks.1.").removesuffix(".weight"))
        expected = weight.double()
        if parts:
            changed += 1
            ups = [lora[f"{stem}.lora_up{f'.blocks.{k}' if parts > 1 else ''}.weight"] for k in range(parts)]
            downs = lora[f"{stem}.lora_down.weight"].split(4)
            expected = expected + 0.5 * torch.cat([up @ down for up, down in zip(ups, downs, strict=True)]).double()
        assert torch.allclose(
            after[name].double(), expected, atol=1e-5, rtol=1e-2 if weight.dtype == torch.bfloat16 else 0
        ), name
    assert changed == 6
    del lora[
        "lora___lorahyphen___blocks___lorahyphen___1___lorahyphen___attn___lorahyphen___qkv.lora_up.blocks.1.weight"
    ]
    save_file(lora, tmp_path / "dmd_lora.safetensors")
    with pytest.raises(UserError, match=r"blocks\.1\.attn\.qkv\.lora_up\.blocks are \[0, 2\]"):
        plan(tmp_path / "dmd_lora.safetensors", "ours", base=folder)
