"""What a user may do wrong in a conversion: one line each, and nothing is written."""

import argparse
import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distill.commands.convert import add_arguments, run
from teachers import files
from teachers.checkpoints import weights
from teachers.checkpoints.convert import plan
from teachers.checkpoints.weights import find
from teachers.errors import UserError
from tests.support.checkpoints import (
    ALPHA,
    AVATAR,
    RANK,
    STEM,
    TEXT_TO_VIDEO,
    convert,
    fp32,
    put,
    put_lora,
    put_wan,
    some_weights,
)


def refused(words: str, source: Path, *options: str, to: str = "ours", target: str = "out") -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    folder = source.parent
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match=words) as error:
        run(parser.parse_args([str(source), str(folder / target), "--to", to, *options]))
    assert "\n" not in str(error.value)
    assert sorted(folder.rglob("*")) == before


def test_a_truncated_file_is_refused(tmp_path):
    file = put_wan(tmp_path / "wan") / STEM
    whole = file.read_bytes()
    for length in (len(whole) - 1000, 2000, 4, 0):
        file.write_bytes(whole[:length])
        refused(
            r"damaged weights: .*diffusion_pytorch_model\.safetensors \(.*\); copy the file again", tmp_path / "wan"
        )
    archive = tmp_path / "model.pt"
    torch.save({"generator": some_weights(TEXT_TO_VIDEO, "self-forcing")}, archive)
    archive.write_bytes(archive.read_bytes()[:-1000])
    refused(r"damaged weights: .*model\.pt is no whole archive of torch\.save; copy the file again", archive)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/version", "3")
    refused(r"damaged weights: .*model\.pt cannot be read \(", archive)


class Code:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_refused_and_never_runs(tmp_path):
    trace, file = tmp_path.parent / f"{tmp_path.name}-ran", tmp_path / "model.pt"
    torch.save({"generator": {"model.head.modulation": Code(trace)}}, file)
    refused(r"refused weights: .*model\.pt is a pickle with code in it \(posix\.mkdir\), which never runs", file)
    file.write_bytes(pickle.dumps(Code(trace)))
    refused(r"damaged weights: .*model\.pt is no whole archive of torch\.save; copy the file again", file)
    assert not trace.exists()


def test_the_layout_of_another_model_is_refused(tmp_path):
    put(tmp_path / "other", {"transformer_blocks.0.attn1.to_q.weight": torch.ones(4, 4)})
    refused(r"layout of another model: .*other has transformer_blocks\.0\.attn1\.to_q\.weight", tmp_path / "other")
    put(tmp_path / "vace", fp32(some_weights(TEXT_TO_VIDEO)) | {"vace_blocks.0.before_proj.weight": torch.ones(4, 4)})
    refused(r"vace: unexpected vace_blocks\.0\.before_proj\.weight; is the", tmp_path / "vace")
    torch.save([torch.ones(3)], tmp_path / "list.pt")
    refused(r"list\.pt holds a list, no state dict", tmp_path / "list.pt")
    torch.save({"optimizer": {"step": 3}}, tmp_path / "state.pt")
    refused(
        r"state\.pt has none of the entries [^\n]*; it has optimizer, and no weights among it", tmp_path / "state.pt"
    )
    torch.save(some_weights(TEXT_TO_VIDEO) | {"step": 7}, tmp_path / "bare.pt")
    refused(r"bare\.pt: unexpected step, which are no weights", tmp_path / "bare.pt")


def test_a_missing_or_unexpected_key_is_named_as_the_source_names_it(tmp_path):
    tensors = some_weights(TEXT_TO_VIDEO)
    del tensors["blocks.1.norm3.weight"]
    tensors["blocks.1.norm4.weight"] = torch.ones(256)
    put(tmp_path / "wan", tensors)
    refused(r"missing blocks\.1\.norm3\.weight; unexpected blocks\.1\.norm4\.weight", tmp_path / "wan")
    put(tmp_path / "twice", some_weights(TEXT_TO_VIDEO) | {"model.head.modulation": torch.ones(1, 2, 256)})
    refused(r"has head\.modulation under two names", tmp_path / "twice")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model-00001-of-99999999999.safetensors", "no shard of weights: "),
        (f"model-00001-of-{'9' * 200}.safetensors", "no shard of weights: "),
        ("model-00001-of-many.safetensors", "no shard of weights: "),
        ("model-00001-of-00000.safetensors", "no shard of weights: "),
        ("model-00001-of-99999.safetensors", r"missing shard: model-00002-of-99999\.safetensors, .* which the number"),
    ],
)
def test_a_number_of_shards_that_cannot_be_is_refused_at_once(tmp_path, name, expected):
    save_file({"x": torch.ones(1)}, tmp_path / name)
    with pytest.raises(UserError, match=expected):
        find(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    put_wan(tmp_path / "wan")
    convert(tmp_path / "wan", tmp_path / "shards", "wan", shard_bytes=2**20)
    second = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
    kept = second.read_bytes()
    second.unlink()
    refused(rf"missing shard: {second.name} in .*shards, which {STEM}\.index\.json asks for", tmp_path / "shards")
    index = tmp_path / "shards" / f"{STEM}.index.json"
    content = index.read_text()
    index.unlink()
    refused(rf"missing shard: {second.name} in .*, which the number of shards in .*00001-of-", tmp_path / "shards")
    second.write_bytes(kept)
    index.write_text(content.replace("00002-of", "00001-of"))
    refused(r"index\.json names .*\.weight, which its files do not hold", tmp_path / "shards")
    index.write_text(content.replace("diffusion_pytorch_model-00002", "../diffusion_pytorch_model-00002"))
    refused(r"damaged file: .*index\.json has no weight_map of plain file names", tmp_path / "shards")


def test_a_lora_that_is_not_what_its_config_says_is_refused(tmp_path):
    put_wan(tmp_path / "wan")
    base = ("--base", str(tmp_path / "wan"))
    put_lora(tmp_path / "other", rank=4)
    words = rf"LoRA of another rank: .*other.* has rank 4, config\.json states rank {RANK} and alpha {ALPHA}"
    refused(words, tmp_path / "other", *base)
    folder = put_lora(tmp_path / "avatar")
    config = (folder / "config.json").read_text()
    (folder / "config.json").unlink()
    refused(r"has rank 8, without a config\.json it is OmniAvatar's: rank 128 and alpha 64", folder, *base)
    (folder / "config.json").write_text(config)
    tensors = torch.load(folder / "pytorch_model.pt")
    del tensors["blocks.3.ffn.2.lora_B.weight"]
    torch.save(tensors, folder / "pytorch_model.pt")
    refused(r"missing blocks\.3\.ffn\.2\.lora_B\.weight;", folder, *base)
    tensors["blocks.3.ffn.2.lora_B.weight"] = torch.ones(255, RANK)
    torch.save(tensors, folder / "pytorch_model.pt")
    refused(r"blocks\.3\.ffn\.2\.lora_B\.weight is \[255, 8\] where \[256, 8\] is needed", folder, *base)


def test_a_lora_needs_its_base_and_a_base_a_lora(tmp_path):
    put_wan(tmp_path / "wan")
    put_lora(tmp_path / "avatar")
    refused(r"weights missing: .*avatar is a LoRA; give .* as --base", tmp_path / "avatar")
    refused("--base is a LoRA itself", tmp_path / "avatar", "--base", str(tmp_path / "avatar"))
    refused("--base has no effect", tmp_path / "wan", "--base", str(tmp_path / "wan"))
    refused("--lora has no effect", tmp_path / "wan", "--lora", "fold")
    refused("--entry is for torch archives", tmp_path / "wan", "--entry", "generator")
    options = ("--base", str(tmp_path / "wan"), "--lora", "adapter")
    refused("--lora adapter requires --to ours", tmp_path / "avatar", *options, to="wan")
    tensors = some_weights(TEXT_TO_VIDEO)
    del tensors["head.head.bias"]
    put(tmp_path / "wan", tensors)
    refused(r"do not fit: \S*wan: missing head\.head\.bias", tmp_path / "avatar", "--base", str(tmp_path / "wan"))


def test_sixteen_channels_are_widened_with_consent_alone(tmp_path):
    narrow = replace(AVATAR, in_channels=4)
    put_wan(tmp_path / "avatar", narrow)
    refused(
        "4-channel weights where 9 are needed: .*avatar has an audio path, .* consent with --widen", tmp_path / "avatar"
    )
    convert(tmp_path / "avatar", tmp_path / "ours", "ours", widen=True)
    refused("--widen has no effect: .*ours has 9 input channels already", tmp_path / "ours", "--widen")
    put_wan(tmp_path / "odd", replace(TEXT_TO_VIDEO, in_channels=7))
    refused("layout ours cannot represent 7 input channels for 4", tmp_path / "odd")


def test_an_output_that_cannot_be_is_refused_and_nothing_is_replaced(tmp_path, monkeypatch):
    put_wan(tmp_path / "wan")
    refused(r"no weights: .*nowhere does not exist", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused(r"no weights: .*empty has no file of weights \(\.safetensors, ", tmp_path / "empty")
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / "two" / f"{name}.safetensors")
    refused(r"no weights of a usual name: .*two has a\.safetensors, b\.safetensors; name", tmp_path / "two")
    refused("output exists: .*empty; name another", tmp_path / "wan", target="empty")
    refused("output folder not found: .*deep", tmp_path / "wan", target="deep/out")
    refused(r"output of self-forcing is a file: .*; let the name end in \.pt", tmp_path / "wan", to="self-forcing")
    refused("output of ours is a folder", tmp_path / "wan", target="out.safetensors")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: argparse.Namespace(free=2**20))
    refused(r"disk is too full: .* has 0\.0 GiB free", tmp_path / "wan")
    monkeypatch.undo()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    refused("cannot write .*out: .*No space left on device; choose another place", tmp_path / "wan")
    monkeypatch.setattr(weights.torch, "save", full)
    refused("cannot write .*No space left", tmp_path / "wan", to="self-forcing", target="out.pt")


def test_an_interrupted_conversion_leaves_nothing(tmp_path):
    put_wan(tmp_path / "wan")

    def interrupt(_):
        raise KeyboardInterrupt

    for to, target in [("ours", "out"), ("self-forcing", "out.pt")]:
        with pytest.raises(KeyboardInterrupt):
            plan(tmp_path / "wan", to).write(tmp_path / target, tick=interrupt)
        assert [p.name for p in tmp_path.iterdir()] == ["wan"]
