"""Classifier-free guidance as a value: which conditions a network is asked under, and how its answers become one.

A guidance has `branches(conditions)`, the full conditions first, and `combine(outputs)`, in the same order. `guided` runs them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from teachers.conditions import Conditions
from teachers.errors import UserError

Denoise = Callable[[Tensor, Tensor, Conditions], Tensor]
"""x [B, ..], sigma [B, ..] and the conditions of B rows -> x0 [B, ..]."""
Scales = float | Mapping[str, float]
"""Guidance scales that a stream asks for: by their names, or one number for all."""


class AnyGuidance(Protocol):
    """What samplers and methods need of a guidance. `batched`: its branches run as one batch."""

    @property
    def batched(self) -> bool: ...
    @property
    def passes(self) -> int: ...
    def branches(self, conditions: Conditions) -> tuple[Conditions, ...]: ...
    def combine(self, outputs: Sequence[Tensor]) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance per modality (Ho & Salimans 2207.12598), in effective scales; 1 is off.

        nothing + s_first (middle - nothing) + s_second (full - middle)

    `nothing` has neither text nor audio, `middle` the `first` of them alone: with text first u + text (t - u) + audio (full - t);
    with audio first (InfiniteTalk, MultiTalk, LongCat, StableAvatar) u + audio (a - u) + text (full - a). Equal scales need no
    middle, a first scale of 1 no `nothing` (with text 1 OmniAvatar's code ignores the audio scale; ours does not). `batched`: all
    branches as one batch, which takes the memory of as many.
    """

    text: float = 1.0
    audio: float = 1.0
    first: Literal["text", "audio"] = "text"
    batched: bool = False

    @property
    def _scales(self) -> tuple[float, float]:
        """Of the first and of the second modality."""
        return (self.text, self.audio) if self.first == "text" else (self.audio, self.text)

    @property
    def passes(self) -> int:
        """Network evaluations for one guided prediction."""
        return 1 + len(self._dropped)

    @property
    def _dropped(self) -> tuple[tuple[str, ...], ...]:
        """What each branch but the full one goes without."""
        first, second = self._scales
        nothing, middle = ("text", "audio"), ("audio" if self.first == "text" else "text",)
        if first == second:
            return () if first == 1.0 else (nothing,)
        return (middle,) if first == 1.0 else (nothing, middle)

    def branches(self, conditions: Conditions) -> tuple[Conditions, ...]:
        """The conditions of each network evaluation: full, then nothing and middle where the scales need them."""
        return (conditions, *(conditions.drop(*names) for names in self._dropped))

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        """The guided prediction of the branches' predictions, in the order of `branches`."""
        first, second = self._scales
        full, *others = outputs
        if len(others) != len(self._dropped):
            raise ValueError(f"guidance: got {len(outputs)} outputs of {self.passes} branches")
        if not others:
            return full
        if first == second:
            return others[0] + first * (full - others[0])
        if first == 1.0:
            return others[0] + second * (full - others[0])
        nothing, middle = others
        return nothing + first * (middle - nothing) + second * (full - middle)


@dataclass(frozen=True)
class EmbeddedGuidance:
    """Guidance with each row's own scales [B, M], those of `EmbeddedScales`: one column is text and audio alike, two are text and
    audio, combined as in `Guidance` with its `first`. It is what a student learns to predict in one evaluation, conditioned on the
    scales (stage 1 of Meng et al. 2210.03142, there one scale)."""

    scales: Tensor
    first: Literal["text", "audio"] = "text"
    batched: bool = False

    @property
    def passes(self) -> int:
        """Network evaluations for one guided prediction."""
        return 1 + self.scales.shape[1]

    def branches(self, conditions: Conditions) -> tuple[Conditions, ...]:
        """The full conditions, those without text and audio and, with a scale each, those with the first of them alone."""
        nothing, middle = conditions.drop("text", "audio"), conditions.drop("audio" if self.first == "text" else "text")
        return (conditions, nothing, middle)[: self.passes]

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        """The guided prediction [B, ..] of the branches' predictions, in the order of `branches`."""
        full, nothing, *middle = outputs
        columns = [scale.view(-1, *[1] * (full.ndim - 1)).to(full) for scale in self.scales.unbind(1)]
        if not middle:
            return nothing + columns[0] * (full - nothing)
        first, second = columns if self.first == "text" else columns[::-1]
        return nothing + first * (middle[0] - nothing) + second * (full - middle[0])


@dataclass(frozen=True)
class SharedGuidance:
    """A guidance of which each of `passes` ranks, the process `group`, computes one branch: the prediction of one rank, in the time
    of one branch. Every rank of the group asks for the same predictions."""

    guidance: AnyGuidance
    rank: int
    group: Any

    batched = False

    @property
    def passes(self) -> int:
        """Network evaluations for one guided prediction, of all ranks."""
        return self.guidance.passes

    def branches(self, conditions: Conditions) -> tuple[Conditions, ...]:
        """The conditions of this rank's branch alone."""
        return (self.guidance.branches(conditions)[self.rank],)

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        """The guided prediction, of this rank's output and of those that the others send."""
        (own,) = outputs
        found = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(self.passes)]
        dist.all_gather(found, own.contiguous(), group=self.group)
        return self.guidance.combine(found)


def runs(guidance: AnyGuidance, conditions: Conditions) -> tuple[tuple[Conditions, ...], int]:
    """The conditions that a network is run under, and how many branches each run holds side by side in its batch: every branch in
    a run of its own, or all in one."""
    branches = guidance.branches(conditions)
    if guidance.batched and len(branches) > 1:
        return (Conditions.join_rows(branches),), len(branches)
    return branches, 1


def repeat_rows(x: Tensor, copies: int) -> Tensor:
    """x [B, ..] for every branch of a run, [copies B, ..]."""
    return x if copies == 1 else x.repeat(copies, *[1] * (x.ndim - 1))


def split_rows(outputs: Sequence[Tensor], copies: int) -> list[Tensor]:
    """The branches' outputs [B, ..] of the runs' outputs [copies B, ..]."""
    return [part for output in outputs for part in output.chunk(copies)] if copies > 1 else list(outputs)


def branch_outputs(
    denoise: Denoise, x: Tensor, sigma: Tensor, conditions: Conditions, guidance: AnyGuidance
) -> list[Tensor]:
    """What a network predicts in each branch of the guidance, x0 [B, ..] each, the full conditions' first."""
    given, copies = runs(guidance, conditions)
    return split_rows([denoise(repeat_rows(x, copies), repeat_rows(sigma, copies), c) for c in given], copies)


def guided(denoise: Denoise, x: Tensor, sigma: Tensor, conditions: Conditions, guidance: AnyGuidance) -> Tensor:
    """The guided prediction x0 [B, ..] at x [B, ..] and sigma [B, ..]."""
    return guidance.combine(branch_outputs(denoise, x, sigma, conditions, guidance))


@dataclass(frozen=True, kw_only=True)
class GuidanceRange:
    """Effective guidance scales (1 is off) that a student is conditioned on: trained from `least` to `most`, `served` where a
    stream asks for none."""

    least: float = 1.0
    most: float = 2.0
    served: float = 1.25

    def __post_init__(self):
        if not 0.0 <= self.least <= self.served <= self.most or self.least == self.most:
            raise ValueError(
                f"got least={self.least}, served={self.served}, most={self.most}; "
                "need 0 <= least <= served <= most and least < most"
            )


@dataclass(frozen=True, kw_only=True)
class EmbeddedScales:
    """The guidance scales that a student is conditioned on by an embedding, so that a guided prediction takes one evaluation: one
    for text and audio alike (`both`), or one for each, combined as in `Guidance` with its `first`.

    Stage 1 of Meng et al. 2210.03142, FlowAct-R1's CFG embedding layer (2601.10103), both with one scale, which is ours minus 1.
    """

    both: GuidanceRange | None = None
    text: GuidanceRange | None = None
    audio: GuidanceRange | None = None
    first: Literal["text", "audio"] = "text"

    def __post_init__(self):
        if self.names not in (("both",), ("text", "audio")):
            raise UserError(
                f"student.guidance: got {', '.join(self.names) or 'no range'}; give both, or text and audio, each with least, most "
                "and served"
            )
        if self.first != "text" and self.names == ("both",):
            raise UserError(f"student.guidance.first: got {self.first}; one scale for both has no order, remove it")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the scales, in the order of the columns of `Conditions.guidance` [B, M]."""
        return tuple(name for name in ("both", "text", "audio") if getattr(self, name) is not None)

    @property
    def ranges(self) -> dict[str, GuidanceRange]:
        """Of each scale."""
        return {name: getattr(self, name) for name in self.names}

    @property
    def served(self) -> dict[str, float]:
        """What a stream has that asks for none."""
        return {name: own.served for name, own in self.ranges.items()}

    def draw(self, num: int, rng: torch.Generator) -> Tensor:
        """Scales [num, M], each uniform in its range."""
        least, most = (torch.tensor([getattr(own, end) for own in self.ranges.values()]) for end in ("least", "most"))
        return least + (most - least) * torch.rand(num, len(least), generator=rng)

    def of(self, guidance: Tensor, batched: bool = False) -> EmbeddedGuidance:
        """A teacher's guidance with these scales [B, M]."""
        return EmbeddedGuidance(guidance, self.first, batched)

    def check(self, given: Scales) -> dict[str, float]:
        """Every scale by its name: those that are given, a number for all of them, the others as served; UserError for one that is
        unknown or was not trained."""
        own = given if isinstance(given, Mapping) else dict.fromkeys(self.names, given)
        for name, scale in own.items():
            if name not in self.names:
                raise UserError(f"guidance: got {name}; this student's scales: {', '.join(self.names)}")
            least, most = self.ranges[name].least, self.ranges[name].most
            if isinstance(scale, bool) or not isinstance(scale, Real) or not least <= scale <= most:
                what = "guidance" if name == "both" else f"guidance of {name}"
                raise UserError(f"{what}: got {scale}; this student was trained from {least} to {most}")
        return {name: float(own.get(name, served)) for name, served in self.served.items()}
