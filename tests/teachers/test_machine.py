"""What a process may take of the host's memory: an equal share of what is free, within the control group's limit; and where bf16 is
not slower than fp32."""

from pathlib import Path

import pytest
import torch

from teachers import machine


def test_the_limit_of_a_control_group_counts_and_its_cached_files_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    free = machine._available()
    assert 0 < free < 2**50
    assert machine._left_of_limit(tmp_path) == 2**62, "no control group"
    for name, text in (
        ("memory.max", "max"),
        ("memory.current", "700"),
        ("memory.stat", "anon 5\ninactive_file 300\n"),
    ):
        (tmp_path / name).write_text(text)
    assert machine._left_of_limit(tmp_path) == 2**62
    (tmp_path / "memory.max").write_text("1000\n")
    assert machine.free_host_bytes() == 1000 - 700 + 300
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert machine.free_host_bytes() == 600 // 8


def test_a_cpu_works_on_as_many_clips_as_its_caches_hold_and_a_gpu_on_one_of_512x512():
    assert [machine.clips_at_once(31, 64, 64, device) for device in ("cpu", "cuda")] == [2, 264]
    assert [machine.clips_at_once(81, 512, 512, device) for device in ("cpu", "cuda")] == [1, 1]


@pytest.mark.skipif(torch.cuda.is_available() or not Path("/proc/cpuinfo").exists(), reason="of a CPU under Linux")
def test_a_cpu_computes_in_bf16_where_it_says_so_itself():
    """oneDNN has products of bf16 with any AVX-512, slower than those of fp32."""
    assert machine.multiplies_bf16() == ("avx512_bf16" in Path("/proc/cpuinfo").read_text().split())


def test_a_gpu_computes_in_bf16_unless_it_emulates(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for found, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True, found=found: including_emulation or found
        )
        assert machine.native_precision() == precision
