"""A Ray cluster of this machine for tests: real processes on free ports, and nobody else's Ray is touched."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil

_RAY = str(Path(sys.executable).with_name("ray"))
# In the environment of the processes of a node, and of all of a Ray, which children inherit.
_NODE_MARK, _RAY_MARK = "SUTRAIN_TEST_NODE", "SUTRAIN_TEST_RAY"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class RayHere:
    """A head, and nodes that can be added and killed. mark: in the environment of its processes, with `variables`."""

    def __init__(self, folder: Path, log: Path, cpus: int, mark: str, **variables: str) -> None:
        self._log, self.mark = log, mark
        self.environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", _RAY_MARK: mark} | variables
        self.environment.pop("RAY_ADDRESS", None)
        self._gcs, dashboard, agent = free_port(), free_port(), free_port()
        self.address = f"http://127.0.0.1:{dashboard}"
        self.head = self._start(
            *("--head", "--port", self._gcs, "--dashboard-host", "127.0.0.1", "--dashboard-port", dashboard),
            *("--dashboard-agent-listen-port", agent, "--temp-dir", folder, "--num-cpus", cpus),
        )
        self._wait_for(dashboard, agent)

    @property
    def gcs_address(self) -> str:
        """What RAY_ADDRESS is for a driver."""
        return f"127.0.0.1:{self._gcs}"

    def add_node(self, cpus: int, *options: object) -> str:
        """Start another node; returns the mark of its processes."""
        return self._start("--address", self.gcs_address, "--num-cpus", cpus, *options)

    def _start(self, *arguments: object) -> str:
        mark = uuid.uuid4().hex
        command = [_RAY, "start", "--block", "--node-ip-address", "127.0.0.1", "--disable-usage-stats"]
        command += ["--object-store-memory", "80000000", "--dashboard-agent-grpc-port", str(free_port())]
        with self._log.open("a") as log:
            subprocess.Popen(
                [*command, *map(str, arguments)],
                env=self.environment | {_NODE_MARK: mark},
                start_new_session=True,
                stdout=log,
                stderr=log,
            )
        return mark

    def _wait_for(self, *ports: int) -> None:
        deadline = time.monotonic() + 180
        for port in ports:
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                assert time.monotonic() < deadline and processes(self.head), self._log.read_text()
                time.sleep(0.2)

    def matching(self, *words: str) -> list[psutil.Process]:
        """The living processes of this Ray, its jobs included, whose command line holds all words."""
        found = []
        for process in processes(self.mark, _RAY_MARK):
            with contextlib.suppress(psutil.NoSuchProcess):
                line = " ".join(process.cmdline())
                found += [process] if all(word in line for word in words) else []
        return found

    def submit(
        self, folder: Path, command: list[str], *options: str, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """`ray job submit` from `folder`; its output is that of the job."""
        submit = [_RAY, "job", "submit", "--address", self.address, "--working-dir", ".", *options, "--"]
        return subprocess.run(
            [*submit, *command],
            cwd=folder,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=300,
        )


@contextlib.contextmanager
def ray_here(log: Path, cpus: int = 2, **variables: str) -> Iterator[RayHere]:
    """A Ray that is gone afterwards, with every process that it started."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: Ray puts sockets below it
    mark = uuid.uuid4().hex
    try:
        yield RayHere(folder, log, cpus, mark, **variables)
    finally:
        kill(processes(mark, _RAY_MARK))
        shutil.rmtree(folder, ignore_errors=True)


def processes(mark: str, name: str = _NODE_MARK) -> list[psutil.Process]:
    """The living processes with a mark in their environment, and what they have started: a program that changes its
    title, as Ray's workers do, may overwrite its environment.
    """
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get(name) == mark:
            with contextlib.suppress(psutil.NoSuchProcess):
                found |= {one.pid: one for one in (process, *process.children(recursive=True))}
    return [process for process in found.values() if _lives(process)]


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def kill(victims: list[psutil.Process]) -> None:
    """Kill -9, and wait until they are gone."""
    for process in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(victims, timeout=30)
