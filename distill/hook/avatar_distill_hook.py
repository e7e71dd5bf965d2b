"""Makes a recipe a program: python, `accelerate launch` and torchrun run `recipes/x.yaml key=value` as `distill run`.

Python asks sys.path_hooks whether a script's path is something it can import `__main__` from (that is how a zip file is
run). This hook says yes for YAML files whose first line is HEADER, and no for everything else. `python -m distill` finds the
installed package also where the working directory has a `distill` of its own. The hook is loaded at the start of every
interpreter of the environment, so it imports only `sys`, and the package itself where it is about to be run.
"""

import sys

HEADER = b"# avatar-distill recipe"
LAUNCHERS = (
    "accelerate",
    "accelerate-launch",
    "accelerate.commands.launch",
    "torchrun",
    "torch.distributed.run",
    "torch.distributed.launch",
)
PACKAGE = "distill"
USER_ERROR = 2
DOOR = """\
import sys
sys.path[:] = [entry for entry in sys.path if entry not in (__file__, sys.argv[0])]
from distill.cli import main
sys.exit(main(["run", *sys.argv]))
"""


def is_recipe(path):
    if not (isinstance(path, str) and path.endswith((".yaml", ".yml"))):
        return False
    try:
        with open(path, "rb") as file:
            return file.readline(256).rstrip().startswith(HEADER)
    except OSError:
        return False


class RecipeFinder:
    """The path hook of one recipe file: finder and loader of its `__main__`."""

    def __init__(self, path):
        if not is_recipe(path):
            raise ImportError("not an avatar-distill recipe")
        self.path = path

    def find_spec(self, name, target=None):
        if name != "__main__":
            return None
        spec = type(sys.__spec__)(name, self, origin=self.path)
        spec.has_location = True
        return spec

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        exec(self.get_code(module.__name__), module.__dict__)

    def get_code(self, name):
        return compile(DOOR, self.path, "exec")

    def get_source(self, name):
        return DOOR

    def is_package(self, name):
        return False


def module_to_run(argv):
    """X of `python ... -m X ...`, else None; `argv` is the interpreter's whole command line (sys.orig_argv)."""
    words = iter(argv[1:])
    for word in words:
        option, _, attached = word.partition("m")
        if word in ("-X", "-W", "--check-hash-based-pycs"):
            next(words, None)
        elif word.startswith(("-X", "-W", "--")):
            continue
        elif not word.startswith("-") or word == "-" or "c" in option:  # a script, the standard input, code
            return None
        elif "m" in word:  # -m X, -mX, -um X
            return attached or next(words, None)
    return None


def starts_distill(argv):
    """Whether a launcher's words start a recipe: its file, or `-m distill`."""
    return any(is_recipe(word) for word in argv) or (PACKAGE in argv and ("-m" in argv or "--module" in argv))


def quiet_launcher(argv):
    """A launcher whose recipe ended with USER_ERROR ends with it too: the recipe has said its one line already."""
    before = sys.excepthook

    def hook(kind, error, trace):
        codes = [getattr(error, "returncode", None)]
        failures = getattr(error, "failures", None)
        if isinstance(failures, dict):
            codes = [getattr(failure, "exitcode", None) for failure in failures.values()]
        if USER_ERROR in codes:
            raise SystemExit(USER_ERROR)
        before(kind, error, trace)

    if starts_distill(argv):
        sys.excepthook = hook


def install():
    if RecipeFinder not in sys.path_hooks:
        sys.path_hooks.append(RecipeFinder)
        if any(word.replace("\\", "/").rsplit("/", 1)[-1] in LAUNCHERS for word in sys.orig_argv[:3]):
            quiet_launcher(sys.orig_argv)
        if module_to_run(sys.orig_argv) == PACKAGE:
            try:
                __import__(PACKAGE)  # before the working directory comes first on sys.path
            except ImportError:
                pass  # not installed here: python says so


install()
