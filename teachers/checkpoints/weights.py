"""Tensors on disk: found, read one at a time, written in shards. Memory never holds more than a shard and a tensor.

Only safetensors and torch archives (zip) are read, the latter by torch.load(weights_only=True, mmap=True): no code of a file runs.
"""

import json
import mmap
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from teachers.checkpoints.strict import listed
from teachers.disk.read import read_json
from teachers.errors import UserError
from teachers.files import refuse_other_kind

STEM = "diffusion_pytorch_model"
"""Of the files in a folder: the name that from_pretrained of diffusers reads, and that Wan2.1 is published under."""
ADAPTER = "pytorch_lora_weights.safetensors"
STEMS = (STEM, "model", "adapter_model")
PICKLES = ("pytorch_model.pt", "pytorch_model.pth", "model.pt")
SHARD_BYTES = 5 * 10**9
RENEW_BYTES = 64 * 2**20
"""A mapped archive is mapped anew after so many bytes were read of it, so that its pages do not pile up."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # fmt: skip
DEPTH = 2
"""Entries within entries that are looked for in a torch archive: FastGen's {"model": {"net": ...}}."""
MOST_NAMED = 3
Tick = Callable[[int], Any]


ALL = slice(None)


class Read(Protocol):
    """Reads a tensor that is not in memory: rows of it, or all of it."""

    def __call__(self, rows: slice = ALL, /) -> Tensor: ...


@dataclass(frozen=True)
class Lazy:
    """A tensor that is not in memory: its shape, its type, and how to get it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Read

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def find(path: Path) -> list[Path]:
    """The weight files of `path`: a file, a folder of one network, or a diffusers pipeline (its transformer/).

    Raises UserError for a missing shard, and where there are no weights.
    """
    if path.name.endswith(".safetensors.index.json") and path.is_file():
        return _indexed(path)
    if path.is_file():
        shard = re.fullmatch(r"(.+)-\d{5}-of-\d{5}\.safetensors", path.name)
        return _shards(path.parent, shard[1]) if shard else [path]
    if not path.is_dir():
        raise UserError(f"no weights: {path} does not exist; give a file of weights or its folder")
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return _indexed(index)
        if (folder / f"{stem}.safetensors").is_file():
            return [folder / f"{stem}.safetensors"]
        if any(folder.glob(f"{stem}-*-of-*.safetensors")):
            return _shards(folder, stem)
    found = [folder / name for name in PICKLES if (folder / name).is_file()]
    if not found:
        found = [
            file for end in ("safetensors", "ckpt", "pt") for file in folder.glob(f"*.{end}")
        ]  # of a name of its own
    if not found:
        raise UserError(f"no weights: {folder} has no file of weights (.safetensors, .ckpt, .pt); copy them there")
    if len(found) > 1:
        names = listed(sorted(file.name for file in found))
        raise UserError(f"no weights of a usual name: {folder} has {names}; name the file")
    return found


def weight_map(index: Path) -> dict[str, str]:
    """Tensor -> its file's name, of the index of a model in shards."""
    names = read_json(index).get("weight_map")
    if (
        not isinstance(names, dict)
        or not names
        or not all(isinstance(n, str) and Path(n).name == n for n in names.values())
    ):
        raise UserError(f"damaged file: {index} has no weight_map of plain file names; copy it again")
    return names


def _indexed(index: Path) -> list[Path]:
    names = weight_map(index)
    files = [index.parent / name for name in sorted(set(names.values()))]
    _all_there(index.parent, [file.name for file in files], index.name)
    held = {name for file in files for name in read_safetensors(file)}
    if missing := [name for name in names if name not in held]:
        raise UserError(
            f"weights do not fit: {index} names {listed(missing)}, which its files do not hold; copy them again"
        )
    return files


def _shards(folder: Path, stem: str) -> list[Path]:
    found = sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
    total = re.fullmatch(r".+-\d{5}-of-((?!00000)\d{5})\.safetensors", found[0].name)
    if total is None:
        raise UserError(f"no shard of weights: {found[0]}; their names end in -00001-of-00002.safetensors")
    names = [f"{stem}-{i + 1:05d}-of-{total[1]}.safetensors" for i in range(int(total[1]))]
    _all_there(folder, names, f"the number of shards in {found[0].name}")
    return [folder / name for name in names]


def _all_there(folder: Path, names: Sequence[str], witness: str) -> None:
    there = {file.name for file in folder.iterdir() if file.is_file()}
    if missing := [name for name in names if name not in there]:
        raise UserError(
            f"missing shard: {listed(missing, MOST_NAMED)} in {folder}, which {witness} asks for; copy it there too"
        )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        refuse_other_kind(path)
        raise UserError(f"damaged weights: {path} ({str(error).splitlines()[0]}); copy the file again") from error


def read_safetensors(path: Path) -> dict[str, Lazy]:
    """Every tensor of one safetensors file."""

    def read(name: str, rows: slice = ALL) -> Tensor:
        with _opened(path) as file:  # opened anew: pages of what was read before are given back
            return file.get_tensor(name) if rows == ALL else file.get_slice(name)[rows]

    tensors: dict[str, Lazy] = {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118, it is no mapping
            found = file.get_slice(name)
            if found.get_dtype() not in DTYPES:
                raise UserError(
                    f"weights do not fit: {path}: {name} is of type {found.get_dtype()}; give floating-point weights"
                )
            tensors[name] = Lazy(tuple(found.get_shape()), DTYPES[found.get_dtype()], partial(read, name))
    return tensors


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a safetensors file; nothing else is read."""
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, it is no mapping


def read_metadata(path: Path) -> dict[str, str]:
    """The text that a safetensors file carries beside its tensors."""
    with _opened(path) as file:
        return file.metadata() or {}


class _Archive:
    """A mapped torch archive."""

    def __init__(self, path: Path):
        self.path = path
        self._renew()

    def _renew(self) -> None:
        self.content, self.touched = load_archive(self.path), 0

    def read(self, keys: tuple[str, ...], rows: slice = ALL) -> Tensor:
        if self.touched > RENEW_BYTES:
            self._renew()
        tensor: Any = self.content
        for key in keys:
            tensor = tensor[key]
        part = tensor if rows == ALL else tensor[rows]
        self.touched += part.nbytes
        return part


def load_archive(path: Path) -> Any:
    """What torch.save wrote, its tensors mapped; UserError for anything but tensors in plain containers."""
    if not _is_archive(path):
        refuse_other_kind(path)
        raise UserError(
            f"damaged weights: {path} is no whole archive of torch.save; copy the file again, or, if it is an old or a bare "
            "pickle, which is never read, ask its author for safetensors"
        )
    _refuse_bomb(path)
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise UserError(
            f"refused weights: {path} is a pickle with code in it ({found[1] if found else 'not only tensors'}), which never runs "
            "here; ask its author for safetensors"
        ) from error
    except Exception as error:  # torch's unpickler raises whatever a damaged pickle leads it to
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise UserError(f"damaged weights: {path} cannot be read ({reason}); copy the file again") from error


def _is_archive(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # parts on several disks
        return False


def _refuse_bomb(path: Path) -> None:
    """UserError for an archive that holds more than its size: torch.save compresses nothing, and lays no part over another."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # for torch to name
    packed = [part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED]
    if packed or sum(part.file_size for part in parts) > path.stat().st_size:
        raise UserError(
            f"refused weights: {path} is a zip that unpacks to more than itself ({listed(packed, 1) or 'its parts overlap'}), "
            "which torch.save never writes; ask its author for safetensors"
        )


def read_archive(path: Path) -> tuple[dict[str, dict[str, Lazy]], list[str]]:
    """Entry -> tensors of a torch archive, and the keys that are neither: generator, generator_ema, ... of Self-Forcing are
    entries, `model.net` is one within another; a plain state dict is the entry "". Tensors that are no floating-point numbers are
    among the others."""
    archive = _Archive(path)
    if not isinstance(archive.content, Mapping):
        raise UserError(
            f"weights do not fit: {path} holds a {type(archive.content).__name__}, no state dict; give another file"
        )
    entries: dict[str, dict[str, Lazy]] = {}
    others: list[str] = []
    _collect(archive, archive.content, (), entries, others)
    return entries, others


def _collect(
    archive: _Archive, content: Mapping, keys: tuple[str, ...], entries: dict[str, dict[str, Lazy]], others: list[str]
) -> None:
    """Put what `content`, which is at `keys` of the archive, holds among the entries and others."""
    for key, value in content.items():
        inner = (*keys, key)
        if isinstance(value, Tensor) and value.nbytes > value.untyped_storage().nbytes():
            raise UserError(
                f"refused weights: {archive.path}: {key} is {list(value.shape)} out of fewer numbers; get safetensors"
            )
        if isinstance(value, Tensor) and value.is_floating_point():
            own = entries.setdefault(".".join(keys), {})
            own[str(key)] = Lazy(tuple(value.shape), value.dtype, partial(archive.read, inner))
        elif isinstance(value, Mapping) and len(inner) <= DEPTH and any(_has_tensor(v) for v in value.values()):
            _collect(archive, value, inner, entries, others)
        else:
            others.append(".".join(str(part) for part in inner))


def _has_tensor(value: Any) -> bool:
    """Whether it is a tensor, or a mapping that has one."""
    return isinstance(value, Tensor) or (
        isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())
    )


def own_rows(tensor: DTensor) -> slice:
    """The rows of a tensor split by rows that this rank holds."""
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert tuple(shape[1:]) == tuple(tensor.shape[1:]), "shards are rows"
    return slice(offset[0], offset[0] + shape[0])


def copy_rows(into: Tensor, read: Read) -> None:
    """Copy what `read` gives into a tensor; of one in shards each rank reads its own rows alone."""
    if isinstance(into, DTensor):
        into.to_local().copy_(read(own_rows(into)))
    else:
        into.copy_(read())


def _groups(tensors: Mapping[str, Lazy], shard_bytes: int) -> list[list[str]]:
    """Names in order, as many to a shard as fit; one tensor may be larger than a shard."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, tensor in tensors.items():
        if groups[-1] and held + tensor.num_bytes > shard_bytes:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += tensor.num_bytes
    return groups


def write_safetensors(
    folder: Path, tensors: Mapping[str, Lazy], shard_bytes: int = SHARD_BYTES, tick: Tick = lambda _: None
) -> None:
    """STEM.safetensors in `folder`, or its shards with their index; `tick` is called with the bytes of each tensor."""
    groups = _groups(tensors, shard_bytes)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(groups):
        file = f"{STEM}.safetensors" if len(groups) == 1 else f"{STEM}-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        write_file(folder / file, {name: tensors[name] for name in names}, tick)
        weight_map |= dict.fromkeys(names, file)
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(t.num_bytes for t in tensors.values())}, "weight_map": weight_map}
        (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def write_file(path: Path, tensors: Mapping[str, Lazy], tick: Tick = lambda _: None) -> None:
    """One safetensors file; `tick` is called with the bytes of each tensor."""
    held = {}
    for name, tensor in tensors.items():
        held[name] = tensor.read().contiguous()
        tick(tensor.num_bytes)
    save_file(held, path, metadata={"format": "pt"})


def write_archive(
    path: Path, entry: str, tensors: Mapping[str, Lazy], shard_bytes: int = SHARD_BYTES, tick: Tick = lambda _: None
) -> None:
    """A torch archive {entry: {name: tensor}}: first its outline, then the tensors into their places in the mapped file.

    The checksums of the zip are not filled in, as torch.serialization.skip_data leaves them; torch.load does not look at them.
    """
    with FakeTensorMode():
        outline = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
    with path.open("wb") as file:
        try:
            with torch.serialization.skip_data(materialize_fake_tensors=True):
                torch.save({entry: outline}, file)
        except RuntimeError as error:  # PytorchStreamWriter
            raise OSError(str(error)) from error
        file.flush()
        if sys.platform == "linux":  # a disk that is full says so here; in the mapping it would end the process
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    for names in _groups(tensors, shard_bytes):
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            places = torch.load(path, map_location="cpu", mmap=True, weights_only=True)[entry]
        for name in names:
            places[name].copy_(tensors[name].read())
            tick(tensors[name].num_bytes)
        del places


def read_tensors(path: Path, where: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file. UserError for a missing or damaged file, or one with more than tensors."""
    if not path.is_file():
        raise UserError(f"no weights: {path}; {where}")
    if path.suffix == ".safetensors":
        with _opened(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    tensors = load_archive(path)
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"not a table of tensors: {path}; {where}")
    return tensors
