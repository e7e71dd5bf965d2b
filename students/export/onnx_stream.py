"""Streams an exported student with onnxruntime and numpy alone. `python stream.py [FOLDER]` streams the inputs of parity.npz and
prints how far its latents are from those of the student's own session."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime


class OnnxStream:
    """One stream of the student in `folder`. `past`: (chunk number, keys and values of each pass) of the visible chunks."""

    def __init__(self, folder):
        self.facts = json.loads((Path(folder) / "stream.json").read_text(encoding="utf-8"))
        self.step = onnxruntime.InferenceSession(str(Path(folder) / "step.onnx"), providers=["CPUExecutionProvider"])
        self.chunk, self.past = 0, []

    def visible(self):
        """The earlier chunks that this one sees: sinks, of those that left the window every n-th, and the window."""
        facts, number = self.facts, self.chunk
        sinks, every = facts["sinks"], facts["memory_every"]
        recent = max(min(sinks, number), 0 if facts["window"] is None else number - facts["window"])
        old = range(-(-sinks // every) * every, recent, every)
        return {*range(min(sinks, number)), *old[max(0, len(old) - facts["memory"]) :], *range(recent, number)}

    def forward(self, x, sigma, index, conditions):
        """(x0, keys, values) of latents x at sigma, which is denoising step `index`."""
        n, empty = self.facts["chunk_frames"], np.zeros(self.facts["empty_past"], np.float32)
        parts = [passes[min(index, len(passes) - 1)] for _, passes in self.past]
        relative = self.facts["positions"] == "relative"
        places = [rank if relative else number for rank, (number, _) in enumerate(self.past)]
        own = len(places) if relative else self.chunk
        frames = np.array([place * n + i for place in (*places, own) for i in range(n)], np.int64)
        known = np.zeros(n, np.float32)
        known[0] = self.chunk == 0  # the portrait is the first frame of the first chunk
        given = {"x": x, "sigma": np.array([sigma], np.float32), "known": known, **conditions}
        given |= {"past_positions": frames[:-n], "positions": frames[-n:]}
        given |= {f"past_{name}": np.concatenate([empty, *(part[i] for part in parts)], axis=2)
                  for i, name in enumerate(("keys", "values"))}  # fmt: skip
        return [np.asarray(part) for part in self.step.run(None, given)]

    def next(self, noise, **conditions):
        """The next chunk's latents [1, C, n, h, w], and the cache moved on. noise [steps, 1, C, n, h, w]; conditions: text
        [1, L, D], reference [1, C, 1, h, w], the chunk's audio [1, n, stride, A], and pose, guidance where the graph has them."""
        facts = self.facts
        sigmas = facts["first_sigmas"] if self.chunk < facts["first_chunks"] else facts["sigmas"]
        x, passes = noise[0], []
        for i, sigma in enumerate(sigmas):
            x0, *cache = self.forward(x, sigma, i, conditions)
            passes.append(cache)
            if i + 1 < len(sigmas):
                low = np.float32(sigmas[i + 1])
                x = (
                    (1 - low) * x0 + low * noise[i + 1]
                    if facts["step"] == "renoise"
                    else x + (low / sigma - 1) * (x - x0)
                )
                x = x.astype(np.float32)
        if facts["commit"] == "clean":
            passes = [self.forward(x0, facts["level"], 0, conditions)[1:]]
        self.past.append((self.chunk, passes))
        self.chunk += 1
        self.past = [entry for entry in self.past if entry[0] in self.visible()]
        return x0


def parity(folder):
    """The largest difference from the latents of parity.npz."""
    stream, given = OnnxStream(folder), dict(np.load(Path(folder) / "parity.npz"))
    noise, latents = given.pop("noise"), given.pop("latents")
    n, worst = stream.facts["chunk_frames"], 0.0
    for k, own in enumerate(noise):
        frames = slice(k * n, k * n + n)
        chunk = {name: value[:, frames] if name in ("audio", "pose") else value for name, value in given.items()}
        worst = max(worst, float(np.abs(stream.next(own, **chunk) - latents[:, :, frames]).max()))
    return worst


if __name__ == "__main__":
    print(f"largest difference of the latents: {parity(sys.argv[1] if sys.argv[1:] else Path(__file__).parent):.2g}")  # noqa: T201
