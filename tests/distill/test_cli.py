"""The command line: what is misspelt is guessed, and only what continues says so."""

import re
import warnings
from fractions import Fraction

import pytest

from distill import cli


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["smaple"], r"invalid choice: 'smaple' [^\n]*did you mean 'sample'\? see distill --help"),
        (["xyzzy"], r"invalid choice: 'xyzzy' [^\n]*: distill; see distill --help"),
        (
            ["plan", "livetalk", "--enginse", "ddp"],
            r"unrecognized arguments: --enginse[^\n]*did you mean '--engines'\?",
        ),
        (["convert", "a", "b", "--to", "diffuser"], r"invalid choice: 'diffuser' [^\n]*did you mean 'diffusers'\?"),
        (["data", "splt"], r"invalid choice: 'splt' [^\n]*did you mean 'split'\?"),
        (["sample", "--student", "s"], r"the following arguments are required: --out"),
    ],
)
def test_what_is_misspelt_is_guessed(words, said, capsys):
    assert cli.main(words) == cli.USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("distill: ")
    assert re.search(said, line), line


@pytest.mark.parametrize(
    "words",
    [
        ["run", "r.yaml", "a=1", "-m", "b=2"],
        ["run", "-m", "r.yaml", "a=1", "b=2"],
        ["plan", "r.yaml", "--gpus", "1", "a=1", "--engines", "ddp", "b=2"],
        ["search", "r.yaml", "space", "a=1", "--dir", "d", "b=2"],
        ["recipes", "show", "livetalk", "--full", "a=1", "b=2"],
        ["convert", "x", "y", "--to", "diffusers", "a=1", "b=2"],
        ["sample", "--teacher", "r.yaml", "--out", "o.mp4", "a=1", "--seed", "1", "b=2"],
    ],
)
def test_overrides_stand_between_options(words):
    assert cli.parse(words).overrides == ["a=1", "b=2"]


def test_a_word_that_is_no_override_is_refused(capsys):
    assert cli.main(["plan", "scratch_avatar", "--gpus", "1", "other"]) == cli.USER_ERROR
    assert re.fullmatch(r"distill: [^\n]*other[^\n]*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "resumes"),
    [
        (["run", "a.yaml"], True),
        (["data", "prepare", "hdtf"], True),
        (["data", "split", "m"], False),
        (["sample"], False),
    ],
)
def test_only_what_continues_says_so(words, resumes, monkeypatch, capsys):
    def parse(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parse", parse)
    assert cli.main(words) == cli.INTERRUPTED
    assert ("the same command continues" in capsys.readouterr().err) == resumes


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--for", "livetalk"], (Fraction(16), (512, 512))),
        (["--for", "scratch_avatar", "--fps", "25"], (Fraction(25), (32, 32))),
        ([], (None, None)),
    ],
)
def test_data_are_prepared_for_a_recipe(words, found, monkeypatch):
    got = []
    monkeypatch.setattr("distill.data.prepare.prepare.run", lambda args: got.append((args.fps, args.size)) or 0)
    assert cli.main(["data", "prepare", "folder", "--videos", "v", "--out", "o", *words]) == 0
    assert got == [found]


def test_a_warning_of_ours_is_one_line_and_another_keeps_its_place(capsys):
    cli.show_warning("text of 20 tokens", UserWarning, cli.__file__, 3)
    assert capsys.readouterr().err == "distill: warning: text of 20 tokens\n"
    for category, file in ((UserWarning, re.__file__), (DeprecationWarning, cli.__file__)):
        cli.show_warning("old", category, file, 3)
        assert capsys.readouterr().err.startswith(f"{file}:3: {category.__name__}: old\n")


def test_the_console_script_shows_warnings_so(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr("sys.argv", ["distill", "smaple"])
    assert cli.main() == cli.USER_ERROR
    assert warnings.showwarning is cli.show_warning
