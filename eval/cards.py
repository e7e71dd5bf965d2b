"""Protocol cards: YAML files that name every metric with its config and how clips are read, strictly typed, with one hash.

A card is `eval/protocols/NAME.yaml` or a file of the user's:

    name: mine
    source: ...
    note: ...
    choices: [...]
    clips: {num: null, frames: null, fps: null, retime: refuse, size: null, fit: refuse, lossless: true, given: 1}
    metrics:
      psnr: {}
      sync: {name: lip_sync, resample: duplicate, max_lag: 15, crop_scale: 0.4, sound: own}
      shimmer: {name: my_metric:Shimmer, window: 3}        # class Shimmer of my_metric.py beside the card, or of a module
    floor_splits: 8
    errors: jackknife over clips

Runs and `distill eval` score with the same cards. Two numbers may be compared only where the hashes of their cards are equal.
"""

import dataclasses
import hashlib
import importlib
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

import eval.metrics
from eval.metric import Column, Metric
from eval.networks.weights import REGISTRY
from teachers.config import convert, to_plain
from teachers.disk.read import LOADER, read_yaml
from teachers.errors import UserError
from teachers.files import canonical_json
from teachers.resolve import Registry, nearest, resolve

PROSE = ("source", "note", "choices", "sha256")
"""Keys that describe and do not decide: they are not hashed."""


@dataclass(frozen=True, kw_only=True)
class ClipRule:
    """What is scored of a clip, and what is refused.

    num: clips in a set (null: as many as the real set has); frames: the first ones that count (null: all, as many in every clip)
    fps, retime: another rate is refused, or each frame is the one that a player shows at its time (null fps: as it is)
    size, fit: height and width; another size is refused, or scaled (antialiased bicubic) and cut around its centre (null: as it is)
    lossless: generated clips must be tensors or lossless RGB videos; given: leading frames that are the reference, not scored by
    FID and by metrics of frame pairs
    """

    num: int | None
    frames: int | None
    fps: Fraction | None
    retime: Literal["refuse", "shown"]
    size: tuple[int, int] | None
    fit: Literal["refuse", "crop"]
    lossless: bool
    given: int

    def __post_init__(self):
        for name in ("num", "frames"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"card: clips.{name} must be at least 1: got {getattr(self, name)}; null takes all")
        if self.fps is not None and self.fps <= 0:
            raise UserError(f"card: clips.fps must be above 0: got {self.fps}")
        if self.given < 0 or (self.frames is not None and self.given >= self.frames):
            raise UserError(f"card: clips.given must leave a frame: got {self.given}")


@dataclass(frozen=True, kw_only=True)
class CardValues:
    """What a card has beside its metrics. `choices` lists what is ours because the source is silent.

    probes: sha256 of a run's extractors, where metrics stand on them (`Card.resolved`)
    run: what the embedded evaluation of a run adds: counts, seeds, geometry, admitted metrics; None for sets of clips
    """

    name: str
    source: str
    note: str
    choices: tuple[str, ...]
    clips: ClipRule
    floor_splits: int
    errors: Literal["jackknife over clips"]
    probes: str | None = None
    run: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Card(CardValues):
    """One protocol.

    metrics: key -> metric with its config; the key is the metric's name, or another under which the card has it
    folder: where metrics of the user's are looked for (not hashed; their file's content is)
    """

    metrics: Mapping[str, Metric]
    folder: Path | None = None

    @property
    def sha256(self) -> str:
        """Hash over every key that decides a number."""
        hashed = {key: value for key, value in self._plain().items() if key not in PROSE}
        return hashlib.sha256(canonical_json(hashed).encode()).hexdigest()

    @property
    def label(self) -> str:
        """Name and the first digits of the hash: what stands beside a number."""
        return label_of(self.plain())

    @property
    def embedded(self) -> bool:
        """Whether its extractors are those of a run."""
        return any("probes" in metric.needs for metric in self.metrics.values())

    @property
    def columns(self) -> dict[str, Column]:
        """Every score that the metrics may give, in the order of the card."""
        return {name: column for metric in self.metrics.values() for name, column in metric.columns.items()}

    def key_of(self, column: str) -> str | None:
        """The metric that gives a score."""
        return next((key for key, metric in self.metrics.items() if column in metric.columns), None)

    def resolved(self, probes_sha256: str, run: dict[str, Any] | None = None) -> "Card":
        """The same card with the hash of a run's probes, and with what the run adds."""
        return dataclasses.replace(self, probes=probes_sha256 if self.embedded else None, run=run)

    def plain(self) -> dict[str, Any]:
        """For reports: every key, and the hash."""
        return {**self._plain(), "sha256": self.sha256}

    def _plain(self) -> dict[str, Any]:
        plain = {field.name: to_plain(getattr(self, field.name)) for field in dataclasses.fields(CardValues)}
        plain["metrics"] = {key: _config(key, metric) for key, metric in self.metrics.items()}
        needs = sorted({need for metric in self.metrics.values() for need in metric.needs if need in REGISTRY})
        plain["weights"] = {name: REGISTRY[name].sha256 for name in needs}
        return plain

    def __reduce__(self):  # metrics of the user's are read again from their file, in another process
        return from_plain, (self._plain(), self.folder)


def _config(key: str, metric: Metric) -> dict[str, Any]:
    """A metric as a card has it, with the sha256 of its file where that is the user's."""
    name, digest = _origin(type(metric))
    named = {} if name == key else {"name": name}
    return {**named, **to_plain(metric), **({"code": digest} if digest else {})}


def _origin(kind: type[Metric]) -> tuple[str, str | None]:
    """The name by which a card has the class, and the sha256 of its file where it is none of ours."""
    if kind in metric_classes().values():
        return kind.name, None
    module = sys.modules[kind.__module__]
    digest = hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()
    place = f"{kind.__module__}:{kind.__name__}"
    entry = next((name for name, there in registry().places.items() if there == place), None)
    file = getattr(module, "__outside__", None)
    return entry or (place if file is None else f"{file.stem}:{kind.__name__}"), digest


def names() -> list[str]:
    """The protocols that come with the package."""
    folder = resources.files("eval") / "protocols"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


@cache
def metric_classes() -> dict[str, type[Metric]]:
    """The metrics that come with the package, by name: the file and its class have the same one."""
    found = {}
    for module in pkgutil.walk_packages(eval.metrics.__path__, f"{eval.metrics.__name__}."):
        for kind in vars(importlib.import_module(module.name)).values():
            if isinstance(kind, type) and issubclass(kind, Metric) and "name" in vars(kind):
                found[kind.name] = kind
    return dict(sorted(found.items()))


@cache
def registry() -> Registry:
    """Metrics by name: ours, entry points of avatar_distill.metrics, and classes of the user's files."""
    return Registry(
        kind="metric",
        group="metrics",
        entries={name: f"{kind.__module__}:{kind.__name__}" for name, kind in metric_classes().items()},
        methods={
            "features": "def features(self, clip, real, networks) -> dict[str, Tensor]",
            "score": "def score(self, features, reference) -> dict[str, Score]",
        },
        base="eval.metric:Metric",
    )


def load_card(name: str) -> Card:
    """The shipped card of that name, or the card in a YAML file.

    Raises UserError for an unknown name, an unknown, missing or mistyped key, a metric that cannot be loaded, and for a config that
    asks for what a metric does not do.
    """
    if name.endswith((".yaml", ".yml")):
        return from_plain(read_yaml(Path(name), "give a protocol card"), Path(name).resolve().parent, name)
    if name in names():
        where = f"protocols/{name}.yaml"
        return from_plain(yaml.load((resources.files("eval") / where).read_text(encoding="utf-8"), LOADER), None, where)
    raise UserError(f"unknown protocol '{name}': --protocol; {nearest(name, names())}, or the path of a card.yaml")


def from_plain(values: Any, folder: Path | None = None, where: str = "card") -> Card:
    """A card from plain data, as YAML or a report has it; `folder`: where metrics of the user's are looked for. Raises
    UserError."""
    if not isinstance(values, dict) or not isinstance(values.get("metrics"), dict):
        raise UserError(f"a protocol card is a mapping with 'metrics': {where}; see eval/protocols/strict.yaml")
    values = {key: value for key, value in values.items() if key not in ("sha256", "weights", "folder")}
    metrics = {str(key): _metric(str(key), value, folder, where) for key, value in values.pop("metrics").items()}
    if not metrics:
        raise UserError(f"'metrics' is empty: {where}; known: {', '.join(sorted(metric_classes()))}")
    rest = convert(CardValues, values, "", lambda _: where)
    if rest.floor_splits < 2:
        raise UserError(f"'floor_splits' must be at least 2: {where}; 8 is usual")
    _check_columns(metrics, where)
    return Card(**vars(rest), metrics=metrics, folder=folder)


def _check_columns(metrics: Mapping[str, Metric], where: str) -> None:
    owner: dict[str, str] = {}
    for key, metric in metrics.items():
        for column in metric.columns:
            if column in owner:
                raise UserError(
                    f"'metrics.{key}' and 'metrics.{owner[column]}' both score '{column}': {where}; keep one"
                )
            owner[column] = key


def _metric(key: str, config: Any, folder: Path | None, where: str) -> Metric:
    """The metric of one line of a card."""
    config = {} if config is None else config
    if not isinstance(config, dict):
        raise UserError(f"wrong value of 'metrics.{key}': {config!r} in {where}; it must be a mapping")
    config = {name: value for name, value in config.items() if name != "code"}
    kind = resolve(registry(), str(config.pop("name", key)), f"metrics.{key} in {where}", folder)
    if not getattr(kind, "name", ""):
        raise UserError(
            f"{sys.modules[kind.__module__].__file__}:{kind.__name__} has no name; add `name = ...` to the class"
        )
    return convert(kind, config, f"metrics.{key}", lambda _: where)


def label_of(card: Mapping[str, Any]) -> str:
    """`Card.label` of a plain card."""
    return f"{card['name']} {card['sha256'][:12]}"


def first_difference(card: Mapping[str, Any], other: Mapping[str, Any], ignored: Sequence[str] = ()) -> str | None:
    """The first key, in the order of the cards, in which two plain cards differ, with both values; None where none decides. What
    begins with one of the `ignored` dotted keys may differ."""
    if card.get("sha256") == other.get("sha256"):
        return None
    one, two = _flat(card), _flat(other)
    for key in (*one, *(key for key in two if key not in one)):
        if one.get(key) != two.get(key) and not key.startswith(tuple(ignored)):
            return f"{key} is {one.get(key)} here and {two.get(key)} there"
    if ignored:
        return None
    return "sha256 differs, so one of the two was changed by hand"


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if not prefix and key in (*PROSE, "name"):
            continue
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return flat if prefix else {**flat, "name": value.get("name")}
