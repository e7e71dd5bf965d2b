"""The floors of the house: imports only go down."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("teachers", "students", "eval", "distill")
LAZY = ("torchvision", "lpips")
FILES = sorted(file for floor in FLOORS for file in (ROOT / floor).rglob("*.py"))


def imported(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            names.append(node.module or "")
    return [name.partition(".")[0] for name in names]


def too_high(floor: str, source: str) -> list[str]:
    above = FLOORS[FLOORS.index(floor) + 1 :]
    return [name for name in imported(ast.parse(source)) if name in above]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_only_go_down(file):
    assert too_high(file.relative_to(ROOT).parts[0], file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_optional_heavy_modules_are_imported_inside_functions(file):
    body = ast.parse(file.read_text(encoding="utf-8")).body
    top = ast.Module(body=[node for node in body if isinstance(node, ast.Import | ast.ImportFrom)], type_ignores=[])
    assert not set(imported(top)) & set(LAZY)


def test_the_rule_catches_an_import_from_above_wherever_it_stands():
    assert too_high("students", "def f():\n    from distill.training.engine import Engine\n") == ["distill"]
    assert too_high("eval", "import teachers.flow\nimport students") == []


def test_recipes_hold_no_python():
    assert [file for file in (ROOT / "recipes").rglob("*") if file.is_file() and file.suffix != ".yaml"] == []
