"""What a process may take of the host's memory: an equal share of what is free, within the control group's limit."""

from teachers import memory


def test_the_limit_of_a_control_group_counts_and_its_cached_files_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    free = memory._available()
    assert 0 < free < 2**50
    assert memory._left_of_limit(tmp_path) == 2**62, "no control group"
    for name, text in (
        ("memory.max", "max"),
        ("memory.current", "700"),
        ("memory.stat", "anon 5\ninactive_file 300\n"),
    ):
        (tmp_path / name).write_text(text)
    assert memory._left_of_limit(tmp_path) == 2**62
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory.free_host_bytes() == 1000 - 700 + 300
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert memory.free_host_bytes() == 600 // 8
