"""What a session lets in: sound and pose rows, checked; and how the sound of two speakers is heard.

For a student of two speakers sound is rows [n, 2] of samples, the avatar's own voice first: one push is one stretch of time for
both, so that neither is ever ahead of the other.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from students.spec import Spec
from teachers.conditions import BUILT_IN, Conditions, blank_features, known, side_by_side
from teachers.errors import UserError
from teachers.media.streams import LOUDEST_SAMPLE
from teachers.registry import AudioEncoder


def checked_sound(spec: Spec, audio: Tensor | None, other: Tensor | None, rate: int) -> Tensor | None:
    """The samples [n] of one push, of two speakers [n, 2] where a missing one is silent; None where there is no sound.

    audio and other are [S] or [channels, S] in [-1, 1]. UserError for what is no sound, and for two that are not as long as
    each other.
    """
    if other is not None and spec.speakers == 1:
        raise UserError("other: this student hears one speaker; push audio alone")
    given = {"audio": audio, "other": other}
    voices = {name: _checked(name, sound, rate) for name, sound in given.items() if sound is not None}
    if spec.speakers == 1 or not voices:
        return voices.get("audio")
    lengths = {len(voice) for voice in voices.values()}
    if len(lengths) > 1:
        raise UserError(
            f"audio and other are one stretch of time: got {len(voices['audio'])} and {len(voices['other'])} samples; "
            "push as much of both, silence where one says nothing"
        )
    silence = torch.zeros(lengths.pop())
    return torch.stack([voices.get(name, silence).detach().cpu().float() for name in given], dim=1)


def _checked(name: str, sound: Tensor, rate: int) -> Tensor:
    """Samples [n], channels averaged."""
    if sound.ndim not in (1, 2) or (sound.ndim == 2 and sound.shape[0] > 8) or not sound.is_floating_point():
        raise UserError(
            f"{name} must be float samples [S] or [channels, S]: got {tuple(sound.shape)} {sound.dtype}; convert it"
        )
    if not torch.isfinite(sound).all():
        raise UserError(f"{name} must be finite samples: got NaN or infinity; clean it first")
    if sound.numel() and sound.abs().max() > LOUDEST_SAMPLE:
        raise UserError(f"{name} must lie in [-1, 1]: got a peak of {sound.abs().max():.0f}; divide by full scale")
    if not 1000 <= rate <= 768_000:
        raise UserError(f"{name} rate: got {rate} Hz; give that of the samples, such as 16000 or 48000")
    return sound.mean(dim=0) if sound.ndim == 2 else sound


def check_pose(spec: Spec, pose: Tensor) -> None:
    """UserError unless these are pose rows [T, P] of a student that takes them."""
    if not spec.pose_dim:
        raise UserError("pose: this student takes none; push audio alone")
    if pose.ndim != 2 or pose.shape[1] != spec.pose_dim or not torch.isfinite(pose).all():
        raise UserError(f"pose must be finite rows [T, {spec.pose_dim}], one a pixel frame: got {tuple(pose.shape)}")


def given_features(spec: Spec, given: Mapping[str, Tensor]) -> Conditions:
    """The features from outside this package of one stream: given ones, without a batch axis, and zeros for the others that the
    network takes. UserError for one that the session makes itself, that is not declared, or not of its declared size."""
    blank = blank_features(spec.network, 1, 1)
    for name, value in given.items():
        feature = known(name)
        if name in BUILT_IN:
            raise UserError(f"conditions: {name} is not given there; push it, set it, or give it by its own argument")
        size, axis = tuple(value.shape), feature.axis
        own = size if axis is None else (*size[: axis - 1], *size[axis:])
        if feature.size is not None and own != feature.size:
            raise UserError(
                f"conditions: {name} {size} does not fit its declared size {feature.size} on the clock {feature.clock}"
            )
    return Conditions(blank, **{name: value[None].float() for name, value in given.items()})


def encode_window(audio_encoder: AudioEncoder, window: Tensor, first: int, last: int) -> Tensor:
    """Rows first..last-1 [T, A] of just the samples that they need (`AudioEncoder.rows`): [S], or [S, speakers] side by side."""
    return (
        audio_encoder.rows(window, first, last)
        if window.ndim == 1
        else side_by_side(audio_encoder.rows(window.T, first, last))
    )
