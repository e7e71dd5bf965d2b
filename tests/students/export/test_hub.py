"""Students at a hub, which is a server of this machine: up, bit for bit, with their card, and down again."""

import logging

import pytest
import torch

from students import AvatarPipeline
from students.export import hub as module
from students.export.modular import push_repository
from students.weights.checkpoint import save_student
from teachers.errors import UserError
from tests.support.hub import serving_hub
from tests.support.tiny import a_bundle, a_portrait, some_sound

CARD = "---\nlibrary_name: avatar-distill\ntags:\n- avatar\n---\n\n# Mine\n"
TOKEN = "hf_" + "secret" * 5


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "student"
    save_student(folder, a_bundle(), CARD)
    return folder


def test_a_student_goes_up_bit_for_bit_and_comes_down(student, tmp_path, monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    with serving_hub(monkeypatch, tmp_path) as hub:
        pipe = AvatarPipeline.from_pretrained(student)
        assert pipe.push_to_hub("me/avatar", token=TOKEN).startswith(hub.url)
        files = {str(file.relative_to(student)) for file in student.rglob("*") if file.is_file()}
        assert set(hub.repositories["me/avatar"]) == files
        for name in sorted(file for file in files if file.endswith((".safetensors", "spec.json", "README.md"))):
            assert hub.repositories["me/avatar"][name] == (student / name).read_bytes(), name
        assert hub.repositories["me/avatar"]["README.md"].decode() == CARD
        assert hub.tokens == {TOKEN}
        again = AvatarPipeline.from_pretrained("me/avatar")
    assert again.bundle.fingerprint == pipe.bundle.fingerprint
    assert again.card == CARD
    assert TOKEN not in caplog.text + "".join(capfd.readouterr())


def test_a_modular_pipeline_goes_up_and_streams_from_there(student, tmp_path, monkeypatch):
    from diffusers import ModularPipeline

    with serving_hub(monkeypatch, tmp_path) as hub:
        push_repository(student, "me/live")
        assert "student/model.safetensors" in hub.repositories["me/live"]
        pipe = ModularPipeline.from_pretrained("me/live", trust_remote_code=True)
        pipe.load_components()
    state = pipe(image=a_portrait(), audio=some_sound(9000), close=True)
    assert (state.get("waiting"), state.get("frames").shape[1:]) == ("end", torch.Size([16, 16, 3]))


def test_what_the_hub_refuses_is_one_line(student, tmp_path, monkeypatch):
    with serving_hub(monkeypatch, tmp_path) as hub:
        hub.refuse.add("me/closed")
        with pytest.raises(UserError, match="me/closed was not uploaded; log in") as refused:
            AvatarPipeline.from_pretrained(student).push_to_hub("me/closed", token=TOKEN)
        assert TOKEN not in str(refused.value)
        assert "\n" not in str(refused.value)
        with pytest.raises(UserError, match="nobody/none is no folder here, and the hub does not give it"):
            AvatarPipeline.from_pretrained("nobody/none")
        hub.repositories["me/bad"] = {"spec.json": b"{}"}
        with pytest.raises(UserError, match="no student"):
            AvatarPipeline.from_pretrained("me/bad")
        files = {str(file.relative_to(student)): file.read_bytes() for file in student.rglob("*") if file.is_file()}
        weights = bytearray(files["model.safetensors"])
        weights[-1] ^= 1
        hub.repositories["me/flipped"] = {**files, "model.safetensors": bytes(weights)}
        with pytest.raises(UserError, match=r"damaged student: .*model\.safetensors is not what was written"):
            AvatarPipeline.from_pretrained("me/flipped")
    with pytest.raises(UserError, match="push_to_hub: got variant"):
        AvatarPipeline.from_pretrained(student).push_to_hub("me/x", variant="fp16")


def test_paths_of_this_machine_are_warned_of():
    with pytest.warns(UserWarning, match=r"codec\.path is /models/vae"):
        module.warn_of_paths({"codec": {"path": "/models/vae", "stride": 4}, "height": 64})
