"""Which metrics of the embedded extractors are admitted: those that rank known cases right."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from eval.embedded.benchmark import prepare_reference
from eval.embedded.extractors import Probes, Reading, blur
from eval.metrics.frechet import frechet_distance, frechet_with_error, kid_with_error
from eval.metrics.identity import identity_agreement
from eval.metrics.motion import class_agreement, motion_energies, ratio_with_error, sharpness_energies
from eval.metrics.sync import mouth_sync

NEEDS = {  # these stand and fall with another metric
    "sync_offset_frames": "sync",
    "sync_width": "sync",
    "motion_probability": "motion",
    "expression": "motion",
}


WEIGHT_FREE = ("seam", "gap")
"""These need no probe, so nothing has to admit them."""


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
        cases["sync"], admitted["sync"] = _admit_sync(readings, probes.mouth_from_audio(audio_features))
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
