"""The straightforward chunk loop that the session is measured against: file in, file out, over the same network and noise.

    python benchmarks/plain_loop.py --student DIR [--chunks 24] [--rounds 7]
    python benchmarks/plain_loop.py --shape livetalk           # random weights of a published size, as `distill bench` has them

Around the network it does what published code does: a cache for each layer that is cloned on every roll, its ends read with
`.item()`, time embedded anew in every call, decoding after the loop, no_grad. Keys are kept un-rotated and rotated again in every
call, as positions relative to a rolling window ask for. The text is embedded and made keys and values in every call; Self Forcing
and LiveTalk keep those of the first one, which is `keep_text`.
"""

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distill.commands.bench import SHAPES, make_scene, random_student
from eval.speed import latency
from eval.speed.latency import Scene
from students.serving.inputs import encode_window
from students.serving.session import chunk_noise
from students.spec import Spec
from students.weights.checkpoint import Bundle, load_student
from teachers import flow
from teachers.codecs.linear import to_uint8
from teachers.conditions import Conditions, pack_rows
from teachers.errors import UserError
from teachers.networks.kind import KeyValue, to_x0
from teachers.networks.spans import rotate
from teachers.networks.wan import NetworkConfig, with_reference


@dataclass
class LayerCache:
    """Keys and values [1, room, M, d] of one layer, and where they end: in the cache, and in the stream."""

    keys: Tensor
    values: Tensor
    local_end: Tensor
    global_end: Tensor


def can_run(spec: Spec) -> bool:
    """Whether the loop knows this student: an avatar DiT with sinks and a rolling window, a context pass, one chunk at a time."""
    history = spec.history
    plain = history.commit == "clean" and history.memory == 0 and spec.schedule.depth == 1 and len(history.parts) == 1
    return plain and isinstance(spec.network, NetworkConfig) and not history.refine_every and spec.guidance is None


@torch.no_grad()
def naive_loop(bundle: Bundle, scene: Scene, num_chunks: int, keep_text: bool = False) -> Tensor:
    """All frames uint8 [T, H, W, 3] of `num_chunks` chunks, equal to the session's up to rounding."""
    spec, net, codec = bundle.spec, bundle.student.net, bundle.codec
    if not can_run(spec):
        raise UserError(f"plain loop: it knows no {spec.history}; use one with a clean context pass and no memory")
    conditions = _conditions(bundle, scene, num_chunks)
    n, tokens = spec.chunk_frames, spec.token_grid[0] * spec.token_grid[1]
    sinks, caches = spec.history.sinks * n * tokens, _caches(bundle, num_chunks, n * tokens)
    text = net.read_text(conditions.text) if keep_text else conditions.text
    latents = []

    def predict(x: Tensor, sigma: float, chunk: int) -> Tensor:
        known = (0,) if chunk == 0 else ()
        part = conditions.frames(chunk * n, (chunk + 1) * n)
        x, inputs = with_reference(x, part, known)
        level = torch.full((x.shape[0], n), sigma, device=x.device)
        ends = [_make_room(cache, (chunk + 1) * n * tokens, sinks) for cache in caches]
        seen = ends[0] - n * tokens
        past = (
            [_past(cache, seen, net.rope_table(0, seen // tokens, *spec.token_grid)) for cache in caches]
            if seen
            else None
        )
        out, made = net(inputs, level, text, part.audio, past=past, past_frames=seen // tokens, pose=part.pose)
        for cache, end, (keys, values) in zip(caches, ends, made, strict=True):
            cache.keys[:, seen:end], cache.values[:, seen:end] = keys, values
            cache.local_end.fill_(end)
            cache.global_end.fill_((chunk + 1) * n * tokens)
        return to_x0(out, x, level, part, spec.network.prediction, known)

    for chunk in range(num_chunks):
        x = x0 = chunk_noise(spec, scene.seed, chunk, 0).to(conditions.audio.device)
        for step, sigma in enumerate(spec.sigmas):
            x0 = predict(x, sigma, chunk)
            if step + 1 < len(spec.sigmas):
                noise = chunk_noise(spec, scene.seed, chunk, step + 1).to(x0.device)
                x = flow.add_noise(x0, noise, spec.sigmas[step + 1])
        predict(x0, spec.history.level, chunk)
        latents.append(x0)
    return to_uint8(codec.decode(torch.cat(latents, dim=2)))[0].permute(1, 2, 3, 0).contiguous().cpu()


def _conditions(bundle: Bundle, scene: Scene, num_chunks: int) -> Conditions:
    """Those of the whole film at once."""
    spec, audio_encoder = bundle.spec, bundle.audio_encoder
    device = next(bundle.student.parameters()).device
    stop = spec.pixel_frames(num_chunks - 1)[1]
    sound = scene.sound[: stop * spec.samples_per_frame + audio_encoder.lookahead]
    window = torch.nn.functional.pad(sound, (audio_encoder.lookback, 0)).to(device)
    if spec.speakers > 1:  # the other one is silent
        window = torch.stack([window, torch.zeros_like(window)], dim=1)
    rows = encode_window(audio_encoder, window, 0, stop)
    audio = pack_rows(rows[None], spec.codec.stride)
    return Conditions(
        text=bundle.text([scene.text]).to(device),
        audio=audio,
        reference=bundle.codec.encode(scene.reference[None, :, None].float().to(device)),
        pose=audio.new_zeros(*audio.shape[:3], spec.pose_dim) if spec.pose_dim else None,
    )


def _caches(bundle: Bundle, num_chunks: int, size: int) -> list[LayerCache]:
    """Empty caches with room for all that one chunk sees and itself, `size` tokens a chunk."""
    spec, net = bundle.spec, bundle.student.net
    room = size * _room(spec, num_chunks)
    device, shape = net.patch_embedding.weight.device, (1, room, spec.network.num_heads, spec.network.head_dim)
    options, end = {"dtype": net.compute_dtype, "device": device}, {"dtype": torch.long, "device": device}
    return [
        LayerCache(
            torch.zeros(shape, **options),
            torch.zeros(shape, **options),
            torch.zeros(1, **end),
            torch.zeros(1, **end),
        )
        for _ in net.blocks
    ]


def _room(spec: Spec, num_chunks: int) -> int:
    """Chunks in a cache, the present one included."""
    capacity = spec.history.capacity
    return num_chunks if capacity is None else capacity + 1


def _make_room(cache: LayerCache, global_end: int, sinks: int) -> int:
    """Where the tokens that end at `global_end` of the stream will end in the cache; rolls it where it is full."""
    size = cache.keys.shape[1]
    end = int(cache.local_end.item()) + global_end - int(cache.global_end.item())
    evicted = max(0, end - size)
    if evicted:
        for tensor in (cache.keys, cache.values):
            tensor[:, sinks : size - evicted] = tensor[:, sinks + evicted :].clone()
    return end - evicted


def _past(cache: LayerCache, seen: int, rope_table: Tensor) -> KeyValue:
    return rotate(cache.keys[:, :seen], rope_table), cache.values[:, :seen]


def compare(bundle: Bundle, num_chunks: int, rounds: int) -> str:
    """A table of milliseconds a chunk: the session, and both loops with their ratio to it and the largest difference of frames."""
    scene = make_scene(bundle.spec, num_chunks)
    shown = torch.cat([chunk.frames for chunk in latency.stream(bundle, scene, num_chunks).chunks]).int()
    loops = {
        name: lambda keep=keep: naive_loop(bundle, scene, num_chunks, keep)
        for name, keep in (("plain loop", False), ("plain loop, text kept", True))
    }
    differences = {name: int((loop().int() - shown).abs().max()) for name, loop in loops.items()}
    took = latency.interleave(
        {"session": lambda: latency.stream(bundle, scene, num_chunks).took.seconds}
        | {name: (lambda loop=loop: latency.clocked(loop).seconds) for name, loop in loops.items()},
        rounds,
    )
    rows = ["| | ms a chunk | / session | grey levels |", "|---|---|---|---|"]
    for name, seconds in took.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, took["session"], strict=True))
        rows.append(
            f"| {name} | {1e3 * statistics.median(seconds) / num_chunks:.2f} | {ratio:.2f} | {differences.get(name, 0)} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--student", type=Path, metavar="DIR")
    source.add_argument("--shape", choices=tuple(SHAPES))
    parser.add_argument("--chunks", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.shape:
        bundle = random_student(SHAPES[args.shape], device, torch.bfloat16)
    else:
        bundle = load_student(args.student).to(device)
    print(compare(bundle, args.chunks, args.rounds))


if __name__ == "__main__":
    main()
