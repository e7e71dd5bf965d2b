"""`distill eval benchmark`: students on data sets in one table each, beside the rows that papers print under theirs."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.commands.eval import REFUSED, add_settings, evaluate, setting
from distill.scoring.clip_sets import open_set
from distill.scoring.scoring import read_report
from eval.cards import first_difference
from eval.clip_scores import WEIGHT_FREE
from eval.report.score_report import HINTS, NAMES, markdown, page, published, table
from teachers.errors import UserError
from teachers.files import atomic_write, make_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `distill eval benchmark`."""
    parser.add_argument(
        "--students",
        nargs="+",
        default=[],
        metavar="NAME=DIR",
        help="an exported student, or a folder that has one of clips for each data set",
    )
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=DIR", help="real clips: folders or manifests")
    parser.add_argument("--reports", nargs="+", type=Path, default=[], metavar="JSON", help="scored before")
    parser.add_argument(
        "--table", type=Path, required=True, metavar="DIR", help="benchmark.json, .md, .html and reports"
    )
    parser.add_argument("--no-published", action="store_true", help="leave the rows of papers out")
    add_settings(parser, default=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Score what was not, write the tables and print them: 0, or 3 when a row or a metric was refused."""
    students, data = _named(args.students, "--students"), _named(args.data, "--data")
    if bool(students) != bool(data) or not (students or args.reports):
        raise UserError("--students and --data belong together, or give --reports: distill eval benchmark")
    reports = [read_report(path) for path in args.reports]
    refused: dict[str, str] = {}
    sets = {name: open_set(path) for name, path in data.items()}
    for student, source in students.items():
        settings = setting(args, source)
        for name, real in sets.items():
            clips = source if (source / "spec.json").is_file() else source / name
            out = args.table / name / student
            try:
                reports.append(evaluate(settings, clips, real, out, student, name, cache=args.table / "features"))
            except UserError as error:
                refused[f"{student} on {name}"] = f"{student} on {name} refused: {error}"
    kept = comparable(reports, refused)
    if not kept:
        raise UserError("no row is left: " + " | ".join(refused.values()))
    found = [one for name, rows in kept.items() for one in _tables(name, rows, not args.no_published)]
    for name, rows in kept.items():
        for report in rows:
            refused |= {
                f"{report['name']} {name} {m}": f"{report['name']} on {name}: {r}" for m, r in report["refused"].items()
            }
    _write(args.table, found, refused, kept)
    sys.stdout.write((args.table / "benchmark.md").read_text(encoding="utf-8"))
    return REFUSED if refused else 0


def comparable(reports: Sequence[dict[str, Any]], refused: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    """Data set -> reports of one protocol with one N, those of the first; every other one is put into `refused` with the reason."""
    kept: dict[str, list[dict[str, Any]]] = {}
    for report in reports:
        name = report.get("data", "clips")
        rows = kept.setdefault(name, [])
        title = f"{report['name']} on {name}"
        first = rows[0] if rows else report
        difference = first_difference(first["card"], report["card"])
        if difference:
            refused[title] = f"{title} refused: another protocol, {difference}"
        elif report["n"] != first["n"]:
            refused[title] = f"{title} refused: N differs, {report['n']} clips and {first['n']} in the first row"
        elif report["clips"] != first["clips"]:
            refused[title] = f"{title} refused: other clips than in the first row"
        elif any(report["name"] == row["name"] for row in rows):
            refused[title] = f"{title} refused: two rows of that name; score one of them with another --name"
        else:
            rows.append(report)
    return {name: rows for name, rows in kept.items() if rows}


def _tables(name: str, reports: Sequence[dict[str, Any]], with_published: bool) -> list[dict[str, Any]]:
    """The data set's tables: ours above what papers print, and the measures that need no network."""
    rows: list[tuple[str, Any, Any]] = []
    for key in ("ground_truth", "floor"):
        metrics: dict[str, Any] = {}
        for report in reports:  # one may have been scored with fewer metrics
            metrics = report["rows"].get(key, {}).get("metrics", {}) | metrics
        if metrics:
            rows.append((NAMES[key], {"n": reports[0]["rows"][key]["n"], "metrics": metrics}, reports[0]["card"]))
    rows += [(report["name"], report["rows"][report["name"]], report["card"]) for report in reports]
    papers = [one for one in published() if with_published and one["dataset"].lower() == name.lower()]
    theirs: list[tuple[str, Any, Any]] = []
    for paper in papers:
        card = f"theirs: {paper['paper']} = {paper['source']}; {paper['card']}"
        theirs += [(method, {"n": None, "metrics": found}, card) for method, found in paper["rows"].items()]
    found = []
    for title, shown, free in ((name, [*rows, *theirs], False), (f"{name}, measures without a network", rows, True)):
        wanted = dict.fromkeys(
            metric for _, row, _ in shown for metric in row["metrics"] if (metric in WEIGHT_FREE) == free
        )
        columns = [*(m for m in HINTS if m in wanted), *(m for m in wanted if m not in HINTS)]
        if columns:
            kept = [row for row in shown if any(metric in row[1]["metrics"] for metric in columns)]
            found.append(table(title, columns, kept))
    return found


def _named(words: Sequence[str], option: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for word in words:
        name, sign, path = word.partition("=")
        if not (sign and name and path) or "/" in name or name in (".", ".."):
            raise UserError(f"{option} takes NAME=DIR: got '{word}'")
        if name in found:
            raise UserError(f"{option} names {name} twice; give every one a name of its own")
        if not Path(path).exists():
            raise UserError(f"{option} {name}: {path} is not there; check the path")
        found[name] = Path(path)
    return found


def _write(
    out: Path, found: list[dict[str, Any]], refused: dict[str, str], kept: dict[str, list[dict[str, Any]]]
) -> None:
    cards = {report["card"]["sha256"]: report["card"] for rows in kept.values() for report in rows}
    card = next(iter(cards.values()))
    lines = [
        "Rows in one table are of one protocol and one N. Rows of papers stand below, under theirs: never one ranking.",
        "± is the jackknife error over clips. Real against real is at its own, smaller N.",
    ]
    make_folder(out)
    facts = {name: {report["name"]: report.get("source") for report in rows} for name, rows in kept.items()}
    rows = {name: {report["name"]: report["rows"][report["name"]] for report in rows} for name, rows in kept.items()}
    text = {"format": 1, "cards": list(cards.values()), "data": rows, "tables": found, "refused": refused}
    atomic_write(out / "benchmark.html", page("Benchmark", lines, found, refused, card, facts))
    atomic_write(out / "benchmark.md", markdown("Benchmark", lines, found, refused))
    atomic_write(out / "benchmark.json", json.dumps(text, indent=1, allow_nan=False) + "\n")
