"""`distill data`: prepare, split, check and curate data. Each verb is a module with add_arguments(parser) and run(arguments)."""

import argparse
import importlib
from pathlib import Path

from distill.data.procedural.render import WorldConfig
from teachers.config import convert, fraction
from teachers.errors import UserError

VERBS = {
    "prepare": (
        "distill.data.prepare.prepare",
        "cut HDTF, AVSpeech, CelebV-HQ or a folder of clips into training shards",
    ),
    "split": ("distill.data.datasets.split", "splits that share no identity, and fixed test lists"),
    "check": ("distill.data.prepare.check", "verify that prepared data are complete, and summarise them"),
    "curate": (
        "distill.data.curate.curate",
        "score clips as conditions, select by thresholds, write pages to inspect",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verbs of `distill data` and their arguments."""
    verbs = parser.add_subparsers(dest="data_verb", metavar="VERB", required=True)
    for name, (module, summary) in VERBS.items():
        verb = verbs.add_parser(name, help=summary)
        importlib.import_module(module).add_arguments(verb)
        if name == "prepare":
            verb.add_argument(
                "--for", type=Path, dest="recipe", metavar="RECIPE", help="size and rate that it asks for"
            )


def run(args: argparse.Namespace) -> int:
    """Run the verb and return its exit status."""
    if getattr(args, "recipe", None) is not None:
        world = _world(args.recipe)
        args.fps, args.size = args.fps or fraction(world.fps), args.size or world.size
    return importlib.import_module(VERBS[args.data_verb][0]).run(args)


def _world(recipe: Path) -> WorldConfig:
    """Size and rate of a recipe's clips; where its weights and videos lie does not matter. UserError."""
    from distill.compose import compose_values
    from distill.recipe import Recipe

    values, locate = compose_values(recipe, ["teacher.path=unknown", "data.path=unknown"], Recipe.__dataclass_fields__)
    data = values.get("data")
    if not isinstance(data, dict) or "world" not in data:
        raise UserError(f"--for: {recipe} has no data.world; give --fps and --size")
    return convert(WorldConfig, data["world"], "data.world", locate)
