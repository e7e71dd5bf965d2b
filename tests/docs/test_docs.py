"""Every command and every snippet of README and docs: what can run here runs, against one smoke run; the rest is at least parsed.

A fenced block of bash or python says above itself what becomes of it: `<!-- runs -->`, or `<!-- needs: weights -->` (data, minutes,
browser, network), which is why it does not. Arguments of `distill` are parsed by its own parser, and recipes are loaded with the
overrides of the line, in both cases.
"""

import argparse
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import distill
from distill import cli
from distill.commands.sweep.command import read_sweep
from distill.compose import RECIPES, find_recipe
from distill.recipe import load_recipe
from tests.support.processes import finish

ROOT = Path(distill.__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = ("weights", "data", "minutes", "browser", "network")
SMOKE = (
    *("preset=smoke", "threads=1", "engine.precision=fp32", "data.world.num_train=8", "data.text_steps=1"),
    "data.world.num_frames=15",
    *("init.train.num_steps=1", "init.train.batch_size=4", "trajectories.num_pairs=4", "trajectories.num_steps=3"),
    *("distill.train.num_steps=1", "distill.train.batch_size=4", "distill.train.validate_every=0"),
    *("distill.method.fake_updates=1", "eval.probe_steps=4", "eval.num_samples=4"),
)
SHORTER = {"bench": ["--chunks", "2", "--rounds", "1"]}
"""Appended to a command that runs, so that it does so at smoke size; argparse takes what comes last."""
STATUS = {"doctor": {0, 1}, "data": {0, 3}, "eval": {0, 3}}
"""Exit statuses that a page explains, where 0 is not the only one."""
OTHERS = ("git", "pip", "python3.11", ".", "ruff", "pyright", "export", "curl", "podman")
"""Programs whose arguments are not ours to check."""


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    mark: str
    text: str

    @property
    def runs(self) -> bool:
        return self.mark == "runs"

    def commands(self) -> list[list[str]]:
        """The words of each command; comments, environment variables and && are taken apart."""
        found = []
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                one, words = words[:end], words[end + 1 :]
                while one and re.match(r"[A-Z_]+=", one[0]):
                    one = one[1:]
                found.append(one)
        return [words for words in found if words]


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"(?:^<!-- ([^\n]*) -->\n)?^```(bash|python)\n(.*?)^```", text, re.M | re.S):
        line = text.count("\n", 0, match.start(2)) + 1
        found.append(Block(page.relative_to(ROOT), line, match[2], match[1] or "", match[3]))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def named(blocks: list[Block]) -> list:
    return [pytest.param(block, id=f"{block.page}:{block.line}") for block in blocks]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A working directory with what the pages speak of: a finished run, a portrait, speech, a folder of videos, a film."""
    folder = tmp_path_factory.mktemp("docs")
    run = folder / "runs" / "dmd_avatar"
    finish(["run", "dmd_avatar", *SMOKE, f"run_dir={run}"])
    (folder / "docs").mkdir()
    for name in ("portrait.png", "docs/portrait.png"):
        shutil.copy(ROOT / "docs" / "portrait.png", folder / name)
    write_speech(folder / "speech.wav")
    (folder / "videos").mkdir()
    for video in (run / "samples").glob("*-real.mp4"):
        shutil.copy(video, folder / "videos")
    shutil.copy(video, folder / "film.mp4")
    return folder


def write_speech(file: Path) -> None:
    import wave

    from distill.live.voice import formant_voice

    samples = torch.cat(list(formant_voice("hello mama papa")))
    with wave.open(str(file), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16000)
        out.writeframes((samples * 32767).short().numpy().tobytes())


def check(words: list[str], monkeypatch) -> None:
    """The command's words are such that its program takes them; an AssertionError or UserError says what is wrong."""
    program, rest = words[0], words[1:]
    if program == "distill":
        check_distill(rest)
    elif program in ("accelerate", "torchrun"):
        check_launched([word for word in rest if word != "launch"])
    elif program in ("pytest", "python"):
        files = [word for word in rest if word.endswith(".py")]
        assert all((ROOT / file).is_file() for file in files), words
        assert program == "pytest" or files or rest[:2] == ["-m", "venv"], words
        if program == "python" and files:
            source = (ROOT / files[0]).read_text(encoding="utf-8")
            assert all(f'"{word}"' in source for word in rest if word.startswith("--")), words
    else:
        assert program in OTHERS or (ROOT / program).is_file() or (program == "cd" and len(rest) == 1), words


def check_distill(words: list[str]) -> None:
    if words[:1] == ["run"]:
        parsed = cli.parse(words)
        overrides = parsed.overrides
        if parsed.multirun:
            overrides = first_job(source(parsed.recipe), overrides)
        load_recipe(source(parsed.recipe), overrides)
        return
    parsed = cli.parse(words)
    recipe = getattr(parsed, "recipe", None) or getattr(parsed, "teacher", None)
    if recipe is not None:
        load_recipe(source(recipe), getattr(parsed, "overrides", []))


def first_job(recipe: Path, words: list[str]) -> list[str]:
    """The overrides of the first job of a sweep; tests/distill/commands read whole sweeps."""
    name = next((word.removeprefix("sweep=") for word in words if word.startswith("sweep=")), None)
    if name is None:
        assert any("," in word for word in words), words
        return [word.partition(",")[0] for word in words]
    shared, rows = read_sweep(recipe, name)
    return [*shared, *next(iter(rows.values())), *(word for word in words if not word.startswith("sweep="))]


def check_launched(words: list[str]) -> None:
    """`accelerate launch [FLAGS] RECIPE ...`, or -m distill run NAME ..., or another command of it."""
    if "-m" in words:
        words = words[words.index("-m") + 1 :]
        assert words[0] == "distill", words
        check_distill(words[1:])
        return
    start = next(i for i, word in enumerate(words) if word.endswith(".yaml"))
    assert (ROOT / words[start]).is_file(), words
    check_distill(["run", *words[start:]])


def source(recipe: Path) -> Path:
    """The file that stands for a recipe of a page: shipped, of the checkout, or one that the page has copied."""
    if (ROOT / recipe).is_file():
        return ROOT / recipe
    return find_recipe(recipe) if len(recipe.parts) == 1 else RECIPES / recipe.name


@pytest.mark.parametrize("block", named(BLOCKS))
def test_a_block_says_whether_it_runs(block):
    assert block.runs or block.mark.removeprefix("needs: ") in NEEDS, f"{block.page}:{block.line}: {block.mark!r}"


@pytest.mark.parametrize("block", named([block for block in BLOCKS if block.language == "bash"]))
def test_commands_are_taken_by_their_programs(block, monkeypatch):
    for words in block.commands():
        check(words, monkeypatch)


@pytest.mark.parametrize("block", named([block for block in BLOCKS if block.language == "python"]))
def test_snippets_compile(block):
    compile(block.text, f"{block.page}:{block.line}", "exec")


@pytest.mark.parametrize("page", [page.relative_to(ROOT).as_posix() for page in PAGES])
def test_what_runs_runs(page, place, monkeypatch, capsys):
    """The blocks of one page one after the other, in a directory of their own that shares the run and the inputs."""
    folder = place.parent / page.replace("/", "_")
    folder.mkdir()
    for entry in place.iterdir():
        (folder / entry.name).symlink_to(entry)
    monkeypatch.chdir(folder)
    for block in blocks_of(ROOT / page):
        if not block.runs:
            continue
        if block.language == "python":
            exec(compile(block.text, f"{page}:{block.line}", "exec"), {"__name__": "snippet"})
            continue
        for words in block.commands():
            assert words[0] == "distill", f"{page}:{block.line}: only distill runs here"
            status = cli.main([*words[1:], *SHORTER.get(words[1], [])])
            assert status in STATUS.get(words[1], {0}), (
                f"{page}:{block.line}: {' '.join(words)}: {capsys.readouterr().err}"
            )


def test_the_readme_is_one_page():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 200


def test_links_lead_somewhere():
    """Relative links of all pages: the file is there, and so is the heading."""
    wrong = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" in target:
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists() or (anchor and anchor not in anchors(file)):
                wrong.append(f"{page.relative_to(ROOT)}: {target}")
    assert wrong == []


def anchors(page: Path) -> set[str]:
    """Ids of headings as the usual renderers make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_and_recipe_is_reached():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[2:] if f"docs/{page.name}" not in readme] == []
    everything = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [file.stem for file in RECIPES.glob("*.yaml") if f"`{file.stem}`" not in everything] == []
    assert [file.stem for file in (RECIPES / "method").glob("*.yaml") if f"`{file.stem}`" not in everything] == []


def test_a_wrong_command_is_found(monkeypatch):
    """The checks above fail on what is wrong."""
    for line in (
        "distill sample --studnt runs",
        "distill run dmd_avatar sede=1",
        "accelerate launch recipes/none.yaml",
        "pytest tests/none.py",
        "python benchmarks/frechet.py --none",
        "conda install x",
    ):
        with pytest.raises((ValueError, AssertionError, StopIteration)):
            check(shlex.split(line), monkeypatch)
    assert isinstance(cli.parse(["recipes"]), argparse.Namespace)
