"""Sound of files as float32 samples, mono or in two channels, by its times: whole, block by block, or any stretch of it.

There is one decoder of sound (`_Track`): it chooses the track, mixes channels by their layout, keeps holes as silence and the
speed of a part with another sample rate.
"""

import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from torch import Tensor

from teachers.errors import UserError
from teachers.media.channels import Mixer, channel_names, check_rate, decoded_sound, downmix, keep
from teachers.media.container import JUMP, Content, audio_stream, is_timed, opened, seek, video_stream, zero_of
from teachers.media.streams import Resampler

SAMPLE_RATE = 16_000
CONTEXT = Fraction(1, 2)  # seconds of sound decoded around a stretch, the context of codec and resampler
GAP = Fraction(1, 25)  # seconds by which an audio frame may be off its place before it counts as a gap
PADDING = Fraction(1, 4)  # seconds of an encoder past the length in an mp4's header; with more the header is wrong
LONGEST_HOLE = 600  # seconds that are filled with silence
LONGEST = 3600  # seconds that are held as a whole
PIECE = 4  # seconds that are resampled at a time
CHECKED = 10.0  # seconds after which channels that cancel each other are noticed, and at the end
SILENT = 2.0**-12  # a peak below it is digital silence and what a codec makes of it
COUNTED = ("wav", "w64", "aiff", "flac")  # they have no times, but FFmpeg knows which sample it has sought
CANCELLED = 5e-4  # share of the channels' power in their mean, -33 dB, below which they cancel each other


def read_audio(path: Path, sample_rate: int = SAMPLE_RATE) -> Tensor:
    """Sound of `path` as float32 mono [S] in [-1, 1] at `sample_rate` Hz; raises UserError as `AudioReader` does.

    Any rate, channel count, sample format or container, the sound track of a video included.
    """
    reader, parts = AudioReader(path), []
    with closing(reader):
        for part in _resampled(reader, reader.rate, sample_rate):
            parts.append(part)
            if sum(map(len, parts)) > LONGEST * sample_rate:
                raise UserError(f"sound is longer than {LONGEST} s: {path}; cut it")
    return torch.cat(parts)


def _resampled(blocks: Iterable[Tensor], source_rate: int, target_rate: int) -> Iterator[Tensor]:
    """A sound [S] in blocks, one every few seconds, at another rate: `resample` of the whole, but held in pieces."""
    resampler = Resampler(source_rate, target_rate)
    held: list[Tensor] = []
    for block in blocks:
        held.append(block)
        if sum(map(len, held)) >= PIECE * source_rate:
            part, held = torch.cat(held), []
            yield part if source_rate == target_rate else resampler.push(part)
    part = torch.cat([torch.zeros(0), *held])
    yield part if source_rate == target_rate else resampler.push(part, end=True)


class AudioReader:
    """The sound of a file as it is decoded: iterate, once, for blocks float32 mono [n] in [-1, 1] at `rate` Hz.

    With `mono=False` blocks are [n, channels], 1 or 2: of more channels the stereo mix by their layout (ITU-R BS.775), whose
    mean over channels the mono sound is. The track of a video starts where its frames start: silence is put before a late
    one, and into holes of more than 40 ms. `seconds` is the length that the file claims, None where it claims none; `track`
    which track it is ("1 of 2"); `peak` the loudest sample so far. `formats` as for `opened`.

    UserError when the file is missing, empty, damaged, without sound, 0 seconds long, when its times jump back, its channels cancel
    each other or it holds values not finite or far outside [-1, 1]: at once for what the first block shows, later for what
    comes later.
    """

    def __init__(self, path: Path | Content, mono: bool = True, formats: str | None = None):
        self.path, self.rate, self.channels, self.seconds, self.track, self.peak = path, 0, 0, None, "", 0.0
        self._blocks = self._decode(self.path, mono, formats)
        self._all = chain([next(self._blocks)], self._blocks)

    def __iter__(self) -> Iterator[Tensor]:
        return self._all

    def close(self) -> None:
        """Let go of the file."""
        self._blocks.close()

    def _decode(self, path: Path | Content, mono: bool, formats: str | None) -> Generator[Tensor, None, None]:
        with opened(path, "audio file", formats) as container:
            track = _Track(container, path)
            self.rate, self.channels, self.seconds, self.track = track.rate, track.channels, track.seconds, track.name
            place, found, power = 0, False, _Power()
            for at, rows in track.rows():
                found, kept = found or len(rows) > 0, rows[max(0, -at) :]
                if not len(kept):
                    continue
                at = max(0, at)
                _check_hole(place, at, self.rate, path)
                for start in range(place, at, self.rate):
                    yield _block(np.zeros((min(self.rate, at - start), self.channels), np.float32), mono)
                place, before = at + len(kept), power.seconds
                power.add(kept, self.rate)
                if before < CHECKED <= power.seconds:
                    _check_power(power, self.rate, path)
                block = _block(kept, mono)
                self.peak = max(self.peak, float(block.abs().max()))
                yield block
            if not found:
                raise UserError(f"audio file holds 0 seconds of sound: {path}; record or export it again")
            if place == 0:
                raise UserError(
                    f"audio track ends before the video starts: {path}; give the sound as a file of its own"
                )
            _check_power(power, self.rate, path)


def _check_hole(place: int, at: int, rate: int, path: Path | Content) -> None:
    if at - place > LONGEST_HOLE * rate:
        raise UserError(
            f"sound has a hole of {(at - place) / rate:.0f} s at {place / rate:.2f} s: {path}; cut it there"
        )


def _check_power(power: "_Power", rate: int, path: Path | Content) -> None:
    if power.cancelled(rate):
        raise UserError(
            f"the two channels of the sound cancel each other: {path}; keep one, ffmpeg -i IN -af 'pan=mono|c0=c0' OUT"
        )


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """A stretch of a video's sound: samples float32 [S] at 16 kHz.

    late, early: samples of silence that pad a track that starts late or ends early; hole: those inside it where the track has none
    track: which one it is, such as "1 of 2"; cancelled: whether its channels cancel each other in the mono mix
    """

    samples: Tensor
    late: int
    early: int
    hole: int
    track: str
    cancelled: bool

    @property
    def silent(self) -> bool:
        """Whether it is silent throughout."""
        return self.cancelled or float(self.samples.abs().max()) < SILENT


def read_sound(path: Path, first: int, count: int) -> Stretch | None:
    """Samples `first` to `first + count` of the video's sound at 16 kHz; None without an audio track.

    They equal `read_audio` of the whole video, without decoding all of it. Raises UserError as `AudioReader`, but not for
    channels that cancel each other, and for more than `LONGEST` seconds.
    """
    if count > LONGEST * SAMPLE_RATE:
        raise UserError(f"a clip of {count / SAMPLE_RATE:.0f} s: {path}; cut it into clips of at most {LONGEST} s")
    for seeks in (True, False):
        with opened(path, "audio track") as container:
            if audio_stream(container)[0] is None:
                return None
            track = _Track(container, path)
            early = Fraction(first, SAMPLE_RATE) - 2 * CONTEXT
            seeks = seeks and track.has_exact_times and early > 0
            if seeks and not track.seek(early):
                continue
            divisor = math.gcd(track.rate, SAMPLE_RATE)
            group = max(0, (first - round(CONTEXT * SAMPLE_RATE)) * divisor // SAMPLE_RATE)
            begin, skipped = group * (track.rate // divisor), group * (SAMPLE_RATE // divisor)
            stop = math.ceil((Fraction(first + count, SAMPLE_RATE) + CONTEXT) * track.rate)
            filled = _Filled(
                track, begin, stop, [round(at * track.rate / SAMPLE_RATE) for at in (first, first + count)]
            )
            sound = torch.cat([*_resampled(filled, track.rate, SAMPLE_RATE)])[first - skipped :][:count]
            lowest, power = stop if filled.lowest is None else filled.lowest, filled.power
            if seeks and (lowest > begin or track.changes):
                continue
            known = [max(0, math.floor(Fraction(at * SAMPLE_RATE, track.rate))) for at in (lowest, filled.place)]
            late = min(count, max(0, known[0] - first))
            return Stretch(
                samples=torch.cat([sound, torch.zeros(count - len(sound))]),
                late=late,
                early=min(count - late, max(0, first + count - known[1])),
                hole=sum(_shared(low, high, first, first + count, track.rate) for low, high in filled.holes),
                track=track.name,
                cancelled=power.cancelled(track.rate),
            )
    raise AssertionError("the second pass does not seek")


class _Filled:
    """Sound from place `begin` to `stop` at the track's own rate: iterate, once, for blocks float32 mono [n], in holes zeros.
    It ends a little after the track does.

    lowest, place: the first and last+1 that the track has, None and `stop` without any; holes: between them, (from, to) each
    power: of the part `own` (from, to)
    """

    def __init__(self, track: "_Track", begin: int, stop: int, own: list[int]):
        self.track, self.begin, self.stop, self.own = track, begin, stop, own
        self.lowest: int | None = None
        self.place, self.holes, self.power = stop, [], _Power()

    def __iter__(self) -> Iterator[Tensor]:
        made, rate = self.begin, self.track.rate
        for at, rows in self.track.rows():
            if self.lowest is None:
                self.lowest = self.place = at
            if at > self.place:
                self.holes.append((self.place, at))
            self.place = at + len(rows)
            low, high = max(at, self.begin), min(self.place, self.stop)
            if low < high:
                for start in range(made, low, rate):
                    yield torch.zeros(min(rate, low - start))
                part, made = rows[low - at : high - at], high
                self.power.add(part[max(0, self.own[0] - low) : max(0, self.own[1] - low)], rate)
                yield _block(part, mono=True)
            if self.place >= self.stop:
                break
        self.power.seconds = (self.own[1] - self.own[0]) / rate
        yield torch.zeros(min(round(CONTEXT * rate), self.stop - made))


def _shared(low: int, high: int, first: int, last: int, rate: int) -> int:
    """Samples at 16 kHz from `first` to `last` that lie between the places `low` and `high` at `rate`."""
    low, high = low * SAMPLE_RATE // rate, high * SAMPLE_RATE // rate
    return max(0, min(high, last) - max(low, first))


class _Track:
    """The chosen sound track of an open file; iterate `rows` once.

    rate, channels (1 or 2): of what it gives; seconds: the header's claim or None; changes: whether frames had another rate so far
    """

    def __init__(self, container: InputContainer, path: Path | Content):
        stream, self.name = audio_stream(container)
        if stream is None:
            raise UserError(f"no audio track: {path}; give a wav, mp3, m4a or a video with sound")
        if stream.codec_context is None:
            raise UserError(f"sound in a format that is not known: {path}; convert it to a wav")
        names = channel_names(keep(stream.codec_context.layout), str(path))
        if not names:
            raise UserError(f"audio track without channels: {path}; record or export it again")
        check_rate(stream.rate, path)
        self.container, self.stream, self.path, self.rate = container, stream, path, int(stream.rate)
        self.channels, self.timed, self.changes = downmix(names).shape[1], is_timed(container), False
        video = video_stream(container)
        # without video the first frame's time, which is not known yet
        self._zero = zero_of(video) if video is not None and self.timed else None
        self._sought = False
        self._length = (stream.duration or 0) * Fraction(stream.time_base or 0)  # 0: the header has none
        self.seconds = float(self._length or Fraction(container.duration or 0, av.time_base)) or None

    @property
    def has_exact_times(self) -> bool:
        """Whether places are known to the sample after a seek; not in mp3, whose times are guessed then, nor where they are rounded
        to milliseconds (Matroska): there samples are counted from the start."""
        known = self.timed or self.container.format.name in COUNTED
        return known and Fraction(self.stream.time_base or 1) <= Fraction(1, self.rate)

    def seek(self, seconds: Fraction) -> bool:
        """Continue with the last frame that begins before that time; False where the container cannot. Of sound alone the first
        frame is decoded before, whose time is the start."""
        from_zero = seconds
        if self._zero is None:
            first = next(decoded_sound(self.container, self.stream), None)
            if first is None or first.pts is None or first.time_base is None:
                return False
            self._zero = first.pts * Fraction(first.time_base)
            from_zero += self._zero
        self._sought = seek(self.container, self.stream, from_zero)
        return self._sought

    def rows(self) -> Iterator[tuple[int, np.ndarray]]:
        """Rows float32 [n, channels], each with its place: samples at `rate` after the video's start, always ahead; what lies
        between two is a hole. UserError for samples that cannot be, and where the times jump back."""
        held: list[tuple[int, np.ndarray]] = []  # what lies past the header's end: the padding of an mp4's last frames
        padding = PADDING * self.rate if self._length and self.container.format.name.startswith("mov") else 0
        for at, rows in self._placed():
            within = max(0, min(len(rows), self._end - at)) if padding else len(rows)
            if within:
                yield at, rows[:within]
            if within < len(rows):
                held.append((at + within, rows[within:]))
                if sum(len(rest) for _, rest in held) > padding:  # more than padding: the header is wrong
                    yield from held
                    padding, held = 0, []

    @property
    def _end(self) -> int:
        """The place at which the track ends by its header."""
        start = (self.stream.start_time or 0) * Fraction(self.stream.time_base or 0)
        return round((start + self._length - (self._zero or 0)) * self.rate)

    def _placed(self) -> Iterator[tuple[int, np.ndarray]]:
        """The track's rows by their times, whatever the header says of its end."""
        mixer, place, before = Mixer(self.rate, self.channels, str(self.path)), None, None
        for frame in decoded_sound(self.container, self.stream):
            at = self._time(frame)
            if place is None:
                place = at or 0
            elif at is not None:
                if min(place, place if before is None else before) - at > JUMP * self.rate:
                    raise UserError(
                        f"times of the sound jump back at {place / self.rate:.2f} s to {at / self.rate:.2f} s, as in two "
                        f"recordings in one file: {self.path}; cut it there"
                    )
                if at - place > GAP * self.rate:
                    yield place, mixer.finish()
                    place = at
            rows = mixer.push(frame, place)
            if at is not None:
                before = at
                if place - at > GAP * self.rate:  # the clock is behind the samples: leave some out
                    rows = rows[place - at :]
            self.changes |= frame.sample_rate != self.rate
            yield place, rows
            place += len(rows)
        yield place or 0, mixer.finish()

    def _time(self, frame: av.AudioFrame) -> int | None:
        """The place at which a frame says it lies; None where the file has no times of its own."""
        if frame.pts is None or frame.time_base is None or not (self.timed or self._sought):
            return None
        time = frame.pts * Fraction(frame.time_base)
        self._zero = time if self._zero is None else self._zero
        return round((time - self._zero) * self.rate)


class _Power:
    """Power of a sound's channels and of their mean, added up."""

    def __init__(self):
        self.seconds = self.channels = self.mean = 0.0

    def add(self, rows: np.ndarray, rate: int) -> None:
        self.seconds += len(rows) / rate
        self.channels += float(np.square(rows, dtype=np.float64).sum()) / rows.shape[1]
        self.mean += float(np.square(rows.mean(axis=1, dtype=np.float64)).sum())

    def cancelled(self, rate: int) -> bool:
        """Whether there is sound, but none in the mono mix."""
        audible = SILENT**2 * self.seconds * rate
        return self.channels > audible and self.mean < CANCELLED * self.channels


def _block(rows: np.ndarray, mono: bool) -> Tensor:
    """Rows [n, channels] as a block within [-1, 1]: their mean [n], or [n, channels]."""
    rows = rows.clip(-1.0, 1.0)
    return torch.from_numpy(rows.mean(axis=1, dtype=np.float32) if mono else rows)
