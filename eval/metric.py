"""What a metric is: one class in one file under `eval/metrics/`, or in a file of the user's that a protocol card names.

    @dataclass(frozen=True, kw_only=True)
    class Brightness(Metric):
        name, label, better = "brightness", "brightness", None

        def features(self, clip, real, networks):
            return {"luma": clip.video.float().mean()}

        def score(self, features, reference):
            return {"brightness": Score.over([clip["luma"] for clip in features])}

Its fields are its config: a card gives their values and hashes them. `features` is of one clip and is kept on disk; `score` is of a
set of clips. Tables, hints, refusals, reports and comparisons are made of what the class states.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from eval.frechet import mean_with_error, with_error
from teachers.errors import UserError
from teachers.resolve import missing

Better = Literal["lower", "higher"] | float | None
Features = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
    """One clip as the card wants it: video uint8 [3, T, H, W], its rate, mono sound [S] at 16 kHz (None without a track).

    box: a face's [4] left, top, right, bottom in pixels, None where none was found; has_box: whether a face was looked for
    no_sound: why there is no sound, where the file's is broken; track: which of a file's several it is, such as "2 of 3"
    given: leading frames that are the reference; seams: frames that begin a chunk, where the maker states them
    labels: the targets of its condition, name -> number; condition: clips of one condition differ in their noise
    audio_features: rows [T, A] as the probes take them, where they are known already (else they are made of the sound)
    beside: other videos of its condition, as a run has them: "teacher", "teacher_same_noise"
    """

    video: Tensor
    fps: Fraction
    sound: Tensor | None = None
    no_sound: str = ""
    track: str = ""
    box: Tensor | None = None
    has_box: bool = False
    given: int = 0
    seams: tuple[int, ...] = ()
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    condition: int = 0
    audio_features: Tensor | None = None
    beside: Mapping[str, Tensor] = field(default_factory=dict)

    def voice(self) -> Tensor:
        """Its sound [S]; UserError where it has none."""
        if self.sound is None:
            raise UserError(self.no_sound or "no sound: sync needs a track in the video or NAME.wav beside it")
        return self.sound

    def window(self, seconds: Fraction) -> int:
        """Frames of the windows over which a drift is a slope; 0 for a clip of fewer than two."""
        length = round(seconds * self.fps)
        return length if 2 <= length <= (self.video.shape[1] - 1) // 2 else 0


class Score(NamedTuple):
    """A score with its standard error over clips (NaN: none).

    clips: a value for each clip, in their order, where the score is their mean; compare resamples them
    seeds: values whose half range is the spread, where they are not those of the noise seeds; parts: what it is made of
    left: the score without each clip, in their order, where its error is their jackknife's: two systems' differ by clip
    """

    mean: float
    error: float = math.nan
    clips: Sequence[float] | None = None
    seeds: Sequence[float] | None = None
    parts: Mapping[str, float] | None = None
    left: Sequence[float] | None = None

    @classmethod
    def without_each(cls, value: float, left: Tensor) -> "Score":
        """A value with the jackknife error of those without each clip [N]."""
        return cls(*with_error(value, left), left=left.tolist())

    @classmethod
    def over(cls, values: Sequence[float | Tensor]) -> "Score":
        """Mean over clips and its jackknife error."""
        numbers = [float(value) for value in values]
        if any(math.isnan(number) for number in numbers):
            raise UserError("a clip's value is not a number; look at the clips")
        rows = torch.tensor(numbers, dtype=torch.float64)
        left = ((rows.sum() - rows) / max(len(rows) - 1, 1)).tolist()
        return cls(*mean_with_error(rows), clips=numbers, left=left)


@dataclass(frozen=True)
class Column:
    """How a score is shown.

    better: which way, or the value that is right; table: the title it stands under (None: not shown); plot: in the run's overview
    stands_on: the metric that must have ranked known cases right (None: it needs no admission)
    """

    label: str
    better: Better = None
    hint: str = ""
    table: str | None = "Fidelity and agreement"
    without_network: bool = False
    plot: bool = False
    stands_on: str | None = None

    @property
    def words(self) -> str:
        """The hint under a column's name."""
        if self.hint or self.better is None:
            return self.hint
        return f"{self.better} is better" if isinstance(self.better, str) else f"{self.better:g} is right"

    def plain(self) -> dict[str, Any]:
        """For reports, so that they can be shown without the metric."""
        return dict(vars(self))

    def admitted(self, admitted: Mapping[str, bool]) -> bool:
        """Whether it may be shown as a score, given which metrics ranked known cases right."""
        return self.stands_on is None or bool(admitted.get(self.stands_on, False))


class Metric:
    """Base of every metric; a subclass is a frozen, keyword-only dataclass whose fields are its config.

    needs: a tuple (or a property that gives one) of published networks by their names in `eval.networks.weights`; "probes";
    "mouth", "identity" of probes that know them;
    "sound", "box"; labels and videos that only a run has ("gesture", "expression", "noises", "teacher")
    paired: compares a clip with its own real one, so that the ground truth has no score
    against: what `reference` of `score` is (or a property that says so): other "real" clips, or the "ceiling" (the same clips after
    the codec; in `distill eval` both are the real clips), or nothing
    over: "clips", one a condition, or "noises", several a condition
    admitted_with: the metric with whose admission on known cases it stands and falls, where it has no `admit` of its own
    least: clips below which a set has no score, or none with an error
    with_gradient: the columns that `differentiable` gives, of a metric without `against` that is not `paired`
    """

    name: ClassVar[str]
    label: ClassVar[str] = ""
    better: ClassVar[Better] = None
    hint: ClassVar[str] = ""
    table: ClassVar[str | None] = "Fidelity and agreement"
    plot: ClassVar[bool] = False
    paired: ClassVar[bool] = False
    needs: ClassVar[Any] = ()
    against: ClassVar[Any] = None
    over: ClassVar[Literal["clips", "noises"]] = "clips"
    admitted_with: ClassVar[str | None] = None
    least: ClassVar[int] = 1
    with_gradient: ClassVar[tuple[str, ...]] = ()

    @property
    def columns(self) -> dict[str, Column]:
        """Every name that `score` may return, and how it is shown."""
        return {self.name: self.column(self.label or self.name, self.better, self.hint)}

    def column(self, label: str, better: Better = None, hint: str = "", **other: Any) -> Column:
        """A column of this metric's table."""
        stands_on = self.admitted_with or (self.name if self.admit else None)
        shown = {
            "table": self.table,
            "plot": self.plot,
            "without_network": not self.needs,
            "stands_on": stands_on,
            **other,
        }
        return Column(label, better, hint, **shown)

    @missing
    def features(self, clip: Clip, real: Clip, networks: Any) -> dict[str, Tensor]:
        """What is kept of one clip; `real` is its real clip (itself for the ground truth), `networks` an
        `eval.networks.loaded.Networks`.

        Depends on nothing else, so it may be stored. Raises UserError for a clip that has none.
        """
        raise NotImplementedError

    @missing
    def score(
        self, features: Sequence[Features], reference: Sequence[Features] | None
    ) -> Mapping[str, Score | tuple[float, float]]:
        """Scores of a set of clips; `reference` as `against` states, None for the ground truth itself. UserError for too few."""
        raise NotImplementedError

    def of_clip(self, features: Features, real: Features | None) -> dict[str, float]:
        """What one clip is worth by itself, as a reward takes it: by default its scores as a set of one; `real`: features of its
        real clip, where the metric is `against` one. A metric of whole sets gives what stands for a clip."""
        found = self.score([features], None if real is None else [real])
        return {name: float(score[0]) for name, score in found.items()}

    def differentiable(self, video: Tensor, clip: Clip, networks: Any) -> Mapping[str, Tensor]:
        """`of_clip` with a gradient, for `distill.methods.dmd_reward_gradient`: the scores `with_gradient` of one clip, scalars
        that depend on `video`, fp32 [3, T, H, W] in [-1, 1]; `clip.video` is that one rounded. Called without autocast or TF32."""
        raise NotImplementedError

    def floor(self, real: Sequence[Features], splits: int) -> tuple[dict[str, tuple[float, float]], int] | None:
        """(mean, spread) between random halves of the real clips, and the clips in a half; None without a floor."""
        return None

    def difference(
        self, ours: Sequence[Features], others: Sequence[Features], real: Sequence[Features]
    ) -> tuple[float, float] | None:
        """Score of one system less another's on the same clips, with its error, where it is no mean over clips."""
        return None

    def notes(self, clips: Sequence[str], truth: Mapping[str, Score]) -> list[str]:
        """Lines that must stand beside the numbers; clips: their names, truth: the ground truth's scores."""
        return []

    admit: ClassVar[Any] = None
    """`admit(cases) -> (values by case, whether they are ranked right)` of a metric that stands on probes
    (`eval.embedded.admission.Cases`)."""


def stacked(features: Sequence[Features], name: str) -> Tensor:
    """The features of that name, [N, ...]."""
    return torch.stack([clip[name] for clip in features])
