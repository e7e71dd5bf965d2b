"""What a small file can ask for: memory, threads and time follow from what it really holds, not from what it claims."""

import errno
import gc
import io
import time
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from distill.data.datasets.manifest import Clip
from distill.data.prepare.cutting import CutConfig, cut
from distill.scoring.clip_io import read_clip, write_clip
from distill.scoring.clip_sets import open_set
from eval.cards import load_card
from teachers import media
from teachers.errors import UserError
from teachers.media import container, sound, streams
from teachers.media.container import MOST_FRAME_PIXELS, upright
from teachers.media.film import read_frames
from tests.support.media.films import numbered, write_film
from tests.support.media.sounds import tone, write_sound


def status(name: str) -> int:
    """A number of this process, such as VmRSS in KiB and Threads."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows[name].split()[0])


@contextmanager
def nothing_is_left(mebibytes: float):
    """Without the garbage collector, memory grows by no more than that, and no thread is left."""
    gc.collect()
    gc.disable()
    memory, threads = status("VmRSS"), status("Threads")
    try:
        yield
        assert status("Threads") <= threads + 1
        assert (status("VmRSS") - memory) / 1024 < mebibytes
    finally:
        gc.enable()


def test_frames_are_let_go_at_once(tmp_path):
    pictures = [np.full((720, 1280, 3), number, np.uint8) for number in range(30)]
    path = write_film(tmp_path / "a.mp4", pictures, Fraction(25), preset="ultrafast")
    with nothing_is_left(60):  # the frames are 42 MB, and 83 MB more as RGB
        assert sum(upright(shown.frame).shape == (720, 1280, 3) for shown in read_frames(path)) == 30


def test_a_writer_leaves_no_threads(tmp_path):
    with nothing_is_left(100):
        media.write_video(tmp_path / "a.mp4", torch.zeros(40, 32, 32, 3, dtype=torch.uint8), Fraction(25))


def film_of_jpegs(path: Path, *sizes: tuple[int, int]) -> Path:
    """A film whose header has the first size (width, height), and one frame of each."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25, width=sizes[0][0], height=sizes[0][1], pix_fmt="yuvj420p")
        for number, (width, height) in enumerate(sizes):
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuvj420p"
            encoder.time_base = Fraction(1, 25)
            frame = av.VideoFrame.from_ndarray(np.full((height * 3 // 2, width), 128, np.uint8), format="yuv420p")
            frame = frame.reformat(format="yuvj420p")
            frame.pts = number
            for packet in [*encoder.encode(frame), *encoder.encode(None)]:
                packet.stream, packet.pts, packet.dts = stream, number, number
                packet.time_base = Fraction(1, 25)
                container.mux(packet)
    return path


@pytest.mark.parametrize("sizes", [[(4112, 4096)], [(64, 48), (4112, 4096)]], ids=["in the header", "later"])
def test_a_frame_above_the_limit_is_refused(tmp_path, sizes):
    assert MOST_FRAME_PIXELS < 4112 * 4096
    with pytest.raises(UserError, match=r"megapixels|cannot be read"):
        [*read_frames(film_of_jpegs(tmp_path / "a.mkv", *sizes))]
    assert len([*read_frames(film_of_jpegs(tmp_path / "b.mkv", (64, 48), (96, 48)))]) == 2


def far_apart(folder: Path) -> Path:
    """20 frames, the last of which comes after 10 days."""
    times = [*(Fraction(number, 25) for number in range(19)), Fraction(900_000)]
    return write_film(folder / "a.mkv", [numbered(number) for number in range(20)], times)


def test_a_clip_with_a_hole_is_refused_before_the_hole_is_filled(tmp_path):
    began = time.process_time()
    clip, path = Clip(dataset="d", id="a", source="a.mkv"), far_apart(tmp_path)
    with pytest.raises(UserError, match=r"no source frame within 0.5 s"):
        cut(clip, path, CutConfig(silent=True), tmp_path / "out.mp4")
    assert time.process_time() - began < 5


def test_eval_fills_no_hole(tmp_path):
    far_apart(tmp_path)
    entry = open_set(tmp_path)["a"]
    with nothing_is_left(100):
        with pytest.raises(UserError, match="a clip is held as a whole"):
            read_clip(entry, load_card("syncnet_v2"), generated=False)
        shown = read_clip(entry, load_card("omniavatar"), generated=False)
    assert shown.video.shape == (3, 375, 64, 80), "as long as it is shown"
    write_clip(tmp_path / "b.safetensors", torch.zeros(3, 9, 8, 8, dtype=torch.uint8), Fraction(1, 10**8), None)
    with pytest.raises(UserError, match="a clip is held as a whole"):
        read_clip(open_set(tmp_path)["b"], load_card("syncnet_v2"), generated=False)


def test_whole_sounds_have_a_longest_length(tmp_path, monkeypatch):
    path = write_sound(tmp_path / "a.m4a", "aac", 48_000, tone(9.0, 48_000)[:, None])
    whole = media.read_audio(path)
    samples = torch.cat(list(media.AudioReader(path)))
    assert torch.equal(whole, media.resample(samples, 48_000, 16_000)), "in pieces of some seconds"
    assert torch.allclose(sound.read_sound(path, 1000, 80_000).samples, whole[1000:81_000], atol=1e-6)
    monkeypatch.setattr(sound, "LONGEST", 8)
    with pytest.raises(UserError, match="longer than 8 s"):
        media.read_audio(path)
    with pytest.raises(UserError, match=r"a clip of 9 s"):
        sound.read_sound(path, 0, 144_000)


def test_filters_of_odd_rates_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(streams, "MOST_TABLES", 2**20)
    given = torch.from_numpy(tone(0.2, 47_999))
    expected = media.resample(given, 47_999, 16_000)
    monkeypatch.setattr(streams, "MOST_TABLES", 2**26)
    assert torch.equal(media.resample(given, 47_999, 16_000), expected)
    monkeypatch.setattr(streams, "MOST_TABLES", 2**20)
    monkeypatch.setattr(streams, "_tables", streams._Tables())
    for rate in (44_101, 22_051):
        media.resample(torch.zeros(rate // 5), rate, 16_000)
        assert 0 < sum(table.nbytes for table in streams._tables._kept.values()) <= 2**20


def test_a_place_that_no_file_has_is_an_error_code_and_no_traceback(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    with (tmp_path / "a").open("rb") as file:
        for stream in (file, io.BytesIO(b"abc")):
            seekable = container._Source(stream)
            assert seekable.seek(-5) == seekable.seek(0, 131_072) == -errno.EINVAL  # AVERROR(EINVAL)
            assert seekable.seek(-1, 2) == seekable.tell() == 2
            assert seekable.read() == b"c"
