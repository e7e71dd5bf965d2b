"""The embedded evaluation's config, and the card of a run: the shipped one with everything on which a run's numbers depend."""

import dataclasses
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

from eval.cards import Card, load_card
from teachers.config import to_plain
from teachers.errors import UserError

COUNTS = ("num_conditions", "num_seeds", "num_reference", "diversity_conditions", "diversity_seeds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How systems are evaluated: `protocol` is a card, shipped or a file. Counts are clips unless the name states otherwise.

    `num_conditions` fresh held-out conditions are generated `num_seeds` times and compared with `num_reference` other real
    clips; the metrics of the card decide how many are enough (`Metric.least`). Diversity takes `diversity_seeds` noises for each of
    `diversity_conditions`. `probes`: a folder of extractors that were trained before, so that numbers of several runs compare;
    without it they are trained in `probe_steps` on at most `probe_clips` training clips.
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
    probe_clips: int = 2048
    probe_lr: float = 5e-3
    probe_seed: int = 7
    admit_clips: int = 144
    latency_warmup: int = 2
    latency_runs: int = 25
    sheet_conditions: int = 4
    sheet_frames: int = 8
    num_samples: int = 4
    protocol: str = "embedded"
    probes: Path | None = None

    def __post_init__(self) -> None:
        least: dict[str, int] = dict.fromkeys(("diversity_conditions", "diversity_seeds"), 2)
        least |= dict.fromkeys(("condition_seed", "probe_seed", "probe_lr", "latency_warmup", "num_samples"), 0)
        for name, value in vars(self).items():
            if name not in ("protocol", "probes") and value < least.get(name, 1):
                raise UserError(f"eval.{name} is too small: got {value}; use at least {least.get(name, 1)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """What a clip is: T pixel frames of height x width at fps, with audio at sample_rate Hz."""

    frames: int
    height: int
    width: int
    fps: Fraction
    sample_rate: int = 16000


def run_card(
    config: EvalConfig,
    geometry: Geometry,
    probes_sha256: str,
    admitted: Mapping[str, bool],
    seeds: Mapping[str, int],
) -> Card:
    """The card of a run: that of `config.protocol`, with the run's probes, which metrics they admit, counts, seeds and geometry."""
    plain = dataclasses.asdict(config)
    run = {
        "admitted": dict(sorted(admitted.items())),
        "counts": {name: plain[name] for name in COUNTS},
        "probes": {name: value for name, value in plain.items() if name.startswith("probe_") or name == "admit_clips"},
        "geometry": to_plain(geometry),
        "seeds": dict(sorted(seeds.items())),
    }
    return load_card(config.protocol).resolved(probes_sha256, run)
