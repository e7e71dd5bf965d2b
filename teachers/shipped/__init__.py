"""Small trained weights that are part of the package, each checked against its recorded sha256 before it is read.

A path `shipped:world` in a recipe is the folder of that name here: what belongs to the embedded world.
"""

import hashlib
import json
import os
from functools import cache
from pathlib import Path

from teachers.errors import UserError

HERE, PREFIX, SUMS = Path(__file__).parent, "shipped:", "sha256.json"


def resolve(path: str | Path) -> Path:
    """The file or folder that a path names, with `shipped:` in front or plain. UserError for one that is not shipped, or of which a
    file is not what was shipped."""
    text = os.fspath(path)
    if not text.startswith(PREFIX):
        return Path(text)
    rest = Path(text.removeprefix(PREFIX))
    found = HERE / rest
    if not rest.parts or not found.exists() or HERE not in found.resolve().parents:
        known = ", ".join(f"{PREFIX}{folder.name}" for folder in sorted(HERE.iterdir()) if (folder / SUMS).is_file())
        raise UserError(f"no shipped weights: {text}; there are {known}, or give a path of your own")
    verify(HERE / rest.parts[0])
    return found


def name_of(path: Path) -> str:
    """The inverse of `resolve`: how a recipe names a path on any machine."""
    return PREFIX + path.relative_to(HERE).as_posix() if HERE in path.parents else str(path)


@cache
def verify(folder: Path) -> None:
    """UserError unless every file of a shipped folder has the sha256 that its list says."""
    for name, expected in json.loads((folder / SUMS).read_text()).items():
        file = folder / name
        if not file.is_file() or sha256(file) != expected:
            raise UserError(f"damaged installation: {file} is not what was shipped; install avatar-distill again")


def sha256(file: Path) -> str:
    """Of a file's content, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
