"""Scripted conversations: what is timed, what is scored."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch

from distill.cli import main
from distill.commands.eval import multiturn
from distill.commands.eval.conversing import Interruption, reach
from distill.commands.eval.multiturn import Played, Script
from distill.live.client import Answer
from distill.live.operations.access import Access
from distill.live.server import Options
from distill.live.viewer import Viewer
from eval.report import conversations
from students.weights.checkpoint import save_student
from teachers.errors import UserError
from tests.support.live.serving import a_puppet, serving
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
    (answers, parts, *_, frames) = conversations.tables_of({"mine": report})
    assert (answers.title, parts.title) == ("Answers", "Where the time to the first talking frame goes")
    assert [cell["value"] for cell in parts.rows[0]["cells"]] == [
        "0",
        "10.0",
        "0",
        "0",
    ]  # of two turns, the second without
    assert "luma a turn" in [column["name"] for column in frames.columns]


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
        "--interrupt",
        0,
    ]
    assert main(["eval", "multiturn", *map(str, words)]) == 0
    report = json.loads((tmp_path / "out" / "multiturn.json").read_text())
    assert report["num_turns"] == 2
    assert all(0 < row["latency"] < 5 and row["latency"] <= row["dead"] + 0.1 for row in report["turns"])
    assert (tmp_path / "out" / "000.mp4").stat().st_size > 1000
    assert "| student | " in capsys.readouterr().out
    assert 'src="000.mp4"' in (tmp_path / "out" / "multiturn.html").read_text()
    assert report["groups_ms"].keys() == {"waiting", "drawing", "network", "playout"}
    assert report["line_ms"]["round_trip"]["p50"] < 500


@pytest.mark.slow
def test_two_servers_are_compared_on_the_same_sound(tmp_path, capsys, monkeypatch):
    """One of them takes no interrupt: its avatar goes on talking, which the score says."""
    script = tmp_path / "c.yaml"
    script.write_text("- name: short\n  turns: [hello]\n")
    deaf, real = [], Viewer.interrupt
    monkeypatch.setattr(Viewer, "interrupt", lambda self, now: None if self.bundle in deaf else real(self, now))
    with serving(a_puppet()) as (good, _), serving(a_puppet()) as (bad, engine):
        deaf.append(engine.bundle)
        given = ["--server", f"ws://{good}", "--server", f"worse=ws://{bad}/live", "--turns", "sound"]
        words = ["eval", "multiturn", *given, "--conversations", script, "--out", tmp_path / "out"]
        assert main([*map(str, words)]) == 0
    both = json.loads((tmp_path / "out" / "multiturn.json").read_text())["systems"]
    assert [*both] == [good, "worse"]
    first, second = (both[name]["interruptions"] for name in (good, "worse"))
    stopped = first["stopped_seconds"]["max"]
    assert (first["never"], first["after_seconds"]["max"]) == (0, 0.0)
    assert first["score"] == (0 < stopped <= conversations.QUIET_WITHIN)
    assert (second["never"], second["score"]) == (1, 0.0)
    assert second["after_seconds"]["max"] > 0.5
    assert both["worse"]["server"] == f"ws://{bad}/live"
    assert json.loads((tmp_path / "out" / "worse" / "multiturn.json").read_text())["turns"][0]["text"] == "hello"
    page = (tmp_path / "out" / "multiturn.html").read_text()
    assert page.count("<video") == 2
    assert 'src="worse/000.mp4"' in page
    assert "went on talking" in capsys.readouterr().out


def test_parts_that_a_server_does_not_tell_are_not_made_up():
    shares = conversations.grouped(
        {"talker": 5.0, "queue": 1.0, "wait": 0.0, "denoise": 10.0, "new": 2.0, "transport": 3.0}
    )
    assert shares == {"waiting": 8.0, "drawing": 10.0, "network": 3.0, "playout": 0.0}
    assert conversations.grouped({"transport": 40.0, "playout": 5.0}) == {"undivided": 40.0, "playout": 5.0}
    assert conversations.grouped({}) == {}


def test_an_interruption_counts_if_it_is_quick_and_quiet():
    cut = [Interruption(0.1, 0.0), Interruption(0.7, 0.0), Interruption(0.2, 0.05), Interruption(None, 1.0)]
    found = conversations.interrupted(cut)
    assert (found["score"], found["never"]) == (0.25, 1)
    assert found["stopped_seconds"] == {"p50": 0.2, "p95": 0.7, "max": 0.7}
    rows = multiturn.rows(a_conversation(), None, None)
    rows[0] |= {"latency": None, "dead": None}
    report = {"turns_by": "typed", **conversations.summary([rows], (), cut[-1:])}
    assert report["interruptions"]["stopped_seconds"] == {}
    shown = conversations.page({"silent": report}).details["Every turn of silent"]
    assert "| test 1 | - | - | 0.000 |" in shown


def test_the_token_goes_to_the_server_alone(monkeypatch):
    """A server with a token; a redirect to elsewhere is not followed."""
    token, elsewhere = "secret" * 4, []

    class Away(BaseHTTPRequestHandler):
        def do_GET(self):
            elsewhere.append(self.headers.get("Authorization"))
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/stolen")
            self.end_headers()

        def log_message(self, *_):
            """Silent."""

    monkeypatch.setenv("AVATAR_TOKEN", token)
    with serving(a_puppet(), options=Options(access=Access(token=token))) as (address, _):
        assert reach(f"ws://{address}").portrait(0).shape == (3, 16, 16)
        monkeypatch.delenv("AVATAR_TOKEN")
        with pytest.raises(UserError, match=r"no server at .*give its token as AVATAR_TOKEN"):
            reach(f"ws://{address}")
    monkeypatch.setenv("AVATAR_TOKEN", token)
    with ThreadingHTTPServer(("127.0.0.1", 0), Away) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        with pytest.raises(UserError, match="302") as refused:
            reach(f"ws://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert elsewhere == [f"Bearer {token}"]
    assert token not in str(refused.value)


def test_what_cannot_be_reached_is_one_line(tmp_path, capsys):
    for words, message in (
        ([], "--student or --server is missing"),
        (["--server", "http://127.0.0.1:1"], "give [NAME=]ws://HOST:PORT"),
        (["--server", "ws://127.0.0.1:1"], "no server at 127.0.0.1:1/hello"),
        (["--server", "ws://127.0.0.1:1", "--extractors", "x"], "--extractors reads the audio encoder of --student"),
    ):
        assert main(["eval", "multiturn", "--out", str(tmp_path / "out"), *words]) == 2
        assert message in capsys.readouterr().err
    with serving(a_puppet()) as (address, _):
        assert (reach(f"mine=ws://{address}").url, reach(f"ws://{address}/live").name) == (
            f"ws://{address}/live",
            address,
        )
        assert reach(f"ws://{address}").portrait(0).shape == (3, 16, 16)
        with pytest.raises(UserError, match=r"no server at .*/portraits/99\.png .404"):
            reach(f"ws://{address}").portrait(99)
        twice = ["--server", f"ws://{address}"] * 2
        assert main(["eval", "multiturn", "--out", str(tmp_path / "out"), *twice]) == 2
        assert "two of one name" in capsys.readouterr().err
