"""A student's step as an ONNX graph: a stream of it by onnxruntime is the session's, and what would break that is seen."""

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from distill.cli import main
from students.export import onnx_step, onnx_stream
from students.history import History
from students.networks.causal_wan import CausalWan
from students.schedule import Schedule
from students.weights.checkpoint import load_student, save_student
from teachers.errors import UserError
from teachers.guidance import EmbeddedScales, GuidanceRange
from teachers.networks.wan import NetworkConfig
from tests.support.tiny import MIDAS, NETWORK, a_bundle, make_spec

CLOSE = 1e-5
ONE_BLOCK = NetworkConfig(**NETWORK | {"num_layers": 1}, audio_blocks=(0,), prediction="reference", guidance=2)
SCALES = EmbeddedScales(text=GuidanceRange(), audio=GuidanceRange(most=3.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student of one block and one sink, two chunks of window and one of memory, and two guidance scales, converted by the
    command."""
    place = tmp_path_factory.mktemp("onnx")
    history = History(sinks=1, window=2, memory=1, memory_every=2)
    save_student(place / "student", a_bundle(history, network=ONE_BLOCK, guidance=SCALES), "card")
    assert main(["convert", str(place / "student"), str(place / "out"), "--to", "onnx"]) == 0
    return place / "out"


@pytest.mark.slow
def test_the_folder_streams_without_torch(folder):
    assert {file.name for file in folder.iterdir()} == {"step.onnx", "stream.json", "stream.py", "parity.npz"}
    script = f"import sys, runpy; sys.path.insert(0, {str(folder)!r}); import stream; "
    script += "print(stream.parity(sys.path[0]), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    error, with_torch = done.stdout.split()
    assert (float(error) < CLOSE, with_torch) == (True, "False")


@pytest.mark.slow
def test_another_stream_of_a_session_is_equal(folder):
    """Seven chunks: the window has left the sink behind, and the memory has its chunk."""
    given = onnx_step.record(load_student(folder.parent / "student"), 7, seed=5)
    noise, latents = given.pop("noise"), given.pop("latents")
    stream = onnx_stream.OnnxStream(folder)
    for k, own in enumerate(noise):
        frames = slice(2 * k, 2 * k + 2)
        got = stream.next(own, **given | {"audio": given["audio"][:, frames]})
        assert np.abs(got - latents[:, :, frames]).max() < CLOSE
    assert [number for number, _ in stream.past] == [0, 4, 5, 6]
    assert np.abs(latents[:, :, 2:]).max() > 0.1


def shifted_cache(given):
    return given | {"past_keys": np.roll(given["past_keys"], 1, axis=3)}  # by one token


def swapped_chunks(given):
    return given | {"past_positions": given["past_positions"][::-1].copy()}


def no_portrait(given):
    return given | {"known": np.zeros_like(given["known"])}


def late_sound(given):
    return given | {"audio": given["audio"][:, ::-1].copy()}


@pytest.mark.slow
@pytest.mark.parametrize("fault", [shifted_cache, swapped_chunks, no_portrait, late_sound])
def test_parity_sees_faults(folder, monkeypatch, fault):
    session = onnx_stream.onnxruntime.InferenceSession

    class Faulty(session):
        def run(self, names, given):
            return super().run(names, fault(given))

    monkeypatch.setattr(onnx_stream.onnxruntime, "InferenceSession", Faulty)
    assert onnx_stream.parity(folder) > 10 * onnx_step.TOLERANCE


def test_a_graph_that_differs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_step, "export_step", lambda *_: None)
    monkeypatch.setattr(onnx_stream, "parity", lambda _: 0.5)
    with pytest.raises(UserError, match=r"differ from the student's by 0\.5"):
        onnx_step.write_onnx(tmp_path, a_bundle())


def test_other_students_and_options_are_refused(tmp_path, capsys):
    for changes, message in (
        ({"history": History(sinks=1, window=2), "schedule": Schedule(depth=3)}, "schedule.depth 1"),
        ({"history": History(refine_every=2)}, "no history.refine_every"),
        ({"history": History(sinks=0, window=(1, 2))}, "one history.window"),
        ({"network": MIDAS}, "a network of the kind wan"),
    ):
        with pytest.raises(UserError, match=message):
            onnx_step.check_exportable(make_spec(**changes))
    assert main(["convert", str(tmp_path), str(tmp_path / "out"), "--to", "onnx", "--widen"]) == 2
    assert "--widen has no effect with --to onnx" in capsys.readouterr().err
    assert main(["convert", str(tmp_path), str(tmp_path / "out"), "--to", "onnx"]) == 2
    assert "no student" in capsys.readouterr().err


def test_the_real_rotation_is_the_complex_one():
    student = a_bundle().student
    assert isinstance(student, CausalWan)
    import torch

    from teachers.networks.spans import rotate

    x = torch.randn(2, 1, 12, 2, 16)
    complex_table = student.net.rope_table(3, 3, 2, 2)
    table = onnx_step.Step(student)._table(torch.arange(3, 6))
    assert (rotate(x, table) - rotate(x, complex_table)).abs().max() < 1e-6
