"""A student as a folder: model.safetensors, codec.safetensors, text/, spec.json and a model card. Nothing is unpickled.

In the place of model.safetensors there may be an adapter in peft's layout; spec.json then says where its base is.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from students.spec import Spec
from students.student import Student
from students.weights.adapter import HINT, WEIGHTS, Adapter, Base, load_over_base, write_adapter
from students.weights.compatible import check, header
from teachers.checkpoints.strict import load_strict
from teachers.config import convert, to_plain
from teachers.encoders.small import TextEncoder
from teachers.errors import UserError
from teachers.registry import AudioEncoder, Codec, Text


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
        """Which student this is: a digest of the spec and of values spread over every weight."""
        digest = hashlib.sha256(json.dumps(to_plain(self.spec, digests=True), sort_keys=True).encode())
        for name, weight in self.student.net.state_dict().items():
            flat = weight.flatten()
            some = flat[:: max(1, flat.numel() // 64)].float().cpu().numpy()
            digest.update(f"{name} {tuple(weight.shape)}".encode() + some.tobytes())
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
        tensors = {k: v.contiguous() for k, v in net.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", header(bundle.spec))
    else:
        write_adapter(folder, *over, net, header(bundle.spec))
        spec["base"] = to_plain(over[1])
    if bundle.spec.codec.fitted:
        save_file(bundle.codec.state_dict(), folder / "codec.safetensors")
    if isinstance(bundle.text, TextEncoder) and bundle.spec.text.fitted:
        bundle.text.save(folder / "text")
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "spec.json").write_text(json.dumps(spec, indent=1) + "\n", encoding="utf-8")


def load_student(folder: Path) -> Bundle:
    """Read a student folder strictly; UserError for a missing file, a damaged one, or a tensor that does not fit the spec."""
    folder = Path(folder)
    try:
        values = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"no student: {folder} has no spec.json; give the student/ folder of a finished run") from error
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"damaged student: {folder / 'spec.json'} ({error}); export it again") from error
    values, base = (dict(values), values.get("base")) if isinstance(values, dict) else (values, None)
    if base is not None:
        base = convert(Base, values.pop("base"), "base", lambda _: str(folder / "spec.json"))
    spec = convert(Spec, values, locate=lambda _: str(folder / "spec.json"))
    if spec.format != 1:
        raise UserError(f"student format {spec.format}: {folder}; this version reads format 1")
    with torch.random.fork_rng(devices=[]):
        student = make_student(spec)
    check(spec, folder / ("model.safetensors" if base is None else WEIGHTS))
    if base is None:
        _fill_from(student.net, folder / "model.safetensors")
    else:
        load_over_base(student.net, folder, base, _fill_from)
    codec = spec.codec.load(folder, spec.height, spec.width)
    text, audio_encoder = spec.text.load(folder), spec.audio.load(spec.samples_per_frame)
    return Bundle(student.eval().requires_grad_(False), codec, audio_encoder, text)


def _fill_from(module: nn.Module, path: Path) -> None:
    load_strict(module, _tensors(path), path, HINT)


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"no weights: {path}; export the student again") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"damaged weights: {path} ({error}); export the student again") from error
