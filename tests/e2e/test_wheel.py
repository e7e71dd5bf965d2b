"""The wheel holds every file of the packages, and unpacked anywhere it finds its recipes."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import distill

ROOT = Path(distill.__file__).resolve().parent.parent
PACKAGES = ("distill", "teachers", "students", "eval", "recipes")
HOOK = ("avatar_distill_hook.py", "avatar_distill_hook.pth", "avatar_distill_hook.start")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("dist")
    words = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    tree = {
        file.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and file.parent != ROOT / "distill" / "hook"
    }
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == tree | set(HOOK)
    for package in PACKAGES[:-1]:
        assert f"{package}/py.typed" in held


def test_its_metadata_has_the_one_version_and_the_console_script(wheel):
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert info == f"avatar_distill-{distill.__version__}.dist-info"
    assert "distill = distill.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert f"version: {distill.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {distill.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_unpacked_it_runs_outside_the_checkout(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "distill", "recipes"],
        cwd=tmp_path / "work",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()] == sorted(
        f.stem for f in (ROOT / "recipes").glob("*.yaml")
    )
