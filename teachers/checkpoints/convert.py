"""Published checkpoints <-> ours, strictly: no missing or unexpected tensor, no guess, no pickle.

    plan("OmniAvatar-1.3B", "ours", base="Wan2.1-T2V-1.3B").write("teacher")
    teacher = load_teacher("teacher")

A conversion renames and, on request, folds a LoRA and widens the patch embedding, tensor by tensor as they are written: a 14B
file needs the memory of one shard and one tensor.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from teachers.checkpoints import layouts, weights
from teachers.checkpoints.layouts import Architecture
from teachers.checkpoints.lora import Lora, Pairs, adapter_config, complete_lora, split_name, unscaled, whole_pairs
from teachers.checkpoints.strict import check_finite, listed
from teachers.checkpoints.weights import ALL, SHARD_BYTES, Lazy, Tick
from teachers.errors import UserError
from teachers.files import staged

ENTRIES = ("generator_ema", "generator", "model", "state_dict", "")
"""The entries of a torch archive in order of preference: Self-Forcing samples with its averaged weights."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint, under our names."""

    path: Path | str
    layout: str
    tensors: dict[str, Lazy]
    pairs: Pairs
    differences: dict[str, Lazy]  # of whole tensors, which a LoRA adds beside its pairs
    config: dict[str, Any]
    ignored: tuple[str, ...]  # what else is in the file and was ignored

    @property
    def names(self) -> Mapping[str, str]:
        """Our names -> those of the source, for messages."""
        return {} if self.layout in ("ours", "diffusers") else layouts.TO_WAN

    @property
    def shapes(self) -> dict[str, layouts.Shape]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class Conversion:
    """A checked conversion: names and shapes are verified, no tensor is read yet."""

    source: Checkpoint
    to: str
    architecture: Architecture
    tensors: dict[str, Lazy]  # under our names
    adapter: Lora | None = None

    @property
    def num_parameters(self) -> int:
        return sum(torch.Size(tensor.shape).numel() for tensor in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @torch.no_grad()
    def write(self, target: Path, shard_bytes: int = SHARD_BYTES, tick: Tick = lambda _: None) -> None:
        """Write `target`, which must not exist: a folder, for self-forcing a .pt file. `tick` is called with each tensor's bytes.

        Raises UserError, and then `target` is not there.
        """
        target = Path(target)
        check_target(target, self.to)
        wan = self.to in ("wan", "self-forcing")
        named = {layouts.rename(n, layouts.TO_WAN) if wan else n: tensor for n, tensor in self.tensors.items()}
        with staged(target, self.num_bytes) as temporary:
            if self.to == "self-forcing":
                named = {f"model.{name}": tensor for name, tensor in named.items()}
                weights.write_archive(temporary, "generator", named, shard_bytes, tick)
                return
            temporary.mkdir()
            kind = self.architecture.kind
            if wan and (own := layouts.apart(kind, named)):
                weights.write_file(temporary / f"{kind}.safetensors", {name: named.pop(name) for name in own}, tick)
            weights.write_safetensors(temporary, named, shard_bytes, tick)
            if self.adapter:
                self.adapter.write(temporary / weights.ADAPTER)
            config = json.dumps(layouts.make_config(self.architecture, self.to), indent=2) + "\n"
            (temporary / "config.json").write_text(config, encoding="utf-8")


def check_target(target: Path, to: str) -> None:
    """UserError unless the name of `target` fits the layout: a .pt file for self-forcing, a folder otherwise."""
    is_file = target.suffix in (".pt", ".pth", ".safetensors")
    if to == "self-forcing" and target.suffix != ".pt":
        raise UserError(f"output of self-forcing is a file: {target}; let the name end in .pt")
    if to != "self-forcing" and is_file:
        raise UserError(f"output of {to} is a folder: {target}; name it without {target.suffix}")


def plan(
    source: Path,
    to: str,
    *,
    base: Path | None = None,
    lora: Literal["fold", "adapter"] | None = None,
    widen: bool = False,
    entry: str | None = None,
    leave_out: Sequence[str] = (),
) -> Conversion:
    """The conversion of `source` to the layout `to` (one of layouts.LAYOUTS); reads names and shapes alone.

    `base`: the Wan weights that a LoRA (OmniAvatar) was trained over, or of which those of `source` replace and add a part, by name
    (InfiniteTalk's adapter). `lora`: "fold" it into the weights (the default) or keep
    it as a peft "adapter" (ours alone). `widen`: consent to 2 C + 1 input channels where the weights have C; the new ones start
    at zero. `entry`: of a torch archive (default: the first of ENTRIES). `leave_out`: patterns such as "_cls_pred_branch.*" of
    tensors that are not taken, a GAN critic's heads for one. Raises UserError.
    """
    checkpoint = read_checkpoint(Path(source), entry, leave_out)
    tensors, config = dict(checkpoint.tensors), checkpoint.config
    is_partial = not any(name in tensors for name in checkpoint.pairs)
    if checkpoint.pairs and is_partial:
        if base is None:
            raise UserError(
                f"weights missing: {checkpoint.path} is a LoRA; give the Wan weights that it was trained on as --base"
            )
        base_checkpoint = read_checkpoint(Path(base))
        if base_checkpoint.pairs:
            raise UserError(f"--base is a LoRA itself: {base_checkpoint.path}; give plain Wan weights")
        _architecture(base_checkpoint, base_checkpoint.config)
        tensors, config = base_checkpoint.tensors | tensors, base_checkpoint.config
        checkpoint = replace(checkpoint, path=f"{checkpoint.path} over {base_checkpoint.path}")
    elif base is not None:
        checkpoint, tensors, config = _over(checkpoint, read_checkpoint(Path(base)))
    if lora and not checkpoint.pairs:
        raise UserError(f"--lora has no effect: {checkpoint.path} has no LoRA; remove it")
    if lora == "adapter" and to != "ours":
        raise UserError(f"--lora adapter requires --to ours: got --to {to}; fold it")

    checkpoint = replace(checkpoint, tensors=tensors)
    architecture = _architecture(checkpoint, config)
    adapter = None
    if checkpoint.pairs:
        own = (checkpoint.pairs, checkpoint.differences)
        adapter = complete_lora(*own, tensors, checkpoint.config, checkpoint.names, checkpoint.path)
    if adapter and lora != "adapter":
        tensors = {name: adapter.fold(name, tensor) for name, tensor in tensors.items()}
    elif adapter and checkpoint.differences:
        raise UserError(
            f"--lora adapter holds pairs alone, {checkpoint.path} also has differences of whole tensors; fold it"
        )
    architecture, tensors = _widened(architecture, tensors, checkpoint, widen)
    layouts.check_representable(architecture, to, checkpoint.path)
    ordered = {name: tensors[name] for name in layouts.tensors(architecture)}
    return Conversion(checkpoint, to, architecture, ordered, adapter if lora == "adapter" else None)


def _over(checkpoint: Checkpoint, base: Checkpoint) -> tuple[Checkpoint, dict[str, Lazy], dict[str, Any]]:
    """Weights that are a part of a network over the whole of another one; UserError where nothing of that is needed."""
    if base.pairs or not base.tensors.keys() - checkpoint.tensors.keys():
        raise UserError(
            f"--base has no effect: {checkpoint.path} is no LoRA and no part over other weights, it has all of theirs; remove it"
        )
    named = replace(checkpoint, path=f"{checkpoint.path} over {base.path}", layout=base.layout)
    return named, base.tensors | checkpoint.tensors, base.config


def read_checkpoint(path: Path, entry: str | None = None, leave_out: Sequence[str] = ()) -> Checkpoint:
    """Names and shapes of a checkpoint in any of the layouts, recognised from its keys; UserError for anything else."""
    files = weights.find(path)
    is_archive = files[0].suffix != ".safetensors"
    folder = files[0].parent
    if path.is_dir():  # an adapter beside the weights that it was trained over
        apart = [folder / f"{name}.safetensors" for name, kind in layouts.KINDS.items() if kind.apart]
        files += [file for file in apart if file.is_file() and file not in files]
    stored, ignored = _of_archive(files[0], entry) if is_archive else _of_files(files, entry)
    config = weights.read_json(folder / "config.json") or _student_config(folder)
    if files[0].stem.startswith("adapter_model"):
        config |= adapter_config(folder, files[0])
    if path.is_dir() and (adapter := folder / weights.ADAPTER).is_file() and adapter != files[0]:
        stored |= weights.read_safetensors(adapter)
        config |= adapter_config(folder, adapter)
    named: dict[str, Lazy] = {}
    unmatched = set(leave_out)
    for name, tensor in stored.items():
        bare = layouts.bare(name)
        left = [pattern for pattern in leave_out if fnmatchcase(bare, pattern)]
        unmatched -= set(left)
        if left or layouts.UNUSED.fullmatch(bare):
            ignored.append(name)
        elif named.setdefault(bare, tensor) is not tensor:
            raise UserError(f"weights do not fit: {path} has {bare} under two names; keep one of them")
    if unmatched:
        raise UserError(f"--leave-out has no effect: {path} has no tensor {listed(sorted(unmatched))}; remove it")
    named = whole_pairs(named)
    layout = layouts.naming(named, path)
    tensors: dict[str, Lazy] = {}
    pairs: Pairs = {}
    differences: dict[str, Lazy] = {}
    for name, tensor in named.items():
        lora = split_name(name)
        name, side = lora or (name, "")
        name = layouts.rename(name, layouts.TO_OURS) if layout == "wan" else name
        if side == "difference":
            differences[name] = tensor
        elif lora:
            pairs.setdefault(name, {})[side] = tensor
        else:
            tensors[name] = tensor
    if "lora_rank" not in config:
        unscaled(pairs, stored)
    if layout == "wan" and is_archive and any(name.startswith("model.") for name in stored):
        layout = "self-forcing"
    elif layout == "ours" and config.get("_class_name") == "WanTransformer3DModel":
        layout = "diffusers"
    elif layout in layouts.WHOLE and config.get("_class_name") == layouts.KINDS[layout].module_class().__name__:
        layout = "ours"
    return Checkpoint(path, layout, tensors, pairs, differences, config, tuple(ignored))


def _of_archive(file: Path, entry: str | None) -> tuple[dict[str, Lazy], list[str]]:
    """Tensors of the requested entry, by default those of all entries of a kind, else the first of ENTRIES, and what is ignored."""
    entries, others = weights.read_archive(file)
    parts = next(
        (kind.entries for kind in layouts.KINDS.values() if kind.entries and entries.keys() >= set(kind.entries)), ()
    )
    if parts and entry is None:
        joined = {f"{part}.{name}": tensor for part in parts for name, tensor in entries[part].items()}
        return joined, [name for name in (*entries, *others) if name not in parts]
    chosen = next((name for name in ENTRIES if name in entries), None) if entry is None else entry
    if chosen is None or chosen not in entries:
        reason = f"has no entry {entry}" if entry else f"has none of the entries {', '.join(ENTRIES[:-1])}"
        fix = f"; name one with --entry {next(iter(entries))}" if entries else ", and no weights among it"
        raise UserError(f"weights do not fit: {file} {reason}; it has {listed(entries or others) or 'nothing'}{fix}")
    strange = [name for name in others if not layouts.UNUSED.fullmatch(layouts.bare(name))]
    if chosen == "" and strange:
        raise UserError(
            f"weights do not fit: {file}: unexpected {listed(strange)}, which are no weights; is it this model's?"
        )
    return entries[chosen], [name for name in (*entries, *others) if name != chosen]


def _of_files(files: list[Path], entry: str | None) -> tuple[dict[str, Lazy], list[str]]:
    """Tensors of safetensors files, and the empty list of what is ignored."""
    if entry is not None:
        raise UserError(f"--entry is for torch archives: {files[0]} is safetensors; remove it")
    tensors: dict[str, Lazy] = {}
    for file in files:
        part = weights.read_safetensors(file)
        if duplicates := part.keys() & tensors.keys():
            raise UserError(f"weights do not fit: {file} repeats {listed(duplicates)}; keep one of the files")
        tensors |= part
    return tensors, []


def _student_config(folder: Path) -> dict[str, Any]:
    """The network of a student's spec.json in the form of a config.json; {} where there is none."""
    spec = weights.read_json(folder / "spec.json")
    try:
        return {**spec["network"], "stride": spec["codec"]["stride"]} if spec else {}
    except (KeyError, TypeError) as error:
        raise UserError(f"damaged student: {folder / 'spec.json'} lacks {error}; export it again") from error


def _architecture(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Architecture:
    """The architecture of complete weights; UserError that lists mismatches."""
    path = checkpoint.path
    try:
        architecture = layouts.with_config(layouts.infer(checkpoint.shapes, path), config, path)
    except UserError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"damaged file: config.json of {path} ({error}); copy it again") from error
    layouts.check(checkpoint.shapes, layouts.tensors(architecture), checkpoint.names, path)
    return architecture


def _widened(
    architecture: Architecture, tensors: dict[str, Lazy], checkpoint: Checkpoint, widen: bool
) -> tuple[Architecture, dict[str, Lazy]]:
    """With `widen`: input channels [noisy] -> [noisy | reference | mask], the new ones zero. UserError without consent."""
    current, widened = architecture.in_channels, 2 * architecture.out_channels + 1
    if widen and architecture.kind in layouts.WHOLE:
        raise UserError(f"--widen has no effect: {checkpoint.path} takes latents alone; remove it")
    if current != architecture.out_channels:
        if widen:
            raise UserError(f"--widen has no effect: {checkpoint.path} has {current} input channels already; remove it")
        return architecture, tensors
    if not widen:
        if architecture.audio_in:
            raise UserError(
                f"{current}-channel weights where {widened} are needed: {checkpoint.path} has an audio path, which requires "
                f"reference and mask channels; consent with --widen, and the new {widened - current} start at zero"
            )
        return architecture, tensors
    narrow = tensors["patch_embedding.weight"]
    shape = (narrow.shape[0], widened, *narrow.shape[2:])

    def read(rows: slice = ALL) -> Tensor:
        found = narrow.read(rows)
        wide = torch.zeros((len(found), *shape[1:]), dtype=narrow.dtype)
        wide[:, :current] = found
        return wide

    wide = {**tensors, "patch_embedding.weight": Lazy(shape, narrow.dtype, read)}
    return replace(architecture, in_channels=widened), wide


def fill_network(net: Any, source: Path, *, base: Path | None = None, widen: bool = False) -> None:
    """Put the weights of `source`, in any layout and a LoRA folded, into a network of known size; options as in `plan`.

    One tensor at a time is in memory beside the network, whose dtypes stay; of a network in shards each rank reads its own rows
    alone. UserError that lists mismatches, and for numbers that are not finite.
    """
    conversion = plan(source, "ours", base=base, widen=widen)
    own = dict(net.named_parameters())
    shapes = {name: tensor.shape for name, tensor in conversion.tensors.items()}
    layouts.check(shapes, {n: tuple(p.shape) for n, p in own.items()}, conversion.source.names, conversion.source.path)
    with torch.no_grad():
        for name, parameter in own.items():
            if not parameter.is_meta:  # of a meta network only shapes are checked
                weights.copy_rows(parameter, conversion.tensors[name].read)
                check_finite({name: parameter}, source, "get the weights again")
