"""One file per method: a final class with `roles_to_update` and `loss`, and its frozen `Config`.

A method does no backward, no optimizer step and no I/O, and draws only from the generators it is given: `rng`, this rank's own,
and `shared`, the same on every rank (the exit step, say).
`build(config, roles, grid)` makes it: roles are named networks, grid the sigmas of the stored trajectories (or None).
`needs(config)` says beforehand which roles and which part of a batch a stage has to bring.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from teachers.conditions import FEATURES, Conditions, known
from teachers.errors import UserError
from teachers.resolve import in_users_file, module_of


@dataclass(frozen=True)
class Loss:
    """`value` is differentiated; `metrics` are detached scalars to log."""

    value: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """conditions; x0 [B, C, F, H, W] of data where a method needs data; states [B, K+1, C, F, H, W] of trajectories, x0 last; sound
    [B, S] of the data at 16 kHz in [-1, 1], where the training set keeps it; filmed [B], bool: whether x0 is a clip, or the
    portrait of a condition without a film and zeros behind it (None: all are clips)."""

    conditions: Conditions
    x0: Tensor | None = None
    states: Tensor | None = None
    sound: Tensor | None = None
    filmed: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Every tensor changed alike."""
        given = (self.x0, self.states, self.sound, self.filmed)
        x0, states, sound, filmed = (None if value is None else change(value) for value in given)
        return Batch(self.conditions.map(change), x0, states, sound, filmed)

    def not_finite(self) -> list[str]:
        """The parts that hold a number that is not finite."""
        parts = {"x0": self.x0, "states": self.states, **(self.conditions.features if self.conditions else {})}
        return [name for name, x in parts.items() if isinstance(x, Tensor) and not bool(x.isfinite().all())]


@dataclass(frozen=True)
class Needs:
    """`trained` roles, the first one averaged and handed on; `frozen` ones; and what a batch holds besides conditions.

    Roles: student, teacher (bidirectional), ar_teacher (a causal network trained by `forcing`), fake_score, discriminator.
    forced: trajectories are solved by the ar_teacher under the data's clean chunks, and come with that data as x0.
    decodes: it looks at frames of rollouts: the roles hold a `clip_reader` too (`distill.methods.rewards.ClipReader`), and the
    method's config says in `decodings` how often an update of each role decodes a clip.
    differentiates: it takes gradients through the decoder.
    films: whether x0 of all rows has to be a clip (such rows alone are given), of some (`Batch.filmed` says which), or of none;
    of trajectories x0 is not read, whatever it says.
    """

    trained: tuple[str, ...]
    frozen: tuple[str, ...] = ()
    batch: Literal["x0", "trajectories", "forced"] = "x0"
    decodes: bool = False
    differentiates: bool = False
    films: Literal["all", "some", "none"] = "all"

    @property
    def takes_films_alone(self) -> bool:
        """Whether rows without a film are kept from it."""
        return self.films == "all" and self.batch != "trajectories"


def check_drop(key: str, drop: Mapping[str, float]) -> None:
    """UserError unless these are probabilities of known conditions; `key` is where they were written."""
    for name, probability in drop.items():
        known(name)
        if not 0.0 <= probability <= 1.0:
            raise UserError(f"{key}.{name}: got {probability}; it is a probability")


def drop_conditions(conditions: Conditions, drop: Mapping[str, float], rng: torch.Generator) -> Conditions:
    """The conditions with each of these features zero in the rows that its probability draws, for guidance. In the order of the
    table, whatever that of `drop`; a feature that is never dropped, or not given, draws nothing."""
    rows = conditions.num_rows
    drawn = [name for name in FEATURES if drop.get(name, 0.0) > 0.0 and name in conditions.features]
    return conditions.drop_rows(**{name: torch.rand(rows, generator=rng) < drop[name] for name in drawn})


class Method(Protocol):
    """What the loop needs of a method."""

    def roles_to_update(self, step: int) -> tuple[str, ...]: ...

    def loss(self, role: str, batch: Batch, rng: torch.Generator, shared: torch.Generator) -> Loss: ...


@runtime_checkable
class Adaptive(Protocol):
    """What a method has besides where `roles_to_update` depends on what it has seen: after each step it is given, of the metrics
    `watched` ("role/quantity"), the means over all ranks; its state is part of a checkpoint. Nothing is watched: it has none."""

    @property
    def watched(self) -> tuple[str, ...]: ...

    def observe(self, values: Mapping[str, float]) -> None: ...

    def state(self) -> dict[str, float]: ...

    def load(self, state: Mapping[str, float]) -> None: ...


def needs(config: Any) -> Needs:
    """The roles and the batch that a method asks for, by its config."""
    with in_users_file(config):
        return module_of(config).needs(config)


def build(config: Any, roles: dict, grid: tuple[float, ...]) -> Method:
    """The method of a config over its roles; `grid`: the sigmas of the stored trajectories, else the student's, 0 last."""
    with in_users_file(config):
        method = module_of(config).build(config, roles, grid)
    return UsersMethod(method, config) if hasattr(module_of(config), "__outside__") else method


class UsersMethod:
    """A method of a user's file: what fails in it is a UserError that names the file."""

    def __init__(self, method: Method, config: Any):
        self.method, self.config = method, config

    def roles_to_update(self, step: int) -> tuple[str, ...]:
        with in_users_file(self.config):
            return self.method.roles_to_update(step)

    def loss(self, role: str, batch: Batch, rng: torch.Generator, shared: torch.Generator) -> Loss:
        with in_users_file(self.config):
            loss = self.method.loss(role, batch, rng, shared)
        if not isinstance(loss, Loss):
            file = module_of(self.config).__dict__["__outside__"]
            raise UserError(
                f"{file}: a method's loss must be a Loss: got {type(loss).__name__}; return Loss(value, metrics)"
            )
        return loss
