"""What a task took: time, processor time, peak memory above the idle process, and bytes read and written.

Memory and bytes come from /proc, so they are what the kernel saw, not what the task believes.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import socket
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_idle_bytes = 0  # of this worker process when its first task began


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Let this process keep up to 16 MiB that it has freed instead of giving it back and taking it anew: the pages of
    arrays that live for one batch cost more than what is done with them. Only glibc can be told so.
    """
    with contextlib.suppress(AttributeError, OSError):
        allocator = ctypes.CDLL(None)
        allocator.mallopt(_TRIM_THRESHOLD, 16 * 1024**2)
        allocator.mallopt(_MMAP_THRESHOLD, 8 * 1024**2)


class TaskMeter:
    """Begins to measure when it is made; `finish` tells. One at a time in a process."""

    def __init__(self) -> None:
        global _idle_bytes
        self._started, self._cpu_started = time.monotonic(), time.process_time()
        _reset_peak()
        self._io = _io_bytes()
        _idle_bytes = _idle_bytes or memory_bytes("VmRSS")

    def finish(self) -> dict[str, Any]:
        """host, seconds, cpu_seconds, peak_bytes above idle_bytes of resident memory, and what read and write calls
        moved (proc_read_bytes, proc_written_bytes; 0 where /proc does not tell).
        """
        read, written = (after - before for after, before in zip(_io_bytes(), self._io, strict=True))
        return {
            "host": socket.gethostname(),
            "seconds": time.monotonic() - self._started,
            "cpu_seconds": time.process_time() - self._cpu_started,
            "idle_bytes": _idle_bytes,
            "peak_bytes": max(0, memory_bytes("VmHWM") - _idle_bytes),
            "proc_read_bytes": read,
            "proc_written_bytes": written,
        }


def memory_bytes(name: str) -> int:
    """A line of /proc/self/status: VmRSS is the resident memory now, VmHWM its peak; 0 where there is none."""
    try:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def boot_id() -> str:
    """Names the time since this machine was started, "?" where it cannot be told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "?"


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts from VmRSS again
    except OSError:
        pass  # the peak is then that of the process so far: never too small


def _io_bytes() -> tuple[int, int]:
    try:
        found = re.findall(r"[rw]char: (\d+)", Path("/proc/self/io").read_text())
    except OSError:
        return 0, 0
    return int(found[0]), int(found[1])


def machine_bytes() -> int:
    """Memory of this machine, or of the container where that has less."""
    total = int(psutil.virtual_memory().total)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return total if limit == "max" else min(total, int(limit))
    except (OSError, ValueError):
        return total


def available_bytes() -> int:
    """Memory that this process may still take: what the machine has, and what its container allows."""
    free = psutil.virtual_memory().available
    try:
        limit, used = (
            Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current")
        )
        return free if limit == "max" else min(free, int(limit) - int(used) + _page_cache())
    except (OSError, ValueError):
        return free


def _page_cache() -> int:
    """What a container's memory holds of files, which gives way."""
    found = re.search(r"^inactive_file (\d+)", Path("/sys/fs/cgroup/memory.stat").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0
