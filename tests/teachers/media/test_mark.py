"""Words in frames, and the statement that a file is synthetic."""

import struct
from fractions import Fraction
from xml.etree import ElementTree

import av
import pytest
import torch

from teachers import media
from teachers.errors import UserError
from teachers.media.mark import COMMENT, SOURCE_TYPE, XMP, Mark


def frames(size=(64, 64), count=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, *size, 3), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(("size", "text"), [((64, 64), "AI"), ((64, 64), "synthetic"), ((512, 384), "AI-generated")])
def test_the_words_are_in_the_corner_and_nowhere_else(size, text):
    given = frames(size)
    before, mark = given.clone(), Mark(text, *size)
    marked = mark(given)
    assert torch.equal(given, before), "frames of a session are its own"
    changed = (marked != given).any(dim=-1)
    inside = torch.zeros_like(changed)
    inside[:, -mark.height :, : mark.width] = True
    assert not (changed & ~inside).any()
    assert changed[:, -mark.height :, : mark.width].float().mean() > 0.8
    assert mark.height * mark.width < 0.25 * size[0] * size[1]
    corner = marked[:, -mark.height :, : mark.width].float().mean(dim=(0, 3))
    letters = mark.letters[..., 0] > 200
    assert letters.sum() > 5
    assert corner[letters].mean() > 220
    assert corner[mark.letters[..., 0] == 0].mean() < 80


def test_what_does_not_fit_is_one_line():
    with pytest.raises(UserError, match=r"--mark: .* pixels wide, frames are 64; give fewer words"):
        Mark("made by a machine and nobody else", 64, 64)


def boxes(data: bytes) -> list[tuple[bytes, bytes]]:
    """The outermost boxes of an mp4."""
    place, found = 0, []
    while place < len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        found.append((kind, data[place + 8 : place + size]))
        place += size
    assert place == len(data)
    return found


def test_a_synthetic_file_says_so_and_plays_as_any_other(tmp_path):
    given, sound = frames(), torch.zeros(8000)
    for name, synthetic in (("plain", False), ("stated", True), ("again", True)):
        media.write_video(tmp_path / f"{name}.mp4", given, Fraction(25, 2), sound, synthetic=synthetic)
    plain, stated, again = ((tmp_path / f"{name}.mp4").read_bytes() for name in ("plain", "stated", "again"))
    assert stated == again, "a run that is resumed writes the same bytes"
    assert b"trainedAlgorithmicMedia" not in plain
    kind, content = boxes(stated)[-1]
    assert kind == b"uuid"
    assert content.startswith(XMP)
    packet = content[len(XMP) :].decode()
    description = ElementTree.fromstring(packet[packet.index("<x:xmpmeta") : packet.index("<?xpacket end")])[0][0]
    name = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
    assert description.attrib[name] == SOURCE_TYPE
    shown = []
    for file in ("plain", "stated"):
        with av.open(str(tmp_path / f"{file}.mp4")) as container:
            assert (container.metadata.get("comment") == COMMENT) == (file == "stated")
            shown.append([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert all((a == b).all() for a, b in zip(*shown, strict=True))
