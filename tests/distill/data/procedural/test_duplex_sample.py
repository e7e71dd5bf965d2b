"""`distill sample` of a student with two voices and directions."""

import wave
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from distill.cli import main
from distill.commands.sample.inputs import Duet
from distill.data.procedural import duplex
from distill.data.recorded import FolderConfig
from students.serving.session import Session
from students.weights.checkpoint import load_student, save_student
from teachers import media
from tests.distill.data.procedural.test_duplex import DATA, WORLD, film, one_line
from tests.support.media.sounds import decoded
from tests.support.tiny import (
    a_bundle,
    some_sound,
)
from tests.teachers.media.test_media import ramp_picture, save_image

# ---- distill sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student of two speakers, one of one, a portrait, two sounds of another rate and length, and directions."""
    place = tmp_path_factory.mktemp("sample")
    save_student(place / "duplex", a_bundle(speakers=2, pose_dim=duplex.POSE_DIM), "card")
    save_student(place / "single", a_bundle(), "card")
    save_student(place / "keys", a_bundle(pose_dim=duplex.POSE_DIM), "card")
    (place / "seven.csv").write_text("0 1 1\n" * 6 + "1 0 1\n")
    save_image(place / "face.png", ramp_picture(20, 20), "png", "rgb24")
    for name, rate, seconds, seed in (("own", 24000, 1.0, 1), ("other", 16000, 1.5, 2)):
        write_wav(place / f"{name}.wav", some_sound(int(rate * seconds), seed), rate)
    (place / "turn.csv").write_text("# right, down, steered\n" + "0, 0, 1\n" * 5 + "\n-1 0.5 1\n")
    return place


def write_wav(path, samples, rate):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).short().numpy().tobytes())


def sampled(folder, out, *words, student="duplex"):
    given = ["--student", folder / student, "--image", folder / "face.png", "--audio", folder / "own.wav"]
    code = main(
        ["sample", *map(str, given), "--text", "a person nods", "--out", str(out), "--size", "16", *map(str, words)]
    )
    return code, media.read_video(out)[0] if out.exists() else None


def test_a_film_of_two_voices_and_directions(folder, tmp_path, monkeypatch):
    """To the bit the session's own frames, as long as the longer sound; the last direction holds; both are heard in the film."""
    shown, frames = [], media.VideoWriter.write
    monkeypatch.setattr(media.VideoWriter, "write", lambda self, frame: (shown.append(frame), frames(self, frame)))
    both = ["--other", folder / "other.wav", "--pose", folder / "turn.csv"]
    assert sampled(folder, tmp_path / "a.mp4", *both, "--push-ms", "70")[0] == 0
    bundle, own = load_student(folder / "duplex"), decoded(folder / "own.wav")[0]
    other = torch.cat(
        [duet[:, 1] for duet in Duet(*(media.AudioReader(folder / f"{name}.wav") for name in ("own", "other")))]
    )
    assert len(other) == 36000
    session = Session(bundle, media.fit_image(media.decode_image(folder / "face.png"), (16, 16)), "a person nods")
    pose = torch.tensor([[0.0, 0.0, 1.0]] * 5 + [[-1.0, 0.5, 1.0]] * 25)
    session.push(audio=torch.nn.functional.pad(own, (0, 12000)), other=other, pose=pose, rate=24000)
    session.close()
    assert len(shown) == 19
    assert torch.equal(torch.stack(shown), film(session.frames())[:19])
    assert decoded(tmp_path / "a.mp4")[0][25000:].abs().max() > 0.05, "the other speaks on alone"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0 0 1\n0 0\n", r"line 2 has '0 0', a frame has 3 numbers from -1 to 1"),
        ("0 2 1\n", r"line 1 has '0 2 1', a frame has 3 numbers"),
        ("0 nan 1\n", "line 1 has '0 nan 1'"),
        ("0 left 1\n", "line 1 has a word that is no number"),
        ("# nothing\n", "no line with numbers"),
        (None, "no file of directions"),
    ],
)
def test_directions_that_are_none(folder, tmp_path, capsys, text, words):
    path = tmp_path / "pose.txt"
    if text is not None:
        path.write_text(text)
    code, film = sampled(folder, tmp_path / "a.mp4", "--pose", path)
    message = capsys.readouterr().err.strip().splitlines()
    assert (code, film) == (2, None)
    assert words in message[-1]


def test_keys_alone_make_a_silent_film_as_long_as_they_are(folder, tmp_path):
    """The frames are those of silence of that length."""
    given = ["sample", "--student", folder / "keys", "--image", folder / "face.png", "--text", "maze", "--size", "16"]
    silent, said = tmp_path / "a.mp4", tmp_path / "b.mp4"
    write_wav(tmp_path / "silence.wav", torch.zeros(7 * 1280), 16000)
    alone = ["--pose", folder / "seven.csv"]
    assert main([str(word) for word in [*given, *alone, "--out", silent]]) == 0
    assert main([str(word) for word in [*given, *alone, "--audio", tmp_path / "silence.wav", "--out", said]]) == 0
    frames = media.read_video(silent)[0]
    assert len(frames) == 7
    assert torch.equal(frames, media.read_video(said)[0])


@pytest.mark.parametrize("words", [(), ("--pose", "seven.csv", "--other", "other.wav")])
def test_without_sound_it_says_what_is_missing(folder, tmp_path, capsys, words):
    given = [
        "sample",
        "--student",
        folder / "keys",
        "--image",
        folder / "face.png",
        "--text",
        "a",
        "--out",
        tmp_path / "a.mp4",
    ]
    assert main([*map(str, given), *(str(folder / word) if "." in word else word for word in words)]) == 2
    assert "--audio is missing" in capsys.readouterr().err


def test_what_a_plain_student_cannot_hear_or_follow(folder, tmp_path, capsys):
    for name, file, words in (
        ("--other", "other.wav", "--other: this student takes one speaker"),
        ("--pose", "turn.csv", "--pose: this student takes none"),
    ):
        assert sampled(folder, tmp_path / "a.mp4", name, folder / file, student="single") == (2, None)
        assert words in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_folder_of_films_has_one_voice():
    given = {f.name: getattr(DATA, f.name) for f in fields(DATA)}
    for change in ({"speakers": 2}, {"steered": True}):
        world_ = replace(WORLD, **({"speakers": 1, "steered": False} | change))
        one_line(r"^data\.world: speakers and steered", FolderConfig, **(given | {"world": world_}), path=Path("x"))
