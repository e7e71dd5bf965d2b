"""The shipped recipes by name: from any folder, listed, shown, copied, and distinguished from files of the same name."""

import subprocess
import sys
from pathlib import Path

import pytest

from distill.cli import main
from distill.commands.recipes import WIDTH
from distill.commands.sweep.command import plan as plan_sweep
from distill.compose import RECIPES, find_recipe
from distill.recipe import load_recipe, to_dict
from teachers.errors import UserError

NAMES = sorted(file.stem for file in RECIPES.glob("*.yaml"))
REAL = ("livetalk", "omniavatar_one_gpu", "self_forcing", "echomimic", "stableavatar", "infinitetalk", "fantasytalking",
        "flashhead", "longcat", "s2v")  # fmt: skip
NEEDS = {name: ["teacher.path=anywhere"] for name in (*REAL, "liveavatar", "livetalk_1step", "livetalk_2step")}
ROOT = RECIPES.parent


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def one_line(words, capsys, *fragments) -> None:
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert all(fragment in err for fragment in fragments), err


def test_every_recipe_is_listed_with_one_line(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    for line in lines:
        said = line.partition(" ")[2].strip()
        assert 20 < len(said) <= WIDTH
        assert said.endswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_the_shipped_file_and_a_copy_alone_composes_to_the_same(name, elsewhere, capsys):
    words = NEEDS.get(name, [])
    shipped = to_dict(load_recipe(RECIPES / f"{name}.yaml", words))
    assert find_recipe(name) == RECIPES / f"{name}.yaml"
    assert main(["recipes", "copy", name, "mine"]) == 0
    assert capsys.readouterr().out == f"mine/{name}.yaml\n"
    assert to_dict(load_recipe(Path("mine", f"{name}.yaml"), words)) == shipped


def test_a_recipe_is_shown_as_written_and_as_resolved(capsys):
    assert main(["recipes", "show", "flowact_avatar"]) == 0
    assert capsys.readouterr().out == (RECIPES / "flowact_avatar.yaml").read_text()
    assert main(["recipes", "show", "flowact_avatar", "seed=7", "--full"]) == 0
    Path("full.yaml").write_text(capsys.readouterr().out)
    assert load_recipe(Path("full.yaml")) == load_recipe(RECIPES / "flowact_avatar.yaml", ["seed=7"])
    one_line(["recipes", "show", "flowact_avatar", "seed=7"], capsys, "seed=7", "add --full")


def test_names_that_are_none_or_two_things_are_refused(elsewhere, capsys):
    one_line(["run", "dmd_avatr"], capsys, "'dmd_avatr'", "did you mean 'dmd_avatar'?")
    one_line(["plan", "my_own"], capsys, "no shipped recipe", "distill recipes")
    Path("my_own.yaml").write_text("# avatar-distill recipe\n")
    one_line(["plan", "my_own"], capsys, "did you mean 'my_own.yaml'?")
    Path("dmd_avatar.yaml").write_text("# avatar-distill recipe\n")
    one_line(["run", "dmd_avatar"], capsys, "two recipes are called 'dmd_avatar'", "write dmd_avatar.yaml for yours")
    one_line(["recipes", "copy", "dmd_avatar.yaml", "."], capsys, "not overwritten: dmd_avatar.yaml")
    assert find_recipe("dmd_avatar.yaml") == Path("dmd_avatar.yaml")


def test_in_the_folder_of_recipes_a_name_is_no_doubt(monkeypatch):
    monkeypatch.chdir(RECIPES)
    assert find_recipe("dmd_avatar").samefile("dmd_avatar.yaml")


def test_a_sweep_takes_a_name_and_hands_its_file_to_a_launcher(elsewhere):
    sweep = plan_sweep(Path("dmd_avatar"), ["sweep=livetalk_ablation", "launcher=accelerate launch"])
    assert sweep.recipe == RECIPES / "dmd_avatar.yaml"
    with pytest.raises(UserError, match="no shipped recipe"):
        plan_sweep(Path("dmd"), ["seed=0,1"])


@pytest.mark.slow
def test_files_of_the_working_directory_break_neither_way_to_start(elsewhere):
    """A user's own eval/, students.py, teachers.py, yaml.py beside his work, and a distill/ (which the hook handles)."""
    for name in ("eval", "distill"):
        (elsewhere / name).mkdir()
        (elsewhere / name / "__init__.py").write_text("raise SystemExit('shadowed')")
    for name in ("students", "teachers", "yaml", "hydra"):
        (elsewhere / f"{name}.py").write_text("raise SystemExit('shadowed')")
    path = f"{ROOT}:{ROOT / 'distill' / 'hook'}"
    script = "import sys; from distill.cli import main; sys.exit(main(['recipes']))"
    (elsewhere / "bin").mkdir()
    (elsewhere / "bin" / "distill").write_text(script)  # what pip makes of a console script
    for words in (["-m", "distill", "recipes"], ["bin/distill"]):
        environment = {"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        assert "dmd_avatar" in done.stdout


def test_a_checkout_that_is_not_installed_still_starts(monkeypatch):
    monkeypatch.chdir(ROOT)
    code = "import sys, distill.__main__ as m; m.leave_working_directory(); print(sys.path[0] or '.')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ""}
    )
    assert Path(done.stdout.strip()).resolve() == ROOT
