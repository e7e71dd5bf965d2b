"""/health and /metrics of a server of several workers, from what each of them reports."""

import re
from collections.abc import Iterable, Mapping

SERVING = ("ok", "full")
LINE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)")


def overall(statuses: Iterable[str]) -> str:
    """The status of the whole server: the best of its workers'; "starting" and "ended" ones serve nobody."""
    known = set(statuses)
    return next((status for status in (*SERVING, "closing", "stuck", "starting") if status in known), "ended")


def labelled(texts: Mapping[str, str]) -> str:
    """Expositions of Prometheus' text format by worker as one, each series with the label `worker`."""
    heads: dict[str, list[str]] = {}
    series: dict[str, list[str]] = {}
    for worker, text in texts.items():
        name = ""
        for line in text.splitlines():
            if line.startswith("# "):
                name = line.split(" ", 3)[2]
                head = heads.setdefault(name, [])
                if line not in head:
                    head.append(line)
            elif found := LINE.fullmatch(line):
                labels = f'worker="{worker}"' + (f",{found[2]}" if found[2] else "")
                series.setdefault(name, []).append(f"{found[1]}{{{labels}}} {found[3]}")
    return "\n".join(line for name, head in heads.items() for line in (*head, *series.get(name, ()))) + "\n"
