"""The streaming block in diffusers' modular pipelines: loaded from a folder, its state carries the session."""

import json

import pytest
import torch
from diffusers import ModularPipeline
from diffusers.utils import dynamic_modules_utils

from distill.cli import main
from students import AvatarPipeline
from students.weights.checkpoint import save_student
from teachers.errors import UserError
from tests.support.tiny import a_bundle, a_portrait, some_sound


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("modular")
    save_student(place / "student", a_bundle(), "---\nlibrary_name: avatar-distill\ntags:\n- avatar\n---\n# Mine\n")
    assert main(["convert", str(place / "student"), str(place / "out"), "--to", "modular"]) == 0
    return place / "out"


@pytest.fixture
def pipe(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path))
    pipe = ModularPipeline.from_pretrained(str(folder), trust_remote_code=True)
    pipe.load_components()
    return pipe


def test_any_split_streams_the_frames_of_the_whole(folder, pipe):
    sound, portrait = some_sound(20000), a_portrait()
    avatar = AvatarPipeline.from_pretrained(folder / "student")
    whole = avatar(image=portrait, audio=sound, prompt="a person nods", output_type="pt")
    state, frames, sounds = None, [], []
    for piece in sound.split(3000):
        state = pipe(state=state, image=portrait, prompt="a person nods", audio=piece)
        assert state.get("first_frame") == sum(map(len, frames))
        frames.append(state.get("frames"))
        sounds.append(state.get("sound"))
    assert state.get("waiting") == "audio"
    state = pipe(state=state, close=True)
    frames.append(state.get("frames"))
    assert state.get("waiting") == "end"
    assert torch.equal(torch.cat(frames)[: len(whole.frames)], whole.frames)
    assert torch.equal(torch.cat(sounds), sound[: sum(map(len, sounds))])


def test_a_call_without_new_sound_pushes_none_and_two_streams_are_apart(pipe):
    first = pipe(image=a_portrait(), audio=some_sound(9000))
    other = pipe(image=a_portrait(3), audio=some_sound(9000), seed=1)
    assert not torch.equal(first.get("frames"), other.get("frames"))
    again = pipe(state=first)
    assert (len(again.get("frames")), again.get("waiting")) == (0, "audio")
    assert again.get("stream") is first.get("stream")


def test_text_interrupt_and_lead(pipe):
    state = pipe(image=a_portrait(), audio=some_sound(30000), lead=2)
    session = state.get("stream").session
    assert (state.get("waiting"), session.point.chunk) == ("lead", 2)
    state = pipe(state=state, played=3, interrupt=True, prompt="someone smiles")
    assert (session.point.chunk, session.events[0].text) == (1, "someone smiles")
    assert (state.get("waiting"), len(state.get("frames"))) == ("audio", 0)
    state = pipe(state=state, audio=some_sound(20000, 2))
    assert (state.get("first_frame"), session.point.text) == (3, "someone smiles")


def test_the_folder_is_a_repository(folder):
    assert json.loads((folder / "modular_config.json").read_text())["auto_map"] == {
        "ModularPipelineBlocks": "modular_block.AvatarStreamBlock"
    }
    card = (folder / "README.md").read_text()
    assert "library_name: diffusers\ntags:\n- modular-diffusers\n- avatar\n" in card
    assert 'ModularPipeline.from_pretrained(".", trust_remote_code=True)' in card
    assert str(folder.parent) not in "".join(file.read_text() for file in folder.glob("*.json"))


def test_mistakes_are_one_line(folder, pipe, tmp_path, capsys):
    with pytest.raises(UserError, match="first call opens the stream; give it a portrait"):
        pipe(audio=some_sound(9000))
    unloaded = ModularPipeline.from_pretrained(str(folder), trust_remote_code=True)
    with pytest.raises(UserError, match=r"call pipe\.load_components"):
        unloaded(image=a_portrait())
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        ModularPipeline.from_pretrained(str(folder))
    for words, message in ((["--base", "x"], "--base has no effect"), ([], "no student")):
        assert main(["convert", str(tmp_path), str(tmp_path / "new"), "--to", "modular", *words]) == 2
        assert message in capsys.readouterr().err
