"""Bounds on how a student looks and moves, beside its teacher: config of the health checks (`pipeline.evaluation.health`)."""

from dataclasses import dataclass

from teachers.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on a student's health metrics. `black`, `frozen`, `clipped`: shares above the teacher's own, at most. The others
    are multiples of the teacher's number: (least, most), `seam` at most, `noise`, `audio` and `text` at least. `change`: how far
    saturation and sharpness may change from the first chunk to the last, beyond no change and beyond the teacher's own, as a share
    of the teacher's number; `motion_change` the same of motion energy."""

    black: float
    frozen: float
    clipped: float
    saturation: tuple[float, float]
    motion_energy: tuple[float, float]
    seam: float
    noise: float
    audio: float
    text: float
    sharpness: tuple[float, float] = (0.5, 2.0)
    change: float = 0.25
    motion_change: float = 0.35


READY = Limits(
    black=0.05,
    frozen=0.25,
    clipped=0.1,
    saturation=(0.5, 2.0),
    motion_energy=(0.5, 2.0),
    seam=2.0,
    noise=0.3,
    audio=0.4,
    text=0.2,
)
HEALTHY = Limits(
    black=0.02,
    frozen=0.1,
    clipped=0.02,
    saturation=(0.8, 1.25),
    motion_energy=(0.85, 1.2),
    seam=1.5,
    noise=0.5,
    audio=0.8,
    text=0.8,
    sharpness=(0.85, 1.2),
    change=0.2,
    motion_change=0.4,
)
COLLAPSE = Limits(
    black=0.25,
    frozen=0.5,
    clipped=0.3,
    saturation=(0.25, 4.0),
    motion_energy=(0.25, 4.0),
    seam=8.0,
    noise=0.05,
    audio=0.15,
    text=0.0,
    sharpness=(0.25, 4.0),
    change=2.0,
    motion_change=4.0,
)


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """`ready` is the quality gate after `init` and `healthy` that of a distilled student, both reported; a student beyond
    `collapse` ends `distill` at a validation, unless stop is false. No number here is an input of training: all may change from one
    start of a run to the next. A check generates 4 num_conditions clips, of the teacher once a run."""

    num_conditions: int = 8
    stop: bool = True
    ready: Limits = READY
    healthy: Limits = HEALTHY
    collapse: Limits = COLLAPSE

    def __post_init__(self) -> None:
        if self.num_conditions < 2:
            raise UserError(f"health.num_conditions is too small: got {self.num_conditions}; use at least 2")
