"""A run as frozen configs: `Recipe` and the config of every stage, read strictly from YAML."""

import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from distill import expect, methods
from distill.compose import compose_values, spoken
from distill.data.config import ClipsConfig
from distill.data.procedural.corruption import CorruptionConfig
from distill.expect import Bounds
from distill.health import HealthConfig
from distill.methods import Needs
from distill.training.config import EngineConfig, TrainConfig
from distill.training.lora import LoraRoles
from distill.training.metrics_log import Kind as TrackerKind
from eval.embedded.protocol import EvalConfig
from students.spec import Spec, StudentConfig, check_image, student_sigmas
from teachers.config import convert, to_plain
from teachers.errors import UserError
from teachers.flow import Grid, sigma_grid
from teachers.guidance import Guidance
from teachers.networks.kind import NETWORKS, NetworkKind
from teachers.resolve import Registry, label, options, resolve

NO_RESULT = (
    *("run_dir", "reuse", "threads", "tiny", "tracker", "health", "eval.batch_size", "teacher.sampler", "base.sampler"),
    *(f"engine.{name}" for name in EngineConfig.__dataclass_fields__ if name != "precision"),
)
"""Fields that change no result: where, how fast, in how much memory and how closely watched a run is. They are in no fingerprint
and may change from one start of a run to the next. `threads` and the number of processes do change the last bits, for sums are then
taken in another order. Every other field belongs to a stage (`distill.pipeline.stages`)."""
METHODS = Registry(
    kind="method",
    group="methods",
    package="distill.methods",
    default=False,
    needed={
        "needs": "def needs(config: Config) -> Needs",
        "build": "def build(config: Config, roles: dict, grid: tuple | None = None) -> Method",
    },
)
"""Training methods: one module each, with a Config, `needs` and `build`; of a user's file by `my_file:Config`."""
DATA = Registry(
    kind="data source",
    group="data",
    entries={
        "avatars": "distill.data.procedural.source:DataConfig",
        "maze": "distill.data.procedural.maze:MazeConfig",
        "folder": "distill.data.recorded:FolderConfig",
        "conditions": "distill.data.conditions:ConditionsConfig",
    },
    base="distill.data.config:ClipsConfig",
    methods={"open": "def open(self) -> ClipSource"},
)
"""Where clips come from; `data.name` says which, the first without a name."""


@dataclass(frozen=True, kw_only=True)
class MethodStage:
    """A slot: a training stage of the student by any method of `distill.methods`."""

    method: Any = field(metadata={"kinds": METHODS})
    train: TrainConfig


@dataclass(frozen=True, kw_only=True)
class InitStage(MethodStage):
    """The first slot. `start`: the stage whose weights it starts from, where the method and the network do not decide: null is the
    teacher's (or base's)."""

    start: Literal["ar_teacher"] | None = None


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """A teacher's published sampler: `num_steps` Euler steps on a `grid` (teachers.flow.sigma_grid) with this guidance."""

    num_steps: int
    shift: float
    grid: Grid = "even"
    guidance: Guidance = field(default_factory=Guidance)

    def __post_init__(self):
        sigma_grid(self.num_steps, self.shift, self.grid)


@dataclass(frozen=True, kw_only=True)
class TeacherStage:
    """A network, and where its weights come from: `path` (any layout of `distill convert`), or `method` and `train`, by which it
    is trained here (from `path`, if that is given too).

    `wan`: the Wan weights that a LoRA in `path` (OmniAvatar) was trained over, or that what is in `path` replaces a part of.
    `widen`: consent to reference and mask channels that start at zero. `precision` is that of a frozen network's matrices.
    `sampler`: the published one, for `distill sample --teacher` (null: that of the trajectories).
    """

    network: NetworkKind = field(metadata={"kinds": NETWORKS})
    path: Path | None = None
    wan: Path | None = None
    widen: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    method: Any = field(default=None, metadata={"kinds": METHODS})
    train: TrainConfig | None = None
    sampler: SamplerConfig | None = None

    def __post_init__(self):
        if self.path is None and (self.method is None or self.train is None):
            raise UserError(
                "no weights of the teacher: give teacher.path=FOLDER (Wan, OmniAvatar, diffusers, Self-Forcing or ours), or "
                "teacher.method and teacher.train to train one here"
            )

    @property
    def is_trained(self) -> bool:
        """Whether the stage trains the network, and so has weights of its own."""
        return self.method is not None and self.train is not None


@dataclass(frozen=True, kw_only=True)
class TrajectoriesConfig:
    """`num_pairs` solutions of `num_steps` Euler steps with this guidance; the student's sigmas must lie on the grid.
    `role`: whose they are, the teacher's, those of the network that the student starts from, or those of the autoregressive
    teacher under the data's clean chunks."""

    num_pairs: int
    num_steps: int = 48
    shift: float = 3.0
    guidance: Guidance = field(default_factory=Guidance)
    batch_size: int = 32
    role: Literal["teacher", "base", "ar_teacher"] = "teacher"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run, resolved. `reuse` names other run folders, or sweeps, whose finished stages with equal fingerprints are copied.

    `base`: the network that student and fake score start from, where that is not the teacher. `ar_teacher`: how an autoregressive
    teacher is trained (method forcing), for the initialisations that ask for one. `tiny`: random small weights in the published
    layouts are written where the paths point. `corruption`: what is done to the clips that trajectories, init and distill take
    their conditions from; teacher and evaluation keep clean ones. `tracker` sees every row of metrics.jsonl.
    `lora`: students and fake score are trained as adapters over one network. `expect`: what its report should show
    (`distill.expect`).

    The student goes through the slots `ar_teacher` (where there is one), `init` and `distill`; each takes any method.
    """

    name: str
    seed: int
    run_dir: str
    reuse: str | tuple[str, ...] | None
    threads: int
    data: ClipsConfig = field(metadata={"kinds": DATA})
    teacher: TeacherStage
    student: StudentConfig
    trajectories: TrajectoriesConfig
    init: InitStage
    distill: MethodStage
    engine: EngineConfig
    eval: EvalConfig
    base: TeacherStage | None = None
    ar_teacher: MethodStage | None = None
    health: HealthConfig = field(default_factory=HealthConfig)
    tiny: bool = False
    corruption: CorruptionConfig | None = None
    tracker: TrackerKind = "none"
    lora: LoraRoles | None = None
    expect: dict[str, Bounds] = field(default_factory=dict)

    def __post_init__(self):
        expect.check(self.expect)

    @property
    def init_checkpoint(self) -> str:
        """The stage whose weights student and fake score start from: `base` where it is given, else `teacher`."""
        return "teacher" if self.base is None else "base"

    @property
    def conditions_stage(self) -> str:
        """The stage that the student's conditions come from."""
        return "data" if self.corruption is None else "corrupted"

    @property
    def has_custom_network(self) -> bool:
        """Whether the student's network is another kind than the teacher's, and so starts from none of its weights."""
        return self.student.network is not None and not self.student.network.over_teacher

    @property
    def zero_shot_stage(self) -> str:
        """The stage whose weights are the zero-shot student's; a network of its own has them from its own teacher."""
        return "ar_teacher" if self.has_custom_network else self.init_checkpoint

    @property
    def solver_stage(self) -> str:
        """The stage of the network whose trajectories are stored."""
        return self.init_checkpoint if self.trajectories.role == "base" else self.trajectories.role

    def needs(self, slot: str) -> Needs:
        """The roles and the batch that the method of a slot asks for."""
        return methods.needs(getattr(self, slot).method)

    def start_of(self, slot: str) -> str:
        """The stage whose weights a slot starts from."""
        if slot == "distill":
            return "init"
        if slot == "ar_teacher":
            return self.init_checkpoint
        needs = self.needs("init")
        forced = "ar_teacher" in needs.frozen or needs.batch == "forced"
        return (
            "ar_teacher" if self.has_custom_network or forced or self.init.start is not None else self.init_checkpoint
        )

    @property
    def slots(self) -> tuple[str, ...]:
        """The student's training stages, in order."""
        return ("init", "distill") if self.ar_teacher is None else ("ar_teacher", "init", "distill")


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe file `path` with Hydra overrides (`key=value`, `group=option`) as a Recipe; raises UserError."""
    values, locate = compose_values(Path(path), overrides, Recipe.__dataclass_fields__)
    for key in ("run_dir", "reuse"):
        values[key] = _at_home(values.get(key))
    folder = Path(path).resolve().parent
    said, guided = spoken(overrides), values.get("trajectories")
    for slot in (word.partition("=")[0].removeprefix("method@") for word in overrides if word.startswith("method@")):
        _drop_replaced(values, slot, said, folder)
    for slot in ("ar_teacher", "init", "distill"):
        if isinstance(guided, dict) and _method_fields(values, slot, folder).get("guidance") in (Guidance, "Guidance"):
            method = values[slot]["method"]
            if isinstance(given := method.get("guidance", {}), dict):
                method["guidance"] = {**(guided.get("guidance") or {}), **given}
    return convert(Recipe, values, locate=locate, folder=folder)


def _drop_replaced(values: dict[str, Any], slot: str, said: Collection[str], folder: Path) -> None:
    """Drop what a recipe's body says of the method that the command line replaces in this slot: fields of another method that the
    new one has not. What the command line itself says of it, a key of `said`, stays, and is an error."""
    own = _method_fields(values, slot, folder)
    if not own:
        return
    others = {field.name for name in options(METHODS) for field in fields(resolve(METHODS, name))}
    for name in [*values[slot]["method"]]:
        key = f"{slot}.method.{name}"
        if name in others - set(own) and not any(word == key or word.startswith(f"{key}.") for word in said):
            del values[slot]["method"][name]


def _method_fields(values: dict[str, Any], slot: str, folder: Path) -> dict[str, Any]:
    """Field -> type of a slot's method; {} where none is named, or none is called so, which `convert` says."""
    part = values.get(slot)
    method = part.get("method") if isinstance(part, dict) else None
    name = method.get("name") if isinstance(method, dict) else None
    if not isinstance(name, str):
        return {}
    try:
        return {field.name: field.type for field in fields(resolve(METHODS, name, folder=folder))}
    except UserError:
        return {}


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, which reads back into an equal one."""
    return to_plain(recipe)


def spec_of(recipe: "Recipe") -> Spec:
    """The student's spec as the recipe says it; UserError where its parts do not fit."""
    data, student = recipe.data, recipe.student
    codec, audio, text, image = (_anywhere(part) for part in (data.codec, data.audio, data.text, data.image))
    check_image(recipe.teacher.network, image)
    network = origin = (recipe.base or recipe.teacher).network
    if student.network is not None:
        network = student.network.over(origin) if student.network.over_teacher else student.network
    if recipe.teacher.network.guidance or (recipe.base is not None and recipe.base.network.guidance):
        raise UserError(
            "teacher.network.guidance: a student alone has a guidance embedding; remove it, give student.guidance"
        )
    if student.guidance is not None:
        if student.network is not None or recipe.lora is not None:
            raise UserError(
                "student.guidance: only a whole DiT has an embedding of it; remove it, or student.network and lora"
            )
        network = network.with_guidance(len(student.guidance.names))
    for kind in (network, recipe.teacher.network):
        if kind.lead != data.lead:
            raise UserError(
                f"data.lead: got {data.lead}; {label(kind)} has a lead of {kind.lead} latent frames, set it to that"
            )
    spec = Spec(
        height=data.world.size[0],
        width=data.world.size[1],
        fps=Fraction(data.world.fps),
        chunk_frames=student.chunk_frames,
        sigmas=student_sigmas(student.num_steps, recipe.trajectories.shift, student.grid),
        horizon_frames=data.latent_frames,
        history=student.history,
        schedule=student.schedule,
        history_noise=student.history_noise,
        first_sigmas=student.first_sigmas,
        first_chunks=student.first_chunks if student.first_sigmas else 0,
        times=student.times,
        step=student.step,
        network=network,
        guidance=student.guidance,
        codec=codec,
        audio=audio,
        text=text,
        image=image,
        pose_dim=data.world.pose_dim,
        speakers=data.world.speakers,
    )
    if recipe.engine.sequence_parallel > 1:
        for kind in (network, origin, recipe.teacher.network):
            tokens = math.prod(side // kind.patch for side in spec.latent_size[1:])
            kind.check_sequence(recipe.engine.sequence_parallel, tokens)
    return spec


def _at_home(value: Any) -> Any:
    """A path, or several, with ~ written out."""
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def _anywhere(part: Any) -> Any:
    """The config with its path absolute, so that an exported student finds it from every folder; without one where the student's
    folder holds the weights."""
    path = getattr(part, "path", None)
    if path is not None and getattr(part, "takes_over", False):
        return replace(part, path=None)
    return part if path is None else replace(part, path=path.resolve())
