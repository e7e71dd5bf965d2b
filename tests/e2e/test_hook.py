"""A recipe is a program under python, accelerate and torchrun; every other file is left alone.

The children get a `distill.cli` of their own that prints what it was given: the hook alone is tested.
"""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import distill

HEADER = "# avatar-distill recipe\n"
MAIN = """\
import sys
from distill.cli import main
sys.exit(main(sys.argv[1:]))
"""
CLI = """\
import os, sys
from pathlib import Path
def main(argv):
    rank = os.environ.get("RANK", "0")
    Path(os.environ["SEEN"], rank).write_text("\\n".join([*argv, *sys.path]))
    group = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    Path(os.environ["SEEN"], "group" + rank).write_text("\\n".join(os.environ.get(name, "") for name in group))
    if "fail=1" in argv:
        print("distill: one line", file=sys.stderr)
        return 2
    return 0
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    package = tmp_path / "lib" / "distill"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "cli.py").write_text(CLI)
    (package / "__main__.py").write_text(MAIN)
    (tmp_path / "seen").mkdir()
    (tmp_path / "own.yaml").write_text(HEADER + "seed: 1\n")
    hook = Path(distill.__file__).parent / "hook"  # this tree's, in place of an older one that is installed
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "lib"), str(hook)]))
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def start(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=place, capture_output=True, text=True, timeout=120, check=False)


def seen(place: Path, rank: int = 0) -> list[str]:
    return (place / "seen" / str(rank)).read_text().splitlines()


def test_python_runs_a_recipe(place):
    done = start(place, "own.yaml", "seed=2", "+a.b=[1,2]")
    assert (done.returncode, done.stderr) == (0, "")
    words = seen(place)
    assert words[:4] == ["run", "own.yaml", "seed=2", "+a.b=[1,2]"]
    assert not any(word.endswith("own.yaml") for word in words[4:]), "the recipe stayed on sys.path"


def test_a_recipe_is_run_from_any_folder_and_in_safe_path_mode(place):
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    recipe = place / "own.yaml"
    assert start(elsewhere, str(recipe)).returncode == 0
    assert seen(place)[:2] == ["run", str(recipe)]
    assert start(place, "-P", "own.yaml").returncode == 0


def test_the_exit_code_and_the_one_line_come_through(place):
    done = start(place, "own.yaml", "fail=1")
    assert (done.returncode, done.stderr) == (2, "distill: one line\n")


def test_accelerate_launch_runs_a_recipe_verbatim_and_ends_as_it_ends(place):
    launch = ("-m", "accelerate.commands.launch")
    done = start(place, *launch, "own.yaml", "seed=2", "fail=1")
    assert seen(place)[:4] == ["run", "own.yaml", "seed=2", "fail=1"]
    assert done.returncode == 2
    assert "distill: one line\n" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_accelerate_launch_runs_a_recipe_by_name_and_ends_as_it_ends(place):
    """`accelerate launch -m distill run NAME`; a failing one is one line here too."""
    done = start(place, "-m", "accelerate.commands.launch", "-m", "distill", "run", "own", "fail=1")
    assert seen(place)[:3] == ["run", "own", "fail=1"]
    assert done.returncode == 2
    assert "distill: one line\n" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_of_that_name_in_the_working_directory_is_not_run(place):
    (place / "distill").mkdir()
    (place / "distill" / "__init__.py").write_text("raise SystemExit('shadowed')")
    for flag in ("-m", "-um"):
        done = start(place, flag, "distill", "run", "own.yaml")
        assert (done.returncode, done.stderr) == (0, "")
    assert start(place, "-c", "import distill").stderr == "shadowed\n", "python's own rule is changed"


@pytest.mark.parametrize(
    ("words", "module"),
    [
        ("-m distill run", "distill"),
        ("-mdistill", "distill"),
        ("-u -X dev -W ignore -Im distill", "distill"),
        ("-Xfrozen_modules=off recipe.yaml -m distill", None),
        ("-c import -m distill", None),
        ("- -m distill", None),
        ("-Wm", None),
        ("-m", None),
        ("", None),
    ],
)
def test_the_module_of_an_interpreters_command_line(words, module, monkeypatch):
    monkeypatch.setattr(sys, "path_hooks", [])
    hook = runpy.run_path(str(Path(distill.__file__).parent / "hook" / "avatar_distill_hook.py"))
    assert hook["module_to_run"](["python", *words.split()]) == module


def test_torchrun_runs_a_recipe_in_every_process_of_one_group(place):
    """What Engine makes its group of; that it does is shown by tests/distill/training/engines/test_engine.py."""
    done = start(place, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "own.yaml", "seed=1")
    assert done.returncode == 0, done.stderr
    groups = []
    for rank in (0, 1):
        assert seen(place, rank)[:3] == ["run", "own.yaml", "seed=1"]
        *world, local, address, port = (place / "seen" / f"group{rank}").read_text().splitlines()
        assert (world, local) == (["2", "2"], str(rank))
        groups.append((address, int(port)))
    assert groups[0] == groups[1]


@pytest.mark.parametrize("name", ["foreign.yaml", "missing.yaml", "plain.py", "folder.yaml"])
def test_other_files_are_left_alone(place, name):
    (place / "foreign.yaml").write_text("- seed: 1\n- # avatar-distill recipe\n")
    (place / "plain.py").write_text(HEADER + "import sys\nsys.exit(7)\n")
    (place / "folder.yaml").mkdir()
    done = start(place, name)
    assert done.returncode == {"plain.py": 7, "missing.yaml": 2}.get(name, 1)
    assert not list((place / "seen").iterdir())


@pytest.mark.slow
def test_the_hook_prints_the_real_command_line_s_one_line(place, monkeypatch):
    monkeypatch.delenv("PYTHONPATH")
    (place / "own.yaml").write_text(HEADER + "sede: 1\n")
    done = start(place, "own.yaml")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "unknown key 'sede'" in done.stderr
    assert "did you mean 'seed'?" in done.stderr


def test_the_hook_imports_nothing_but_sys(place):
    code = "import sys; before = set(sys.modules); import avatar_distill_hook; print(sorted(set(sys.modules) - before))"
    hook = Path(distill.__file__).parent / "hook"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={**os.environ, "PYTHONPATH": str(hook)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "['avatar_distill_hook']"
