"""examples/own_planner: what the chat model gets, and what becomes of its answers."""

import math
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import yaml

from students.serving.timeline import BEHAVIOURS, Cue, Director, read_script
from teachers.errors import UserError
from tests.students.test_every_student import opened, sound_of
from tests.support.tiny import a_bundle, a_portrait, some_sound
from tests.support.tiny_adapters import save_image_text

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_planner"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A copy of the example."""
    return shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("mine") / "planner")


@pytest.fixture(scope="module")
def chat(place):
    """Its module, as a timeline finds it."""
    return sys.modules[type(read_script(place / "timeline.yaml").planner).__module__]


def test_a_timeline_names_it(place, chat_folder):
    script = read_script(place / "timeline.yaml")
    assert (script.planner.folder, script.planner.every, script.planner.how) == (Path("models/chat"), 2, "keep")
    values = yaml.safe_load((place / "timeline.yaml").read_text())
    values["planner"]["folder"] = str(chat_folder)
    (place / "there.yaml").write_text(yaml.safe_dump(values))
    script = read_script(place / "there.yaml")
    assert list(script.planner.load(script.behaviours).behaviours) == [*BEHAVIOURS, "wave"]
    values["planner"]["every"] = 0
    (place / "wrong.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"^[^\n]*planner[^\n]*wrong\.yaml; every: got 0[^\n]*$"):
        read_script(place / "wrong.yaml")


def test_audio_facts(chat):
    silence, voice = torch.zeros(16000), 0.1 * torch.ones(16000)
    assert chat.audio_facts(silence[:0]) == {"seconds": 0.0, "loudness": -100.0, "active": 0.0, "silent": 0.0}
    facts = chat.audio_facts(torch.cat([voice, silence]))
    assert facts["seconds"] == 2.0
    assert facts["loudness"] == pytest.approx(-20 - 10 * math.log10(2))
    assert facts["active"] == 50.0
    assert facts["silent"] == 1.0
    assert chat.audio_facts(torch.cat([silence, voice]))["silent"] == 0.0


def test_an_answer_is_a_name_and_nothing_else(chat):
    said = {" Listen.\n": "listen", '"idle"': "idle", "**THINK**": "think"}
    said |= dict.fromkeys(["", "listen or speak", "listening", "I think", "nod", "speak\nidle"])
    assert {answer: chat.named(answer, BEHAVIOURS) for answer in said} == said


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory) -> Path:
    return save_image_text(tmp_path_factory.mktemp("chat"))


def test_a_model_gets_the_portrait_and_a_description_of_the_sound(chat, chat_folder, monkeypatch):
    """A random LLaVA in the published layout: its words depend on the picture's pixels, and none of them is a behaviour."""
    planner = chat.ChatPlanner(chat_folder, BEHAVIOURS, Fraction(2))
    assert planner.sees
    given = []
    keep = planner.model.generate
    monkeypatch.setattr(planner.model, "generate", lambda **asked: given.append(asked) or keep(**asked))
    portrait, sound = a_portrait(), some_sound(16000)
    assert planner.next(Fraction(3), sound, portrait) is None
    planner.next(Fraction(3), sound, -portrait)
    assert not torch.equal(given[0]["pixel_values"], given[1]["pixel_values"])
    assert not given[0]["do_sample"]
    asked = []
    monkeypatch.setattr(planner, "ask", lambda question, _: asked.append(question) or "Listen.")
    assert planner.next(Fraction(3), sound, portrait) == Cue(BEHAVIOURS["listen"], "keep")
    assert asked[0].endswith("one word of: speak, listen, think, idle, gesture")
    assert "in the last 1.0 s" in asked[0]


def test_a_model_s_answers_steer_the_stream(chat, chat_folder, monkeypatch):
    bundle, words = a_bundle(), ["Gesture.", "no idea", "idle"]
    planner = chat.ChatPlanner(
        chat_folder, {"gesture": "someone nods", "idle": "someone smiles"}, Fraction(1, 2), "recache"
    )
    monkeypatch.setattr(planner, "ask", lambda *_: words.pop(0) if words else "")
    session = opened(bundle)
    session.push(sound_of(bundle, 8))
    texts = [session.point.text for _ in Director(session, planner, a_portrait()).frames()]
    changes = [text for text, before in zip(texts, ["", *texts], strict=False) if text != before]
    assert changes == ["a person nods", "someone nods", "someone smiles"]


def test_a_model_that_cannot_be_read_is_one_line(chat, chat_folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"^no planner: [^\n]*nowhere has no config\.json[^\n]*$"):
        chat.ChatPlanner(tmp_path / "nowhere", BEHAVIOURS, Fraction(2))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match=rf"^planner cannot be read \([^\n]*{tmp_path.name}[^\n]*$"):
        chat.ChatPlanner(tmp_path, BEHAVIOURS, Fraction(2))
    processor = chat._loaded(chat_folder)[1]
    processor.chat_template = None
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lambda *_, **__: processor)
    with pytest.raises(UserError, match=r"^planner has no chat template: [^\n]*$"):
        chat.ChatPlanner(chat_folder, BEHAVIOURS, Fraction(2))
