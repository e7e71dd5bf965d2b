"""Parts from a user's own file: found, checked, written back by a name that reads again; each mistake is one line with the file."""

import importlib.metadata
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest

from teachers.config import convert, to_plain
from teachers.errors import UserError
from teachers.resolve import Registry, label, resolve

TOYS = Registry(
    kind="toy",
    group="toys",
    entries={"plain": f"{__name__}:Plain"},
    methods={"play": "def play(self) -> int"},
)
HEAD = "from dataclasses import dataclass\n\n@dataclass(frozen=True, kw_only=True)\n"
DRUM = f"{HEAD}class Drum:\n    beats: int = 4\n\n    def play(self):\n        return self.beats\n"
LOUD = f"{DRUM}\n    def __post_init__(self):\n        raise ValueError('too loud')\n"


@dataclass(frozen=True, kw_only=True)
class Plain:
    size: int = 1

    def play(self) -> int:
        return self.size


@dataclass(frozen=True, kw_only=True)
class Box:
    toy: Any = field(default_factory=Plain, metadata={"kinds": TOYS})


@pytest.fixture(autouse=True)
def _forget():
    modules, path = set(sys.modules), list(sys.path)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def read(folder, **toy) -> Box:
    return convert(Box, {"toy": toy}, locate=lambda key: f"recipe.yaml {key}", folder=folder)


def refused(folder, text: str, *parts: str, name: str = "own_toy:Drum", **keys):
    """Reading the file gives one line with all these parts and the file's path."""
    file = folder / "own_toy.py"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        read(folder, name=name, **keys)
    line = str(error.value)
    assert "\n" not in line
    assert str(file) in line
    for part in parts:
        assert part in line


def test_a_class_of_a_file_beside_the_recipe(tmp_path):
    (tmp_path / "own_toy.py").write_text(DRUM)
    box = read(tmp_path, name="own_toy:Drum", beats=3)
    assert box.toy.play() == 3
    assert label(box.toy) == "own_toy.py:Drum"
    plain = to_plain(box)
    assert plain == {"toy": {"name": f"{tmp_path}/own_toy.py:Drum", "beats": 3}}
    assert convert(Box, plain) == box, "a saved recipe is read back from any folder"
    assert to_plain(Box()) == {"toy": {"size": 1}}


def test_a_file_is_loaded_once_and_seen_by_the_files_beside_it(tmp_path):
    (tmp_path / "own_toy.py").write_text(DRUM)
    (tmp_path / "other_toy.py").write_text("from own_toy import Drum\n")
    drum = resolve(TOYS, "own_toy:Drum", folder=tmp_path)
    assert resolve(TOYS, "other_toy:Drum", folder=tmp_path) is drum
    assert resolve(TOYS, str(tmp_path / "own_toy.py:Drum")) is drum


def test_a_file_named_as_something_installed_hides_nothing(tmp_path):
    (tmp_path / "teachers.py").write_text(DRUM)
    before = sys.modules["teachers"]
    assert resolve(TOYS, "teachers:Drum", folder=tmp_path)().play() == 4
    assert sys.modules["teachers"] is before


def test_without_a_folder_the_working_directory_is_not_searched(tmp_path, monkeypatch):
    (tmp_path / "own_toy.py").write_text(DRUM)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no file of the toy .*; write the file.s absolute path"):
        resolve(TOYS, "own_toy.py:Drum")


def test_an_importable_module(tmp_path, monkeypatch):
    (tmp_path / "toy_shop.py").write_text(DRUM)
    monkeypatch.syspath_prepend(tmp_path)
    box = convert(Box, {"toy": {"name": "toy_shop:Drum"}})
    assert to_plain(box)["toy"]["name"] == "toy_shop:Drum"


def test_an_entry_point_is_named_and_never_hides_ours(monkeypatch, tmp_path):
    (tmp_path / "toy_shop.py").write_text(DRUM)
    monkeypatch.syspath_prepend(tmp_path)
    points = [importlib.metadata.EntryPoint(name, "toy_shop:Drum", "avatar_distill.toys") for name in ("drum", "plain")]
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: points if group == "avatar_distill.toys" else []
    )
    toys = Registry(kind="toy", group="toys", entries=TOYS.entries, methods=TOYS.methods)
    assert resolve(toys, "drum")().play() == 4
    assert resolve(toys, "plain") is Plain


def test_a_fingerprint_names_the_content_not_the_folder(tmp_path):
    names = []
    for folder, text in (("a", DRUM), ("b", DRUM), ("c", DRUM.replace("4", "5"))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own_toy.py").write_text(text)
        names.append(to_plain(read(tmp_path / folder, name="own_toy:Drum", beats=4), digests=True)["toy"]["name"])
    assert names[0] == names[1]
    assert names[0] != names[2]
    assert names[0].startswith("own_toy.py:Drum ")


@pytest.mark.parametrize(
    ("text", "parts", "given"),
    [
        (DRUM.replace("play", "plays"), ["missing method play", "own_toy.py:Drum", "add `def play(self) -> int`"], {}),
        (DRUM, ["no class 'Drums'", "did you mean 'Drum'?"], {"name": "own_toy:Drums"}),
        (DRUM, ["unknown key 'toy.beat'", "own_toy.py:Drum", "did you mean 'beats'?"], {"beat": 3}),
        (DRUM.replace("frozen=True, ", ""), ["frozen dataclass"], {}),
        (f"{DRUM}\n1 / 0\n", ["own_toy.py:10: ZeroDivisionError"], {}),
        ("def :\n", ["own_toy.py:1: SyntaxError"], {}),
        (LOUD, ["wrong value in 'toy'", "too loud"], {}),
    ],
)  # fmt: skip
def test_a_mistake_in_a_users_file_is_one_line_with_the_file(tmp_path, text, parts, given):
    refused(tmp_path, text, *parts, "toy", **given)


def test_a_file_that_is_gone_and_an_unknown_name(tmp_path):
    with pytest.raises(
        UserError, match=rf"no file of the toy .gone.: recipe.yaml toy.name .* no {tmp_path}/gone.py, put it"
    ):
        read(tmp_path, name="gone:Drum")
    with pytest.raises(UserError, match=r"unknown toy 'plian': .*did you mean 'plain'\?; or my_file:Thing"):
        read(tmp_path, name="plian")


def test_a_kind_with_a_base_class_asks_for_it(tmp_path):
    based = Registry(kind="toy", group="toys", base=f"{__name__}:Plain")
    (tmp_path / "own_toy.py").write_text(DRUM)
    with pytest.raises(
        UserError, match=r"own_toy.py:Drum is no toy: recipe; write .*import Plain; class Drum\(Plain\)"
    ):
        resolve(based, "own_toy:Drum", folder=tmp_path)
