"""Films as they come: every orientation, pixels that are not square, interlaced and HDR frames, no duration."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distill.data.datasets.manifest import Clip
from distill.data.prepare.cutting import CutConfig, cut
from teachers import media
from teachers.errors import UserError
from teachers.media import container as container_of
from teachers.media.film import probe, read_frames
from tests.support.media.films import frames_of, number_of, numbered

BT2020, PQ, HLG = 9, 16, 18
LOOSE = CutConfig(fps=Fraction(25), min_seconds=0.1, silent=True, crf=0)
TRANSFORMS = {
    "as it is": ((1, 0, 0, 1), lambda x: x),
    "mirrored": ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
    "upside down": ((-1, 0, 0, -1), lambda x: x[::-1, ::-1]),
    "flipped": ((1, 0, 0, -1), lambda x: x[::-1]),
    "transposed": ((0, 1, 1, 0), lambda x: x.transpose(1, 0, 2)),
    "right": ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
    "transversed": ((0, -1, -1, 0), lambda x: x[::-1, ::-1].transpose(1, 0, 2)),
    "left": ((0, -1, 1, 0), np.rot90),
}
"""Display matrices (a, b, c, d) of ISO 14496-12, 6.2.2, and what numpy calls them."""


def write(path: Path, codec: str = "libx264", pictures: int = 6, ratio: Fraction | None = None, **facts) -> Path:
    """A small film; `facts` are attributes and options (`opt_`) of its encoder."""
    matroska = ratio is not None and path.suffix in (".mkv", ".webm")
    facts |= {"color_trc": 1, "color_primaries": 1, "colorspace": 1} if matroska else {}
    options = {name[4:]: facts.pop(name) for name in [*facts] if name.startswith("opt_")}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 80, 64, facts.pop("pix_fmt", "yuv420p")
        if ratio is not None:
            stream.sample_aspect_ratio = ratio
        for name, value in facts.items():
            setattr(stream.codec_context, name, value)
        for number in range(pictures):
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        container.mux(stream.encode(None))
    if matroska:  # its muxer does not write the ratio: DisplayWidth and Void take the place of Colour
        data = bytearray(path.read_bytes())
        at = data.index(b"\x55\xb0", data.index(b"\xb0\x81\x50"))
        length = 3 + data[at + 2] % 128
        display = b"\x54\xb0\x82" + round(80 * ratio).to_bytes(2, "big") + bytes([0xEC, 0x80 + length - 7])
        data[at : at + length] = display + bytes(length - 7)
        path.write_bytes(data.replace(b"\x54\xb2\x81\x04", b"\x54\xb2\x81\x00"))  # a DisplayUnit that is known
    return path


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "libx264"), ("mov", "mpeg4"), ("mp4", "libvpx-vp9")])
def test_every_display_matrix_is_applied_as_a_whole(tmp_path, name, suffix, codec):
    path = write(tmp_path / f"a.{suffix}", codec)
    plain = media.read_video(path)[0].numpy()
    matrix, shown = TRANSFORMS[name]
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    for place, value in zip((0, 1, 3, 4), matrix, strict=True):
        data[at + 4 * place : at + 4 * place + 4] = (value * 2**16).to_bytes(4, "big", signed=True)
    path.write_bytes(data)
    found = media.read_video(path)[0].numpy()
    np.testing.assert_array_equal(found, np.stack([shown(x) for x in plain]))
    height, width = found.shape[1:3]
    assert probe(path) == ((width, height), pytest.approx(6 / 25))
    piece = cut(Clip(id="a", dataset="t", source="a"), path, LOOSE, tmp_path / "out.mp4")
    np.testing.assert_array_equal(frames_of(tmp_path / "out.mp4"), found)
    assert piece.metadata["mirrored"] == (np.linalg.det(np.reshape(matrix, (2, 2))) < 0)


@pytest.mark.parametrize(
    ("name", "codec", "ratio", "width"),
    [
        ("a.mp4", "libvpx-vp9", Fraction(2), 160),
        ("a.mkv", "libvpx-vp9", Fraction(3, 2), 120),
        ("a.webm", "libvpx", Fraction(3, 2), 120),
        ("a.mov", "libx264", Fraction(12, 11), 87),
        ("b.mov", "libx264", Fraction(1, 2), 40),
    ],
)
def test_pixels_that_are_not_square_are_made_so(tmp_path, name, codec, ratio, width):
    path = write(tmp_path / name, codec, ratio=ratio)
    stored = frames_of(path)
    found = media.read_video(path)[0].numpy()
    assert found.shape == (6, 64, width, 3)
    assert [number_of(frame) for frame in found] == list(range(6))
    across = F.interpolate(
        torch.from_numpy(stored).permute(0, 3, 1, 2).float(), (64, width), mode="bilinear", antialias=True
    )
    assert np.abs(found - across.permute(0, 2, 3, 1).numpy()).mean() < 3, "the same picture, another width"
    assert probe(path)[0] == (width, 64)
    piece = cut(Clip(id="a", dataset="t", source="a"), path, LOOSE, tmp_path / "out.mp4")
    assert piece.metadata["source_size"] == [width, 64]
    assert Fraction(piece.metadata["pixel_aspect"]) == ratio


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"), [("a.mov", "qtrle", "argb"), ("a.mkv", "ffv1", "bgra"), ("b.mov", "png", "rgba")]
)
def test_transparency_is_laid_on_white(tmp_path, name, codec, pix_fmt):
    """Colours hidden under it do not show, half of them half."""
    rgba = np.dstack([numbered(7), np.full((64, 80), 255, np.uint8)])
    rgba[:, :20, 3], rgba[:, 20:40, 3] = 0, 128
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=25, width=80, height=64, pix_fmt=pix_fmt)
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(rgba, format="rgba").reformat(format=pix_fmt)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    alpha = rgba[..., 3:] / 255
    shown = np.round(rgba[..., :3] * alpha + 255 * (1 - alpha))
    found = media.read_video(tmp_path / name)[0].numpy()
    assert np.abs(found - shown).max() <= 1
    cut(Clip(id="a", dataset="t", source="a"), tmp_path / name, LOOSE, tmp_path / "out.mp4")
    np.testing.assert_array_equal(frames_of(tmp_path / "out.mp4"), found)


def test_an_absurd_pixel_aspect_is_refused(tmp_path):
    with pytest.raises(UserError, match="960 x 64 pixels"):
        media.read_video(write(tmp_path / "a.mkv", "libvpx-vp9", ratio=Fraction(12)))


@pytest.mark.parametrize(
    ("name", "facts", "words"),
    [
        ("a.mp4", {"opt_x264-params": "interlaced=1"}, "interlaced"),
        ("a.mkv", {"opt_x264-params": "bff=1"}, "interlaced"),
        ("a.mov", {"codec": "mpeg2video", "opt_flags": "+ildct+ilme"}, "interlaced"),
        ("a.mp4", {"codec": "libx264", "color_trc": PQ, "color_primaries": BT2020}, r"HDR \(PQ\)"),
        ("a.mkv", {"codec": "libx265", "color_trc": HLG, "pix_fmt": "yuv420p10le"}, r"HDR \(HLG\)"),
        ("a.webm", {"codec": "libvpx-vp9", "color_trc": PQ}, r"HDR \(PQ\)"),
        ("a.webm", {"codec": "libvpx-vp9", "pix_fmt": "yuva420p"}, "transparent"),
    ],
)
def test_pictures_that_would_come_out_wrong_are_refused_with_the_fact(tmp_path, name, facts, words):
    path = write(tmp_path / name, **facts)
    for read in (
        media.read_video,
        probe,
        lambda x: cut(Clip(id="a", dataset="t", source="a"), x, LOOSE, tmp_path / "out.mp4"),
    ):
        with pytest.raises(UserError, match=words):
            read(path)


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_a_film_without_a_duration_has_that_of_its_packets(tmp_path, codec):
    live = tmp_path / "live.webm"
    with live.open("wb") as file, av.open(file, "w", format="webm", options={"live": "1"}) as container:
        stream = container.add_stream(codec, rate=25, width=80, height=64, pix_fmt="yuv420p")
        for number in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(number), format="rgb24")))
        container.mux(stream.encode(None))
    with av.open(str(live)) as container:
        assert container.duration is None
    assert probe(live) == ((80, 64), pytest.approx(0.8, abs=0.05))


@pytest.mark.parametrize(("name", "codec"), [("a.avi", "mpeg4"), ("a.mxf", "mpeg2video"), ("a.ts", "libx264")])
def test_a_video_is_read_from_containers_that_prepare_refuses(tmp_path, name, codec):
    frames, rate = media.read_video(write(tmp_path / name, codec))
    assert rate == 25
    assert [number_of(frame.numpy()) for frame in frames] == list(range(6))
    assert len(list(read_frames(tmp_path / name))) == 6


def test_a_track_that_begins_later_than_the_file_is_probed_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "late.flv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("flv", rate=25, width=80, height=64, pix_fmt="yuv420p")
        audio = container.add_stream("mp3", rate=44_100, layout="mono", format="fltp")
        for number in range(100):
            container.mux(video.encode(av.VideoFrame.from_ndarray(numbered(number), format="rgb24")))
        container.mux(video.encode(None))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44_100), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 44_100, 4 * 44_100, Fraction(1, 44_100)
        container.mux([*audio.encode(frame), *audio.encode(None)])
    data = bytearray(path.read_bytes())
    data[4] = 1  # the header says that there is no sound
    path.write_bytes(data)
    assert len(media.read_video(path)[0]) == 100
    monkeypatch.setattr(container_of, "LIMITS", {"analyzeduration": "100000", "probesize": "2000"})
    with pytest.raises(UserError, match=r"cannot be read \(a track begins in its middle\)"):
        media.read_video(path)
