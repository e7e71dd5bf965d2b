"""What is free of the host's memory."""

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def free_host_bytes() -> int:
    """Bytes of memory that one of this machine's processes of a run (LOCAL_WORLD_SIZE) may take: an equal share of what Linux calls
    available, and of what is left of the control group's limit."""
    free = min(_available(), _left_of_limit(CGROUP))
    return free // max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def _available() -> int:
    return 1024 * _number(Path("/proc/meminfo"), "MemAvailable:", 2**52)


def _left_of_limit(group: Path) -> int:
    """2**62 without a limit. Cached files, which are given back when memory is short, do not count as used."""
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return 2**62 if limit == "max" else int(limit) - int(used) + _number(group / "memory.stat", "inactive_file", 0)
    except (OSError, ValueError):
        return 2**62


def _number(file: Path, name: str, otherwise: int) -> int:
    """The number beside `name` in a file of lines."""
    try:
        rows = (line.split() for line in file.read_text().splitlines())
        return next(int(row[1]) for row in rows if row[:1] == [name])
    except (OSError, StopIteration, ValueError, IndexError):
        return otherwise
