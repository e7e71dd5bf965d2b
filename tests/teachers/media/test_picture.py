"""Still pictures: every mode, orientation and kind of file gives the right pixels; what is damaged, thin or huge is one line."""

import io
import struct
import time
import zlib
from contextlib import suppress

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from distill.live.uploads import decode_picture
from students.serving.pipeline import AvatarPipeline
from teachers import media
from teachers.errors import UserError
from teachers.media.picture import FORMATS, ORIENTATION
from tests.support.tiny import a_bundle

HEIGHT, WIDTH = 36, 20
DOWN, ACROSS = np.mgrid[0:HEIGHT, 0:WIDTH]
UPRIGHT = np.stack([DOWN * 7, ACROSS * 12, 200 - 5 * DOWN], 2).astype(np.uint8)
STORED = {  # how a camera stores UPRIGHT under each orientation (EXIF 2.3, 4.6.4 A)
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: UPRIGHT.transpose(1, 0, 2)[::-1],
    7: UPRIGHT.transpose(1, 0, 2)[::-1, ::-1],
    8: UPRIGHT.transpose(1, 0, 2)[:, ::-1],
}


def file_of(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, extra: bytes = b"", depth: int = 1, colour: int = 0, rows: bytes | None = None
) -> bytes:
    rows = bytes(height * (1 + -(-width * depth // 8))) if rows is None else rows
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff"])
@pytest.mark.parametrize("orientation", STORED)
def test_all_eight_orientations_come_out_upright(kind, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"quality": 98, "subsampling": 0} if kind == "jpeg" else {"lossless": True} if kind == "webp" else {}
    data = file_of(Image.fromarray(np.ascontiguousarray(STORED[orientation])), kind, exif=exif, **options)
    read = media.decode_image(data).numpy()
    np.testing.assert_allclose(read, UPRIGHT, atol=4 if kind == "jpeg" else 0)
    given = media.decode_image(Image.open(io.BytesIO(data))).numpy()
    assert np.array_equal(given, read), "a PIL image is read as its file is"


def modes() -> dict[str, tuple[Image.Image, np.ndarray, str]]:
    """An image of each mode, the pixels it shows, and a kind of file that holds it."""
    grey = (DOWN * 7).astype(np.uint8)
    shown = np.repeat(grey[..., None], 3, 2)
    alpha = np.where(ACROSS < WIDTH // 2, 0, 255).astype(np.uint8)
    hidden = np.dstack([UPRIGHT, alpha])
    on_white = np.where(alpha[..., None] == 0, 255, UPRIGHT)
    half = np.dstack([UPRIGHT, np.full_like(alpha, 128)])
    palette = Image.fromarray(grey).convert("P")
    palette.info["transparency"] = int(np.array(palette)[0, 0])
    through = shown.copy()
    through[np.array(palette) == palette.info["transparency"]] = 255
    levels = (DOWN * 257 * 7).astype(np.uint16)
    deep = Image.fromarray(levels)
    deep.info["transparency"] = int(levels[3, 0])
    return {
        "I;16 one transparent": (deep, np.where((levels == levels[3, 0])[..., None], 255, shown), "png"),
        "RGB": (Image.fromarray(UPRIGHT), UPRIGHT, "png"),
        "RGBA": (Image.fromarray(hidden), on_white, "webp"),
        "RGBA half": (Image.fromarray(half), (UPRIGHT * (128 / 255) + 255 * (127 / 255)).round(), "png"),
        "LA": (
            Image.fromarray(hidden[..., [0, 3]]),
            np.where(alpha[..., None] == 0, 255, UPRIGHT[..., :1].repeat(3, 2)),
            "png",
        ),
        "P": (palette, through, "png"),
        "L": (Image.fromarray(grey), shown, "bmp"),
        "1": (Image.fromarray(grey > 100), np.where(shown > 100, 255, 0), "tiff"),
        "I;16": (Image.fromarray((DOWN * 257 * 7).astype(np.uint16)), shown, "png"),
        "I;16 tiff": (Image.fromarray((DOWN * 257 * 7).astype(np.uint16)), shown, "tiff"),
        "CMYK": (Image.fromarray(UPRIGHT).convert("CMYK"), UPRIGHT, "tiff"),
    }


@pytest.mark.parametrize("mode", modes())
def test_every_mode_shows_its_colours_and_hides_what_is_transparent(mode):
    image, shown, kind = modes()[mode]
    options = {"lossless": True} if kind == "webp" else {}
    for source in (image, file_of(image, kind, **options)):
        np.testing.assert_allclose(media.decode_image(source).numpy(), shown, atol=1)


@pytest.mark.parametrize("kind", ["webp", "gif", "tiff", "png"])
def test_an_animation_is_its_first_picture(kind):
    first = Image.fromarray(np.repeat(UPRIGHT[..., :1] // 64 * 64, 3, 2))
    more = {"append_images": [Image.new("RGB", first.size, "red")], "save_all": True}
    data = file_of(first, kind, **more, **({"lossless": True} if kind == "webp" else {}))
    np.testing.assert_allclose(media.decode_image(data).numpy(), np.array(first), atol=3)


SIDE_CHUNKS = {
    "profile": chunk(b"iCCP", b"x\0\0" + b"no zlib"),
    "checksum": chunk(b"iCCP", b"x\0\0" + zlib.compress(b"p" * 99))[:-1] + b"!",
    "text bomb": chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(9_000_000))),
    "gamma": chunk(b"gAMA", b""),
    "exif": chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff"),
    "transparency": chunk(b"tRNS", b"\0\0")[:-2] + b"!!",
}


@pytest.mark.parametrize("name", SIDE_CHUNKS)
def test_a_damaged_side_chunk_of_a_png_costs_no_pixel(name):
    rows = b"".join(b"\0" + bytes([20 * row] * 16) for row in range(12))
    read = media.decode_image(png(16, 12, SIDE_CHUNKS[name], depth=8, rows=rows))
    assert read.shape == (12, 16, 3)
    assert torch.equal(read[:, 0, 0], 20 * torch.arange(12, dtype=torch.uint8))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_one_transparent_level_of_any_depth_is_white(depth):
    """Pillow compares the level of 2 and 4 bits with the 8 that it makes of them, and drops that of 16."""
    levels = np.arange(WIDTH) % 2 ** min(depth, 4)
    bits = "".join(f"{level:0{depth}b}" for level in levels)
    row = b"\0" + int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    data = png(WIDTH, HEIGHT, chunk(b"tRNS", struct.pack(">H", 1)), depth, rows=HEIGHT * row)
    shown = np.where(levels == 1, 255, np.round(levels * 255 / (2**depth - 1)))
    assert media.decode_image(data)[0, :, 0].tolist() == shown.tolist()


def test_damaged_side_segments_of_a_jpeg_cost_no_pixel():
    plain = file_of(Image.fromarray(UPRIGHT), "jpeg", quality=95)
    wanted = media.decode_image(plain)
    for body in (b"Exif\0\0MM\0*\xff\xff\xff\xff", b"ICC_PROFILE\0\x01\x05garbage", b"MPF\0II*\0garbage"):
        for marker in (b"\xff\xe1", b"\xff\xe2"):
            data = plain[:2] + marker + struct.pack(">H", len(body) + 2) + body + plain[2:]
            assert torch.equal(media.decode_image(data), wanted)


BOMBS = {
    "1 x 2000": (png(1, 2000), "its sides may differ 10 to 1 at most"),
    "88 bytes": (png(4000, 2), "its sides may differ 10 to 1 at most"),
    "2 KB": (png(400_000, 400_000, rows=b""), "megapixels"),
    "120 MP": (png(12_000, 10_000), "megapixels"),
    "bmp": (
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0),
        "megapixels",
    ),
    "gif": (
        b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\0;",
        "megapixels",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_thin_and_huge_pictures_are_refused_before_they_are_decoded(name):
    data, says = BOMBS[name]
    before, began = psutil.Process().memory_info().rss, time.monotonic()
    with pytest.raises(UserError, match=rf"^[^\n]*{says}[^\n]*$"):
        media.decode_image(data)
    assert time.monotonic() - began < 1
    assert psutil.Process().memory_info().rss - before < 2**26


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_large_picture_is_reduced_and_keeps_its_place(kind, monkeypatch):
    monkeypatch.setattr("teachers.media.picture.KEPT_PIXELS", 4 * WIDTH * HEIGHT)
    image = Image.fromarray(UPRIGHT).resize((8 * WIDTH, 8 * HEIGHT), Image.Resampling.BILINEAR)
    read = media.decode_image(file_of(image, kind, quality=95))
    assert read.shape == (2 * HEIGHT, 2 * WIDTH, 3)
    small = read.unflatten(0, (HEIGHT, 2)).unflatten(2, (WIDTH, 2)).float().mean((1, 3))
    np.testing.assert_allclose(small[1:-1, 1:-1].numpy(), UPRIGHT[1:-1, 1:-1], atol=6)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.98])
def test_a_truncated_picture_is_refused(tmp_path, kind, part):
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 3)).astype(np.uint8)
    data = file_of(Image.fromarray(noise), kind)
    path = tmp_path / "a.png"
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(UserError, match=r"^[^\n]*a\.png[^\n]*$"):
        media.decode_image(path)


def test_what_is_no_picture_is_refused(tmp_path):
    contents = {
        "text.png": b"no picture\n" * 30,
        "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "film.mp4": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(99),
        "sound.wav": b"RIFF\x24\0\0\0WAVEfmt " + bytes(99),
        "empty.png": b"",
        "deep.tiff": file_of(Image.fromarray(DOWN.astype(np.float32)), "tiff"),
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    for path in (*(tmp_path / name for name in contents), tmp_path / "none.png", tmp_path):
        with pytest.raises(UserError, match=r"^[^\n]+$"):
            media.decode_image(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_mutated_pictures_are_read_or_refused(kind):
    rng, data = np.random.default_rng(5), file_of(Image.fromarray(UPRIGHT), kind)
    for _ in range(30):
        broken = bytearray(data)
        for place in rng.integers(0, len(data), 4):
            broken[place] = rng.integers(256)
        data_now = bytes(broken[: rng.integers(1, len(data) + 1)] if rng.random() < 0.3 else broken)
        with suppress(UserError):
            assert media.decode_image(data_now).ndim == 3


def test_file_page_and_pipeline_read_a_picture_alike(tmp_path):
    bundle, exif = a_bundle(), Image.Exif()
    exif[ORIENTATION] = 5
    alpha = np.dstack([STORED[5], np.where(STORED[5][..., 0] > 99, 255, 0)]).astype(np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(alpha).save(path, exif=exif)
    wanted, _ = media.fit_portrait(media.decode_image(path), (16, 16))
    pipe = AvatarPipeline(bundle.student, bundle.codec, bundle.audio_encoder, bundle.text)
    sent, note = decode_picture(path.read_bytes(), (16, 16))
    assert torch.equal(sent, wanted)
    assert "the top of the picture is kept" in note
    for image in (path, str(path), Image.open(path)):
        with pytest.warns(UserWarning, match="the top of the picture is kept"):
            given = pipe.reference_of(image, "face")
        assert torch.equal(given, wanted)


def test_fit_crops_first_and_scales_without_aliasing():
    exact = torch.from_numpy(UPRIGHT)
    assert torch.equal(media.fit_image(exact, (HEIGHT, WIDTH)), exact.permute(2, 0, 1) / 127.5 - 1)
    tall = torch.arange(160.0)[:, None, None].expand(160, 64, 3).mul(1.5).byte()
    for crop, first in (("top", 0), ("center", 48)):
        rows = (media.fit_image(tall, (32, 32), crop)[0, :, 5] + 1) * 127.5
        assert rows[[0, -1]].tolist() == pytest.approx([1.5 * (first + 0.5), 1.5 * (first + 62.5)], abs=1)
    assert media.fit_image(exact, (48, 96)).abs().max() <= 1
    stripes = torch.zeros(96, 96, 3, dtype=torch.uint8)
    stripes[:, ::2] = 255
    assert media.fit_image(stripes, (32, 32)).abs().max() < 0.15
    with pytest.raises(UserError, match="crop: got 'bottom'; face, top, center"):
        media.fit_image(exact, (16, 16), "bottom")
