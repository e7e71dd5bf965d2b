"""`distill bench`: first frame, chunk times, real-time factor, memory and roofline of a student."""

import argparse
import json
import os
import resource
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.commands import devices
from distill.data.procedural import speech
from distill.pipeline.run_folder import revision, versions
from eval.speed import latency, roofline
from eval.speed.latency import Scene, Streamed, Took, spread
from students.history import History
from students.serving.optimize import DTYPES, Speed, prepare
from students.serving.session import Chunk
from students.spec import Spec, student_sigmas
from students.weights.checkpoint import Bundle, load_student, make_student
from teachers import media
from teachers.codecs.linear import CodecConfig
from teachers.codecs.taehv import TAEHV
from teachers.encoders.small import AudioConfig, TextConfig
from teachers.errors import UserError
from teachers.files import atomic_write
from teachers.flow import keyed_generator
from teachers.networks.wan import NetworkConfig

TEXT = "a person talks"
MIB, GIGA = 2**20, 1e9


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A student that is drawn at random, by default of Wan 2.1 1.3B's size with OmniAvatar's audio pack, Wan's latents, TAEHV."""

    height: int
    width: int
    history: History
    network: NetworkConfig = field(default_factory=NetworkConfig)
    text: TextConfig = field(default_factory=lambda: TextConfig(dim=4096, max_tokens=512))
    audio_dim: int = 10752  # 14 layers of wav2vec2-base a pixel frame
    decoder_widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    encoder_width: int = 64

    @property
    def spec(self) -> Spec:
        """LiveTalk's: 16 fps, chunks of 3 latent frames, 4 steps with shift 5."""
        fps = Fraction(16)
        samples = int(16_000 / fps)
        return Spec(
            height=self.height,
            width=self.width,
            fps=fps,
            chunk_frames=3,
            sigmas=student_sigmas(4, 5.0),
            horizon_frames=21,
            history=self.history,
            network=self.network,
            codec=CodecConfig(stride=4, patch=8, channels=16),
            audio=AudioConfig(num_mels=self.audio_dim, hop=samples, window=samples),
            text=self.text,
        )


SHAPES = {
    "livetalk": Shape(height=512, width=512, history=History(sinks=3, window=1)),
    "480x832": Shape(height=480, width=832, history=History(sinks=0, window=6)),
    "cpu": Shape(  # LiveTalk's in small: 64 tokens a latent frame, 40 M parameters
        height=128,
        width=128,
        history=History(sinks=3, window=1),
        network=NetworkConfig(num_layers=8, num_heads=4, ffn_dim=2048),
        decoder_widths=(64, 32, 16, 16),
        encoder_width=16,
    ),
}


class AnyText(nn.Module):
    """Features of no text in particular, in place of a text encoder."""

    features: Tensor

    def __init__(self, config: TextConfig):
        super().__init__()
        self.register_buffer("features", torch.randn(1, config.max_tokens, config.dim))

    def count(self, text: str) -> int:
        """Words, for tokens."""
        return len(text.split())

    def forward(self, text: list[str]) -> Tensor:
        return self.features.expand(len(text), -1, -1)


class AnyAudio(nn.Module):
    """The samples of a pixel frame over and over, in place of an audio encoder."""

    order: Tensor

    lookback = lookahead = 0

    def __init__(self, dim: int, samples_per_frame: int):
        super().__init__()
        self.register_buffer("order", torch.arange(dim) % samples_per_frame)

    def rows(self, window: Tensor, first: int, last: int) -> Tensor:
        """Samples [(last - first) n] -> rows [last - first, A]."""
        return window.unflatten(-1, (last - first, -1))[..., self.order]


@contextmanager
def made_as(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """New tensors lie on `device` and are `dtype` from the start, so that no fp32 copy of a large network is made."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def random_student(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Bundle:
    """A student of this shape with random weights, TAEHV, and stand-ins for the encoders of audio and text."""
    spec = shape.spec
    with torch.random.fork_rng(), made_as(device, dtype):
        torch.manual_seed(seed)
        student = make_student(spec)
        nn.init.xavier_uniform_(student.net.proj_out.weight)  # zero before training
        codec: Any = TAEHV(shape.decoder_widths, shape.encoder_width)
        audio_encoder: Any = AnyAudio(shape.audio_dim, spec.samples_per_frame)
        text: Any = AnyText(shape.text)
    kept = set(student.net._keep_in_fp32_modules or ())
    for name, parameter in student.net.named_parameters():
        if kept & set(name.split(".")):
            parameter.data = parameter.data.float()
    return Bundle(student.eval().requires_grad_(False), codec, audio_encoder, text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `distill bench`."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--student", type=Path, metavar="DIR", help="folder of an exported student")
    source.add_argument("--shape", choices=tuple(SHAPES), help="a student of this shape with random weights")
    parser.add_argument("--json", type=Path, required=True, metavar="OUT", help="file for all numbers")
    parser.add_argument("--audio", type=Path, metavar="WAV", help="speech, repeated as needed (default: made)")
    parser.add_argument("--chunks", type=int, default=24, metavar="N", help="chunks of a stream (default 24)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="streams to measure (default 7)")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch (default: its own choice)")
    devices.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the numbers and return 0. Raises UserError in one line."""
    _check_options(args)
    ranks = devices.share(args)
    device, speed = devices.choose(args, "student" if ranks is None or ranks.is_main else "")
    sound = None if args.audio is None else media.read_audio(args.audio, speech.SAMPLE_RATE)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads)
    try:
        if args.shape:
            bundle = random_student(SHAPES[args.shape], device, DTYPES[speed.dtype])
            name = f"{args.shape}, random weights"
            left_out = ["audio encoder", "text encoder"]
        else:
            bundle, name, left_out = load_student(args.student), str(args.student), []
        bundle = bundle if ranks is None else devices.split(bundle, ranks)
        scene = make_scene(bundle.spec, args.chunks, sound)
        result = bench(bundle, scene, args.chunks, args.rounds, device, speed)
    finally:
        torch.set_num_threads(threads)
    if ranks is not None and not ranks.is_main:
        return 0
    shared = {} if ranks is None else {"ranks": ranks.world_size}
    result = {"student": name, **shared, "left_out": left_out, **result, "versions": versions(), "revision": revision()}
    atomic_write(args.json, json.dumps(result, indent=1) + "\n")
    sys.stdout.write(table(result))
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Raises UserError for what cannot be measured, before anything is loaded."""
    if args.chunks < 2:
        raise UserError(f"--chunks: got {args.chunks}; the first chunk is special, so from 2")
    for name in ("rounds", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}: got {value}; from 1")
    if args.json.is_dir():
        raise UserError(f"--json is a folder: {args.json}; name a file in it")
    if not args.json.parent.is_dir() or not os.access(args.json.parent, os.W_OK):
        raise UserError(f"--json: no folder to write in: {args.json.parent}; make it first")


def make_scene(spec: Spec, num_chunks: int, sound: Tensor | None = None, seed: int = 0) -> Scene:
    """Something to draw: a soft picture, a text, and enough of `sound` [S] at 16 kHz, or of made speech."""
    rng = keyed_generator(seed, "bench")
    samples = (
        spec.pixel_frames(num_chunks)[1] * spec.samples_per_frame
    )  # a chunk more, for the audio encoder's look-ahead
    if sound is None:
        sound = speech.synthesise(1, samples, rng).audio[0]
    rough = 0.4 * torch.randn(1, 3, 4, 4, generator=rng)
    picture = nn.functional.interpolate(rough, size=(spec.height, spec.width), mode="bicubic")[0].clamp(-1, 1)
    return Scene(picture, TEXT, sound.repeat(-(-samples // len(sound)))[:samples], seed)


def bench(
    bundle: Bundle, scene: Scene, num_chunks: int, rounds: int, device: torch.device, speed: Speed
) -> dict[str, Any]:
    """All numbers of one student; spreads are over the rounds.

    In each round the session and the bare work of a chunk take turns. `overhead_network` is what a chunk of the
    session takes beyond the same network calls with prepared inputs in one thread (share of theirs), `overhead_all` beyond these
    with encoders and codec; all with a context as full as the last chunk's. The session's commit may run beside its decoder (a
    thread of its own on a CPU), so it can be negative; `cpu_seconds` count all threads.
    """
    spec, on_cuda = bundle.spec, device.type == "cuda"
    prepare(bundle, device, Speed(dtype=speed.dtype))
    before = torch.cuda.memory_allocated(device) if on_cuda else 0
    work = latency.chunk_work(bundle, scene, num_chunks - 1)
    held = torch.cuda.memory_allocated(device) - before if on_cuda else 0  # by the bench, not by the session
    flops = {name: roofline.count_flops(getattr(work, name)) for name in ("network", "encoders", "decode")}
    if speed.compile != "none":
        torch._dynamo.config.recompile_limit = 8 + 2 * num_chunks  # a static shape for each length of the context
    prepare(bundle, device, speed)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    warm = latency.stream(bundle, scene, num_chunks)
    memory = torch.cuda.max_memory_allocated(device) - held if on_cuda else _peak_rss()
    timed = latency.stream(bundle, scene, num_chunks, timed=True)
    settled = latency.settled_chunks(spec, num_chunks)
    work.all()
    results: dict[str, list[Any]] = latency.interleave(
        {
            "session": lambda: latency.stream(bundle, scene, num_chunks),
            "first": lambda: latency.stream(bundle, scene, 1, timed=True),
            "network": lambda: latency.clocked(work.network, len(settled)),
            "all": lambda: latency.clocked(work.all, len(settled)),
        },
        rounds,
    )
    ceiling = roofline.matmul_ceiling(device, DTYPES[speed.dtype])
    sessions = results["session"]
    full = torch.stack([_seconds(session.steps[i] for i in settled).mean(0) for session in sessions])
    network, everything = _seconds(results["network"]), _seconds(results["all"])
    return {
        "device": devices.device_name(device),
        "threads": torch.get_num_threads(),
        **vars(speed),
        "height": spec.height,
        "width": spec.width,
        "frame_rate": float(spec.fps),
        "chunk_frames": len(warm.chunks[-1].frames),
        "chunks": num_chunks,
        "rounds": rounds,
        "nfe_per_chunk": spec.nfe_per_chunk,
        **_session_numbers(spec, sessions, results["first"]),
        "chunk_parts": _parts([timed.chunks[i] for i in settled]),
        "peak_memory_bytes": memory,
        "peak_memory_of": "cuda allocator" if on_cuda else "process",
        "flops_per_chunk": flops,
        "matmul_flops_per_second": ceiling,
        "roofline_fraction": sum(flops.values()) / (statistics.median(full[:, 0].tolist()) * ceiling),
        "per_chunk": _spreads(_seconds(session.took for session in sessions) / num_chunks),
        "full_chunk": _spreads(full),
        "network": _spreads(network),
        "network_encoders_codec": _spreads(everything),
        "overhead_network": _spreads(full / network - 1),
        "overhead_all": _spreads(full / everything - 1),
    }


def _session_numbers(spec: Spec, sessions: list[Streamed], firsts: list[Streamed]) -> dict[str, Any]:
    """First frame, chunk times and rates of whole streams; the first frame's split is of streams that were timed in parts."""
    steps = [step.seconds for session in sessions for step in session.steps]
    lengths = [len(chunk.frames) / float(spec.fps) for session in sessions for chunk in session.chunks]
    share = statistics.median(session.took.seconds for session in sessions) * len(sessions) / sum(lengths)
    return {
        "ttff_seconds": statistics.median(session.opening + session.steps[0].seconds for session in sessions),
        "ttff": {"open": statistics.median(first.opening for first in firsts)}
        | _parts([first.chunks[0] for first in firsts]),
        **{f"p{percent}_chunk_seconds": latency.percentile(steps, percent) for percent in (50, 95, 99)},
        "real_time_factor": share,
        "fps": float(spec.fps) / share,
        "stalls": sum(took > length for took, length in zip(steps, lengths, strict=True)),
        "stalls_of": len(steps),
    }


def _parts(chunks: Sequence[Chunk]) -> dict[str, float]:
    """The median seconds of each part of the work."""
    return {name: statistics.median(chunk.seconds[name] for chunk in chunks) for name in chunks[0].seconds}


def _seconds(took: Iterable[Took]) -> Tensor:
    """[n, 2]: by the clock, and of the CPU."""
    return torch.tensor([(one.seconds, one.cpu_seconds) for one in took], dtype=torch.float64)


def _spreads(rounds: Tensor) -> dict[str, dict[str, float]]:
    """Of each column of [n, 2]."""
    return {name: spread(rounds[:, i].tolist()) for i, name in enumerate(("seconds", "cpu_seconds"))}


def _peak_rss() -> int:
    """Bytes of memory that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def table(result: dict[str, Any]) -> str:
    """The numbers for people: milliseconds, median (min .. max over rounds); CPU counts all threads."""

    def ms(seconds: float) -> str:
        return f"{1e3 * seconds:.2f}"

    def over(values: dict[str, float], scale: float = 1.0, digits: int = 2) -> str:
        middle, low, high = (f"{scale * values[name]:.{digits}f}" for name in ("median", "min", "max"))
        return f"{middle} ({low} .. {high})"

    def both(values: dict[str, dict[str, float]]) -> str:
        return f"{over(values['seconds'], 1e3)} ms, CPU {over(values['cpu_seconds'], 1e3)} ms"

    def above(values: dict[str, dict[str, float]]) -> str:
        return f"overhead {over(values['seconds'], 100, 1)} %, CPU {over(values['cpu_seconds'], 100, 1)} %"

    r = result
    split = " + ".join(f"{name} {ms(seconds)}" for name, seconds in r["ttff"].items())
    parts = ", ".join(f"{name} {ms(seconds)}" for name, seconds in r["chunk_parts"].items())
    percentiles = " / ".join(ms(r[f"p{percent}_chunk_seconds"]) for percent in (50, 95, 99))
    work, ceiling = sum(r["flops_per_chunk"].values()) / GIGA, r["matmul_flops_per_second"] / GIGA
    rows = [
        ("first frame", f"{ms(r['ttff_seconds'])} ms ({split})"),
        ("chunk p50 / p95 / p99", f"{percentiles} ms ({parts})"),
        ("real-time factor", f"{r['real_time_factor']:.4f}, {r['fps']:.1f} frames/s"),
        ("stalls", f"{r['stalls']} of {r['stalls_of']} chunks"),
        ("peak memory", f"{r['peak_memory_bytes'] / MIB:.0f} MiB ({r['peak_memory_of']})"),
        ("roofline", f"{100 * r['roofline_fraction']:.1f} % of {ceiling:.0f} GFLOP/s, {work:.4g} GFLOP a chunk"),
        ("session, whole stream, a chunk", both(r["per_chunk"])),
        ("session, a chunk of full context", both(r["full_chunk"])),
        ("its network calls alone", f"{both(r['network'])}; {above(r['overhead_network'])}"),
        ("with encoders and codec", f"{both(r['network_encoders_codec'])}; {above(r['overhead_all'])}"),
    ]
    left_out = f"not included: {', '.join(r['left_out'])}\n" if r["left_out"] else ""
    ranks = f" x {r['ranks']} that share a stream, FLOPs of one" if "ranks" in r else ""
    width = max(len(name) for name, _ in rows)
    return (
        f"{r['student']}: {r['width']}x{r['height']} at {r['frame_rate']:g} fps, chunks of {r['chunk_frames']} frames, "
        f"{r['nfe_per_chunk']} network evaluations a chunk\n"
        f"{r['device']}{ranks}, {r['threads']} threads, {r['dtype']}, compile {r['compile']}, attention {r['attention']}, "
        f"quantize {r['quantize']}, "
        f"{r['rounds']} rounds of {r['chunks']} chunks: median (min .. max)\n{left_out}"
        + "".join(f"{name:<{width}}  {value}\n" for name, value in rows)
    )
