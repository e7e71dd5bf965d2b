"""Published checkpoints <-> ours: bit-equal round trips, equal outputs, bounded memory."""

import argparse
import json
import os
import re
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from distill.commands.convert import add_arguments, run
from students.weights.checkpoint import save_student
from teachers.checkpoints import layouts, weights
from teachers.checkpoints.convert import plan
from teachers.errors import UserError
from tests.support import processes
from tests.support.checkpoints import (
    ALPHA,
    AVATAR,
    IMAGE,
    RANK,
    STEM,
    TEXT_TO_VIDEO,
    assert_equal,
    convert,
    fp32,
    load_network,
    put,
    put_lora,
    put_wan,
    read_back,
    some_weights,
)
from tests.support.tiny import a_bundle, randn

SIGMA = torch.tensor([0.9, 0.4])


@pytest.mark.parametrize(
    "architecture", [TEXT_TO_VIDEO, replace(TEXT_TO_VIDEO, in_channels=9), IMAGE], ids=["text", "reference", "image"]
)
def test_wan_ours_diffusers_ours_wan_is_bit_equal(tmp_path, architecture):
    put_wan(tmp_path / "wan", architecture)
    for source, target, to in [("wan", "a", "ours"), ("a", "b", "diffusers"), ("b", "c", "ours"), ("c", "d", "wan")]:
        found = convert(tmp_path / source, tmp_path / target, to)
        assert found.num_parameters == sum(prod(shape) for shape in layouts.tensors(architecture).values())
        assert read_back(tmp_path / target).keys() == layouts.tensors(architecture, to).keys()
    assert_equal(read_back(tmp_path / "d"), some_weights(architecture))
    assert_equal(read_back(tmp_path / "a"), read_back(tmp_path / "c"))
    for target in "abcd":
        files = sorted((tmp_path / target).iterdir())
        assert [file.name for file in files] == ["config.json", STEM]
        assert files[0].stat().st_mode == files[1].stat().st_mode


@pytest.mark.parametrize("architecture", [TEXT_TO_VIDEO, AVATAR, IMAGE], ids=["text", "avatar", "image"])
def test_self_forcing_ours_self_forcing_is_bit_equal(tmp_path, architecture):
    torch.save({"generator": some_weights(architecture, "self-forcing")}, tmp_path / "model.pt")
    convert(tmp_path / "model.pt", tmp_path / "ours", "ours")
    convert(tmp_path / "ours", tmp_path / "again.pt", "self-forcing")
    assert_equal(read_back(tmp_path / "again.pt"), some_weights(architecture, "self-forcing"))
    convert(tmp_path / "ours", tmp_path / "same.pt", "self-forcing")
    assert (tmp_path / "same.pt").read_bytes() == (tmp_path / "again.pt").read_bytes()
    assert convert(tmp_path / "again.pt", tmp_path / "b", "ours").source.layout == "self-forcing"
    assert_equal(read_back(tmp_path / "b"), read_back(tmp_path / "ours"))


def test_an_image_to_video_network_goes_from_wan_to_diffusers_and_back(tmp_path):
    put_wan(tmp_path / "wan", IMAGE)
    convert(tmp_path / "wan", tmp_path / "a", "diffusers")
    net, report = WanTransformer3DModel.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(report.values())
    assert net.config.image_dim == 24
    held = load_file(tmp_path / "a" / STEM) | {"blocks.1.attn2.norm_added_q.weight": torch.ones(256)}
    put(tmp_path / "published", held, json.loads((tmp_path / "a" / "config.json").read_text()))
    assert convert(tmp_path / "published", tmp_path / "b", "wan").source.ignored == (
        "blocks.1.attn2.norm_added_q.weight",
    )
    assert_equal(read_back(tmp_path / "b"), some_weights(IMAGE))


@torch.no_grad()
@pytest.mark.parametrize("architecture", [TEXT_TO_VIDEO, IMAGE], ids=["text", "image"])
def test_the_converted_network_is_diffusers_wan(tmp_path, architecture):
    put_wan(tmp_path / "wan", architecture)
    convert(tmp_path / "wan", tmp_path / "ours", "ours")
    convert(tmp_path / "ours", tmp_path / "diffusers", "diffusers")
    theirs, report = WanTransformer3DModel.from_pretrained(tmp_path / "diffusers", output_loading_info=True)
    assert not any(report.values())
    ours = load_network(tmp_path / "ours")
    x, text = randn(2, architecture.in_channels, 3, 4, 6, seed=1), randn(2, 512, 16, seed=2)
    image = randn(2, 7, 24, seed=3) if architecture.image_dim else None
    expected = theirs(x, SIGMA * 1000, text, image).sample
    assert expected.abs().mean() > 0.1
    assert torch.allclose(ours(x, SIGMA, text, image=image)[0], expected, atol=5e-5)  # diffusers' time is in fp32
    assert ours.config.reference is (architecture is IMAGE)
    assert ours.config.audio_dim == 0


def avatar_inputs():
    return randn(2, 9, 3, 4, 6, seed=1), SIGMA, randn(2, 5, 16, seed=2), randn(2, 3, 4, 20, seed=3)


@torch.no_grad()
@pytest.mark.parametrize("suffix", ["", ".default"])
def test_a_folded_lora_is_the_unfolded_adapter(tmp_path, suffix):
    put_wan(tmp_path / "wan", exact=False)
    put_lora(tmp_path / "avatar", suffix=suffix)
    for lora, target in [(None, "folded"), ("fold", "also"), ("adapter", "kept")]:
        convert(tmp_path / "avatar", tmp_path / target, "ours", base=tmp_path / "wan", lora=lora)
    assert_equal(read_back(tmp_path / "folded"), read_back(tmp_path / "also"))

    folded, kept = load_network(tmp_path / "folded"), load_network(tmp_path / "kept")
    assert folded.config.reference is True
    assert folded.config.audio_dim == 20
    out, unfolded = folded(*avatar_inputs())[0], kept(*avatar_inputs())[0]
    assert (out - unfolded).abs().max() < 1e-5
    kept.disable_adapters()
    assert (kept(*avatar_inputs())[0] - out).abs().mean() > 1e-2

    held, base = torch.load(tmp_path / "avatar" / "pytorch_model.pt"), fp32(some_weights(TEXT_TO_VIDEO))
    found = load_file(tmp_path / "folded" / STEM)
    for wan, ours in [("blocks.2.cross_attn.k", "blocks.2.attn2.to_k"), ("blocks.3.ffn.2", "blocks.3.ffn.net.2")]:
        product = held[f"{wan}.lora_B{suffix}.weight"] @ held[f"{wan}.lora_A{suffix}.weight"]
        assert torch.allclose(found[f"{ours}.weight"], base[f"{wan}.weight"] + ALPHA / RANK * product, atol=1e-6)
    assert torch.equal(found["patch_embedding.weight"], held["patch_embedding.weight"])
    assert torch.equal(found["audio_cond_projs.0.bias"], held["audio_cond_projs.0.bias"])
    convert(tmp_path / "kept", tmp_path / "late", "ours")
    assert_equal(read_back(tmp_path / "late"), read_back(tmp_path / "folded"))


def test_a_lora_is_folded_in_fp32_and_kept_in_the_type_of_its_base(tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in some_weights(TEXT_TO_VIDEO).items()}
    put(tmp_path / "wan", tensors)
    put_lora(tmp_path / "avatar")
    convert(tmp_path / "avatar", tmp_path / "ours", "wan", base=tmp_path / "wan")
    held, name = torch.load(tmp_path / "avatar" / "pytorch_model.pt"), "blocks.1.self_attn.o"
    up, down, weight = held[f"{name}.lora_B.weight"], held[f"{name}.lora_A.weight"], tensors[f"{name}.weight"]
    exact = (weight.double() + ALPHA / RANK * up.double() @ down.double()).bfloat16()
    rounded = weight + ALPHA / RANK * up.bfloat16() @ down.bfloat16()
    assert (rounded == exact).float().mean() < 0.95
    assert (read_back(tmp_path / "ours")[f"{name}.weight"] == exact).float().mean() > 0.999


def test_a_merged_avatar_of_livetalk_comes_back_bit_equal(tmp_path):
    put(tmp_path / "livetalk", some_weights(AVATAR), name="model.safetensors")
    assert convert(tmp_path / "livetalk", tmp_path / "ours", "ours").source.layout == "wan"
    net = load_network(tmp_path / "ours")
    assert_equal(net.state_dict(), fp32(read_back(tmp_path / "ours")))
    assert net.audio_at == (2,)
    assert net.config.reference is True
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())
    half = load_network(tmp_path / "ours", torch.bfloat16)
    assert half.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert half.scale_shift_table.dtype == torch.float32
    convert(tmp_path / "ours", tmp_path / "wan", "wan")
    assert_equal(read_back(tmp_path / "wan"), some_weights(AVATAR))


def test_averaged_weights_of_fsdp_lose_their_prefixes_and_come_first(tmp_path):
    named = some_weights(TEXT_TO_VIDEO, "self-forcing", seed=1)
    wrapped = {
        name.replace("model.", "model._fsdp_wrapped_module.").replace("ffn", "_fsdp_wrapped_module.ffn"): tensor
        for name, tensor in named.items()
    }
    held = {"generator": some_weights(TEXT_TO_VIDEO, "self-forcing"), "generator_ema": wrapped, "step": 600}
    held["critic"] = some_weights(TEXT_TO_VIDEO, "self-forcing", seed=2)
    torch.save(held, tmp_path / "model.pt")
    found = convert(tmp_path / "model.pt", tmp_path / "a", "wan")
    assert set(found.source.ignored) == {"generator", "critic", "step"}
    assert_equal(read_back(tmp_path / "a"), some_weights(TEXT_TO_VIDEO, seed=1))
    for entry, seed in [("generator", 0), ("critic", 2)]:
        convert(tmp_path / "model.pt", tmp_path / entry, "wan", entry=entry)
        assert_equal(read_back(tmp_path / entry), some_weights(TEXT_TO_VIDEO, seed=seed))
    with pytest.raises(UserError, match=r"has no entry step; it has generator, generator_ema, critic"):
        plan(tmp_path / "model.pt", "ours", entry="step")


def test_shards_are_written_within_their_size_and_read(tmp_path):
    put_wan(tmp_path / "wan")
    convert(tmp_path / "wan", tmp_path / "ours", "ours", shard_bytes=2**21)
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 4
    assert files[0].name == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size < 2**21 + 2**14 for file in files)
    index = json.loads((tmp_path / "ours" / f"{STEM}.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in some_weights(TEXT_TO_VIDEO).values())
    load_network(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "wan2", "wan", shard_bytes=2**21)
    assert_equal(read_back(tmp_path / "wan2"), some_weights(TEXT_TO_VIDEO))
    (tmp_path / "wan2" / f"{STEM}.index.json").unlink()  # as 14B shards that were copied by hand
    first = sorted((tmp_path / "wan2").glob("*.safetensors"))[0]
    for source in (tmp_path / "wan2", first, tmp_path / "ours" / f"{STEM}.index.json"):
        assert plan(source, "ours").num_parameters == sum(prod(s) for s in layouts.tensors(TEXT_TO_VIDEO).values())
    convert(tmp_path / "ours", tmp_path / "a.pt", "self-forcing", shard_bytes=2**21)
    assert_equal(read_back(tmp_path / "a.pt"), some_weights(TEXT_TO_VIDEO, "self-forcing"))


def test_a_pipeline_folder_is_entered_at_its_transformer(tmp_path):
    put_wan(tmp_path / "wan")
    convert(tmp_path / "wan", tmp_path / "net", "diffusers")
    pipeline = tmp_path / "pipeline"
    (pipeline / "vae").mkdir(parents=True)
    (tmp_path / "net").rename(pipeline / "transformer")
    assert plan(pipeline, "wan").source.layout == "diffusers"


def test_a_student_is_read_with_what_its_spec_says(tmp_path):
    bundle = a_bundle()
    save_student(tmp_path / "student", bundle, "# A card\n")
    found = convert(tmp_path / "student", tmp_path / "ours", "ours")
    assert found.architecture.head_dim == 16
    assert found.architecture.prediction == "reference"
    assert_equal(read_back(tmp_path / "ours"), bundle.student.net.state_dict())
    net = load_network(tmp_path / "ours")
    for key, value in bundle.student.net.config.items():
        if not key.startswith("_"):
            assert net.config[key] == (list(value) if isinstance(value, tuple) else value)
    with pytest.raises(UserError, match="layout self-forcing cannot represent head_dim 16, stride 2"):
        plan(tmp_path / "student", "self-forcing")


@torch.no_grad()
def test_widening_keeps_what_the_network_does_with_its_old_channels(tmp_path):
    put_wan(tmp_path / "wan")
    convert(tmp_path / "wan", tmp_path / "narrow", "ours")
    convert(tmp_path / "wan", tmp_path / "wide", "ours", widen=True)
    narrow, wide = load_network(tmp_path / "narrow"), load_network(tmp_path / "wide")
    assert wide.config.reference is True
    x, text = randn(2, 9, 3, 4, 6, seed=1), randn(2, 5, 16, seed=2)
    assert torch.allclose(wide(x, SIGMA, text)[0], narrow(x[:, :4], SIGMA, text)[0], atol=1e-6)
    assert not read_back(tmp_path / "wide")["patch_embedding.weight"][:, 4:].any()


def test_the_command_says_what_it_did(tmp_path, capsys):
    put_wan(tmp_path / "wan")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert run(parser.parse_args([str(tmp_path / "wan"), str(tmp_path / "out"), "--to", "ours"])) == 0
    num = sum(prod(shape) for shape in layouts.tensors(TEXT_TO_VIDEO).values())
    out = capsys.readouterr().out
    assert out == f"{tmp_path / 'out'}: ours, 123 tensors, {num:,} parameters, from wan ({tmp_path / 'wan'})\n"


LARGE = replace(TEXT_TO_VIDEO, width=512, ffn_dim=2048, num_layers=16)
SHARD, SLACK = 24 * 2**20, 12 * 2**20


def grown(folder: Path, shard_bytes: int, jobs: list) -> list[int]:
    """Bytes by which this process is larger at the peak of each conversion than before it."""

    def resident(key: str) -> int:
        return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    os.chdir(folder)
    weights.RENEW_BYTES, found = shard_bytes, []
    plan("small", "self-forcing").write("small.pt")
    for source, target, to, base in jobs:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        plan(source, to, base=base).write(target, shard_bytes)
        found.append(resident("VmHWM") - before)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux' /proc")
def test_memory_holds_a_shard_and_a_tensor(tmp_path):
    """Peak growth of resident memory, mapped pages included, against the 139 MB of the weights; an archive that is read adds
    what was mapped of it since it was mapped anew, and folding a LoRA the sum before it is rounded."""
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in layouts.tensors(LARGE, "wan").items()}
    total, largest = sum(t.nbytes for t in tensors.values()), max(t.nbytes for t in tensors.values())
    put(tmp_path / "wan", tensors)
    put_wan(tmp_path / "small")
    put_lora(tmp_path / "lora", LARGE)
    jobs = [
        ("wan", "ours", "ours", None, SHARD + largest),
        ("ours", "out.pt", "self-forcing", None, SHARD + largest),
        ("out.pt", "again", "wan", None, SHARD + largest + SHARD),
        ("lora", "folded", "wan", "wan", SHARD + 5 * largest),
    ]
    found = processes.call(grown, tmp_path, SHARD, [job for *job, _ in jobs])
    for size, (*job, bound) in zip(found, jobs, strict=True):
        assert size < bound + SLACK < total * 0.6, job
    assert_equal(read_back(tmp_path / "again"), tensors)
