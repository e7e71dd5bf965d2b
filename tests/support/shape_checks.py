"""The type checker of the jaxtyping import hook: beartype, for functions that annotate a shape; others would only cost time."""

from typing import Any, get_args

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

CONF = BeartypeConf(is_pep484_tower=True)  # an int where a float is annotated is fine, as for static checkers


def check(function: Any) -> Any:
    """`function` with its arguments and result checked, if any of them has a shape."""
    has_shape = any(map(_has_shape, getattr(function, "__annotations__", {}).values()))
    return beartype(function, conf=CONF) if has_shape else function


def _has_shape(hint: Any) -> bool:
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(map(_has_shape, get_args(hint)))
