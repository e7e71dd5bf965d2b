"""Systems of a run on held-out conditions -> scores under the run's card."""

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from jaxtyping import UInt8
from torch import Tensor

from eval.cards import Card
from eval.embedded.extractors import Probes
from eval.metric import Clip, Features, Metric, Score
from eval.networks.loaded import Networks
from eval.scores import clip_features, lacking, refusals, set_scores
from teachers.errors import UserError


def clips_of(
    video: UInt8[Tensor, "n 3 t h w"],
    fps: Fraction,
    card: Card,
    *,
    labels: Mapping[str, Tensor] | None = None,
    audio_features: Tensor | None = None,
    sound: Tensor | None = None,
    beside: Mapping[str, Tensor] | None = None,
    seams: Sequence[int] = (),
    noises: int = 1,
) -> list[Clip]:
    """Clips as metrics take them. labels: [N] each; audio_features [N, T, A], sound [N, S]; beside: videos [N, ...] of the same
    conditions; noises: so many clips in a row have one condition."""
    return [
        Clip(
            video=one,
            fps=fps,
            given=card.clips.given,
            seams=tuple(seams),
            labels={name: values[index] for name, values in (labels or {}).items()},
            audio_features=None if audio_features is None else audio_features[index],
            sound=None if sound is None else sound[index],
            beside={name: videos[index] for name, videos in (beside or {}).items()},
            condition=index // noises,
        )
        for index, one in enumerate(video)
    ]


class Evaluation:
    """What every system of a run is compared with, and its scores.

    real: the held-out clips, N conditions; ceiling: the same through the codec, uint8 [N, 3, T, H, W]; reference: other real clips
    [M, ...]; seams: pixel frames that begin a chunk; world: real clips of several noises a condition, through the codec [C, K, ...]
    """

    def __init__(
        self,
        card: Card,
        probes: Probes,
        real: Sequence[Clip],
        ceiling: UInt8[Tensor, "n 3 t h w"],
        reference: UInt8[Tensor, "m 3 t h w"],
        seams: Sequence[int] = (),
        world: UInt8[Tensor, "c k 3 t h w"] | None = None,
    ):
        self.card, self.real, self.seams, self.world = card, list(real), seams, world
        self.networks = Networks(probes, device=str(probes.device))
        self.networks.read_conditions(self.real)
        self.sets = {"ceiling": ceiling, "real": reference} | ({} if world is None else {"noises": world})
        first = self.real[0]
        self.offers = self.networks.offers | set(first.labels)
        self.offers |= {"sound"} if first.sound is not None or first.audio_features is not None else set()
        known = self.offers | {"noises", "teacher", "teacher_same_noise"}
        keys = [key for key, metric in card.metrics.items() if not lacking(metric, known)]
        self.left_out = refusals(card, keys, known)
        self._references: dict[str, list[Features]] = {}

    def score(
        self,
        videos: UInt8[Tensor, "s n 3 t h w"],
        noises: UInt8[Tensor, "c k 3 t h w"] | None = None,
        beside: Mapping[str, Tensor] | None = None,
        only: Iterable[str] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Scores of one system, S noise seeds of each condition: name -> {mean, spread, error, seeds}.

        `spread` is half the range over seeds, `error` the mean jackknife error over clips of one seed. noises: K clips of each of C
        conditions; beside: other systems' videos [N, ...] on the conditions and noises of the first seed; only: these
        metrics of the card. A metric that lacks what it needs has no score. Raises UserError on counts that do not agree.
        """
        return {name: summary(found) for name, found in self.scores(videos, noises, beside, only).items()}

    def scores(
        self,
        videos: UInt8[Tensor, "s n 3 t h w"],
        noises: UInt8[Tensor, "c k 3 t h w"] | None = None,
        beside: Mapping[str, Tensor] | None = None,
        only: Iterable[str] | None = None,
    ) -> dict[str, list[Score]]:
        """`score` before the noise seeds are summed up: name -> a score a seed."""
        if videos.ndim != 6 or videos.shape[1] != len(self.real):
            raise UserError(
                f"scores need [seeds, conditions, ...]: got {tuple(videos.shape)} for {len(self.real)} conditions"
            )
        several = None if noises is None or "noises" not in self.sets else self._noises(noises)
        scores: dict[str, list[Score]] = {}
        for seed, video in enumerate(videos):
            others = (beside or {}) if seed == 0 else {}
            clips = self.read(video, beside=others, seams=self.seams)
            for key, metric in self.card.metrics.items():
                offers = self.offers | set(others) | ({"noises"} if several and seed == 0 else set())
                if key in self.left_out or (only is not None and key not in only) or lacking(metric, offers):
                    continue
                if metric.over == "noises":
                    features = self.features(metric, several or [], several or [])
                else:
                    features = self.features(metric, clips, self.real)
                for name, score in set_scores(metric, features, self.reference(key, metric)).items():
                    scores.setdefault(name, []).append(score)
        return scores

    def read(self, video: Tensor, **facts: Any) -> list[Clip]:
        """Clips as metrics take them, read by the probes; `facts` as in `clips_of`."""
        clips = clips_of(video, self.real[0].fps, self.card, **facts)
        self.networks.read_all(clips, video)
        return clips

    def _noises(self, video: Tensor) -> list[Clip]:
        own = self.sets["noises"]
        if len(video) != len(own):
            raise UserError(f"noises need the same conditions: got {len(video)} and {len(own)}; render both alike")
        return self.read(video.flatten(0, 1), noises=video.shape[1])

    def features(self, metric: Metric, clips: Sequence[Clip], real: Sequence[Clip]) -> list[Features]:
        """Features of clips; `real`: the real clip of each."""
        return [clip_features(metric, clip, own, self.networks) for clip, own in zip(clips, real, strict=True)]

    def reference(self, key: str, metric: Metric) -> list[Features] | None:
        """Features of what the metric is against, made once."""
        if metric.against is None:
            return None
        if key not in self._references:
            if metric.over == "noises":
                clips = self._noises(self.sets["noises"])
            else:
                clips = self.read(self.sets[metric.against])
            real = self.real if metric.over == "clips" and metric.against == "ceiling" else clips
            self._references[key] = self.features(metric, clips, real)
        return self._references[key]


def summary(found: Sequence[Score]) -> dict[str, Any]:
    """Scores of the noise seeds as one."""
    if found[0].seeds is not None:
        one, seeds = found[0], list(found[0].seeds)
        mean, errors = one.mean, [one.error]
    else:
        seeds, errors = [score.mean for score in found], [score.error for score in found]
        mean = sum(seeds) / len(seeds)
    errors = [error for error in errors if error == error]
    return {
        "mean": mean,
        "spread": (max(seeds) - min(seeds)) / 2,
        "error": sum(errors) / len(errors) if errors else None,
        "seeds": seeds,
        **({} if found[0].parts is None else {"parts": dict(found[0].parts)}),
    }
