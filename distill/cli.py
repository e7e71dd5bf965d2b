"""The command line. Each command imports what it needs itself, so that --help answers at once."""

import argparse
import importlib
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

from teachers.errors import UserError
from teachers.resolve import nearest

USER_ERROR, INTERRUPTED = 2, 130
RESUMED = (("run",), ("search",), ("data", "prepare"), ("data", "curate"))
"""Commands that continue where they were stopped."""
MODULES = {  # commands that are a module of their own: add_arguments(parser) and run(arguments) -> exit status
    "sample": ("distill.commands.sample.command", "a talking video from a portrait, a sound file and a text"),
    "serve": ("distill.commands.serve", "a live page in the browser: the student listens, talks and idles"),
    "bench": ("distill.commands.bench", "first frame, chunk times, real-time factor and roofline of a student"),
    "drift": ("distill.commands.drift", "long streams of a run's student, scored minute by minute"),
    "eval": (
        "distill.commands.eval.command",
        "scores of generated clips against real ones under a protocol card; compare, benchmark",
    ),
    "search": (
        "distill.commands.sweep.search",
        "successive halving over a space of overrides: trials are runs, which end at a rung or by the health gate",
    ),
    "report": ("distill.commands.report", "finished runs beside each other: compare RUN RUN"),
    "plan": (
        "distill.commands.plan",
        "parameters, memory a GPU, disk and forwards of a recipe, before any weight is read",
    ),
    "recipes": ("distill.commands.recipes", "the shipped recipes by name: a list; show NAME; copy NAME DIR"),
    "data": ("distill.commands.data", "clips of a dataset to training shards: prepare, check, split"),
    "convert": ("distill.commands.convert", "checkpoints between the published layouts and ours"),
    "doctor": ("distill.commands.doctor", "what is installed, what is missing and where it goes"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command: 0 done, 1 something is missing (doctor), 2 a user's mistake in one line, 130 interrupted. SIGTERM and SIGHUP
    raise SystemExit (128 + the signal), so that nothing half-written stays; but for `run`, of whose ranks none may wait for another
    then, and which cleans up at its next start."""
    words = sys.argv[1:] if argv is None else list(argv)
    if argv is None:
        warnings.showwarning = show_warning
    try:
        arguments = parse(words)
        with nullcontext() if arguments.verb == "run" else _ending():
            return arguments.command(arguments) or 0
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        print(f"{'' if rank == '0' else f'[rank {rank}] '}distill: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        resumes = any(tuple(words[: len(verb)]) == verb for verb in RESUMED)
        print(f"distill: interrupted{'; the same command continues' if resumes else ''}", file=sys.stderr)
        return INTERRUPTED


def show_warning(message: Warning | str, category: type[Warning], filename: str, *rest: Any) -> None:
    """A warning of ours as one line, without file and source line; any other as Python shows it."""
    home = Path(__file__).resolve().parents[1]
    ours = [home / name for name in ("distill", "eval", "students", "teachers")]
    if category is UserWarning and any(Path(filename).resolve().is_relative_to(folder) for folder in ours):
        print(f"distill: warning: {message}", file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, filename, rest[0]), end="", file=sys.stderr)


@contextmanager
def _ending() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP unwind the main thread; one that is ignored (nohup) stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is signal.SIG_DFL:
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command line (without the program's name), `command` being what runs them. Raises UserError."""
    words = list(argv)
    if wrong := [word for word in words if word.encode("utf-8", "ignore").decode() != word]:
        raise UserError(f"not UTF-8: {wrong[0]!r} on the command line; rename that file, or write the text in UTF-8")
    if words[:1] == ["run"]:  # some launchers add their rank
        words = [word for word in words if not word.startswith(("--local_rank=", "--local-rank="))]
    arguments = _parser(words).parse_args(words)
    for name, value in vars(arguments).items():
        if isinstance(value, Path):  # a shell writes ~ out at the beginning of a word alone
            setattr(arguments, name, Path(os.path.expanduser(value)))
    return arguments


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors: one line, no usage before it, and the nearest of what could be meant. A recipe's
    overrides may stand behind options too, which argparse of Python 3.11 refuses."""

    def parse_known_args(self, args=None, namespace=None):
        found, rest = super().parse_known_args(args, namespace)
        if any(action.dest == "overrides" for action in self._actions):
            late = [word for word in rest if not word.startswith("-")]
            found.overrides = [*found.overrides, *late]
            rest = [word for word in rest if word not in late]
        return found, rest

    def error(self, message: str):
        raise UserError(f"{message}: {self.prog}; {self._meant(message)}see {self.prog} --help")

    def _meant(self, message: str) -> str:
        """`did you mean 'sample'? ` of a wrong choice or an unknown option; "" where nothing is near."""
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            word, known = choice[1], re.findall(r"[^\s',]+", choice[2])
        elif option := re.search(r"unrecognized arguments: .*?(--[^\s=]+)", message):
            word, known = option[1], sorted(self._options())
        else:
            return ""
        near = nearest(word, known)
        return f"{near} " if near.startswith("did you mean") else ""

    def _options(self) -> set[str]:
        """The options of this parser and of its commands."""
        own = {name for action in self._actions for name in action.option_strings if name.startswith("--")}
        below = [a.choices.values() for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        return own.union(*(parser._options() for parsers in below for parser in parsers))


def _parser(words: Sequence[str]) -> Parser:
    parser = Parser(
        prog="distill", description="Causal few-step avatar students from bidirectional many-step teachers."
    )
    commands = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True, parser_class=Parser)

    run = commands.add_parser("run", help="run a recipe: data, teacher, trajectories, init, distill, export, evaluate")
    run.add_argument(
        "recipe", type=Path, metavar="RECIPE", help="a shipped recipe's name (`distill recipes`) or a .yaml file"
    )
    run.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. preset=smoke seed=1 run_dir=runs/b")
    run.add_argument("-m", "--multirun", action="store_true", help="a sweep: a=1,2 b=x,y or sweep=NAME [sweep_dir=DIR]")
    run.set_defaults(command=_run)

    for name, (module, summary) in MODULES.items():
        command = commands.add_parser(name, help=summary)
        if words[:1] == [name]:
            implementation = importlib.import_module(module)
            implementation.add_arguments(command)
            command.set_defaults(command=implementation.run)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    if arguments.multirun:
        from distill.commands.sweep import command

        return command.run(arguments.recipe, arguments.overrides)
    from distill.recipe import load_recipe

    recipe = load_recipe(
        arguments.recipe, arguments.overrides
    )  # first: a mistake in it is reported before the pipeline is imported
    from distill.pipeline.stages import run

    run(recipe)
    return 0
