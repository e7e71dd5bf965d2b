"""What training fixed about a student's sampler, kept in the header of its weights: a spec that differs is refused.

Sinks, window and memory are not among it: they may be changed without training (LiveTalk's sinks are). Steps, their order,
the length of a chunk and the noise of what it reads of the past may not.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from students.spec import Spec
from teachers.config import to_plain
from teachers.errors import UserError

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
)
"""Dotted names of a Spec."""
KEY = "trained"


def header(spec: Spec) -> dict[str, str]:
    """Metadata of a safetensors file of weights that were trained under this spec; one entry, for safetensors writes several in
    another order every time, and the same weights are the same file."""
    return {KEY: json.dumps(_fixed(spec))}


def check(spec: Spec, weights: Path) -> None:
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
