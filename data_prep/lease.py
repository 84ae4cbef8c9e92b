"""One owner of an output at a time: a lease with a heartbeat, and a fencing number in front of every commit.

    OUTPUT/.owner/000007.json   who the seventh owner is; made with O_EXCL, so a number is given out once
    OUTPUT/.owner/000007.beat   its heartbeat, a number that grows; "end" when it let go

A newcomer that finds a beating owner is refused. An owner that ended, whose process is gone from this machine, or
whose heart stood still for the length of a lease is followed by the next number. File locks would not do: a
stopped process holds its lock for ever, and not every shared file system has them. Clocks are not compared between
machines; the newcomer watches the heart with its own.

An owner that was only paused may wake after it was followed. So every file is renamed to its final name only after
a look whether a higher number exists (`Fence.check`, called by `files.atomic_file` in the driver and in every
worker); see Kleppmann, "How to do distributed locking" (2016), on fencing tokens. Between that look and the rename
nothing but a stop inside two system calls can come; what would be written then are the bytes that the follower
writes too, as tasks are functions of the plan.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DataPrepError, LostLeaseError
from .files import disk_errors, set_fence

_FOLDER = ".owner"
_BEATS_A_LEASE = 4


@dataclass(frozen=True)
class Fence:
    """The right of owner `number` to write below a folder; travels with every task."""

    folder: str
    number: int

    def check(self) -> None:
        """Raises LostLeaseError when a later owner has taken over."""
        latest = max(_numbers(Path(self.folder)), default=0)
        if latest != self.number:
            who = (
                "nobody (its folder was removed)"
                if latest < self.number
                else _describe(Path(self.folder), latest)
            )
            raise LostLeaseError(
                f"{Path(self.folder).parent}: this run was paused or cut off so long that its work was taken over by "
                f"{who}; nothing more is written by it"
            )


@contextmanager
def owned(output: Path, lease_seconds: float, say: Callable[[str], None] = print) -> Iterator[Fence]:
    """Own an output as long as the block runs; writes of this process are fenced meanwhile.

    Raises DataPrepError while another run owns it, naming that run. Waits up to `lease_seconds` to see whether an
    owner that cannot be asked is alive.
    """
    folder = output / _FOLDER
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    number = _take(folder, lease_seconds, say)
    fence = Fence(str(folder), number)
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(fence, lease_seconds, ended), daemon=True)
    heart.start()
    set_fence(fence)
    try:
        yield fence
    except (OSError, DataPrepError) as error:
        if not isinstance(error, LostLeaseError):
            fence.check()  # a follower has cleared away what was missed here: being followed is the reason to give
        raise
    finally:
        set_fence(None)
        ended.set()
        heart.join()
        with suppress(
            OSError
        ):  # what ended the run is to be told; the next one sees that the process is gone
            if max(_numbers(folder), default=0) == number:
                _beat_path(folder, number).write_text("end")


def _take(folder: Path, lease_seconds: float, say: Callable[[str], None]) -> int:
    latest = max(_numbers(folder), default=0)
    if latest and not _is_over(folder, latest):
        begun = _read(_beat_path(folder, latest))
        say(
            f"{folder.parent}: looking for up to {lease_seconds:.0f} s whether {_describe(folder, latest)} is alive"
        )
        deadline = time.monotonic() + lease_seconds
        while time.monotonic() < deadline:
            time.sleep(min(0.2, lease_seconds / 10))
            now = _read(_beat_path(folder, latest))
            if now != begun and now != "end":
                raise DataPrepError(
                    f"{folder.parent}: another run is at work there ({_describe(folder, latest)})"
                )
            if now == "end" or _is_over(folder, latest):
                break
    number = latest + 1
    with disk_errors(folder):
        _beat_path(folder, number).write_text("0")
        try:
            with open(folder / f"{number:06d}.json", "x") as file:
                json.dump(_me(), file)
        except FileExistsError:
            raise DataPrepError(
                f"{folder.parent}: another run is at work there ({_describe(folder, number)})"
            ) from None
    for old in _numbers(folder):
        if old < number:
            _beat_path(folder, old).unlink(missing_ok=True)
            (folder / f"{old:06d}.json").unlink(missing_ok=True)
    return number


def _beat(fence: Fence, lease_seconds: float, ended: threading.Event) -> None:
    folder, count = Path(fence.folder), 0
    while not ended.wait(lease_seconds / _BEATS_A_LEASE):
        count += 1
        try:
            if max(_numbers(folder), default=0) != fence.number:
                return  # taken over; the next write says so
            _beat_path(folder, fence.number).write_text(str(count))
        except OSError:
            continue  # a full or absent disk: if it lasts, the lease ends


def _is_over(folder: Path, number: int) -> bool:
    """Is it certain that this owner is gone: it said so, or its process is no more on this machine?"""
    if _read(_beat_path(folder, number)) == "end":
        return True
    owner, me = _owner(folder, number), _me()
    if not owner or any(owner.get(key) != me[key] for key in ("host", "boot", "process_space")):
        return False
    return _birth(int(owner["process"])) != owner["birth"]


def _me() -> dict[str, Any]:
    """Who this run is, so that it can be named, and found again on this machine."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = space = ""
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "job": os.environ.get("RAY_JOB_SUBMISSION_ID") or os.environ.get("RAY_JOB_ID") or "",
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        "boot": boot,
        "process_space": space,
        "birth": _birth(os.getpid()),
    }


def _birth(process: int) -> str:
    """When a process began, in ticks since the machine did; "" when there is none, or only its ashes."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _describe(folder: Path, number: int) -> str:
    owner = _owner(folder, number)
    job = f", job {owner['job']}" if owner.get("job") else ""
    return (
        f"host {owner.get('host', '?')}, process {owner.get('process', '?')}{job}, since "
        f"{owner.get('started', '?')} UTC, owner number {number}"
    )


def _owner(folder: Path, number: int) -> dict[str, Any]:
    try:
        found = json.loads((folder / f"{number:06d}.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _numbers(folder: Path) -> list[int]:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return [int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit()]


def _beat_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.beat"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
