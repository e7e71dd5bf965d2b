"""The tables of `distill eval`: rows of scores as markdown and as one self-contained page."""

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
import yaml
from torch import Tensor

from eval.report.figures import number, sheet_png

HINTS = {
    "fid": ("FID", "lower"),
    "kid": ("KID", "lower"),
    "fvd": ("FVD", "lower"),
    "sync_c": ("Sync-C", "higher"),
    "sync_d": ("Sync-D", "lower"),
    "sync": ("sync", "-1 to 1"),
    "sync_offset_frames": ("offset", "0 is right"),
    "offset_frames": ("offset", "0 is right"),
    "distance_at_zero": ("D at lag 0", "lower"),
    "in_sync_rate": ("within 1 frame", "higher"),
    "detection_rate": ("faces found", "1 is all"),
    "sync_c_penalised": ("Sync-C, lost faces 0", "higher"),
    "identity": ("identity", "1 is right"),
    "psnr": ("PSNR, dB", "higher"),
    "ssim": ("SSIM", "1 is equal"),
    "lpips": ("LPIPS", "lower"),
    "motion_energy": ("motion", "as the truth"),
    "sharpness": ("sharpness", "as the truth"),
    "flicker": ("flicker", "as the truth"),
    "saturation": ("saturation", "as the truth"),
    "black": ("black", "share of frames"),
    "frozen": ("frozen", "share of steps"),
    "flash": ("flash", "share of steps"),
    "colour_slope": ("colour drift", "levels a second, 0 is none"),
    "identity_slope": ("identity drift", "a second, 0 is none"),
    "seam": ("seams", "1 is none"),
    "iqa": ("IQA", "1 to 5"),
    "ase": ("ASE", "1 to 5"),
    "fps": ("frames/s", "higher"),
    "latency_s": ("latency, s", "lower"),
}
TABLES = {
    "Fidelity, sync, identity": ("fid", "kid", "fvd", "sync_c", "sync_d", "sync", "sync_offset_frames", "identity"),
    "Drift": ("identity_slope",),
    "Sync in detail": ("offset_frames", "distance_at_zero", "in_sync_rate", "detection_rate", "sync_c_penalised"),
    "Against the real frames": ("psnr", "ssim", "lpips"),
    "Measures without a network": (
        *("motion_energy", "sharpness", "flicker", "saturation", "black", "frozen", "flash"),
        *("seam", "colour_slope"),
    ),
}
NAMES = {"ground_truth": "ground truth", "floor": "real against real"}
FLOOR = (
    "Real against real: random halves of the real clips, unpaired and at their own, smaller N, ± spread over splits."
)
PAIRED = "Sync-C above the ground truth's is a warning and no victory: read sync beside identity and the faces that were found."


def tables(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tables of one eval.json: title, columns, rows of cells {value, error}."""
    rows = report["rows"]
    known = {name for columns in TABLES.values() for name in columns}
    others = tuple(dict.fromkeys(m for row in rows.values() for m in row["metrics"] if m not in known))
    found = []
    for title, columns in (*TABLES.items(), ("From other programs", others)):
        present = [name for name in columns if any(name in row["metrics"] for row in rows.values())]
        if present:
            kept = {name: row for name, row in rows.items() if any(m in row["metrics"] for m in present)}
            found.append(
                table(title, present, [(NAMES.get(str(n), str(n)), r, report["card"]) for n, r in kept.items()])
            )
    return found


def table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, Mapping[str, Any], Any]]) -> dict[str, Any]:
    """Rows are (name, {n, metrics}, card); a card is a plain one, or "LABEL = WORDS" of a published table, told below the table."""
    return {
        "title": title,
        "notes": list(dict.fromkeys(card for _, _, card in rows if isinstance(card, str))),
        "columns": [
            {"name": HINTS.get(name, (name, ""))[0], "hint": HINTS.get(name, (name, ""))[1]} for name in columns
        ],
        "rows": [
            {
                "name": name,
                "n": "" if row.get("n") is None else str(row["n"]),
                "card": _card(card),
                "theirs": isinstance(card, str),
                "cells": [_cell(row["metrics"].get(column)) for column in columns],
            }
            for name, row, card in rows
        ],
    }


def _card(card: Any) -> str:
    return card.partition(" = ")[0] if isinstance(card, str) else f"{card['name']} {card['sha256'][:12]}"


def _cell(score: Any) -> dict[str, str]:
    if score is None:
        return {"value": "", "error": ""}
    if not isinstance(score, Mapping):
        return {"value": f"{score:g}", "error": ""}
    error = score.get("error")
    return {"value": number(score["mean"]), "error": "" if error is None else number(error, 2)}


def markdown(title: str, lines: Sequence[str], found: Sequence[Mapping[str, Any]], refused: Mapping[str, str]) -> str:
    """The same tables for a terminal, a README or a log."""
    parts = [f"# {title}", "", *lines, ""]
    for one in found:
        heads = [
            f"{column['name']} ({column['hint']})" if column["hint"] else column["name"] for column in one["columns"]
        ]
        parts += [f"## {one['title']}", "", "| | card | N | " + " | ".join(heads) + " |"]
        parts.append("|" + "---|" * (len(heads) + 3))
        for row in one["rows"]:
            cells = [cell["value"] + (f" ± {cell['error']}" if cell["error"] else "") for cell in row["cells"]]
            parts.append(f"| {row['name']} | {row['card']} | {row['n']} | " + " | ".join(cells) + " |")
        parts += ["", *(f"{note}  " for note in one["notes"]), ""] if one["notes"] else [""]
    if refused:
        parts += ["## Refused", "", *(f"- {reason}" for reason in refused.values()), ""]
    return "\n".join(parts)


def page(
    title: str,
    lines: Sequence[str],
    found: Sequence[Mapping[str, Any]],
    refused: Mapping[str, str],
    card: Mapping[str, Any],
    facts: Mapping[str, Any],
    sheets: Sequence[tuple[str, Sequence[tuple[str, Tensor]]]] = (),
) -> str:
    """One HTML page without other files. sheets: (title, [(row name, uint8 [3, T, H, W])]) each."""
    source = (resources.files("eval.report") / "templates" / "eval.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    shown = [
        {"title": name, "names": [label for label, _ in rows], "image": sheet_png([clip for _, clip in rows])}
        for name, rows in sheets
    ]
    return environment.from_string(source).render(
        title=title,
        lines=lines,
        tables=found,
        refused=refused,
        choices=card.get("choices", []),
        card_label=_card(card),
        card_json=json.dumps(card, indent=1),
        facts_json=json.dumps(facts, indent=1),
        sheets=shown,
    )


def headline(report: Mapping[str, Any]) -> list[str]:
    """What must stand beside the numbers, a line each."""
    card = report["card"]
    frames, height, width, top, bottom = report["shape"]
    lines = [
        f"Protocol {_card(card)}: {card['note']}",
        f"{report['n']} clips of {frames} frames, {width} x {height}, {top / bottom:.5g} fps. "
        f"± is one standard error, {card['errors']}.",
    ]
    if "floor" in report["rows"] and report["rows"]["floor"]["metrics"]:
        lines.append(FLOOR)
    if "sync_c" in report["rows"]["ground_truth"]["metrics"]:
        lines.append(PAIRED)
        values = report["rows"]["ground_truth"]["clips"]["sync_c"]
        lost = [clip for clip, value in zip(report["clips"], values, strict=True) if value is None]
        if lost:
            named = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
            lines.append(
                f"No face in {len(lost)} of {report['n']} clips ({named}): Sync-C and Sync-D are means without them."
            )
    uses = {card[rule]["extractor"] for rule in ("fid", "fvd", "sync", "identity") if card[rule]}
    for name, extractor in (("SyncNet example", "syncnet"), ("FVD vector", "i3d")):
        result = report["golden"].get(name)
        if extractor in uses and result:
            told = "passed" if result["passed"] else "FAILED"
            lines.append(f"Golden {name}: {told}, expected {result['expected']}, found {result['found']}.")
        elif extractor in uses:
            lines.append(f"Golden {name}: not run; distill doctor --golden runs it.")
    return lines


def published() -> list[dict[str, Any]]:
    """The tables of papers: paper, source, card, dataset, rows name -> metric -> value."""
    text = (resources.files("eval") / "published.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)["tables"]
