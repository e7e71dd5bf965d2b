"""Clips of one system x all metrics -> one dict of scores; and the admission of each metric on known cases."""

import dataclasses
from collections.abc import Sequence

from jaxtyping import UInt8
from torch import Tensor

from eval.embedded.extractors import Probes, Reading
from eval.metrics.frechet import Moments, frechet_with_error, kid_with_error
from eval.metrics.identity import identity_agreement
from eval.metrics.motion import (
    class_agreement,
    diversity,
    motion_energies,
    ratio_with_error,
    sharpness_energies,
    spread_over_noise,
)
from eval.metrics.quality import Frames, measure, seam_ratio
from eval.metrics.sync import mouth_sync
from teachers.errors import UserError


@dataclasses.dataclass(frozen=True)
class Reference:
    """What every system is compared with; made once by `prepare_reference`."""

    frame_features: Tensor  # [M, T - 1, d] of the real reference clips
    clip_features: Tensor  # [M, d]
    moments: tuple[Moments, Moments]
    motion: Tensor  # [N] energies of the asked clips through the codec
    sharpness: Tensor  # [N]


@dataclasses.dataclass(frozen=True)
class TargetLabels:
    """What the N conditions asked for; None where nobody did."""

    audio_features: Tensor  # [N, T, A]
    gesture: Tensor | None  # [N] long
    expression: Tensor | None  # [N] long
    portrait: Tensor  # [N, 3, H, W] uint8: the given reference frame


def prepare_reference(
    probes: Probes, reference_real: UInt8[Tensor, "m 3 t h w"], codec_ceiling: UInt8[Tensor, "n 3 t h w"]
) -> Reference:
    """Features of real reference clips (FID, FVD, KID) and energies of the asked clips after the codec (ratios)."""
    reading = probes.read(reference_real)
    frames, clips = reading.frame_features[:, 1:], reading.clip_features
    moments = (Moments.of(frames), Moments.of(clips))
    return Reference(frames, clips, moments, motion_energies(codec_ceiling), sharpness_energies(codec_ceiling))


def evaluate_videos(
    probes: Probes,
    videos: UInt8[Tensor, "s n 3 t h w"],
    reference: Reference,
    asked: TargetLabels,
    spread_videos: UInt8[Tensor, "c k 3 t h w"] | None = None,
    world_videos: UInt8[Tensor, "c j 3 t h w"] | None = None,
    max_lag: int = 4,
    seams: Sequence[int] = (),
) -> dict[str, dict]:
    """Scores of one system on N conditions, S noise seeds each: name -> {mean, spread, error, seeds}.

    `spread` is half the range over seeds, `error` the mean jackknife error over clips of one seed. With
    `spread_videos` (K noises of each of C conditions) and the world's own `world_videos`, `diversity` is added with
    its `parts`; with `seams`, the pixel frames that begin a chunk, `seam`. Names: design section 6, and
    `motion_probability`, `expression`, `sync_width`. What the probes have not learned, or nobody asked for, has no score.
    Raises UserError on counts that do not agree.
    """
    if videos.ndim != 6 or videos.shape[1] != len(asked.portrait):
        raise UserError(
            f"scores need [seeds, conditions, ...]: got {tuple(videos.shape)} for {len(asked.portrait)} conditions"
        )
    heard = probes.mouth_from_audio(asked.audio_features) if probes.knows_mouth else None
    still = asked.portrait[:, :, None].expand(-1, -1, 2, -1, -1)
    portrait = probes.read(still).identity[:, 0]
    runs = [_one_seed(probes.read(clips), clips, reference, asked, heard, portrait, max_lag) for clips in videos]
    if seams:
        for run, clips in zip(runs, videos, strict=True):
            run["seam"] = seam_jump(measure(clips), seams)
    scores = {name: _summary([run[name] for run in runs]) for name in runs[0]}
    if spread_videos is not None and world_videos is not None:
        scores["diversity"] = _diversity(probes, spread_videos, world_videos)
    return scores


def _one_seed(
    reading: Reading, clips: Tensor, reference: Reference, asked: TargetLabels, heard, portrait, max_lag: int
) -> dict:
    frames = reading.frame_features[:, 1:]
    found = {
        "fid": frechet_with_error(frames, reference.moments[0]),
        "fvd": frechet_with_error(reading.clip_features, reference.moments[1]),
        "kid": kid_with_error(frames[:, ::3], reference.frame_features[:, ::3]),
    }
    if heard is not None:
        sync = mouth_sync(reading.mouth, heard, max_lag)
        found["sync"] = (sync["sync"], sync["error"])
        found["sync_offset_frames"] = (sync["sync_offset_frames"], float("nan"))
        found["sync_width"] = (sync["sync_width"], float("nan"))
    if portrait.shape[1]:
        found["identity"] = identity_agreement(reading.identity, portrait)
    if asked.gesture is not None:
        motion, motion_error, probability = class_agreement(reading.gesture, asked.gesture)
        found["motion"] = (motion, motion_error)
        found["motion_probability"] = (probability, float("nan"))
    if asked.expression is not None:
        late = reading.expression[:, reading.expression.shape[1] // 3 :].mean(1)
        found["expression"] = class_agreement(late, asked.expression)[:2]
    found["motion_energy"] = ratio_with_error(motion_energies(clips), reference.motion)
    found["sharpness"] = ratio_with_error(sharpness_energies(clips), reference.sharpness)
    return found


def seam_jump(frames: Frames, first_frames: Sequence[int]) -> tuple[float, float]:
    """`eval.metrics.quality.seam_ratio` and its error; NaN for clips that stand still between their seams."""
    inside = [step for step in range(frames.change.shape[1]) if step + 1 not in first_frames]
    if not frames.change[:, inside].any():
        return float("nan"), float("nan")
    return seam_ratio(frames, first_frames)


def _summary(values: list[tuple[float, float]]) -> dict:
    seeds = [value for value, _ in values]
    errors = [error for _, error in values if error == error]
    return {
        "mean": sum(seeds) / len(seeds),
        "spread": (max(seeds) - min(seeds)) / 2,
        "error": sum(errors) / len(errors) if errors else None,
        "seeds": seeds,
    }


def _diversity(probes: Probes, generated: Tensor, world: Tensor) -> dict:
    """Diversity over all noises, with the half range between the first and the second half of the noises as spread."""
    if len(generated) != len(world):
        raise UserError(
            f"diversity needs the same conditions: got {len(generated)} and {len(world)}; render both alike"
        )
    labels = [_read_labels(probes, videos) for videos in (generated, world)]
    own = spread_over_noise(world, labels[1])
    value = diversity(spread_over_noise(generated, labels[0]), own)
    halves = [value["diversity"]]
    if generated.shape[1] >= 4:
        middle = generated.shape[1] // 2
        rows = (slice(0, middle), slice(middle, None))
        halves = [
            diversity(spread_over_noise(generated[:, row], {k: x[:, row] for k, x in labels[0].items()}), own)[
                "diversity"
            ]
            for row in rows
        ]
    parts = {name: x for name, x in value.items() if name not in ("diversity", "error")}
    spread = (max(halves) - min(halves)) / 2
    return {"mean": value["diversity"], "spread": spread, "error": value["error"], "seeds": halves, "parts": parts}


def _read_labels(probes: Probes, videos: Tensor) -> dict[str, Tensor]:
    reading = probes.read(videos.flatten(0, 1))
    return {name: x.unflatten(0, videos.shape[:2]) for name, x in reading.labels.items()}
