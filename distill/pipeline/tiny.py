"""`size=tiny`: small random weights in the published layouts, so that a whole recipe runs through its real loading code."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from distill.pipeline.pretrained import OURS
from distill.recipe import Recipe, TeacherStage
from students.spec import Spec
from teachers.checkpoints import layouts
from teachers.checkpoints.layouts import Architecture
from teachers.errors import UserError
from teachers.files import staged
from teachers.resolve import label

LORA_RANK, LORA_ALPHA = 4, 2.0


def write_weights(recipe: Recipe, spec: Spec) -> None:
    """Write what the recipe's paths point to, all below run_dir/tiny; nothing where that folder is there already."""
    folder = Path(recipe.run_dir).resolve() / "tiny"
    if folder.exists():
        return
    stages = [stage for stage in (recipe.teacher, recipe.base) if stage is not None]
    data = recipe.data
    parts: list[Any] = [part for part in (data.codec, data.audio, data.text, data.image) if part is not None]
    paths = [path for part in (*stages, *parts) for path in (getattr(part, "path", None),) if path is not None]
    for path in (*paths, *(stage.wan for stage in stages if stage.wan)):
        if not path.resolve().is_relative_to(folder):
            raise UserError(f"tiny=true writes random weights below {folder}: {path} is elsewhere; remove size=tiny")
    with staged(folder, 16 << 20) as temporary, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)

        def place(path: Path) -> Path:
            inside = temporary / path.resolve().relative_to(folder)
            inside.mkdir(parents=True, exist_ok=True)
            return inside

        for stage in stages:
            if stage.path is not None:
                _network(stage, spec, place)
        for part in (part for part in parts if getattr(part, "path", None) is not None):
            if not hasattr(part, "write_random"):
                raise UserError(
                    f"tiny=true: {label(part)} has no random weights to write; add write_random(self, folder)"
                )
            part.write_random(place(part.path))


def _architecture(stage: TeacherStage, spec: Spec) -> Architecture:
    with torch.device("meta"):
        net = stage.network.new(spec.dims)
    shapes, where = {name: tuple(p.shape) for name, p in net.named_parameters()}, label(stage.network)
    return layouts.with_config(layouts.infer(shapes, where), {**vars(stage.network), "stride": spec.dims.stride}, where)


def _random(shape: tuple[int, ...], name: str) -> Tensor:
    """Matrices that keep the size of their input; gains around 1; small offsets."""
    if len(shape) > 1 and "modulation" not in name:
        return torch.randn(shape) / torch.Size(shape[1:]).numel() ** 0.5
    return torch.ones(shape) if name.endswith("weight") else 0.1 * torch.randn(shape)


def _network(stage: TeacherStage, spec: Spec, place: Any) -> None:
    """Wan's own layout, or another backbone's; with `wan` a base there, and in `path` what was trained over it: the kind's own
    tensors, or OmniAvatar's LoRA over text-to-video weights."""
    assert stage.path is not None
    layout = next((name for name in stage.network.layouts if name in layouts.LAYOUTS), None)
    if layout is None:
        tensors = {k: v.contiguous() for k, v in stage.network.new(spec.dims).state_dict().items()}
        save_file(tensors, place(stage.path) / OURS)
        return
    whole = _architecture(stage, spec)
    tensors = {name: _random(shape, name) for name, shape in layouts.tensors(whole, layout).items()}
    if stage.wan is None:
        _save(place(stage.path), tensors, layouts.make_config(whole, layout))
        return
    if own := {name: tensors.pop(name) for name in layouts.apart(whole.kind, tensors)}:
        save_file(own, place(stage.path) / f"{whole.kind}.safetensors")
        _save(place(stage.wan), tensors, layouts.make_config(whole, "wan"))
        return
    over_all = whole.kind != "wan"  # LiveAvatar's
    plain = whole if over_all else replace(whole, in_channels=whole.out_channels, packed=0, num_audio=0, audio_in=0)
    base = {name: _random(shape, name) for name, shape in layouts.tensors(plain, "wan").items()}
    _save(place(stage.wan), base, layouts.make_config(plain, "wan"))
    lora: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if not over_all and name.startswith(("patch_embedding", "audio_")):
            lora[name] = tensor
        elif kind == "weight" and module.endswith((".q", ".k", ".v", ".o", ".ffn.0", ".ffn.2")):
            rows, columns = tensor.shape
            lora[f"{module}.lora_A.weight"] = torch.randn(LORA_RANK, columns) / columns**0.5
            lora[f"{module}.lora_B.weight"] = 0.1 * torch.randn(rows, LORA_RANK)
    torch.save(lora, place(stage.path) / "pytorch_model.pt")
    facts = {"train_architecture": "lora", "lora_rank": LORA_RANK, "lora_alpha": LORA_ALPHA}
    facts["model_config"] = {"in_dim": whole.in_channels}
    (place(stage.path) / "config.json").write_text(json.dumps(facts), encoding="utf-8")


def _save(folder: Path, tensors: dict[str, Tensor], config: dict | None) -> None:
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
