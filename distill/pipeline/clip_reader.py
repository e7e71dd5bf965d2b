"""Frames and scores of rollouts while a student trains: what a method whose `needs` say `decodes` is given as `clip_reader`."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from distill.methods import Batch
from distill.methods.rewards import Reward, check_number
from distill.pipeline.artifacts import Artifacts
from distill.pipeline.evaluation.clip_sets import at_size, scored, scored_size
from eval.metric import Clip
from eval.networks.loaded import Networks
from eval.networks.weights import REGISTRY, locate, true_fp32
from eval.scores import clip_features, lacking
from teachers.codecs.linear import to_uint8
from teachers.codecs.streamed import pull_back
from teachers.conditions import Conditions
from teachers.encoders.small import AudioConfig
from teachers.errors import UserError
from teachers.machine import clips_at_once
from teachers.registry import Codec, CodecKind
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
        self.decoder: Codec = self.codec.codec
        self.box: Tensor | None = None
        self.reasons: dict[str, str] = {}
        self.lost: set[tuple[str, int]] = set()  # (reward, clip) without a value when they were last read

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

    def differentiate_through(self, decoder: CodecKind | None) -> None:
        """Gradients go through this codec, None: the run's. UserError where its latents have another geometry."""
        if decoder is None:
            return
        spec, own = self.artifacts.spec, self.codec.codec.config
        codec = decoder.load(Path(), spec.height, spec.width)
        expected, found = ((kind.stride, kind.patch, kind.channels) for kind in (own, codec.config))
        if expected != found:
            raise UserError(
                f"method.decoder: (stride, patch, channels) is {found}, the run's codec has {expected}; take one of the same "
                "latents"
            )
        self.decoder = codec.to(self.engine.device).eval().requires_grad_(False)

    @torch.no_grad()
    def read(self, rewards: Mapping[str, Reward], x0: Tensor, conditions: Conditions, batch: Batch) -> Tensor:
        """The rewards [K, B] of clips x0 [B, C, F, h, w], NaN for a clip that has none of that kind."""
        with torch.autocast(self.engine.device.type, enabled=False):
            values = self._values(rewards, x0, conditions, batch)
        names = list(rewards)
        self.lost = {(names[k], i) for k, i in values.isfinite().logical_not().nonzero().tolist()}
        return values.to(self.engine.device)

    def _values(self, rewards: Mapping[str, Reward], x0: Tensor, conditions: Conditions, batch: Batch) -> Tensor:
        own = self._clips(rewards, x0, conditions, batch)
        compares = any(reward.compares for reward in rewards.values())
        assert not compares or batch.x0 is not None
        real = self._clips(rewards, batch.x0, conditions, batch) if compares and batch.x0 is not None else own
        values = torch.full((len(rewards), len(x0)), torch.nan, dtype=torch.float64)
        for k, (name, reward) in enumerate(rewards.items()):
            full = bool(FULL_SIZE & set(reward.metric.needs))
            for i, (mine, data) in enumerate(zip(own[full], real[full], strict=True)):
                values[k, i] = self._value(name, reward, mine, data)
        return values

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
        video = self.codec.decode(x0.float(), conditions.lead)
        small, given = scored(video), replace(batch, conditions=conditions)
        found = {False: self._made(small, given)}
        if any("probes" in reward.metric.needs for reward in rewards.values()):
            self.networks.read_all(found[False], small)
        whole = any(FULL_SIZE & set(reward.metric.needs) for reward in rewards.values())
        return found | {True: self._made(video, given) if whole else found[False]}

    def _made(self, video: Tensor, batch: Batch, first: int = 0) -> list[Clip]:
        """Clips whose video is this one, of the rows of a batch from `first` on."""
        rows = None
        if batch.sound is None and self.audio_is_log_mel:
            stride = self.artifacts.spec.codec.stride
            rows = batch.conditions.features["audio"].flatten(1, 2)[:, stride - 1 :].float().cpu()
        sound = None if batch.sound is None else batch.sound.cpu()
        made = Clip(video=video[0], fps=self.artifacts.spec.fps, given=1, box=self.box, has_box=self.box is not None)
        return [
            replace(
                made,
                video=clip,
                sound=None if sound is None else sound[i],
                audio_features=None if rows is None else rows[i],
            )
            for i, clip in enumerate(video, start=first)
        ]

    def gradient(
        self, rewards: Mapping[str, tuple[Reward, float]], x0: Tensor, conditions: Conditions, batch: Batch
    ) -> Tensor:
        """d / d x0 of the sum over rewards of each clip's value times the reward's factor, like x0 [B, C, F, h, w], fp32; 0 for a
        clip for which `read`, which comes before, has found no value. Decoded with a graph, one latent frame at a time of one clip,
        on a CPU of a few. UserError for a clip with a value and no gradient."""
        if not rewards:
            return torch.zeros_like(x0, dtype=torch.float32)
        spec, codec, found = self.artifacts.spec, self.decoder, []
        frames, device = 1 + codec.config.stride * (spec.horizon_frames - 1), self.engine.device.type
        at_once = clips_at_once(frames, spec.height, spec.width, device) if device == "cpu" else 1
        for rows in torch.arange(len(x0)).split(at_once):
            given = conditions.index(rows)
            part = Batch(given, sound=None if batch.sound is None else batch.sound[rows])
            latents = x0[rows].float()
            if given.lead is not None:
                latents = torch.cat([given.lead.to(latents), latents], dim=2)
            with torch.autocast(device, enabled=False):
                uphill = partial(self._uphill, rewards, part, int(rows[0]))
                slopes = pull_back(codec.decode_chunk, latents, uphill, 1)
            found.append(slopes[:, :, latents.shape[2] - x0.shape[2] :])
        return torch.cat(found)

    def _uphill(self, rewards: Mapping[str, tuple[Reward, float]], batch: Batch, first: int, video: Tensor) -> Tensor:
        """The same by the pixels of clips [B, 3, T, H, W] in [-1, 1], which are numbers `first` and following."""
        sizes = {False: scored_size(*video.shape[-2:]), True: video.shape[-2:]}
        found = torch.zeros_like(video)
        for i, clip in enumerate(video):
            with torch.enable_grad(), true_fp32():
                leaf = clip.detach().requires_grad_()
                shown = {full: at_size(leaf, size) for full, size in sizes.items()}
                clips = {full: self._made(to_uint8(x.detach())[None], batch, i)[0] for full, x in shown.items()}
                total = leaf.new_zeros((), dtype=torch.float64)
                for name, (reward, factor) in rewards.items():
                    if (name, first + i) in self.lost:
                        continue
                    full = bool(FULL_SIZE & set(reward.metric.needs))
                    with in_users_file(reward.metric):
                        value = reward.value(reward.metric.differentiable(shown[full], clips[full], self.networks))
                    total = total + factor * value
                if total.requires_grad:
                    (found[i],) = torch.autograd.grad(total, leaf)
        return found

    def of_all(self, own: Tensor) -> Tensor:
        """The values [K, B] of every share of the batch, side by side [K, N]; of ranks that share sequences those of the first."""
        if self.engine.world_size == 1:
            return own
        parts = [torch.empty_like(own) for _ in range(self.engine.world_size)]
        dist.all_gather(parts, own)
        return torch.cat(parts[:: self.engine.world_size // self.engine.data_ranks], dim=1)
