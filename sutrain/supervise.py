"""Keep a run going: python -m sutrain.supervise [options] -- deepspeed … sutrain/pretrain.py --config X [overrides]

Starts the command, and starts it again from its newest intact checkpoint after a crash or a hang, with growing pauses,
until it ends by itself. A mistake that starting again cannot mend (exit status 2: configuration, data) ends it at once
unless it has trained before, and so do too many restarts without a new checkpoint between them. SIGTERM and SIGINT make
the run save and stop, SIGUSR1 makes it save and go on; DeepSpeed's launcher passes no signal on, so they travel through
the run folder (see heartbeat.py). Every event is a line of RUN/supervise.jsonl.

Everything the command started on this host is ended with it: it carries a mark in its environment that children
inherit. Ranks on other hosts are asked to end through the run folder. Where the supervisor itself is killed, the ranks
of its host notice and the run stops with a checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any, TextIO

import psutil

from data_prep.config_file import apply_override, read_tree
from sutrain import heartbeat
from sutrain.heartbeat import MARK

EXIT_USER_ERROR, EXIT_STOPPED = 2, 3  # as in launch.py, which would import torch here
LONGEST_PAUSE_SECONDS = 300.0


def main(arguments: list[str] | None = None) -> int:
    """Command line entry; returns the exit status of the run, 1 where it was given up."""
    parser = argparse.ArgumentParser(
        prog="python -m sutrain.supervise", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--restarts",
        type=int,
        default=5,
        help="starts in a row without a new checkpoint before it gives up (5)",
    )
    parser.add_argument(
        "--pause_seconds", type=float, default=10, help="before the first restart; doubles up to 300 (10)"
    )
    parser.add_argument(
        "--hang_seconds", type=float, default=600, help="without a sign of life of any rank: a hang (600)"
    )
    parser.add_argument(
        "--start_seconds", type=float, default=900, help="for the first sign of life after a start (900)"
    )
    parser.add_argument(
        "--grace_seconds",
        type=float,
        default=120,
        help="for the checkpoint after SIGTERM, then SIGKILL (120)",
    )
    parser.add_argument("command", nargs="+", help="after --: the command that trains")
    options = parser.parse_args(arguments)
    try:
        run_dir = run_folder(options.command)
        hold = hold_alone(run_dir)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    with hold:
        return Supervisor(
            options.command, run_dir, options.restarts, options.pause_seconds, options.hang_seconds,
            options.start_seconds, options.grace_seconds
        ).run()  # fmt: skip


def hold_alone(run_dir: Path) -> TextIO:
    """The supervisor's hold on the run folder, until the returned file is closed or the process ends.

    Raises ValueError when another supervisor, or a run that was started without one, is at work there.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    hold = _lock(run_dir / heartbeat.SUPERVISOR_LOCK)
    if hold is None:
        raise ValueError(
            f"{run_dir}: another supervisor keeps a run going there; stop it, or choose another run_dir"
        )
    run = _lock(run_dir / ".lock")  # that of a run (launch.py)
    if run is None:
        hold.close()
        raise ValueError(
            f"{run_dir}: a run is writing there{_how_to_stop(run_dir)}; stop it, or choose another run_dir"
        )
    run.close()
    return hold


def _how_to_stop(run_dir: Path) -> str:
    """What the run in a folder does and how it is stopped, as far as its ranks said so and still live."""
    for beat in heartbeat.read_beats(run_dir):
        if beat.host != socket.gethostname() or psutil.pid_exists(beat.pid):
            where = f"rank {beat.rank} is process {beat.pid} on {beat.host}, in {beat.phase!r} at step {beat.step}"
            return f" ({where}; `kill {beat.pid}` there has all ranks write a checkpoint and stop)"
    return ""


def _lock(file: Path) -> TextIO | None:
    """As launch.hold_run_folder, which would import torch here; None when another process holds it."""
    lock = file.open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    except OSError as error:
        lock.close()
        raise ValueError(
            f"{file.parent}: its file system locks no files ({error.strerror}); choose another run_dir"
        ) from None
    return lock


def run_folder(command: list[str]) -> Path:
    """The run_dir that a training command will write to, read as the trainer reads it: the last override counts, else
    the --config file does.

    Raises ValueError when the command names neither, or what it names is no path.
    """
    override = config = None
    for number, word in enumerate(command):
        if word.startswith("--run_dir="):
            override = word
        elif word.startswith("--config="):
            config = word.partition("=")[2]
        elif word == "--config" and number + 1 < len(command):
            config = command[number + 1]
    tree: dict[str, Any] = {}
    if override is not None:
        if (problem := apply_override(tree, override)) is not None:
            raise ValueError(problem)
    elif config is not None:
        tree = read_tree(Path(config))
    else:
        raise ValueError("the command has no --config FILE: supervise needs the run's folder; see --help")
    found = tree.get("run_dir")
    if not isinstance(found, str):
        raise ValueError(f"{override or config}: run_dir: expected a path, found {found!r}")
    return Path(os.path.expanduser(found))


class Supervisor:
    """One supervised run; `run` returns when it is over."""

    def __init__(
        self, command: list[str], run_dir: Path, restarts: int, pause_seconds: float, hang_seconds: float,
        start_seconds: float, grace_seconds: float,
    ):  # fmt: skip
        self.command, self.run_dir = command, run_dir
        self.restarts, self.pause_seconds = restarts, pause_seconds
        self.hang_seconds, self.start_seconds, self.grace_seconds = hang_seconds, start_seconds, grace_seconds
        self.mark = f"{uuid.uuid4().hex}@{socket.gethostname()}"
        self.stop_asked_at: float | None = None
        self.save_asked = self.trained = self.stopped_late = False

    def run(self) -> int:
        """Start, watch, start again. Returns the exit status of the run, 1 where it was given up."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup has SIGHUP ignored
                signal.signal(number, self._on_stop)
        signal.signal(signal.SIGUSR1, self._on_save)
        fruitless, start = 0, 0
        while True:
            start += 1
            before = self._newest_checkpoint()
            self._log("start", number=start, from_checkpoint=before, command=self.command)
            status, reason = self._watch_one_start()
            self._end_all()
            self.trained |= self._newest_checkpoint() > before
            if self.stop_asked_at is not None or status == 0:
                self._log("end", status=status, stopped=self.stop_asked_at is not None)
                return 1 if self.stopped_late else 0
            if status == EXIT_STOPPED:
                self._log("given_up", reason="exit status 3: the run stopped itself; its last lines say why")
                return EXIT_STOPPED
            if status == EXIT_USER_ERROR and not self.trained:
                # Later it is a storage that does not answer, a port or a lock of processes that are still dying, …
                self._log("given_up", reason="exit status 2: a mistake that starting again cannot mend")
                return EXIT_USER_ERROR
            fruitless = 0 if self._newest_checkpoint() > before else fruitless + 1
            if fruitless > self.restarts:
                self._log(
                    "given_up", reason=f"{fruitless} starts in a row without a new checkpoint; last: {reason}"
                )
                return 1
            pause = min(self.pause_seconds * 2 ** max(fruitless - 1, 0), LONGEST_PAUSE_SECONDS)
            self._log("restart", reason=reason, pause_seconds=pause, without_progress=fruitless)
            self._sleep(pause)
            if self.stop_asked_at is not None:
                self._log("end", status=0, stopped=True)
                return 0

    def _watch_one_start(self) -> tuple[int, str]:
        """(exit status, reason in words) of one start; a hang is status -1."""
        try:
            process = subprocess.Popen(
                self.command, env=os.environ | {MARK: self.mark}, start_new_session=True
            )
        except OSError as error:
            print(f"error: {self.command[0]}: {error.strerror}", file=sys.stderr, flush=True)
            return EXIT_USER_ERROR, f"{self.command[0]} could not be started"
        # Compared on this host's clock alone: when did the beats of this start last change?
        earlier = {(beat.rank, beat.pid, beat.beats) for beat in heartbeat.read_beats(self.run_dir)}
        known, changed_at = earlier, time.monotonic()
        beats: list[heartbeat.Beat] = []
        next_look = 0.0
        while process.poll() is None:
            time.sleep(0.2)
            if time.monotonic() < next_look:
                continue
            next_look = time.monotonic() + heartbeat.INTERVAL_SECONDS  # beats are not written more often
            said = heartbeat.read_beats(self.run_dir)
            beats = [beat for beat in said if (beat.rank, beat.pid, beat.beats) not in earlier]
            self.trained |= any(beat.phase == "training step" for beat in beats)
            now = {(beat.rank, beat.pid, beat.beats) for beat in beats}
            if now != known:
                known, changed_at = now, time.monotonic()
            if self.stop_asked_at is not None:
                if not beats:
                    return -1, "stopped before there was anything to save"
                if time.monotonic() - self.stop_asked_at > self.grace_seconds:
                    self.stopped_late = True
                    self._log(
                        "too_late", reason=f"no checkpoint within {self.grace_seconds:.0f} s; ended without"
                    )
                    return -1, "stopped before it could save"
                self._request("TERM")
            elif self.save_asked and beats:
                self.save_asked = False
                self._request("USR1")
                self._log("save", reason="SIGUSR1")
            elif time.monotonic() - changed_at > (
                limit := self.hang_seconds if beats else self.start_seconds
            ):
                where = describe(beats)
                self._log("hang", seconds=limit, ranks=[vars(beat) for beat in beats])
                self._show_stacks()
                return -1, f"no sign of life for {limit:.0f} s: {where}"
        status = process.returncode
        if status == 0 and (left := self._ranks_alive()):
            # The launcher reports success when its own helper process was killed.
            return -1, f"the launcher ended, but not {left} of its ranks"
        return status, f"exit status {status}" if status >= 0 else f"killed by signal {-status}"

    def _show_stacks(self) -> None:
        """Ask the ranks of this host to print where they stand: a hang that nobody can see is never mended."""
        pids = {beat.pid for beat in heartbeat.read_beats(self.run_dir)}
        for process in self._marked():
            if process.pid in pids:
                process.send_signal(signal.SIGUSR2)
        time.sleep(1)

    def _ranks_alive(self) -> int:
        """Ranks of this host that live on a moment after the launcher ended."""
        deadline = time.monotonic() + 5
        while True:
            pids = {beat.pid for beat in heartbeat.read_beats(self.run_dir)}
            alive = sum(process.pid in pids for process in self._marked())
            if not alive or time.monotonic() > deadline:
                return alive
            time.sleep(0.2)

    def _request(self, what: str) -> None:
        """Ask the ranks that this supervisor started; a disk that takes nothing must not end it."""
        with contextlib.suppress(OSError):
            heartbeat.request(self.run_dir, what, self.mark)

    def _end_all(self) -> None:
        """End everything the command started: here by the mark, on other hosts by request."""
        self._request("KILL")
        deadline = time.monotonic() + 30
        while (left := self._marked()) and time.monotonic() < deadline:
            for process in left:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    pass
            psutil.wait_procs(left, timeout=1)

    def _marked(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def _newest_checkpoint(self) -> int:
        """Step of the newest complete checkpoint, -1 without one; whether it is intact the run itself finds out."""
        names = [
            folder.name.removeprefix("step-") for folder in (self.run_dir / "checkpoints").glob("step-*")
        ]
        return max((int(name) for name in names if name.isdigit()), default=-1)

    def _on_stop(self, *_: Any) -> None:
        if self.stop_asked_at is None:
            self.stop_asked_at = time.monotonic()

    def _on_save(self, *_: Any) -> None:
        self.save_asked = True

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.stop_asked_at is None:
            time.sleep(min(0.2, seconds))

    def _log(self, event: str, **facts: Any) -> None:
        line = {"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **facts}
        with (
            contextlib.suppress(OSError),
            (self.run_dir / "supervise.jsonl").open("a", encoding="utf-8") as file,
        ):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        shown = ", ".join(f"{key} {value}" for key, value in facts.items() if key not in ("command", "ranks"))
        try:
            print(f"supervise: {event} {shown}", flush=True)
        except OSError:  # a terminal that was closed, a pipe that nobody reads: the file has it all
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def describe(beats: list[heartbeat.Beat]) -> str:
    """Where the ranks stand, the one that said least first: the others usually wait for it."""
    if not beats:
        return "no rank said anything since the start"
    slowest = min(beats, key=lambda beat: (beat.step, beat.beats))
    others = len(beats) - 1
    rest = f"; {others} other{'s wait' if others > 1 else ' waits'}" if others else ""
    return f"rank {slowest.rank} on {slowest.host} in {slowest.phase!r} at step {slowest.step}{rest}"


if __name__ == "__main__":
    sys.exit(main())
