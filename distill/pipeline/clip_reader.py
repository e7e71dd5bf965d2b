"""Frames and scores of rollouts while a student trains: what a method whose `needs` say `decodes` is given as `clip_reader`."""

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from distill.methods import Batch
from distill.methods.rewards import Reward, check_number
from distill.pipeline.artifacts import Artifacts
from distill.pipeline.evaluation.clip_sets import scored
from eval.metric import Clip
from eval.networks.loaded import Networks
from eval.networks.weights import REGISTRY, locate
from eval.scores import clip_features, lacking
from teachers.conditions import Conditions
from teachers.encoders.small import AudioConfig
from teachers.errors import UserError
from teachers.resolve import in_users_file

HINTS = {
    "sound": "set data.keep_sound=true",
    "box": "give method.face: left, top, right, bottom as shares of the frame",
    "mouth": "these clips have no mouth labels to train extractors on; take lip_sync with SyncNet's weights",
}
FULL_SIZE = {"box", *REGISTRY}
"""Metrics with one of these needs see clips as they are; the others at the size at which a run is scored."""


class ClipReader:
    """Decodes this rank's clips, of which an update has `batch_size`, a few at a time, without a gradient and outside of autocast,
    and scores each by itself."""

    def __init__(self, artifacts: Artifacts, batch_size: int):
        self.artifacts, self.engine, self.num = artifacts, artifacts.engine, batch_size * artifacts.engine.data_ranks
        self.rank, self.codec = artifacts.engine.data_rank, artifacts.encoders
        self.networks = Networks(artifacts.probes, device=str(artifacts.engine.device))
        data, spec = artifacts.recipe.data, artifacts.spec
        log_mel = AudioConfig(hop=spec.samples_per_frame // 4)
        self.audio_is_log_mel = data.audio == log_mel and spec.speakers == 1
        self.box: Tensor | None = None
        self.reasons: dict[str, str] = {}

    def check(self, rewards: Mapping[str, Reward], face: tuple[float, ...] | None) -> None:
        """UserError where the clips of training are too few, or do not bring what a reward needs, or its weights are not there."""
        size, kept = (self.artifacts.spec.width, self.artifacts.spec.height), self.artifacts.recipe.data.keep_sound
        self.box = None if face is None else torch.tensor(face) * torch.tensor(size * 2)
        for name, reward in rewards.items():
            metric = reward.metric
            check_number(name, reward, self.num)
            has_sound = kept or (self.audio_is_log_mel and "probes" in metric.needs)  # who take rows as they are
            offers = (
                self.networks.offers | ({"sound"} if has_sound else set()) | ({"box"} if face is not None else set())
            )
            if missing := lacking(metric, offers):
                hint = next((HINTS[need] for need in missing if need in HINTS), "take another metric")
                raise UserError(f"rewards.{name}: {metric.name} needs {' and '.join(missing)}; {hint}")
            for need in metric.needs:
                if need in REGISTRY:
                    locate(need)

    @torch.no_grad()
    def read(self, rewards: Mapping[str, Reward], x0: Tensor, conditions: Conditions, batch: Batch) -> Tensor:
        """The rewards [K, B] of clips x0 [B, C, F, h, w], NaN for a clip that has none of that kind."""
        own = self._clips(rewards, x0, conditions, batch)
        compares = any(reward.compares for reward in rewards.values())
        assert not compares or batch.x0 is not None
        real = self._clips(rewards, batch.x0, conditions, batch) if compares and batch.x0 is not None else own
        values = torch.full((len(rewards), len(x0)), torch.nan, dtype=torch.float64)
        for k, (name, reward) in enumerate(rewards.items()):
            full = bool(FULL_SIZE & set(reward.metric.needs))
            for i, (mine, data) in enumerate(zip(own[full], real[full], strict=True)):
                values[k, i] = self._value(name, reward, mine, data)
        return values.to(self.engine.device)

    def _value(self, name: str, reward: Reward, own: Clip, real: Clip) -> float:
        try:
            features = clip_features(reward.metric, own, real, self.networks)
            data = clip_features(reward.metric, real, real, self.networks) if reward.metric.against else None
            with in_users_file(reward.metric):
                return reward.value(reward.metric.of_clip(features, data))
        except UserError as error:
            self.reasons[name] = str(error)
            return float("nan")

    def _clips(
        self, rewards: Mapping[str, Reward], x0: Tensor, conditions: Conditions, batch: Batch
    ) -> dict[bool, list[Clip]]:
        """The clips by whether they are at their full size."""
        with torch.autocast(self.engine.device.type, enabled=False):
            video = self.codec.decode(x0.float(), conditions.lead)
        small = scored(video)
        found = {False: self._made(small, conditions, batch)}
        if any("probes" in reward.metric.needs for reward in rewards.values()):
            self.networks.read_all(found[False], small)
        whole = any(FULL_SIZE & set(reward.metric.needs) for reward in rewards.values())
        return found | {True: self._made(video, conditions, batch) if whole else found[False]}

    def _made(self, video: Tensor, conditions: Conditions, batch: Batch) -> list[Clip]:
        rows = None
        if batch.sound is None and self.audio_is_log_mel:
            stride = self.artifacts.spec.codec.stride
            rows = conditions.features["audio"].flatten(1, 2)[:, stride - 1 :].float().cpu()
        sound = None if batch.sound is None else batch.sound.cpu()
        made = Clip(video=video[0], fps=self.artifacts.spec.fps, given=1, box=self.box, has_box=self.box is not None)
        return [
            replace(
                made,
                video=clip,
                sound=None if sound is None else sound[i],
                audio_features=None if rows is None else rows[i],
            )
            for i, clip in enumerate(video)
        ]

    def of_all(self, own: Tensor) -> Tensor:
        """The values [K, B] of every share of the batch, side by side [K, N]; of ranks that share sequences those of the first."""
        if self.engine.world_size == 1:
            return own
        parts = [torch.empty_like(own) for _ in range(self.engine.world_size)]
        dist.all_gather(parts, own)
        return torch.cat(parts[:: self.engine.world_size // self.engine.data_ranks], dim=1)
