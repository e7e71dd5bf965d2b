"""The report of `distill eval`: eval.json as tables, and what must stand beside the numbers."""

from collections.abc import Mapping
from importlib import resources
from typing import Any

import yaml

from eval import golden
from eval.cards import label_of
from eval.report.tables import Row, Table, tables
from teachers.disk.read import LOADER

NAMES = {"ground_truth": "ground truth", "floor": "real against real"}
FLOOR = (
    "Real against real: random halves of the real clips, unpaired and at their own, smaller N, ± spread over splits."
)


def report_tables(report: Mapping[str, Any]) -> list[Table]:
    """The tables of one eval.json, rows ground truth, floor, the system."""
    label = label_of(report["card"])
    rows = [
        Row(
            name=str(NAMES.get(name, name)),
            scores=row["metrics"],
            n=row["n"],
            card=label,
            kind="floor" if name in NAMES else "",
        )
        for name, row in report["rows"].items()
    ]
    return tables(report["columns"], rows)


def headline(report: Mapping[str, Any]) -> list[str]:
    """What must stand beside the numbers, a line each."""
    card = report["card"]
    frames, height, width, top, bottom = report["shape"]
    lines = [
        f"Protocol {label_of(card)}: {card['note']}",
        f"{report['n']} clips of {frames} frames, {width} x {height}, {top / bottom:.5g} fps. "
        f"± is one standard error, {card['errors']}.",
    ]
    if "floor" in report["rows"] and report["rows"]["floor"]["metrics"]:
        lines.append(FLOOR)
    lines += report["notes"]
    for name, network in golden.CHECKS.items():
        result = report["golden"].get(name)
        if network in card["weights"] and result:
            outcome = "passed" if result["passed"] else "FAILED"
            lines.append(f"Golden {name}: {outcome}, expected {result['expected']}, measured {result['found']}.")
        elif network in card["weights"]:
            lines.append(f"Golden {name}: not run; distill doctor --golden runs it.")
    return lines


def published() -> dict[str, Any]:
    """What papers print: `columns` as tables take them, and `tables`: paper, source, card, dataset, rows name -> metric ->
    value."""
    return yaml.load((resources.files("eval") / "published.yaml").read_text(encoding="utf-8"), LOADER)
