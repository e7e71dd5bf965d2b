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


def spoiled(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """A binary file with one to three things wrong, the first 2 KB hit as often as all the rest: bits, lengths and counts, parts
    lost, doubled, zeroed or of the file `other`, or the end lost."""
    for _ in range(rng.randrange(1, 4)):
        if not data:
            return data
        place = rng.randrange(min(len(data), 2048) if rng.random() < 0.5 else len(data))
        length = rng.choice((1, 2, 4, 8, 64, 512, 4096))
        end, how = place + length, rng.randrange(8)
        if how == 0:
            part = bytes([data[place] ^ 1 << rng.randrange(8)])
            end = place + 1
        elif how == 1:
            size = rng.choice((1, 2, 4, 8))
            number = rng.choice((0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), 2 ** (8 * size - 1) - 1))
            part, end = number.to_bytes(size, rng.choice(("big", "little"))), place + size
        elif how == 2:
            part = rng.randbytes(length)
        elif how == 3:
            part = b""
        elif how == 4:
            part = 2 * data[place:end]
        elif how == 5:
            part = bytes(length)
        elif how == 6:
            start = rng.randrange(len(other)) if other else 0
            part = other[start : start + length]
        else:
            part, end = b"", len(data) if rng.random() < 0.3 else end
        data = data[:place] + part + data[end:]
    return data
