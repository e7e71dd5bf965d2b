"""The shape of the house: which package and which folder may import which, no circle of files, no folder too full to read."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("teachers", "students", "eval", "distill")
"""The packages, lowest first."""
TOPS = ("benchmarks", "examples")
"""What stands on the packages; nothing imports it but the tests."""
INSIDE = (
    ("methods",),
    ("training",),
    ("data",),
    ("compose", "expect", "health"),
    ("recipe",),
    ("pipeline",),
    ("planning", "scoring", "live"),
    ("commands",),
    ("cli",),
)
"""The floors inside distill/, lowest first; what stands on one floor does not import each other."""
MOST_FILES = 12
LAZY = ("torchvision", "lpips")
FILES = sorted(file for floor in FLOORS for file in (ROOT / floor).rglob("*.py") if file.parent.name != "hook")
ABOVE = sorted(file for top in TOPS for file in (ROOT / top).rglob("*.py"))


parsed = functools.cache(ast.parse)


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all imports, those inside functions and under TYPE_CHECKING too; `from a import b` is a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages(tree: ast.AST) -> set[str]:
    return {name.partition(".")[0] for name in imported(tree)}


def too_high(floor: str, source: str) -> list[str]:
    """The packages that `source`, a file of `floor`, imports from above."""
    order = (*FLOORS, "recipes", *TOPS, "tests")
    return sorted(packages(parsed(source)) & set(order[order.index(floor) + 1 :]))


def graph_of(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module -> the modules of `sources` that it imports; a name that is no module belongs to the module that holds it."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        graph[module] = set()
        for name in imported(parsed(source)):
            while name and name not in sources:
                name = name.rpartition(".")[0]
            if name:
                graph[module].add(name)
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen, stack = set(), list(graph[start])
        while stack:
            if (module := stack.pop()) not in seen:
                seen.add(module)
                stack += graph[module]
        reach[start] = seen
    groups = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in graph if a in reach[a]}
    return sorted(map(list, groups))


def climbs(graph: dict[str, set[str]]) -> list[str]:
    """Imports inside distill/ that do not go to a lower floor, as "a -> b"."""
    height = {name: i for i, names in enumerate(INSIDE) for name in names}
    found = []
    for module, targets in graph.items():
        for target in targets:
            (_, here, *_), (_, there, *_) = ([*name.split("."), ""] for name in (module, target))
            if (
                not (module.startswith("distill.") and target.startswith("distill."))
                or here == there
                or here == "__main__"
            ):
                continue
            if here not in height or there not in height:
                raise AssertionError(f"distill.{here} and distill.{there}: give each its floor in INSIDE")
            if height[here] <= height[there]:
                found.append(f"{module} -> {target}")
    return sorted(found)


def sources_of(files: list[Path]) -> dict[str, str]:
    return {module_of(file): file.read_text(encoding="utf-8") for file in files}


def test_imports_only_go_down():
    wrong = {}
    for file in (*FILES, *ABOVE):
        path = file.relative_to(ROOT)
        wrong[str(path)] = too_high(path.parts[0], file.read_text(encoding="utf-8"))
    assert {path: found for path, found in wrong.items() if found} == {}


def test_optional_heavy_modules_are_imported_inside_functions():
    wrong = {}
    for file in FILES:
        body = parsed(file.read_text(encoding="utf-8")).body
        top = ast.Module(body=[node for node in body if isinstance(node, ast.Import | ast.ImportFrom)], type_ignores=[])
        wrong[str(file.relative_to(ROOT))] = packages(top) & set(LAZY)
    assert {path: found for path, found in wrong.items() if found} == {}


def test_no_circle_of_files():
    assert circles(graph_of(sources_of(FILES))) == []


def test_the_folders_of_distill_import_only_lower_floors():
    assert climbs(graph_of(sources_of(FILES))) == []


def test_a_folder_holds_a_dozen_files_at_most():
    counts: dict[str, int] = {}
    for file in FILES:
        if file.name != "__init__.py":
            folder = str(file.parent.relative_to(ROOT))
            counts[folder] = counts.get(folder, 0) + 1
    assert {folder: n for folder, n in counts.items() if n > MOST_FILES} == {}


def test_the_tests_stand_where_what_they_test_stands():
    """A folder of tests is a folder of the house; test_x.py stands beside x.py where just one package folder has an x.py."""
    folders = {}
    for file in FILES:
        folders.setdefault(file.stem, set()).add(file.parent.relative_to(ROOT))
    wrong = []
    for test in (ROOT / "tests").rglob("test_*.py"):
        here = test.parent.relative_to(ROOT / "tests")
        if not here.parts or here.parts[0] in ("e2e", "docs"):
            continue
        homes = {home for home in folders.get(test.stem.removeprefix("test_"), ()) if home.parts[0] == here.parts[0]}
        if not (ROOT / here).is_dir() or (len(homes) == 1 and here not in homes):
            wrong.append(f"{test.relative_to(ROOT)}: {', '.join(map(str, homes)) or 'no such folder'}")
    assert sorted(wrong) == []


def test_the_rules_catch_what_they_forbid():
    assert too_high("students", "def f():\n    from distill.training.engines.engine import Engine\n") == ["distill"]
    assert too_high("benchmarks", "from tests.support import tiny\nimport examples.own\n") == ["examples", "tests"]
    assert too_high("eval", "import teachers.flow\nimport students") == []
    graph = graph_of(
        {
            "distill": "",
            "distill.data.a": "from distill.methods import b",
            "distill.methods": "",
            "distill.methods.b": "def f():\n    import distill.data.c",
            "distill.data.c": "from distill import data\nfrom distill.data.a import thing",
            "distill.live.d": "import distill.planning.e",
            "distill.planning.e": "",
        }
    )
    assert circles(graph) == [["distill.data.a", "distill.data.c", "distill.methods.b"]]
    assert climbs(graph) == ["distill.live.d -> distill.planning.e", "distill.methods.b -> distill.data.c"]


def test_recipes_hold_no_python():
    assert [file for file in (ROOT / "recipes").rglob("*") if file.is_file() and file.suffix != ".yaml"] == []
