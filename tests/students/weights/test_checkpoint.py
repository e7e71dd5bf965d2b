"""A student's folder: what is loaded is what was saved, and a folder that does not fit is refused in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from students.history import History
from students.serving.session import Session
from students.weights.checkpoint import load_student, save_student
from teachers.errors import UserError
from tests.support.tiny import a_bundle, a_portrait, some_sound


@pytest.fixture
def folder(tmp_path):
    save_student(tmp_path / "student", a_bundle(History(sinks=0, window=3, level=0.1)), "# A card\n")
    return tmp_path / "student"


def refused(folder, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        load_student(folder)
    assert "\n" not in str(error.value)


def test_a_round_trip_is_bit_equal(folder):
    before, state = a_bundle(History(sinks=0, window=3, level=0.1)), torch.random.get_rng_state()
    after = load_student(folder)
    assert torch.equal(torch.random.get_rng_state(), state), "loading moved the global generator"
    assert after.spec == before.spec
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "SHA256SUMS", "codec.safetensors", "model.safetensors", "spec.json", "text",
    ]  # fmt: skip
    ours, theirs = before.student.net.state_dict(), after.student.net.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not any(p.requires_grad for p in after.student.parameters())
    films = []
    for bundle in (before, after):
        session = Session(bundle, a_portrait(), "a person nods")
        session.push(some_sound(8 * 1280))
        films.append(torch.cat([chunk.frames for chunk in session.frames()]))
    assert torch.equal(*films)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("spec.json", r"has no spec\.json; give the student/ folder"),
        ("model.safetensors", r"no weights: .*model\.safetensors"),
        ("codec.safetensors", r"no weights: .*codec\.safetensors"),
        ("text/model.safetensors", r"missing model.safetensors: .*text; get the whole folder"),
    ],
)
def test_a_missing_file_is_named(folder, name, words):
    (folder / name).unlink()
    refused(folder, words)


@pytest.mark.parametrize("name", ["model.safetensors", "codec.safetensors", "spec.json"])
def test_a_cut_file_is_named(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    refused(folder, rf"damaged .*{name}")


def test_weights_of_another_shape_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    proj = tensors["proj_out.weight"]
    save_file(tensors | {"proj_out.weight": proj[:-1].contiguous()}, folder / "model.safetensors")
    refused(folder, r"weights do not fit: .*proj_out\.weight is \[15, 32\] where \[16, 32\] is needed")
    save_file(tensors | {"blocks.9.attn1.to_q.weight": proj.clone()}, folder / "model.safetensors")
    refused(folder, r"unexpected blocks\.9\.attn1")
    del tensors["proj_out.weight"]
    save_file(tensors, folder / "model.safetensors")
    refused(folder, r"missing proj_out\.weight")


def test_the_text_encoder_is_read_strictly_and_never_unpickled(folder):
    """A tensor that is missing was a random one, and a pickle was read where there were no safetensors."""
    (folder / "SHA256SUMS").unlink()
    file = folder / "text" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "SelfAttention" in name)
    save_file({key: x for key, x in tensors.items() if key != name}, file, {"format": "pt"})
    refused(folder, rf"weights do not fit: .*text: missing {name}")
    save_file(tensors | {name: torch.full_like(tensors[name], float("nan"))}, file, {"format": "pt"})
    refused(folder, rf"weights are not finite: .*text: {name}")
    torch.save(tensors, folder / "text" / "pytorch_model.bin")
    file.unlink()
    refused(folder, r"missing model\.safetensors: .*text")


def test_weights_that_are_not_finite_are_neither_written_nor_read(folder, tmp_path):
    bundle = load_student(folder)
    tensors = load_file(folder / "model.safetensors")
    with torch.no_grad():
        bundle.student.net.get_parameter("proj_out.bias")[0] = float("inf")
    with pytest.raises(UserError, match=r"weights are not finite: the student: proj_out\.bias"):
        save_student(tmp_path / "other", bundle, "card")
    assert not (tmp_path / "other").exists()
    save_file(tensors | {"proj_out.bias": tensors["proj_out.bias"] * float("nan")}, folder / "model.safetensors")
    refused(folder, r"weights are not finite: .*model\.safetensors: proj_out\.bias")


def test_a_flipped_bit_is_named_and_an_edited_spec_is_warned_of(folder):
    for name in ("model.safetensors", "codec.safetensors", "text/model.safetensors"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        refused(folder, rf"damaged student: .*{name} is not what was written")
        (folder / name).write_bytes(data)
    spec = folder / "spec.json"
    spec.write_text(spec.read_text().replace('"window": 3', '"window": 2'))
    with pytest.warns(UserWarning, match="spec.json is not as it was written: edited, or damaged"):
        assert load_student(folder).spec.history.window == 2


def test_a_cycle_of_windows_is_kept(tmp_path):
    save_student(tmp_path / "student", a_bundle(History(sinks=1, window=(2, 5))), "a card\n")
    assert load_student(tmp_path / "student").spec.history == History(sinks=1, window=(2, 5))


def test_a_pickle_is_not_executed(folder):
    torch.save({"proj_out.weight": torch.zeros(1)}, folder / "model.safetensors")
    refused(folder, r"damaged weights")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chunk_framez": 2}, "unknown key 'chunk_framez'.*did you mean 'chunk_frames'"),
        ({"chunk_frames": "two"}, "wrong value of 'chunk_frames'"),
        ({"chunk_frames": 3}, "needs a whole number of chunks"),
        ({"history": {"sinks": -1}}, r"student\.history"),
        ({"format": 2}, "student format 2: .*reads format 1"),
        ({"sigmas": None}, "wrong value of 'sigmas'"),
    ],
)
def test_a_damaged_spec_is_named(folder, change, words):
    values = json.loads((folder / "spec.json").read_text())
    (folder / "spec.json").write_text(json.dumps(values | change))
    refused(folder, words)


def test_a_missing_key_is_named(folder):
    values = json.loads((folder / "spec.json").read_text())
    del values["fps"]
    (folder / "spec.json").write_text(json.dumps(values))
    refused(folder, "missing key 'fps'")
    (folder / "spec.json").write_text("[1, 2]")
    refused(folder, "spec.json")
