"""What a network is told besides the noise level: text, audio and the reference image; and the one guidance rule."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from teachers.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Features on the latent clock.

    text [B, L, D] token features, zero where padded; audio [B, F, stride, A], one group of pixel-frame rows per latent frame, of
    two speakers side by side in a row, the avatar's own first;
    reference [B, C, 1, H, W], the latent of the reference image, frame 0 of the clip (None: plain text-to-video, no frame is
    known); pose [B, F, stride, P] where the network takes one. A dropped modality is all zeros; but where `negative` [B, L, D]
    is given it takes the text's place (Wan's negative prompt). `clip_audio`, as audio, is what bidirectional networks hear in its
    place where their ears need the whole clip. `guidance` [B]: the scale that a network with an embedding of it is told.
    """

    text: Tensor
    audio: Tensor
    reference: Tensor | None = None
    pose: Tensor | None = None
    negative: Tensor | None = None
    clip_audio: Tensor | None = None
    guidance: Tensor | None = None

    @property
    def known(self) -> tuple[int, ...]:
        """The latent frames of the clip that are given, not drawn."""
        return () if self.reference is None else (0,)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Conditions":
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: change(value) for name, value in given.items() if value is not None})

    def drop(self, *names: str) -> "Conditions":
        """The same conditions without these modalities (the unconditional branch of guidance)."""
        empty = {name: torch.zeros_like(getattr(self, name)) for name in names}
        if "audio" in empty and self.clip_audio is not None:
            empty["clip_audio"] = torch.zeros_like(self.clip_audio)
        if "text" in empty and self.negative is not None:
            empty["text"] = self.negative
        return replace(self, **empty)

    def drop_rows(self, **rows: Tensor) -> "Conditions":
        """Drop a modality for the batch rows where the given bool mask [B] is set."""
        out = {}
        if "audio" in rows and self.clip_audio is not None:
            rows = {**rows, "clip_audio": rows["audio"]}
        for name, mask in rows.items():
            value = getattr(self, name)
            out[name] = value * (~mask).view(-1, *[1] * (value.ndim - 1)).to(value)
        return replace(self, **out)

    def frames(self, start: int, stop: int) -> "Conditions":
        """The conditions of latent frames start..stop-1."""
        pose = None if self.pose is None else self.pose[:, start:stop]
        clip_audio = None if self.clip_audio is None else self.clip_audio[:, start:stop]
        return replace(self, audio=self.audio[:, start:stop], pose=pose, clip_audio=clip_audio)

    def index(self, rows) -> "Conditions":
        """Select batch rows."""
        return self._map(lambda value: value[rows])

    def to(self, *args, **kwargs) -> "Conditions":
        return self._map(lambda value: value.to(*args, **kwargs))

    @property
    def num_frames(self) -> int:
        return self.audio.shape[1]


def pack_rows(features: Tensor, stride: int) -> Tensor:
    """Pixel-frame rows [B, T, A] -> [B, F, stride, A]; row 0 is repeated in front so that latent i covers
    pixel frames stride*i-(stride-1) .. stride*i (OmniAvatar's first-frame rule). T = 1 + stride (F - 1)."""
    if (features.shape[1] - 1) % stride:
        raise ValueError(f"rows: got T={features.shape[1]}, need T = 1 + {stride} (F - 1)")
    lead = features[:, :1].expand(-1, stride - 1, -1)
    return torch.cat([lead, features], dim=1).unflatten(1, (-1, stride))


def side_by_side(rows: Tensor) -> Tensor:
    """Rows of several speakers [.., speakers, T, A] -> [.., T, speakers A], as `Conditions.audio` has them."""
    return rows.transpose(-3, -2).flatten(-2)


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance per modality, in effective scales: u + text (t - u) + audio (full - t); 1 is off.

    t has the text but no audio, u has neither. Equal scales need no t: u + s (full - u). (Ho & Salimans 2207.12598.)
    """

    text: float = 1.0
    audio: float = 1.0

    @property
    def passes(self) -> int:
        """Network evaluations for one guided prediction."""
        if self.text == self.audio:
            return 1 if self.text == 1.0 else 2
        return 3 if self.text != 1.0 else 2

    def __call__(self, predict: Callable[[Conditions], Tensor], conditions: Conditions) -> Tensor:
        full = predict(conditions)
        if self.text == 1.0 and self.audio == 1.0:
            return full
        if self.text == 1.0:
            text = predict(conditions.drop("audio"))
            return text + self.audio * (full - text)
        nothing = predict(conditions.drop("text", "audio"))
        if self.text == self.audio:
            return nothing + self.text * (full - nothing)
        text = predict(conditions.drop("audio"))
        return nothing + self.text * (text - nothing) + self.audio * (full - text)


def told_guidance(predict: Callable[[Conditions], Tensor], conditions: Conditions) -> Tensor:
    """Guidance with each row's own scale, text and audio alike: u + s (full - u), s = `conditions.guidance` [B]."""
    assert conditions.guidance is not None
    full = predict(conditions)
    nothing = predict(conditions.drop("text", "audio"))
    return nothing + conditions.guidance.view(-1, 1, 1, 1, 1).to(full) * (full - nothing)


@dataclass(frozen=True, kw_only=True)
class GuidanceRange:
    """The guidance scales that a student is told by an embedding, so that a guided prediction takes one evaluation: effective
    ones (1 is off), for text and audio alike, trained from `least` to `most`; `served` where a stream asks for none.

    Stage 1 of Meng et al. 2210.03142, FlowAct-R1's CFG embedding layer (2601.10103). Their scale is ours minus 1.
    """

    least: float = 1.0
    most: float = 2.0
    served: float = 1.25

    def __post_init__(self):
        if not 0.0 <= self.least <= self.served <= self.most or self.least == self.most:
            raise UserError(
                f"student.guidance: got least={self.least}, served={self.served}, most={self.most}; "
                "need 0 <= least <= served <= most and least < most"
            )

    def draw(self, num: int, rng: torch.Generator) -> Tensor:
        """Scales [num], uniform."""
        return self.least + (self.most - self.least) * torch.rand(num, generator=rng)

    def check(self, scale: float) -> float:
        """The scale; UserError for one that was not trained."""
        if not self.least <= scale <= self.most:
            raise UserError(f"guidance: got {scale}; this student was trained from {self.least} to {self.most}")
        return scale
