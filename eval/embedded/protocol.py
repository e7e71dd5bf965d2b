"""Protocol cards: every knob that makes two numbers comparable, with one hash over all of them."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from fractions import Fraction

from teachers.errors import UserError

EMBEDDED_NOTE = "embedded extractors; not comparable with published FID/FVD"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How systems are judged. Counts are clips unless the name says otherwise.

    `num_conditions` fresh held-out conditions are generated `num_seeds` times and compared with `num_reference` other real
    clips. Diversity draws `diversity_seeds` noises for each of `diversity_conditions`.
    """

    num_conditions: int = 144
    num_seeds: int = 3
    num_reference: int = 288
    condition_seed: int = 555
    diversity_conditions: int = 12
    diversity_seeds: int = 8
    batch_size: int = 48
    probe_steps: int = 500
    probe_batch: int = 96
    probe_lr: float = 5e-3
    probe_seed: int = 7
    admit_clips: int = 144
    max_lag: int = 4
    latency_warmup: int = 2
    latency_runs: int = 25
    sheet_conditions: int = 4
    sheet_frames: int = 8
    num_samples: int = 4

    def __post_init__(self) -> None:
        least = {
            "num_conditions": 8,
            "num_reference": 8,
            "diversity_conditions": 2,
            "diversity_seeds": 2,
            "admit_clips": 8,
        }
        may_be_zero = {"condition_seed", "probe_seed", "max_lag", "latency_warmup", "num_samples"}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            floor = least.get(field.name, 0 if field.name in may_be_zero or field.type is float else 1)
            if value < floor:
                raise UserError(f"eval.{field.name} is too small: got {value}; use at least {floor}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """What a clip is: T pixel frames of height x width at fps, with audio at sample_rate Hz."""

    frames: int
    height: int
    width: int
    fps: Fraction
    sample_rate: int = 16000


def protocol_card(
    config: EvalConfig,
    geometry: Geometry,
    extractor_sha256: str,
    admitted: Mapping[str, bool],
    seeds: Mapping[str, int],
) -> dict:
    """The card of a run for `report.json["protocol"]`: all knobs, and `sha256` over the ones that decide comparability.

    Two numbers may be compared only if their cards have the same `sha256`. Knobs of cost and display (batch size,
    latency runs, sheets) are listed but not hashed.
    """
    knobs = dataclasses.asdict(config)
    display = {
        name: knobs.pop(name)
        for name in (
            *("batch_size", "latency_warmup", "latency_runs"),
            *("sheet_conditions", "sheet_frames", "num_samples"),
        )
    }
    hashed = {
        "name": "embedded",
        "extractors": {"sha256": extractor_sha256, "admitted": dict(sorted(admitted.items()))},
        "estimators": {
            "fid": "Frechet distance of frame features, all frames but the given first one pooled, covariance over N-1",
            "fvd": "Frechet distance of clip features, one row a clip, covariance over N-1",
            "kid": "unbiased MMD^2 of frame features, kernel (x.y/d + 1)^3, pairs of one clip left out",
            "error": "jackknife standard error over generated clips",
        },
        "knobs": knobs,
        "geometry": {
            "frames": geometry.frames,
            "height": geometry.height,
            "width": geometry.width,
            "fps": str(geometry.fps),
            "sample_rate": geometry.sample_rate,
        },
        "seeds": dict(sorted(seeds.items())),
    }
    return {**hashed, "display": display, "note": EMBEDDED_NOTE, "sha256": canonical_sha256(hashed)}


def canonical_sha256(value: object) -> str:
    """sha256 of the canonical JSON text of `value` (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_comparable(card: Mapping, other: Mapping) -> None:
    """Raise UserError naming the first differing knob if two protocol cards do not describe the same measurement."""
    if card.get("sha256") == other.get("sha256"):
        return
    flat, other_flat = _flatten(card), _flatten(other)
    for key in sorted(flat.keys() | other_flat.keys()):
        if key.split(".")[0] in ("display", "note", "sha256"):
            continue
        if flat.get(key) != other_flat.get(key):
            raise UserError(
                f"scores of different protocols cannot be compared: {key} is {flat.get(key)} here and "
                f"{other_flat.get(key)} there; evaluate both with one recipe"
            )


def _flatten(value: Mapping, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat.update(_flatten(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = item
    return flat
