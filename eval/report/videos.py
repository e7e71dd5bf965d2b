"""Videos of a page: those of one condition beside each other, inside the page while they are small."""

import base64
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EMBED_LIMIT = 12_000_000  # bytes of videos that are put into the page; above it the page links to the files


def side_by_side(videos: Mapping[str, Mapping[str, Path]], page_dir: Path) -> list[dict[str, Any]]:
    """What `Page.videos` takes of condition -> name -> mp4 file: {title, videos {name, source}} each, a source being a data URI, or
    the path from `page_dir` where all files together are larger than `EMBED_LIMIT`."""
    total = sum(path.stat().st_size for group in videos.values() for path in group.values())

    def source(path: Path) -> str:
        if total > EMBED_LIMIT:
            return relative(path, page_dir)
        return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()

    return [
        {"title": title, "videos": [{"name": name, "source": source(path)} for name, path in group.items()]}
        for title, group in videos.items()
        if group
    ]


def relative(path: Path, folder: Path) -> str:
    """The path of a file as seen from a folder, with slashes."""
    return Path(os.path.relpath(path, folder)).as_posix()
