"""Plain data <-> frozen dataclasses, strictly: an unknown, missing or mistyped key is a UserError that names it."""

import dataclasses
import difflib
import importlib
import pkgutil
import types
import typing
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import yaml

from teachers.errors import UserError

HEADER = "# avatar-distill recipe"
MISSING = "???"
Locate = Callable[[str], str]
"""Dotted key -> the file (or the command line) that the key was written in."""


def nearest(word: str, options: Iterable[str]) -> str:
    """ "did you mean 'x'?", or the list of the options when none is near."""
    known = sorted(set(options) - {word})
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known) or 'none'}"


def describe(kind: Any) -> str:
    """The expected type in words: `float`, `one of 'fp32', 'bf16'`, `list of int`, `int or null`."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(repr(part) for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(part) for part in parts)
    if origin is tuple and parts[-1] is not Ellipsis:
        return f"list of {len(parts)} values ({', '.join(describe(part) for part in parts)})"
    if origin in (tuple, list):
        return f"list of {describe(parts[0])}"
    if kind is types.NoneType:
        return "null"
    if kind is Fraction:
        return "number or a fraction such as '25/2'"
    if dataclasses.is_dataclass(kind) or origin is dict:
        return "mapping"
    return getattr(kind, "__name__", str(kind))


def convert(kind: Any, value: Any, key: str = "", locate: Locate = lambda _: "recipe") -> Any:
    """`value` (plain data, as YAML gives it) as an instance of `kind`; `key` is its dotted name.

    An int is taken for a float and a list for a tuple; nothing else is coerced. Raises UserError.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if value is MISSING or (isinstance(value, str) and value == MISSING):
        raise UserError(f"missing value of '{key}': {locate(key)}; give it as {key}=VALUE ({describe(kind)})")
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, key, locate)
    if origin in (typing.Union, types.UnionType):
        return _union(kind, value, key, locate)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        if len(kinds) == len(value):
            return tuple(
                convert(k, v, f"{key}[{i}]", locate) for i, (k, v) in enumerate(zip(kinds, value, strict=True))
            )
    if origin is list and isinstance(value, list | tuple):
        return [convert(parts[0], item, f"{key}[{i}]", locate) for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict) and all(isinstance(name, parts[0]) for name in value):
        return {name: convert(parts[1], item, f"{key}.{name}", locate) for name, item in value.items()}
    if origin is Literal and any(value == part and type(value) is type(part) for part in parts):
        return value
    if isinstance(kind, type):
        accepted, result = _scalar(kind, value)
        if accepted:
            return result
    raise UserError(f"wrong value of '{key}': {value!r} in {locate(key)}; it must be {describe(kind)}")


def _scalar(kind: type, value: Any) -> tuple[bool, Any]:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is Fraction and (is_number or isinstance(value, str | Fraction)):
        try:
            return True, Fraction(str(value))
        except (ValueError, ZeroDivisionError):
            return False, None
    if kind is float and is_number:
        return True, float(value)
    if kind is Path and isinstance(value, str):
        return True, Path(value)
    return type(value) is kind, value


def _union(kind: Any, value: Any, key: str, locate: Locate) -> Any:
    parts = [part for part in typing.get_args(kind) if part is not types.NoneType]
    if value is None and len(parts) < len(typing.get_args(kind)):
        return None
    if len(parts) == 1 and (dataclasses.is_dataclass(parts[0]) or isinstance(value, dict | list)):
        return convert(parts[0], value, key, locate)
    for part in parts:
        try:
            return convert(part, value, key, locate)
        except UserError:
            continue
    raise UserError(f"wrong value of '{key}': {value!r} in {locate(key)}; it must be {describe(kind)}")


def _dataclass(kind: Any, value: Any, key: str, locate: Locate) -> Any:
    if dataclasses.is_dataclass(value) and isinstance(value, kind):
        return value
    if not isinstance(value, dict):
        raise UserError(f"wrong value of '{key}': {value!r} in {locate(key)}; it must be {describe(kind)}")
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in fields:
            raise UserError(f"unknown key '{prefix}{name}': {locate(f'{prefix}{name}')}; {nearest(str(name), fields)}")
    hints, made = typing.get_type_hints(kind), {}
    for name, field in fields.items():
        child = prefix + name
        if name not in value:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise UserError(
                    f"missing key '{child}': {locate(key)}; give it as {child}=VALUE ({describe(hints[name])})"
                )
        elif "named" in field.metadata and value[name] is not None:
            made[name] = _named(field.metadata["named"], value[name], child, locate)
        elif "kinds" in field.metadata and value[name] is not None:
            made[name] = _kind(field.metadata["kinds"], value[name], child, locate)
        else:
            made[name] = convert(hints[name], value[name], child, locate)
    try:
        return kind(**made)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"wrong value in '{key or 'recipe'}': {locate(key)}; {error}") from error


def _named(package: str, value: Any, key: str, locate: Locate) -> Any:
    """`{name: dmd, ...}` -> `Config(...)` of the module `<package>.dmd`."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise UserError(f"missing key '{key}.name': {locate(key)}; give it as {key}.name=MODULE of {package}")
    name = value["name"]
    known = [module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__)]
    config = getattr(importlib.import_module(f"{package}.{name}"), "Config", None) if name in known else None
    if config is None:
        raise UserError(f"unknown {package} '{name}': {locate(f'{key}.name')} ({key}.name); {nearest(name, known)}")
    return convert(config, {k: v for k, v in value.items() if k != "name"}, key, locate)


def _kind(kinds: dict[str, str], value: Any, key: str, locate: Locate) -> Any:
    """`{name: wan_vae, ...}` -> the config class that `kinds` has under that name; without a name the first of them."""
    if dataclasses.is_dataclass(value):
        return value
    first = next(iter(kinds))
    name = value.get("name", first) if isinstance(value, dict) else first
    if name not in kinds:
        raise UserError(f"unknown '{key}.name' {name!r}: {locate(f'{key}.name')}; {nearest(str(name), kinds)}")
    given = {k: v for k, v in value.items() if k != "name"} if isinstance(value, dict) else value
    return convert(_located(kinds[name]), given, key, locate)


def _located(place: str) -> type:
    module, _, config = place.partition(":")
    return getattr(importlib.import_module(module), config)


def kind_name(kinds: dict[str, str], config: Any) -> str:
    """The name under which `kinds` has the class of `config`."""
    place = f"{type(config).__module__}:{type(config).__name__}"
    return next(name for name, there in kinds.items() if there == place)


def module_name(config: Any) -> str:
    """The `name:` a named node was written with: `dmd` for an instance of `distill.methods.dmd.Config`."""
    return type(config).__module__.rpartition(".")[2]


def to_plain(value: Any) -> Any:
    """The inverse of `convert`: dataclasses, tuples, fractions and paths as YAML and JSON can hold them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {}
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            name = _name_of(field, item)
            plain[field.name] = {**name, **to_plain(item)} if name else to_plain(item)
        return plain
    if isinstance(value, dict):
        return {name: to_plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Fraction | Path) else value


def _name_of(field: dataclasses.Field, item: Any) -> dict[str, str]:
    """The `name` that a field's value is read back by; none for the first of its kinds."""
    if item is None:
        return {}
    if "named" in field.metadata:
        return {"name": module_name(item)}
    kinds = field.metadata.get("kinds", {})
    name = kind_name(kinds, item) if kinds else None
    return {} if name is None or name == next(iter(kinds)) else {"name": name}


def dump(recipe: Any) -> str:
    """The recipe as YAML text that is a runnable recipe itself: no defaults list, nothing left to resolve."""
    return f"{HEADER}\n{yaml.safe_dump(to_plain(recipe), sort_keys=False, width=120)}"
