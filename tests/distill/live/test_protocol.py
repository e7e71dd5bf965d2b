"""What pages may send, and what they may not."""

import json
import struct
from contextlib import suppress
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.live import protocol
from distill.live.protocol import Guide, Open, Played, Say
from students.serving.session import Chunk
from teachers.errors import UserError


def test_messages_are_read_strictly():
    assert protocol.parse('{"type": "say", "text": "hello"}') == Say("hello")
    assert protocol.parse('{"type": "open", "portrait": null, "text": "x", "seed": 3}') == Open(None, "x", 3)
    assert protocol.parse('{"type": "played", "frame": 3, "epoch": 1}') == Played(3, 1)
    assert protocol.parse('{"type": "guidance", "scales": {"audio": 2}}') == Guide({"audio": 2.0})


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
        '{"type": "guidance", "scales": {"audio": "2"}}',
        '{"type": "guidance", "scales": 2.0}',
        '{"type": "guidance", "scales": {"audio": Infinity}}',
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


def moving_frames(count: int, side: int) -> torch.Tensor:
    """uint8 [T, H, W, 3] of a wave that moves over a ramp."""
    place = torch.arange(side) / side
    wave = torch.sin(12 * place[None, :, None] + 9 * place[None, None] + 0.3 * torch.arange(count)[:, None, None])
    return (127 + 80 * wave + 40 * (place[:, None] - 0.5)).byte()[..., None].expand(-1, -1, -1, 3).contiguous()


def test_frames_of_a_client_that_decodes_vp8_are_small_and_stay_right_over_a_rewind():
    frames, sound = moving_frames(12, 192), torch.zeros(300)
    hello = protocol.check_hello('{"type": "hello", "version": 1, "video": ["av9", "vp8"]}')
    pack = protocol.packer(hello, (192, 192), Fraction(25, 2))
    # the second chunk is taken back, and comes again
    sent = [pack(Chunk(0, first, frames[first : first + 4], sound, {}), 0) for first in (0, 4, 4, 8)]
    decoder, seen = av.CodecContext.create("vp8", "r"), []
    for data in sent:
        _, kind, count, *_ = protocol.HEADER.unpack_from(data)
        assert kind == protocol.VP8
        place = protocol.HEADER.size
        for _ in range(count):
            (length,) = struct.unpack_from("<I", data, place)
            (frame,) = decoder.decode(av.Packet(data[place + 4 : place + 4 + length]))
            seen.append(frame.to_ndarray(format="rgb24"))
            place += 4 + length
        assert len(data) - place == 600
    expected = [*frames[:8], *frames[4:]]
    gaps = [np.abs(one.astype(int) - other.numpy()).mean() for one, other in zip(seen, expected, strict=True)]
    assert max(gaps) < 6
    jpegs = protocol.pack_chunk(Chunk(0, 8, frames[8:], sound, {}), 0)
    assert len(sent[-1]) < len(jpegs) / 2
    with pytest.raises(UserError, match="VP8"):
        protocol.read_chunk(sent[0], (192, 192))
    assert protocol.packer(hello, (64, 64), Fraction(25)) is protocol.pack_chunk
    assert protocol.packer(protocol.Hello(1), (192, 192), Fraction(25)) is protocol.pack_chunk


def test_microphone_messages_are_whole_samples():
    with pytest.raises(UserError, match="s16"):
        protocol.to_sound(b"abc")
    assert protocol.to_sound(b"\x00\x40\x00\xc0").tolist() == [0.5, -0.5]


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=300))
def test_no_binary_message_raises_anything_else(data):
    for read in (protocol.unpack, protocol.to_sound):
        with suppress(UserError):
            read(data)
