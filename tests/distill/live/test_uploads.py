"""Files that pages send: what is read, what is refused, and what ends a decoder's process alone."""

import io
import os
import time
import wave
import zipfile
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from distill.live import uploads
from distill.live.apart import Decoders
from teachers.errors import UserError


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(file, "PNG")
    return file.getvalue()


def wav(seconds: float, rate: int = 8000) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(np.full(round(seconds * rate), 8000, "<i2").tobytes())
    return file.getvalue()


@settings(max_examples=100, deadline=None)
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"RIFF", b"fLaC", b"OggS", b"ID3", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"]),
)
def test_no_file_raises_anything_else(data, mark):
    for read in (
        uploads.decode_file,
        lambda x: uploads.decode_picture(x, (16, 16)),
    ):
        with suppress(UserError):
            read(mark + data)


def test_pictures_are_fitted_and_their_size_is_checked_before_a_pixel_is_read():
    picture, note = uploads.decode_picture(png(40, 80), (16, 16))
    assert "the top of the picture is kept" in note
    assert picture.shape == (3, 16, 16)
    assert torch.allclose(picture[0], torch.tensor(200 / 127.5 - 1), atol=0.01)
    bomb = png(8000, 8000)
    assert len(bomb) < 2**20
    with pytest.raises(UserError, match="8000 x 8000"):
        uploads.decode_picture(bomb, (16, 16))
    with pytest.raises(UserError, match="cut short"):
        uploads.decode_picture(png(40, 80)[:60], (16, 16))


def test_a_zip_named_png_and_a_list_of_other_files_are_refused(tmp_path):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("../../x.png", png(8, 8))
    for read in (uploads.decode_file, lambda x: uploads.decode_picture(x, (16, 16))):
        with pytest.raises(UserError, match="cannot be read"):
            read(archive.getvalue())
    secret = tmp_path / "secret.wav"
    secret.write_bytes(wav(1))
    for text in (f"ffconcat version 1.0\nfile {secret}\n", f"#EXTM3U\n#EXTINF:1,\n{secret}\n"):
        with pytest.raises(UserError, match="cannot be read"):
            uploads.decode_file(text.encode())


def test_only_common_kinds_of_sound_reach_the_decoders():
    """FFmpeg would read this Sun file: lists of other files are read in this way."""
    sun = b".snd" + b"".join(n.to_bytes(4, "big") for n in (24, 4000, 3, 8000, 1)) + bytes(4000)
    with pytest.raises(UserError, match="cannot be read"):
        uploads.decode_file(sun)


def test_sound_files_are_resampled_and_bounded():
    sound = uploads.decode_file(wav(0.5))
    assert sound.shape == (8000,)
    assert sound[4000] == pytest.approx(8000 / 32768, abs=0.01)
    with pytest.raises(UserError, match="longer than 120 s"):
        uploads.decode_file(wav(121))
    with pytest.raises(UserError) as caught:
        uploads.decode_file(wav(1)[:30])
    assert "/" not in str(caught.value)  # no path of the server


def crash(data: bytes) -> torch.Tensor:
    os.abort()


def hang(data: bytes) -> torch.Tensor:
    time.sleep(1000)
    return torch.zeros(1)


def swell(data: bytes) -> torch.Tensor:
    return torch.ones(2**29)


def broken(data: bytes) -> torch.Tensor:
    return torch.zeros(len(data) // 0)


@pytest.mark.slow
def test_what_ends_a_decoder_is_one_line_and_the_next_file_is_read():
    decoders = Decoders(processes=1)
    try:
        for function, seconds, words in (
            (crash, 30.0, "crashed"),
            (hang, 0.5, "more than 0.5 s"),
            (swell, 30.0, "RuntimeError"),
            (broken, 30.0, "ZeroDivisionError"),
        ):
            decoders.seconds = seconds
            with pytest.raises(UserError, match=words):
                decoders.run(function, b"x")
        assert torch.equal(decoders.run(uploads.decode_file, wav(0.5))[0], uploads.decode_file(wav(0.5)))
        assert decoders.run(uploads.decode_picture, png(40, 80), (16, 16))[0].shape == (3, 16, 16)
    finally:
        decoders.close()
