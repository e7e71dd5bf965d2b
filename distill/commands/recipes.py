"""`distill recipes`: the shipped recipes, listed with one line each, shown, or copied as the start of one's own."""

import argparse
import re
import sys
import textwrap
from pathlib import Path

from distill.compose import RECIPES, find_recipe
from teachers.disk.read import read_text
from teachers.errors import UserError

WIDTH = 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `distill recipes`."""
    verbs = parser.add_subparsers(dest="action", metavar="show | copy", parser_class=type(parser))
    show = verbs.add_parser("show", help="print a recipe, or with --full every value that it resolves to")
    show.add_argument("name", metavar="NAME")
    show.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="applied first, with --full")
    show.add_argument("--full", action="store_true", help="every value, with defaults and groups resolved")
    copy = verbs.add_parser("copy", help="copy a recipe into a folder; the groups that it names stay the shipped ones")
    copy.add_argument("name", metavar="NAME")
    copy.add_argument("folder", type=Path, metavar="DIR")


def run(args: argparse.Namespace) -> int:
    """List, print or copy; returns 0. Raises UserError."""
    if args.action == "show":
        sys.stdout.write(_shown(args))
    elif args.action == "copy":
        sys.stdout.write(f"{copy_recipe(args.name, args.folder)}\n")
    else:
        recipes = sorted(RECIPES.glob("*.yaml"))
        width = max(len(file.stem) for file in recipes)
        sys.stdout.writelines(f"{file.stem:<{width}}  {summary(file)}\n" for file in recipes)
    return 0


def summary(file: Path) -> str:
    """The first sentence of a recipe's header comment, which begins in its second line; at most WIDTH characters."""
    lines = read_text(file).splitlines()[1:]
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    text = " ".join(line.lstrip("# ") for line in lines[:end])
    sentence = re.match(r".*?\.(?=\s|$)", text)
    return textwrap.shorten(sentence[0] if sentence else text, WIDTH, placeholder=" ...")


def copy_recipe(name: str, folder: Path) -> Path:
    """Copy a recipe into `folder`, which is made if missing, and return the copy; UserError where a file is in the way."""
    source = _existing(name)
    target = folder / source.name
    if target.exists():
        raise UserError(f"not overwritten: {target}; choose another folder or remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}; choose another folder") from error
    return target


def _existing(name: str) -> Path:
    file = find_recipe(name)
    if not file.is_file():
        raise UserError(f"no recipe file: {file}; `distill recipes` lists the shipped ones")
    return file


def _shown(args: argparse.Namespace) -> str:
    if not args.full:
        if args.overrides:
            raise UserError(f"'{args.overrides[0]}' would have no effect: recipes show; add --full")
        return read_text(_existing(args.name))
    from distill.recipe import load_recipe  # seconds of imports, which a list does not need
    from teachers.config import dump

    return dump(load_recipe(Path(args.name), args.overrides))
