"""The report of a run: report.json for programs and one self-contained report.html for people."""

import base64
import json
import math
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from torch import Tensor

from eval.embedded.admission import is_admitted
from eval.embedded.protocol import EMBEDDED_NOTE
from eval.report.figures import curve_svg, dot_svg, number, plain, sheet_png
from teachers.files import atomic_write

CEILINGS = ("floor", "codec")  # real clips, and the same through the codec: what no system can be expected to beat
SYSTEMS = ("teacher", "teacher_few_step", "ar_teacher", "zero_shot", "init", "student")
EMBED_LIMIT = 12_000_000  # bytes of samples that are put into the page; above it the page links to the files
COST = "Cost"
TABLES = {
    "Fidelity and agreement": {
        "fid": "lower is better",
        "fvd": "lower is better",
        "kid": "lower is better",
        "sync": "-1 to 1",
        "sync_offset_frames": "0 is right",
        "identity": "1 is right",
    },
    "Motion": {
        "motion": "0 to 1",
        "expression": "0 to 1",
        "motion_energy": "1 is right",
        "sharpness": "1 is right",
        "diversity": "1 is right",
        "seam": "the codec's is right",
        "gap": "to the teacher on the same noise; 1 is another draw",
    },
    COST: {
        "nfe_per_chunk": "evaluations",
        "seconds_per_video_second": "one stream",
        "batch_seconds_per_video_second": "in a batch",
        "ttff_seconds": "lower is better",
        "fps": "higher is better",
    },
}
HEALTH = {
    "black": "share of frames",
    "frozen": "share of frames",
    "clipped": "share of pixels",
    "saturation": "grey levels",
    "motion_energy": "grey levels",
    "seam": "1 is none",
    "noise": "grey levels",
    "audio": "over noise",
    "text": "over noise",
}
PARTS = {"pixels": "", "head_spread": "", "light_spread": "", "gaze_spread": "", "blink_rate": ""}
DOTS = {
    "fid": None,
    "fvd": None,
    "sync": None,
    "motion": None,
    "motion_energy": 1.0,
    "sharpness": 1.0,
    "diversity": 1.0,
}


def target(value: float | int, at_least: float | int | None = None, at_most: float | int | None = None) -> dict:
    """One line of `report["ratios"]`: the value, its target as text and whether it is met (None: no target)."""
    low, high = at_least is None or value >= at_least, at_most is None or value <= at_most
    if at_least is not None and at_most is not None:
        text = f"{at_least:g} to {at_most:g}"
    elif at_least is not None:
        text = f"at least {at_least:g}"
    else:
        text = f"at most {at_most:g}" if at_most is not None else ""
    return {"value": value, "target": text, "passed": (low and high) if text else None}


def write_report(
    report: Mapping,
    curves: Mapping[str, Mapping[str, Sequence[tuple[float | int, float | int]]]],
    sheets: Mapping[str, Sequence[Tensor] | Tensor],
    samples: Mapping[str, Path],
    out_dir: Path,
    captions: Sequence[str] = (),
    sheet_frames: int = 8,
) -> Path:
    """Write report.json and report.html into `out_dir` and return the path of the page.

    `report` follows design section 6; its metrics are `{mean, spread, error, seeds}`. Metrics that the protocol card
    does not admit leave `metrics` for `not_admitted` and are never printed as scores. curves: title -> series ->
    [(step, value)]. sheets: system -> K clips uint8 [3, T, H, W], the same K conditions in the same order, `captions`
    their texts. samples: label -> mp4 file; embedded while they are small, else linked relative to the page.
    """
    clean = _finite(_withhold(report))
    context = {
        **_head(clean),
        "note": EMBEDDED_NOTE,
        "checks": [_check(name, value) for name, value in (clean.get("targets") or clean.get("ratios", {})).items()],
        "tables": _tables(clean),
        "health": _health(clean.get("health") or {}),
        "left_out": {plain(name): why for name, why in clean.get("left_out", {}).items()},
        "dots": _dots(clean),
        "curves": [_curve(title, series) for title, series in curves.items() if any(series.values())],
        "sheets": _sheets(sheets, captions, sheet_frames),
        "samples": _samples(samples, out_dir),
        "cases": _cases(clean),
        "stages": _stages(clean.get("stages", {})),
    }
    judged = [check["passed"] for check in context["checks"] if check["passed"] is not None]
    context["num_passed"], context["num_judged"] = sum(judged), len(judged)
    source = resources.files("eval.report").joinpath("templates/report.html.j2").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    out_dir.mkdir(parents=True, exist_ok=True)
    atomic_write(out_dir / "report.json", json.dumps(clean, indent=1, allow_nan=False) + "\n")
    page = out_dir / "report.html"
    atomic_write(page, environment.from_string(source).render(context))
    return page


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: both become null; tuples become lists, unknown objects text."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)


def _withhold(report: Mapping) -> dict:
    """Move metrics that were not admitted out of every `metrics`; without a protocol card nothing is withheld."""
    admitted = report.get("protocol", {}).get("extractors", {}).get("admitted")
    if admitted is None:
        return dict(report)

    def split(system: Mapping) -> dict:
        metrics = system.get("metrics", {})
        kept = {name: value for name, value in metrics.items() if is_admitted(name, admitted)}
        withheld = {name: value for name, value in metrics.items() if name not in kept}
        return {**system, "metrics": kept, **({"not_admitted": withheld} if withheld else {})}

    systems = {name: split(system) for name, system in report.get("systems", {}).items()}
    ceilings = {name: split(_as_system(report[name])) for name in CEILINGS if report.get(name)}
    refused = {name for system in systems.values() for name in system.get("not_admitted", {})}

    def judged(name: str, line: Any) -> Any:
        stands_on = any(f"_{metric}_" in f"_{name}_" for metric in refused)
        return {**line, "passed": None, "not_admitted": True} if stands_on and isinstance(line, Mapping) else line

    lines = {
        key: {name: judged(name, line) for name, line in report[key].items()}
        for key in ("targets", "ratios")
        if key in report
    }
    return {**report, **lines, "systems": systems, **ceilings}


def _head(report: Mapping) -> dict:
    recipe, protocol = report.get("recipe", {}), report.get("protocol", {})
    name = recipe.get("name", "run") if isinstance(recipe, Mapping) else str(recipe)
    device = report.get("device", "")
    where = ", ".join(f"{key} {value}" for key, value in device.items()) if isinstance(device, Mapping) else str(device)
    seconds = sum(stage.get("seconds") or 0 for stage in report.get("stages", {}).values())
    knobs = protocol.get("knobs", {})
    counts = f"{knobs['num_conditions']} held-out conditions, {knobs['num_seeds']} noise seeds" if knobs else ""
    took = f"all stages {seconds / 60:.1f} min" if seconds else ""
    return {
        "title": f"Distillation report: {name}",
        "subtitle": "; ".join(part for part in (counts, took, where) if part),
        "card_hash": protocol.get("sha256", "")[:12],
        "protocol_json": json.dumps(protocol, indent=1),
        "recipe_json": json.dumps(recipe, indent=1),
        "device_json": json.dumps({"versions": report.get("versions", {}), "device": device}, indent=1),
    }


def _check(name: str, value) -> dict:
    if not isinstance(value, Mapping):
        return {"name": plain(name), "value": number(value), "target": "", "passed": None}
    measured = "not admitted" if value.get("not_admitted") else number(value.get("value"))
    shown = {"value": measured, "target": value.get("target", ""), "passed": value.get("passed")}
    return {"name": plain(name), **shown}


def _as_system(scores: Mapping) -> Mapping:
    return scores if "metrics" in scores else {"metrics": scores}


def _rows(report: Mapping) -> Sequence[tuple[str, Mapping]]:
    """(name, system) in reading order: floor, codec ceiling, the known systems, then any other."""
    systems = report.get("systems", {})
    rows = [(name, _as_system(report[name])) for name in CEILINGS if report.get(name)]
    rows += [(name, systems[name]) for name in SYSTEMS if name in systems]
    return rows + [(name, system) for name, system in systems.items() if name not in SYSTEMS]


def _tables(report: Mapping) -> list[dict]:
    rows = _rows(report)
    tables = []
    for title, columns in TABLES.items():
        group = "cost" if title == COST else "metrics"
        present = {
            name: hint
            for name, hint in columns.items()
            if any(name in system.get(group, {}) or name in system.get("not_admitted", {}) for _, system in rows)
        }
        if present:
            with_values = [(name, system) for name, system in rows if system.get(group)]
            tables.append(_table(title, present, [(n, s[group], s.get("not_admitted", {})) for n, s in with_values]))
    parts = [
        (name, system["metrics"]["diversity"].get("parts", {}), {})
        for name, system in rows
        if "diversity" in system.get("metrics", {})
    ]
    if parts:
        tables.append(_table("Diversity by part, ratios to the world's own spread over noise", PARTS, parts))
    return tables


def _table(title: str, columns: Mapping[str, str], rows: Sequence[tuple[str, Mapping, Mapping]]) -> dict:
    shown = [
        {
            "name": plain(name),
            "kind": {"student": "own", "floor": "floor", "codec": "floor"}.get(name, ""),
            "cells": [_cell(values.get(column), column in withheld) for column in columns],
        }
        for name, values, withheld in rows
    ]
    return {"title": title, "columns": [{"name": plain(n), "hint": h} for n, h in columns.items()], "rows": shown}


def _health(panels: Mapping) -> dict | None:
    """The health metrics as a table, with the quality gate after init."""
    rows = [(name, panels[name], {}) for name in ("teacher", "ar_teacher", "init", "student") if name in panels]
    return {"readiness": panels.get("readiness"), "table": _table("Health", HEALTH, rows)} if rows else None


def _cell(score, refused: bool) -> dict:
    if isinstance(score, Mapping):
        several = len(score.get("seeds") or ()) > 1
        spread = number(score["spread"], 2) if several and score.get("spread") is not None else ""
        error = number(score["error"], 2) if score.get("error") else ""
        return {"value": number(score.get("mean")), "spread": spread, "error": error, "refused": refused}
    return {"value": number(score), "spread": "", "error": "", "refused": refused}


def _dots(report: Mapping) -> list[dict]:
    rows = _rows(report)
    hints = {name: hint for columns in TABLES.values() for name, hint in columns.items()}
    plots = []
    for name, goal in DOTS.items():
        scores = [
            (system, values["metrics"][name])
            for system, values in rows
            if isinstance(values.get("metrics", {}).get(name), Mapping)
        ]
        if len(scores) > 1:
            plots.append({"name": plain(name), "hint": hints[name], "svg": dot_svg(scores, goal)})
    return plots


def _curve(title: str, series: Mapping[str, Sequence[tuple[float | int, float | int]]]) -> dict:
    kept = {name: points for name, points in series.items() if any(math.isfinite(y) for _, y in points)}
    return {"name": title, "svg": curve_svg(kept), "series": list(kept)}


def _sheets(sheets: Mapping[str, Sequence[Tensor] | Tensor], captions: Sequence[str], num_frames: int) -> list[dict]:
    if not sheets:
        return []
    names = list(sheets)
    result = []
    for index in range(min(len(clips) for clips in sheets.values())):
        title = captions[index] if index < len(captions) else f"condition {index + 1}"
        image = sheet_png([sheets[name][index] for name in names], num_frames)
        result.append({"title": title, "names": [plain(name) for name in names], "image": image})
    return result


def _samples(samples: Mapping[str, Path], out_dir: Path) -> list[dict]:
    embedded = sum(path.stat().st_size for path in samples.values()) <= EMBED_LIMIT
    shown = []
    for name, path in samples.items():
        if embedded:
            source = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
        else:
            source = Path(os.path.relpath(path, out_dir)).as_posix()
        shown.append({"name": name, "source": source})
    return shown


def _cases(report: Mapping) -> list[dict]:
    """Known cases as `eval.benchmark.admit` returned them: `report["admission"]` or metrics of stage extractors."""
    admission = report.get("admission") or report.get("stages", {}).get("extractors", {}).get("metrics") or {}
    cases = admission.get("cases", {})
    return [
        {
            "name": plain(name),
            "admitted": passed,
            "values": ", ".join(f"{plain(case)} {number(value)}" for case, value in cases.get(name, {}).items()),
        }
        for name, passed in admission.get("admitted", {}).items()
    ]


def _stages(stages: Mapping[str, Mapping]) -> list[dict]:
    return [
        {
            "name": name,
            "seconds": number(stage.get("seconds")),
            "fingerprint": str(stage.get("fingerprint", ""))[:12],
            "metrics": ", ".join(
                f"{plain(key)} {number(value)}"
                for key, value in (stage.get("metrics") or {}).items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            ),
        }
        for name, stage in stages.items()
    ]
