"""Tables of scores, for runs and for `distill eval`: columns as the metrics state them, rows of systems; and the same as
markdown."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eval.metric import Column
from eval.report.figures import number, plain

OTHERS = "From other programs"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One system. scores: column -> a number, or {mean, error, spread, seeds}; withheld: columns that were not admitted

    kind: "own", "floor", "theirs" or ""; n: clips; card: the label of the protocol, with " = WORDS" of a published one
    """

    name: str
    scores: Mapping[str, Any]
    withheld: frozenset[str] = frozenset()
    kind: str = ""
    n: int | None = None
    card: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """What is shown: columns {name, hint}, rows {name, kind, card, n, cells {value, spread, error, refused}}, notes below."""

    title: str
    columns: list[dict[str, str]]
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    with_card: bool = False


def tables(columns: Mapping[str, Mapping[str, Any]], rows: Sequence[Row]) -> list[Table]:
    """A table for each title of the columns (`Column.plain`), in their order; scores without a column stand apart, columns and rows
    without a score do not stand at all."""
    titles: dict[str, list[str]] = {}
    for name, column in columns.items():
        if column["table"] is not None:
            titles.setdefault(column["table"], []).append(name)
    others = dict.fromkeys(name for row in rows for name in row.scores if name not in columns)
    found = [table(title, columns, names, rows) for title, names in (*titles.items(), (OTHERS, [*others]))]
    return [one for one in found if one.columns]


def table(title: str, columns: Mapping[str, Mapping[str, Any]], names: Sequence[str], rows: Sequence[Row]) -> Table:
    """The table of these columns."""
    shown = [name for name in names if any(name in row.scores or name in row.withheld for row in rows)]
    kept = [row for row in rows if any(name in row.scores or name in row.withheld for name in shown)]
    heads = [_head(name, columns.get(name)) for name in shown]
    return Table(
        title=title,
        columns=heads,
        rows=[_row(row, shown) for row in kept],
        notes=list(dict.fromkeys(row.card for row in kept if " = " in row.card)),
        with_card=any(row.card for row in kept),
    )


def _head(name: str, column: Mapping[str, Any] | None) -> dict[str, str]:
    if column is None:
        return {"name": plain(name), "hint": ""}
    shown = Column(column["label"], column.get("better"), column.get("hint", ""))
    return {"name": shown.label, "hint": shown.words}


def _row(row: Row, names: Sequence[str]) -> dict[str, Any]:
    return {
        "name": row.name,
        "kind": row.kind,
        "card": row.card.partition(" = ")[0],
        "n": "" if row.n is None else str(row.n),
        "cells": [cell(row.scores.get(name), name in row.withheld, row.kind == "theirs") for name in names],
    }


def cell(score: Any, refused: bool = False, as_printed: bool = False) -> dict[str, Any]:
    """A cell of `Table`: of a number, of {mean, error, spread, seeds}, or of nothing."""
    if refused or score is None:
        return {"value": "", "spread": "", "error": "", "refused": refused}
    if not isinstance(score, Mapping):
        return {"value": f"{score:g}" if as_printed else number(score), "spread": "", "error": "", "refused": False}
    several = len(score.get("seeds") or ()) > 1
    spread = number(score["spread"], 2) if several and score.get("spread") is not None else ""
    error = "" if score.get("error") is None else number(score["error"], 2)
    return {"value": number(score.get("mean")), "spread": spread, "error": error, "refused": False}


def words(cell: Mapping[str, Any]) -> str:
    """A cell in one line: mean, half the range over seeds, standard error."""
    if cell["refused"]:
        return "not admitted"
    spread = f" ± {cell['spread']}" if cell["spread"] else ""
    if not cell["error"]:
        return cell["value"] + spread
    return f"{cell['value']}{spread} (se {cell['error']})" if spread else f"{cell['value']} ± {cell['error']}"


def grid(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A markdown table, line by line."""
    head, *lines = ("| " + " | ".join(cells) + " |" for cells in (heads, *rows))
    return [head, "|" + "---|" * len(heads), *lines]


def markdown(title: str, lines: Sequence[str], found: Sequence[Table], refused: Mapping[str, str]) -> str:
    """The tables for a terminal, a README or a log."""
    parts = [f"# {title}", "", *lines, ""]
    for one in found:
        heads = [f"{column['name']} ({column['hint']})" if column["hint"] else column["name"] for column in one.columns]
        heads = ["", *(["card", "N"] if one.with_card else []), *heads]
        rows = [
            [row["name"], *([row["card"], row["n"]] if one.with_card else []), *map(words, row["cells"])]
            for row in one.rows
        ]
        parts += [f"## {one.title}", "", *grid(heads, rows), ""]
        parts += [*(f"{note}  " for note in one.notes), ""] if one.notes else []
    if refused:
        parts += ["## Refused", "", *(f"- {reason}" for reason in refused.values()), ""]
    return "\n".join(parts)
