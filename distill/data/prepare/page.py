"""Pages to look at data with: self-contained HTML, everything escaped, nothing fetched from anywhere."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image, ImageDraw
from torch import Tensor

from teachers.errors import UserError
from teachers.files import atomic_write

THUMBNAIL = 144  # pixels of the long side
MOST_CARDS = 400  # pictures on a page
BINS = 24


def thumbnail(pixels: Tensor, box: Sequence[float] | None = None) -> bytes:
    """A small JPEG of pixels uint8 [h, w, 3], with the frame of `box` = (x, y, width, height) in shares of the picture."""
    picture = Image.fromarray(pixels.numpy())
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    if box is not None:
        x, y, width, height = box
        corners = (x * picture.width, y * picture.height, (x + width) * picture.width, (y + height) * picture.height)
        ImageDraw.Draw(picture).rectangle(corners, outline=(255, 170, 0))
    output = io.BytesIO()
    picture.save(output, "JPEG", quality=80)
    return output.getvalue()


def write_page(path: Path, template: str, context: Mapping[str, Any]) -> None:
    """Render distill/data/templates/`template` to `path`, whole or not at all; UserError where it cannot be written."""
    loader = jinja2.FunctionLoader(
        lambda name: (resources.files("distill.data") / "templates" / name).read_text("utf-8")
    )
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, loader=loader, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(picture=_picture, words=lambda name: name.replace("_", " "))
    text = environment.get_template(template).render(context)
    try:
        atomic_write(path, text)
    except OSError as error:
        raise UserError(f"page cannot be written ({error.strerror}): {path}; choose another place") from error


def _picture(data: bytes | None) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(data or b"").decode()


def histogram(values: Sequence[float], limits: Sequence[float | None] = (), unit: str = "") -> Markup:
    """Counts of values as an SVG, and dashed lines at `limits`; values that are not finite are left out."""
    known = [value for value in values if math.isfinite(value)]
    marks = [limit for limit in limits if limit is not None]
    if not known:
        return Markup("")
    low, high = min([*known, *marks]), max([*known, *marks])
    low, high = (low - 0.5, high + 0.5) if high == low else (low, high)
    counts = [0] * BINS
    for value in known:
        counts[min(BINS - 1, int((value - low) / (high - low) * BINS))] += 1
    width, height, most = 240, 80, max(counts)
    step = width / BINS
    bars = "".join(
        f'<rect x="{number * step:.1f}" y="{height * (1 - count / most):.1f}" width="{step - 1:.1f}" '
        f'height="{height * count / most:.1f}"><title>{count} from {low + number * (high - low) / BINS:.4g}</title></rect>'
        for number, count in enumerate(counts)
        if count
    )
    lines = "".join(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}"/>'
        for x in ((mark - low) / (high - low) * width for mark in marks)
    )
    return Markup(
        f'<svg viewBox="0 -2 {width} {height + 18}" role="img">{bars}{lines}<text x="0" y="{height + 13}">{low:.4g}</text>'
        f'<text x="{width}" y="{height + 13}" text-anchor="end">{high:.4g}{Markup.escape(unit)}</text></svg>'
    )


def spaced(rows: Sequence[Any], most: int = MOST_CARDS) -> list[Any]:
    """At most `most` of the rows, evenly spaced."""
    if len(rows) <= most:
        return list(rows)
    return [rows[number * len(rows) // most] for number in range(most)]
