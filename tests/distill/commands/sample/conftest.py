"""A saved student and inputs; `distill sample` with a fake one, and with a real one that notes what it is given and when."""

from pathlib import Path

import pytest
import torch

from distill.commands.sample import command
from students.serving.session import Chunk, Session
from students.weights.checkpoint import save_student
from teachers import media
from tests.distill.commands.sample.fakes import NUM_SAMPLES, Clock, FakeBundle, FakeSpec, LoudSession, speech
from tests.support.tiny import a_bundle
from tests.teachers.media.test_media import ramp_picture, save_image


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    save_student(folder, a_bundle(), "a card")
    return folder


@pytest.fixture
def inputs(tmp_path, student) -> dict[str, Path]:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "out").mkdir()
    return {
        "student": student,
        "image": save_image(folder / "face.png", ramp_picture(90, 60), "png", "rgb24"),
        "audio": speech(folder / "speech.wav", NUM_SAMPLES),
        "out": tmp_path / "out" / "film.mp4",
    }


@pytest.fixture
def loud(monkeypatch):
    """`distill sample` with a fake student whose pictures show how loud it is; the function sets session and spec."""

    def use(session: type = LoudSession, spec: FakeSpec | None = None) -> None:
        monkeypatch.setattr("students.weights.checkpoint.load_student", lambda _: FakeBundle(spec or FakeSpec()))
        monkeypatch.setattr("students.serving.session.Session", session)
        monkeypatch.setattr("students.serving.optimize.prepare", lambda bundle, *_: bundle)

    return use


@pytest.fixture
def noted(monkeypatch):
    """`distill sample` with a clock of our own, and a real session and a film that note what goes in and out, and when."""

    class Noted(Session):
        clock = Clock()
        cost = staticmethod(lambda index: 1e-6)  # seconds of chunk number `index`
        pushed: list[tuple[float, int]]
        drawn: list[tuple[float, Chunk]]
        held: list[int]
        shown: list[torch.Tensor]  # what the film got
        sounds: list[torch.Tensor]

        def __init__(self, *given, **options):
            super().__init__(*given, **options)
            Noted.pushed, Noted.drawn, Noted.held = [], [], []

        def push(self, audio=None, pose=None, rate=16000, **film):
            super().push(audio, pose, rate, **film)
            if audio is None:
                return
            Noted.pushed.append((Noted.clock.now, len(audio)))
            Noted.held.append(self.inputs.audio.end - self.inputs.audio.start)

        def step(self):
            chunk = super().step()
            if isinstance(chunk, Chunk):
                Noted.clock.now += Noted.cost(chunk.index)
                Noted.drawn.append((Noted.clock.now, chunk))
            return chunk

    class Film(media.VideoWriter):
        def __init__(self, *given, **options):
            super().__init__(*given, **options)
            Noted.shown, Noted.sounds = [], []

        def write(self, frame):
            super().write(frame)
            Noted.shown.append(frame)

        def write_audio(self, samples):
            super().write_audio(samples)
            Noted.sounds.append(samples)

    monkeypatch.setattr("students.serving.session.Session", Noted)
    monkeypatch.setattr(media, "VideoWriter", Film)
    monkeypatch.setattr(command, "time", Noted.clock)
    return Noted
