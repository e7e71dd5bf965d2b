"""A student as a folder: model, codec and coverage .safetensors, text/, spec.json and a model card. Nothing is unpickled.

In the place of model.safetensors there may be an adapter in peft's layout; spec.json then says where its base is.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from students.spec import Spec, check_sizes
from students.student import Student
from students.weights.adapter import HINT, WEIGHTS, Adapter, Base, fill, load_over_base, write_adapter
from students.weights.coverage import FILE, Coverage, load_coverage
from teachers.checkpoints.strict import check_finite, misfits, refuse, shapes_of
from teachers.checkpoints.weights import shapes
from teachers.config import convert, to_plain
from teachers.disk.digests import SUMS, THREADS, read_sums, recording, sha256, write_sums
from teachers.disk.read import read_json
from teachers.encoders.small import TextEncoder
from teachers.errors import UserError
from teachers.files import atomic_write, remove_folder, save_tensors, staged
from teachers.registry import AudioEncoder, Codec, ImageEncoder, Text

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
    "step",
)
"""Dotted names of a Spec: what training fixed about a student's sampler, kept in the header of its weights; a spec that differs is
refused. Sinks, window and memory are not among it: they may be changed without training (LiveTalk's sinks are). Steps, their order,
the length of a chunk and the noise of what it reads of the past may not."""
KEY = "trained"
HASHED_BYTES = 2**26
"""Of a weight, which are brought to the host at once for a digest."""
SPEC = "spec.json"


@dataclass(frozen=True)
class Bundle:
    """Everything a session needs: the student with its spec, the codec, the audio encoder and the text encoder; what its training
    data cover, where that is known; and the ranks that share its streams, where there are several
    (`students.serving.shared.Shared`)."""

    student: Student
    codec: Codec
    audio_encoder: AudioEncoder
    text: Text
    coverage: Coverage | None = None
    image_encoder: ImageEncoder | None = None
    shared: Any = None

    @property
    def spec(self) -> Spec:
        return self.student.spec

    def to(self, device: torch.device | str) -> "Bundle":
        """The same parts, moved."""
        for part in (self.student, self.codec, self.audio_encoder, self.text, self.image_encoder):
            if part is not None:
                part.to(device)
        return self

    def of_image(self, image: Tensor) -> dict[str, Tensor]:
        """The features of a reference image [N, 3, H, W] in [-1, 1], over the length of a training clip where they run with it."""
        return {} if self.image_encoder is None else self.image_encoder(image, self.codec, self.spec.horizon_frames)

    def unlike(self, reference: Tensor | None, *texts: str) -> list[str]:
        """Why a picture [3, H, W] in [-1, 1] and texts are outside what the student was trained on, a line each; [] where they are
        not, or nothing is known of its training data."""
        if self.coverage is None:
            return []
        device = next(self.student.parameters()).device
        found = [None if reference is None else self.coverage.unlike(reference, self.codec, device)]
        found += [self.coverage.unknown_words(text) for text in dict.fromkeys(texts)]
        return [line for line in found if line is not None]

    @cached_property
    def fingerprint(self) -> str:
        """Which student this is: a digest of the spec and of every weight of the network, the codec and the encoders."""
        digest = hashlib.sha256(json.dumps(to_plain(self.spec, digests=True), sort_keys=True).encode())
        parts = {"net": self.student.net, "codec": self.codec, "audio": self.audio_encoder, "text": self.text}
        parts |= {} if self.image_encoder is None else {"image": self.image_encoder}
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
    """Write the folder; spec.json comes last, so a folder without it is unfinished. UserError for weights that are not finite.

    Codec and text encoder that were given, not fitted, stay where their path says; so does the base, where an adapter over it is
    written for the bundle's weights.
    """
    net, spec = bundle.student.net, to_plain(bundle.spec)
    check_finite(net.state_dict(), "the student", "train it again with a lower learning rate")
    folder.mkdir(parents=True, exist_ok=True)
    with recording(folder) as recorder:
        if over is None:
            save_tensors(folder / "model.safetensors", net.state_dict(), _header(bundle.spec))
        else:
            write_adapter(folder, *over, net, _header(bundle.spec))
            spec["base"] = to_plain(over[1])
        if bundle.spec.codec.fitted:
            save_tensors(folder / "codec.safetensors", bundle.codec.state_dict())
        if isinstance(bundle.text, TextEncoder) and bundle.spec.text.fitted:
            remove_folder(folder / "text")
            with staged(folder / "text") as temporary:
                bundle.text.save(temporary)
        if bundle.coverage is not None:
            bundle.coverage.save(folder / FILE)
        (folder / "README.md").write_text(card, encoding="utf-8")
        atomic_write(folder / SPEC, json.dumps(spec, indent=1) + "\n")
        write_sums(folder, recorder.wait())


def load_student(folder: Path) -> Bundle:
    """Read a student folder strictly; UserError for a missing file, one that is not what was written, or a tensor that does not fit
    the spec or is not finite. A spec.json that was edited is warned of. Files are compared with their list by threads, beside
    which a disk is slow."""
    folder = Path(folder)
    values = read_json(folder / SPEC)
    if not values:
        raise UserError(f"no student: {folder} has no spec.json; give the student/ folder of a finished run")
    with _verified(folder):
        return _load(folder, values)


@contextmanager
def _verified(folder: Path) -> Iterator[None]:
    """Inside, threads compare the files of a student with its list; UserError for one that differs, at the end or in the place of a
    reader's error that does not name it."""
    listed = read_sums(folder / SUMS)
    spec = listed.pop(SPEC, None)
    if spec is not None and sha256(folder / SPEC) != spec:
        warnings.warn(f"{folder / SPEC} is not as it was written: edited, or damaged", stacklevel=4)
    failed: Exception | None = None
    with ThreadPoolExecutor(THREADS) as pool:
        found = {name: pool.submit(_digest, folder / name) for name in listed}
        try:
            yield
        except Exception as error:
            failed = error
        wrong = [name for name, digest in found.items() if digest.result() != listed[name]]
        if failed is not None:
            wrong = [name for name in wrong if (folder / name).is_file()]  # of a lost one the reader says what it is
        if isinstance(failed, UserError) and any(name in str(failed) for name in wrong):
            raise failed  # it says more of that file
        if wrong:
            raise UserError(
                f"damaged student: {folder / wrong[0]} is not what was written; copy the folder again, or export it again"
            ) from failed
        if failed is not None:
            raise failed


def _digest(file: Path) -> str:
    try:
        return sha256(file)
    except OSError:
        return ""


def _load(folder: Path, values: dict[str, Any]) -> Bundle:
    base = values.pop("base", None)
    if base is not None:
        base = convert(Base, base, "base", lambda _: str(folder / "spec.json"))
    spec = convert(Spec, values, locate=lambda _: str(folder / "spec.json"))
    if spec.format != 1:
        raise UserError(f"student format {spec.format}: {folder}; this version reads format 1")
    check_sizes(spec)
    if base is None and (folder / "model.safetensors").is_file():
        _check_fits(spec, folder / "model.safetensors")
    with torch.random.fork_rng(devices=[]):
        student = make_student(spec)
    check_sampler(spec, folder / ("model.safetensors" if base is None else WEIGHTS))
    if base is None:
        fill(student.net, folder / "model.safetensors")
    else:
        load_over_base(student.net, folder, base)
    codec = spec.codec.load(folder, spec.height, spec.width)
    text, audio_encoder = spec.text.load(folder), spec.audio.load(spec.samples_per_frame)
    image_encoder = None if spec.image is None else spec.image.load()
    coverage = load_coverage(folder / FILE)
    return Bundle(student.eval().requires_grad_(False), codec, audio_encoder, text, coverage, image_encoder)


def _check_fits(spec: Spec, weights: Path) -> None:
    """UserError where the network of the spec is not that of the weights, before any memory is taken for it."""
    given = shapes(weights)
    check_sizes(spec.network, "network.", len(given))
    try:
        with torch.device("meta"):
            wanted = shapes_of(make_student(spec).net.state_dict())
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, ArithmeticError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"no network has these sizes ({reason}): {weights.parent / SPEC}; get the student again"
        ) from error
    refuse(misfits(given, wanted), weights, HINT)


def _header(spec: Spec) -> dict[str, str]:
    """Metadata of a safetensors file of weights that were trained under this spec."""
    return {KEY: json.dumps(_fixed(spec))}


def check_sampler(spec: Spec, weights: Path, where: str = SPEC) -> None:
    """UserError where the header of `weights` has another sampler than the spec of `where`. Weights without it pass, and a missing
    or damaged file is for its reader to name."""
    try:
        with safe_open(weights, "pt") as file:
            trained = json.loads((file.metadata() or {}).get(KEY, "{}"))
    except (OSError, SafetensorError, ValueError, RecursionError):
        return
    for name, value in json.loads(json.dumps(_fixed(spec))).items():
        if name in trained and trained[name] != value:
            raise UserError(
                f"student not trained for this sampler: {name} is {_short(value)} in {where}, {_short(trained[name])} in "
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
