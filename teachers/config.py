"""Plain data <-> frozen dataclasses, strictly: an unknown, missing or mistyped key is a UserError that names it."""

import dataclasses
import os
import re
import sys
import types
import typing
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import yaml

from teachers import shipped
from teachers.errors import UserError
from teachers.resolve import Registry, name_of, nearest, resolve

HEADER = "# avatar-distill recipe"
MISSING = "???"
_FRACTION = re.compile(r"[-+]?\d{1,12}(\.\d{1,20})?([eE][-+]?\d{1,2})?(/\d{1,12})?")
Locate = Callable[[str], str]
"""Dotted key -> the file (or the command line) that the key was written in."""


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


def convert(
    kind: Any, value: Any, key: str = "", locate: Locate = lambda _: "recipe", folder: Path | None = None
) -> Any:
    """`value` (plain data, as YAML gives it) as an instance of `kind`; `key` is its dotted name.

    An int is taken for a float and a list for a tuple; nothing else is coerced. A part that is named `my_file:Thing` is looked for
    in `folder` (teachers.resolve). Raises UserError.
    """
    return _Reader(locate, folder).read(kind, value, key)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """One conversion: where its keys were written, and the folder of the user's files."""

    locate: Locate
    folder: Path | None

    def read(self, kind: Any, value: Any, key: str) -> Any:
        origin, parts = typing.get_origin(kind), typing.get_args(kind)
        if value is MISSING or (isinstance(value, str) and value == MISSING):
            where = self.locate(key)
            raise UserError(f"missing value of '{key}': {where}; give it as {key}=VALUE ({describe(kind)})")
        if kind is Any:
            return value
        if dataclasses.is_dataclass(kind):
            return self.read_dataclass(kind, value, key)
        if origin in (typing.Union, types.UnionType):
            return self.read_union(kind, value, key)
        if origin is tuple and isinstance(value, list | tuple):
            kinds = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
            if len(kinds) == len(value):
                return tuple(self.read(k, v, f"{key}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
        if origin is list and isinstance(value, list | tuple):
            return [self.read(parts[0], item, f"{key}[{i}]") for i, item in enumerate(value)]
        if origin is dict and isinstance(value, dict) and all(isinstance(name, parts[0]) for name in value):
            return {name: self.read(parts[1], item, f"{key}.{name}") for name, item in value.items()}
        if origin is Literal and any(value == part and type(value) is type(part) for part in parts):
            return value
        if isinstance(kind, type):
            accepted, result = _scalar(kind, value)
            if accepted:
                return result
        raise self.wrong(kind, value, key)

    def wrong(self, kind: Any, value: Any, key: str) -> UserError:
        return UserError(f"wrong value of '{key}': {value!r} in {self.locate(key)}; it must be {describe(kind)}")

    def read_union(self, kind: Any, value: Any, key: str) -> Any:
        parts = [part for part in typing.get_args(kind) if part is not types.NoneType]
        if value is None and len(parts) < len(typing.get_args(kind)):
            return None
        if len(parts) == 1 and (dataclasses.is_dataclass(parts[0]) or isinstance(value, dict | list)):
            return self.read(parts[0], value, key)
        for part in parts:
            try:
                return self.read(part, value, key)
            except UserError:
                if isinstance(value, str) and value.startswith(shipped.PREFIX):
                    raise  # it says which there are
        raise self.wrong(kind, value, key)

    def read_dataclass(self, kind: Any, value: Any, key: str, base: Any = None) -> Any:
        """Keys that are not given have their values in `base`, the default of the field that this is; without one the class's."""
        if dataclasses.is_dataclass(value) and isinstance(value, kind):
            return value
        if not isinstance(value, dict):
            raise self.wrong(kind, value, key)
        fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
        prefix, whose = f"{key}." if key else "", self.owner(kind)
        for name in value:
            if name not in fields:
                where = self.locate(f"{prefix}{name}")
                raise UserError(f"unknown key '{prefix}{name}'{whose}: {where}; {nearest(str(name), fields)}")
        hints, made = typing.get_type_hints(kind), {}
        for name, field in fields.items():
            child = prefix + name
            registry = field.metadata.get("kinds")
            if name not in value and base is not None:
                made[name] = getattr(base, name)
            elif name not in value:
                if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                    needed = f"give it as {child}=VALUE ({describe(hints[name])})"
                    raise UserError(f"missing key '{child}'{whose}: {self.locate(key)}; {needed}")
            elif registry is not None and value[name] is not None:
                made[name] = self.read_part(registry, value[name], child)
            elif isinstance(value[name], dict) and part_of(hints[name]) is type(own := default_of(field, base)):
                made[name] = self.read_dataclass(type(own), value[name], child, own)
            else:
                made[name] = self.read(hints[name], value[name], child)
        try:
            return kind(**made)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"wrong value in '{key or 'recipe'}'{whose}: {self.locate(key)}; {error}") from error

    @staticmethod
    def owner(kind: type) -> str:
        """` of /folder/my_file.py:Thing` for a user's own class."""
        file = getattr(sys.modules[kind.__module__], "__outside__", None)
        return f" of {file}:{kind.__name__}" if file else ""

    def read_part(self, registry: Registry, value: Any, key: str) -> Any:
        """`{name: wan_vae, ...}` -> the registry's class of that name; without a name the first, where there is a default."""
        if dataclasses.is_dataclass(value):
            return value
        named = isinstance(value, dict) and isinstance(value.get("name"), str)
        if not named and not registry.default:
            known = registry.package or registry.kind
            raise UserError(f"missing key '{key}.name': {self.locate(key)}; give it as {key}.name=MODULE of {known}")
        if isinstance(value, dict) and not named and "name" in value:
            raise self.wrong(str, value["name"], f"{key}.name")
        name = value["name"] if named else next(iter(registry))
        where = f"{self.locate(f'{key}.name')} ({key}.name)"
        found = resolve(registry, name, where, self.folder)
        given = {k: v for k, v in value.items() if k != "name"} if isinstance(value, dict) else value
        return self.read(found, given, key)


def default_of(field: dataclasses.Field, base: Any) -> Any:
    """A field's value in `base`, or without one its default, made where it has a factory; dataclasses.MISSING: it has none."""
    if base is not None:
        return getattr(base, field.name)
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def part_of(hint: Any) -> Any:
    """The dataclass that a type hint is, alone or beside None; None for another hint."""
    parts = [part for part in typing.get_args(hint) or (hint,) if part is not types.NoneType]
    return parts[0] if len(parts) == 1 and dataclasses.is_dataclass(parts[0]) else None


def fraction(value: Any) -> Fraction:
    """A number or a text such as 25/2 as a fraction; ValueError for another, and for one of more than a dozen digits: 1e999999999
    is ten bytes of text and four hundred million of number."""
    text = str(value).strip()
    if not _FRACTION.fullmatch(text):
        raise ValueError(f"not a fraction such as 25/2: {text[:40]!r}")
    try:
        return Fraction(text)
    except ZeroDivisionError as error:
        raise ValueError(f"not a fraction such as 25/2: {text[:40]!r}") from error


def _scalar(kind: type, value: Any) -> tuple[bool, Any]:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is Fraction and (is_number or isinstance(value, str | Fraction)):
        try:
            return True, fraction(value)
        except ValueError:
            return False, None
    if kind is float and is_number:
        try:
            return True, float(value)
        except OverflowError:
            return False, None
    if kind is Path and isinstance(value, str):
        return True, shipped.resolve(os.path.expanduser(value))
    return type(value) is kind, value


def to_plain(value: Any, digests: bool = False) -> Any:
    """The inverse of `convert`: dataclasses, tuples, fractions and paths as YAML and JSON can hold them.

    `digests`: a part from a user's file is named by the file's content, not by its path: for fingerprints, not to be read back.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {}
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            name = _name_in(field, item, digests)
            plain[field.name] = {**name, **to_plain(item, digests)} if name else to_plain(item, digests)
        return plain
    if isinstance(value, dict):
        return {name: to_plain(item, digests) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item, digests) for item in value]
    return shipped.name_of(value) if isinstance(value, Path) else str(value) if isinstance(value, Fraction) else value


def _name_in(field: dataclasses.Field, item: Any, digests: bool) -> dict[str, str]:
    """The `name` that a field's value is read back by; none for the first of a registry with a default."""
    registry = field.metadata.get("kinds")
    if registry is None or not dataclasses.is_dataclass(item):
        return {}
    name = name_of(registry, item, digests)
    return {} if registry.default and name == next(iter(registry)) else {"name": name}


def dump(recipe: Any) -> str:
    """The recipe as YAML text that is a runnable recipe itself: no defaults list, nothing left to resolve."""
    return f"{HEADER}\n{yaml.safe_dump(to_plain(recipe), sort_keys=False, width=120)}"
