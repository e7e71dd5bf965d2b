"""`distill sample`: a portrait, a sound and a text through the chunked session of a student, to an mp4 with sound.

Sound is read, drawn and written piece by piece, so that length is bounded by the disk and memory does not follow it.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from distill.commands import devices
from distill.commands.sample.options import PIECE_MS, REALTIME_PIECE_MS, add_arguments, check
from teachers import media
from teachers.media.mark import Mark

if TYPE_CHECKING:
    from distill.commands.sample.film import Film
    from distill.commands.sample.inputs import Duet, Silence, Steering
    from students.serving.session import Chunk, Session, Starved
    from students.serving.timeline import Script

__all__ = ["Viewer", "add_arguments", "run"]
LEAD_CHUNKS = 2  # how far --realtime draws ahead of the viewer


def run(args: argparse.Namespace) -> int:
    """Write the video that `args` ask for and return 0: as many frames as the sound lasts, the last one begun included.

    Every input is opened, and the output's folder tried, before the student loads. Raises UserError in one line, and leaves
    no video, also for a place of the sound that turns out to be damaged later.
    """
    script = check(args)
    if args.teacher is not None:
        from distill.commands.sample.teacher import run as run_teacher

        return run_teacher(args)
    media.check_output(args.out)
    pixels = None if args.image is None else media.decode_image(args.image)
    with ExitStack() as opened:
        own = None
        if args.audio is not None:
            own = opened.enter_context(closing(media.AudioReader(args.audio, mono=args.other is not None)))
        from distill.commands.sample import inputs

        other = None if args.other is None else opened.enter_context(closing(media.AudioReader(args.other)))
        stream = _open(args, script, pixels, own, other)
        viewer = Viewer(stream.fps) if args.realtime else None
        started = time.perf_counter()
        frames, first = _write(args, stream, viewer, started)
    seconds = time.perf_counter() - started
    for reader in (own, other):
        if reader is not None:
            inputs.report_track(reader)
    if stream.film is not None and stream.film.ended is not None:
        held = frames - stream.film.ended
        if held > 0:
            sys.stderr.write(f"distill: the sound is longer than the film: its last frame is held for {held} frames\n")
    sys.stdout.write(
        f"{args.out}: {frames} frames, {float(frames / stream.fps):.2f} s, "
        f"first frame after {first:.2f} s, {frames / seconds:.1f} frames/s"
        f"{'' if viewer is None else f', stalls: {viewer.stalls} ({viewer.stalled_seconds:.2f} s)'}\n"
    )
    return 0


@dataclass(frozen=True)
class Stream:
    """A session, what draws its next chunk, and what it is given: sound, directions where it is steered, a film to dub."""

    session: "Session"
    step: Callable[[], "Chunk | Starved"]
    sound: "media.AudioReader | Duet | Silence"
    steering: "Steering | None"
    film: "Film | None" = None

    @property
    def fps(self) -> Fraction:
        return self.session.spec.fps


def _open(
    args: argparse.Namespace,
    script: "Script | None",
    pixels: Tensor | None,
    own: media.AudioReader | None,
    other: media.AudioReader | None,
) -> Stream:
    """The student's stream that `args` ask for. Raises UserError for what it cannot take."""
    from distill.commands.sample import inputs
    from distill.commands.sample.film import Film, read_region
    from students.serving.session import Session
    from students.serving.timeline import Director, Timeline

    planner = None
    if script is not None:
        planner = Timeline(script.timeline) if script.planner is None else script.planner.load(script.behaviours)
    bundle = devices.load(args.student, args)
    spec = bundle.spec
    inputs.check(spec, args.other, args.pose)
    steering = None if args.pose is None else inputs.Steering(inputs.read_pose(args.pose, spec.pose_dim))
    sound = inputs.sound_of(own, other, steering, spec.fps)
    if script is not None:
        script.check(spec, args.timeline)
    film = None
    if args.film is not None:
        region = None if args.region is None else read_region(args.region)
        film = Film(args.film, spec, args.crop, region)
    if pixels is not None:
        reference = inputs.portrait(pixels, spec, args)
    else:
        assert film is not None  # one of the two is given
        reference = film.first
    texts = [args.text or "", *([] if script is None else [entry.do for entry in script.timeline])]
    inputs.check_coverage(bundle, reference, texts, args)
    lead = LEAD_CHUNKS if args.realtime else None
    text = args.text if script is None or not script.begins else script.timeline[0].do
    drop = () if steering else ("pose",)
    options = {"lead": lead, "drop": drop, "guidance": args.guidance}
    session = Session(bundle, reference, text, args.seed, film=film is not None, **options)
    step = session.step if planner is None else Director(session, planner, reference).step
    return Stream(session, step, sound, steering, film)


def _write(args: argparse.Namespace, stream: Stream, viewer: "Viewer | None", started: float) -> tuple[int, float]:
    """Write the whole video; its frames, and seconds from `started` to the first."""
    spec, sound, first = stream.session.spec, stream.sound, 0.0
    size = (spec.height, spec.width) if stream.film is None else stream.film.size
    mark = Mark(args.mark, *size) if args.mark else None
    push_ms = args.push_ms or (REALTIME_PIECE_MS if args.realtime else PIECE_MS)
    upscale = max(1, math.ceil(args.size / min(size)))
    expected = math.ceil(sound.seconds * spec.fps) if sound.seconds else None
    given = {"smooth": True, "channels": sound.channels, "synthetic": not args.no_label}
    with (
        media.VideoWriter(args.out, spec.fps, sound.rate, upscale, **given) as writer,
        tqdm(total=expected, unit="frame", desc="sample", file=sys.stderr) as progress,
    ):
        for frames in _chunks(stream, push_ms, viewer, writer):
            if writer.num_frames == 0:
                first = time.perf_counter() - started
                progress.set_postfix_str(f"first frame {first:.2f} s")
            frames = frames if stream.film is None else stream.film.paste(frames)
            for frame in frames if mark is None else mark(frames):
                writer.write(frame)
            progress.update(len(frames))
        progress.total = writer.num_frames  # what the file claims is an estimate
    return writer.num_frames, first


class Viewer:
    """Somebody who watches from the first frame's hand-over on, at `fps`, by the clock in seconds that each call is given.

    A chunk that comes after its first frame was due is a stall: the video freezes until then, and all later ones are due later.
    """

    def __init__(self, fps: Fraction):
        self.fps = fps
        self.frames = self.stalls = 0
        self.due: float | None = None  # when the frame after the last one should be there
        self.stalled_seconds = 0.0

    def show(self, num_frames: int, now: float) -> None:
        """The next chunk is there."""
        if self.due is not None and now > self.due:
            self.stalls += 1
            self.stalled_seconds += now - self.due
        start = now if self.due is None else max(now, self.due)
        self.due = start + float(num_frames / self.fps)
        self.frames += num_frames

    def seen(self, now: float) -> int:
        """Frames that were shown, the one that is being shown included."""
        left = 0 if self.due is None else math.floor((self.due - now) * self.fps)
        return min(max(self.frames - left, 0), self.frames)


def _chunks(stream: Stream, push_ms: int, viewer: Viewer | None, writer: media.VideoWriter) -> Iterator[Tensor]:
    """Frames uint8 [t, H, W, 3] of each chunk as soon as it is drawn, as many in all as the sound lasts, rounded up.

    The writer gets each piece of sound before its frames. For a viewer, a piece is pushed when its last sample would have been
    spoken.
    """
    session, sound, fps = stream.session, stream.sound, stream.fps
    started, num_samples, num_frames = time.perf_counter(), 0, 0
    for piece in _pieces(sound, sound.rate, push_ms):
        num_samples += len(piece)
        spoken = 0.0 if viewer is None else started + num_samples / sound.rate
        for frames in _drawn(stream, viewer, spoken):
            num_frames += len(frames)
            yield frames
        if viewer is not None:
            time.sleep(max(0.0, spoken - time.perf_counter()))
        _push(session, writer, piece, sound)
        _push_beside(stream, math.ceil(num_samples * fps / sound.rate))
    session.close()
    remaining = math.ceil(num_samples * fps / sound.rate) - num_frames
    for frames in _drawn(stream, viewer, math.inf):
        yield frames[:remaining]
        remaining -= len(frames[:remaining])
    if remaining:
        raise RuntimeError(f"the session ended {remaining} frames before its sound")


def _push(
    session: "Session", writer: media.VideoWriter, piece: Tensor, sound: "media.AudioReader | Duet | Silence"
) -> None:
    """Sound of one speaker [n, channels], of two [n, 2], to the session; the video has all of it, of one speaker as it is."""
    from distill.commands.sample.inputs import Duet

    if isinstance(sound, Duet):
        writer.write_audio(piece.sum(dim=1).clamp(-1, 1))
        session.push(audio=piece[:, 0], other=piece[:, 1], rate=sound.rate)
    else:
        writer.write_audio(piece.squeeze(1))
        session.push(audio=piece.mean(dim=1), rate=sound.rate)


def _push_beside(stream: Stream, frame: int) -> None:
    """What goes with the sound up to a frame: directions, or a film, ahead of it by a chunk, which is drawn whole."""
    if stream.steering is None and stream.film is None:
        return
    session = stream.session
    stop = frame + session.spec.pixel_frames(1 + session.spec.schedule.ahead)[1]
    if stream.steering is not None:
        session.push(pose=stream.steering.until(stop))
    if stream.film is not None:
        frames, regions = stream.film.until(stop)
        session.push(film=frames, region=regions)


def _pieces(blocks: Iterable[Tensor], rate: int, push_ms: int) -> Iterator[Tensor]:
    """Sound [n, ...] at `rate` Hz cut anew: each piece ends at a whole multiple of `push_ms`, the last one with the sound."""
    parts: list[Tensor] = []
    held, start, number = 0, 0, 1
    for block in blocks:
        parts.append(block)
        held += len(block)
        while held >= (length := number * push_ms * rate // 1000 - start):
            joined = torch.cat(parts)
            yield joined[:length]
            parts, held, start, number = [joined[length:]], held - length, start + length, number + 1
    if held:
        yield torch.cat(parts)


def _drawn(stream: Stream, viewer: Viewer | None, until: float) -> Iterator[Tensor]:
    """The frames of every chunk that can be drawn now; a viewer who is too far behind is waited for, no longer than `until`."""
    from students.serving.session import Chunk

    while True:
        if viewer is not None:
            stream.session.played(viewer.seen(time.perf_counter()))
        chunk = stream.step()
        now = time.perf_counter()
        if isinstance(chunk, Chunk):
            if viewer is not None:
                viewer.show(len(chunk.frames), now)
            yield chunk.frames
        elif chunk.reason == "lead" and now < until:
            time.sleep(min(until - now, float(1 / stream.fps)))
        else:
            return
