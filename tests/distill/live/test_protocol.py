"""What pages may send, and what they may not."""

import io
import json
import wave
import zipfile
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from distill.live import protocol
from distill.live.protocol import Open, Played, Say
from students.serving.session import Chunk
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


def test_messages_are_read_strictly():
    assert protocol.parse('{"type": "say", "text": "hello"}') == Say("hello")
    assert protocol.parse('{"type": "open", "portrait": null, "text": "x", "seed": 3}') == Open(None, "x", 3)
    assert protocol.parse('{"type": "played", "frame": 3, "epoch": 1}') == Played(3, 1)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{",
        "[" * 10_000,
        '{"type": []}',
        '{"type": "quit"}',
        '{"type": "say"}',
        '{"type": "say", "text": 3}',
        '{"type": "say", "text": "x", "more": 1}',
        '{"type": "played", "frame": NaN, "epoch": 0}',
        '{"type": "played", "frame": 1.5, "epoch": 0}',
        '{"type": "played", "frame": true, "epoch": 0}',
        '{"type": "open", "seed": -1}',
        '{"type": "say", "text": "\\ud800"}',
        '{"type": "text", "text": "a\\u0000b"}',
        '{"type": "open", "portrait": "../../etc/passwd"}',
        '{"type": "say", "text": "%s"}' % ("x" * 601),
        json.dumps({"type": "say", "text": "x" * 20_000}),
        '{"type": "played", "frame": %s, "epoch": 0}' % ("9" * 5000),
    ],
)
def test_anything_else_is_a_users_mistake(text):
    with pytest.raises(UserError):
        protocol.parse(text)


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.text(),
        st.recursive(st.none() | st.integers() | st.text(), lambda x: st.dictionaries(st.text(), x)).map(json.dumps),
    )
)
def test_no_text_raises_anything_else(text):
    with suppress(UserError):
        protocol.parse(text)


@settings(max_examples=100, deadline=None)
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"RIFF", b"fLaC", b"OggS", b"ID3", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"]),
)
def test_no_file_raises_anything_else(data, mark):
    for read in (
        protocol.unpack,
        protocol.to_sound,
        protocol.decode_file,
        lambda x: protocol.decode_picture(x, (16, 16)),
    ):
        with suppress(UserError):
            read(mark + data)


def test_pictures_are_fitted_and_their_size_is_judged_before_a_pixel_is_read():
    picture = protocol.decode_picture(png(40, 80), (16, 16))
    assert picture.shape == (3, 16, 16)
    assert torch.allclose(picture[0], torch.tensor(200 / 127.5 - 1), atol=0.01)
    bomb = png(8000, 4000)
    assert len(bomb) < 2**20
    with pytest.raises(UserError, match="8000 x 4000"):
        protocol.decode_picture(bomb, (16, 16))
    with pytest.raises(UserError, match="whole png"):
        protocol.decode_picture(png(40, 80)[:60], (16, 16))


def test_a_zip_named_png_and_a_list_of_other_files_are_refused(tmp_path):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("../../x.png", png(8, 8))
    for read in (protocol.decode_file, lambda x: protocol.decode_picture(x, (16, 16))):
        with pytest.raises(UserError, match="cannot be read"):
            read(archive.getvalue())
    secret = tmp_path / "secret.wav"
    secret.write_bytes(wav(1))
    for text in (f"ffconcat version 1.0\nfile {secret}\n", f"#EXTM3U\n#EXTINF:1,\n{secret}\n"):
        with pytest.raises(UserError, match="cannot be read"):
            protocol.decode_file(text.encode())


def test_only_common_kinds_of_sound_reach_the_decoders():
    """FFmpeg would read this Sun file: lists of other files come in by such doors."""
    sun = b".snd" + b"".join(n.to_bytes(4, "big") for n in (24, 4000, 3, 8000, 1)) + bytes(4000)
    with pytest.raises(UserError, match="give a wav, flac"):
        protocol.decode_file(sun)


def test_sound_files_are_resampled_and_bounded():
    sound = protocol.decode_file(wav(0.5))
    assert sound.shape == (8000,)
    assert sound[4000] == pytest.approx(8000 / 32768, abs=0.01)
    with pytest.raises(UserError, match="longer than 120 s"):
        protocol.decode_file(wav(121))
    with pytest.raises(UserError) as told:
        protocol.decode_file(wav(1)[:30])
    assert "/" not in str(told.value)  # no path of the server
    with pytest.raises(UserError, match="s16"):
        protocol.to_sound(b"abc")
    assert protocol.to_sound(b"\x00\x40\x00\xc0").tolist() == [0.5, -0.5]


@pytest.mark.parametrize(("side", "exact"), [(16, True), (160, False)])
def test_a_chunk_survives_the_way(side, exact):
    frames = (
        torch.arange(side, dtype=torch.float)
        .mul(255 / side)
        .byte()[None, None, :, None]
        .expand(3, side, side, 3)
        .contiguous()
    )
    sound = torch.linspace(-1, 1, 300)
    data = protocol.pack_chunk(Chunk(0, 41, frames, sound, {}), 7)
    read = protocol.read_chunk(data, (side, side))
    assert (read.first_frame, read.epoch) == (41, 7)
    assert np.abs(read.sound - sound.numpy()).max() < 1e-4
    gap = np.abs(read.frames.astype(int) - frames.numpy())
    assert gap.max() == 0 if exact else gap.max() < 8
