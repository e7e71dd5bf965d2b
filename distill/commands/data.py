"""`distill data`: prepare, split, check and curate data. Each verb is a module with add_arguments(parser) and run(arguments)."""

import argparse
import importlib

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
        importlib.import_module(module).add_arguments(verbs.add_parser(name, help=summary))


def run(args: argparse.Namespace) -> int:
    """Run the verb and return its exit status."""
    return importlib.import_module(VERBS[args.data_verb][0]).run(args)
