"""Plain data becomes frozen configs: strictly, with one line for a mistake."""

import sys
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import pytest

from teachers.config import convert, to_plain
from teachers.errors import UserError
from teachers.resolve import Registry, module_of


@dataclass(frozen=True, kw_only=True)
class Net:
    width: int
    rate: float
    fps: Fraction = Fraction(25, 2)
    precision: Literal["fp32", "bf16"] = "fp32"


@dataclass(frozen=True, kw_only=True)
class Tree:
    net: Net
    sigmas: tuple[float, ...]
    size: tuple[int, int] = (32, 32)
    path: str | None = None
    flag: bool = False
    scales: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        if not self.sigmas:
            raise ValueError("sigmas must not be empty")


GOOD = {"net": {"width": 8, "rate": 1}, "sigmas": [1, 0.5]}


def test_plain_data_becomes_frozen_configs_and_comes_back():
    tree = convert(Tree, {**GOOD, "scales": {"audio": 2}})
    assert tree == Tree(net=Net(width=8, rate=1.0), sigmas=(1.0, 0.5), scales={"audio": 2.0})
    assert isinstance(tree.net.rate, float)
    assert to_plain(tree)["net"]["fps"] == "25/2"
    assert convert(Tree, to_plain(tree)) == tree


def changed(key: str, value: Any) -> dict[str, Any]:
    tree = {**GOOD, "net": dict(GOOD["net"])}
    node, _, last = key.rpartition(".")
    (tree[node] if node else tree)[last] = value
    return tree


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("net.widht", 8, "unknown key 'net.widht': here.yaml; did you mean 'width'?"),
        ("qqqq", 8, "known: flag, net, path"),
        ("net.width", "8", "wrong value of 'net.width': '8' in here.yaml; it must be int"),
        ("net.width", True, "wrong value of 'net.width': True in here.yaml; it must be int"),
        ("net.width", 8.0, "it must be int"),
        ("net.rate", "fast", "it must be float"),
        ("net.fps", "1/0", "it must be number or a fraction such as '25/2'"),
        ("net.precision", "fp16", "it must be one of 'fp32', 'bf16'"),
        ("flag", 1, "it must be bool"),
        ("size", [1, 2, 3], "it must be list of 2 values (int, int)"),
        ("size", [1, "b"], "wrong value of 'size[1]'"),
        ("sigmas", 0.5, "it must be list of float"),
        ("sigmas", [], "wrong value in 'recipe': here.yaml; sigmas must not be empty"),
        ("path", 3, "it must be str or null"),
        ("net", 3, "it must be mapping"),
        ("net.width", "???", "missing value of 'net.width': here.yaml; give it as net.width=VALUE (int)"),
        ("scales", {"audio": "loud"}, "wrong value of 'scales.audio'"),
    ],
)
def test_a_mistake_is_one_line_with_key_value_and_mending(key, value, words):
    with pytest.raises(UserError) as caught:
        convert(Tree, changed(key, value), locate=lambda key: "here.yaml")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named():
    with pytest.raises(UserError, match=r"missing key 'net.rate': recipe; give it as net.rate=VALUE \(float\)"):
        convert(Tree, {"net": {"width": 8}, "sigmas": [1.0]})


@pytest.fixture
def methods(tmp_path, monkeypatch):
    package = tmp_path / "toy_methods"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for name in ("jump", "crawl"):
        (package / f"{name}.py").write_text(
            "from dataclasses import dataclass\n@dataclass(frozen=True, kw_only=True)\nclass Config:\n    steps: int\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    yield "toy_methods"
    for name in [name for name in sys.modules if name.startswith("toy_methods")]:
        del sys.modules[name]


def test_a_named_node_takes_its_type_from_the_module_it_names(methods):
    @dataclass(frozen=True, kw_only=True)
    class Stage:
        method: Any = field(
            metadata={"kinds": Registry(kind="toy method", group="toys", package=methods, default=False)}
        )

    stage = convert(Stage, {"method": {"name": "jump", "steps": 3}})
    assert module_of(stage.method).__name__ == f"{methods}.jump"
    assert stage.method.steps == 3
    assert to_plain(stage) == {"method": {"name": "jump", "steps": 3}}
    with pytest.raises(UserError, match=r"unknown toy method 'jmp': .*; did you mean 'jump'\?"):
        convert(Stage, {"method": {"name": "jmp", "steps": 3}})
    with pytest.raises(UserError, match=r"unknown key 'method.step': .*; did you mean 'steps'\?"):
        convert(Stage, {"method": {"name": "jump", "step": 3}})
    with pytest.raises(UserError, match=r"missing key 'method.name'"):
        convert(Stage, {"method": {"steps": 3}})


@dataclass(frozen=True, kw_only=True)
class Limits:
    low: float
    high: float = 1.0
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class Alarms:
    soft: Limits = Limits(low=0.25, high=0.75, name="soft")
    hard: Limits = field(default_factory=lambda: Limits(low=0.5))
    net: Net | None = None
    maybe: Limits | None = Limits(low=0.1, high=0.2)


@dataclass(frozen=True, kw_only=True)
class House:
    alarms: Alarms = Alarms(soft=Limits(low=3.0, high=4.0), maybe=None)


def test_a_part_of_a_part_and_one_that_may_be_missing_keep_their_defaults_too():
    assert convert(House, {"alarms": {"soft": {"low": 5}}}).alarms == Alarms(soft=Limits(low=5.0, high=4.0), maybe=None)
    assert convert(Alarms, {"maybe": {"low": 5}}).maybe == Limits(low=5.0, high=0.2)
    assert convert(Alarms, {"maybe": None}).maybe is None
    with pytest.raises(UserError, match=r"missing key 'alarms\.maybe\.low'"):
        convert(House, {"alarms": {"maybe": {"high": 2.0}}})
    with pytest.raises(UserError, match=r"missing value of 'soft'"):
        convert(Alarms, {"soft": "???"})


def test_one_key_of_a_part_leaves_the_others_at_the_parts_default():
    """At the default of the field, that is, and not of its class."""
    assert convert(Alarms, {"soft": {"low": 0.5}}).soft == Limits(low=0.5, high=0.75, name="soft")
    assert convert(Alarms, {"soft": {"name": None}, "hard": {"high": 2.0}}) == Alarms(
        soft=Limits(low=0.25, high=0.75), hard=Limits(low=0.5, high=2.0)
    )
    with pytest.raises(UserError, match=r"unknown key 'soft\.lwo': .*; did you mean 'low'\?"):
        convert(Alarms, {"soft": {"lwo": 0.5}})
    with pytest.raises(UserError, match=r"missing key 'net\.rate'"):
        convert(Alarms, {"net": {"width": 8}})
