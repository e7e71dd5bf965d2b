"""Recipes on disk: YAML composed by Hydra (groups, presets, overrides) into plain data, and where each key was written."""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.base import Container
from omegaconf.basecontainer import BaseContainer

import distill
from teachers.config import Locate, nearest
from teachers.disk.read import read_text, read_yaml
from teachers.errors import UserError
from teachers.files import flatten
from teachers.machine import native_precision

RECIPES = Path(distill.__file__).resolve().parent.parent / "recipes"
"""The shipped recipes and their groups: beside the packages, in a checkout and in a wheel alike."""
SECRET = "a recipe does not read the environment"
MOST_REFERENCES, MOST_CHARACTERS = 2_000, 2**20
"""That a recipe's ${KEY} may be followed, those behind each other included, and the length of all that they give."""
BOMB = f"over {MOST_REFERENCES} references, or over {MOST_CHARACTERS} characters by them"


def compose_values(path: Path, overrides: Sequence[str], fields: Collection[str]) -> tuple[dict[str, Any], Locate]:
    """Hydra's composition of the recipe `path` (see find_recipe) as plain data, and the function that says where a key was written.

    `fields` are the known top-level keys. Raises UserError.
    """
    path = find_recipe(path)
    if not path.is_file():
        near = nearest(path.name, (other.name for other in path.parent.glob("*.yaml")))
        raise UserError(f"no recipe file: {path}; {near}")
    if path.suffix != ".yaml":
        raise UserError(f"a recipe is a .yaml file: {path}; rename it to {path.with_suffix('.yaml').name}")
    parsed = [_parse(text) for text in overrides]
    groups = _groups(path.parent)
    for override in parsed:
        _check_group(override, groups)
    texts = [_force(override, groups) for override in parsed]
    _check_files(path, overrides)
    try:
        own, choices = _compose(path, texts)
        values, references = _plain(own)
        wanted = {key: value for key, value in _conditional(values) if not key.startswith(references)}
        if any(_overlap(key, override.key_or_group) for key in wanted for override in parsed):
            own, choices = _compose(path, [*(f"++{key}={json.dumps(value)}" for key, value in wanted.items()), *texts])
            values, _ = _plain(own)
        elif wanted:  # the command line says nothing of these, so they are the same as if they came before it
            values, _ = _plain(own, wanted)
        list(_conditional(values))
    except UserError:
        raise
    except Exception as error:  # whatever Hydra may raise at a recipe that is none
        if named := re.search(rf"{SECRET}: \S+", str(error)):
            raise UserError(f"{named[0]} in {path}; give the value itself, as KEY=VALUE") from error
        if BOMB in str(error):
            raise UserError(f"too large: {path} has {BOMB}; write what its ${{KEY}} name plainly") from error
        if missing := re.search(r"Missing mandatory value: (\S+)", str(error)):
            raise UserError(f"missing value of '{missing[1]}': {path}; give it as {missing[1]}=VALUE") from error
        raise UserError(f"{_first_lines(error)}: {path}; fix the recipe or the overrides") from error
    locate = _locator(path, parsed, choices)
    for name in values:
        if name not in fields:
            known = {*fields, *groups}
            raise UserError(f"unknown key '{name}': {locate(str(name))}; {nearest(str(name), known)}")
    return values, locate


def spoken(overrides: Sequence[str]) -> set[str]:
    """Every key that a command line says, those in a mapping's value too."""
    found = set[str]()
    for override in map(_parse, overrides):
        value = override.value() if not override.is_delete() else None
        found |= set(flatten(value, override.key_or_group)) if isinstance(value, dict) else {override.key_or_group}
    return found


def _check_files(path: Path, overrides: Sequence[str]) -> None:
    """UserError for a recipe, or an option of a group that it or the command line names, that cannot be read, or is far larger than
    it looks. Those that are shipped are known to be whole."""
    read_yaml(path)
    words = set(re.findall(r"\w+", " ".join([read_text(path), *overrides])))
    for file in path.parent.glob("*/*.yaml"):
        if file.parent.name in words and file.parent.parent != RECIPES:
            read_yaml(file)


def _compose(path: Path, texts: Sequence[str]) -> tuple[DictConfig, dict[str, Any]]:
    """Hydra's composition, and which option each group has."""
    search = f"hydra.searchpath=[{quoted(f'file://{RECIPES}')}]"
    with initialize_config_dir(str(path.parent.resolve()), version_base="1.3"), _no_environment(), _few_references():
        composed = compose(path.stem, [search, *texts], return_hydra_config=True)
        own = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    return own, dict(composed.hydra.runtime.choices)


def _plain(own: DictConfig, more: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A composition with `more` values by key, as plain data, and how keys below a ${KEY} begin: what that key names has its own.
    `engine.precision: auto` is this machine's from here on: recipe.yaml and the fingerprints of a run hold what was computed in."""
    with _no_environment(), _few_references():
        for key, value in (more or {}).items():
            OmegaConf.update(own, key, value, merge=True, force_add=True)
        if OmegaConf.select(own, "engine.precision") == "auto":
            own.engine.precision = native_precision()
        values, plain = OmegaConf.to_container(own, resolve=True), OmegaConf.to_container(own)
    assert isinstance(values, dict)
    assert isinstance(plain, dict)
    written = {str(key): value for name, item in plain.items() for key, value in flatten(item, str(name)).items()}
    references = tuple(f"{key}." for key, value in written.items() if isinstance(value, str) and "${" in value)
    return {str(name): value for name, value in values.items()}, references


def _overlap(key: str, other: str) -> bool:
    """Whether one of two dotted keys is the other, or below it."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


@contextmanager
def _no_environment() -> Iterator[None]:
    """Inside, ${oc.env:NAME} is an error: its value would be written to recipe.yaml and to reports, which people pass on."""

    def refuse(name: str, *_: Any) -> NoReturn:
        raise ValueError(f"{SECRET}: ${{oc.env:{name}}}")

    before = BaseContainer._resolvers["oc.env"]
    OmegaConf.register_new_resolver("oc.env", refuse, replace=True)
    try:
        yield
    finally:
        BaseContainer._resolvers["oc.env"] = before


@contextmanager
def _few_references() -> Iterator[None]:
    """Inside, ${KEY} are followed no more often than a recipe needs: two that name two more each, and so on, never end."""
    follow, count, length = Container.resolve_parse_tree, 0, 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal count, length
        found = follow(*args, **options)
        count, length = count + 1, length + (len(found) if isinstance(found, str) else 0)
        if count > MOST_REFERENCES or length > MOST_CHARACTERS:
            raise ValueError(BOMB)
        return found

    Container.resolve_parse_tree = counted
    try:
        yield
    finally:
        Container.resolve_parse_tree = follow


def _conditional(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Take out every key with a "?": of a preset, PART? for the recipes that have that part, PART?FIELD for those whose part has
    that field. Yields key and value of all below those whose part is there; they come before those of the command line."""
    for name, value in list(values.items()):
        if "?" in str(name):
            del values[name]
            for part, found in _of_parts({name: value}, values).items():
                yield from flatten(found, f"{prefix}{part}").items()
        elif isinstance(value, dict):
            yield from _conditional(value, f"{prefix}{name}.")


def _of_parts(values: dict[str, Any], own: Any) -> dict[str, Any]:
    """`values` without what is for parts or fields that `own` has not, the others under their plain names."""
    found = {}
    for name, value in values.items():
        part, asked, needed = str(name).partition("?")
        there = own.get(part) if isinstance(own, dict) else None
        if asked and (there is None or (needed and there.get(needed) is None)):
            continue
        found[part] = _of_parts(value, there) if isinstance(value, dict) else value
    return found


def find_recipe(word: Path | str) -> Path:
    """The file of a recipe: a path ending in .yaml as it is, a bare name (`dmd_avatar`) the shipped recipe of that name.

    Raises UserError where no shipped recipe has the name, or where another file of that name is in the working directory.
    """
    path = Path(word)
    if path.suffix or len(path.parts) != 1:
        return path
    own, shipped = path.with_suffix(".yaml"), RECIPES / f"{path}.yaml"
    if not shipped.is_file():
        known = [*(file.stem for file in RECIPES.glob("*.yaml")), *([own.name] if own.is_file() else ())]
        raise UserError(
            f"no shipped recipe is called '{path}': `distill recipes` lists them; {nearest(str(path), known)}"
        )
    if own.is_file() and not own.samefile(shipped):
        raise UserError(
            f"two recipes are called '{path}': {own} here and {shipped}; write {own} for yours, the path for that"
        )
    return shipped


def quoted(text: str) -> str:
    """A string for the grammar of overrides, where a backslash is written twice before a quote alone."""
    return "'" + re.sub(r"(\\+)(?='|\Z)", r"\1\1", text).replace("'", "\\'") + "'"


def _parse(text: str) -> Override:
    """An override; a value that is beyond Hydra's grammar (a path with = or an umlaut, say) is taken as it is written."""
    parser, (key, _, value) = OverridesParser.create(), text.partition("=")
    if not text.isascii() and not text.encode("utf-8", "ignore").decode() == text:
        raise UserError(f"not UTF-8: {text!r} on the command line; write key=value in UTF-8")
    try:
        override = parser.parse_overrides([text])[0]
    except HydraException as error:
        is_list = value.startswith("[") and value.endswith("]")
        items = [quoted(item.strip()) for item in value[1:-1].split(",")] if is_list else []
        plain = f"{key}=[{','.join(items)}]" if is_list else f"{key}={quoted(value)}"
        try:
            override = parser.parse_overrides([plain if value else text])[0]
        except HydraException:
            raise UserError(f"not an override: '{text}' on the command line; write key=value") from error
    if override.key_or_group.split(".")[0].split("/")[0] == "hydra":
        raise UserError(f"'{text}' would have no effect: command line; remove hydra's own settings")
    if override.is_sweep_override():
        fix = "give one value, quote it if it holds a comma, or add -m for a run of each"
        raise UserError(f"several values in '{text}': command line; {fix}")
    if override.key_or_group in ("sweep", "sweep_dir", "launcher"):
        raise UserError(f"'{text}' would have no effect: command line; it is for a sweep, add -m")
    return override


def _groups(folder: Path) -> dict[str, list[str]]:
    """Group -> its options, over the recipe's own folder and the shipped ones."""
    groups: dict[str, list[str]] = {}
    for file in (*folder.glob("*/*.yaml"), *RECIPES.glob("*/*.yaml")):
        groups.setdefault(file.parent.name, []).append(file.stem)
    return groups


def _check_group(override: Override, groups: dict[str, list[str]]) -> None:
    group, option = override.key_or_group, override.value()
    if group in groups and isinstance(option, str) and option not in groups[group]:
        raise UserError(f"unknown {group} '{option}': command line; {nearest(option, groups[group])}")


def _force(override: Override, groups: dict[str, list[str]]) -> str:
    """`++key=value` for a plain value, so that the strict reader, which knows the nearest name, checks the key."""
    text = str(override.input_line)
    is_group = override.key_or_group in groups or "@" in text.split("=")[0]
    return text if is_group or text.startswith(("+", "~")) else f"++{text}"


def _first_lines(error: Exception) -> str:
    text = str(error).split("Config search path")[0]
    text = re.sub(r"\s*(full_key|object_type|reference_type)[:=].*", "", text)
    return " ".join(text.split())[:300].rstrip(".;: ")


def _locator(path: Path, overrides: Sequence[Override], choices: dict[str, Any]) -> Locate:
    """Key -> "command line", the group file or the recipe that says it; the recipe where none does."""
    files = [("", path)]
    for group, option in choices.items():
        name, _, package = str(group).partition("@")
        for root in (path.parent, RECIPES):
            file = root / name / f"{option}.yaml"
            if not name.startswith("hydra") and option and file.is_file():
                text = read_text(file)
                files.append(("" if "@package _global_" in text else package or name.replace("/", "."), file))
                break

    contents: dict[Path, Any] = {}

    def locate(key: str) -> str:
        spoken = [override.key_or_group for override in overrides]
        if key and any(word == key or key.startswith(f"{word}.") for word in spoken):
            return "command line"
        for prefix, file in reversed(files):
            if key.startswith(prefix) and (below := key[len(prefix) :].strip(".")):
                if file not in contents:
                    contents[file] = read_yaml(file)
                if _holds(contents[file], below):
                    return str(file)
        return str(path)

    return locate


def _holds(node: Any, key: str) -> bool:
    for part in re.split(r"\.|\[", key):
        found = [name for name in node if str(name).partition("?")[0] == part] if isinstance(node, dict) else []
        if not found:
            return False
        node = node[found[0]]
    return True
