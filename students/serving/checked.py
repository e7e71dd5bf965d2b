"""What a session is given, checked: each mistake is one line, and changes nothing."""

import operator
from typing import Any

import torch
from torch import Tensor

from students.spec import Spec
from teachers.encoders.small import SAMPLE_RATE
from teachers.errors import UserError

LARGEST_SEED = 2**63 - 1
BRIGHTEST = 1.1  # of a reference in [-1, 1]; some resampling overshoots
LONGEST_TEXT = 100_000  # characters
MOST_WAITING_SECONDS = 3600  # of input that no step has read yet
MOST_EVENTS = 1000  # that wait for their chunk


def whole(name: str, value: Any, least: int, most: int = LARGEST_SEED) -> int:
    """A whole number from `least` to `most`; UserError for another, and for what is none."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise UserError(f"{name}: got {value!r}; it is a whole number") from error
    if not least <= number <= most:
        raise UserError(f"{name}: got {number}; it is a whole number from {least} to {most}")
    return number


def check_reference(spec: Spec, reference: Any) -> None:
    """UserError unless it is the picture [3, H, W] in [-1, 1] that this student begins with, or None for one without."""
    if spec.takes_image != (reference is not None):
        wanted = "is missing: give one" if spec.takes_image else "is given, the student draws from text alone"
        raise UserError(f"reference image {wanted}")
    if reference is None:
        return
    size = (3, spec.height, spec.width)
    if not isinstance(reference, Tensor) or not reference.is_floating_point():
        kind = reference.dtype if isinstance(reference, Tensor) else type(reference).__name__
        raise UserError(
            f"reference image must be floats {size} in [-1, 1]: got {kind}; for 0..255 divide by 127.5, minus 1"
        )
    if tuple(reference.shape) != size:
        raise UserError(f"reference image: got {tuple(reference.shape)}, the student draws {size}; resize it")
    if not torch.isfinite(reference).all():
        raise UserError("reference image must be finite: got NaN or infinity; read the picture again")
    if reference.abs().max() > BRIGHTEST:
        low, high = float(reference.min()), float(reference.max())
        raise UserError(
            f"reference image must lie in [-1, 1]: got {low:.4g} to {high:.4g}; for 0..255 divide by 127.5 and subtract 1"
        )


def check_text(text: Any) -> str:
    """The text; UserError for what is none, cannot be encoded or is far longer than any student reads."""
    if not isinstance(text, str):
        raise UserError(
            f"text must be a string: got {type(text).__name__}; give what happens, such as 'smiles and nods'"
        )
    if len(text) > LONGEST_TEXT:
        raise UserError(f"text of {len(text)} characters: at most {LONGEST_TEXT}; give a caption")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"text has half of a character (position {error.start}): write it again") from error
    return text


def check_waiting(spec: Spec, samples: float, rows: int) -> None:
    """UserError where so many 16 kHz samples and pose rows would wait to be drawn."""
    seconds = max(samples / SAMPLE_RATE, float(rows / spec.fps))
    if seconds > MOST_WAITING_SECONDS:
        raise UserError(
            f"push: {seconds:.0f} s of input would wait to be drawn, at most {MOST_WAITING_SECONDS} are kept; step between pushes"
        )
