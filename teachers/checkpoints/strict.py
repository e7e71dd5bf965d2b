"""Strict loading of weights: every tensor there, none left over, every shape right, or one line that lists what is wrong."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from teachers.errors import UserError

Shapes = Mapping[str, Sequence[int]]


def listed(names: Iterable[str], most: int = 6) -> str:
    """The names in one line, at most `most` of them."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def describe(missing: Sequence[str], unexpected: Sequence[str], wrong: Mapping[str, tuple[Any, Any]]) -> str:
    """What does not fit, in one line; "" where all does. `wrong`: name -> (the shape that is there, the one that is needed)."""
    faults = [f"missing {listed(missing)}"] if missing else []
    faults += [f"unexpected {listed(unexpected)}"] if unexpected else []
    if wrong:
        faults.append(
            listed((f"{n} is {list(is_)} where {list(needed)} is needed" for n, (is_, needed) in wrong.items()), 3)
        )
    return "; ".join(faults)


def misfits(given: Shapes, wanted: Shapes, *, optional: str = "", named: Callable[[str], str] = str) -> str:
    """What of `given` does not fit `wanted`, in one line; "" where all does.

    Names that match the whole of the regular expression `optional` may be missing. `named` turns our names to the file's.
    """
    missing = [named(name) for name in wanted if name not in given and not re.fullmatch(optional, name)]
    unexpected = [named(name) for name in given if name not in wanted]
    both = {name: (tuple(shape), tuple(wanted[name])) for name, shape in given.items() if name in wanted}
    return describe(missing, unexpected, {named(name): pair for name, pair in both.items() if pair[0] != pair[1]})


def refuse(faults: str, where: Any, hint: str) -> None:
    """UserError "weights do not fit: WHERE: FAULTS; HINT", unless there are no faults."""
    if faults:
        raise UserError(f"weights do not fit: {where}: {faults}; {hint}")


def check_shapes(given: Shapes, wanted: Shapes, where: Any, hint: str, *, named: Callable[[str], str] = str) -> None:
    """UserError that lists what is missing, unexpected or of another shape; `where` names the file, `hint` the fix."""
    refuse(misfits(given, wanted, named=named), where, hint)


def is_finite(tensor: Tensor) -> bool:
    """Whether every number is finite; in one pass, without a copy where the type allows."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return True
    wide = tensor if tensor.dtype.itemsize > 1 else tensor.float()
    return all(bool(end.isfinite()) for end in wide.aminmax())


def check_finite(tensors: Mapping[str, Tensor], where: Any, hint: str) -> None:
    """UserError that names the tensors with numbers that are not finite."""
    if wrong := [name for name, tensor in tensors.items() if not is_finite(tensor)]:
        raise UserError(f"weights are not finite: {where}: {listed(wrong, 3)}; {hint}")


def load_strict(
    module: nn.Module, tensors: Mapping[str, Tensor], where: Any, hint: str, *, assign: bool = False, optional: str = ""
) -> None:
    """Load a whole state dict into a module; UserError that lists what is missing, unexpected, of another shape or not finite.

    Values are copied into the module's own tensors, whose types and device stay; with `assign` the given tensors take their
    place (for a module on the meta device, or to keep the file's types). Names that match the regular expression `optional` may
    be missing and keep their values.
    """
    own = module.state_dict()
    refuse(misfits(shapes_of(tensors), shapes_of(own), optional=optional), where, hint)
    check_finite(tensors, where, hint)
    module.load_state_dict({name: tensors.get(name, value) for name, value in own.items()}, assign=assign)
