"""Clocks, the bare work of a chunk, FLOPs and the plain loop that the session is measured against."""

import time
from itertools import count

import pytest
import torch

from eval.speed import roofline
from eval.speed.latency import Scene, chunk_work, clocked, interleave, percentile, settled_chunks, spread, stream
from eval.speed.naive_loop import can_run, naive_loop
from students.history import History
from teachers.errors import UserError
from tests.support.tiny import MIDAS, a_bundle, a_portrait, some_sound

SPEAKS = "a person nods"
HISTORIES = [
    History(sinks=1, window=2),
    History(sinks=0, window=2),
    History(sinks=3, window=1),
    History(sinks=2, window=0),
    History(sinks=0, window=None),
    History(sinks=1, window=2, level=0.1),
]


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
    heard = bundle.audio_encoder(scene.sound[None], *spec.pixel_frames(5))[0]
    assert torch.allclose(work.encoders(), heard, atol=1e-4)


def flops_by_hand(spec, queries: int, keys: int) -> int:
    """A chunk of `queries` tokens that see `keys` tokens, text and time being read: three steps and the context pass, which
    read the sound together; a multiply-add is two."""
    net, (channels, *_), n = spec.network, spec.latent_size, spec.chunk_frames
    width, area = net.num_heads * net.head_dim, net.patch**2
    rows = spec.codec.stride * spec.audio.num_mels * spec.samples_per_frame // spec.audio.hop
    block = queries * width * (6 * width + 2 * net.ffn_dim) + 2 * queries * width * (keys + spec.text.max_tokens)
    heard = n * rows * net.audio_hidden + n * net.audio_hidden * width * len(net.audio_blocks)
    doors = queries * width * area * (2 * channels + 1) + queries * width * area * channels
    return 2 * (4 * (net.num_layers * block + doors) + heard)


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


@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_the_plain_loop_draws_what_the_session_draws(history, scene):
    bundle = a_bundle(history)
    shown = film(stream(bundle, scene, 9)).int()
    assert shown.float().std() > 5
    for keep_text in (False, True):
        frames = naive_loop(bundle, scene, 9, keep_text)
        assert frames.dtype == torch.uint8
        assert frames.shape == shown.shape
        assert (frames.int() - shown).abs().max() <= 1


def test_the_plain_loop_repeats_what_published_code_repeats(bundle, scene, monkeypatch):
    """Text read in every call or once, the window turned in every call, one context pass a chunk."""
    net = bundle.student.net
    calls = {"text": 0, "time": 0, "net": 0}

    def counted(name, function):
        def call(*inputs, **named):
            calls[name] += 1
            return function(*inputs, **named)

        return call

    reader = net.condition_embedder.text_embedder
    monkeypatch.setattr(reader, "forward", counted("text", reader.forward))
    monkeypatch.setattr(net, "read_time", counted("time", net.read_time))
    monkeypatch.setattr(net, "forward", counted("net", net.forward))
    naive_loop(bundle, scene, 5)
    assert calls == {"text": 20, "time": 20, "net": 20}
    calls.update(text=0, time=0, net=0)
    naive_loop(bundle, scene, 5, keep_text=True)
    assert calls == {"text": 1, "time": 20, "net": 20}
    calls.update(text=0, time=0, net=0)
    stream(bundle, scene, 5)
    assert calls == {"text": 1, "time": 4, "net": 20}


def test_the_plain_loop_drops_a_pose_as_the_stream_does(scene):
    bundle = a_bundle(pose_dim=3)
    shown = film(stream(bundle, scene, 5)).int()
    assert (naive_loop(bundle, scene, 5).int() - shown).abs().max() <= 1


@pytest.mark.parametrize(
    "history",
    [History(sinks=1, window=1, memory=2, memory_every=2), History(sinks=1, window=2, commit="same_level")],
    ids=str,
)
def test_the_plain_loop_refuses_a_history_that_it_does_not_know(history, scene):
    bundle = a_bundle(history)
    assert not can_run(bundle.spec)
    with pytest.raises(UserError, match=r"^plain loop: it knows no History"):
        naive_loop(bundle, scene, 3)


def test_the_bare_work_of_a_language_model_student(scene):
    """A plan and three steps, the same numbers again after the stream has gone on; no plain loop."""
    bundle = a_bundle(network=MIDAS)
    work = chunk_work(bundle, scene, 5)
    assert [call.func.__name__ for call in work.calls] == ["plan", "denoise", "denoise", "denoise"]
    assert not can_run(bundle.spec)
    with torch.inference_mode():
        first, again = (work.calls[-1]()[0] for _ in range(2))
    assert torch.equal(first, again)
    work.all()
    assert "plan" not in vars(bundle.student), "what was recorded is put back"
