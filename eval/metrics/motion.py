"""How a clip moves: the gesture of its condition, energy, sharpness, and the spread over noise for one condition."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from eval.frechet import jackknife_error, with_error
from eval.metric import Clip, Column, Features, Metric, Score, stacked
from teachers.errors import UserError

SPREAD_PARTS = ("pixels", "head", "light", "gaze")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Motion(Metric):
    """Share of clips whose gesture, as a run's clip probe reads it, is that of their condition."""

    name, label, better, hint, table = "motion", "motion", "higher", "0 to 1", "Motion"
    needs, plot = ("probes", "gesture"), True

    @property
    def columns(self) -> dict[str, Column]:
        hidden = self.column("probability of the gesture", "higher", self.hint, table=None)
        return {"motion": self.column(self.label, self.better, self.hint), "motion_probability": hidden}

    def features(self, clip: Clip, real: Clip, networks) -> dict[str, Tensor]:
        return {"gesture": networks.reading(clip).gesture, "target": real.labels["gesture"]}

    def score(self, features: Sequence[Features], reference: Sequence[Features] | None) -> dict[str, Score]:
        share, error, probability = class_agreement(stacked(features, "gesture"), stacked(features, "target"))
        return {"motion": Score(share, error), "motion_probability": Score(probability)}

    def admit(self, cases) -> tuple[dict[str, float], bool]:
        """real, decoded > 0.8, and decoded > static."""
        values = {
            name: self.score(cases.features(self, name), None)["motion"].mean for name in ("real", "decoded", "static")
        }
        return values, min(values["real"], values["decoded"]) > 0.8 and values["decoded"] > values["static"]


def class_agreement(probabilities: Float[Tensor, "n k"], target: Int[Tensor, " n"]) -> tuple[float, float, float]:
    """Share of clips whose likeliest class is their target, its jackknife error, mean probability of the target."""
    hits = (probabilities.argmax(1) == target).double()
    replicates = (hits.sum() - hits) / max(len(hits) - 1, 1)
    probability = probabilities.gather(1, target[:, None]).double().mean()
    return float(hits.mean()), jackknife_error(replicates), float(probability)


def motion_energies(video: UInt8[Tensor, "n 3 t h w"]) -> Float[Tensor, " n"]:
    """Mean |x_t - x_(t-1)| of each clip, in 0..255."""
    return torch.cat([part.float().diff(dim=2).abs().mean((1, 2, 3, 4)) for part in video.split(48)]).double()


def sharpness_energies(video: UInt8[Tensor, "n 3 t h w"]) -> Float[Tensor, " n"]:
    """Mean squared Laplacian (4 x - neighbours) of each clip's frames 1.. (frame 0 is the reference), pixels in [-1, 1]."""
    kernel = torch.tensor([[0.0, -1.0, 0.0], [-1.0, 4.0, -1.0], [0.0, -1.0, 0.0]])[None, None]

    def energy(part: Tensor) -> Tensor:
        frames = part[:, :, 1:].float().div(127.5).flatten(1, 2)
        num, planes = frames.shape[:2]
        edges = F.conv2d(frames.flatten(0, 1)[:, None], kernel.to(part.device))
        return edges.square().mean((1, 2, 3)).reshape(num, planes).mean(1)

    return torch.cat([energy(part) for part in video.split(48)]).double()


def in_parts(energies, video: UInt8[Tensor, "3 t h w"], frames_at_once: int = 32) -> Float[Tensor, ""]:
    """`motion_energies` or `sharpness_energies` of one clip of any length, a few frames at a time."""
    steps, total = video.shape[1] - 1, torch.zeros((), dtype=torch.float64)
    for start in range(0, steps, frames_at_once):
        part = video[None, :, start : start + frames_at_once + 1]
        total += energies(part)[0].cpu() * (part.shape[2] - 1)
    return total / steps


def ratio_without_each(values: Float[Tensor, " n"], reference: Float[Tensor, " m"]) -> tuple[float, Tensor]:
    """mean(values) / mean(reference), and the ratios without each clip [n]; paired if the counts agree."""
    base = reference.mean()
    if float(base) <= 0:
        raise UserError(
            "a ratio needs a reference that moves: the reference clips are still or flat; check the data stage"
        )
    replicates = (values.sum() - values) / max(len(values) - 1, 1)
    paired = len(values) == len(reference)
    bases = (reference.sum() - reference) / max(len(reference) - 1, 1) if paired else base
    return float(values.mean() / base), replicates / bases


def ratio_with_error(values: Float[Tensor, " n"], reference: Float[Tensor, " m"]) -> tuple[float, float]:
    """`ratio_without_each` as a value and its jackknife error over clips."""
    return with_error(*ratio_without_each(values, reference))


@dataclasses.dataclass(frozen=True)
class Spread:
    """Variance over noises for fixed conditions, name -> [C]; and the share of frames with closed eyes."""

    variances: dict[str, Tensor]
    blink_rate: Tensor  # [C]


def spread_over_noise(videos: UInt8[Tensor, "c s 3 t h w"], labels: dict[str, Tensor]) -> Spread:
    """Unbiased variance over the S noises of each condition, averaged over pixels and frames 1..

    labels: the frame probe's readings [C, S, T] of the same videos. `head` adds head_x, head_y and tilt.
    """
    if videos.shape[1] < 2:
        raise UserError(
            f"a spread over noise needs at least 2 seeds: got {videos.shape[1]}; raise eval.diversity_seeds"
        )
    pixels = torch.stack([clips[:, :, 1:].float().div(127.5).var(0).mean() for clips in videos]).double()

    def variance(*names: str) -> Tensor:
        return torch.stack([labels[name][:, :, 1:].double().var(1).mean(1) for name in names]).sum(0)

    parts = {"pixels": pixels, "light": variance("light"), "gaze": variance("gaze")}
    parts["head"] = variance(*(name for name in ("head_x", "head_y", "tilt") if name in labels))
    return Spread(parts, (labels["blink"][:, :, 1:] > 0.5).double().mean((1, 2)))


def diversity(generated: Spread, world: Spread) -> dict[str, float]:
    """Spread over noise for one condition as a ratio to the world's own: 1 is right, 0 a regression to the mean.

    Each part is sqrt(sum_c var_generated / sum_c var_world) over conditions: `pixels`, `head_spread`, `light_spread`,
    `gaze_spread`. `diversity` is their geometric mean, so that one part that has collapsed cannot be bought back by
    another; `error` is its jackknife error over conditions. `blink_rate` is the ratio of the shares of frames with
    closed eyes.
    """

    def ratios(keep: Tensor) -> dict[str, float]:
        sums = {
            part: (float(generated.variances[part][keep].sum()), float(world.variances[part][keep].sum()))
            for part in SPREAD_PARTS
        }
        still = [part for part, (_, own) in sums.items() if own <= 0]
        if still:
            raise UserError(
                f"diversity needs a world that varies: {still[0]} has no spread; render it with other nuisance"
            )
        return {part: math.sqrt(top / own) for part, (top, own) in sums.items()}

    def overall(keep: Tensor) -> float:
        values = ratios(keep).values()
        return math.exp(sum(math.log(max(value, 1e-6)) for value in values) / len(SPREAD_PARTS))

    num = len(generated.blink_rate)
    everyone = torch.ones(num, dtype=torch.bool)
    left_out = [overall(everyone & (torch.arange(num) != index)) for index in range(num)]
    parts = ratios(everyone)
    return {
        "diversity": overall(everyone),
        "error": jackknife_error(torch.tensor(left_out)),
        "pixels": parts["pixels"],
        "head_spread": parts["head"],
        "light_spread": parts["light"],
        "gaze_spread": parts["gaze"],
        "blink_rate": float(generated.blink_rate.mean() / world.blink_rate.mean().clamp_min(1e-6)),
    }
