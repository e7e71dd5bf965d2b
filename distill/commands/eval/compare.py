"""`distill eval compare A.json B.json`: the difference of two reports of one protocol on the same clips, with its uncertainty."""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.scoring.scoring import read_report
from eval.cards import Card, first_difference, from_plain, label_of
from eval.report.figures import number
from eval.report.tables import grid
from teachers.errors import UserError
from teachers.files import load_tensors

ROUNDS = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `distill eval compare`."""
    parser.add_argument("first", type=Path, metavar="A.json", help="what distill eval wrote, or its folder")
    parser.add_argument("second", type=Path, metavar="B.json")


def run(args: argparse.Namespace) -> int:
    """Print a row a metric; 0. Raises UserError for two protocols or two sets of clips."""
    one, two = read_report(args.first), read_report(args.second)
    check_same(one, two)
    sys.stdout.write("\n".join(lines(one, two, args.first, args.second)) + "\n")
    return 0


def check_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Raise UserError naming the first field in which protocol, clips or adapters of two reports differ."""
    if difference := first_difference(one["card"], two["card"]):
        raise UserError(f"scores of two protocols cannot be compared: {difference}; score both with one card")
    if one["n"] != two["n"] or one["clips"] != two["clips"]:
        other = sorted(set(one["clips"]) ^ set(two["clips"]))
        first = f", first {other[0]}" if other else ""
        raise UserError(
            f"scores of two sets of clips cannot be compared: {one['n']} and {two['n']} clips{first}; score the same clips"
        )
    theirs = two.get("adapters", {})
    for metric, who in one.get("adapters", {}).items():
        if metric in theirs and theirs[metric] != who:
            raise UserError(f"'{metric}' was made by {who} here and by {theirs[metric]} there; make it alike")


def bootstrap(a: Tensor, b: Tensor, rounds: int = ROUNDS, seed: int = 0) -> tuple[float, float, float]:
    """Mean of a - b over clips [N], and its 95 percent percentile interval: clips are resampled jointly, with replacement."""
    change = (a - b).double()
    draws = torch.randint(len(change), (rounds, len(change)), generator=torch.Generator().manual_seed(seed))
    low, high = torch.quantile(change[draws].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(change.mean()), low, high


def lines(one: dict[str, Any], two: dict[str, Any], first: Path, second: Path) -> list[str]:
    """Markdown: every metric that both have."""
    names = (one["name"], two["name"] if two["name"] != one["name"] else f"{two['name']} (second)")
    rows = (one["rows"][one["name"]], two["rows"][two["name"]])
    shared = [name for name in rows[0]["metrics"] if name in rows[1]["metrics"]]
    if not shared:
        raise UserError("the two reports share no metric; score both with the same --metrics")
    card, table = _card(one), []
    for metric in shared:
        values = [row["metrics"][metric]["mean"] for row in rows]
        if None in values:
            continue
        change, interval, how = _change(metric, card, rows, values, (one, two), (first, second))
        shown = [number(value) for value in values]
        label = one["columns"].get(metric, {}).get("label", metric)
        table.append([label, *shown, _signed(change), interval, how])
    heads = ["", *names, "difference", "95 %", "how"]
    return [f"protocol {label_of(one['card'])}, {one['n']} clips", "", *grid(heads, table)]


def _card(report: dict[str, Any]) -> Card | None:
    """The card of a report, with the metrics that come with the package; None where there is none."""
    plain = dict(report["card"])
    plain["metrics"] = {key: config for key, config in plain["metrics"].items() if ":" not in config.get("name", "")}
    return from_plain(plain) if plain["metrics"] else None


def _change(column: str, card: Card | None, rows: tuple, values: list[float], reports: tuple, paths: tuple[Path, Path]):
    """Difference, its interval in words, and how it was made."""
    sides = [row["clips"].get(column) for row in rows]
    if all(side is not None for side in sides):
        kept = [(a, b) for a, b in zip(*sides, strict=True) if a is not None and b is not None]
        if len(kept) > 2:
            a, b = torch.tensor(kept, dtype=torch.float64).unbind(1)
            change, low, high = bootstrap(a, b)
            how = "paired bootstrap" + (f", {len(kept)} clips" if len(kept) < len(sides[0]) else "")
            return change, f"{_signed(low)} to {_signed(high)}", how
    key = None if card is None else card.key_of(column)
    features = None if key is None else _features(key, reports, paths)
    found = None if card is None or key is None or features is None else card.metrics[key].difference(*features)
    if found is not None:
        change, error = found
        return change, f"{_signed(change - 1.96 * error)} to {_signed(change + 1.96 * error)}", "paired jackknife"
    return values[0] - values[1], "", "no values for single clips"


def _features(key: str, reports: tuple, paths: tuple[Path, Path]) -> tuple[list, list, list] | None:
    """Both systems' features of a metric and the real ones', where they still lie beside the reports and the real clips are
    the same."""
    files = [report.get("features", {}).get(key) for report in reports]
    if None in files or files[0]["real"] != files[1]["real"]:
        return None
    folders = [(path if path.is_dir() else path.parent) / "features" for path in paths]
    sides = ((0, "generated"), (1, "generated"), (0, "real"))
    try:
        ours, others, real = ([load_tensors(folders[at] / name) for name in files[at][side]] for at, side in sides)
    except UserError:
        return None
    return ours, others, real


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else ("" if value < 0 else "+") + number(value)
