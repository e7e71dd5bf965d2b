import argparse
import io
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from distill.data.datasets import folder
from distill.data.prepare import check as checking
from distill.data.prepare import page, shards
from distill.data.prepare.check import INCOMPLETE
from distill.data.prepare.cutting import CutConfig
from distill.data.prepare.prepare import prepare
from teachers.errors import UserError
from tests.support.media import talking
from tests.support.media.films import counting_film, frames_of, number_of, write_film


@pytest.fixture
def data(tmp_path):
    """A counting film, a talking one without sound, and one whose name wants to be a tag of the page."""
    videos = tmp_path / "videos"
    videos.mkdir()
    counting_film(videos / "a.mov", 1.2, 25)
    write_film(videos / "b.mov", talking.film(talking.speech(1.2)), talking.FPS)
    counting_film(videos / "c.mov", 0.8, 30)
    config = CutConfig(fps=Fraction(16), size=(48, 40), min_seconds=0.5, silent=True, cuts="keep")
    prepare(folder.read(None, videos), videos, tmp_path / "<b>data</b>", "folder", config, shard_clips=2)
    return tmp_path / "<b>data</b>"


def page_of(data, path, *more) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    checking.add_arguments(parser)
    status = checking.run(parser.parse_args([str(data), "--workers", "0", "--html", str(path), *more]))
    return status, path.read_text()


def test_the_page_shows_counts_histograms_and_a_picture_of_every_clip(data, tmp_path):
    status, text = page_of(data, tmp_path / "page.html")
    assert status == 0
    assert "Complete: nothing is missing" in text
    assert text.count("data:image/jpeg;base64") == 3
    assert "<td>40x48" not in text
    for words in (
        '<td>48x40</td><td class="number">3</td>',
        "silent",
        "dBFS",
        "frames a second of the sources",
        "<td>25</td>",
    ):
        assert words in text
    assert text.count("<svg") == 2
    assert "<b>data</b>" not in text
    assert "&lt;b&gt;data&lt;/b&gt;" in text
    assert not any(word in text for word in ("<script", "http:", "https:", "url(", "<link"))


def test_the_page_lists_what_is_wrong(data, tmp_path):
    path = data / "folder-000001.tar"
    path.write_bytes(path.read_bytes()[:4000])
    status, text = page_of(data, tmp_path / "page.html")
    assert status == INCOMPLETE
    assert "folder-000001.tar: differs from its checksum" in text
    assert "Whole" not in text
    assert text.count("data:image/jpeg;base64") == 2


def test_without_decoding_there_are_no_pictures(data, tmp_path):
    status, text = page_of(data, tmp_path / "page.html", "--quick")
    assert status == 0
    assert "data:image" not in text.partition("<body>")[2]
    assert "nothing was decoded" in text


def test_the_picture_is_the_middle_frame(data):
    films = {name: content["mp4"] for name, content in shards.samples(data / "folder-000000.tar")}
    checked = checking.check(data, thumbnails=True)
    picture = np.array(Image.open(io.BytesIO(checked.samples[0]["thumbnail"])))
    assert number_of(picture) == number_of(frames_of(films["a"])[9])


def test_a_place_that_cannot_be_written_is_said(data, tmp_path):
    with pytest.raises(UserError, match="file cannot be written"):
        page_of(data, tmp_path / "no/page.html")


def test_histograms_and_thumbnails():
    drawn = str(page.histogram([0.0, 0.0, 1.0, float("nan")], (0.5, None)))
    assert "<title>2 from 0<" in drawn
    assert 'x1="120.0"' in drawn
    assert drawn.count("<line") == 1
    assert str(page.histogram([])) == ""
    assert page.histogram([3.0], unit="<i>").count("<i>") == 0
    data = page.thumbnail(torch.zeros(400, 200, 3, dtype=torch.uint8), (0.25, 0.25, 0.5, 0.5))
    picture = Image.open(io.BytesIO(data))
    assert picture.size == (72, 144)
    assert picture.getpixel((18, 72))[0] > 100 > picture.getpixel((5, 72))[0]
    assert page.spaced(range(10), 5) == [0, 2, 4, 6, 8]
