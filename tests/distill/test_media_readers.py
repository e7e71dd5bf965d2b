"""sample, prepare, eval, curate and serve read sound and films by the same code, so that `tests/teachers/media` speaks for all."""

import argparse
from collections.abc import Callable

import pytest

from distill.commands.sample import command
from distill.data.curate.candidates import Candidate, opened
from distill.data.datasets.folder import Videos
from distill.data.datasets.manifest import Clip
from distill.data.prepare.cutting import CutConfig, cut
from distill.live import uploads
from distill.scoring.clip_io import read_clip
from distill.scoring.clip_sets import open_set
from eval.cards import load_card
from teachers import media
from teachers.errors import UserError
from tests.support.media.sounds import tone, write_sound
from tests.teachers.media.test_media import ramp_picture, save_image


@pytest.fixture
def commands(tmp_path) -> dict[str, Callable]:
    """Name -> how a command reads the film a.mp4."""
    folder = tmp_path / "set"
    folder.mkdir()
    path = write_sound(folder / "a.mp4", "aac", 16_000, tone(1.2, 16_000)[:, None], video=30)
    image = save_image(tmp_path / "face.png", ramp_picture(32, 32), "png", "rgb24")
    clip = Clip(id="a", dataset="folder", source="a.mp4")

    def sample():
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        words = ["--student", tmp_path, "--image", image, "--audio", path, "--text", "x", "--out", tmp_path / "out.mp4"]
        return command.run(parser.parse_args([str(word) for word in words]))

    def scored():
        found = read_clip(open_set(folder)["a"], load_card("strict"), generated=False)
        if found.no_sound:
            raise UserError(found.no_sound)

    return {
        "sample": sample,
        "prepare": lambda: cut(clip, path, CutConfig(), tmp_path / "piece.mp4"),
        "crop row": lambda: Videos(folder).size("a.mp4"),
        "eval": scored,
        "curate": lambda: list(opened(Candidate(clip=clip, path=path, sample=None, fingerprint="")).frames),
        "serve": lambda: uploads.decode_file(path.read_bytes()),
        "Python": lambda: media.read_video(path),
    }


@pytest.mark.parametrize(
    ("part", "users"),
    [
        ("teachers.media.sound._Track.__init__", ("sample", "prepare", "eval", "curate", "serve")),
        ("teachers.media.film._check_frame", ("prepare", "crop row", "eval", "curate", "Python")),
    ],
)
def test_there_is_one_reader(commands, monkeypatch, part, users):
    def refuse(*_) -> None:
        raise UserError("the one reader")

    monkeypatch.setattr(part, refuse)
    for name in users:
        with pytest.raises(UserError, match="the one reader"):
            commands[name]()
