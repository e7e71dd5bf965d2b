"""The networks that metrics ask for, each loaded when it is first used, and what they have read of a clip already."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from eval.embedded.extractors import Probes, Reading
from eval.metric import Clip
from eval.networks.dino import Dino
from eval.networks.i3d import I3D
from eval.networks.inception import Inception, Variant
from eval.networks.lpips import Lpips
from eval.networks.syncnet import SyncNet
from teachers.encoders.small import SAMPLE_RATE, AudioConfig, LogMel
from teachers.errors import UserError

Value = TypeVar("Value")


class Networks:
    """Published networks and a run's probes; raises UserError as `eval.networks.weights.locate` does.

    probes: the extractors of a run, or their folder; batch_size: frames that a network sees at once
    """

    def __init__(self, probes: Probes | Path | None = None, device: str = "cpu", batch_size: int = 32):
        self._probes, self.device, self.batch_size = probes, device, batch_size
        self._memo: WeakKeyDictionary[Clip, dict[Any, Any]] = WeakKeyDictionary()

    @cached_property
    def inception(self) -> Inception:
        return Inception.load(device=self.device)

    @cached_property
    def i3d(self) -> I3D:
        return I3D.load(device=self.device)

    @cached_property
    def syncnet(self) -> SyncNet:
        return SyncNet.load(device=self.device)

    @cached_property
    def dinov2(self) -> Dino:
        return Dino.load(device=self.device)

    @cached_property
    def alexnet(self) -> Lpips:
        """LPIPS on AlexNet."""
        return Lpips.load(device=self.device)

    @cached_property
    def probes(self) -> Probes:
        if self._probes is None:
            raise UserError(
                "the embedded protocol needs the extractors of a run: give --extractors RUN/stages/extractors"
            )
        probes = Probes.load(self._probes) if isinstance(self._probes, Path) else self._probes
        return probes.to(self.device)

    @property
    def offers(self) -> set[str]:
        """What metrics may need of probes."""
        if self._probes is None:
            return set()
        known = {"mouth": self.probes.knows_mouth, "identity": self.probes.frame.sizes[2] > 0}
        return {"probes"} | {name for name, has in known.items() if has}

    def once(self, clip: Clip, key: Any, make: Callable[[], Value]) -> Value:
        """What `make` gives for this clip, made once while the clip is in memory: metrics share what they read."""
        memo = self._memo.setdefault(clip, {})
        if key not in memo:
            memo[key] = make()
        return memo[key]

    def frames(self, clip: Clip, extractor: str, resize: str, every: int) -> Tensor:
        """Features [R, D] of each `every`-th frame after the given ones: Inception's, or the probes'."""
        if extractor == "probes":
            return self.reading(clip).frame_features[clip.given :: every]
        shown = clip.video[:, clip.given :: every].transpose(0, 1)
        key = ("inception", resize, every)
        return self.once(clip, key, lambda: self.inception.features(shown, self.batch_size, cast(Variant, resize)))

    def reading(self, clip: Clip) -> Reading:
        """What the probes read of one clip, without a clip axis."""
        return self.once(clip, "reading", lambda: self.probes.read(clip.video[None]).clip(0))

    def portrait(self, real: Clip) -> Tensor:
        """Identity [I] of the real clip's first frame."""

        def read() -> Tensor:
            return self.probes.read(real.video[None, :, :1].expand(-1, -1, 2, -1, -1)).identity[0, 0]

        return self.once(real, "portrait", read)

    def mouth_from_audio(self, clip: Clip) -> Tensor:
        """The mouth [T, 2] (open, width) that the clip's sound asks for. UserError without a sound, and for another rate
        than the run's."""
        return self.once(
            clip, "mouth from audio", lambda: self.probes.mouth_from_audio(self._audio_features(clip)[None])[0]
        )

    def _audio_features(self, clip: Clip) -> Tensor:
        if clip.audio_features is not None:
            return clip.audio_features
        sound = clip.voice()
        samples = SAMPLE_RATE / clip.fps
        wrong = f"{clip.fps} frames a second are not what the probes were trained on; use clips of the run's rate"
        if samples.denominator != 1 or samples.numerator % 4:
            raise UserError(wrong)
        frames = clip.video.shape[1]
        rows = LogMel(AudioConfig(hop=samples.numerator // 4), samples.numerator)(sound[None], 0, frames)[0]
        if rows.shape[-1] != len(self.probes.scales["audio_mean"]):
            raise UserError(wrong)
        return rows

    def read_all(self, clips: Sequence[Clip], video: Tensor) -> None:
        """Read clips, whose videos are `video` uint8 [N, 3, T, H, W], a batch at a time."""
        reading = self.probes.read(video)
        for index, clip in enumerate(clips):
            self._memo.setdefault(clip, {})["reading"] = reading.clip(index)

    def read_conditions(self, real: Sequence[Clip]) -> None:
        """Portraits and sounds of real clips, all at once."""
        stills = torch.stack([clip.video[:, :1].expand(-1, 2, -1, -1) for clip in real])
        portraits = self.probes.read(stills).identity[:, 0]
        known = self.probes.knows_mouth
        mouths = self.probes.mouth_from_audio(torch.stack([self._audio_features(c) for c in real])) if known else None
        for index, clip in enumerate(real):
            self._memo.setdefault(clip, {})["portrait"] = portraits[index]
            if mouths is not None:
                self._memo[clip]["mouth from audio"] = mouths[index]
