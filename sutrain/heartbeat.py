"""Signs of life of every rank, and requests to them, through small files in the run folder.

    heartbeats/rank-00003.json   {"rank", "host", "pid", "phase", "step", "beats", "time"}: what this rank does, since
    when
    heartbeats/request           "NUMBER TERM|USR1|KILL": the supervisor asks all ranks, on whatever host they are

A launcher hands no signals down, least of all to other hosts; the run folder is what all ranks share. A thread of each
rank writes and reads once a second, so the training loop only sets two fields. The thread also runs while the main
thread waits in a collective: a rank that hangs still obeys KILL.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

FOLDER = "heartbeats"
INTERVAL_SECONDS = 1.0
REQUESTS = {"TERM": signal.SIGTERM, "USR1": signal.SIGUSR1}
EXIT_KILLED = 137


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

    def __init__(self, folder: Path, rank: int):
        self.folder, self.rank = folder, rank
        self._said = ("starting", 0, 0, time.time())
        self._written = -1
        self._seen = _request_number(folder)  # one made before this rank began is not meant for it
        self._stop = threading.Event()

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
        number, what = _request(self.folder)
        if number == self._seen:
            return
        self._seen = number
        if what == "KILL":
            os._exit(EXIT_KILLED)
        if what in REQUESTS:
            os.kill(os.getpid(), REQUESTS[what])


_heart: Heart | None = None


def start(run_dir: Path, rank: int) -> None:
    """Begin this process's heartbeat in `run_dir`."""
    global _heart
    stop()
    _heart = Heart(run_dir / FOLDER, rank)
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


def request(run_dir: Path, what: str) -> None:
    """Ask all ranks that live now: TERM (checkpoint and stop), USR1 (checkpoint and go on), KILL (end at once)."""
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "request.part"
    temporary.write_text(f"{time.time_ns()} {what}\n")
    temporary.rename(folder / "request")


def _request(folder: Path) -> tuple[int, str]:
    try:
        number, what = (folder / "request").read_text().split()
        return int(number), what
    except (OSError, ValueError):
        return 0, ""


def _request_number(folder: Path) -> int:
    return _request(folder)[0]
