"""One set of options says where a student runs, for every command that has one."""

import argparse
from unittest import mock

import pytest
import torch

from distill.cli import main, parse
from distill.commands import devices
from students.serving.optimize import Speed, usable
from students.weights.checkpoint import save_student
from teachers.errors import UserError
from tests.support.tiny import a_bundle

STUDENT = ["--student", "s"]
COMMANDS = {
    "sample": [*STUDENT, "--image", "i", "--audio", "a", "--out", "o"],
    "serve": STUDENT,
    "bench": [*STUDENT, "--json", "j"],
    "drift": ["--run", "r"],
    "eval": STUDENT,
    "eval benchmark": ["--table", "t"],
    "eval multiturn": [*STUDENT, "--out", "o"],
}
ASKED = [
    "--device",
    "cuda:1",
    "--dtype",
    "bf16",
    "--compile",
    "reduce-overhead",
    "--attention",
    "flash",
    "--quantize",
    "fp8",
]


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    devices.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_with_a_student_has_them(command):
    words, given = command.split(), COMMANDS[command]
    plain, asked = parse([*words, *given]), parse([*words, *given, *ASKED])
    names = ("device", "dtype", "compile", "attention", "quantize")
    assert [getattr(plain, name) for name in names] == [None, None, "none", "native", "none"]
    assert [getattr(asked, name) for name in names] == ["cuda:1", "bf16", "reduce-overhead", "flash", "fp8"]
    if len(words) == 2:
        before = parse([words[0], "--device", "cuda:1", "--dtype", "bf16", words[1], *given])
        assert (before.device, before.dtype) == ("cuda:1", "bf16")


@pytest.mark.parametrize(
    "words",
    [["drift", "--run", "r"], ["eval", "--student", "s", "--real", "r", "--out", "o", "--protocol", "embedded"]],
)
def test_what_several_processes_would_repeat_is_refused(words, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(words) == 2
    assert f"distill {words[0]} is one process: 2 were started, and each would do all of it" in capsys.readouterr().err


def test_the_default_is_bf16_on_a_gpu_and_fp32_elsewhere(capsys):
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.get_device_name", return_value="H200"),
        mock.patch("torch.zeros", return_value=torch.ones(1)),
    ):
        assert devices.choose(options()) == (torch.device("cuda"), Speed(dtype="bf16"))
        assert devices.choose(options("--dtype", "fp32", "--compile"))[1] == Speed(compile="default")
        assert devices.choose(options("--device", "cpu")) == (torch.device("cpu"), Speed())
    assert capsys.readouterr().err.splitlines()[:2] == [
        "student on cuda (H200), dtype bf16",
        "student on cuda (H200), dtype fp32, compile default",
    ]
    with mock.patch("torch.cuda.is_available", return_value=False):
        assert devices.choose(options(), "") == (torch.device("cpu"), Speed())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "meta", "cpu:x"])
def test_a_device_that_cannot_be_used_is_one_line(device, tmp_path, capsys):
    with pytest.raises(UserError, match=rf"^device {device} cannot be used \([^\n]+\); try cpu$"):
        usable(device)
    assert main(["serve", "--student", str(tmp_path), "--port", "0", "--device", device]) == 2
    assert f"distill: device {device} cannot be used" in capsys.readouterr().err


def test_a_student_is_loaded_as_requested(tmp_path, capsys):
    save_student(tmp_path / "student", a_bundle(), "card")
    bundle = devices.load(tmp_path / "student", options("--device", "cpu", "--dtype", "bf16"))
    assert bundle.student.net.compute_dtype == torch.bfloat16
    (message,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("student on cpu ("))
    assert message.endswith("), dtype bf16")
