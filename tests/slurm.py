"""A real Slurm over hosts of tests/hosts.py: a controller on the first, a daemon on each."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.hosts import Host, environment

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")


def missing() -> bool:
    return any(shutil.which(name, path=environment()["PATH"]) is None for name in NEEDED)


class Slurm:
    """Commands of a user on the first host."""

    def __init__(self, host: Host, configuration: Path):
        self.host, self.variables = host, environment() | {"SLURM_CONF": str(configuration)}

    def run(self, folder: Path, *command: str, **variables: str) -> str:
        """Output of a command that must succeed."""
        inside = ["env", "-C", str(folder), *command]
        done = self.host.run(inside, env=self.variables | variables)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, …"""
        said = self.run(Path("/"), "scontrol", "show", "job", job)
        return said.partition("JobState=")[2].split()[0]


@contextlib.contextmanager
def slurm(folder: Path, hosts: Sequence[Host]) -> Iterator[Slurm]:
    """Running daemons, which end with the hosts."""
    (folder / "state").mkdir(parents=True)
    key, configuration = folder / "munge.key", folder / "slurm.conf"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    configuration.write_text(
        f"ClusterName=made\nSlurmctldHost={hosts[0].name}({hosts[0].address})\nSlurmUser=root\nSlurmdUser=root\n"
        f"AuthType=auth/munge\nStateSaveLocation={folder}/state\nSlurmdSpoolDir=/run/slurmd\n"
        "SlurmctldPidFile=/run/slurmctld.pid\nSlurmdPidFile=/run/slurmd.pid\n"
        f"SlurmctldLogFile={folder}/slurmctld.log\nSlurmdLogFile={folder}/slurmd-%h.log\n"
        "ProctrackType=proctrack/pgid\nTaskPlugin=task/none\nMpiDefault=none\nReturnToService=2\nKillWait=100\n"
        "SelectType=select/cons_tres\nSelectTypeParameters=CR_Core\nSlurmdParameters=config_overrides\n"
        + "".join(f"NodeName={host.name} NodeAddr={host.address} CPUs=1\n" for host in hosts)
        + "PartitionName=all Nodes=ALL Default=YES State=UP\n"
    )
    found = Slurm(hosts[0], configuration)
    for host in hosts:
        munge = (
            f"munged --force --key-file={key} --pid-file=/run/munge/pid --log-file={folder}/munge-{host.name}"
        )
        host.shell(f"mkdir -p /run/munge\n{munge}")
    found.run(folder, "slurmctld")
    for host in hosts:
        Slurm(host, configuration).run(folder, "slurmd")
    deadline = time.monotonic() + 60
    while found.run(folder, "sinfo", "-h", "-o", "%D %t").strip() != f"{len(hosts)} idle":
        assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()
        time.sleep(0.5)
    yield found
