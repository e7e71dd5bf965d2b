"""`distill sample --realtime` keeps the clock of the sound, and any split of the sound gives the same film."""

import numpy as np
import pytest
import torch

from distill.commands.sample import command
from students.serving.session import Session
from students.weights.checkpoint import load_student
from teachers import media
from tests.distill.commands.sample.fakes import FPS, NUM_SAMPLES, RATE, film, speech
from tests.support.tiny import a_bundle, some_sound


def test_any_split_of_the_sound_gives_the_same_film(inputs, noted):
    sound = some_sound(NUM_SAMPLES)
    whole = Session(
        load_student(inputs["student"]),
        media.fit_image(media.decode_image(inputs["image"]), (16, 16), "top"),
        "smiles and nods",
        7,
    )
    whole.push(sound, rate=RATE)
    whole.close()
    frames = torch.cat([chunk.frames for chunk in whole.frames()])
    assert len(frames) == 27
    assert frames.float().std(0).mean() > 1
    for push_ms in (20, 333, 100_000, None):
        film(inputs, *(() if push_ms is None else ("--push-ms", str(push_ms))))
        assert torch.equal(torch.stack(noted.shown), frames[:25])
        assert torch.equal(torch.cat(noted.sounds), sound)
        step = RATE * (push_ms or 1000) // 1000
        ends = np.cumsum([samples for _, samples in noted.pushed])
        assert ends.tolist() == [*range(step, NUM_SAMPLES, step), NUM_SAMPLES]
        if push_ms == 20:
            assert max(noted.held) < 16000  # of 31533
    written = media.read_video(inputs["out"])[0]
    assert written.shape == (25, 16, 16, 3)
    assert (written.float().mean((1, 2, 3)) - frames[:25].float().mean((1, 2, 3))).abs().max() < 3


def test_pieces_keep_the_clock_at_any_rate():
    """20 ms at 11025 Hz are 220.5 samples; the sound arrives in whatever blocks the file has."""
    sound = torch.arange(11_025 * 3 + 5.0)
    pieces = list(command._pieces(sound.split(1024), 11_025, 20))
    assert [len(piece) for piece in pieces[:4]] == [220, 221, 220, 221]
    assert len(pieces[:150]) == 150
    assert sum(map(len, pieces[:150])) == 3 * 11_025
    assert torch.equal(torch.cat(pieces), sound)


@pytest.mark.parametrize(
    ("rate", "num_samples", "num_frames"),
    [(44100, 5 * 3528, 5), (44100, 5 * 3528 + 1, 6), (8000, 3 * 640, 3), (22000, 1, 1)],
)
def test_every_sample_has_its_frame(inputs, rate, num_samples, num_frames):
    speech(inputs["audio"], num_samples, rate)
    film(inputs, "--push-ms", "7")
    assert len(media.read_video(inputs["out"])[0]) == num_frames


def test_a_student_that_takes_pose_streams_without(inputs, noted, monkeypatch):
    monkeypatch.setattr("students.weights.checkpoint.load_student", lambda _: a_bundle(pose_dim=2))
    film(inputs, "--push-ms", "20")
    assert len(noted.drawn) == 7
    assert max(noted.held) < 16000


def test_realtime_keeps_the_clock(inputs, noted, capsys):
    film(inputs)
    plain = torch.stack(noted.shown)
    assert noted.pushed[-1][0] < 0.01
    noted.cost = staticmethod(lambda index: 0.02 - 0.001 * index)
    film(inputs, "--realtime")
    assert torch.equal(torch.stack(noted.shown), plain)
    times, sizes = zip(*noted.pushed, strict=True)
    assert set(sizes[:-1]) == {480}
    spoken = np.cumsum(sizes) / RATE
    late = np.array(times) - spoken
    assert late.min() > -1e-6
    assert late.max() < 0.021
    # Only the second chunk is late: it is one frame longer than the first, which the viewer began to watch at once.
    assert "stalls: 1 (0.08 s)" in capsys.readouterr().out


def test_a_slow_student_stalls(inputs, noted, capsys):
    """The first chunk can be drawn when 0.26 s were spoken; each takes 0.5 s and lasts 0.24 s, then 0.32 s."""
    noted.cost = staticmethod(lambda index: 0.5)
    film(inputs, "--realtime")
    assert [now for now, _ in noted.drawn] == pytest.approx([0.26 + 0.5 * (k + 1) for k in range(7)])
    assert f"stalls: 6 ({0.26 + 5 * 0.18:.2f} s)" in capsys.readouterr().out


def test_realtime_draws_two_chunks_ahead_at_most(inputs, noted, capsys):
    film(inputs, "--realtime", "--push-ms", "5000")
    times = [now for now, _ in noted.drawn]
    assert times[:2] == pytest.approx([NUM_SAMPLES / RATE] * 2, abs=1e-4)
    for index in range(2, 7):
        last = times[0] + float((2 + 4 * (index - 2)) / FPS)  # the last frame of the chunk before the last is shown
        assert last - 1e-4 < times[index] < last + float(1 / FPS) + 1e-4
    assert "stalls: 0 (0.00 s)" in capsys.readouterr().out
