"""What a run took, beside what was planned: bytes moved, core seconds, memory, and how near it came to the floor."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .estimate import Estimate

_GIGABYTE = 1e9


def account(
    planned: Estimate | None,
    stages: dict[str, list[dict[str, Any]]],
    input_bytes: int,
    workers: int,
    seconds: float,
) -> dict[str, Any]:
    """The figures for run.json. `stages`: the manifests of the tasks by stage. `bytes` are logical, from the tasks'
    own books; `proc_bytes` is what the kernel counted for the same tasks.
    """
    moved = {
        f"{stage}_{kind}": sum(result.get(f"{kind}_bytes", 0) for result in results)
        for stage, results in stages.items()
        for kind in ("read", "written")
    }
    total = sum(moved.values())
    proc = sum(
        result.get("proc_read_bytes", 0) + result.get("proc_written_bytes", 0)
        for results in stages.values()
        for result in results
    )
    found: dict[str, Any] = {
        "seconds": seconds,
        "bytes": moved | {"total": total, "per_input_byte": total / max(1, input_bytes)},
        "proc_bytes": proc,
        "stages": {name: _stage(results, input_bytes) for name, results in stages.items() if results},
    }
    if planned is not None:
        disk = total / planned.disk_bytes_per_second if planned.disk_bytes_per_second > 0 else 0.0
        floor = max(disk, planned.encode_seconds / workers)
        found |= {
            "planned": planned.to_json(),
            "floor_seconds": floor,
            "efficiency": floor / max(seconds, 1e-9),
        }
    return found


def _stage(results: list[dict[str, Any]], input_bytes: int) -> dict[str, Any]:
    core_seconds = sum(result["cpu_seconds"] for result in results)
    return {
        "tasks": len(results),
        "taken_over": sum("taken_over" in result for result in results),
        "hosts": dict(sorted(Counter(result.get("host", "?") for result in results).items())),
        "core_seconds": core_seconds,
        "core_seconds_per_gb": core_seconds / max(1, input_bytes) * _GIGABYTE,
        "peak_bytes": max(result["peak_bytes"] for result in results),
        "idle_bytes": max(result["idle_bytes"] for result in results),
    }


def compared(run: dict[str, Any], output_bytes: int) -> list[str]:
    """Planned against actual, a line each."""
    planned = run.get("planned")
    if not planned:
        return []
    peak = max((stage["peak_bytes"] for stage in run["stages"].values()), default=0)
    spill = sum(run["bytes"].get(name, 0) for name in ("scatter_written", "merge_written"))
    rows = (
        ("time", planned["seconds"], run["seconds"], 1, "s"),
        ("intermediate files", planned["spill_bytes"] * (planned["passes"] - 1), spill, 1e6, "MB"),
        ("output", planned["output_bytes"], output_bytes, 1e6, "MB"),
        ("bytes moved", planned["moved_bytes"], run["bytes"]["total"], 1e6, "MB"),
        ("worker, above idle", planned["worker_bytes"] - planned["idle_worker_bytes"], peak, 1e6, "MB"),
    )
    lines = [
        f"{what}: planned {a / unit:,.1f} {name}, was {b / unit:,.1f} {name}"
        for what, a, b, unit, name in rows
    ]
    return [
        *lines,
        f"floor {run['floor_seconds']:,.1f} s (disk, encoding), efficiency {run['efficiency']:.0%}",
    ]
