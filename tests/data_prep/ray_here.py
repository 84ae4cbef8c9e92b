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
_MARK = "SUTRAIN_TEST_NODE"  # in the environment of a node's processes, which inherit it


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class RayHere:
    """A head, and nodes that can be added and killed. `variables`: environment of all its processes."""

    def __init__(self, folder: Path, log: Path, cpus: int, **variables: str) -> None:
        self._folder, self._log = folder, log
        self.environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"} | variables
        self.environment.pop("RAY_ADDRESS", None)
        self._gcs, dashboard, agent = free_port(), free_port(), free_port()
        self.address = f"http://127.0.0.1:{dashboard}"
        self.head = self._start(
            *("--head", "--port", self._gcs, "--dashboard-host", "127.0.0.1", "--dashboard-port", dashboard),
            *("--dashboard-agent-listen-port", agent, "--temp-dir", folder, "--num-cpus", cpus),
        )
        self._wait_for(dashboard, agent)

    def add_node(self, cpus: int) -> str:
        """Start another node; returns the mark of its processes."""
        return self._start("--address", f"127.0.0.1:{self._gcs}", "--num-cpus", cpus)

    def _start(self, *arguments: object) -> str:
        mark = uuid.uuid4().hex
        command = [_RAY, "start", "--block", "--node-ip-address", "127.0.0.1", "--disable-usage-stats"]
        command += ["--object-store-memory", "80000000", "--dashboard-agent-grpc-port", str(free_port())]
        with self._log.open("a") as log:
            subprocess.Popen(
                [*command, *map(str, arguments)],
                env=self.environment | {_MARK: mark},
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
    test = uuid.uuid4().hex
    try:
        yield RayHere(folder, log, cpus, SUTRAIN_TEST_RAY=test, **variables)
    finally:
        kill(processes(test, "SUTRAIN_TEST_RAY"))
        shutil.rmtree(folder, ignore_errors=True)


def processes(mark: str, name: str = _MARK) -> list[psutil.Process]:
    """The living processes with a mark in their environment."""
    found = []
    for process in psutil.process_iter(["environ", "status"]):
        marked = (process.info["environ"] or {}).get(name) == mark
        if marked and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def kill(victims: list[psutil.Process]) -> None:
    """Kill -9, and wait until they are gone."""
    for process in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(victims, timeout=30)
