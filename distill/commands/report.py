"""`distill report compare RUN RUN ..`: finished runs beside each other, as one page and one table on stdout."""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from eval.report.page import render
from eval.report.run_comparison import Run, comparison_page, comparison_text
from teachers.disk.read import read_yaml_mapping
from teachers.errors import UserError
from teachers.files import atomic_write, flatten, make_folder, read_json_or_none

PLACES = ("run_dir", "reuse")  # keys of a recipe that say where a run lies


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `distill report`."""
    verbs = parser.add_subparsers(dest="report_verb", metavar="VERB", required=True)
    compare = verbs.add_parser("compare", help="scores, costs and recipe differences of finished runs")
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, the one to compare with first")
    compare.add_argument(
        "--out",
        type=Path,
        default=Path("compare.html"),
        metavar="PAGE.html",
        help="page to write (default %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the page and print the table; 0, also where runs are not comparable, which a line says."""
    runs = read_runs(args.runs)
    if args.out.is_dir():
        raise UserError(f"--out is a folder: {args.out}; name a file in it, as {args.out / 'compare.html'}")
    make_folder(args.out.parent)
    atomic_write(args.out, render(comparison_page(runs, args.out.parent)))
    sys.stdout.write(comparison_text(runs))
    sys.stderr.write(f"distill: the page is {args.out}\n")
    return 0


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The finished runs of these folders, named by folder, or by path where two folders have one name. UserError for fewer than
    two, for a folder that is given twice and for one without a report."""
    times = Counter(folder.resolve() for folder in folders)
    if len(folders) < 2:
        raise UserError("one run is no comparison: distill report compare RUN RUN [RUN ..]")
    if twice := [str(folder) for folder in folders if times[folder.resolve()] > 1]:
        raise UserError(f"a run is given twice: {twice[0]}; name each once")
    names = [folder.resolve().name for folder in folders]
    alike = Counter(names)
    return [
        _read(folder, name if alike[name] == 1 else str(folder)) for folder, name in zip(folders, names, strict=True)
    ]


def _read(folder: Path, name: str) -> Run:
    report = read_json_or_none(folder / "report.json")
    if not isinstance(report, dict):
        raise UserError(f"no finished run: {folder} has no readable report.json; give the run_dir of a run that ended")
    missing = {"systems", "columns", "protocol", "floor", "stages"} - report.keys()
    if missing or not isinstance(report["systems"], dict) or "student" not in report["systems"]:
        raise UserError(
            f"no report of a run: {folder / 'report.json'} lacks {min(missing, default='a student')}; run again"
        )
    recipe = flatten(read_yaml_mapping(folder / "recipe.yaml", "take it from the run's backup"))
    for key in PLACES:
        recipe.pop(key, None)
    run = Run(name=name, folder=folder, report=report, recipe=recipe)
    both = [run, replace(run, name=f"{name} again")]
    try:  # a report may have been edited anywhere, and each of its values is shown somewhere
        comparison_text(both)
        comparison_page(both, folder)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"[:100]
        raise UserError(f"damaged report: {folder / 'report.json'} ({what}); run its recipe again") from error
    return run
