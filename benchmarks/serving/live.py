"""Minutes with one avatar, in real time: a viewer who talks to it, interrupts it, changes its text and is silent; a row a minute.

    python benchmarks/serving/live.py --run runs/dmd_avatar [--minutes 30] [--talker formant] [--seed 0] [--json OUT]

The server is `distill serve` in a process of its own, whose memory is read. Each minute is scored as the viewer
got it: lag of the mouth behind the loudness (frames) and their correlation, mean distance of the identity from the portrait's,
latency of the turns. A script, not a test; it writes nothing but OUT.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from tqdm import tqdm

from distill.commands.serving import read_portraits
from distill.live.client import Client
from eval.embedded.extractors import Probes
from eval.metrics.sync import correlation
from students.weights.checkpoint import load_student
from teachers.codecs.linear import to_uint8
from teachers.errors import UserError

SENTENCES = (
    "Good morning, how may I help you today?",
    "The train to the lake leaves at ten past nine, from the last platform.",
    "Yes.",
    "I would take the smaller one, it is lighter and much cheaper.",
    "Mama, papa, a boat, a moon, and nobody at home.",
)
TEXT_ENCODERS = (
    "a person talks",
    "someone nods along while talking, with a calm face",
    "a person smiles and shakes the head",
)


def act(client: Client, rng: random.Random) -> str:
    """One thing that a viewer does, played to its end; its name."""
    what = rng.choices(("talk", "interrupt", "text", "silence"), (5, 2, 1, 2))[0]
    if what == "silence":
        client.pump(rng.uniform(1.0, 4.0))
    elif what == "text":
        client.send(type="text", text=rng.choice(TEXT_ENCODERS))
        client.pump(0.5)
    elif what == "talk":
        client.converse(rng.choice(SENTENCES))
    else:
        client.ask(rng.choice(SENTENCES))
        client.pump(rng.uniform(0.1, 2.0))
        client.send(type="interrupt")
        client.pump(0.5)
    return what


def envelope_sync(opening: torch.Tensor, audio: torch.Tensor, samples_per_frame: int) -> dict[str, float]:
    """Correlation of the mouth opening [T] in the video with the loudness (log RMS a frame), for speech without labels.

    Returns `envelope` at lag 0 and `envelope_offset_frames`, the lag in -4..4 with the largest correlation (positive:
    the video lags).
    """
    frames = min(len(opening), len(audio) // samples_per_frame)
    if frames < 10:
        raise UserError(f"the loudness envelope needs at least 10 frames of sound: got {frames}; give a longer sound")
    rms = audio[: frames * samples_per_frame].double().reshape(frames, -1).square().mean(1).sqrt()
    loudness = (rms + 1e-3).log()
    opening = opening[:frames].double()

    def at(lag: int) -> float:
        return correlation(opening[max(lag, 0) : frames + min(lag, 0)], loudness[max(-lag, 0) : frames - max(lag, 0)])

    best = max(sorted(range(-4, 5), key=abs), key=at)
    return {"envelope": at(0), "envelope_offset_frames": float(best)}


def score(client: Client, first: int, probes: Probes, known: torch.Tensor) -> dict[str, float]:
    """Of the frames from `first` on that were seen; they are forgotten then."""
    numbers = [n for n in range(first, client.last + 1) if n in client.frames]
    film = torch.from_numpy(np.stack([client.frames.pop(n) for n in numbers])).permute(3, 0, 1, 2)[None]
    sound = torch.from_numpy(np.concatenate([client.sound.pop(n) for n in numbers]))
    reading = probes.read(film)
    found = envelope_sync(
        reading.mouth[0, :, 0] if reading.mouth.ndim == 3 else reading.mouth[0], sound, client.samples
    )
    return {**found, "identity_gap": float((reading.identity - known).square().mean()), "frames": len(numbers)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--minutes", type=int, default=30)
    parser.add_argument("--talker", default="formant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    student, rng = args.run / "student", random.Random(args.seed)
    spec = load_student(student).spec
    probes = Probes.load(args.run / "stages" / "extractors")
    portrait = to_uint8(read_portraits([], (spec.height, spec.width))[0])[None, :, None].expand(-1, -1, 2, -1, -1)
    known = probes.read(portrait).identity[:, :1]
    command = [sys.executable, "-m", "distill", "serve", "--student", student, "--port", "0", "--talker", args.talker]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as server:
        assert server.stdout is not None
        address = server.stdout.readline().split()[0]
        process, rows, deeds, first = psutil.Process(server.pid), [], 0, 0
        client = Client(address.replace("http", "ws") + "live")
        client.open(seed=args.seed)
        began = time.monotonic()
        for minute in tqdm(range(args.minutes), unit="min", desc="live"):
            while time.monotonic() - began < 60 * (minute + 1):
                act(client, rng)
                deeds += 1
            latencies = [answer.latency for answer in client.answers.values() if answer.seen is not None]
            row = score(client, first, probes, known) | {"latency": statistics.median(latencies), "deeds": deeds}
            rows.append({**row, "resident_mib": process.memory_info().rss / 2**20, "stalls": client.stalls})
            first = client.last + 1
            client.answers = dict(list(client.answers.items())[-1:])
            tqdm.write(json.dumps({name: round(value, 3) for name, value in rows[-1].items()}))
        client.close()
        server.terminate()
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
