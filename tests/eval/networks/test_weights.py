"""Published weights: verified by sha256, refused by name with where to get them, and no code of a wrong file ever runs."""

import hashlib
import re
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from eval.networks.i3d import I3D
from eval.networks.weights import REGISTRY, exact, load_network, locate, read, weights_folder
from teachers.errors import UserError

NETWORKS = ("inception", "i3d", "syncnet", "dinov2")


def publish(monkeypatch, name: str, path: Path) -> None:
    """As if the file at `path` were the published one of `name`."""
    content = path.read_bytes()
    entry = replace(REGISTRY[name], sha256=hashlib.sha256(content).hexdigest(), num_bytes=len(content))
    monkeypatch.setitem(REGISTRY, name, entry)


def put(monkeypatch, folder: Path, name: str, content: bytes = b"some weights", file: str | None = None) -> Path:
    path = folder / (file or REGISTRY[name].file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    publish(monkeypatch, name, path)
    return path


# ---- the table


def test_every_entry_is_complete_and_no_two_are_alike():
    assert {*NETWORKS, "alexnet", "syncnet_example"} == set(REGISTRY)
    for entry in REGISTRY.values():
        assert re.fullmatch("[0-9a-f]{64}", entry.sha256)
        assert all((entry.metric, entry.source, entry.licence))
        assert not Path(entry.file).is_absolute()
    assert len({entry.sha256 for entry in REGISTRY.values()}) == len(REGISTRY)
    assert all(REGISTRY[name].num_bytes for name in NETWORKS)


def test_the_hash_in_a_published_name_is_the_hash_of_the_table():
    """pt_inception-2015-12-05-6726825d.pth: torch.hub's names end with the first 8 digits."""
    entry = REGISTRY["inception"]
    for file in (entry.file, *entry.others):
        assert entry.sha256.startswith(re.search(r"-([0-9a-f]{8})\.pth", file)[1])


# ---- found, or refused


@pytest.mark.parametrize("name", REGISTRY)
def test_a_missing_file_is_refused_by_name_with_where_to_get_it(tmp_path, name):
    with pytest.raises(UserError) as caught:
        locate(name, tmp_path)
    expected, entry = str(caught.value), REGISTRY[name]
    for part in (entry.metric, "refused", str(tmp_path / entry.file), "is not there", entry.sha256, entry.source):
        assert part in expected
    assert "\n" not in expected
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("get", [locate, read])
def test_a_changed_sha_is_refused(tmp_path, monkeypatch, get):
    path = put(monkeypatch, tmp_path, "inception", bytes(range(256)))
    get("inception", tmp_path)
    for wrong in (bytes([1, *range(1, 256)]), bytes(range(255)), b""):  # one bit, a part, nothing
        path.write_bytes(wrong)
        with pytest.raises(UserError, match="refused") as caught:
            get("inception", tmp_path)
        expected = str(caught.value)
        assert f"{path} is another file" in expected
        assert f"{len(wrong)} bytes" in expected
        assert hashlib.sha256(wrong).hexdigest() in expected
        assert REGISTRY["inception"].sha256 in expected


@pytest.mark.parametrize("name", NETWORKS)
def test_no_entry_accepts_another_file(tmp_path, name):
    path = tmp_path / REGISTRY[name].file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"anything")
    with pytest.raises(UserError, match="refused"):
        locate(name, tmp_path)


def test_the_right_file_is_found_under_its_other_name(tmp_path, monkeypatch):
    other = REGISTRY["inception"].others[0]
    path = put(monkeypatch, tmp_path, "inception", file=other)
    assert locate("inception", tmp_path) == path
    assert read("inception", tmp_path).getvalue() == b"some weights"


def test_what_was_read_is_what_was_verified(tmp_path, monkeypatch):
    """The file is read once: another that comes in its place later cannot be the one that runs."""
    path = put(monkeypatch, tmp_path, "i3d", b"right")
    opened = []

    def read_bytes(self):
        opened.append(self)
        content = self.open("rb").read()
        self.write_bytes(b"wrong")
        return content

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert read("i3d", tmp_path).getvalue() == b"right"
    assert opened == [path]


def test_an_unreadable_file_and_an_unknown_name_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="unknown weights: inceptoin; known are inception, i3d"):
        locate("inceptoin", tmp_path)
    put(monkeypatch, tmp_path, "i3d")

    def fail(self, *args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    for get in (read, locate):
        with pytest.raises(UserError, match=r"cannot be read \(Input/output error\)"):
            get("i3d", tmp_path)


def test_a_folder_in_place_of_the_file_is_no_file(tmp_path):
    (tmp_path / REGISTRY["i3d"].file).mkdir()
    with pytest.raises(UserError, match="is not there"):
        locate("i3d", tmp_path)


def test_the_folder_is_the_users(tmp_path, monkeypatch):
    path = put(monkeypatch, tmp_path, "syncnet")
    monkeypatch.setenv("AVATAR_DISTILL_WEIGHTS", str(tmp_path))
    assert locate("syncnet") == path
    monkeypatch.delenv("AVATAR_DISTILL_WEIGHTS")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert weights_folder() == tmp_path / "home" / ".cache" / "avatar-distill" / "weights"
    with pytest.raises(UserError, match="is not there"):
        locate("syncnet")


def test_nothing_is_fetched(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", fail)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    for name in NETWORKS:
        with pytest.raises(UserError):
            locate(name, tmp_path)


# ---- state dicts


def a_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))


def save(monkeypatch, folder: Path, state, zipped: bool = True) -> None:
    path = folder / REGISTRY["syncnet"].file
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    publish(monkeypatch, "syncnet", path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_is_loaded_and_frozen(tmp_path, monkeypatch, zipped):
    """Both formats of torch.save: the published files are older than the zip. BatchNorm's counter may be missing."""
    state = {key: torch.randn_like(value.float()) for key, value in a_network().state_dict().items()}
    del state["1.num_batches_tracked"]
    save(monkeypatch, tmp_path, state, zipped)
    network = a_network()
    load_network("syncnet", network, tmp_path)
    found = network.state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda state: state.pop("0.bias"), "missing 0.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda state: state.update({"1.weight": torch.zeros(4)}), r"1.weight is \[4\] where .* is needed"),
        (lambda state: state.pop("1.running_var"), "missing 1.running_var"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_whole(tmp_path, monkeypatch, change, expected):
    network = a_network()
    state = {key: value + 1 for key, value in network.state_dict().items()}
    change(state)
    save(monkeypatch, tmp_path, state)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(UserError, match=f"refused: its file does not fit: {expected}; get"):
        load_network("syncnet", network, tmp_path)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


class Bomb:
    def __reduce__(self):
        return (Path.write_text, (Path("exploded"), "by a pickle"))


@pytest.mark.parametrize("content", [Bomb(), {"0.weight": "text"}, [torch.zeros(1)], "damaged"])
def test_even_a_verified_file_runs_no_code_and_must_hold_tensors(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    if content == "damaged":
        put(monkeypatch, tmp_path, "syncnet", b"PK\3\4 damaged")
    else:
        save(monkeypatch, tmp_path, content)
    with pytest.raises(UserError, match="Sync-D with SyncNet v2 refused"):
        load_network("syncnet", a_network(), tmp_path)
    assert not Path("exploded").exists()


def test_torchscript_of_a_wrong_sha_is_never_opened(tmp_path, monkeypatch):
    """TorchScript is a program: the file is refused before torch sees a byte of it."""

    def fail(*args, **kwargs):
        raise AssertionError("torch.jit.load was called")

    monkeypatch.setattr(torch.jit, "load", fail)
    (tmp_path / REGISTRY["i3d"].file).write_bytes(b"a program")
    with pytest.raises(UserError, match="FVD with I3D refused"):
        I3D.load(tmp_path)


# ---- precision


def test_inference_is_true_fp32_and_the_setting_is_given_back(monkeypatch):
    def settings():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.is_inference_mode_enabled()

    def fail():
        with exact():
            assert settings() == ("highest", False, True)
            raise KeyError

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(KeyError):
            fail()
        assert settings() == ("high", True, False)
    finally:
        torch.set_float32_matmul_precision("highest")
