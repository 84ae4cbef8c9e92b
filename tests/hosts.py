"""Several hosts on one machine: namespaces of the kernel, each with its own name, network, processes and ssh server.

What the hosts share is the file system, as a cluster does; /dev/shm, /run and the home /root are each host's own. They
are connected to a switch (a bridge) by cables (veth pairs) that a test can unplug.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("unshare", "nsenter", "ip", "ssh", "sshd", "ssh-keygen", "pdsh")
_PATH = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
# Process 1 of a host: takes in orphans, and ends with the test's process.
_INIT = "trap 'exit 0' TERM; while :; do sleep 1 & wait; done"


def missing() -> bool:
    """Can this machine hold no hosts, for want of a program or of the right to make namespaces?"""
    if any(shutil.which(name, path=_PATH) is None for name in NEEDED):
        return True
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc",
         "sh", "-c", "ip link add cable0 type veth peer name cable1 && mount -t tmpfs tmpfs /run && mkdir /run/a /run/b"
         " && mount -t overlay overlay -o lowerdir=/root,upperdir=/run/a,workdir=/run/b /root"],
        env=os.environ | {"PATH": _PATH}, capture_output=True,
    )  # fmt: skip
    return tried.returncode != 0


class Host:
    """One host; `start` and `run` execute commands on it."""

    def __init__(self, name: str, address: str, folder: Path):
        self.name, self.address, self.folder = name, address, folder
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc",
             "--kill-child", "sh", "-c", _INIT],
            env=os.environ | {"PATH": _PATH}, stderr=subprocess.DEVNULL,  # it complains of a signal mask
        )  # fmt: skip
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children")
        deadline = time.monotonic() + 10
        while not (found := children.read_text().split()):
            assert time.monotonic() < deadline, "unshare started nothing"
            time.sleep(0.01)
        self.pid = int(found[0])  # as this machine sees it

    def enter(self, command: Sequence[str]) -> list[str]:
        return ["nsenter", "-t", str(self.pid), "-n", "-u", "-i", "-m", "-p", f"--wdns={ROOT}", *command]

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen:
        options.setdefault("env", environment())
        return subprocess.Popen(self.enter(command), text=True, **options)

    def run(self, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess:
        options.setdefault("env", environment())
        return subprocess.run(self.enter(command), text=True, capture_output=True, **options)

    def shell(self, script: str) -> str:
        """Output of a shell script on it, which must succeed."""
        done = self.run(["sh", "-ec", script])
        assert done.returncode == 0, f"{self.name}: {script}: {done.stdout}{done.stderr}"
        return done.stdout

    def processes(self, word: str) -> list[int]:
        """Numbers, as this machine sees them, of the host's processes with `word` in their command line."""
        found, own = [], os.stat(f"/proc/{self.pid}/ns/pid").st_ino
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and os.stat(entry / "ns/pid").st_ino == own:
                    words = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
                    found += [int(entry.name)] if word in words else []
        return found

    def set_variables(self, **variables: str) -> None:
        """Have ssh sessions on it begin with these, and no others of an earlier call."""
        self.write_ssh_server("".join(f"SetEnv {name}={value}\n" for name, value in variables.items()))
        for number in self.processes("sshd -f"):
            os.kill(number, signal.SIGHUP)

    def write_ssh_server(self, more: str = "") -> None:
        (self.folder / "sshd").write_text(
            "HostKey /root/.ssh/id_ed25519\nAuthorizedKeysFile /root/.ssh/authorized_keys\nPermitRootLogin yes\n"
            f"StrictModes no\nUsePAM no\nPidFile none\nMaxStartups 100\n{more}"
        )

    def unplug(self) -> None:
        """Pull its cable: nothing comes in or goes out, and nobody is told."""
        self.shell("ip link set eth0 down")

    def plug_in(self) -> None:
        self.shell("ip link set eth0 up")

    def end(self) -> None:
        """The power goes off: all of its processes are killed."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._holder.wait()


def environment() -> dict[str, str]:
    """That of a shell on a host, with the interpreter of these tests first."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "OMP_"))}
    return kept | {"PATH": _PATH, "HOME": "/root"}


@contextlib.contextmanager
def cluster(folder: Path, *names: str) -> Iterator[list[Host]]:
    """Hosts of these names on one switch, 10.99.0.1 and on, which reach each other by ssh without a password."""
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    made: list[Host] = []
    try:
        for number, name in enumerate(names, 1):
            made.append(Host(name, f"10.99.0.{number}", folder / name))
        # The switch is inside the first host, for which it is one interface more.
        made[0].shell("ip link add switch type bridge && ip link set switch up")
        for number, host in enumerate(made):
            cable = ["ip", "link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0"]
            # Not on the host: the other end's process number is this machine's.
            enter = ["nsenter", "-t", str(made[0].pid), "-n"]
            subprocess.run([*enter, *cable, "netns", str(host.pid)], check=True, env=environment())
            made[0].shell(f"ip link set port{number} master switch up")
            _furnish(host, key, made)
        for host in made:
            _wait_for_ssh(made[0], host)
        yield made
    finally:
        for host in made:
            host.end()


def _furnish(host: Host, key: Path, hosts: Sequence[Host]) -> None:
    """Name, address, home, temporary folders and ssh server of a host, which knows its own name as Debian and Ubuntu
    have it: as a loopback address."""
    others = [f"{other.address} {other.name}" for other in hosts if other is not host]
    host.folder.mkdir()
    table = ["127.0.0.1 localhost", f"127.0.1.1 {host.name}", *others]
    (host.folder / "hosts").write_text("\n".join(table) + "\n")
    host.write_ssh_server()
    # A home of its own over the one that is there, which may hold the interpreter.
    host.shell(
        f"hostname {host.name}\n"
        "for folder in /dev/shm /run; do mount -t tmpfs tmpfs $folder; done\n"
        "mkdir -p /run/sshd /run/home /run/work\n"
        "mount -t overlay overlay -o lowerdir=/root,upperdir=/run/home,workdir=/run/work /root\n"
        "rm -rf /root/.ssh /root/.bashrc /root/.profile\nmkdir -m 700 /root/.ssh\n"
        f"cp {key} /root/.ssh/id_ed25519\ncp {key}.pub /root/.ssh/authorized_keys\n"
        "printf 'StrictHostKeyChecking no\\nUserKnownHostsFile /dev/null\\nLogLevel ERROR\\n' > /root/.ssh/config\n"
        f"mount --bind {host.folder / 'hosts'} /etc/hosts\n"
        f"ip link set lo up\nip addr add {host.address}/24 dev eth0\nip link set eth0 up\n"
        f"$(command -v sshd) -f {host.folder / 'sshd'}"
    )


def _wait_for_ssh(host: Host, other: Host) -> None:
    deadline = time.monotonic() + 20
    while (tried := host.run(["ssh", other.name, "true"])).returncode:
        assert time.monotonic() < deadline, f"{other.name}: ssh does not answer: {tried.stderr}"
        time.sleep(0.1)
