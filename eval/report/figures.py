"""Inline figures of the report: SVG curves and dot plots (coloured by the page's CSS), contact sheets."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import torch
from PIL import Image
from torch import Tensor

NUM_COLOURS = 5  # --c0 .. --c4 in the style sheet


def ticks(low: float | int, high: float | int, num: int = 5) -> list[float]:
    """About `num` round numbers that cover [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / max(num - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float | int | None, significant: int = 3) -> str:
    """`significant` digits, all of a whole number, a dash for nothing."""
    if value is None or value != value:
        return "-"
    if value == 0:
        return "0"
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    if size >= 1e5 or size < 1e-4:
        return f"{value:.1e}"
    digits = max(0, significant - 1 - math.floor(math.log10(size)))
    return f"{value:,.{min(digits, 5)}f}"


def curve_svg(series: Mapping[str, Sequence[tuple[float | int, float | int]]], log_scale: bool | None = None) -> str:
    """Lines over steps; the y axis is logarithmic if all values are positive and span a factor of 20 (or as asked)."""
    width, height, right, top, bottom = 440, 230, 12, 10, 30
    lines = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    logarithmic = (min(ys) > 0 and max(ys) / min(ys) > 20) if log_scale is None else log_scale
    scale = math.log10 if logarithmic else float
    low, high = scale(min(ys)), scale(max(ys))
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = low - margin, high + margin
    x_low, x_high = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    marks = _log_ticks(low, high) if logarithmic else ticks(low, high)
    left = max(52.0, 10 + 6.6 * max((len(f"{mark:g}") for mark in marks), default=0))  # 11 px digits

    def at(x: float | int, y: float | int) -> tuple[float, float]:
        across = left + (x - x_low) / (x_high - x_low) * (width - left - right)
        return across, top + (high - scale(y)) / (high - low) * (height - top - bottom)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(", ".join(lines))} over steps">']
    for mark in marks:
        y = at(x_low, mark)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{mark:g}</text>')
    for mark in (mark for mark in ticks(x_low, x_high) if float(mark).is_integer()):  # steps
        x = at(mark, ys[0])[0]
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 12}" text-anchor="middle">{mark:,.0f}</text>')
    for index, points in enumerate(lines.values()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(x, y) for x, y in _thin(points, 400)))
        parts.append(f'<polyline class="line" style="stroke:var(--c{index % NUM_COLOURS})" points="{path}"/>')
        if len(points) <= 12:
            for x, y in (at(x, y) for x, y in points):
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" style="fill:var(--c{index % NUM_COLOURS})"/>')
    return "".join(parts) + "</svg>"


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(low), math.ceil(high) + 1)
    factors = (1,) if high - low > 2.5 else (1, 2, 5)
    return [
        factor * 10.0**decade
        for decade in decades
        for factor in factors
        if low <= math.log10(factor * 10.0**decade) <= high
    ]


def _thin(points: Sequence[tuple[float | int, float | int]], most: int) -> Sequence[tuple[float | int, float | int]]:
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / most)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def dot_svg(rows: Sequence[tuple[str, Mapping]], target: float | None = None) -> str:
    """One metric: a row a (name as it is shown, score), the mean as a dot, seeds as ticks and a bar of +- the error over clips.

    The axis starts at 0 unless values are negative; `target` draws a dashed line.
    """
    shown = [(name, score) for name, score in rows if score.get("mean") is not None]
    if not shown:
        return ""
    width, left, right, pitch, top = 340, 116, 50, 22, 6
    height = top + pitch * len(shown) + 22
    reach = [score["mean"] + (score.get("error") or 0) for _, score in shown] + [target or 0.0]
    low = min(0.0, *(score["mean"] - (score.get("error") or 0) for _, score in shown))
    high = max(*reach, 1e-9) * 1.04

    def at(value: float | int) -> float:
        return left + (min(max(value, low), high) - low) / (high - low) * (width - left - right)

    base = top + pitch * len(shown)
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img">']
    for mark in ticks(low, high, 4):
        parts.append(f'<line class="grid" x1="{at(mark):.1f}" x2="{at(mark):.1f}" y1="{top}" y2="{base}"/>')
        parts.append(f'<text class="tick" x="{at(mark):.1f}" y="{base + 14}" text-anchor="middle">{mark:g}</text>')
    if target is not None:
        parts.append(f'<line class="goal" x1="{at(target):.1f}" x2="{at(target):.1f}" y1="{top}" y2="{base}"/>')
    for index, (name, score) in enumerate(shown):
        y, mean, error = top + pitch * (index + 0.5), score["mean"], score.get("error") or 0.0
        kind = "own" if name == "student" else "other"
        parts.append(
            f'<text class="name {kind}" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>'
        )
        parts.append(
            f'<line class="bar {kind}" x1="{at(mean - error):.1f}" x2="{at(mean + error):.1f}" y1="{y}" y2="{y}"/>'
        )
        for seed in score.get("seeds") or ():
            parts.append(
                f'<line class="seed {kind}" x1="{at(seed):.1f}" x2="{at(seed):.1f}" y1="{y - 5}" y2="{y + 5}"/>'
            )
        parts.append(f'<circle class="dot {kind}" cx="{at(mean):.1f}" cy="{y}" r="3.6"/>')
        parts.append(
            f'<text class="value {kind}" x="{width - 4}" y="{y + 4:.1f}" text-anchor="end">{number(mean)}</text>'
        )
    return "".join(parts) + "</svg>"


def plain(name: str) -> str:
    """A metric's or system's name for people."""
    words = {"fid": "FID", "fvd": "FVD", "kid": "KID", "nfe": "NFE", "ttff": "TTFF", "dmd": "DMD"}
    return " ".join(words.get(word, word) for word in name.split("_"))


def sheet_image(rows: Sequence[Tensor], num_frames: int = 8) -> str:
    """Contact sheet as a data URI, lossless WebP: a row a clip (uint8 [3, T, H, W]), the same frames, pixel for pixel."""
    frames = min(clip.shape[1] for clip in rows)
    times = torch.linspace(0, frames - 1, min(num_frames, frames)).round().long()
    gap = 1
    height, width = rows[0].shape[2:]
    sheet = torch.zeros(len(rows) * (height + gap) - gap, len(times) * (width + gap) - gap, 4, dtype=torch.uint8)
    for r, clip in enumerate(rows):
        for c, time in enumerate(times.tolist()):
            cell = sheet[r * (height + gap) :, c * (width + gap) :][:height, :width]
            cell[..., :3] = clip[:, time].permute(1, 2, 0)
            cell[..., 3] = 255
    buffer = io.BytesIO()
    Image.fromarray(sheet.numpy(), "RGBA").save(buffer, "WEBP", lossless=True)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def contact_sheets(
    sheets: Sequence[tuple[str, Sequence[tuple[str, Tensor]]]], num_frames: int = 8
) -> list[dict[str, Any]]:
    """(title, [(row name, uint8 [3, T, H, W])]) each."""
    return [
        {
            "title": title,
            "names": [name for name, _ in rows],
            "image": sheet_image([clip for _, clip in rows], num_frames),
        }
        for title, rows in sheets
    ]
