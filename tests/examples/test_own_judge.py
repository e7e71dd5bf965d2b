"""examples/own_judge: what a judge is asked about the conversations of `distill eval multiturn`, and what is kept."""

import importlib.util
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from teachers import media
from teachers.errors import UserError

FILE = Path(__file__).parents[2] / "examples" / "own_judge" / "judge.py"


@pytest.fixture(scope="module")
def judge():
    spec = importlib.util.spec_from_file_location("judge", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Strict:
    """Says 7, but forgets the box for one dimension."""

    def __init__(self):
        self.asked = []

    def ask(self, frames, question):
        self.asked.append((len(frames), question))
        return "good" if "logical" in question else "I think \\boxed{3} no, \\boxed{7}"


def test_every_answer_of_a_judge_is_kept_as_it_came(judge, tmp_path):
    strict, frames = Strict(), np.zeros((100, 4, 4, 3), np.uint8)
    report = judge.judged(strict, [("a", ("hello", "bye"), frames)], tmp_path / "judge.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "judge.jsonl").read_text().splitlines()]
    assert [line["dimension"] for line in lines] == list(judge.DIMENSIONS)
    assert len(lines) == 9
    assert report["unanswered"] == 1
    assert "LC" not in report["mean_raw"]
    assert set(report["mean_raw"].values()) == {7.0}
    assert all(count == 32 and "1. hello\n2. bye" in question for count, question in strict.asked)
    assert judge.read_score("\\boxed{11}") is None
    assert judge.read_score("8") is None
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="judge cannot be read"):
        judge.LocalJudge(tmp_path)


def test_conversations_are_read_from_where_the_command_left_them(judge, tmp_path):
    turns = [("a", 0, "hello"), ("a", 1, "bye"), ("a", 0, "again")]
    rows = [{"conversation": name, "turn": number, "text": text} for name, number, text in turns]
    (tmp_path / "multiturn.json").write_text(json.dumps({"turns": rows}))
    for number, level in enumerate((40, 200)):
        frames = np.full((5 + number, 32, 32, 3), level, np.uint8)
        media.write_video(tmp_path / f"{number:03d}.mp4", frames, Fraction(25))
    (first, said, frames), (_, other, brighter) = judge.read_conversations(tmp_path)
    assert (first, said, other) == ("a", ["hello", "bye"], ["again"])
    assert (frames.shape, brighter.shape) == ((5, 32, 32, 3), (6, 32, 32, 3))
    assert brighter.mean() > 150 > 60 > frames.mean()
    with pytest.raises(UserError, match="no conversations"):
        judge.read_conversations(tmp_path / "nowhere")
