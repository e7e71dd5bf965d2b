"""Scripted conversations: what is timed, what is scored."""

import json

import numpy as np
import pytest
import torch

from distill.cli import main
from distill.commands.eval import multiturn
from distill.commands.eval.multiturn import Played, Script
from distill.live.client import Answer
from students.weights.checkpoint import save_student
from teachers.errors import UserError
from tests.support.serving import a_puppet
from tests.support.tiny import a_bundle


def test_the_shipped_conversations_are_read_and_wrong_ones_refused(tmp_path):
    assert sum(len(script.turns) for script in multiturn.read_scripts(multiturn.DEFAULT)) > 10
    for text, message in (
        ("- name: a\n  turns: [x]\n  mood: good\n", "mood"),
        ("- name: a\n  turns: []\n", "no turns"),
        ("name: [", "not YAML"),
    ):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            multiturn.read_scripts(tmp_path / "c.yaml")


def a_conversation(num_frames=60, darker=0) -> Played:
    """Two turns of 20 frames at 20 and 40; the second is darker."""
    portrait = torch.zeros(3, 16, 16)
    frames = (
        np.full((num_frames, 16, 16, 3), 128, np.uint8)
        - (np.arange(num_frames) % 2).astype(np.uint8)[:, None, None, None]
    )
    frames[40:] -= np.uint8(darker)
    answers = [
        Answer(1, asked=10.0, frame=20, end=40, arrived=10.2, seen=10.5, audible=10.7, parts_ms={"denoise": 10.0}),
        Answer(2, asked=20.0, frame=40, end=60, seen=20.1, audible=20.1, parts_ms={"denoise": 30.0}),
    ]
    sound = np.zeros(num_frames * 1280, np.float32)
    return Played(Script("test", ("one", "two")), portrait, frames, sound, answers, [0.0, 0.2])


def test_times_scores_and_drift_are_those_of_each_turn():
    rows = multiturn.rows(a_conversation(darker=30), a_puppet(), None)
    assert [row["latency"] for row in rows] == pytest.approx([0.5, 0.1])
    assert [row["dead"] for row in rows] == pytest.approx([0.7, 0.1])
    assert rows[1]["luma"] - rows[0]["luma"] == pytest.approx(-30, abs=0.1)
    assert rows[0]["parts_ms"] == pytest.approx({"denoise": 10.0, "transport": 190.0, "playout": 300.0})
    assert sum(rows[0]["parts_ms"].values()) == pytest.approx(1000 * rows[0]["latency"])
    report = multiturn.summary([rows, multiturn.rows(a_conversation(), a_puppet(), None)])
    assert report["num_turns"] == 4
    assert report["latency_seconds"]["max"] == pytest.approx(0.5)
    assert report["stalled_seconds"]["p95"] == pytest.approx(0.2)
    assert report["luma"]["change_a_turn"] == pytest.approx(-15, abs=0.1)  # mean of -30 and 0
    assert report["parts_ms"]["denoise"] == {"p50": 10.0, "p95": 30.0}
    assert "| luma |" in multiturn.table(report)


def test_the_command_holds_a_conversation_in_real_time(tmp_path, capsys):
    save_student(tmp_path / "student", a_bundle(), "card")
    script = tmp_path / "c.yaml"
    script.write_text("- name: short\n  turns: [word, word]\n")
    words = [
        "--student",
        tmp_path / "student",
        "--talker",
        "echo",
        "--conversations",
        script,
        "--out",
        tmp_path / "out",
    ]
    assert main(["eval", "multiturn", *map(str, words)]) == 0
    report = json.loads((tmp_path / "out" / "multiturn.json").read_text())
    assert report["num_turns"] == 2
    assert all(0 < row["latency"] < 5 and row["latency"] <= row["dead"] + 0.1 for row in report["turns"])
    assert (tmp_path / "out" / "000.mp4").stat().st_size > 1000
    assert "| latency |" in capsys.readouterr().out
