"""The report of a run: report.json for programs, report.md and one self-contained report.html for people."""

import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor

from eval.cards import label_of
from eval.metric import Column
from eval.report.conclusion import conclusion, is_withheld
from eval.report.figures import contact_sheets, curve_svg, dot_svg, number, plain
from eval.report.page import Page, write_page
from eval.report.tables import Row, Table, table, tables
from eval.report.videos import relative, side_by_side

CEILINGS = ("floor", "codec")  # real clips, and the same through the codec: what no system can be expected to beat
SYSTEMS = ("teacher", "teacher_few_step", "ar_teacher", "zero_shot", "init", "student")
NOTE = (
    "Mean over noise seeds ± half the range over seeds; then the jackknife standard error over clips. The floor is real clips "
    "against other real clips, the codec row the same clips encoded and decoded: no system can be expected to do better."
)
HEALTH_NOTE = (
    "Health: a few other held-out conditions, read beside the teacher. Noise is how far a clip moves with another noise; audio "
    "and text how far it moves with another sound or text under the same noise, as a multiple of that."
)


def _columns(title: str, hints: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    return {name: Column(plain(name), hint=hint, table=title).plain() for name, hint in hints.items()}


COST = _columns(
    "Cost",
    {
        "nfe_per_chunk": "evaluations",
        "seconds_per_video_second": "one stream",
        "batch_seconds_per_video_second": "in a batch",
        "ttff_seconds": "lower is better",
        "fps": "higher is better",
    },
)
HEALTH = _columns(
    "Health",
    {
        "black": "share of frames",
        "frozen": "share of frames",
        "clipped": "share of pixels",
        "saturation": "grey levels",
        "motion_energy": "grey levels",
        "seam": "1 is none",
        "noise": "grey levels",
        "audio": "over noise",
        "text": "over noise",
        "sharpness": "edge energy",
        "saturation_change": "last chunk less first",
        "motion_change": "last chunk less first",
        "sharpness_change": "last chunk less first",
    },
)


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
    videos: Mapping[str, Mapping[str, Path]],
    out_dir: Path,
    captions: Sequence[str] = (),
    sheet_frames: int = 8,
) -> Path:
    """Write report.json, report.md and report.html into `out_dir` and return the path of the page.

    `report` follows design section 6; its metrics are `{mean, spread, error, seeds}`, its `columns` those of the card. Scores that
    were not admitted leave `metrics` for `not_admitted` and are never printed. curves: title -> series -> [(step, value)].
    sheets: system -> K clips uint8 [3, T, H, W], the same K conditions in the same order, `captions` their texts. videos:
    condition -> system -> mp4 file, embedded while they are small, else linked; report.json has their paths from `out_dir`.
    """
    clean = _finite(_withhold(report))
    if videos:
        clean["videos"] = {
            name: {system: relative(file, out_dir) for system, file in group.items()} for name, group in videos.items()
        }
    lines = clean.get("targets") or {name: target(value) for name, value in clean.get("ratios", {}).items()}
    checks = [_check(name, line) for name, line in lines.items()]
    protocol = clean.get("protocol") or {}
    page = Page(
        **_head(clean),
        conclusion=conclusion({**clean, "targets": lines}),
        videos=side_by_side(
            {name: {plain(x): file for x, file in group.items()} for name, group in videos.items()}, out_dir
        ),
        fps=fps_of(protocol),
        label=protocol.get("note", ""),
        checks=checks,
        note=NOTE + (f" {HEALTH_NOTE}" if clean.get("health") else ""),
        tables=_tables(clean),
        left_out={plain(name): why for name, why in clean.get("left_out", {}).items()},
        plots=_plots(clean),
        curves=[_curve(title, series) for title, series in curves.items() if any(series.values())],
        sheets=_sheets(sheets, captions, sheet_frames),
        cases=_cases(clean),
        stages=_stages(clean.get("stages", {})),
        choices=protocol.get("choices", []),
        details=_details(clean),
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    write_page(page, clean, out_dir, "report")
    return out_dir / "report.html"


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
    """Move scores that were not admitted out of every `metrics`; where no admission was tried nothing is withheld."""
    admitted = ((report.get("protocol") or {}).get("run") or {}).get("admitted")
    if admitted is None:
        return dict(report)
    columns = {name: Column(**column) for name, column in report.get("columns", {}).items()}

    def split(system: Mapping) -> dict:
        metrics = system.get("metrics", {})
        kept = {name: value for name, value in metrics.items() if name in columns and columns[name].admitted(admitted)}
        withheld = {name: value for name, value in metrics.items() if name not in kept}
        return {**system, "metrics": kept, **({"not_admitted": withheld} if withheld else {})}

    systems = {name: split(system) for name, system in report.get("systems", {}).items()}
    ceilings = {name: split(_as_system(report[name])) for name in CEILINGS if report.get(name)}

    def unchecked(name: str, line: Mapping) -> Mapping:
        return {**line, "passed": None, "not_admitted": True} if is_withheld(name, systems) else line

    targets = {name: unchecked(name, line) for name, line in report.get("targets", {}).items()}
    return {**report, "targets": targets, "systems": systems, **ceilings}


def _head(report: Mapping) -> dict[str, Any]:
    where = ", ".join(f"{key} {value}" for key, value in report.get("device", {}).items())
    seconds = sum(stage.get("seconds") or 0 for stage in report.get("stages", {}).values())
    counts = ((report.get("protocol") or {}).get("run") or {}).get("counts", {})
    clips = f"{counts['num_conditions']} held-out conditions, {counts['num_seeds']} noise seeds" if counts else ""
    took = f"all stages {seconds / 60:.1f} min" if seconds else ""
    lines = ["; ".join(part for part in (clips, took, where) if part)]
    health = report.get("health") or {}
    stated = [
        f"{when}: {health[name]}."
        for when, name in (("After init", "readiness"), ("Student", "outcome"))
        if health.get(name)
    ]
    return {
        "title": f"Distillation report: {report.get('recipe', 'run')}",
        "lines": [*lines, *report.get("notes", []), *stated],
    }


def fps_of(protocol: Mapping) -> float:
    """Frames a second of a run's clips, from its card."""
    return float(Fraction(str(((protocol.get("run") or {}).get("geometry") or {}).get("fps", 25))))


def _details(report: Mapping) -> dict[str, str]:
    protocol = report.get("protocol") or {}
    card = f"Card {label_of(protocol)}" if protocol else "Card"
    versions = {key: report.get(key, {}) for key in ("revision", "versions", "device")}
    texts = {card: protocol, "Recipe": report.get("recipe", {}), "Versions and device": versions}
    return {title: json.dumps(value, indent=1) for title, value in texts.items()}


def _check(name: str, line: Mapping) -> dict:
    measured = "not admitted" if line.get("not_admitted") else number(line["value"])
    return {**line, "name": plain(name), "value": measured}


def _as_system(scores: Mapping) -> Mapping:
    return scores if "metrics" in scores else {"metrics": scores}


def _rows(report: Mapping) -> Sequence[tuple[str, Mapping]]:
    """(name, system) in reading order: floor, codec ceiling, the known systems, then any other."""
    systems = report.get("systems", {})
    rows = [(name, _as_system(report[name])) for name in CEILINGS if report.get(name)]
    rows += [(name, systems[name]) for name in SYSTEMS if name in systems]
    return rows + [(name, system) for name, system in systems.items() if name not in SYSTEMS]


def _row(name: str, scores: Mapping, withheld: Mapping) -> Row:
    kind = {"student": "own", "floor": "floor", "codec": "floor"}.get(name, "")
    return Row(name=plain(name), scores=scores, withheld=frozenset(withheld), kind=kind)


def _tables(report: Mapping) -> list[Table]:
    rows, columns = _rows(report), report.get("columns", {})
    found = tables(columns, [_row(name, x.get("metrics", {}), x.get("not_admitted", {})) for name, x in rows])
    for metric, column in columns.items():
        parts = {name: (x.get("metrics", {}).get(metric) or {}).get("parts") for name, x in rows}
        shown = [_row(name, values, {}) for name, values in parts.items() if values]
        if shown:
            names = list(dict.fromkeys(part for row in shown for part in row.scores))
            found.append(table(f"{column['label'].capitalize()} by part", {}, names, shown))
    found += tables(
        COST, [_row(name, {k: x["cost"][k] for k in COST if k in x["cost"]}, {}) for name, x in rows if x.get("cost")]
    )
    panels = report.get("health") or {}
    return found + tables(HEALTH, [_row(x, panels[x], {}) for x in SYSTEMS if x in panels])


def _plots(report: Mapping) -> list[dict]:
    rows, plots = _rows(report), []
    for name, column in report.get("columns", {}).items():
        scores = [(system, values.get("metrics", {}).get(name)) for system, values in rows]
        scores = [(system, score) for system, score in scores if isinstance(score, Mapping)]
        if column["plot"] and column["table"] is not None and len(scores) > 1:
            shown = Column(**column)
            goal = shown.better if isinstance(shown.better, float) else None
            plots.append(
                {
                    "name": shown.label,
                    "hint": shown.words,
                    "svg": dot_svg([(plain(name), score) for name, score in scores], goal),
                }
            )
    return plots


def _curve(title: str, series: Mapping[str, Sequence[tuple[float | int, float | int]]]) -> dict:
    kept = {name: points for name, points in series.items() if any(math.isfinite(y) for _, y in points)}
    return {"name": title, "svg": curve_svg(kept), "series": list(kept)}


def _sheets(sheets: Mapping[str, Sequence[Tensor] | Tensor], captions: Sequence[str], num_frames: int) -> list[dict]:
    count = min((len(clips) for clips in sheets.values()), default=0)
    titles = [captions[i] if i < len(captions) else f"condition {i + 1}" for i in range(count)]
    rows = [[(plain(name), clips[i]) for name, clips in sheets.items()] for i in range(count)]
    return contact_sheets(list(zip(titles, rows, strict=True)), num_frames)


def _cases(report: Mapping) -> list[dict]:
    """Known cases as `eval.embedded.admission.admit` returned them: metrics of the stage extractors."""
    admission = report.get("stages", {}).get("extractors", {}).get("metrics") or {}
    cases = admission.get("cases", {})
    return [
        {
            "name": plain(name),
            "admitted": passed,
            "known": ", ".join(f"{plain(case)} {number(value)}" for case, value in cases.get(name, {}).items()),
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
