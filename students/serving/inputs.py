"""The input of a session: the audio and pose streams, and what each chunk needs of them.

For a student of two speakers sound is rows [n, 2] of samples, the avatar's own voice first: one push is one stretch of time for
both, so that neither is ever ahead of the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from students.serving.checked import check_waiting
from students.serving.dubbing import FilmInput
from students.serving.overlap import to_device
from students.spec import Spec
from teachers.conditions import BUILT_IN, Conditions, blank_features, known, pack_rows, side_by_side
from teachers.encoders.small import SAMPLE_RATE
from teachers.errors import UserError
from teachers.media.streams import LOUDEST_SAMPLE, Resampler, Stream
from teachers.registry import AudioEncoder


@dataclass(frozen=True)
class Starved:
    """No chunk now, and nothing is lost: `missing` samples of audio, rows of pose or frames of the film; the viewer is `lead`
    chunks behind; or the stream was closed and has come to its end. False where a chunk is true."""

    reason: Literal["audio", "pose", "film", "lead", "end"]
    missing: int = 0

    def __bool__(self) -> bool:
        return False


class SessionInputs:
    """Audio at 16 kHz and pose rows, one a pixel frame, from their push until no chunk needs them any more.

    `drop`: conditions that this stream never gets. `film`: where one is dubbed. `given`: features from outside this package
    (`given_features`); `of_image`: those of the reference image, with a batch axis, the last frame held where they run with the
    frames. Memory is bounded by what `forget` leaves. What `conditions` computes is on the device of its arguments.
    """

    def __init__(
        self,
        spec: Spec,
        encoder: AudioEncoder,
        drop: tuple[str, ...] = (),
        given: Mapping[str, Tensor] | None = None,
        of_image: Mapping[str, Tensor] | None = None,
        film: FilmInput | None = None,
    ):
        for name in drop:
            known(name)
        self.spec, self.encoder, self.drop = spec, encoder, drop
        self.given = Conditions(of_image, **given_features(spec, given or {}).features)
        self.audio = Stream((spec.speakers,) if spec.speakers > 1 else ())
        self.pose = Stream((spec.pose_dim,))
        self.film = film
        self.resampler: Resampler | None = None
        self.closed = False

    # ---- what comes in

    def push(
        self,
        audio: Tensor | None,
        pose: Tensor | None,
        rate: int,
        other: Tensor | None,
        film: Tensor | None = None,
        region: Tensor | None = None,
    ) -> None:
        """Append audio [S] or [channels, S] in [-1, 1] at `rate` Hz, pose rows [T, P], and frames of a film with their regions
        (`FilmInput`); UserError, which changes nothing, for what is none of them, and after `close`."""
        if self.closed:
            raise UserError("push after close: this session takes no more input; open another")
        if film is not None and self.film is None:
            raise UserError("film: this stream takes none; open it with Session(.., film=True)")
        if film is None and region is not None:
            raise UserError("region: it comes with the frames that it is of; push film too")
        boxes = None if film is None or self.film is None else self.film.check(film, region)
        sound = checked_sound(self.spec, audio, other, rate)
        if pose is not None:
            check_pose(self.spec, pose)
        samples = self.audio.end - self.audio.start + (0 if sound is None else len(sound) * SAMPLE_RATE / rate)
        check_waiting(self.spec, samples, self.pose.end - self.pose.start + (0 if pose is None else len(pose)))
        if pose is not None:
            self.pose.push(pose)
        if sound is not None:
            self.audio.push(self._resampled(sound, rate))
        if self.film is not None and film is not None and boxes is not None:
            self.film.push(film, boxes)

    def _resampled(self, sound: Tensor, rate: int) -> Tensor:
        if self.resampler is not None and self.resampler.source_rate != rate:
            self.audio.push(self.resampler.finish())
            self.resampler = None
        if rate == SAMPLE_RATE:
            return sound
        if self.resampler is None:
            self.resampler = Resampler(rate, SAMPLE_RATE, row_shape=self.audio.row_shape)
        return self.resampler.push(sound)

    def close(self) -> None:
        """No more input: the last samples leave the resampler; what a chunk lacks from here on is silence."""
        if self.resampler is not None and not self.closed:
            self.audio.push(self.resampler.finish())
        self.closed = True

    def cut(self, frame: int) -> None:
        """Drop all input from a pixel frame on; the stream is open again."""
        self.audio.cut(frame * self.spec.samples_per_frame)
        self.pose.cut(frame)
        if self.film is not None:
            self.film.cut(frame)
        self.resampler, self.closed = None, False

    def forget(self, chunk: int) -> None:
        """Free the input that no chunk from number `chunk` on needs."""
        start = self.spec.pixel_frames(chunk)[0]
        self.audio.forget(start * self.spec.samples_per_frame - self.encoder.lookback)
        self.pose.forget(start - 1)  # the last row is held where a live session lacks one
        if self.film is not None:
            self.film.forget(start)

    # ---- what a chunk needs

    @property
    def takes_pose(self) -> bool:
        """Whether chunks wait for pose rows."""
        return self.spec.pose_dim > 0 and "pose" not in self.drop

    def span(self, chunk: int) -> tuple[int, int]:
        """The pixel frames whose input a step at `chunk` reads: those of the chunk and of the chunks in flight behind it, which
        end with a closed stream."""
        last = chunk + self.spec.schedule.ahead
        while self.closed and last > chunk and self.ended(last):
            last -= 1
        return self.spec.pixel_frames(chunk)[0], self.spec.pixel_frames(last)[1]

    def ended(self, chunk: int) -> bool:
        """Whether the stream was closed before the first sample of a chunk."""
        return self.closed and self.spec.pixel_frames(chunk)[0] * self.spec.samples_per_frame >= self.audio.end

    def missing(self, chunk: int) -> Starved | None:
        """The input that a step at `chunk` waits for; None where it can be taken."""
        if self.closed:
            return None
        stop = self.span(chunk)[1]
        samples = stop * self.spec.samples_per_frame + self.encoder.lookahead - self.audio.end
        if samples > 0 and "audio" not in self.drop:
            return Starved("audio", samples)
        if self.takes_pose and stop > self.pose.end:
            return Starved("pose", stop - self.pose.end)
        if self.film is not None and (frames := self.film.missing(stop)):
            return Starved("film", frames)
        return None

    def fill(self, chunk: int) -> None:
        """Make up what a step at `chunk` lacks: silence, the last pose, the film's last frame."""
        stop = self.span(chunk)[1]
        lacking = stop * self.spec.samples_per_frame + self.encoder.lookahead - self.audio.end
        self.audio.push(torch.zeros(max(0, lacking), *self.audio.row_shape))
        if self.takes_pose:
            last = self.pose.read(self.pose.end - 1, self.pose.end)
            self.pose.push(last.expand(max(0, stop - self.pose.end), -1))
        if self.film is not None:
            self.film.hold(stop)

    def voice(self, chunk: int) -> Tensor:
        """The avatar's own samples [S] at 16 kHz that play with a chunk."""
        start, stop = (frame * self.spec.samples_per_frame for frame in self.spec.pixel_frames(chunk))
        audio = self.audio.read(start, stop)
        return audio if audio.ndim == 1 else audio[:, 0]

    def conditions(self, chunk: int, text: Tensor, reference: Tensor | None, guidance: Tensor | None) -> Conditions:
        """The conditions of a step at `chunk` from what has come, without those in `drop`; text [1, L, D] gives the device."""
        start, stop = self.span(chunk)
        stride, per_frame = self.spec.codec.stride, self.spec.samples_per_frame
        send = partial(to_device, device=text.device)

        def packed(rows: Tensor) -> Tensor:
            if start:
                return rows[None].unflatten(1, (-1, stride))
            return pack_rows(rows[None], stride)[:, self.spec.network.lead :]

        window = self.audio.read(start * per_frame - self.encoder.lookback, stop * per_frame + self.encoder.lookahead)
        audio = packed(encode_window(self.encoder, send(window), start, stop))
        pose = packed(send(self.pose.read(start, stop))) if self.spec.pose_dim else None
        given = {name: send(value) for name, value in self.features(chunk, audio.shape[1]).items()}
        conditions = Conditions(given, text=text, audio=audio, reference=reference, pose=pose, guidance=guidance)
        return conditions.to(text.device).drop(*self.drop)

    def features(self, chunk: int, num_frames: int) -> dict[str, Tensor]:
        """The given features of `num_frames` latent frames from a chunk on, the last frame held."""
        first = chunk * self.spec.chunk_frames
        return self.given.frames(first, first + num_frames, hold=True).features

    # ---- a snapshot

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that has come and is still needed: what JSON can hold, and tensors by name."""
        facts: dict[str, Any] = {"closed": self.closed, "audio": self.audio.start, "pose": self.pose.start}
        tensors = {
            "audio": self.audio.read(self.audio.start, self.audio.end),
            "pose": self.pose.read(self.pose.start, self.pose.end),
        }
        tensors |= {f"given.{name}": value for name, value in self.given.features.items()}
        if self.film is not None:
            facts["film"] = self.film.frames.start
            tensors |= self.film.held()
        if (own := self.resampler) is not None:
            facts["resampler"] = {"rate": own.source_rate, "first": own.first, "made": own.made}
            tensors["resampler"] = own.tail
        return facts, tensors

    def restore(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self.closed = facts["closed"]
        self.given = Conditions(named(tensors, "given."))
        self.audio = Stream(self.audio.row_shape, facts["audio"])
        self.pose = Stream(self.pose.row_shape, facts["pose"])
        self.audio.push(tensors["audio"])
        self.pose.push(tensors["pose"])
        if self.film is not None:
            self.film.restore(facts["film"], tensors)
        self.resampler = None
        if "resampler" in facts:
            self.resampler = Resampler(facts["resampler"]["rate"], SAMPLE_RATE, row_shape=self.audio.row_shape)
            self.resampler.tail = tensors["resampler"]
            self.resampler.first, self.resampler.made = facts["resampler"]["first"], facts["resampler"]["made"]


def checked_sound(spec: Spec, audio: Tensor | None, other: Tensor | None, rate: int) -> Tensor | None:
    """The samples [S] of one push, of two speakers [S, 2] where a missing one is silent; None where there is no sound.

    audio and other are [S] or [channels, S] in [-1, 1]. UserError for what is no sound, and for two that are not as long as
    each other.
    """
    if other is not None and spec.speakers == 1:
        raise UserError("other: this student takes one speaker; push audio alone")
    given = {"audio": audio, "other": other}
    voices = {name: _checked(name, sound, rate) for name, sound in given.items() if sound is not None}
    if spec.speakers == 1 or not voices:
        return voices.get("audio")
    lengths = {len(voice) for voice in voices.values()}
    if len(lengths) > 1:
        raise UserError(
            f"audio and other are one stretch of time: got {len(voices['audio'])} and {len(voices['other'])} samples; "
            "push as much of both, silence where one is silent"
        )
    silence = torch.zeros(lengths.pop())
    return torch.stack([voices.get(name, silence).detach().cpu().float() for name in given], dim=1)


def _checked(name: str, sound: Tensor, rate: int) -> Tensor:
    """Samples [S], channels averaged."""
    if not isinstance(sound, Tensor):
        raise UserError(f"{name} must be a tensor of samples: got {type(sound).__name__}; give torch.as_tensor of it")
    if sound.ndim not in (1, 2) or (sound.ndim == 2 and sound.shape[0] > 8) or not sound.is_floating_point():
        raise UserError(
            f"{name} must be float samples [S] or [channels, S]: got {tuple(sound.shape)} {sound.dtype}; convert it"
        )
    if not torch.isfinite(sound).all():
        raise UserError(f"{name} must be finite samples: got NaN or infinity; clean it first")
    if sound.numel() and sound.abs().max() > LOUDEST_SAMPLE:
        raise UserError(f"{name} must lie in [-1, 1]: got a peak of {sound.abs().max():.0f}; divide by full scale")
    if not isinstance(rate, Integral) or not 1000 <= rate <= 768_000:
        raise UserError(f"{name} rate: got {rate} Hz; give that of the samples, such as 16000 or 48000")
    return sound.mean(dim=0) if sound.ndim == 2 else sound


def check_pose(spec: Spec, pose: Tensor) -> None:
    """UserError unless these are pose rows [T, P] of a student that takes them."""
    if not spec.pose_dim:
        raise UserError("pose: this student takes none; push audio alone")
    if (
        not isinstance(pose, Tensor)
        or pose.ndim != 2
        or pose.shape[1] != spec.pose_dim
        or not torch.isfinite(pose).all()
    ):
        raise UserError(
            f"pose must be finite rows [T, {spec.pose_dim}], one a pixel frame: got {tuple(getattr(pose, 'shape', ()))}"
        )


def given_features(spec: Spec, given: Mapping[str, Tensor]) -> Conditions:
    """The features from outside this package of one stream: given ones, without a batch axis, and zeros for the others that the
    network takes; `regions` in the place of the image encoder's. UserError for one that the session makes itself, that is not
    declared, or not of its declared size."""
    blank = blank_features(spec.network, 1, 1)
    for name, value in given.items():
        feature = known(name)
        if name in BUILT_IN and (name != "regions" or spec.image is None):
            raise UserError(f"conditions: {name} is not given there; push it, set it, or give it by its own argument")
        if not isinstance(value, Tensor) or not torch.isfinite(value).all():
            raise UserError(f"conditions: {name} must be a tensor of finite numbers; read it again")
        size, axis = tuple(value.shape), feature.axis
        own = size if axis is None else (*size[: axis - 1], *size[axis:])
        declared = (spec.speakers, *spec.latent_size[1:]) if name == "regions" else feature.size
        if declared is not None and own != declared:
            raise UserError(
                f"conditions: {name} {size} does not fit its declared size {declared} on the clock {feature.clock}"
            )
    return Conditions(blank, **{name: value[None].float() for name, value in given.items()})


def encode_window(encoder: AudioEncoder, window: Tensor, first: int, last: int) -> Tensor:
    """Rows first..last-1 [T, A] of just the samples that they need (`AudioEncoder.rows`): [S], or [S, speakers] side by side."""
    if window.ndim == 1:
        return encoder.rows(window, first, last)
    return side_by_side(encoder.rows(window.T, first, last))


def named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
