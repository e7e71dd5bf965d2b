"""Sets of real clips that a stage compares with: made in pieces, shared out over the ranks, one file a piece.

A piece is drawn, encoded, decoded and shrunk by one rank and lies in the stage's folder until the stage is done, so a killed stage
goes on where it was, and no process holds a set at its full size. Clips are scored at no more than SCORED_SIDE pixels a side.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from distill.data.source import Clips, ClipSource
from distill.data.stored import Stored, opener
from distill.pipeline.artifacts import Artifacts
from distill.recipe import Recipe
from eval.cards import load_card
from eval.embedded.evaluation import clips_of
from eval.metric import Clip
from students.spec import Spec
from teachers.conditions import Conditions
from teachers.encoders.small import AudioConfig, LogMel
from teachers.errors import UserError
from teachers.files import load_tensors, read_facts, save_tensors
from teachers.machine import clips_at_once

TOKENS_AT_ONCE = 2**15
"""Tokens of the clips that are generated at once: one clip of 81 frames at 512x512."""
SCORED_SIDE, SCORED_MULTIPLE = 128, 16
VALIDATED = ("fid", "fvd", "sync", "motion_energy", "sharpness")
"""Metrics by which the best student of a training is chosen (`distill.pipeline.evaluation.validation`)."""


def generated_at_once(recipe: Recipe, spec: Spec) -> int:
    """Clips that a network generates at once: `eval.batch_size`, or fewer large ones."""
    tokens = spec.horizon_frames * math.prod(spec.token_grid)
    return min(recipe.eval.batch_size, max(1, TOKENS_AT_ONCE // max(1, tokens)))


def scored(video: Tensor) -> Tensor:
    """Clips uint8 [N, 3, T, H, W] at the size that metrics see: the longer side SCORED_SIDE, means over areas; smaller ones as they
    are."""
    size = scored_size(*video.shape[-2:])
    if size == tuple(video.shape[-2:]):
        return video
    return torch.stack([at_size(clip.float(), size).round().to(torch.uint8) for clip in video])


def scored_size(height: int, width: int) -> tuple[int, int]:
    """Height and width at which metrics see clips of this size."""
    if max(height, width) <= SCORED_SIDE:
        return height, width
    scale = SCORED_SIDE / max(height, width) / SCORED_MULTIPLE
    return max(1, round(height * scale)) * SCORED_MULTIPLE, max(1, round(width * scale)) * SCORED_MULTIPLE


def at_size(clip: Tensor, size: Sequence[int]) -> Tensor:
    """A clip of floats [3, T, H, W] at another size, means over areas; itself where it has that size."""
    if tuple(clip.shape[-2:]) == tuple(size):
        return clip
    return F.adaptive_avg_pool2d(clip.transpose(0, 1), tuple(size)).transpose(0, 1)


class StoredConditions:
    """Conditions on the disk, of which `index` reads rows on to `device`; for what generates clips as good as `Conditions`."""

    def __init__(
        self, features: Mapping[str, Stored], shared: Mapping[str, Tensor], rows: Tensor, device: torch.device
    ):
        self.features, self.shared, self.rows, self.device = features, shared, rows, device

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    def index(self, rows: slice | Tensor) -> Conditions:
        """The conditions of these rows."""
        chosen = self.rows[rows]
        stored = {name: value[chosen] for name, value in self.features.items()}
        shared = {name: value.expand(len(chosen), *value.shape[1:]) for name, value in self.shared.items()}
        return Conditions(stored | shared).to(self.device)

    def select(self, rows: Tensor) -> "StoredConditions":
        """These rows, in this order."""
        return StoredConditions(self.features, self.shared, self.rows[rows], self.device)


@dataclass(frozen=True)
class ClipSet:
    """Real clips as rank 0 holds them: `clips` at the scored size, the same through the codec (the ceiling) where they were
    decoded, and `samples`, the first few at their own size. Other ranks have the texts and, as all have, the conditions."""

    clips: Clips
    decoded: Tensor
    samples: Tensor
    conditions: StoredConditions

    def __len__(self) -> int:
        return len(self.clips.text)


def draw(
    artifacts: Artifacts,
    folder: Path,
    name: str,
    num: int,
    *,
    seed: int | None = None,
    motion: int = 0,
    encode: bool = True,
    samples: int = 0,
) -> ClipSet:
    """`num` clips (or as many as there are) of the set `name`, the same for every training seed: `seed` (`eval.condition_seed`) and
    `name` decide. Without `encode` there are no conditions and no ceiling. Every rank calls it."""
    engine, source, world = artifacts.engine, artifacts.source, artifacts.recipe.data.world
    seed = artifacts.recipe.eval.condition_seed if seed is None else seed
    num, size = source.available(seed, name, num), clips_at_once(world.num_frames, *world.size)
    starts = range(0, num, size)
    where = _folder(folder) / f"{name.replace(' ', '-')}-{motion}"
    files = [where / f"{start:06d}.safetensors" for start in starts]
    where.mkdir(parents=True, exist_ok=True)
    for i in engine.missing(files, apart=True):
        rows = range(starts[i], min(starts[i] + size, num))
        clips = source.draw(seed, name, num, motion, rows=rows)
        _write(artifacts, files[i], clips, encode, max(0, samples - rows.start))
    source.forget()
    engine.barrier()
    return _load(artifacts, files)


def reserve(recipe: Recipe, source: ClipSource) -> None:
    """See that the sets of clips that are compared are large enough for every metric of the recipe's card that these clips can
    have. UserError where fewer are asked for, or there are fewer."""
    card = load_card(recipe.eval.protocol)
    needs = {key: metric.least for key, metric in card.metrics.items() if key not in source.left_out}
    if not needs.keys() & set(VALIDATED):
        raise UserError(
            f"eval.protocol: {card.name} has nothing that these clips can be validated by; add one of {', '.join(VALIDATED)}"
        )
    least = max(needs.values())
    why = ", ".join(key for key, count in needs.items() if count == least)
    for name in ("num_conditions", "num_reference", "admit_clips"):
        if (asked := getattr(recipe.eval, name)) < least:
            raise UserError(f"eval.{name} is too small: got {asked}; {why} of {card.name} need {least} clips")
    source.reserve(least, why)


def _folder(folder: Path) -> Path:
    return folder / "clip_sets"


def _write(artifacts: Artifacts, file: Path, clips: Clips, encode: bool, samples: int) -> None:
    parts = {"video": scored(clips.video), "samples": clips.video[:samples].clone(), "audio": clips.audio}
    parts |= {f"label/{name}": value for name, value in clips.labels.items()}
    if encode:
        x0, conditions = artifacts.encoders.of_clips(clips)
        parts["decoded"] = scored(artifacts.encoders.decode(x0, conditions.lead))
        kept = {name: value for name, value in conditions.features.items() if name != "negative"}
        parts |= {f"condition/{name}": value for name, value in kept.items()}
    save_tensors(file, parts, {"text": json.dumps(clips.text)})


def _load(artifacts: Artifacts, files: list[Path]) -> ClipSet:
    engine = artifacts.engine
    parts = [load_tensors(file) for file in files] if engine.is_main else []  # others read the rows that they generate
    texts = [json.loads(read_facts(file)["text"]) for file in files]
    with safe_open(files[0], framework="pt") as first:
        keys = list(first.keys())
    text, lengths, opened = [one for own in texts for one in own], list(map(len, texts)), opener()

    def joined(name: str) -> Tensor:
        found = [part[name] for part in parts if name in part]
        return torch.cat(found) if found else torch.empty(0)

    labels = {key.removeprefix("label/"): joined(key) for key in keys if key.startswith("label/")}
    clips = Clips(video=joined("video"), audio=joined("audio"), text=text, labels=labels)
    names = [key for key in keys if key.startswith("condition/")]
    features = {key.removeprefix("condition/"): Stored(files, lengths, key, opened) for key in names}
    negative = artifacts.encoders.negatives(1) if names else None
    conditions = StoredConditions(
        features, {} if negative is None else {"negative": negative}, torch.arange(len(text)), engine.device
    )
    return ClipSet(clips, joined("decoded"), joined("samples"), conditions)


def log_mel(artifacts: Artifacts, clips: Clips) -> Tensor:
    """Log-mel features for the sync metric: rows [N, T, A], whatever the student's audio encoder is."""
    samples = artifacts.spec.samples_per_frame
    return LogMel(AudioConfig(hop=samples // 4), samples)(clips.voice, 0, clips.video.shape[2])


def as_metrics_take(artifacts: Artifacts, clips: Clips) -> list[Clip]:
    """Real clips with what metrics need of their conditions."""
    return clips_of(
        clips.video,
        artifacts.spec.fps,
        load_card(artifacts.recipe.eval.protocol),
        labels={name: values for name, values in clips.labels.items() if values.ndim == 1},
        audio_features=log_mel(artifacts, clips),
    )
