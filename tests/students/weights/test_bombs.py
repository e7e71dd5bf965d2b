"""Small files that ask for much memory or time: one line each, at once (a limit of 2 s and 200 MB a file)."""

import json
import resource
import time
import zipfile
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from students.weights.checkpoint import load_student, save_student
from teachers.checkpoints import weights
from teachers.checkpoints.convert import plan
from teachers.config import convert, fraction
from teachers.errors import UserError
from tests.support.checkpoints import TEXT_TO_VIDEO, some_weights
from tests.support.tiny import a_bundle


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bombs") / "student"
    save_student(folder, a_bundle(), "# A card\n")
    return folder


def refused(words: str, act) -> None:
    """One line within 2 s and 200 MB more than there were."""
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=rf"^[^\n]*{words}[^\n]*$"):
        act()
    assert time.process_time() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("network.num_layers", 10**6, r"network\.num_layers: got 1000000, at most 1000 can be"),
        ("network.num_layers", 900, r"network\.num_layers: got 900, at most 75 can be"),
        ("network.num_layers", 3, r"model\.safetensors: missing blocks\.2\."),
        ("network.ffn_dim", 2**20, r"model\.safetensors: .* is needed"),
        ("network.num_heads", 2**20, r"model\.safetensors: .* is needed"),
        ("network.num_heads", 10**400, r"network\.num_heads: got 1000"),
        ("text.max_tokens", 10**9, r"text\.max_tokens: got 1000000000, at most 8192 can be"),
        ("codec.patch", 16384, r"codec\.patch: got 16384"),
        ("height", 10**6, r"height: got 1000000"),
        ("horizon_frames", 2 * 10**9, r"horizon_frames: got 2000000000"),
        ("fps", "1e999999999", r"wrong value of 'fps': '1e999999999'"),
        ("fps", "1/" + "9" * 5000, r"wrong value of 'fps'"),
        ("history.level", 10**400, r"wrong value of 'history\.level'"),
        ("sigmas", [0.5] * 5000, r"sigmas: got 5000"),
    ],
)
def test_a_spec_that_asks_for_too_much(student, tmp_path, key, value, words):
    folder = tmp_path / "student"
    folder.mkdir()
    for file in student.iterdir():
        (folder / file.name).symlink_to(file)
    values = json.loads((student / "spec.json").read_text())
    place, (*outer, last) = values, key.split(".")
    for part in outer:
        place = place[part]
    place[last] = value
    (folder / "spec.json").unlink()
    (folder / "spec.json").write_text(json.dumps(values))
    refused(words, lambda: load_student(folder))


def test_json_that_is_nested_without_end(tmp_path):
    (tmp_path / "spec.json").write_text("[" * 100_000)
    refused(r"damaged file: .*spec\.json", lambda: load_student(tmp_path))


@pytest.mark.parametrize("text", ["1e999999999", "1e-999999999", "9" * 5000, "1/0", "nan", "inf", "", "0x10", "1_0"])
def test_a_fraction_is_short(text):
    with pytest.raises(ValueError, match="not a fraction"):
        fraction(text)
    assert fraction("30000/1001") == Fraction(30000, 1001)
    assert fraction(12.5) == fraction(" 25/2 ") == Fraction(25, 2)
    with pytest.raises(UserError):
        convert(Fraction, text, "fps")


def archive(path: Path, compression: int, pad: int = 0) -> Path:
    """A torch archive whose pickle is followed by zeros, written with this compression."""
    torch.save({"generator": some_weights(TEXT_TO_VIDEO, "self-forcing")}, path.with_suffix(".whole"))
    with zipfile.ZipFile(path.with_suffix(".whole")) as whole, zipfile.ZipFile(path, "w", compression) as packed:
        for part in whole.infolist():
            data = whole.read(part)
            packed.writestr(part.filename, data + bytes(pad) if part.filename.endswith("data.pkl") else data)
    return path


def test_a_pickle_that_unpacks_to_much(tmp_path):
    file = archive(tmp_path / "model.pt", zipfile.ZIP_DEFLATED, pad=2**28)
    assert file.stat().st_size < 2**25
    refused(
        r"refused weights: .*model\.pt is a zip that unpacks to more than itself \(.*\), which",
        lambda: plan(file, "ours"),
    )


@pytest.mark.parametrize(
    "broken", [b"\x80\x02u.", b"\x80\x02}]U\x01a.", b"\x80\x02.", b"\x80\x02)R.", b"\x80\x02\x85Q."]
)
def test_a_damaged_pickle_is_one_line(tmp_path, broken):
    """Found by `tests.e2e.fuzz_many`: the unpickler pops from an empty stack, and calls with wrong types."""
    torch.save({"a": torch.ones(2)}, whole := tmp_path / "whole.pt")
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(tmp_path / "a.pt", "w") as target:
        for part in source.infolist():
            target.writestr(part.filename, broken if part.filename.endswith("data.pkl") else source.read(part))
    with pytest.raises(UserError, match=r"^[^\n]*a\.pt[^\n]*$"):
        weights.read_archive(tmp_path / "a.pt")


def test_tensors_of_fewer_numbers_than_they_say(tmp_path):
    torch.save({"generator": {"model.head.modulation": torch.zeros(1).expand(10**6, 10**6)}}, tmp_path / "model.pt")
    refused(
        r"refused weights: .*head\.modulation is \[1000000, 1000000\] out of fewer",
        lambda: plan(tmp_path / "model.pt", "ours"),
    )


def test_names_of_shards_without_end(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-99999999999.safetensors")
    refused(r"no shard of weights: .*of-99999999999\.safetensors", lambda: plan(tmp_path, "ours"))
    (tmp_path / "model-00001-of-99999999999.safetensors").rename(tmp_path / "model-00001-of-99999.safetensors")
    refused(r"missing shard: model-00002-of-99999", lambda: plan(tmp_path, "ours"))
