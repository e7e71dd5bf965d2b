"""The one crop rule: around the face where one is found, whole; else the top. In pictures, clips and every command."""

import argparse
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from distill.commands.sample.inputs import portrait
from distill.commands.serving import read_portraits
from distill.data.datasets.manifest import Clip
from distill.data.prepare.cutting import CutConfig, cut
from distill.live.uploads import decode_picture
from students.serving.pipeline import AvatarPipeline
from teachers import media
from teachers.media import face
from teachers.media.crop import CHIN, EAR, HAIR, Box, place
from tests.support.media import talking
from tests.support.media.films import write_film
from tests.support.tiny import a_bundle
from tests.teachers.media.test_picture import file_of

TALL, DOWN = 480, 250  # a frame of 160 x 480 whose face is far below the top and outside the centre


def tall(frames: list[np.ndarray]) -> list[np.ndarray]:
    """Each frame [192, 160] in a wall of [480, 160], its face around row 330."""
    wall = np.full((TALL, talking.WIDTH, 3), 120, np.uint8)
    shown = []
    for frame in frames:
        whole = wall.copy()
        whole[DOWN : DOWN + talking.HEIGHT] = frame
        shown.append(whole)
    return shown


@pytest.fixture(scope="module")
def frames():
    return tall(talking.film(talking.speech(2.0)))


def share_of_face(part: tuple[int, int, int, int]) -> float:
    left, top, right, bottom = talking.FACE
    box = Box(left / 160, (top + DOWN) / TALL, (right - left) / 160, (bottom - top) / TALL, 1.0)
    return 1 - box.inside((160, TALL), part).cut


SOURCES = [(400, 720), (1080, 1920), (720, 400), (333, 333), (64, 640)]
SIZES = [(512, 512), (480, 832), (832, 480), (32, 32)]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("size", SIZES)
def test_a_crop_lies_within_has_the_shape_and_keeps_the_head(source, size):
    rng = np.random.default_rng(3)
    for _ in range(20):
        side = rng.uniform(0.05, 0.4) * min(source)
        x, y = rng.uniform(0, source[0] - side), rng.uniform(0, source[1] - side)
        box = Box(x / source[0], y / source[1], side / source[0], side / source[1], 1.0)
        for crop in ("face", "top", "center"):
            left, top, width, height = place(source, size, crop, box)
            assert min(left, top) >= 0
            assert left + width <= source[0]
            assert top + height <= source[1]
            assert (width, height) == place(source, size, "top")[2:]
            assert abs(width * size[0] - height * size[1]) <= max(size)
        left, top, width, height = place(source, size, "face", box)
        if side <= min(width, height) - 1:
            assert box.inside(source, (left, top, width, height)).cut < 0.02
        if side * (1 + HAIR + CHIN) <= height - 1:
            assert top <= max(0, y - HAIR * side) + 1
        if side * (1 + 2 * EAR) <= width - 1:
            assert left <= max(0, x - EAR * side) + 1
    assert place(source, size, "face", None) == place(source, size, "top")


def test_the_detector_finds_the_drawn_face_and_none_elsewhere(frames):
    assert face.detector().startswith("opencv 4")
    (found,) = face.find_faces(torch.from_numpy(frames[0]))
    left, top, right, bottom = talking.FACE
    assert found.x + found.width / 2 == pytest.approx((left + right) / 2 / 160, abs=0.05)
    assert found.y + found.height / 2 == pytest.approx(((top + bottom) / 2 + DOWN) / TALL, abs=0.03)
    assert 0.7 < found.height * TALL / (bottom - top) < 1.4
    rng = np.random.default_rng(0)
    for none in (rng.integers(0, 255, (200, 200, 3)), np.full((99, 80, 3), 255), frames[0][:DOWN], np.zeros((1, 9, 3))):
        assert face.find_faces(torch.from_numpy(none.astype(np.uint8))) == []


def test_without_the_detector_a_clip_is_searched_by_the_template_and_a_still_is_not(frames, monkeypatch):
    monkeypatch.setattr(face, "_cascade", lambda: None)
    some = torch.from_numpy(np.stack(frames[::5]))
    motion = torch.from_numpy(np.stack(frames)).float().diff(dim=0).abs().mean((0, 3))
    found = face.find_in_clip(some, motion)
    assert found is not None
    assert share_of_face(place((160, TALL), (64, 64), "face", found)) == 1
    assert face.find_in_clip(some) is None
    assert "pip install 'avatar-distill[face]'" in media.fit_portrait(some[0], (64, 64))[1]


@pytest.mark.parametrize(("crop", "least", "most"), [("face", 1.0, 1.0), ("top", 0.0, 0.0), ("center", 0.2, 0.8)])
def test_every_command_crops_by_the_same_rule(frames, tmp_path, crop, least, most):
    """sample, pipeline and serve cut a picture alike; prepare the film of it, and notes how much of the face is lost."""
    image, size = tmp_path / "a.png", (64, 64)
    image.write_bytes(data := file_of(Image.fromarray(frames[0]), "png"))
    box = face.find_faces(torch.from_numpy(frames[0]))[0]
    part = place((160, TALL), size, crop, box)
    assert least <= share_of_face(part) <= most
    bundle = a_bundle()
    spec = argparse.Namespace(height=64, width=64)
    pipe = AvatarPipeline(bundle.student, bundle.codec, bundle.audio_encoder, bundle.text)
    wanted = media.fit_image(torch.from_numpy(frames[0]), size, crop, box)
    asked = argparse.Namespace(crop=crop, image=image)
    assert torch.equal(portrait(media.decode_image(image), spec, asked), wanted)
    assert torch.equal(decode_picture(data, size, crop)[0], wanted)
    assert torch.equal(read_portraits([tmp_path], size, crop)[0], wanted)
    small = pipe.reference_of(image, crop)
    assert torch.equal(small, media.fit_image(torch.from_numpy(frames[0]), (16, 16), crop, box))
    film = write_film(tmp_path / "a.mov", frames, Fraction(25))
    config = CutConfig(fps=Fraction(25), size=size, crop=crop, silent=True)
    piece = cut(Clip(id="a", dataset="test", source="a.mov"), film, config, tmp_path / "out.mp4")
    assert piece.metadata["crop"][1] == pytest.approx(part[1], abs=12)
    assert piece.metadata["face_cut"] == pytest.approx(1 - share_of_face(tuple(piece.metadata["crop"])), abs=0.2)
    assert (piece.metadata["face_cut"] < 0.02) == (crop == "face")
