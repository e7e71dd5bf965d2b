"""`distill sample --film`: frames of the film by time, the region on the mouth, every other pixel the film's."""

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distill.commands.sample import command
from distill.commands.sample.film import Film, read_region
from teachers.errors import UserError
from teachers.media import face
from tests.distill.commands.sample.fakes import film, parse
from tests.support.media import talking
from tests.support.media.films import HEIGHT, WIDTH, counting_film, frames_of, number_of, write_film

LOWER = "0,0.5,1,1"


def spec(fps: Fraction, height: int = 48, width: int = 64) -> SimpleNamespace:
    return SimpleNamespace(fps=fps, height=height, width=width)


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    return counting_film(tmp_path_factory.mktemp("film") / "counting.mp4", seconds=2.0)


@pytest.mark.parametrize(
    ("fps", "shown"),
    [
        (Fraction(25), list(range(50))),
        (Fraction(25, 2), list(range(0, 50, 2))),
        (Fraction(16), [n * 25 // 16 for n in range(32)]),
        (Fraction(30), [n * 25 // 30 for n in range(60)]),
    ],
)
def test_a_frame_is_what_the_film_shows_at_its_time(counting, fps, shown):
    own = Film(counting, spec(fps), "top", read_region(LOWER))
    parts = [own.until(stop)[0] for stop in (1, 7, 7, len(shown), len(shown) + 3)]
    numbers = [number_of(frame.numpy()) for part in parts for frame in part]
    assert numbers == [*shown, *3 * [shown[-1]]]
    assert own.ended == len(shown)


def test_frames_by_their_own_times(tmp_path):
    """A film of a varying rate: each picture stays until the next one's time."""
    pictures = [np.full((48, 64, 3), level, np.uint8) for level in (40, 80, 120, 160)]
    path = write_film(tmp_path / "f.mp4", pictures, [0, Fraction(1, 10), Fraction(1, 2), Fraction(6, 10)])
    frames, _ = Film(path, spec(Fraction(10)), "top", read_region(LOWER)).until(7)
    assert [round(float(frame.float().mean()) / 40) for frame in frames] == [1, 2, 2, 2, 2, 3, 4]


def test_the_region_is_on_the_mouth_and_follows_it(tmp_path):
    """The drawn head sways by two pixels, and in a second film stands far to the right."""
    for across in (0, 30):
        frames = talking.film(talking.speech(1.0), across=across)
        path = write_film(tmp_path / f"{across}.mp4", frames, talking.FPS)
        own = Film(path, spec(talking.FPS, talking.HEIGHT, talking.WIDTH), "face", None)
        shown, boxes = own.until(25)
        assert shown.shape == (25, talking.HEIGHT, talking.WIDTH, 3)
        left, top, right, bottom = (boxes * torch.tensor([160.0, 192.0, 160.0, 192.0])).unbind(1)
        assert (left < 66 + across).all()
        assert (right > 94 + across).all()
        assert (top < 93).all()
        assert (bottom > 114).all()
        assert (top > 76).all(), "the eyes are the film's"
        assert (right - left < 70).all()


def test_what_is_drawn_goes_back_where_it_came_from(tmp_path):
    """A film drawn as it is, at a size that loses nothing, comes back as it was; and nothing is held that was pasted."""
    frames = talking.film(talking.speech(0.4))
    wide = [np.pad(frame, ((0, 0), (200, 40), (0, 0)), constant_values=90) for frame in frames]
    path = write_film(tmp_path / "wide.mp4", wide, talking.FPS)
    own = Film(path, spec(talking.FPS, 192, 160), "face", None)
    shown, _ = own.until(6)
    whole = torch.from_numpy(frames_of(path))[:6]
    assert torch.equal(torch.cat([own.paste(shown[:2]), own.paste(shown[2:])]), whole)
    assert not own._held
    own.until(8)
    black = own.paste(torch.zeros_like(shown[:2]))
    changed = (black != torch.from_numpy(frames_of(path))[6:8]).any(dim=-1).nonzero()
    top, left = changed[:, 1].min(), changed[:, 2].min()
    bottom, right = changed[:, 1].max(), changed[:, 2].max()
    inside = {"top": top > 76, "bottom": bottom < 140, "left": left > 200 + 50, "right": right < 200 + 110}
    assert all(inside.values()), (inside, top, bottom, left, right)
    assert (black[:, 97:110, 200 + 74 : 200 + 86] < 12).all(), "the mouth is what was drawn"


def test_the_crop_of_the_first_frame_is_everyones(tmp_path):
    frames = talking.film(talking.speech(0.4))
    wide = [np.pad(frame, ((0, 0), (200, 40), (0, 0)), constant_values=90) for frame in frames]
    path = write_film(tmp_path / "wide.mp4", wide, talking.FPS)
    own = Film(path, spec(talking.FPS, 96, 80), "face", None)
    shown, boxes = own.until(10)
    middle = (boxes[:, 0] + boxes[:, 2]) / 2
    assert ((middle > 0.4) & (middle < 0.6)).all(), "the face, far right in the film, is in the middle of the crop"
    assert torch.equal(((own.first + 1) * 127.5).round().byte().permute(1, 2, 0), shown[-1])


@pytest.fixture
def given(inputs, counting):
    return {name: path for name, path in inputs.items() if name != "image"} | {"film": counting}


def test_sample_keeps_the_film_but_for_the_region(given, noted, capsys):
    film(given, "--region", LOWER)
    frames = torch.stack([torch.as_tensor(frame) for frame in noted.shown])
    assert frames.shape == (25, HEIGHT, WIDTH, 3)
    shown = torch.from_numpy(frames_of(given["film"]))[::2]
    edge = (WIDTH - HEIGHT) // 2  # the student draws squares
    assert torch.equal(frames[:, : HEIGHT // 2], shown[:, : HEIGHT // 2])
    assert torch.equal(frames[:, :, :edge], shown[:, :, :edge])
    assert torch.equal(frames[:, :, -edge:], shown[:, :, -edge:])
    assert (frames[:, HEIGHT // 2 + 8 :, edge:-edge] != shown[:, HEIGHT // 2 + 8 :, edge:-edge]).float().mean() > 0.5
    assert "held" not in capsys.readouterr().err
    pieces = [frames]
    film(given, "--region", LOWER, "--push-ms", "37")
    pieces.append(torch.stack([torch.as_tensor(frame) for frame in noted.shown]))
    assert torch.equal(*pieces)


def test_a_film_shorter_than_the_sound_is_held_and_said(given, noted, tmp_path, capsys):
    short = given | {"film": counting_film(tmp_path / "short.mp4", seconds=1.2)}
    film(short, "--region", LOWER)
    assert "its last frame is held for 10 frames" in capsys.readouterr().err
    frames = [torch.as_tensor(frame)[: HEIGHT // 2] for frame in noted.shown]
    assert all(torch.equal(frame, frames[14]) for frame in frames[15:])
    assert not torch.equal(frames[13], frames[14])


def test_mistakes_are_one_line(given, tmp_path, monkeypatch):
    for wrong in ("1,2,3", "a,b,c,d", "0.5,0,0.4,1", "nan,0,1,1"):
        with pytest.raises(UserError, match=r"--region: .*left,top,right,bottom"):
            command.run(parse(given, "--region", wrong))
    with pytest.raises(UserError, match=r"has no face in its first frame: .*--region"):
        command.run(parse(given))
    monkeypatch.setattr(face, "_cascade", lambda: None)
    with pytest.raises(UserError, match="needs a face detector"):
        command.run(parse(given))
    without = {name: path for name, path in given.items() if name != "film"}
    with pytest.raises(UserError, match="--image is missing"):
        command.run(parse(without))
    with pytest.raises(UserError, match="--region is of a film"):
        command.run(parse(without, "--region", LOWER))
    with pytest.raises(UserError, match="would replace"):
        command.run(parse(given | {"out": given["film"]}, "--region", LOWER))
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(given["film"].read_bytes()[:3000])
    with pytest.raises(UserError, match=r"broken\.mp4"):
        command.run(parse(given | {"film": broken}, "--region", LOWER))
    assert not given["out"].exists()


def test_a_film_whose_frames_change_leaves_nothing(given, noted, tmp_path):
    pictures = [np.full((48, 64, 3), 90, np.uint8)] * 3
    path = write_film(tmp_path / "f.mp4", pictures, Fraction(25))
    own = Film(path, spec(Fraction(25)), "top", read_region(LOWER))
    own._shape = torch.Size((50, 64, 3))
    with pytest.raises(UserError, match="frames change their size"):
        own.until(3)
