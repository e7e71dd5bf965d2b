"""Wrong files: what disks, editors and attackers make of a right one."""

import json
import random
from typing import Any

import yaml

ODD: tuple[Any, ...] = (
    None, True, -1, 0, 7, 10**30, 1e308, float("nan"), "", "x", "ü" * 40, "../../x", "1/0", "\ud800", [], {}, [[]], {"": None},
)  # fmt: skip
WHOLE = (
    b"",
    b"[]",
    b"{}",
    b"null",
    b"7",
    b'"x"',
    b"\xff\xfe\x00",
    b"\x00" * 64,
    b"[" * 20_000,
    b"{" * 20_000,
    b"9" * 5000,
    b"a: [",
)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The file with one thing wrong: another content, cut, a byte changed, or, of JSON and YAML, a value of another kind, one key
    less or one more."""
    how = rng.randrange(8)
    if how == 0 or not data:
        return rng.choice(WHOLE)
    if how == 1:
        return data[: rng.randrange(len(data))]
    if how == 2:
        place = rng.randrange(min(len(data), 2000))
        return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
    try:
        values = json.loads(data)
        write = json.dumps
    except ValueError:
        try:
            values, write = yaml.safe_load(data), yaml.safe_dump
        except (yaml.YAMLError, ValueError):
            place = rng.randrange(len(data))
            return data[:place] + rng.randbytes(rng.randrange(1, 30)) + data[place:]
    places = [*_places(values)]
    if places:
        owner, key = rng.choice(places)
        if how == 3 and isinstance(owner, dict):
            del owner[key]
        elif how == 4 and isinstance(owner, dict):
            owner["odd"] = rng.choice(ODD)
        else:
            owner[key] = rng.choice(ODD)
    return write(values).encode("utf-8", "surrogatepass")


def _places(value: Any):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from _places(item)
