"""LoRA over published weights: W + alpha / rank * B A (2106.09685, section 4.1), in the layouts that are found.

OmniAvatar and peft write `lora_A`, `lora_B` and state rank and alpha in a config; ComfyUI's and kohya's trainers write
`lora_down`, `lora_up` and each module's own `alpha` beside them. Few-step LoRAs (lightx2v, FusionX) have `diffusion_model.` names
of the second kind without alpha, which is a scale of 1, and the differences of whole tensors: `diff` of a weight, `diff_b` of a
bias, `diff_m` of a modulation. LongCat-Video's have `___lorahyphen___` in the place of dots, `alpha_scale`, which is alpha / rank,
and over a matrix that is several in one (queries, keys and values) an `up` of each, `lora_up.blocks.{}`.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from teachers.checkpoints import layouts, weights
from teachers.checkpoints.strict import listed
from teachers.checkpoints.weights import ALL, Lazy
from teachers.errors import UserError

Pairs = dict[str, dict[str, Lazy]]
"""The weight that a LoRA changes -> {"A": [rank, in], "B": [out, rank]}, and "alpha" [] where the file has it."""
SIDES = {"A": "A", "down": "A", "B": "B", "up": "B"}
_PAIR = re.compile(r"(.+)\.lora_(A|B|down|up)\.(?:\w+\.)?weight")
_ALPHA = re.compile(r"(.+)\.alpha")
_DIFFERENCE = re.compile(r"(.+)\.(diff|diff_b|diff_m)")
_TENSORS = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}
_UNSCALED = re.compile(r"diffusion_model\..+\.lora_(down|up)\.weight")
_SPLIT = re.compile(r"(.+)\.lora_up\.blocks\.(\d+)\.weight")
UNREAD = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication")
"""Settings of peft's adapter_config.json that change what an adapter means."""


def split_name(name: str) -> tuple[str, str] | None:
    """The tensor that a LoRA's tensor changes, and how: it is side A, B or alpha of a pair, or a difference; None for another."""
    if pair := _PAIR.fullmatch(name):
        return f"{pair[1]}.weight", SIDES[pair[2]]
    if whole := _DIFFERENCE.fullmatch(name):
        return f"{whole[1]}.{_TENSORS[whole[2]]}", "difference"
    alpha = _ALPHA.fullmatch(name)
    return (f"{alpha[1]}.weight", "alpha") if alpha else None


def whole_pairs(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """The tensors of a LoRA by bare names, LongCat-Video's as a pair for each matrix: the ups of its parts along the diagonal of
    one, and `alpha` for `alpha_scale`. Others stay as they are; UserError for a part that is missing or of another shape."""
    found, parts = dict(tensors), {}
    for name in tensors:
        if match := _SPLIT.fullmatch(name):
            parts.setdefault(match[1], {})[int(match[2])] = found.pop(name)
        elif name.endswith(".alpha_scale"):
            stem, scale = name.removesuffix(".alpha_scale"), found.pop(name)
            if (down := tensors.get(f"{stem}.lora_down.weight")) is None:
                raise UserError(f"weights do not fit: missing {stem}.lora_down.weight; is the download complete?")
            rank = down.shape[0]
            found[f"{stem}.alpha"] = replace(
                scale, shape=(), read=lambda _=ALL, scale=scale, rank=rank: scale.read().sum() * rank
            )
    for stem, ups in parts.items():
        shapes = {up.shape for up in ups.values()}
        if sorted(ups) != [*range(len(ups))] or len(shapes) != 1 or len(next(iter(shapes))) != 2:
            raise UserError(
                f"weights do not fit: {stem}.lora_up.blocks are {sorted(ups)} of {sorted(shapes)}; get it again"
            )
        found[f"{stem}.lora_up.weight"] = _along_the_diagonal([ups[i] for i in range(len(ups))])
    return found


def _along_the_diagonal(ups: list[Lazy]) -> Lazy:
    rows, rank = ups[0].shape

    def read(part: slice = ALL) -> Tensor:
        return torch.block_diag(*(up.read() for up in ups))[part]

    return Lazy((len(ups) * rows, len(ups) * rank), ups[0].dtype, read)


def unscaled(pairs: Pairs, stored: Collection[str]) -> None:
    """Give the pairs of a few-step LoRA, which state no alpha, their own rank as alpha; other pairs stay as they are."""
    if not any("alpha" in pair for pair in pairs.values()) and any(map(_UNSCALED.fullmatch, stored)):
        for pair in pairs.values():
            if "A" in pair and pair["A"].shape:
                rank = torch.tensor(float(pair["A"].shape[0]))
                pair["alpha"] = Lazy((), rank.dtype, lambda _=ALL, rank=rank: rank)


@dataclass(frozen=True)
class Lora:
    """A complete LoRA, by the names of the weights that it changes. `rank` and `alpha` are of the pairs without an alpha;
    `differences` are added to whole tensors."""

    rank: int
    alpha: float
    pairs: Pairs
    differences: Mapping[str, Lazy] = field(default_factory=dict)

    def scale(self, name: str) -> float:
        """alpha / rank of one pair."""
        pair = self.pairs[name]
        alpha = float(pair["alpha"].read()) if "alpha" in pair else self.alpha
        return alpha / pair["A"].shape[0]

    def fold(self, name: str, weight: Lazy) -> Lazy:
        """The changed weight, summed in fp32 or better, in its own type; an fp8 one in bf16, as fp8 would round the LoRA away."""
        difference = self.differences.get(name)
        if name not in self.pairs and difference is None:
            return weight
        is_fp8 = weight.dtype.itemsize == 1
        wide = torch.float32 if is_fp8 else torch.promote_types(weight.dtype, torch.float32)
        kept = torch.bfloat16 if is_fp8 else weight.dtype

        def read(rows: slice = ALL) -> Tensor:
            total = weight.read(rows).to(wide, copy=True)
            if difference is not None:
                total += difference.read(rows).to(wide)
            if name in self.pairs:
                down, up = (self.pairs[name][side].read(part).to(wide) for side, part in (("A", ALL), ("B", rows)))
                total.addmm_(up, down, alpha=self.scale(name))
            return total.to(kept)

        return replace(weight, dtype=kept, read=read)

    def write(self, path: Path) -> None:
        """One file, the tensors under the names of diffusers' load_lora_adapter. UserError where the pairs have several ranks."""
        ranks = {pair["A"].shape[0] for pair in self.pairs.values()}
        if len(ranks) > 1:
            raise UserError(f"--lora adapter holds one rank, this LoRA has {listed(map(str, sorted(ranks)))}; fold it")
        targets = sorted(name.removesuffix(".weight") for name in self.pairs)
        metadata = {"r": self.rank, "lora_alpha": self.alpha, "target_modules": targets}
        tensors = {}
        for name, pair in self.pairs.items():
            stem, own = name.removesuffix(".weight"), self.scale(name) / (self.alpha / self.rank)
            tensors[f"{stem}.lora_A.weight"] = pair["A"].read().contiguous()
            up = pair["B"].read()
            tensors[f"{stem}.lora_B.weight"] = up.contiguous() if own == 1.0 else (up * own).contiguous()
        save_file(tensors, path, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(metadata)})


def adapter_config(folder: Path, file: Path) -> dict[str, Any]:
    """Rank, alpha and targets of an adapter, under OmniAvatar's keys: of the metadata of our own files, or of peft's
    adapter_config.json in the folder; {} where there is neither. UserError for what is not stated or not read."""
    if file.name == weights.ADAPTER:
        source, text = file, weights.read_metadata(file).get("lora_adapter_metadata")
        try:
            values = json.loads(text) if text else None
        except ValueError:
            values = None
    else:
        source, values = folder / "adapter_config.json", weights.read_json(folder / "adapter_config.json")
        if not values:
            return {}
    if used := [key for key in UNREAD if isinstance(values, dict) and values.get(key)]:
        raise UserError(f"adapter is not read: {source} has {listed(used)}; merge it into its base with peft")
    try:
        targets = values["target_modules"]  # pyright: ignore[reportOptionalSubscript]
        found = {"lora_rank": int(values["r"]), "lora_alpha": float(values["lora_alpha"])}  # pyright: ignore[reportOptionalSubscript]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"damaged adapter: {source} does not state its rank and alpha ({error}); convert it again"
        ) from error
    return found | ({"lora_target_modules": targets} if isinstance(targets, list) else {})


def complete_lora(
    pairs: Pairs,
    differences: Mapping[str, Lazy],
    tensors: Mapping[str, Lazy],
    config: Mapping[str, Any],
    names: Mapping[str, str],
    path: Any,
) -> Lora:
    """The LoRA over complete weights `tensors`; UserError unless every pair is whole, fits its weight, and has a rank and an alpha,
    and every difference fits its tensor.

    Pairs that all bring their own alpha may be of any rank and of any modules; others have one rank, the config's, on every module
    that the config (by default OmniAvatar) targets.
    """
    ranks = {
        t.shape[side == "B"]
        for pair in pairs.values()
        for side, t in pair.items()
        if side != "alpha" and len(t.shape) == 2
    }
    rank, alpha = config.get("lora_rank", layouts.LORA_RANK), config.get("lora_alpha", layouts.LORA_ALPHA)
    own = all("alpha" in pair for pair in pairs.values())
    if own and ranks:
        rank = alpha = max(ranks)
    elif ranks != {rank}:
        source = "config.json states" if "lora_rank" in config else "without a config.json it is OmniAvatar's:"
        raise UserError(
            f"LoRA of another rank: {path} has rank {listed(map(str, sorted(ranks)))}, {source} rank {rank} and alpha {alpha}; "
            "put the lora_rank and lora_alpha that it was trained with into a config.json beside it (other trainers than "
            "OmniAvatar's often have alpha = rank)"
        )
    needed = _targets(tensors, config) if not own else [name for name in pairs if name in tensors]

    def label(name: str, side: str) -> str:
        stem = layouts.rename(name, names).removesuffix(".weight")
        return f"{stem}.alpha" if side == "alpha" else f"{stem}.lora_{side}.weight"

    expected: dict[str, layouts.Shape] = {}
    for name in needed:
        if len(tensors[name].shape) == 2:
            (rows, columns), down = tensors[name].shape, pairs.get(name, {}).get("A")
            this = down.shape[0] if own and down is not None and down.shape else rank
            expected |= {label(name, "A"): (this, columns), label(name, "B"): (rows, this)}
    shapes = {label(n, side): t.shape for n, pair in pairs.items() for side, t in pair.items() if side != "alpha"}
    whole = {name: tensors[name].shape for name in differences if name in tensors}
    shapes |= {f"{layouts.rename(name, names)} (difference)": one.shape for name, one in differences.items()}
    expected |= {f"{layouts.rename(name, names)} (difference)": shape for name, shape in whole.items()}
    layouts.check(shapes, expected, {}, path)
    return Lora(rank, alpha, pairs, differences)


def _targets(tensors: Mapping[str, Lazy], config: Mapping[str, Any]) -> list[str]:
    """The weights that a LoRA with one rank changes."""
    declared = config.get("lora_target_modules", layouts.LORA_TARGETS)
    ends = tuple(f".{target}.weight" for target in (declared.split(",") if isinstance(declared, str) else declared))
    return [
        name
        for name, tensor in tensors.items()
        if name.startswith(layouts.LORA_PARTS) and len(tensor.shape) == 2
        and any(f".{either}".endswith(ends) for either in (name, layouts.rename(name, layouts.TO_WAN)))
    ]  # fmt: skip
