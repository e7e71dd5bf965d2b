"""Time against the clock: of any callable, of a session's chunks, and of the bare work inside a chunk."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from students.networks.causal_wan import CausalWan
from students.serving.inputs import encode_window
from students.serving.session import Chunk, Session
from students.student import Student
from students.weights.checkpoint import Bundle
from teachers.codecs.linear import to_uint8
from teachers.codecs.streamed import DecoderState
from teachers.errors import UserError

Result = TypeVar("Result")


def wait(device: torch.device | None = None) -> None:
    """Wait for all work queued on the accelerator, where one is in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize(device if device is not None and device.type == "cuda" else None)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of all are not above (nearest rank)."""
    return sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, min and max."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def interleave(blocks: Mapping[str, Callable[[], Result]], rounds: int) -> dict[str, list[Result]]:
    """Run all blocks in turn, `rounds` times (A B A B ...), so that what else the machine does hits all of them; results by
    name and round."""
    results: dict[str, list[Result]] = {name: [] for name in blocks}
    for _ in range(rounds):
        for name, block in blocks.items():
            results[name].append(block())
    return results


def timed(
    blocks: Mapping[str, Callable[[], Result]], warmup: int, runs: int, seconds: float
) -> dict[str, list[Result]]:
    """Results of `runs` rounds of `interleave` after `warmup` rounds; of slow blocks those of as many rounds as go into `seconds`,
    one at least."""
    began = time.perf_counter()
    first = interleave(blocks, 1)
    took = time.perf_counter() - began
    if 2 * took > seconds or warmup + runs == 1:
        return first
    rest = interleave(blocks, min(warmup + runs - 1, int(seconds / took)))
    found = {name: [*first[name], *rest[name]] for name in blocks}
    return {name: results[min(warmup, len(results) - 1) :] for name, results in found.items()}


@dataclass(frozen=True)
class Took:
    """Seconds by the clock on the wall, and of all threads' CPU time."""

    seconds: float
    cpu_seconds: float


def clocked(call: Callable[[], object], repeats: int = 1) -> Took:
    """What one of `repeats` calls takes, the accelerator's work included."""
    wait()
    began = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        call()
    wait()
    return Took((time.perf_counter() - began[0]) / repeats, (time.process_time() - began[1]) / repeats)


def median_seconds(measure: Callable[[], float], warmup: int = 0, runs: int = 1) -> float:
    """The median of the seconds that `runs` calls return, after `warmup` calls that do not count."""
    return statistics.median([measure() for _ in range(warmup + runs)][warmup:])


@dataclass(frozen=True)
class Scene:
    """What a stream is given: reference [3, H, W] in [-1, 1], text, sound [S] at 16 kHz, seed."""

    reference: Tensor
    text: str
    sound: Tensor
    seed: int = 0


@dataclass(frozen=True)
class Streamed:
    """The first chunks of a session: seconds to open it (reference and text are read), what each step took as who waits for the
    frames sees it, and what all took until the last commit was done."""

    opening: float
    steps: tuple[Took, ...]
    chunks: tuple[Chunk, ...]
    took: Took


def stream(bundle: Bundle, scene: Scene, num_chunks: int, timed: bool = False) -> Streamed:
    """Open a session, push the whole sound, step `num_chunks` times. With `timed` the parts of each chunk are true on an
    accelerator too, at the price of more waiting. A pose is dropped."""
    opening, steps, chunks = [], [], []

    def play() -> None:
        start = time.perf_counter()
        session = open_session(bundle, scene, timed)
        wait()
        opening.append(time.perf_counter() - start)
        for _ in range(num_chunks):
            start = time.perf_counter(), time.process_time()
            chunk = session.step()
            steps.append(Took(time.perf_counter() - start[0], time.process_time() - start[1]))
            if not isinstance(chunk, Chunk):
                raise UserError(
                    f"sound too short: {len(chunks)} of {num_chunks} chunks could be drawn; give a longer one"
                )
            chunks.append(chunk)
        session.settle()

    took = clocked(play)
    return Streamed(opening[0], tuple(steps), tuple(chunks), took)


def open_session(bundle: Bundle, scene: Scene, timed: bool = False) -> Session:
    """A session that has all of the scene's sound and gets no pose."""
    drop = ("pose",) if bundle.spec.pose_dim else ()
    session = Session(bundle, scene.reference, scene.text, scene.seed, drop=drop, timed=timed)
    session.push(audio=scene.sound)
    return session


@dataclass(frozen=True)
class ChunkWork:
    """The work of one chunk with its inputs prepared, without the session around it: repeatable, in one thread."""

    bundle: Bundle
    calls: list[
        Callable[[], object]
    ]  # of the network: each denoising step and the context pass, or the plan and each step
    audio: Tensor  # which an avatar DiT's steps read once, together
    span: tuple[int, int]
    window: Tensor
    x0: Tensor
    decoder: DecoderState | None

    def network(self) -> None:
        """The network's calls."""
        with torch.inference_mode():
            if isinstance(self.bundle.student, CausalWan):
                self.bundle.student.net.read_audio(self.audio)
            for call in self.calls:
                call()

    def encoders(self) -> Tensor:
        """The audio encoder."""
        with torch.inference_mode():
            return encode_window(self.bundle.audio_encoder, self.window.to(self.x0.device), *self.span)

    def decode(self) -> Tensor:
        """The codec: frames uint8 [t, H, W, 3]."""
        with torch.inference_mode():
            pixels, _ = self.bundle.codec.decode_chunk(self.x0, self.decoder)
            return to_uint8(pixels)[0].permute(1, 2, 3, 0).contiguous().cpu()

    def all(self) -> None:
        """Audio encoder, network and codec, one after the other."""
        self.encoders()
        self.network()
        self.decode()


def chunk_work(bundle: Bundle, scene: Scene, chunk: int) -> ChunkWork:
    """Generate a session's chunks before number `chunk`, then that one, and record the inputs of its network calls."""
    session, spec, audio_encoder = open_session(bundle, scene), bundle.spec, bundle.audio_encoder
    for _ in range(chunk):
        session.step()
    session.settle()
    decoder, (start, stop) = session.point.decoder, spec.pixel_frames(chunk)
    window = session.inputs.audio.read(
        start * spec.samples_per_frame - audio_encoder.lookback, stop * spec.samples_per_frame + audio_encoder.lookahead
    )
    with recorded(bundle.student) as calls:
        session.step()
        session.settle()
    drawn = session.point.seen[-1]
    return ChunkWork(bundle, calls, drawn.conditions.audio, (start, stop), window, drawn.x0, decoder)


@contextmanager
def recorded(student: Student) -> Iterator[list[Callable[[], object]]]:
    """The network's calls within, to be made again: those of an avatar DiT itself, of another student its `plan` and `denoise`."""
    calls: list[Callable[[], object]] = []
    copies: dict[tuple, tuple[Tensor, Tensor]] = {}
    if isinstance(student, CausalWan):
        from accelerate.utils import recursively_apply

        def copied(value: Tensor) -> Tensor:  # once: the context's buffers are written in place
            key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
            if key not in copies:
                copies[key] = (value, value.clone())  # the original is held, so that no other tensor takes its address
            return copies[key][1]

        def keep(net: torch.nn.Module, inputs: tuple, named: dict) -> None:
            inputs, named = recursively_apply(copied, (inputs, named))
            calls.append(partial(net, *inputs, **named))

        handle = student.net.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            yield calls
        finally:
            handle.remove()
        return

    def kept(verb: Callable, *inputs: Any, **named: Any):
        calls.append(partial(verb, *inputs, **named))  # a state is a value: its buffers are written back
        return verb(*inputs, **named)

    verbs = ("plan", "denoise")
    for name in verbs:
        setattr(student, name, partial(kept, getattr(student, name)))
    try:
        yield calls
    finally:
        for name in verbs:
            delattr(student, name)


def settled_chunks(spec: Any, num_chunks: int) -> list[int]:
    """Of the first `num_chunks`, those that see as many earlier chunks as the last of them."""
    seen = [len(spec.history.visible(i)) for i in range(num_chunks)]
    return [i for i in range(1, num_chunks) if seen[i] == seen[-1]]
