"""Self-contained HTML pages to inspect data: everything escaped, no external resources."""

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

from teachers.files import atomic_write

THUMBNAIL = 144  # pixels of the long side
MAX_CARDS = 400  # thumbnails on a page
BINS = 24


def thumbnail(pixels: Tensor, box: Sequence[float] | None = None) -> bytes:
    """A small JPEG of pixels uint8 [h, w, 3], with the frame of `box` = (x, y, width, height) in fractions of the image."""
    image = Image.fromarray(pixels.numpy())
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    if box is not None:
        x, y, width, height = box
        corners = (x * image.width, y * image.height, (x + width) * image.width, (y + height) * image.height)
        ImageDraw.Draw(image).rectangle(corners, outline=(255, 170, 0))
    output = io.BytesIO()
    image.save(output, "JPEG", quality=80)
    return output.getvalue()


def write_page(path: Path, template: str, context: Mapping[str, Any]) -> None:
    """Render distill/data/templates/`template` to `path`, whole or not at all; UserError where it cannot be written."""
    loader = jinja2.FunctionLoader(
        lambda name: (resources.files("distill.data") / "templates" / name).read_text("utf-8")
    )
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, loader=loader, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(data_uri=_data_uri, label=lambda name: name.replace("_", " "))
    atomic_write(path, environment.get_template(template).render(context))


def _data_uri(data: bytes | None) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(data or b"").decode()


def histogram(values: Sequence[float], limits: Sequence[float | None] = (), unit: str = "") -> Markup:
    """Counts of values as an SVG, and dashed lines at `limits`; values that are not finite are ignored."""
    finite = [value for value in values if math.isfinite(value)]
    lines_at = [limit for limit in limits if limit is not None]
    if not finite:
        return Markup("")
    low, high = min([*finite, *lines_at]), max([*finite, *lines_at])
    low, high = (low - 0.5, high + 0.5) if high == low else (low, high)
    counts = [0] * BINS
    for value in finite:
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
        for x in ((limit - low) / (high - low) * width for limit in lines_at)
    )
    return Markup(
        f'<svg viewBox="0 -2 {width} {height + 18}" role="img">{bars}{lines}<text x="0" y="{height + 13}">{low:.4g}</text>'
        f'<text x="{width}" y="{height + 13}" text-anchor="end">{high:.4g}{Markup.escape(unit)}</text></svg>'
    )


def spaced(rows: Sequence[Any], most: int = MAX_CARDS) -> list[Any]:
    """At most `most` of the rows, evenly spaced."""
    if len(rows) <= most:
        return list(rows)
    return [rows[number * len(rows) // most] for number in range(most)]
