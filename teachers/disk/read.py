"""Text that people and programs left on the disk: UTF-8, JSON, YAML as plain values, or one line that names the file."""

import json
from pathlib import Path
from typing import Any

import yaml

from teachers.errors import UserError
from teachers.files import refuse_other_kind

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MOST_VALUES = 100_000
"""Of a YAML file with its anchors written out."""
MOST_BYTES = 2**20
"""Of a YAML file."""


def read_text(path: Path, hint: str = "check the path") -> str:
    """A UTF-8 file without its byte order mark; UserError, which ends with `hint` where it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8: {path} at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror}): {path}; {hint}") from error


def read_json(path: Path, hint: str = "copy it again") -> dict[str, Any]:
    """A JSON file that holds a mapping; {} where there is no file."""
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        refuse_other_kind(path)
        raise UserError(f"damaged file: {path} ({_short(error)}); {hint}") from error
    if not isinstance(values, dict):
        raise UserError(f"damaged file: {path} holds no mapping; {hint}")
    return values


def read_yaml(path: Path, hint: str = "fix it") -> Any:
    """A YAML file's value. UserError for one that is not UTF-8 or not YAML, and for one that anchors make larger than
    MOST_VALUES values, or endless."""
    text = read_text(path)
    if len(text) > MOST_BYTES:
        raise UserError(f"too large: {path} has {len(text)} characters; {hint}")
    try:
        root = yaml.compose(text, LOADER)
        if root is not None and _count(root, {}) > MOST_VALUES:
            raise UserError(f"too large: {path} has over {MOST_VALUES} values with its anchors written out; {hint}")
        return yaml.load(text, LOADER)
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"not YAML: {path} ({_short(error)}); {hint}") from error


def read_yaml_mapping(path: Path, hint: str = "fix it") -> dict[str, Any]:
    """A YAML file that holds a mapping."""
    values = read_yaml(path, hint)
    if not isinstance(values, dict):
        raise UserError(f"not a mapping: {path}; {hint}")
    return values


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Values below a node, those of an anchor as often as it is used; ValueError for one that holds itself."""
    if id(node) not in known:
        known[id(node)] = -1
        children: list[Any] = []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        known[id(node)] = 1 + sum(_count(child, known) for child in children)
    if known[id(node)] < 0:
        raise ValueError("an anchor that holds itself")
    return known[id(node)]


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
