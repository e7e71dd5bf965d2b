"""Checkpoints as other people's trainers and tools write them: read rightly, or named with what to do."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from teachers.checkpoints.convert import plan
from teachers.checkpoints.weights import ADAPTER
from teachers.errors import UserError
from tests.support.checkpoints import (
    ALPHA,
    RANK,
    STEM,
    TEXT_TO_VIDEO,
    assert_equal,
    convert,
    fp32,
    put,
    put_lora,
    put_wan,
    read_back,
    some_weights,
)
from tests.support.tiny import randn

MODULES = ("self_attn.q", "self_attn.v", "cross_attn.k", "ffn.2")
OURS = {"self_attn.q": "attn1.to_q", "self_attn.v": "attn1.to_v", "cross_attn.k": "attn2.to_k", "ffn.2": "ffn.net.2"}


def test_a_lora_over_fp8_is_folded_in_fp32_and_kept_in_bf16(tmp_path):
    """fp8 would round most of it away; what no LoRA changes stays fp8."""
    tensors = fp32(some_weights(TEXT_TO_VIDEO))
    held = {n: t.to(torch.float8_e4m3fn) if t.ndim == 2 and n.startswith("blocks.") else t for n, t in tensors.items()}
    put(tmp_path / "wan", held)
    put_lora(tmp_path / "avatar")
    convert(tmp_path / "wan", tmp_path / "plain", "ours")
    assert load_file(tmp_path / "plain" / STEM)["blocks.0.attn1.to_q.weight"].dtype == torch.float8_e4m3fn
    convert(tmp_path / "avatar", tmp_path / "out", "ours", base=tmp_path / "wan")
    found = load_file(tmp_path / "out" / STEM)["blocks.1.attn1.to_q.weight"]
    pair, name = torch.load(tmp_path / "avatar" / "pytorch_model.pt"), "blocks.1.self_attn.q"
    change = ALPHA / RANK * pair[f"{name}.lora_B.weight"] @ pair[f"{name}.lora_A.weight"]
    expected = (held[f"{name}.weight"].float() + change).bfloat16()
    assert found.dtype == torch.bfloat16
    assert (found == expected).float().mean() > 0.99
    assert plan(tmp_path / "avatar", "ours", base=tmp_path / "wan").num_bytes == sum(
        tensor.nbytes for tensor in load_file(tmp_path / "out" / STEM).values()
    )


@pytest.mark.parametrize("entry", ["model", "state_dict", "generator", "model.net", "net", "other.net"])
def test_entries_of_an_archive_are_found_or_named(tmp_path, entry):
    named = some_weights(TEXT_TO_VIDEO) | {"freqs": torch.ones(4, dtype=torch.complex64), "count": torch.tensor(3)}
    held = named
    for key in reversed(entry.split(".")):
        held = {key: held}
    torch.save(held | {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "step": 7}, tmp_path / "model.pt")
    given = None
    if entry in ("model.net", "net", "other.net"):
        with pytest.raises(UserError, match=rf"has none of the entries [^\n]*; it has {entry}; name one with --entry"):
            plan(tmp_path / "model.pt", "ours")
        given = entry
    found = convert(tmp_path / "model.pt", tmp_path / "out", "wan", entry=given)
    assert_equal(read_back(tmp_path / "out"), some_weights(TEXT_TO_VIDEO))
    assert set(found.source.ignored) == {f"{entry}.freqs", f"{entry}.count", "optimizer", "step"}


@pytest.mark.parametrize("prefix", ["diffusion_model.", "model.diffusion_model.", "model.", "transformer."])
def test_prefixes_of_other_tools_come_off(tmp_path, prefix):
    put(tmp_path / "theirs", {prefix + name: tensor for name, tensor in some_weights(TEXT_TO_VIDEO).items()})
    convert(tmp_path / "theirs", tmp_path / "wan", "wan")
    assert_equal(read_back(tmp_path / "wan"), some_weights(TEXT_TO_VIDEO))


def some_pairs(ranks: dict[str, int]) -> dict[str, dict[str, torch.Tensor]]:
    """A LoRA of two blocks' MODULES, of the rank of each; alpha is half of it."""
    base, pairs = some_weights(TEXT_TO_VIDEO), {}
    for block in (0, 2):
        for module in MODULES:
            (rows, columns), rank = base[f"blocks.{block}.{module}.weight"].shape, ranks[module]
            seed = 100 * block + len(pairs)
            down, up = randn(rank, columns, seed=seed) / columns**0.5, randn(rows, rank, seed=seed + 1)
            pairs[f"blocks.{block}.{module}"] = {"down": down, "up": up, "alpha": torch.tensor(rank / 2)}
    return pairs


def write_kohya(folder: Path, pairs, names) -> None:
    put(
        folder,
        {
            f"{names(name)}.{'alpha' if side == 'alpha' else f'lora_{side}.weight'}": tensor
            for name, pair in pairs.items()
            for side, tensor in pair.items()
        },
    )


def write_peft(folder: Path, pairs) -> None:
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": pair[key]
        for name, pair in pairs.items()
        for side, key in (("A", "down"), ("B", "up"))
    }
    put(folder, tensors, name="adapter_model.safetensors")
    names = [name.removeprefix("blocks.") for name in pairs]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK / 2, "target_modules": names, "rank_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("style", ["comfy", "kohya", "diffusers", "peft"])
def test_a_lora_of_other_trainers_is_folded(tmp_path, style):
    """rank and alpha of each module are its own, and some modules have none; peft's are in its config."""
    put_wan(tmp_path / "wan", exact=False)
    pairs = some_pairs(
        dict.fromkeys(MODULES, RANK) if style == "peft" else dict(zip(MODULES, (4, 8, 8, 2), strict=True))
    )
    if style == "peft":
        write_peft(tmp_path / "lora", pairs)
    else:
        names = {
            "comfy": lambda name: f"diffusion_model.{name}",
            "kohya": lambda name: f"lora_unet_{name.replace('.', '_')}",
            "diffusers": lambda name: f"transformer.{name.replace(name[9:], OURS[name[9:]])}",
        }
        write_kohya(tmp_path / "lora", pairs, names[style])
    base = tmp_path / "wan"
    if style == "diffusers":
        base = tmp_path / "diffusers"
        convert(tmp_path / "wan", base, "diffusers")
    convert(tmp_path / "lora", tmp_path / "out", "wan", base=base)
    found, before = read_back(tmp_path / "out"), fp32(some_weights(TEXT_TO_VIDEO))
    for name, tensor in before.items():
        pair = pairs.get(name.removesuffix(".weight"))
        change = 0 if pair is None else 0.5 * pair["up"] @ pair["down"]
        assert torch.allclose(found[name], tensor + change, atol=1e-5), name
    if style in ("comfy", "kohya"):
        with pytest.raises(UserError, match=r"^--lora adapter holds one rank, this LoRA has 2, 4, 8; fold it$"):
            convert(tmp_path / "lora", tmp_path / "kept", "ours", base=base, lora="adapter")
        assert not (tmp_path / "kept").exists()
        one = {
            name: pair | {"alpha": torch.tensor(6.0 if "q" in name else 4.0)}
            for name, pair in some_pairs(dict.fromkeys(MODULES, 8)).items()
        }
        write_kohya(tmp_path / "one", one, names[style])
        convert(tmp_path / "one", tmp_path / "kept", "ours", base=base, lora="adapter")
        held = load_file(tmp_path / "kept" / ADAPTER)
        for wan, alpha in (("self_attn.q", 6.0), ("ffn.2", 4.0)):
            up, own = held[f"blocks.2.{OURS[wan]}.lora_B.weight"], one[f"blocks.2.{wan}"]["up"]
            assert torch.allclose(up, own * alpha / 8)


def test_a_lora_that_cannot_be_read_is_named(tmp_path):
    put_wan(tmp_path / "wan")
    pairs = some_pairs(dict.fromkeys(MODULES, 4))
    for pair in pairs.values():
        del pair["alpha"]
    write_kohya(tmp_path / "bare", pairs, str)
    with pytest.raises(UserError, match=r"LoRA of another rank: [^\n]* rank 4, [^\n]*often have alpha = rank"):
        plan(tmp_path / "bare", "ours", base=tmp_path / "wan")
    write_peft(tmp_path / "peft", pairs)
    config = tmp_path / "peft" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    with pytest.raises(UserError, match=r"adapter is not read: [^\n]*adapter_config\.json has use_dora; merge"):
        plan(tmp_path / "peft", "ours", base=tmp_path / "wan")
    pairs = some_pairs(dict.fromkeys(MODULES, 4))
    pairs["blocks.0.self_attn.w"] = pairs.pop("blocks.0.self_attn.q")
    del pairs["blocks.2.ffn.2"]["up"]
    write_kohya(tmp_path / "odd", pairs, str)
    words = r"missing blocks\.2\.ffn\.2\.lora_B\.weight; unexpected blocks\.0\.self_attn\.w\.lora_A\.weight"
    with pytest.raises(UserError, match=words):
        plan(tmp_path / "odd", "ours", base=tmp_path / "wan")


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
            r"a pointer of git-lfs [^\n]*git lfs pull",
        ),
        (b"GGUF\x03\x00\x00\x00" + bytes(40), r"a GGUF file, [^\n]*safetensors"),
        (b"\n<!DOCTYPE html><html>", r"a web page; download"),
    ],
)
@pytest.mark.parametrize("name", [STEM, "model.pt", "wan.gguf", "config.json"])
def test_what_lies_in_the_place_of_weights_is_named(tmp_path, head, words, name):
    folder = put_wan(tmp_path / "wan")
    (folder / name).write_bytes(head)
    with pytest.raises(UserError, match=rf"^not weights: [^\n]*{name} is {words}"):
        plan(folder if name in (STEM, "config.json") else folder / name, "ours")


def test_what_a_gan_critic_has_besides_is_named_and_left_out_on_request(tmp_path):
    heads = {"_cls_pred_branch.0.weight": torch.ones(3), "_register_tokens.tokens": torch.ones(1, 4)}
    critic = some_weights(TEXT_TO_VIDEO, "self-forcing")
    torch.save({"generator": critic, "critic": critic | heads}, tmp_path / "model.pt")
    words = r"unexpected _cls_pred_branch\.0\.weight, _register_tokens\.tokens; [^\n]*distill convert --leave-out"
    with pytest.raises(UserError, match=words):
        plan(tmp_path / "model.pt", "ours", entry="critic")
    patterns = ["_cls_pred_branch.*", "_register_tokens.*"]
    found = convert(tmp_path / "model.pt", tmp_path / "out", "wan", entry="critic", leave_out=patterns)
    assert set(found.source.ignored) == {"generator", *heads}
    assert_equal(read_back(tmp_path / "out"), some_weights(TEXT_TO_VIDEO))
    with pytest.raises(UserError, match=r"^--leave-out has no effect: [^\n]*_gan_ca"):
        plan(tmp_path / "model.pt", "ours", entry="critic", leave_out=[*patterns, "_gan_ca*"])


def test_the_lora_of_a_longlive_archive_is_read_by_its_entry(tmp_path):
    """peft's names of Self-Forcing's wrapper; rank and alpha stand beside it."""
    put_wan(tmp_path / "wan", exact=False)
    put_lora(tmp_path / "avatar", TEXT_TO_VIDEO, suffix=".default")
    held = torch.load(tmp_path / "avatar" / "pytorch_model.pt")
    named = {f"base_model.model.model.{name}": tensor for name, tensor in held.items() if ".lora_" in name}
    (tmp_path / "long").mkdir()
    file = tmp_path / "long" / "model.pt"
    torch.save({"generator_lora": named, "critic_lora": named, "step": 3}, file)
    with pytest.raises(UserError, match=r"it has generator_lora, critic_lora; name one with --entry generator_lora"):
        plan(file, "ours")
    (tmp_path / "long" / "config.json").write_text(json.dumps({"lora_rank": RANK, "lora_alpha": ALPHA}))
    convert(file, tmp_path / "out", "wan", entry="generator_lora", base=tmp_path / "wan")
    found, name = read_back(tmp_path / "out"), "blocks.3.cross_attn.o"
    product = held[f"{name}.lora_B.default.weight"] @ held[f"{name}.lora_A.default.weight"]
    base = fp32(some_weights(TEXT_TO_VIDEO))
    assert torch.allclose(found[f"{name}.weight"], base[f"{name}.weight"] + ALPHA / RANK * product, atol=1e-6)
