"""Small checkpoints in the published layouts, for the tests: random weights, a LoRA of OmniAvatar, and what was written."""

import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from teachers.checkpoints import layouts
from teachers.checkpoints.convert import Conversion, plan
from teachers.checkpoints.layouts import Architecture
from teachers.checkpoints.weights import ADAPTER, SHARD_BYTES
from teachers.networks.wan import AvatarTransformer
from tests.support.tiny import randn, rng

TEXT_TO_VIDEO = Architecture(
    width=256, in_channels=4, out_channels=4, patch=(1, 2, 2), num_layers=4, ffn_dim=48, text_dim=16, freq_dim=32
)  # fmt: skip
AVATAR = replace(TEXT_TO_VIDEO, in_channels=9, audio_in=4 * 20, packed=8, num_audio=1)
IMAGE = replace(TEXT_TO_VIDEO, in_channels=12, image_dim=24)
RANK, ALPHA = 8, 6.0
STEM = "diffusion_pytorch_model.safetensors"


def some_weights(architecture: Architecture, layout: str = "wan", seed: int = 0) -> dict[str, torch.Tensor]:
    """Random non-zero weights under a layout's names; matrices keep the size of their input. One in six is bf16."""
    made = {}
    for i, (name, shape) in enumerate(layouts.tensors(architecture, layout).items()):
        noise = torch.randn(shape, generator=rng(seed, i))
        fan_in = prod(shape[1:])
        made[name] = noise / fan_in**0.5 if len(shape) > 1 and "modulation" not in name else 1 + 0.3 * noise
        if i % 6 == 5:
            made[name] = made[name].bfloat16()
    return made


def fp32(tensors):
    return {name: tensor.float() for name, tensor in tensors.items()}


def put(folder: Path, tensors, config=None, name: str = STEM) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name, metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def put_wan(folder: Path, architecture: Architecture = TEXT_TO_VIDEO, seed: int = 0, exact: bool = True) -> Path:
    tensors = some_weights(architecture, seed=seed)
    return put(folder, tensors if exact else fp32(tensors), layouts.make_config(architecture, "wan"))


def put_lora(folder: Path, architecture: Architecture = AVATAR, suffix: str = "", rank: int = RANK) -> Path:
    """OmniAvatar's pytorch_model.pt: LoRA pairs, the whole patch embedding (of 2 C + 1 channels) and the audio modules."""
    tensors = {}
    for name, shape in layouts.tensors(architecture, "wan").items():
        module, _, kind = name.rpartition(".")
        if name.startswith(("patch_embedding", "audio_")):
            tensors[name] = randn(*shape, seed=len(tensors))
        elif kind == "weight" and module.endswith((".q", ".k", ".v", ".o", ".ffn.0", ".ffn.2")):
            tensors[f"{module}.lora_A{suffix}.weight"] = (
                0.5 * randn(rank, shape[1], seed=len(tensors)) / shape[1] ** 0.5
            )
            tensors[f"{module}.lora_B{suffix}.weight"] = 0.5 * randn(shape[0], rank, seed=len(tensors))
    folder.mkdir(parents=True)
    torch.save(tensors, folder / "pytorch_model.pt")
    config = {"train_architecture": "lora", "lora_rank": RANK, "lora_alpha": ALPHA, "model_config": {"in_dim": 9}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def convert(source: Path, target: Path, to: str, shard_bytes: int = SHARD_BYTES, **options) -> Conversion:
    """A planned conversion, written."""
    conversion = plan(source, to, **options)
    conversion.write(target, shard_bytes)
    return conversion


def load_network(folder: Path, dtype: torch.dtype | None = None) -> AvatarTransformer:
    """The network of a folder of layout ours, with its adapter where there is one, by diffusers alone."""
    net: Any
    net, report = AvatarTransformer.from_pretrained(folder, torch_dtype=dtype, output_loading_info=True)
    assert not any(report.values())
    if (folder / ADAPTER).is_file():
        net.load_lora_adapter(folder, prefix=None, weight_name=ADAPTER, adapter_name="default")
    return net


def read_back(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder or archive, by the libraries alone."""
    if path.is_file():
        (entry,) = torch.load(path, weights_only=True).items()
        assert entry[0] == "generator"
        return entry[1]
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_equal(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
