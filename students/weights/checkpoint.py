"""A student as a folder: model.safetensors, codec.safetensors, text/, spec.json and a model card. Nothing is unpickled.

In the place of model.safetensors there may be an adapter in peft's layout; spec.json then says where its base is.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from students.spec import Spec
from students.student import Student
from students.weights.adapter import WEIGHTS, Adapter, Base, fill, load_over_base, write_adapter
from teachers.checkpoints.weights import read_json
from teachers.config import convert, to_plain
from teachers.encoders.small import TextEncoder
from teachers.errors import UserError
from teachers.files import save_tensors
from teachers.registry import AudioEncoder, Codec, Text

FIXED = (
    "chunk_frames",
    "sigmas",
    "first_sigmas",
    "first_chunks",
    "schedule.depth",
    "history.commit",
    "history.level",
    "history_noise",
    "guidance",
    "times",
)
"""Dotted names of a Spec: what training fixed about a student's sampler, kept in the header of its weights; a spec that differs is
refused. Sinks, window and memory are not among it: they may be changed without training (LiveTalk's sinks are). Steps, their order,
the length of a chunk and the noise of what it reads of the past may not."""
KEY = "trained"
HASHED_BYTES = 2**26
"""Of a weight, which are brought to the host at once for a digest."""


@dataclass(frozen=True)
class Bundle:
    """Everything a session needs: the student with its spec, the codec, the audio encoder and the text encoder."""

    student: Student
    codec: Codec
    audio_encoder: AudioEncoder
    text: Text

    @property
    def spec(self) -> Spec:
        return self.student.spec

    def to(self, device: torch.device | str) -> "Bundle":
        """The same parts, moved."""
        for part in (self.student, self.codec, self.audio_encoder, self.text):
            part.to(device)
        return self

    @cached_property
    def fingerprint(self) -> str:
        """Which student this is: a digest of the spec and of every weight of the network, the codec and the encoders."""
        digest = hashlib.sha256(json.dumps(to_plain(self.spec, digests=True), sort_keys=True).encode())
        parts = {"net": self.student.net, "codec": self.codec, "audio": self.audio_encoder, "text": self.text}
        for part, module in parts.items():
            for name, weight in module.state_dict().items():
                digest.update(f"{part}.{name} {tuple(weight.shape)} {weight.dtype}".encode())
                for piece in weight.detach().reshape(-1).view(torch.uint8).split(HASHED_BYTES):
                    digest.update(piece.cpu().numpy())
        return digest.hexdigest()


def make_student(spec: Spec) -> Student:
    """An untrained student of this geometry."""
    return spec.network.student(spec.network.new(spec.dims), spec)


def save_student(folder: Path, bundle: Bundle, card: str, over: tuple[Adapter, Base] | None = None) -> None:
    """Write the folder; spec.json comes last, so a folder without it is unfinished.

    Codec and text encoder that were given, not fitted, stay where their path says; so does the base, where an adapter over it is
    written for the bundle's weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    net, spec = bundle.student.net, to_plain(bundle.spec)
    if over is None:
        save_tensors(folder / "model.safetensors", net.state_dict(), _header(bundle.spec))
    else:
        write_adapter(folder, *over, net, _header(bundle.spec))
        spec["base"] = to_plain(over[1])
    if bundle.spec.codec.fitted:
        save_tensors(folder / "codec.safetensors", bundle.codec.state_dict())
    if isinstance(bundle.text, TextEncoder) and bundle.spec.text.fitted:
        bundle.text.save(folder / "text")
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "spec.json").write_text(json.dumps(spec, indent=1) + "\n", encoding="utf-8")


def load_student(folder: Path) -> Bundle:
    """Read a student folder strictly; UserError for a missing file, a damaged one, or a tensor that does not fit the spec."""
    folder = Path(folder)
    values = read_json(folder / "spec.json")
    if not values:
        raise UserError(f"no student: {folder} has no spec.json; give the student/ folder of a finished run")
    base = values.pop("base", None)
    if base is not None:
        base = convert(Base, base, "base", lambda _: str(folder / "spec.json"))
    spec = convert(Spec, values, locate=lambda _: str(folder / "spec.json"))
    if spec.format != 1:
        raise UserError(f"student format {spec.format}: {folder}; this version reads format 1")
    with torch.random.fork_rng(devices=[]):
        student = make_student(spec)
    _check_sampler(spec, folder / ("model.safetensors" if base is None else WEIGHTS))
    if base is None:
        fill(student.net, folder / "model.safetensors")
    else:
        load_over_base(student.net, folder, base)
    codec = spec.codec.load(folder, spec.height, spec.width)
    text, audio_encoder = spec.text.load(folder), spec.audio.load(spec.samples_per_frame)
    return Bundle(student.eval().requires_grad_(False), codec, audio_encoder, text)


def _header(spec: Spec) -> dict[str, str]:
    """Metadata of a safetensors file of weights that were trained under this spec."""
    return {KEY: json.dumps(_fixed(spec))}


def _check_sampler(spec: Spec, weights: Path) -> None:
    """UserError where the header of `weights` has another sampler. Weights without it pass, and a missing or damaged file
    is for its reader to name."""
    try:
        with safe_open(weights, "pt") as file:
            trained = json.loads((file.metadata() or {}).get(KEY, "{}"))
    except (OSError, SafetensorError, json.JSONDecodeError):
        return
    for name, value in json.loads(json.dumps(_fixed(spec))).items():
        if name in trained and trained[name] != value:
            raise UserError(
                f"student not trained for this sampler: {name} is {_short(value)} in spec.json, {_short(trained[name])} in "
                f"{weights}; put that back, or train a student for it"
            )


def _fixed(spec: Spec) -> dict[str, Any]:
    plain, found = to_plain(spec), {}
    for name in FIXED:
        value: Any = plain
        for part in name.split("."):
            value = value.get(part)  # what was added later is left out at its default
        found[name] = value
    return found


def _short(value: Any) -> str:
    """Numbers to four digits."""
    if isinstance(value, list):
        return f"[{', '.join(_short(item) for item in value)}]"
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)
