"""`distill bench`: the table and its JSON, and students of published shape with random weights."""

import argparse
import json
import os
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from distill.commands import bench
from eval.speed.latency import Took
from students.history import History
from students.serving.optimize import Speed
from students.serving.session import Session, Starved
from students.weights.checkpoint import make_student, save_student
from teachers.encoders.small import TextConfig
from teachers.errors import UserError
from teachers.networks.wan import NetworkConfig
from tests.support.tiny import a_bundle, make_spec, some_sound
from tests.teachers.media.test_media import encode_audio, tone

CPU = torch.device("cpu")
SMALL = {
    "height": 32,
    "width": 48,
    "network": NetworkConfig(num_layers=2, num_heads=2, head_dim=16, ffn_dim=64, audio_hidden=8, audio_blocks=(1,)),
    "text": TextConfig(dim=24, max_tokens=7),
    "audio_dim": 40,
    "decoder_widths": (16, 8, 8, 8),
    "encoder_width": 8,
}


@pytest.fixture(autouse=True)
def a_quick_ceiling(monkeypatch):
    monkeypatch.setattr(
        bench.roofline, "matmul_ceiling", partial(bench.roofline.matmul_ceiling, sizes=(256,), seconds=0.02)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "student"
    save_student(path, a_bundle(), "a card\n")
    return path


def parse(*words) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def run(folder, out, *words) -> dict:
    assert bench.run(parse("--student", folder, "--json", out, "--chunks", 6, "--rounds", 3, *words)) == 0
    return json.loads(out.read_text(encoding="utf-8"))


def fits(ratio: dict, above: dict, below: dict, less: float = 0.0) -> None:
    """A spread of ratios lies within what the spreads of both allow."""
    for name in ("seconds", "cpu_seconds"):
        low, high = above[name]["min"] / below[name]["max"], above[name]["max"] / below[name]["min"]
        assert (
            low - 1e-9
            <= ratio[name]["min"] + less
            <= ratio[name]["median"] + less
            <= ratio[name]["max"] + less
            <= high + 1e-9
        )


def test_the_numbers_fit_together(folder, tmp_path, capsys):
    out = tmp_path / "bench.json"
    r = run(folder, out)
    assert (r["threads"], r["dtype"], r["nfe_per_chunk"], r["left_out"]) == (1, "fp32", 4, [])
    assert (r["compile"], r["attention"], r["quantize"]) == ("none", "native", "none")
    assert (r["chunks"], r["rounds"], r["chunk_frames"], r["stalls_of"]) == (6, 3, 4, 18)
    assert set(r["ttff"]) == {"open", "wait", "encode", "denoise", "decode"}
    assert 0 < r["ttff"]["denoise"] < sum(r["ttff"].values())
    assert r["ttff_seconds"] > 0
    assert 0 < r["p50_chunk_seconds"] <= r["p95_chunk_seconds"] <= r["p99_chunk_seconds"]
    assert r["real_time_factor"] * r["fps"] == pytest.approx(12.5)
    assert r["per_chunk"]["seconds"]["median"] * 6 * r["fps"] == pytest.approx(23)
    assert 50 * 2**20 < r["peak_memory_bytes"] < 50 * 2**30
    work, seconds = sum(r["flops_per_chunk"].values()), r["full_chunk"]["seconds"]["median"]
    assert r["roofline_fraction"] == pytest.approx(work / seconds / r["matmul_flops_per_second"])
    assert 0 < r["roofline_fraction"] < 1
    fits(r["overhead_network"], r["full_chunk"], r["network"], less=1)
    fits(r["overhead_all"], r["full_chunk"], r["network_encoders_codec"], less=1)
    assert {"python", "torch"} <= set(r["versions"])
    shown = capsys.readouterr().out
    assert r["device"] in shown
    for word in (
        "first frame",
        "real-time factor",
        "stalls",
        "peak memory",
        "roofline",
        "overhead",
    ):
        assert word in shown
    assert os.listdir(tmp_path) == ["bench.json"]


def test_numbers_are_of_the_right_chunks(folder, tmp_path, monkeypatch):
    """Streams whose step i took i + 1 seconds, opened in a quarter of one: the last three of six have a full context."""
    real = bench.latency.stream

    def stream(*inputs, **named):
        run = real(*inputs, **named)
        steps = tuple(Took(i + 1.0, i + 2.0) for i in range(len(run.steps)))
        return replace(run, opening=0.25, steps=steps, took=Took(24.0, 48.0))

    monkeypatch.setattr(bench.latency, "stream", stream)
    r = run(folder, tmp_path / "bench.json")
    assert r["full_chunk"]["seconds"] == {"median": 5.0, "min": 5.0, "max": 5.0}
    assert r["full_chunk"]["cpu_seconds"]["median"] == 6.0
    assert r["per_chunk"]["seconds"]["median"] == 4.0
    assert r["per_chunk"]["cpu_seconds"]["median"] == 8.0
    assert [r[f"p{p}_chunk_seconds"] for p in (50, 95, 99)] == [3.0, 6.0, 6.0]
    assert r["ttff_seconds"] == 1.25
    assert r["ttff"]["open"] == 0.25
    assert r["real_time_factor"] == pytest.approx(24 / (23 / 12.5))
    assert r["stalls"] == 18


def test_a_history_without_a_context_pass_and_a_given_sound(tmp_path):
    folder, out = tmp_path / "student", tmp_path / "bench.json"
    save_student(folder, a_bundle(History(sinks=1, window=2, commit="same_level")), "a card\n")
    wav = encode_audio(tmp_path / "short.wav", "pcm_f32le", "flt", 24000, [tone(0.3, 24000)])
    r = run(folder, out, "--audio", wav)
    assert r["nfe_per_chunk"] == 3


def test_bf16_is_computed_in(folder, tmp_path, monkeypatch):
    seen, real = [], bench.roofline.matmul_ceiling

    def ceiling(device, dtype):
        seen.append(dtype)
        return real(device, dtype)

    monkeypatch.setattr(bench.roofline, "matmul_ceiling", ceiling)
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, out: seen.append(out.dtype) if isinstance(module, torch.nn.GELU | torch.nn.Conv3d) else None
    )
    r = run(folder, tmp_path / "bench.json", "--dtype", "bf16")
    hook.remove()
    assert r["dtype"] == "bf16"
    assert len(seen) > 100
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize(("speed", "late"), [(1e4, 18), (1e-4, 0)])
def test_a_late_chunk_is_a_stall(folder, tmp_path, monkeypatch, speed, late):
    """On a clock that runs ten thousand times as fast every chunk is late, on a slow one none."""
    threads, real = [], time.perf_counter
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(bench.roofline, "matmul_ceiling", lambda *_: 1e9)
    monkeypatch.setattr(time, "perf_counter", lambda: speed * real())
    assert run(folder, tmp_path / "bench.json", "--threads", 2)["stalls"] == late
    assert threads == [2, 1]


def test_a_scene_is_long_enough_and_reproducible():
    spec = make_spec()
    scene, again = (bench.make_scene(spec, 7) for _ in range(2))
    assert torch.equal(scene.sound, again.sound)
    assert torch.equal(scene.reference, again.reference)
    assert len(scene.sound) >= spec.pixel_frames(6)[1] * spec.samples_per_frame + 200
    assert scene.sound.abs().max() > 0.05
    given = some_sound(5000)
    assert torch.equal(bench.make_scene(spec, 7, given).sound[5000:10000], given)


@pytest.mark.parametrize("name", ["livetalk", "480x832"])
def test_shapes_are_the_published_sizes(name):
    """Wan 2.1 1.3B has 1.42e9 parameters; OmniAvatar's audio pack takes 4 x 10752 features, its input 33 channels."""
    spec = bench.SHAPES[name].spec
    with torch.device("meta"):
        net = make_student(spec).net
    count = sum(parameter.numel() for parameter in net.parameters())
    assert 1.41e9 < count < 1.43e9
    assert net.patch_embedding.weight.shape == (1536, 33, 1, 2, 2)
    assert net.audio_proj.proj.weight.shape == (32, 43008)
    assert len(net.audio_cond_projs) == 14
    assert net.condition_embedder.text_embedder.linear_1.in_features == 4096
    assert spec.sigmas == pytest.approx((1.0, 0.9375, 0.8333333, 0.625))
    assert (spec.nfe_per_chunk, spec.pixel_frames(0), spec.pixel_frames(1)) == (5, (0, 9), (9, 21))
    window = (spec.history.capacity + 1) * spec.chunk_frames
    expected = {"livetalk": ((16, 64, 64), 15), "480x832": ((16, 60, 104), 21)}
    assert (spec.latent_size, window) == expected[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "name"), [*((torch.float32, name) for name in bench.SHAPES), (torch.bfloat16, "livetalk")], ids=str
)
def test_a_small_one_of_the_same_structure_streams(name, dtype):
    shape = replace(bench.SHAPES[name], **SMALL)
    bundle = bench.random_student(shape, CPU, dtype)
    assert torch.get_default_dtype() == torch.float32
    matrices = [m.weight.dtype for m in bundle.student.net.blocks.modules() if isinstance(m, torch.nn.Linear)]
    assert len(matrices) == 2 * 10
    assert {*matrices, bundle.student.net.compute_dtype} == {dtype}
    assert bundle.student.net.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert {parameter.dtype for parameter in bundle.codec.parameters()} == {dtype}
    scene = bench.make_scene(bundle.spec, 9)
    frames = {}
    for seed in (0, 1):
        session = Session(bundle, scene.reference, scene.text, seed)
        session.push(scene.sound)
        chunks = [session.step() for _ in range(9)]
        assert not any(isinstance(chunk, Starved) for chunk in chunks)
        frames[seed] = torch.cat([chunk.frames for chunk in chunks])
    assert frames[0].shape == (9 + 8 * 12, 32, 48, 3)
    assert frames[0].float().std() > 1
    assert not torch.equal(frames[0], frames[1])
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    result = bench.bench(bundle, scene, 9, 1, CPU, Speed(dtype=name))
    assert set(result["flops_per_chunk"]) == {"network", "encoders", "decode"}
    assert result["flops_per_chunk"]["decode"] > 0


def test_the_shape_option_reports_what_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.SHAPES, "livetalk", replace(bench.SHAPES["livetalk"], **SMALL))
    out = tmp_path / "bench.json"
    words = ("--shape", "livetalk", "--json", out, "--chunks", 6, "--rounds", 1, "--device", "cpu")
    assert bench.run(parse(*words)) == 0
    r = json.loads(out.read_text())
    assert r["left_out"] == ["audio encoder", "text encoder"]
    assert (r["student"], r["dtype"], r["nfe_per_chunk"]) == ("livetalk, random weights", "fp32", 5)
    assert "not included: audio encoder, text encoder" in capsys.readouterr().out


def test_mistakes_are_one_line_and_leave_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "load_student", lambda _: pytest.fail("the student was loaded"))
    out = tmp_path / "bench.json"
    empty = tmp_path / "none.wav"
    for words, says in [
        (("--chunks", 1), "--chunks: got 1"),
        (("--rounds", 0), "--rounds: got 0"),
        (("--threads", 0), "--threads: got 0"),
        (("--audio", empty), "none.wav"),
        (("--json", tmp_path), "--json is a folder"),
        (("--device", "cuda:99"), "device cuda:99 cannot be used"),
        (("--json", tmp_path / "none" / "bench.json"), "no folder to write in"),
    ]:
        with pytest.raises(UserError, match=rf"^[^\n]*{says}[^\n]*$"):
            bench.run(parse("--student", folder, "--json", out, *words))
    with pytest.raises(SystemExit):
        parse("--json", out)
    with pytest.raises(SystemExit):
        parse("--json", out, "--student", folder, "--shape", "livetalk")
    assert os.listdir(tmp_path) == []
