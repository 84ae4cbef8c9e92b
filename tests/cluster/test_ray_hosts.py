"""cluster/ray/cluster.yaml on hosts of this machine: `ray up` from outside, a job, a host that is lost, `ray down`."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.data_prep.made import command_line, content_files, make_texts, settings, write_jsonl
from tests.hosts import cluster, environment, missing

pytestmark = [
    pytest.mark.skipif(
        missing() or shutil.which("rsync") is None,
        reason="hosts with Ray cannot be made here (it takes root, openssh-server, pdsh and rsync)",
    ),
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]
_HERE = environment() | {"TMPDIR": "/run"}
_DASHBOARD = ["--address", "http://127.0.0.1:8265"]


@pytest.fixture
def hosts(tmp_path):
    """The user's machine, which is none of the cluster, the head and two workers; each has a /tmp/ray and a home, and
    leaves nothing in the /tmp of all."""
    with cluster(tmp_path, "user", "head", "worker-a", "worker-b") as found:
        for host in found:
            host.shell("mkdir -p /tmp/ray; mount -t tmpfs tmpfs /tmp/ray; mkdir /root/sutrain")
            host.shell(f"ln -s {sys.prefix} /root/sutrain/.venv")
            host.set_variables(TMPDIR="/run")
        yield found


@pytest.fixture
def filled_in(hosts, tmp_path):
    """cluster.yaml as its user fills it in, for nodes of one core with little memory."""
    text = (ROOT / "cluster/ray/cluster.yaml").read_text()
    for old, new in {
        "HEAD_ADDRESS": hosts[1].address,
        "WORKER_HOST_1, WORKER_HOST_2": "worker-a, worker-b",
        "ssh_user: sutrain": "ssh_user: root",
        "--object-store-memory=500000000": "--object-store-memory=80000000 --num-cpus=1",
    }.items():
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return str(path)


def wait_for(condition, seconds, explain):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, explain()
        time.sleep(0.5)
    return found


def ray(host, *words, seconds=240):
    done = host.run(["ray", *words], timeout=seconds, env=_HERE)
    assert done.returncode == 0, f"ray {' '.join(words)}: {done.stdout[-5000:]}{done.stderr[-5000:]}"
    return done.stdout


def nodes(head):
    """How many nodes the cluster has, by its own books."""
    status = head.shell("RAY_AUTH_MODE=disabled ray status")
    return sum(int(line.split()[0]) for line in status.splitlines() if line.endswith("local.cluster.node"))


def monitor(head):
    return head.shell("tail -n 60 /tmp/ray/session_latest/logs/monitor.out")


def submit(host, config, output):
    """A job is sent from the repository, and its log is followed."""
    run = ["python", "-m", "data_prep", "run", "--config", str(config), "--executor=ray"]
    with output.open("w") as file:
        return host.start(
            ["ray", "job", "submit", *_DASHBOARD, "--working-dir", ".", "--", *run],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=_HERE,
        )


def hosts_of_pass_1(work):
    """The hosts of the tasks that are done, one by one."""
    return [json.loads(path.read_text())["host"] for path in work.glob(".sutrain-*/scatter/task-*.json")]


@contextlib.contextmanager
def forwarded(host, config):
    """`ray dashboard`, until it is interrupted."""
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = host.start(["ray", "dashboard", config], env=_HERE, **silent)
    try:
        wait_for(lambda: "8265" in host.shell("ss -ltn"), 60, lambda: "nothing is forwarded")
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def test_a_cluster_by_ray_up_gives_the_bytes_of_local_processes_also_when_a_host_is_cut_off(
    hosts, filled_in, tmp_path, evidence
):
    """A job is stopped and sent again; then a cable is pulled, and stays out: that closes no connection, which Ray by
    itself would notice after seven minutes."""
    user, head, worker, lost = hosts
    for number in range(24):
        write_jsonl(tmp_path / f"raw/{number:02d}.jsonl", make_texts(1000, seed=number))
    tree = settings(
        tmp_path / "local",
        [tmp_path / "raw"],
        work_dir=str(tmp_path / "work"),
        cleaning={"functions": ["tests.data_prep.functions:slowly"]},  # a task takes two seconds
        resources={"workers": 2, "task_bytes": 1, "log_seconds": 5},
    )
    assert command_line(tree, tmp_path, "run").returncode == 0
    tree |= {"output_dir": str(tmp_path / "out")}
    tree["resources"]["workers"] = None
    config = tmp_path / "ray.yaml"
    config.write_text(yaml.safe_dump(tree))

    ray(user, "up", "-y", filled_in)
    wait_for(lambda: nodes(head) == 3, 180, lambda: monitor(head))
    first, second = tmp_path / "first.log", tmp_path / "second.log"
    with forwarded(user, filled_in):
        job = submit(user, config, first)
        wait_for(lambda: len(hosts_of_pass_1(tmp_path / "work")) > 3, 120, first.read_text)
        (name,) = {word.strip("'") for word in first.read_text().split() if word.startswith("'raysubmit_")}
        ray(user, "job", "stop", *_DASHBOARD, name)
        job.wait(60)
        done = len(hosts_of_pass_1(tmp_path / "work"))
        job = submit(user, config, second)
        wait_for(
            lambda: lost.name in (found := hosts_of_pass_1(tmp_path / "work")) and len(found) > done,
            120,
            second.read_text,
        )
        lost.unplug()
        unplugged = time.monotonic()
        assert job.wait(240) == 0, second.read_text()
    seconds = time.monotonic() - unplugged
    summary = head.shell("RAY_AUTH_MODE=disabled ray summary tasks")
    assert "scatter" in summary and "gather" in summary  # by these names they are looked for
    stages = json.loads((tmp_path / "out/run.json").read_bytes())["stages"]
    assert stages["scatter"]["hosts"].keys() == {head.name, worker.name, lost.name}
    assert stages["scatter"]["taken_over"] >= 4
    assert content_files(tmp_path / "out") == content_files(tmp_path / "local")

    lost.plug_in()
    wait_for(lambda: nodes(head) == 3, 240, lambda: monitor(head))
    ray(user, "down", "-y", filled_in)
    assert head.processes("/ray/") == []
    for host in (worker, lost):
        wait_for(lambda host=host: not host.processes("raylet"), 150, lambda: "a worker goes on")
        host.shell("ray stop")  # a reader of logs
        assert host.processes("/ray/") == []
    evidence(seconds_after_the_loss=round(seconds), hosts=stages["scatter"]["hosts"])


def test_a_worker_that_the_head_does_not_know_is_named(hosts, filled_in):
    path = Path(filled_in)
    path.write_text(path.read_text().replace("worker-b", "worker-x"))
    done = hosts[0].run(["ray", "up", "-y", filled_in], timeout=240, env=_HERE)
    assert done.returncode != 0 and "error: worker_ips: the head does not know worker-x" in done.stdout
    assert hosts[1].processes("/ray/") == []
