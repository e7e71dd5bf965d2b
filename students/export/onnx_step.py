"""The step of a causal student as an ONNX graph: one chunk's latents, the KV cache as explicit inputs and outputs.

    x0, keys, values = step(x, sigma, text, audio, reference, known, past_keys, past_values, past_positions, positions)

The same graph denoises (x at a denoising step's sigma) and commits (the finished chunk at the history's level; its keys and values
join the cache). Keys are kept un-rotated, so that a chunk of the past may take another place when the window moves. Beside it the
folder has `stream.json`, the sigmas and the history; `stream.py`, the loop around the graph in numpy; and `parity.npz`, a short
stream of the student's own session (inputs, noise, latents), by which any runtime can be checked.

n = frames of a chunk, P = frames of the past, S = tokens a frame, N = blocks, M = heads, d = head width.
"""

import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from students.serving import draw
from students.serving.draw import Ready
from students.serving.session import Session
from students.spec import Spec
from students.weights.checkpoint import Bundle
from teachers.conditions import Conditions
from teachers.errors import UserError
from teachers.flow import keyed_generator
from teachers.networks.kind import to_x0
from teachers.networks.spans import Arranged, rotate
from teachers.networks.wan import NetworkConfig

STEP, STREAM, PARITY, LOOP = "step.onnx", "stream.json", "parity.npz", "stream.py"
TOLERANCE = 1e-4
"""Of the latents of a stream by onnxruntime and by a session, both in fp32; latents are about 1 in size."""
OPSET = 20
LARGEST = 2**28
"""Parameters in the graph's own file, which may have 2 GiB; more lie beside it in step.onnx.data."""


class Step(nn.Module):
    """One forward of a student as a function of tensors alone."""

    def __init__(self, student: Any):
        super().__init__()
        self.net, self.spec = student.net, student.spec

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        text: Tensor,
        audio: Tensor,
        reference: Tensor,
        known: Tensor,
        past_keys: Tensor,
        past_values: Tensor,
        past_positions: Tensor,
        positions: Tensor,
        pose: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [1, C, n, h, w] at sigma [1]; text [1, L, D]; audio [1, n, stride, A]; reference [1, C, 1, h, w]; known [n], 1 where
        the frame is the reference; the past's keys and values [N, 1, P, S, M, d], in any order, and its frames' positions in time
        [P]; positions [n] of the chunk's own; pose [1, n, stride, P'], guidance [1, M], the scales of text and audio or one.

        Returns x0 in fp32, and the chunk's un-rotated keys and values [N, 1, n, S, M, d].
        """
        given = known.view(1, 1, -1, 1, 1) > 0
        x = torch.where(given, reference, x)
        mask = torch.where(given, 0.0, torch.ones_like(x[:, :1]))
        inputs = torch.cat([x, reference.expand(-1, -1, x.shape[2], -1, -1), mask], dim=1)
        keys = rotate(past_keys.flatten(2, 3), self._table(past_positions))
        past = list(zip(keys.unbind(), past_values.flatten(2, 3).unbind(), strict=True))
        table = self._table(positions)
        spans = Arranged([(slice(0, table.shape[1]), ())], [table])
        level = self.spec.conditioned(sigma.unsqueeze(1))
        out, cache = self.net(inputs, level, text, audio, spans=spans, past=past, pose=pose, guidance=guidance)
        x0 = to_x0(out, x, sigma.unsqueeze(1), Conditions(reference=reference), self.net.prediction, ())
        keys, values = (torch.stack(part).unflatten(2, (x.shape[2], -1)) for part in zip(*cache, strict=True))
        return torch.where(given, reference, x0), keys, values

    def _table(self, positions: Tensor) -> Tensor:
        """Cosines and sines [1, F S, 1, d/2, 2] of frames at these positions in time [F]."""
        rope, (height, width) = self.net.rope, self.spec.token_grid
        table = torch.stack((rope.freqs_cos[:, ::2], rope.freqs_sin[:, ::2]), dim=-1).float()
        t, y, x = table.split([rope.t_dim // 2, rope.h_dim // 2, rope.w_dim // 2], dim=1)
        grid = (positions.shape[0], height, width, -1, -1)
        parts = [
            t[positions][:, None, None].expand(grid),
            y[:height][None, :, None].expand(grid),
            x[:width][None, None].expand(grid),
        ]
        return torch.cat(parts, dim=-2).flatten(0, 2)[None, :, None]


@dataclass(frozen=True)
class Written:
    """What was written: bytes of the graph, chunks of the stream that was compared, the largest difference of its latents."""

    num_bytes: int
    chunks: int
    error: float


def write_onnx(folder: Path, bundle: Bundle, chunks: int | None = None) -> Written:
    """Write the student's step and what belongs to it into `folder`, and compare a stream of `chunks` (by default until the window
    has moved by two) by onnxruntime with the student's session. UserError for a student of another kind, without the extra
    `onnx`, and where the two differ by more than TOLERANCE."""
    spec = bundle.spec
    check_exportable(spec)
    count = chunks or min((spec.history.capacity or 2) + 3, 12)
    stream = record(bundle, count)
    folder.mkdir(parents=True, exist_ok=True)
    export_step(bundle, stream, folder / STEP)
    facts = facts_of(spec)
    (folder / STREAM).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    np.savez(folder / PARITY, **stream)  # pyright: ignore[reportArgumentType]
    shutil.copy(Path(__file__).with_name("onnx_stream.py"), folder / LOOP)
    from students.export.onnx_stream import parity

    error = parity(folder)
    if not error < TOLERANCE:
        raise UserError(f"onnx: its latents differ from the student's by {error:.2g}; report it as a bug")
    return Written((folder / STEP).stat().st_size, count, error)


def check_exportable(spec: Spec) -> None:
    """UserError where the step of such a student is more than the graph has, and without the extra."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise UserError(f"onnx: {missing[0]} is not installed; pip install 'avatar-distill[onnx]'")
    history, wrong = spec.history, ""
    if type(spec.network) is not NetworkConfig or not spec.network.reference:
        wrong = "a network of the kind wan with a reference"
    elif spec.schedule.depth > 1:
        wrong = "student.schedule.depth 1, not chunks in flight together"
    elif len(history.parts) > 1:
        wrong = "one history.window for all blocks"
    elif history.refine_every or history.reference_chunks is not None or spec.history_noise is not None:
        wrong = "no history.refine_every, history.reference_chunks or history_noise"
    if wrong:
        raise UserError(f"onnx: the step of this student cannot be exported; it takes {wrong}")


def facts_of(spec: Spec) -> dict[str, Any]:
    """What a loop around the step has to know, as JSON; `empty_past`: the shape of past keys where nothing is seen."""
    history, network, (height, width) = spec.history, spec.network, spec.token_grid
    names = ("sinks", "window", "memory", "memory_every", "commit", "level", "positions")
    return {
        "chunk_frames": spec.chunk_frames,
        "sigmas": list(spec.sigmas),
        "first_sigmas": list(spec.first_sigmas),
        "first_chunks": spec.first_chunks,
        "step": spec.step,
        **{name: getattr(history, name) for name in names},
        "empty_past": [network.num_layers, 1, 0, height * width, network.num_heads, network.head_dim],
        "latent": list(spec.latent_size),
        "fps": str(spec.fps),
        "stride": spec.codec.stride,
    }


@torch.inference_mode()
def record(bundle: Bundle, chunks: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A stream of the student's session over a grey portrait and noise of changing loudness: `text`, `reference`, `guidance` of the
    stream, `audio` and `pose` [1, chunks n, ..] of its latent frames, `noise` [chunks, steps, 1, C, n, h, w], and the `latents`
    [1, C, chunks n, h, w] that it made of them."""
    spec, rng = bundle.spec, keyed_generator(seed, "onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a text that is too long is cut, here as well as any
        session = Session(bundle, torch.zeros(3, spec.height, spec.width), "a person talks", seed)
    frames = spec.pixel_frames(chunks + 1)[1]
    loud = torch.rand(frames, generator=rng).repeat_interleave(spec.samples_per_frame)
    session.push(audio=(loud * torch.randn(len(loud), generator=rng) * 0.2).clamp(-1, 1))
    if spec.pose_dim:
        session.push(pose=torch.rand(frames, spec.pose_dim, generator=rng) * 2 - 1)
    rows: list[dict[str, Any]] = []
    for _ in range(chunks):
        ready = session.begin()
        assert isinstance(ready, Ready)
        (drawn,) = draw.draw(bundle, [ready], session.beside)
        steps = range(max(len(spec.sigmas), len(spec.first_sigmas)))
        noise = torch.stack([ready.noise(0, i) for i in steps])
        rows.append({**_given(ready.conditions), "noise": noise, "latents": drawn.x0})
        session.finish(ready, drawn)
    axes = {"audio": 1, "pose": 1, "latents": 2}
    out = {name: torch.cat([row[name] for row in rows], dim=axis) for name, axis in axes.items() if name in rows[0]}
    out["noise"] = torch.stack([row["noise"] for row in rows])
    return {name: np.asarray(value.cpu().float()) for name, value in {**rows[0], **out}.items()}


def _given(conditions: Conditions) -> dict[str, Tensor]:
    names = ("text", "audio", "reference", "pose", "guidance")
    return {name: conditions.features[name] for name in names if conditions.features.get(name) is not None}


def export_step(bundle: Bundle, stream: dict[str, np.ndarray], target: Path) -> None:
    """Trace the step of a chunk with a past of two chunks, and write its graph; the length of the past is dynamic."""
    spec, n = bundle.spec, bundle.spec.chunk_frames
    given = {name: torch.from_numpy(value) for name, value in stream.items() if name not in ("noise", "latents")}
    given |= {name: given[name][:, :n] for name in ("audio", "pose") if name in given}
    layers, batch, _, *rest = facts_of(spec)["empty_past"]
    past = torch.zeros(layers, batch, 2 * n + 1, *rest)
    example = {
        "x": torch.from_numpy(stream["noise"][0, 0]),
        "sigma": torch.tensor([spec.sigmas[0]]),
        "known": torch.zeros(n),
        "past_keys": past,
        "past_values": past.clone(),
        "past_positions": torch.arange(2 * n + 1),
        "positions": torch.arange(n) + 2 * n + 1,
        **given,
    }
    frames = torch.export.Dim("past_frames", min=0, max=bundle.student.net.rope.max_seq_len)
    shapes = {name: {2: frames} if name in ("past_keys", "past_values") else None for name in example}
    shapes["past_positions"] = {0: frames}
    with quiet(), torch.no_grad():
        torch.onnx.export(
            Step(bundle.student).eval(),
            (),
            target,
            kwargs=example,
            output_names=["x0", "keys", "values"],
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            external_data=sum(p.numel() for p in bundle.student.parameters()) > LARGEST,
            verbose=False,
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's chatter."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
