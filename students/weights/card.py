"""The model card of a student folder: what the student is, how to use it, its limits, and what people have to consent to."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from students.spec import Spec
from teachers.encoders.small import SAMPLE_RATE

FRONT = {
    "library_name": "avatar-distill",
    "pipeline_tag": "image-to-video",
    "tags": ["audio-driven", "talking-head", "avatar", "streaming", "distillation"],
    "license": "other",
    "license_name": "as-teacher-and-data",
    "inference": False,
}
PEOPLE = """\
* Animate a face or a voice only with that person's consent, which names the use. A photograph that is public is no consent.
* Not for impersonation, fraud, harassment, sexual content or politics in somebody's name.
* Videos are not marked as synthetic: say so wherever you publish them.
* A student is derived from its teacher and its data: their licences and the consent of the people in the data bind it. Put
  the licence that follows from them in the place of `license` above before you publish the weights."""


def model_card(
    spec: Spec,
    title: str = "avatar-distill student",
    data: str = "",
    facts: Mapping[str, Any] | None = None,
    scores: Mapping[str, Any] | None = None,
    limits: Sequence[str] = (),
) -> str:
    """Markdown with YAML front matter. data: what it was trained on; facts: lines of the training table; scores: its validation
    metrics; limits: further ones, a sentence each. Every part but the spec may be left out."""
    fps, steps = float(spec.fps), len(spec.sigmas)
    frames = [b - a for a, b in (spec.pixel_frames(0), spec.pixel_frames(1))]
    clip = spec.pixel_frames(spec.num_chunks - 1)[1] / fps
    parts = [
        f"---\n{yaml.safe_dump(FRONT, sort_keys=False)}---",
        f"# {title}",
        f"A causal {steps}-step audio-driven avatar student, distilled by avatar-distill. From a portrait, a text and speech at "
        f"{SAMPLE_RATE / 1000:g} kHz it streams video of {spec.width}x{spec.height} pixels at {fps:g} frames a second: {frames[0]} "
        f"frames first, then {frames[1]} a chunk, {spec.nfe_per_chunk:g} network evaluations each."
        + (" It takes the voice of a second speaker too, to listen." if spec.speakers == 2 else "")
        + (f" Data: {data}." if data else ""),
        "    distill sample --student . --image PORTRAIT.png --audio SPEECH.wav --text 'smiles and nods' --out out.mp4",
    ]
    if facts:
        parts += ["## Training", _table(facts)]
    if scores:
        parts += [
            "## Validation",
            _table(scores),
            "A few clips that were not trained on, scored during training to choose the weights. The scores of the held-out clips, "
            "with errors and beside the teacher's, are in the run's report.html. Those of embedded extractors are not comparable "
            "with published ones.",
        ]
    own = [
        f"It draws what its data shows{f' ({data})' if data else ''}; another face or style comes out as the nearest it knows.",
        f"It was trained on clips of {clip:.3g} s. In longer streams identity and colours may drift: `distill drift` measures it.",
        f"Size and rate are fixed: {spec.width}x{spec.height}, {fps:g} frames a second. Portraits are cropped and scaled to it.",
        "Languages, voices, noises and gestures that the data does not have were not tested.",
        *limits,
    ]
    parts += ["## Limits", "\n".join(f"* {line}" for line in own), "## People and consent", PEOPLE]
    return "\n\n".join(parts) + "\n"


def _table(rows: Mapping[str, Any]) -> str:
    lines = (f"| {name} | {f'{value:.4g}' if isinstance(value, float) else value} |" for name, value in rows.items())
    return "\n".join(["| | |", "|---|---|", *lines])
