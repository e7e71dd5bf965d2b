"""The one command for a machine with a GPU: its code at a tiny size here, and what becomes of parts that fail or hang."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_parts import tiny
from benchmarks.gpu_parts.equality import equality
from benchmarks.gpu_parts.skipped import SkippedError
from distill.commands import bench

MIB = 1 / 1024  # of a GiB
RECIPES = ("livetalk", "omniavatar_one_gpu")  # whole networks, and LoRA roles over one
PARTS = ("equality", *(f"size.{name}" for name in RECIPES), "bench.livetalk", "tests")
QUICK = ["--device", "cpu", "--quick", "--parts", *PARTS, "--out"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setattr(torch.cuda, "is_available", lambda: False)
        ceiling = bench.roofline.matmul_ceiling
        patch.setattr(bench.roofline, "matmul_ceiling", lambda device, dtype, *_: ceiling(device, dtype, (256,), 0.02))
        assert gpu.main([*QUICK, str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_every_part_runs_or_says_why_not(quick):
    found = json.loads((quick / "gpu.json").read_text())
    assert {"device", "torch", "revision", "versions", "cores"} <= set(found)
    status = {name: part["status"] for name, part in found["parts"].items()}
    assert status.pop("equality") == "ok"
    assert {status.pop(f"size.{name}") for name in RECIPES} == {"ok"}
    assert status.pop("bench.livetalk.eager") == status.pop("bench.livetalk.eager.4_layers") == "ok"
    assert len(status) == 4
    assert set(status.values()) == {"skipped: no CUDA"}
    page = (quick / "gpu.md").read_text()
    for line in (
        "| teacher forward | 0.0e+00",
        "| livetalk distill.student |",
        "- tests: skipped: no CUDA",
        found["torch"],
    ):
        assert line in page


@pytest.mark.slow
def test_the_plan_of_every_update_is_what_it_takes(quick):
    """But for the tables of positions, which each network has and a plan does not count: at real width nothing."""
    parts = json.loads((quick / "gpu.json").read_text())["parts"]
    for name in RECIPES:
        updates = parts[f"size.{name}"]["result"]["updates"]
        solver = "teacher" if name == "omniavatar_one_gpu" else "base"
        assert list(updates) == [f"trajectories.{solver}", "init.student", "distill.student", "distill.fake_score"]
        for update in updates.values():
            assert -0.02 * update["planned_gib"] < update["measured_gib"] - update["planned_gib"] < 0.6 * MIB
            assert update["tflops"] * update["seconds"] == pytest.approx(update["tflop"])


@pytest.mark.slow
def test_what_is_done_is_not_done_again(quick, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(gpu, "attempt", lambda part, *_: pytest.fail(f"{part.name} ran again"))
    before = (quick / "gpu.json").read_text()
    assert gpu.main([*QUICK, str(quick)]) == 0
    assert json.loads((quick / "gpu.json").read_text())["parts"] == json.loads(before)["parts"]
    monkeypatch.setattr(gpu, "machine", lambda *_: {**json.loads(before), "revision": "another"})
    with pytest.raises(pytest.fail.Exception, match="equality ran again"):
        gpu.main([*QUICK, str(quick)])


def test_a_part_that_fails_or_hangs_is_one_line(tmp_path):
    file, log = tmp_path / "part.json", tmp_path / "part.log"

    def run(code: str, seconds: float = 20) -> dict:
        return gpu.in_process_of_its_own([sys.executable, "-S", "-c", code], seconds, file, log)

    assert run("import time; time.sleep(60)", 0.3)["status"] == "failed: over 0.3 s"
    assert run("raise ValueError('no such kernel')")["status"] == "failed: ValueError: no such kernel (exit 1)"
    assert run("import os; os.abort()")["status"] == "failed: no word (exit -6)"
    assert run(f"open({str(file)!r}, 'w').write('[1]')") == [1]
    (part,) = (part for part in gpu.parts(True) if part.name == "equality")

    def broken(*_):
        raise RuntimeError("CUDA error: an illegal\nmemory access")

    found = gpu.attempt(replace(part, run=broken), "cpu", True, tmp_path)
    assert (found["status"], found["result"]) == ("failed: memory access", {})
    wrong = gpu.attempt(replace(part, run=lambda *_: {"fault": "not equal: a", "cases": {}}), "cpu", True, tmp_path)
    assert (wrong["status"], wrong["result"]["cases"]) == ("failed: not equal: a", {})


def test_a_tiny_run_gives_the_seconds_of_its_stages(tmp_path, monkeypatch):
    def run(recipe):
        seen.append(recipe)
        Path(recipe.run_dir).mkdir(parents=True)
        report = {"stages": {"data": {"seconds": 1.0}}, "systems": {"student": {}}}
        (Path(recipe.run_dir) / "report.json").write_text(json.dumps(report))

    seen: list = []
    monkeypatch.setattr(tiny, "run", run)
    found = tiny.tiny("livetalk", "fsdp2", torch.device("cuda"), tmp_path)
    assert found == {"precision": "bf16", "stages": {"data": 1.0}, "systems": ["student"]}
    assert (seen[0].tiny, seen[0].engine.kind, seen[0].engine.precision) == (True, "fsdp2", "bf16")
    assert not list((tmp_path / "runs").iterdir())
    with pytest.raises(SkippedError, match="LoRA roles share weights, which zero3 shards"):
        tiny.tiny("omniavatar_one_gpu", "zero3", torch.device("cuda"), tmp_path)
    assert len(seen) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_computes_what_the_cpu_does():
    assert all(case["equal"] for case in equality(torch.device("cuda")).values())
