"""Runs for benchmarks/data_prep.py: measured from start to end, or killed, started again and followed to their end
while every task that they execute is counted.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_QUIET: dict[str, Any] = {
    "stderr": subprocess.DEVNULL,
    "stdout": subprocess.DEVNULL,
    "start_new_session": True,
}


def measured(
    command: list[str], fresh: Path | None = None, standard: tuple[Path, Path] | None = None, **kwargs: Any
):
    """(seconds, core seconds) of a command; `standard` names the files for its input and output, which is synced."""
    if fresh is not None:
        shutil.rmtree(fresh, ignore_errors=True)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    kwargs |= {"stderr": subprocess.PIPE, "cwd": ROOT}
    if standard is None:
        result = subprocess.run(command, stdout=subprocess.PIPE, **kwargs)
    else:
        with standard[0].open("rb") as source, standard[1].open("wb") as target:
            result = subprocess.run(command, stdin=source, stdout=target, **kwargs)
            os.fsync(target.fileno())
    if result.returncode:
        sys.exit(f"{' '.join(command)}\n{result.stderr.decode()[-2000:]}")
    seconds = time.perf_counter() - started
    with suppress(ChildProcessError):  # orphans of the command come to us, and their time with them
        while os.waitpid(-1, 0):
            pass
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class Watch:
    """The manifests of tasks below OUTPUT/.work as they come: a task that is executed writes its own anew, so every
    execution is another (path, inode, time). They are removed when the run has ended, so they are looked for while it
    works.
    """

    def __init__(self, output: Path) -> None:
        self._output, self.seen = output, manifests(output)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.003):
            self.seen |= manifests(self._output)


def manifests(output: Path) -> set[tuple[str, int, int]]:
    """(path below the stage's folder, inode, modification time) of the manifest of every finished task."""
    found = set()
    for path in output.glob(".work/*/*/*.json"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        found.add((f"{path.parent.name}/{path.name}", status.st_ino, status.st_mtime_ns))
    return found


def count_repeats(command: list[str], output: Path, finished: int) -> dict[str, int]:
    """Kill -9 a run (driver and workers) a little after its `finished`-th task of pass 1, run it again to its end, and
    count. `repeated`: tasks begun or finished before the kill and executed again.
    """
    shutil.rmtree(output, ignore_errors=True)
    process = subprocess.Popen(command, cwd=ROOT, **_QUIET)
    while process.poll() is None and len(list(output.glob(".work/*/scatter/task-*.json"))) < finished:
        time.sleep(0.01)
    time.sleep(0.3 * finished)
    if process.poll() is not None:
        sys.exit(f"the run ended before it was killed (exit code {process.returncode}): {' '.join(command)}")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = manifests(output)
    complete = {name for name, _, _ in before}
    temporary = {path.name.split(".")[0] for path in output.glob(".work/*/scatter/*.tmp-*")}
    begun = {f"scatter/{name}.json" for name in temporary} - complete
    with Watch(output) as watch:
        subprocess.run(command, cwd=ROOT, check=True, **_QUIET)
    executed = [name for name, _, _ in watch.seen - before]
    stages = json.loads((output / "run.json").read_bytes())["stages"]
    told = sum(stage["tasks"] - stage["taken_over"] for stage in stages.values())
    if told != len(executed):
        sys.exit(f"{len(executed)} tasks were seen to end after the kill, the run tells of {told}")
    return {
        "finished_before": len(before),
        "begun_before": len(begun),
        "executed_after": len(executed),
        "tasks": sum(stage["tasks"] for stage in stages.values()),
        "repeated": sum(name in complete or name in begun for name in executed),
    }
