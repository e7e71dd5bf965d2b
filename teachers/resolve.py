"""Kinds of part (network, codec, encoder, method, metric, data source) by name: ours, an entry point's, or from the user's file.

    name: wan                       an entry of the kind's registry, or of the entry point group avatar_distill.<group>
    name: my_file:Thing             class Thing of my_file.py beside the recipe, else of the importable module my_file
    name: /folder/my_file.py:Thing  the same by path, as a saved recipe and a student's spec.json have it

`resolve(registry, name, where, folder)` gives the class; a mistake in a user's file is one line that names the file.
"""

import dataclasses
import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from teachers.errors import UserError

GROUPS = "avatar_distill"
"""Entry point groups are avatar_distill.networks, .codecs and so on."""


@dataclasses.dataclass(frozen=True)
class Registry(Mapping[str, str]):
    """Name -> "module:Class" of one kind of part, the first without a name where `default`. A class is a frozen dataclass whose
    fields are the keys of YAML. `methods`: what it must define, each with the line that a user adds.

    `base`, a "module:Class" where a kind has one: the class that it must inherit from. `package` in the place of entries: each of
    its modules that has a class Config; `needed` are functions that a module must have beside its class.
    """

    kind: str
    group: str
    entries: Mapping[str, str] = dataclasses.field(default_factory=dict)
    methods: Mapping[str, str] = dataclasses.field(default_factory=dict)
    base: str = ""
    package: str = ""
    needed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default: bool = True

    @cached_property
    def ours(self) -> dict[str, str]:
        """Name -> "module:Class" of what this project has."""
        if not self.package:
            return dict(self.entries)
        modules = pkgutil.iter_modules(importlib.import_module(self.package).__path__)
        return {module.name: f"{self.package}.{module.name}:Config" for module in modules}

    @cached_property
    def places(self) -> dict[str, str]:
        """The same, with what installed packages register; ours come first and win."""
        points = importlib.metadata.entry_points(group=f"{GROUPS}.{self.group}")
        return self.ours | {point.name: point.value for point in points if point.name not in self.ours}

    def __getitem__(self, name: str) -> str:
        return self.places[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __hash__(self) -> int:
        return hash((self.kind, self.group, self.package))


def nearest(word: str, options: Iterable[str]) -> str:
    """ "did you mean 'x'?", or the list of the options when none is near."""
    known = sorted(set(options) - {word})
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known) or 'none'}"


def resolve(registry: Registry, name: str, where: str = "recipe", folder: Path | None = None) -> type:
    """The class that `name` stands for, checked: `where` says who wrote it (file and key), `folder` is where a user's file is
    looked for first (None: nowhere, by absolute path alone: what a downloaded file names is not run from the working
    directory). UserError in one line: an unknown name with the nearest, or what is wrong in which file."""
    if ":" not in name:
        located = _located(registry, name)
        if located is None:
            hint = f"{nearest(name, [*options(registry), name])}; or my_file:Thing, a class of your own file"
            raise UserError(f"unknown {registry.kind} '{name}': {where}; {hint}")
        module, class_name = located
        return getattr(module, class_name) if name in registry.ours else _checked(registry, module, class_name, where)
    place, _, class_name = name.rpartition(":")
    return _checked(registry, _outside(registry, place, where, folder), class_name, where)


def options(registry: Registry) -> list[str]:
    """The names that stand for a class."""
    return [name for name in registry if _located(registry, name)]


def _located(registry: Registry, name: str) -> tuple[ModuleType, str] | None:
    """The module and the class of an entry; None where the name is none, or a module of the package that has no Config."""
    if name not in registry:
        return None
    module_name, _, class_name = registry[name].partition(":")
    module = importlib.import_module(module_name)
    return (module, class_name) if name not in registry.ours or hasattr(module, class_name) else None


def name_of(registry: Registry, config: Any, digests: bool = False) -> str:
    """The name that `resolve` reads back as the class of `config`. A class of a user's file has its absolute path; with `digests`
    the file's name and content instead, as a fingerprint wants it: the same in another folder, another after an edit."""
    module, own = type(config).__module__, type(config).__name__
    place = f"{module}:{own}"
    for name, there in registry.places.items():
        if there == place:
            return name
    file = getattr(sys.modules[module], "__outside__", None)
    if file is None:
        return place
    if digests:
        return f"{file.name}:{own} sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    return f"{file}:{own}"


def label(config: Any) -> str:
    """A config's class in errors: `emotion_net.py:EmotionNet`, or the plain name of one of ours."""
    file = getattr(sys.modules[type(config).__module__], "__outside__", None)
    return f"{file.name}:{type(config).__name__}" if file else type(config).__name__


@contextmanager
def in_users_file(config: Any) -> Iterator[None]:
    """Whatever fails inside, where the class of `config` is from a user's file, is a UserError that names the file and its line."""
    file = getattr(sys.modules[type(config).__module__], "__outside__", None)
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if file is None or type(error).__name__ == "OutOfMemoryError":  # torch's, which this file need not import
            raise
        raise UserError(f"{file}{_line(error, file)}: {type(error).__name__}: {error}; fix the file") from error


def module_of(config: Any) -> ModuleType:
    """The module that the class of a config lives in: a method's `needs` and `build` are its functions."""
    return sys.modules[type(config).__module__]


def _outside(registry: Registry, place: str, where: str, folder: Path | None) -> ModuleType:
    """The module of a user's file, or an importable one."""
    written = Path(place if place.endswith(".py") else f"{place.replace('.', '/')}.py").expanduser()
    file = written if folder is None else folder / written
    if file.is_file() and file.is_absolute():
        return _load(file.resolve(), where)
    if not place.endswith(".py") and "/" not in place:
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                raise UserError(f"{place}: {error} ({where}); install it") from error
    fix = f"there is no {file.absolute()}, put it there or write its path"
    if folder is None and not file.is_absolute():
        fix = "write the file's absolute path"
    raise UserError(f"no file of the {registry.kind} '{place}': {where}; {fix}")


def _load(file: Path, where: str) -> ModuleType:
    """A file as a module, once a process. It is named by its stem where nothing else has that name, so that a file beside it may
    import it too; its folder stands last in sys.path."""
    for module in list(sys.modules.values()):
        if getattr(module, "__outside__", None) == file:
            return module
    stem = file.stem
    if stem in sys.modules or importlib.util.find_spec(stem) is not None:
        stem = f"{stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__dict__["__outside__"] = file
    sys.modules[stem] = module
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[stem]
        what = error.msg if isinstance(error, SyntaxError) else error
        raise UserError(
            f"{file}{_line(error, file)}: {type(error).__name__}: {what} ({where}); fix the file"
        ) from error
    return module


def _line(error: Exception, file: Path) -> str:
    """`:12`, the file's own line that an error came from."""
    if isinstance(error, SyntaxError):
        return f":{error.lineno}"
    lines, trace = [], error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(file):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f":{lines[-1]}" if lines else ""


def _checked(registry: Registry, module: ModuleType, class_name: str, where: str) -> type:
    """The class of a module that is not ours, with all that its kind asks for."""
    file = Path(getattr(module, "__file__", None) or module.__name__)
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        classes = [
            key
            for key, value in vars(module).items()
            if isinstance(value, type) and value.__module__ == module.__name__
        ]
        raise UserError(f"{file}: no class '{class_name}' ({where}); {nearest(class_name, classes)}")
    what = f"{file}:{class_name}"
    if registry.base:
        base_module, _, base_name = registry.base.partition(":")
        if not issubclass(found, getattr(importlib.import_module(base_module), base_name)):
            add = f"from {base_module} import {base_name}; class {class_name}({base_name})"
            raise UserError(f"{what} is no {registry.kind}: {where}; write `{add}`")
    for method, line in registry.methods.items():
        own = getattr(found, method, None)
        if own is None or getattr(own, "is_missing", False):
            raise UserError(f"missing method {method}: {what} ({where}); add `{line}`")
    for function, line in registry.needed.items():
        if not callable(getattr(module, function, None)):
            raise UserError(f"missing function {function}: {file} ({where}); add `{line}`")
    if not dataclasses.is_dataclass(found) or not vars(found)["__dataclass_params__"].frozen:
        raise UserError(
            f"{what} is no frozen dataclass: {where}; its fields are the keys of YAML: add @dataclass(frozen=True, kw_only=True)"
        )
    return found


def missing(method: Any) -> Any:
    """Mark a base class's method that every kind must define."""
    method.is_missing = True
    return method
