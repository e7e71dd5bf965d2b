"""Clips of one system x all metrics -> one dict of scores; and the admission of each metric on known cases."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from eval.extractors import Probes, Reading, blur
from eval.frechet import Moments, frechet_distance, frechet_with_error, kid_with_error
from eval.identity import identity_agreement
from eval.motion import (
    class_agreement,
    diversity,
    motion_energies,
    ratio_with_error,
    sharpness_energies,
    spread_over_noise,
)
from eval.quality import Frames, measure, seam_ratio
from eval.sync import mouth_sync
from teachers.errors import UserError

NEEDS = {  # these stand and fall with another metric
    "sync_offset_frames": "sync",
    "sync_width": "sync",
    "motion_probability": "motion",
    "expression": "motion",
}
WEIGHT_FREE = ("seam", "gap")
"""These need no probe, so nothing has to admit them."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """What every system is compared with; made once by `prepare_reference`."""

    frame_features: Tensor  # [M, T - 1, d] of the real reference clips
    clip_features: Tensor  # [M, d]
    moments: tuple[Moments, Moments]
    motion: Tensor  # [N] energies of the asked clips through the codec
    sharpness: Tensor  # [N]


@dataclasses.dataclass(frozen=True)
class Asked:
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
    asked: Asked,
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
    heard = probes.hear(asked.audio_features) if probes.knows_mouth else None
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
    reading: Reading, clips: Tensor, reference: Reference, asked: Asked, heard, portrait, max_lag: int
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
    """`eval.quality.seam_ratio` and its error; NaN for clips that stand still between their seams."""
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


@torch.inference_mode()
def known_cases(
    real: UInt8[Tensor, "n 3 t h w"], decoded: UInt8[Tensor, "n 3 t h w"], generator: torch.Generator
) -> dict[str, Tensor]:
    """Videos whose order is known; static holds the portrait, frozen holds the middle frame."""
    num, frames = real.shape[0], real.shape[2]
    flat = decoded.float().transpose(1, 2).flatten(0, 1)
    soft = blur(flat).unflatten(0, (num, frames)).transpose(1, 2)
    noise = 24 * torch.randn(decoded.shape, generator=generator)
    order = torch.rand(num, frames - 1, generator=generator).argsort(1) + 1
    order = torch.cat((torch.zeros(num, 1, dtype=torch.long), order), dim=1)
    held = torch.arange(frames).clamp_max(frames // 2)
    return {
        "real": real,
        "decoded": decoded,
        "blurred": soft.round().to(torch.uint8),
        "noisy": (decoded + noise).clamp(0, 255).round().to(torch.uint8),
        "static": decoded[:, :, :1].expand_as(decoded).contiguous(),
        "frozen": decoded[:, :, held],
        "shuffled": decoded.gather(2, order[:, None, :, None, None].expand_as(decoded)),
    }


def admit(
    probes: Probes,
    real: UInt8[Tensor, "n 3 t h w"],
    decoded: UInt8[Tensor, "n 3 t h w"],
    audio_features: Float[Tensor, "n t a"],
    gesture: Int[Tensor, " n"] | None,
    reference_real: UInt8[Tensor, "m 3 t h w"],
    generator: torch.Generator,
) -> dict[str, dict]:
    """Which metrics rank known cases right: {"admitted": {name: bool}, "cases": {name: {case: value}}}.

    fid, kid: real < decoded < blurred, static, noisy; real and decoded may tie within one jackknife error, since a good codec is
    invisible to a small extractor. fvd: the same and decoded < frozen, shuffled. sync: in sync >
    shifted by 3 frames and > swapped sound; at the best lag shifted > swapped, and the lag is found (at lag 0 a shift
    by half a syllable is below a swap: the two are anti-phase). identity: own > swapped. motion, motion_energy: real
    > static. sharpness: real > decoded > blurred. diversity needs what fid reads and is admitted with it. Only what the
    probes have learned, and was asked for, is tried.
    """
    videos = known_cases(real, decoded, generator)
    readings = {name: probes.read(clips) for name, clips in videos.items()}
    base = prepare_reference(probes, reference_real, decoded)
    fid = {name: frechet_distance(x.frame_features[:, 1:], base.frame_features) for name, x in readings.items()}
    kid = {
        name: kid_with_error(x.frame_features[:, 1::3], base.frame_features[:, ::3])[0] for name, x in readings.items()
    }
    fvd = {name: frechet_distance(x.clip_features, base.clip_features) for name, x in readings.items()}
    energy = {
        name: ratio_with_error(motion_energies(videos[name]), base.motion)[0] for name in ("real", "static", "noisy")
    }
    sharp = {name: ratio_with_error(sharpness_energies(x), base.sharpness)[0] for name, x in videos.items()}
    real_reading, portraits = readings["real"], readings["real"].identity[:, 0]
    errors = {
        "fid": frechet_with_error(real_reading.frame_features[:, 1:], base.moments[0])[1],
        "kid": kid_with_error(real_reading.frame_features[:, 1::3], base.frame_features[:, ::3])[1],
        "fvd": frechet_with_error(real_reading.clip_features, base.moments[1])[1],
    }

    def common(name: str, x: dict[str, float]) -> bool:
        at_floor = x["real"] < x["decoded"] + errors[name]
        return at_floor and max(x["real"], x["decoded"]) < min(x["blurred"], x["static"], x["noisy"])

    admitted = {
        "fid": common("fid", fid),
        "kid": common("kid", kid),
        "fvd": common("fvd", fvd) and fvd["decoded"] < min(fvd["frozen"], fvd["shuffled"]),
    }
    cases = {"fid": fid, "kid": kid, "fvd": fvd}
    if probes.knows_mouth:
        cases["sync"], admitted["sync"] = _admit_sync(readings, probes.hear(audio_features))
    if portraits.shape[1]:
        identity = cases["identity"] = {
            "real": identity_agreement(readings["real"].identity, portraits)[0],
            "decoded": identity_agreement(readings["decoded"].identity, portraits)[0],
            "swapped": identity_agreement(readings["real"].identity.roll(1, 0), portraits)[0],
        }
        admitted["identity"] = min(identity["real"], identity["decoded"]) > 0.5 > identity["swapped"]
    if gesture is not None:
        known = ("real", "decoded", "static")
        motion = cases["motion"] = {name: class_agreement(readings[name].gesture, gesture)[0] for name in known}
        admitted["motion"] = min(motion["real"], motion["decoded"]) > 0.8 and motion["decoded"] > motion["static"]
    admitted |= {
        "motion_energy": energy["static"] < 0.1 < energy["real"] < energy["noisy"],
        "sharpness": sharp["noisy"] > sharp["real"] > sharp["decoded"] > sharp["blurred"],
    }
    if gesture is not None:
        admitted["diversity"] = admitted["fid"]
    return {"admitted": admitted, "cases": {**cases, "motion_energy": energy, "sharpness": sharp}}


def _admit_sync(readings: Mapping[str, Reading], heard: Tensor) -> tuple[dict[str, float], bool]:
    """The cases of sync, and whether it ranks them right."""
    mouth = readings["real"].mouth
    late = torch.cat((mouth[:, :1].expand(-1, 3, -1), mouth[:, :-3]), dim=1)
    shifted = mouth_sync(late[:, 3:], heard[:, 3:])
    swapped = mouth_sync(mouth, heard.roll(1, 0))
    sync = {
        "real": mouth_sync(mouth, heard)["sync"],
        "decoded": mouth_sync(readings["decoded"].mouth, heard)["sync"],
        "shifted": shifted["sync"],
        "swapped": swapped["sync"],
        "shifted_at_offset": shifted["sync_at_offset"],
        "swapped_at_offset": swapped["sync_at_offset"],
        "shifted_offset": shifted["sync_offset_frames"],
    }
    return sync, (
        min(sync["real"], sync["decoded"]) > max(0.5, sync["shifted"], sync["swapped"])
        and sync["shifted_at_offset"] > sync["swapped_at_offset"] + 0.2
        and sync["shifted_offset"] == 3
    )


def is_admitted(name: str, admitted: Mapping[str, bool]) -> bool:
    """Whether `name` may be shown as a score: itself, or the metric it stands on, passed; unknown names may not."""
    return name in WEIGHT_FREE or bool(admitted.get(NEEDS.get(name, name), False))
