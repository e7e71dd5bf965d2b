"""An agent that talks through a door in real time: how late the first frame is, how far sound and picture are apart, and what an
interrupt leaves.

    python -m benchmarks.serving.doors livekit|room|pipecat --student DIR [--minutes 10] [--turns 40] [--json OUT]

Turns; then turns that are interrupted; then one sentence of so many minutes, pushed at once. livekit: livekit-agents' own output,
receiver, runner and tracks, in a room without a server; times are those at which an encoder gets a block of 10 ms or a frame.
room: the same over WebRTC in a room of `benchmarks.serving.livekit_server`; times are a user's, whose sound is lossy, so that only
where it begins and ends is known. pipecat: the service in a pipeline, before an output transport that plays in real time. Frames
carry their number as black and white blocks, and no sample is zero: each frame's time is held against that of its first sample.
"""

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from distill.commands.serving import read_portraits
from distill.live.doors.stream import AvatarStream, Beat
from distill.live.scheduler import Engine
from distill.live.talkers import Echo
from distill.live.voice import formant_voice
from students import load_student
from teachers.media import resample

RATE, BITS, QUIET = 24_000, 14, 300
SENTENCES = (
    "Good morning, how may I help you today?",
    "The train to the lake leaves at ten past nine, from the last platform.",
    "I would take the smaller one, it is lighter and much cheaper.",
    "Mama, papa, a boat, a moon, and nobody at home.",
)


class Marked(AvatarStream):
    """Stamps frames with how many were handed out, and keeps how much was said before each that has sound."""

    handed = said = 0
    places: dict[int, int] = {}  # noqa: RUF012 (of the one stream of this process)

    def _hand_out(self) -> Beat:
        beat = super()._hand_out()
        number = Marked.handed = Marked.handed + 1
        picture = beat.picture.copy()
        for bit in range(BITS):
            row, column = divmod(bit, 7)
            picture[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 255 * (number >> bit & 1)
        if len(beat.sound):
            Marked.places[number] = Marked.said
        Marked.said += len(beat.sound)
        return Beat(beat.number, picture, beat.sound, beat.due, beat.ended)


def read_stamp(picture: np.ndarray) -> int:
    """The number of a frame [H, W, 3]."""
    cells = (divmod(bit, 7) for bit in range(BITS))
    return sum(int(picture[8 * row + 4, 8 * column + 4, 0] > 127) << bit for bit, (row, column) in enumerate(cells))


def a_sentence(text: str) -> np.ndarray:
    """int16 [n] at RATE, no sample of which is zero."""
    sound = resample(torch.cat(list(formant_voice(text))), 16_000, RATE)
    pcm = (sound * 32767).round().short().numpy()
    return np.where(pcm == 0, 1, pcm).astype(np.int16)


class Recorder:
    """What comes out of a door: `sound` (time, samples that are not zero, or above QUIET where it is `lossy`), `video` (time,
    number)."""

    def __init__(self, lossy: bool = False):
        self.lossy = lossy
        self.sound: list[tuple[float, np.ndarray]] = []
        self.video: list[tuple[float, int]] = []

    def hear(self, at: float, block: np.ndarray) -> None:
        self.sound.append((at, block[np.abs(block.astype(int)) > QUIET if self.lossy else block != 0]))

    def see(self, at: float, picture: np.ndarray) -> None:
        number = read_stamp(picture)
        if not self.video or self.video[-1][1] != number:  # a transport may repeat what it shows
            self.video.append((at, number))

    def sound_times(self) -> tuple[np.ndarray, np.ndarray]:
        """Samples heard before each block that has some, and the block's time."""
        blocks = [(at, len(block)) for at, block in self.sound if len(block)]
        counts = np.cumsum([0] + [count for _, count in blocks])[:-1]
        return counts, np.array([at for at, _ in blocks])

    def offsets(self) -> np.ndarray:
        """Seconds by which each frame that has sound follows its first sample."""
        counts, times = self.sound_times()
        out = []
        for at, number in self.video:
            if (place := Marked.places.get(number)) is not None and place < counts[-1]:
                i = np.searchsorted(counts, place, side="right") - 1
                out.append(at - (times[i] + (place - counts[i]) / RATE))
        return np.array(out)

    def clear(self) -> None:
        self.sound.clear()
        self.video.clear()
        Marked.places.clear()
        Marked.said = 0


class LiveKit:
    """The LiveKit door."""

    async def open(self, engine: Engine, portrait: torch.Tensor) -> "LiveKit":
        from livekit import rtc
        from livekit.agents.voice.avatar import DataStreamAudioOutput

        from benchmarks.serving.livekit_room import Tape, a_room
        from distill.live.doors import livekit_agent as door

        self.rtc, self.tape = rtc, Recorder()
        door.AvatarStream = Marked
        agent, avatar = a_room()
        play = door.play(engine, avatar, door.receiver_of(avatar, "agent"), portrait, "a person talks", 0)
        self.playing = asyncio.create_task(play)
        self.output = DataStreamAudioOutput(agent, destination_identity="avatar", wait_playback_start=True)

        self.recording = Tape(avatar.local_participant, RATE, self.tape.hear, self.tape.see)
        await avatar.local_participant.published.wait()
        return self

    async def say(self, pcm: np.ndarray) -> None:
        for piece in np.array_split(pcm, max(1, len(pcm) // 2400)):
            await self.output.capture_frame(self.rtc.AudioFrame(piece.tobytes(), RATE, 1, len(piece)))
        self.output.flush()

    async def done(self) -> None:
        await self.output.wait_for_playout()

    async def interrupt(self) -> None:
        self.output.clear_buffer()

    async def close(self) -> None:
        self.playing.cancel()
        await asyncio.gather(self.playing, return_exceptions=True)
        await self.recording.stop()


class LiveKitRoom(LiveKit):
    """The LiveKit door over WebRTC."""

    async def open(self, engine: Engine, portrait: torch.Tensor) -> "LiveKitRoom":
        from livekit import api, rtc
        from livekit.agents.voice.avatar import DataStreamAudioOutput

        from benchmarks.serving.livekit_room import listen, look
        from distill.live.doors import livekit_agent as door

        door.AvatarStream = Marked
        self.rtc, self.tape, self.tasks = rtc, Recorder(lossy=True), []
        command = (sys.executable, "-m", "benchmarks.serving.livekit_server")
        self.server = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        url = (await self.server.stdout.readline()).decode().strip()

        def token(identity: str, kind: str) -> str:
            made = api.AccessToken("key", "secret" * 8).with_identity(identity).with_kind(kind)
            return made.with_grants(api.VideoGrants(room_join=True, room="a room")).to_jwt()

        def subscribe(track, *_: object) -> None:
            audio = track.kind == rtc.TrackKind.KIND_AUDIO
            work = listen(track, RATE, self.tape.hear) if audio else look(track, self.tape.see)
            self.tasks.append(asyncio.create_task(work))

        self.agent, self.user = rtc.Room(), rtc.Room()
        self.user.on("track_subscribed", subscribe)
        await self.agent.connect(url, token("agent", "agent"))
        await self.user.connect(url, token("user", "standard"))
        attending = door.attend(engine, url, token("avatar", "agent"), portrait, "a person talks")
        self.playing = asyncio.create_task(attending)
        self.output = DataStreamAudioOutput(
            self.agent,
            destination_identity="avatar",
            wait_remote_track=rtc.TrackKind.KIND_VIDEO,
            wait_playback_start=True,
        )
        while len(self.tape.video) < 25:
            await asyncio.sleep(0.1)
        return self

    async def close(self) -> None:
        for task in (*self.tasks, self.playing):
            task.cancel()
        await asyncio.gather(*self.tasks, self.playing, return_exceptions=True)
        await self.agent.disconnect()
        await self.user.disconnect()
        self.server.kill()
        await self.server.wait()


class Pipecat:
    """The Pipecat door."""

    async def open(self, engine: Engine, portrait: torch.Tensor) -> "Pipecat":
        from loguru import logger
        from pipecat.frames import frames
        from pipecat.pipeline.pipeline import Pipeline
        from pipecat.pipeline.worker import PipelineParams, PipelineWorker
        from pipecat.workers.runner import WorkerRunner

        from benchmarks.serving.pipecat_screen import Screen
        from distill.live.doors import pipecat_service as door

        logger.remove()
        door.AvatarStream = Marked
        self.frames, tape = frames, Recorder()
        self.tape, self.stopped, ready = tape, asyncio.Event(), asyncio.Event()
        spec = engine.bundle.spec

        screen = Screen((spec.height, spec.width), tape.hear, tape.see)
        service = door.AvatarVideoService(engine, portrait)
        self.worker = PipelineWorker(
            Pipeline([service, screen]), cancel_on_idle_timeout=False, params=PipelineParams(audio_out_sample_rate=RATE)
        )
        self.worker.set_reached_downstream_filter((frames.TTSStoppedFrame,))

        @self.worker.event_handler("on_pipeline_started")
        async def _begin(*_) -> None:
            ready.set()

        @self.worker.event_handler("on_frame_reached_downstream")
        async def _stopped(*_) -> None:
            self.stopped.set()

        runner = WorkerRunner()
        await runner.add_workers(self.worker)
        self.running = asyncio.create_task(runner.run())
        await ready.wait()
        return self

    async def say(self, pcm: np.ndarray) -> None:
        self.stopped.clear()
        await self.worker.queue_frame(self.frames.TTSStartedFrame())
        for piece in np.array_split(pcm, max(1, len(pcm) // 2400)):
            await self.worker.queue_frame(self.frames.TTSAudioRawFrame(piece.tobytes(), RATE, 1))
        await self.worker.queue_frame(self.frames.TTSStoppedFrame())

    async def done(self) -> None:
        await self.stopped.wait()

    async def interrupt(self) -> None:
        await self.worker.queue_frame(self.frames.InterruptionFrame())

    async def close(self) -> None:
        await self.worker.queue_frame(self.frames.EndFrame())
        await self.running


DOORS = {"livekit": LiveKit, "room": LiveKitRoom, "pipecat": Pipecat}


def spread(values, scale: float = 1000.0) -> dict[str, float]:
    """Milliseconds."""
    low, p50, p95, high = np.percentile(np.array(values) * scale, (0, 50, 95, 100)).round(1)
    return {"n": len(values), "min": low, "p50": p50, "p95": p95, "max": high}


async def long_speech(door, minutes: float) -> dict:
    """One sentence of so long, pushed at once."""
    pcm = np.concatenate([a_sentence(SENTENCES[i % len(SENTENCES)]) for i in range(8)])
    pcm = np.resize(pcm, round(minutes * 60 * RATE))
    door.tape.clear()
    began = time.monotonic()
    await door.say(pcm)
    pushed = time.monotonic() - began
    await door.done()
    await asyncio.sleep(0.5)
    heard = np.concatenate([block for _, block in door.tape.sound])
    counts, times = door.tape.sound_times()
    holes = np.diff(times) - np.diff(counts) / RATE
    offsets = door.tape.offsets()
    minute = len(offsets) // max(1, round(minutes))
    return {
        "seconds": len(pcm) / RATE,
        "pushed_in_s": round(pushed, 2),
        "all_samples_in_order": bool(len(heard) == len(pcm) and np.array_equal(heard, pcm)),
        "offset_ms": spread(offsets),
        "over_a_frame": int((np.abs(offsets) > 1 / door.fps).sum()),
        "offset_ms_by_minute": [
            float(np.median(offsets[i : i + minute]).round(4) * 1000) for i in range(0, len(offsets), minute)
        ],
        "frames": len(offsets),
        "holes_over_15_ms": int((holes > 0.015).sum()),
        "longest_hole_ms": round(float(holes.max()) * 1000, 1),
    }


async def turns(door, count: int) -> dict:
    """Sentences one after the other, with a pause."""
    first_frame, first_sound, offsets = [], [], []
    for i in range(count):
        door.tape.clear()
        sentence = a_sentence(SENTENCES[i % len(SENTENCES)])
        asked = time.monotonic()
        await door.say(sentence)
        await door.done()
        await asyncio.sleep(0.3 + 0.05 * (i % 7))
        first_sound.append(door.tape.sound_times()[1][0] - asked)
        first_frame.append(next(at for at, number in door.tape.video if number in Marked.places) - asked)
        if not door.tape.lossy:
            offsets += door.tape.offsets().tolist()
    begins = np.array(first_frame) - np.array(first_sound)
    return {
        "first_frame_after_first_audio_ms": spread(first_frame),
        "first_sound_ms": spread(first_sound),
        "first_frame_behind_first_sound_ms": spread(begins),
        **({"offset_ms": spread(offsets)} if offsets else {}),
    }


async def interrupts(door, count: int) -> dict:
    """Sentences that are interrupted, each followed by a short one."""
    quiet, clean = [], 0
    short = a_sentence("Yes, mama.")
    for i in range(count):
        door.tape.clear()
        await door.say(np.concatenate([a_sentence(text) for text in SENTENCES]))
        while not Marked.places:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5 + 0.073 * (i % 11))
        at = time.monotonic()
        await door.interrupt()
        await asyncio.sleep(0.6)
        quiet.append(max(heard + len(block) / RATE for heard, block in door.tape.sound if len(block)) - at)
        door.tape.clear()
        await door.say(short)
        await asyncio.sleep(len(short) / RATE + 1.0)
        heard = np.concatenate([block for _, block in door.tape.sound])
        clean += len(heard) <= len(short) if door.tape.lossy else np.array_equal(heard, short)
    return {"last_sound_after_interrupt_ms": spread(quiet), "only_the_new_sentence_after_it": f"{clean} of {count}"}


async def measure(args: argparse.Namespace) -> dict:
    bundle = load_student(args.student)
    engine = Engine(bundle, Echo(), 2)
    portrait = read_portraits([], (bundle.spec.height, bundle.spec.width))[0]
    engine.warm_up(portrait)
    engine.start()
    door = await DOORS[args.door]().open(engine, portrait)
    door.fps = float(bundle.spec.fps)
    await asyncio.sleep(1.0)
    results = {"door": args.door, "fps": door.fps, "torch": torch.__version__}
    try:
        for name, part in (
            ("turns", lambda: turns(door, args.turns)),
            ("interrupts", lambda: interrupts(door, args.interrupts)),
            *((("long", lambda: long_speech(door, args.minutes)),) if args.door != "room" else ()),
        ):
            results[name] = await part()
            sys.stderr.write(json.dumps({name: results[name]}) + "\n")
        results["step_ms"] = spread(engine.recent)
    finally:
        await door.close()
        await asyncio.to_thread(engine.stop)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("door", choices=DOORS)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--interrupts", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = asyncio.run(measure(args))
    text = json.dumps(results, indent=1)
    sys.stdout.write(text + "\n")
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
