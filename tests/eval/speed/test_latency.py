"""Clocks, the bare work of a chunk, and FLOPs."""

import time
from itertools import count

import pytest
import torch

from eval.speed import latency, roofline
from eval.speed.latency import (
    Scene,
    chunk_work,
    clocked,
    interleave,
    median_seconds,
    percentile,
    settled_chunks,
    spread,
    stream,
)
from students.history import History
from teachers.errors import UserError
from tests.support.tiny import MIDAS, a_bundle, a_portrait, some_sound

SPEAKS = "a person nods"


@pytest.fixture(scope="module")
def bundle():
    return a_bundle()


@pytest.fixture(scope="module")
def scene():
    return Scene(a_portrait(), SPEAKS, some_sound(60 * 1280), seed=4)


def film(streamed):
    return torch.cat([chunk.frames for chunk in streamed.chunks])


def test_percentiles_are_nearest_rank():
    values = [float(i) for i in range(100, 0, -1)]
    assert [percentile(values, p) for p in (1, 50, 95, 99, 100)] == [1, 50, 95, 99, 100]
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([5.0], 99) == 5.0
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_blocks_take_turns():
    ticks = count()
    assert interleave({"a": lambda: next(ticks), "b": lambda: next(ticks)}, 3) == {"a": [0, 2, 4], "b": [1, 3, 5]}


def test_sleep_is_wall_time_and_no_cpu_time():
    slept = clocked(lambda: time.sleep(0.02), repeats=20)
    assert 0.02 <= slept.seconds < 0.2
    assert slept.cpu_seconds < 0.01

    def work(until: float = 0.0) -> None:
        until = time.process_time() + 0.02
        while time.process_time() < until:
            pass

    assert clocked(work).cpu_seconds >= 0.02


def test_a_median_counts_only_measured_runs():
    measured = iter((50.0, 60.0, 70.0, 3.0, 1.0, 2.0))
    assert median_seconds(lambda: next(measured), warmup=3, runs=3) == 2.0
    assert not list(measured)


def test_a_stream_is_timed_step_by_step(bundle, scene):
    run = stream(bundle, scene, 5, timed=True)
    assert [len(chunk.frames) for chunk in run.chunks] == [3, 4, 4, 4, 4]
    assert len(run.steps) == 5
    assert all(sum(chunk.seconds.values()) <= step.seconds for chunk, step in zip(run.chunks, run.steps, strict=True))
    assert run.opening + sum(step.seconds for step in run.steps) <= run.took.seconds
    assert 0 < sum(step.cpu_seconds for step in run.steps) <= run.took.cpu_seconds
    assert torch.equal(film(stream(bundle, scene, 5)), film(run))
    with pytest.raises(UserError, match=r"^sound too short: 15 of 99 chunks could be drawn; give a longer one$"):
        stream(bundle, scene, 99)


def test_settled_chunks_have_the_context_of_the_last(bundle):
    assert settled_chunks(bundle.spec, 8) == [3, 4, 5, 6, 7]
    assert settled_chunks(bundle.spec, 2) == [1]
    assert settled_chunks(a_bundle(History(sinks=0, window=None)).spec, 6) == [5]


@pytest.mark.parametrize("commit", ["clean", "same_level"])
def test_the_bare_work_is_the_sessions_own(commit, scene):
    """The kept calls give what the session's gave, though its buffers were written since."""
    bundle = a_bundle(History(sinks=1, window=2, commit=commit))
    net, spec, made = bundle.student.net, bundle.spec, []
    handle = net.register_forward_hook(lambda *call: made.append(call[-1][0]))
    work, count = chunk_work(bundle, scene, 5), spec.nfe_per_chunk
    assert len(work.calls) == count
    work.all()
    handle.remove()
    assert len(made) == 7 * count
    assert all(torch.equal(a, b) for a, b in zip(made[5 * count : 6 * count], made[6 * count :], strict=True))
    assert torch.equal(work.decode(), stream(bundle, scene, 6).chunks[5].frames)
    received = bundle.audio_encoder(scene.sound[None], *spec.pixel_frames(5))[0]
    assert torch.allclose(work.encoders(), received, atol=1e-4)


def flops_by_hand(spec, queries: int, keys: int) -> int:
    """A chunk of `queries` tokens that see `keys` tokens, text and time being read: three steps and the context pass, which
    read the sound together; a multiply-add is two."""
    net, (channels, *_), n = spec.network, spec.latent_size, spec.chunk_frames
    width, area = net.num_heads * net.head_dim, net.patch**2
    rows = spec.codec.stride * spec.audio.num_mels * spec.samples_per_frame // spec.audio.hop
    block = queries * width * (6 * width + 2 * net.ffn_dim) + 2 * queries * width * (keys + spec.text.max_tokens)
    projected = n * rows * net.audio_hidden + n * net.audio_hidden * width * len(net.audio_blocks)
    embeddings = queries * width * area * (2 * channels + 1) + queries * width * area * channels
    return 2 * (4 * (net.num_layers * block + embeddings) + projected)


def test_flops_are_those_counted_by_hand(bundle, scene):
    spec = bundle.spec
    queries = spec.chunk_frames * spec.token_grid[0] * spec.token_grid[1]
    work = chunk_work(bundle, scene, 5)
    assert roofline.count_flops(work.network) == flops_by_hand(spec, queries, 4 * queries)
    early = chunk_work(bundle, scene, 1)
    assert roofline.count_flops(early.network) == flops_by_hand(spec, queries, 2 * queries)
    cells = spec.codec.channels * (spec.latent_size[1] * spec.latent_size[2])
    assert roofline.count_flops(work.decode) == 2 * spec.chunk_frames * cells * work.bundle.codec.mean.numel()


def test_the_ceiling_is_the_best_rate(monkeypatch):
    """With a clock that says one second for every measurement the best is the largest size and count."""
    ticks = count()
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: float(next(ticks)))
    assert roofline.matmul_ceiling(torch.device("cpu"), torch.float32, (8, 16, 4), 0.5) == 2 * 16**3


def test_the_bare_work_of_a_language_model_student(scene):
    """A plan and three steps, the same numbers again after the stream has gone on."""
    bundle = a_bundle(network=MIDAS)
    work = chunk_work(bundle, scene, 5)
    assert [call.func.__name__ for call in work.calls] == ["plan", "denoise", "denoise", "denoise"]
    with torch.inference_mode():
        first, again = (work.calls[-1]()[0] for _ in range(2))
    assert torch.equal(first, again)
    work.all()
    assert "plan" not in vars(bundle.student), "what was recorded is put back"


@pytest.mark.parametrize(("each", "seconds", "results"), [(0.1, 100, 5), (1.0, 4.0, 3), (1.0, 1.5, 1), (50.0, 10, 1)])
def test_slow_blocks_are_timed_as_often_as_time_allows(monkeypatch, each, seconds, results):
    """Five rounds after two of warm-up where there is time; `each` block takes so long, and there are two."""
    now = [0.0]

    def block() -> float:
        now[0] += each / 2
        return now[0]

    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    found = latency.timed({"a": block, "b": block}, 2, 5, seconds)
    assert [len(found[name]) for name in "ab"] == [results] * 2
    if results == 5:
        assert found["a"][0] == pytest.approx(2.5 * each), "after two rounds"
