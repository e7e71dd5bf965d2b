"""`distill eval benchmark`: students on data sets in one table each, beside the rows that papers print under theirs."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.commands.eval.command import REFUSED, add_settings, evaluate, is_student, setting
from distill.scoring.clip_sets import open_set
from distill.scoring.scoring import read_report
from eval.cards import first_difference, label_of
from eval.report.clip_report import NAMES, published
from eval.report.page import Page, write_page
from eval.report.tables import Row, Table, table
from teachers.errors import UserError
from teachers.files import make_folder


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
    parser.add_argument("--no-published", action="store_true", help="without the rows of papers")
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
        settings = setting(args, source, args.table / "features")
        for name, real in sets.items():
            clips = source if is_student(source) else source / name
            out = args.table / name / student
            try:
                reports.append(evaluate(settings, clips, real, out, student, name))
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


def _tables(name: str, reports: Sequence[dict[str, Any]], with_published: bool) -> list[Table]:
    """The data set's tables: ours above what papers print, and the measures that need no network."""
    label = label_of(reports[0]["card"])
    rows = []
    for key, title in NAMES.items():
        metrics: dict[str, Any] = {}
        for report in reports:  # one may have been scored with fewer metrics
            metrics = report["rows"].get(key, {}).get("metrics", {}) | metrics
        if metrics:
            rows.append(Row(name=title, scores=metrics, n=reports[0]["rows"][key]["n"], card=label, kind="floor"))
    for report in reports:
        row = report["rows"][report["name"]]
        rows.append(Row(name=report["name"], scores=row["metrics"], n=row["n"], card=label))
    papers = published()
    theirs = [
        Row(name=method, scores=scores, kind="theirs", card=f"theirs: {one['paper']} = {one['source']}; {one['card']}")
        for one in papers["tables"]
        if with_published and one["dataset"].lower() == name.lower()
        for method, scores in one["rows"].items()
    ]
    columns: dict[str, Any] = dict(papers["columns"])
    for report in reports:
        columns |= report["columns"]
    free = [metric for metric, column in columns.items() if column.get("without_network")]
    order = [*reports[0]["columns"], *columns]
    order += [metric for row in [*rows, *theirs] for metric in row.scores]
    others = [m for m in dict.fromkeys(order) if m not in free and columns.get(m, {}).get("table", "") is not None]
    found = [
        table(name, columns, others, [*rows, *theirs]),
        table(f"{name}, measures without a network", columns, free, rows),
    ]
    return [one for one in found if one.columns]


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


def _write(out: Path, found: list[Table], refused: dict[str, str], kept: dict[str, list[dict[str, Any]]]) -> None:
    cards = {report["card"]["sha256"]: report["card"] for rows in kept.values() for report in rows}
    card = next(iter(cards.values()))
    lines = [
        "Rows in one table are of one protocol and one N. Rows of papers stand below, under theirs: never one ranking.",
        "± is the jackknife error over clips. Real against real is at its own, smaller N.",
    ]
    make_folder(out)
    facts = {name: {report["name"]: report.get("source") for report in rows} for name, rows in kept.items()}
    rows = {name: {report["name"]: report["rows"][report["name"]] for report in rows} for name, rows in kept.items()}
    report = {"format": 2, "cards": list(cards.values()), "data": rows, "refused": refused}
    page = Page(
        title="Benchmark",
        lines=lines,
        tables=found,
        refused=refused,
        choices=card["choices"],
        details={
            f"Card {label_of(card)}": json.dumps(card, indent=1),
            "Sources": json.dumps(facts, indent=1),
        },
    )
    write_page(page, report | {"tables": [vars(one) for one in found]}, out, "benchmark")
