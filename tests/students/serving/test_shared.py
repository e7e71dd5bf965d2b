"""Two ranks that share a stream draw what one process draws: sessions side by side, refused input, texts, interrupts; the commands.

`worker` is one rank; the scene of its folder says what it does.
"""

import argparse
import gc
import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.cli import main
from distill.commands import devices
from distill.training.engines.engine import Engine, EngineConfig
from students.history import History
from students.serving.session import Chunk, Session
from students.serving.shared import Shared, follow
from students.serving.snapshot import save_session
from students.weights.checkpoint import Bundle, save_student
from teachers import media
from teachers.errors import UserError
from teachers.files import load_tensors, save_tensors
from teachers.guidance import EmbeddedScales, GuidanceRange
from teachers.networks.wan import NetworkConfig
from tests.support.media.sounds import write_sound
from tests.support.processes import run_ranks
from tests.support.tiny import NETWORK, a_bundle, a_portrait, some_sound
from tests.teachers.media.test_media import save_image

EMBEDDED = {
    "network": NetworkConfig(**NETWORK, audio_blocks=(1,), prediction="reference", guidance=2),
    "guidance": EmbeddedScales(text=GuidanceRange(), audio=GuidanceRange()),
}
HISTORIES = {"clean": History(sinks=1, window=1), "same_level": History(sinks=1, window=1, commit="same_level")}


def scene(bundle: Bundle) -> dict[str, Tensor]:
    """Latents and frames of two streams that are drawn in turns, with all that a session can be asked."""
    sound, found = some_sound(40_000), {}
    one = Session(bundle, a_portrait(), "a person nods", 1, lead=8)
    with suppress(UserError):
        Session(bundle, a_portrait(), "a person nods", seed=-1)
    other = Session(bundle, a_portrait(1), "someone smiles", 2, lead=2, idle="live")

    def step(session: Session) -> None:
        if isinstance(chunk := session.step(), Chunk):
            number = len(found)
            found[f"{session.seed} {number:02} frames"] = chunk.frames.float()
            found[f"{session.seed} {number:02} x0"] = session.point.seen[-1].x0

    one.push(audio=sound[:9_000])
    other.push(audio=sound[:7_000], rate=12_000)
    for _ in range(2):
        step(one)
        step(other)
    with suppress(UserError):
        one.push(audio=torch.full((3, 3, 3), 2.0))
    one.push(audio=sound[9_000:])
    if bundle.spec.guidance is not None:
        one.guide({"audio": 2.0})
    one.set("someone smiles", how="recache" if bundle.spec.history.commit == "clean" else "keep")
    other.played(other.point.frame)
    for _ in range(3):
        step(one)
        step(other)
    one.played(one.points[-3].frame)
    one.interrupt()
    one.push(audio=sound[20_000:])
    step(one)
    one.close()
    del other
    gc.collect()
    for _ in range(4):
        step(one)
    return {name: x.clone() for name, x in found.items()}


def port_of(file: Path) -> str:
    """A free port that rank 0 has chosen: at the one of the command before, its store may still be up."""
    if os.environ["RANK"] == "0":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            file.with_suffix(".new").write_text(str(free.getsockname()[1]))
        file.with_suffix(".new").rename(file)
    until = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    return file.read_text()


def worker(folder: Path) -> None:
    words = json.loads((folder / "scene").read_text())
    if words:
        for number, command in enumerate(words):
            os.environ["MASTER_PORT"] = port_of(folder / f"port-{number}")
            with suppress(SystemExit):
                assert main(command) == 0
            devices.leave()  # as at exit, which multiprocessing leaves out
        return
    engine = Engine(EngineConfig(precision="fp32", sequence_parallel=2))
    for name, history in HISTORIES.items():
        bundle = a_bundle(history, seed=4, **EMBEDDED)
        engine.split(bundle.student)
        bundle = replace(bundle, shared=Shared(engine.sequence))
        if engine.is_main:
            save_tensors(folder / f"{name}.safetensors", scene(bundle))
            with pytest.raises(UserError, match=r"^session not saved: several ranks share it"):
                save_session(Session(bundle, a_portrait(), ""), folder / "session")
            bundle.shared.end()
        else:
            follow(bundle)
    engine.close()


def launch(folder: Path, *commands: list[str]) -> None:
    (folder / "scene").write_text(json.dumps(commands))
    run_ranks(__file__, folder, 2, timeout=120)


def test_a_stream_of_two_ranks_is_that_of_one_process(tmp_path):
    launch(tmp_path)
    for name, history in HISTORIES.items():
        found, expected = load_tensors(tmp_path / f"{name}.safetensors"), scene(a_bundle(history, seed=4, **EMBEDDED))
        assert list(found) == sorted(expected)
        assert len(expected) > 20
        for key, x in expected.items():
            if key.endswith("x0"):
                assert (found[key] - x).norm() < 1e-5 * x.norm(), key
            else:
                assert (found[key] - x).abs().max() <= 1, key


@pytest.mark.slow
def test_commands_share_a_stream(tmp_path):
    student = tmp_path / "student"
    save_student(student, a_bundle(HISTORIES["clean"]), "A card.\n")
    save_image(tmp_path / "face.png", np.full((20, 20, 3), 90, np.uint8), "png", "rgb24")
    write_sound(tmp_path / "speech.wav", "pcm_s16le", 16_000, some_sound(20_000)[:, None].numpy())
    words = ["sample", "--student", student, "--image", tmp_path / "face.png", "--audio", tmp_path / "speech.wav"]
    words = [*map(str, words), "--text", "a person nods", "--seed", "3", "--out"]
    bench = ["bench", "--student", str(student), "--chunks", "3", "--rounds", "1", "--json"]
    launch(tmp_path, [*words, str(tmp_path / "two.mp4")], [*bench, str(tmp_path / "two.json")])
    assert main([*words, str(tmp_path / "one.mp4")]) == 0
    one, two = (media.read_video(tmp_path / f"{name}.mp4")[0] for name in ("one", "two"))
    assert one.shape == two.shape
    assert (one.float() - two.float()).abs().mean() < 0.1
    assert json.loads((tmp_path / "two.json").read_text())["ranks"] == 2
    logs = [(tmp_path / f"{rank}.log").read_text() for rank in range(2)]
    assert logs[0].count("16 frames") == 1
    assert "frames" not in logs[1]


@pytest.mark.parametrize(
    ("option", "message"),
    [(["--device", "cpu"], r"^--device: 2 processes share"), (["--compile"], r"^--compile: 2 proc")],
)
def test_options_that_cannot_be_shared_are_one_line(monkeypatch, option, message):

    monkeypatch.setenv("WORLD_SIZE", "2")
    parser = argparse.ArgumentParser()
    devices.add_arguments(parser)
    with pytest.raises(UserError, match=message):
        devices.share(parser.parse_args(option))
