"""Signs of life of every rank, and requests to them, through small files in the run folder.

    heartbeats/rank-00003.json   {"rank", "host", "pid", "phase", "step", "beats", "time"}: what this rank does, since
    when
    heartbeats/request           "NUMBER TERM|USR1|KILL MARK": the supervisor asks the ranks that it started (without a
    mark: all), on whatever host they are

A launcher hands no signals down, least of all to other hosts; the run folder is what all ranks share. A thread of each
rank writes and reads once a second, so the training loop only sets two fields. The thread also runs while the main
thread waits in a collective: a rank that hangs still obeys KILL. On the supervisor's host it also notices when the
supervisor was killed, and then has the run write a checkpoint and stop: what nobody looks after would be in the way of
the next one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

FOLDER = "heartbeats"
INTERVAL_SECONDS = 1.0
REQUESTS = {"TERM": signal.SIGTERM, "USR1": signal.SIGUSR1}
EXIT_KILLED = 137
MARK = "PYTHON_SUTRAIN_SUPERVISED"
"""Name of the environment variable with which a supervisor marks what it started, as "WORD@HOST". DeepSpeed's launcher
hands names that begin with PYTHON on to the ranks that it starts by ssh, and few others."""
SUPERVISOR_LOCK = ".supervise.lock"
"""In the run folder, held by the supervisor for as long as it lives."""


@dataclass(frozen=True)
class Beat:
    """What one rank said last. `time` is when it entered the phase, in unix seconds of its host."""

    rank: int
    host: str
    pid: int
    phase: str
    step: int
    beats: int
    time: float


class Heart:
    """The heart of one rank; `beat` costs two assignments, the files are written by a thread."""

    def __init__(self, folder: Path, rank: int, marks: Collection[str] = ()):
        self.folder, self.rank, self.marks = folder, rank, marks
        self._said = ("starting", 0, 0, time.time())
        self._written = -1
        self._seen = _request_number(folder)  # one made before this rank began is not meant for it
        self._stop = threading.Event()
        # Another host may have got the mark with its environment, and its file system may not tell of our locks.
        own = os.environ.get(MARK, "")
        self._supervised = own in marks and own.rpartition("@")[2] == socket.gethostname()

    def start(self) -> None:
        """Begin to write and to listen; also lets SIGUSR2 print where every thread stands."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(ValueError, AttributeError):  # where stderr is no real file
            faulthandler.register(signal.SIGUSR2, all_threads=True)
        self._write()
        threading.Thread(target=self._live, name="heartbeat", daemon=True).start()

    def beat(self, phase: str, step: int) -> None:
        self._said = (phase, step, self._said[2] + 1, time.time())

    def stop(self) -> None:
        self._stop.set()

    def _live(self) -> None:
        while not self._stop.wait(INTERVAL_SECONDS):
            # A file system that fails for a while must not end a run that trains.
            with contextlib.suppress(OSError):
                self._write()
            self._obey()
            if self._supervised and _is_free(self.folder.parent / SUPERVISOR_LOCK):
                self._supervised = False
                os.kill(os.getpid(), signal.SIGTERM)
                with contextlib.suppress(OSError):  # its pipe or terminal may be gone with it
                    print(
                        "the supervisor is gone: the run stops with a checkpoint", file=sys.stderr, flush=True
                    )

    def _write(self) -> None:
        phase, step, beats, since = self._said
        if beats == self._written:
            return
        content = Beat(self.rank, socket.gethostname(), os.getpid(), phase, step, beats, since)
        file = self.folder / f"rank-{self.rank:05d}.json"
        temporary = file.with_suffix(".part")
        temporary.write_text(json.dumps(vars(content)))
        temporary.rename(file)
        self._written = beats

    def _obey(self) -> None:
        number, what, mark = _request(self.folder)
        if number == self._seen:
            return
        self._seen = number
        if mark and mark not in self.marks:  # meant for the ranks of another supervisor
            return
        if what == "KILL":
            os._exit(EXIT_KILLED)
        if what in REQUESTS:
            os.kill(os.getpid(), REQUESTS[what])


def _is_free(lock: Path) -> bool:
    """Is this lock there, and held by nobody? Not to be known is no."""
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # BlockingIOError: held
        return False
    return True


_heart: Heart | None = None


def start(run_dir: Path, rank: int, marks: Collection[str] = ()) -> None:
    """Begin this process's heartbeat in `run_dir`; `marks` are those of the supervisors that it obeys."""
    global _heart
    stop()
    _heart = Heart(run_dir / FOLDER, rank, marks)
    _heart.start()


def beat(phase: str, step: int) -> None:
    """Say what this process begins to do now; nothing happens in a process without a heart."""
    if _heart is not None:
        _heart.beat(phase, step)


def stop() -> None:
    if _heart is not None:
        _heart.stop()


def read_beats(run_dir: Path) -> list[Beat]:
    """What all ranks said last, also those of earlier starts."""
    beats = []
    for file in sorted((run_dir / FOLDER).glob("rank-*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            beats.append(Beat(**json.loads(file.read_text())))
    return beats


def request(run_dir: Path, what: str, mark: str = "") -> None:
    """Ask the ranks with this mark, or all: TERM (checkpoint and stop), USR1 (checkpoint and go on), KILL (end at
    once)."""
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "request.part"
    temporary.write_text(f"{time.time_ns()} {what} {mark}\n")
    temporary.rename(folder / "request")


def _request(folder: Path) -> tuple[int, str, str]:
    try:
        number, what, *mark = (folder / "request").read_text().split()
        return int(number), what, mark[0] if mark else ""
    except (OSError, ValueError):
        return 0, "", ""


def _request_number(folder: Path) -> int:
    return _request(folder)[0]
