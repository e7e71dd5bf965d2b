"""Wan2.2-S2V's published files, shards with their index and config, and LiveAvatar's LoRA over them."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file

from distill.compose import RECIPES
from distill.pipeline.pretrained import fill_given
from distill.recipe import TeacherStage, load_recipe, spec_of
from teachers import load_teacher
from teachers.checkpoints import layouts
from teachers.checkpoints.convert import plan
from teachers.checkpoints.lora import _targets
from teachers.errors import UserError
from teachers.networks.kind import Dims
from teachers.networks.s2v import S2V, S2VConfig
from tests.support.checkpoints import TEXT_TO_VIDEO, assert_equal, convert, put, read_back, some_weights
from tests.support.networks.s2v import s2v_conditions, s2v_latents, some_rows
from tests.support.tiny import randn

BEYOND = {"audio": 5, "half": 128, "local": 256, "quarter": 64, "states": 3, "twice": 512}
OWN = {"audio_dim": 15, "audio_states": 3, "audio_heads": 4, "inject_after": [0, 3]}
SMALL = replace(TEXT_TO_VIDEO, kind="s2v", num_audio=2, beyond=tuple(BEYOND.items()), own=tuple(OWN.items()))
FULL = Dims(latent_channels=16, stride=4, text_dim=4096, audio_dim=25600)


def full_shapes():
    with init_empty_weights():
        net = S2VConfig().new(FULL)
    return {name: tuple(x.shape) for name, x in net.named_parameters()}


def published(folder):
    """Wan2.2-S2V-14B/ in shards with their index, and its config.json."""
    put(folder / "whole", some_weights(SMALL), layouts.make_config(SMALL, "wan"))
    base = folder / "Wan2.2-S2V-14B"
    convert(folder / "whole", base, "wan", shard_bytes=200_000)
    assert len([*base.glob("diffusion_pytorch_model-0*.safetensors")]) > 3
    return base


def test_the_published_number_of_parameters():
    """By the published modules, one after the other; the recipe's network is the same."""
    d, ffn, layers, text = 5120, 13824, 40, 4096
    attention = 4 * (d * d + d) + 2 * d
    wan = (16 * 4 * d + d) + (text * d + d) + (d * d + d) + (256 * d + d) + (d * d + d) + (d * 6 * d + 6 * d)
    wan += layers * (2 * attention + 2 * d + (d * ffn + ffn) + (ffn * d + d) + 6 * d) + (d * 64 + 64) + 2 * d
    conv1 = (1024 * 3 * d + d) + (1024 * 3 * d // 4 + d // 4)
    audio = 25 + conv1 + (d // 4 * 3 * d // 2 + d // 2) + (d // 2 * 3 * d + d) + (d * d + d) + d
    injectors, adain = 12 * attention, 12 * (d * 2 * d + 2 * d)
    packer = 3 * d + 16 * d * (4 + 32 + 256)
    total = wan + audio + injectors + adain + packer + (16 * 4 * d + d) + 3 * d
    shapes = full_shapes()
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == total == 16_295_755_609
    architecture = layouts.with_config(layouts.infer(shapes, "here"), {}, "here")
    assert layouts.tensors(architecture) == shapes
    config = layouts.make_config(architecture, "wan")
    assert (config["_class_name"], config["model_type"], config["cond_dim"]) == ("WanModel_S2V", "s2v", 16)
    assert config["audio_inject_layers"] == [0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39]
    recipe = load_recipe(RECIPES / "s2v.yaml", ["teacher.path=models/Wan2.2-S2V-14B"])
    spec = spec_of(recipe)
    assert spec.dims == FULL
    assert recipe.teacher.network == spec.network == S2VConfig()
    assert (spec.fps, spec.horizon_frames, spec.num_chunks, spec.step) == (16, 18, 6, "ode")
    assert str(spec.audio.path).endswith("Wan2.2-S2V-14B/wav2vec2-large-xlsr-53-english")


def test_there_and_back_is_bit_equal(tmp_path):
    base = published(tmp_path)
    convert(base, tmp_path / "ours", "ours", shard_bytes=300_000)
    found = read_back(tmp_path / "ours")
    assert_equal({layouts.rename(name, layouts.TO_WAN): x for name, x in found.items()}, read_back(base))
    convert(tmp_path / "ours", tmp_path / "back", "wan")
    assert_equal(read_back(tmp_path / "back"), some_weights(SMALL))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == layouts.make_config(SMALL, "wan")
    with init_empty_weights():
        made = S2V.from_config(json.loads((tmp_path / "ours" / "config.json").read_text()))
    assert made.kind.inject_after == (0, 3)


def test_what_is_missing_is_named(tmp_path):
    base = published(tmp_path)
    stage = TeacherStage(network=S2VConfig(), path=tmp_path / "none")
    with pytest.raises(
        UserError, match=r"^no weights: .*/none does not exist; .*get Wan-AI/Wan2\.2-S2V-14B from .* hub$"
    ):
        fill_given(None, stage)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"audio_inject_layers": [0, 1, 2]}))
    with pytest.raises(
        UserError, match=r"2 audio injectors, where config\.json has 3 audio_inject_layers; copy the config"
    ):
        plan(base, "ours")
    (base / "config.json").write_text(json.dumps(config))
    tensors = some_weights(SMALL)
    del tensors["frame_packer.proj_2x.bias"]
    tensors["audio_injector.injector.1.q.weight"] = randn(256, 7)
    tensors["audio_injector.injector_adain_output_layers.0.weight"] = randn(3)
    put(tmp_path / "wrong", tensors, config)
    with pytest.raises(UserError) as error:
        plan(tmp_path / "wrong", "ours")
    assert "missing frame_packer.proj_2x.bias; unexpected audio_injector.injector_adain_output_layers.0" in str(
        error.value
    )
    assert "audio_injector.injector.1.q.weight is [256, 7] where [256, 256] is needed" in str(error.value)
    next(base.glob("*-00002-of-*")).unlink()
    with pytest.raises(UserError, match="-00002-of-"):
        plan(base, "ours")


def test_it_is_loaded_as_a_teacher(tmp_path):
    teacher, given = load_teacher(published(tmp_path)), s2v_conditions(some_rows())
    assert isinstance(teacher.denoiser.net, S2V)
    x0 = teacher.sample(given, s2v_latents(), num_steps=2, shift=3.0, grid="unipc")
    assert x0.isfinite().all()


# ---- LiveAvatar


def live_lora(rank: int = 128, prefix: str = "") -> dict[str, torch.Tensor]:
    """liveavatar.safetensors: peft's names, pairs on every q, k, v, o, ffn.0 and ffn.2."""
    found = {}
    for i, (name, shape) in enumerate(layouts.tensors(SMALL, "wan").items()):
        if name.endswith((".q.weight", ".k.weight", ".v.weight", ".o.weight", ".ffn.0.weight", ".ffn.2.weight")):
            stem = prefix + name.removesuffix(".weight")
            found[f"{stem}.lora_A.weight"] = randn(rank, shape[1], seed=i) / shape[1] ** 0.5
            found[f"{stem}.lora_B.weight"] = 0.1 * randn(shape[0], rank, seed=i + 1)
    return found


def test_the_published_lora_has_448_modules():
    tensors = {name: SimpleNamespace(shape=shape) for name, shape in full_shapes().items()}
    targets = _targets(tensors, {})  # pyright: ignore[reportArgumentType]
    assert len(targets) == 40 * (8 + 2) + 12 * 4 == 448
    assert sum(128 * sum(tensors[name].shape) for name in targets) == 676_331_520


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_liveavatar_s_lora_folds_over_the_shards(tmp_path, prefix):
    """W + 0.5 B A, by rank 128 and alpha 64, which no file beside it states."""
    base, lora = published(tmp_path), live_lora(prefix=prefix)
    (tmp_path / "live").mkdir()
    save_file(lora, tmp_path / "live" / "liveavatar.safetensors")
    convert(tmp_path / "live", tmp_path / "student", "wan", base=base)
    before, after = read_back(base), read_back(tmp_path / "student")
    assert after.keys() == before.keys()
    changed = 0
    for name, weight in before.items():
        stem = prefix + name.removesuffix(".weight")
        if f"{stem}.lora_A.weight" in lora:
            change = 0.5 * lora[f"{stem}.lora_B.weight"].double() @ lora[f"{stem}.lora_A.weight"].double()
            expected = (weight.double() + change).to(weight.dtype)
            assert torch.allclose(after[name].float(), expected.float(), atol=1e-5, rtol=1e-2), name
            changed += 1
        else:
            assert torch.equal(after[name], weight), name
    assert changed == 4 * 10 + 2 * 4


@pytest.mark.parametrize(
    ("drop", "add", "words"),
    [
        ("audio_injector.injector.1.v.lora_B.weight", {}, r"missing audio_injector\.injector\.1\.v\.lora_B"),
        ("blocks.2.cross_attn.k", {}, r"missing blocks\.2\.cross_attn\.k\.lora_A\.weight"),
        (
            None,
            {"audio_injector.injector.2.q.lora_A.weight": (128, 256)},
            r"unexpected audio_injector\.injector\.2\.q\.lora_A",
        ),
        (None, {"blocks.0.ffn.1.lora_A.weight": (128, 256)}, r"unexpected blocks\.0\.ffn\.1\.lora_A"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(tmp_path, drop, add, words):
    base = published(tmp_path)
    lora = {name: x for name, x in live_lora().items() if drop is None or not name.startswith(drop)}
    save_file(lora | {name: randn(*shape) for name, shape in add.items()}, tmp_path / "liveavatar.safetensors")
    with pytest.raises(UserError, match=words):
        plan(tmp_path / "liveavatar.safetensors", "ours", base=base)
