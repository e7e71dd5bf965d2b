"""`python -m distill ...` is the console script `distill`: files of the working directory shadow no module of ours."""

import os
import sys


def leave_working_directory() -> None:
    """Undo what `python -m` does to sys.path, unless the working directory is where the packages are (a checkout).

    A folder `eval/` or a file `students.py` of the user's would otherwise be imported in place of ours. His own `distill/`
    is handled earlier, by the hook (distill/hook), since this file is imported from the package of that name.
    """
    home = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    first = os.path.realpath(sys.path[0])
    if not sys.flags.safe_path and first == os.path.realpath(os.getcwd()) and first != home:
        del sys.path[0]


if __name__ == "__main__":
    leave_working_directory()
    from distill.cli import main

    sys.exit(main())
