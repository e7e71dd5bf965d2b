"""A LoRA beside its base: adapter_config.json and adapter_model.safetensors as peft lays them out, folded when it is read.

    W + alpha / rank * B A        (2106.09685, section 4.1)

Tensors carry our module names: `blocks.0.attn1.to_q.lora_A.weight` [rank, in], `.lora_B.weight` [out, rank], and the parameters of
the modules that were trained in full.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from teachers.checkpoints.convert import fill_network
from teachers.checkpoints.strict import check_shapes, load_strict, shapes_of
from teachers.checkpoints.weights import read_tensors
from teachers.config import nearest
from teachers.errors import UserError
from teachers.files import atomic_write, save_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before the names of the network inside its model."""
HINT = "is it the folder of this spec?"
"""How an error about weights that do not fit a student ends."""
EDGE_BYTES = 1 << 20
PLAIN = {"peft_type": "LORA", "bias": "none", "use_dora": False, "use_rslora": False, "fan_in_fan_out": False}
"""What a LoRA has to be for `fold`."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """The network that an adapter changes: `path` in any layout of `distill convert` (with `wan` and `widen` as there), or, where
    `ours`, a file of tensors under our names. `digest` of both paths."""

    path: Path
    digest: str
    wan: Path | None = None
    widen: bool = False
    ours: bool = False


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA of `rank` and scale alpha / rank on the linear maps that end in one of `targets`; modules `full` are replaced."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    full: tuple[str, ...]
    tensors: Mapping[str, Tensor]


def digest(*paths: Path | None) -> str:
    """Which files `paths` hold: a hash of names, sizes, first and last MiB; folders are read whole. UserError for none."""
    found = hashlib.sha256()
    for path in paths:
        if path is None:
            continue
        if not path.exists():
            raise UserError(
                f"no weights: {path.resolve()} does not exist, where the recipe looks for them; put them there, or give their path"
            )
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        for file in files:
            size = file.stat().st_size
            found.update(f"{file.relative_to(path)} {size}\n".encode())
            with file.open("rb") as content:
                found.update(content.read(EDGE_BYTES))
                content.seek(max(0, size - EDGE_BYTES))
                found.update(content.read(EDGE_BYTES))
    return found.hexdigest()


def targeted(net: nn.Module, targets: Sequence[str], full: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear maps of a plain network that a LoRA changes, by name. UserError for a target or module that is not there, is no
    linear map, or is meant twice."""
    modules, found = dict(net.named_modules()), {}
    for name in full:
        if name not in modules or not name:
            raise UserError(f"lora.full: the network has no module '{name}'; {nearest(name, modules)}")
    for target in targets:
        ends = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not ends:
            known = (name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Linear))
            raise UserError(f"lora.targets: no module is called '{target}'; {nearest(target, known)}")
        for name in ends:
            module = modules[name]
            if not isinstance(module, nn.Linear):
                raise UserError(
                    f"lora.targets: {name} is a {type(module).__name__}, no linear map; put it in lora.full"
                )
            if any(f"{name}.".startswith(f"{whole}.") for whole in full):
                raise UserError(f"lora.full: {name} is in it and one of lora.targets too; leave one out")
            found[name] = module
    return found


def leaves(net: nn.Module, full: Sequence[str]) -> list[str]:
    """`full` with lists of modules taken apart: peft replaces nothing that has no forward."""
    return [
        leaf
        for name in full
        for module in [net.get_submodule(name)]
        for leaf in ([f"{name}.{key}" for key, _ in module.named_children()] if isinstance(module, nn.ModuleList) else [name])
    ]  # fmt: skip


def expected(net: nn.Module, rank: int, targets: Sequence[str], full: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of an adapter of a plain network; UserError as `targeted`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, linear in targeted(net, targets, full).items():
        shapes[f"{name}.lora_A.weight"] = (rank, linear.in_features)
        shapes[f"{name}.lora_B.weight"] = (linear.out_features, rank)
    for name in full:
        shapes |= {f"{name}.{own}": tuple(p.shape) for own, p in net.get_submodule(name).named_parameters()}
    return shapes


@torch.no_grad()
def fold(net: Any, adapter: Adapter, source: Path) -> None:
    """Change the weights of a plain network in place, each matrix in fp32; UserError that lists what does not fit."""
    check_shapes(shapes_of(adapter.tensors), expected(net, adapter.rank, adapter.targets, adapter.full), source, HINT)
    given, own = adapter.tensors, dict(net.named_parameters())
    for name in targeted(net, adapter.targets, adapter.full):
        down, up, weight = given[f"{name}.lora_A.weight"], given[f"{name}.lora_B.weight"], own[f"{name}.weight"]
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        weight.copy_(wide.addmm_(up.to(wide), down.to(wide), alpha=adapter.alpha / adapter.rank))
    for name, tensor in given.items():
        if name in own:
            own[name].copy_(tensor)


def write_adapter(folder: Path, adapter: Adapter, base: Base, net: Any, header: dict[str, str]) -> None:
    """Write both files as peft does; `net` has the modules of `full`, `header` goes to the weights."""
    from peft import LoraConfig

    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # pyright: ignore[reportArgumentType]  # peft divides it by the rank
        target_modules=list(adapter.targets),
        modules_to_save=leaves(net, adapter.full) or None,
        base_model_name_or_path=str(base.path),
        inference_mode=True,
    )
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    save_tensors(folder / WEIGHTS, {f"{PREFIX}{name}": tensor for name, tensor in adapter.tensors.items()}, header)
    atomic_write(folder / CONFIG, json.dumps(values, indent=1) + "\n")


def read_adapter(folder: Path) -> Adapter:
    """The adapter of a folder in peft's layout; UserError for a missing or damaged file, or one that is no plain LoRA."""
    file = folder / CONFIG
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
        rank, alpha, targets = int(values["r"]), float(values["lora_alpha"]), tuple(values["target_modules"])
        full = tuple(values.get("modules_to_save") or ())
    except FileNotFoundError as error:
        raise UserError(f"no adapter: {folder} lacks {CONFIG} or {WEIGHTS}; export the student again") from error
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"damaged adapter: {folder} ({error}); export the student again") from error
    odd = [name for name, value in PLAIN.items() if values.get(name, value) != value]
    odd += [name for name in ("rank_pattern", "alpha_pattern") if values.get(name)]
    if odd:
        raise UserError(f"adapter of another kind: {file} has {odd[0]} {values[odd[0]]}; only plain LoRA is read")
    named = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    return Adapter(rank=rank, alpha=alpha, targets=targets, full=full, tensors=named)


def fill(net: nn.Module, file: Path) -> None:
    """Put the tensors of a file under our names into a network; UserError for a missing or damaged one, or what does not fit."""
    load_strict(net, read_tensors(file, "export the student again"), file, HINT)


def load_over_base(net: Any, folder: Path, base: Base) -> None:
    """Fill a plain network from its base, fold the adapter of `folder` in; UserError where the base is gone or another."""
    adapter, where = read_adapter(folder), f"base of the adapter {folder}"
    for path in (base.path, base.wan):
        if path is not None and not path.exists():
            raise UserError(f"{where} is not at {path}; put it there, or fix base in {folder / 'spec.json'}")
    if digest(base.path, base.wan) != base.digest:
        raise UserError(
            f"{where} has changed: {base.path} holds other weights than it was trained over; bring those back"
        )
    if base.ours:
        fill(net, base.path)
    else:
        fill_network(net, base.path, base=base.wan, widen=base.widen)
    fold(net, adapter, folder / WEIGHTS)
