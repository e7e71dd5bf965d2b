"""Without a door's library its name and its extra are said in one line, and nothing else asks for it."""

import importlib
import sys

import pytest

from distill.cli import main
from teachers.errors import UserError
from tests.support.processes import call


def without(monkeypatch, name: str) -> None:
    """The next import of `name`, a package, fails; what was loaded of it is back after the test."""
    for module in list(sys.modules):
        if module.partition(".")[0] == name or module.startswith(f"distill.live.doors.{name}_"):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)


def test_serve_says_what_livekit_needs_before_it_reads_the_student(monkeypatch, capsys):
    without(monkeypatch, "livekit")
    assert main(["serve", "--student", "nowhere", "--livekit", "wss://x"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "pip install 'avatar-distill[livekit]'" in lines[0]


def test_the_pipecat_service_says_what_it_needs(monkeypatch):
    without(monkeypatch, "pipecat")
    with pytest.raises(UserError, match=r"pip install 'avatar-distill\[pipecat\]'"):
        import distill.live.doors.pipecat_service  # noqa: F401


def doors_loaded() -> list[str]:
    """Libraries of doors that this process holds with all that serves the page."""
    for module in ("distill.live.server", "distill.commands.serve", "distill.live.doors.stream"):
        importlib.import_module(module)
    return sorted({"livekit", "pipecat"} & set(sys.modules))


def test_the_page_loads_neither():
    assert call(doors_loaded) == []
