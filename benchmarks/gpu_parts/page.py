"""The results of all parts as one page."""

from collections.abc import Iterator, Mapping
from typing import Any

NEAR = 0.10  # of the plan


def page(result: Mapping[str, Any]) -> str:
    """A markdown page: the machine, a table for each kind of part, and a line for each part that is not ok."""
    r = result
    size = "" if r["gib"] is None else f", {r['gib']:.0f} GiB"
    facts = f"torch {r['torch']}, CUDA {r['cuda']}, revision {r['revision']}"
    lines = [f"# {r['device']}{size}, {r['cores']} cores", "", f"{facts}; {r['seconds']:.0f} s this time."]
    if r["quick"]:
        lines[-1] += " Tiny sizes (--quick): the numbers mean nothing."
    for table in (_equality, _sizes, _bench, _tiny):
        kind = {_equality: "equality", _sizes: "size.", _bench: "bench.", _tiny: "tiny."}[table]
        done = {name: part["result"] for name, part in r["parts"].items() if name.startswith(kind) and part["result"]}
        lines += ["", *table(done)] if done else []
    if tests := r["parts"].get("tests", {}).get("result"):
        lines += ["", f"pytest -m gpu: {tests['verdict']}"]
    rest = [f"- {name}: {part['status']}" for name, part in r["parts"].items() if part["status"] != "ok"]
    return "\n".join([*lines, *(["", "Not ok:", "", *rest] if rest else [])]) + "\n"


def _rows(head: str, *rows: str) -> Iterator[str]:
    yield f"| {head} |"
    yield "|" + "---|" * (head.count("|") + 1)
    yield from (f"| {row} |" for row in rows)


def _equality(done: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for name, case in done["equality"]["cases"].items():
        half = f"{case['bf16']:.1e} ({case['bf16_allowed']:.1e})" if "bf16" in case else "-"
        rows.append(f"{name} | {case['fp32']:.1e} ({case['fp32_allowed']:.1e}) | {half} | {_yes(case['equal'])}")
    return _rows("against the CPU in fp32 | fp32 off by (allowed) | bf16 off by (allowed) | equal", *rows)


def _sizes(done: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for part, found in done.items():
        for update, m in found["updates"].items():
            share, near = m["tflops"] / found["matmul_tflops"], abs(m["ratio"] - 1) <= NEAR
            rows.append(
                f"{part.partition('.')[2]} {update} | {m['planned_gib']:.3f} | {m['measured_gib']:.3f} | {m['ratio']:.3f} | "
                f"{_yes(near)} | {m['seconds']:.3f} | {m['tflops']:.3g} | {100 * share:.0f} %"
            )
    head = (
        "two layers, one update | planned GiB | measured GiB | ratio | within 10 % | s | TFLOP/s | of matrix products'"
    )
    return _rows(head, *rows)


def _bench(done: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        f"{name.partition('.')[2]} | {r['layers']} | {r['width']}x{r['height']} {r['dtype']} | {r['fps']:.1f} | "
        f"{1e3 * r['ttff_seconds']:.0f} | {1e3 * r['p50_chunk_seconds']:.0f} | {r['peak_memory_bytes'] / 2**30:.1f} | "
        f"{100 * r['roofline_fraction']:.1f} %"
        for name, r in done.items()
    ]
    return _rows(
        "student | layers | frames | FPS | first frame, ms | chunk p50, ms | peak GiB | of the roofline", *rows
    )


def _tiny(done: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        f"{name.partition('.')[2]} | {r['precision']} | {len(r['stages'])} | {sum(r['stages'].values()):.1f}"
        for name, r in done.items()
    ]
    return _rows("size=tiny | precision | stages done | s", *rows)


def _yes(value: bool) -> str:
    return "yes" if value else "NO"
