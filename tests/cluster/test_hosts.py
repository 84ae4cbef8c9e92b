"""Training on several hosts: namespaces of this machine with names, networks and ssh servers of their own."""

import contextlib
import json
import os
import signal
import subprocess
import time

import pytest

from sutrain.compare import compare_steps, read_steps
from tests.hosts import cluster, environment, missing
from tests.test_pretrain import final_files, records, train
from tests.test_supervise import events

pytestmark = [
    pytest.mark.skipif(
        missing(), reason="hosts cannot be made here (it takes root, openssh-server and pdsh)"
    ),
    pytest.mark.timeout(1200),
]


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("hosts"), "node-a", "node-b") as hosts:
        yield hosts


def deepspeed(folder, config, *overrides):
    """The command of a user who has a hostfile, a rank on each host."""
    (folder / "hostfile").write_text("node-a slots=1\nnode-b slots=1\n")
    start = ["deepspeed", "--hostfile", str(folder / "hostfile"), "sutrain/pretrain.py"]
    return [*start, "--config", str(config), *overrides]


def supervised(command, *options):
    return ["python", "-m", "sutrain.supervise", "--pause_seconds=1", *options, "--", *command]


def begin(host, command, output):
    with output.open("a") as file:
        return host.start(command, stdout=file, stderr=subprocess.STDOUT, env=environment())


def steps_done(run_dir):
    with contextlib.suppress(OSError, ValueError):  # not there yet, or half a line
        return max(records(run_dir), default=0)
    return 0


def wait_for(condition, process, output, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, output.read_text()[-8000:]
        time.sleep(0.2)


def test_two_hosts_train_as_two_ranks_of_one_do(two_hosts, dataset, write_config, tmp_path):
    """The same bits; and although each host knows its own name as a loopback address, as on Debian and Ubuntu."""
    here = write_config("here", data={"dir": str(dataset)})
    train(here, 2)
    there = write_config("there", data={"dir": str(dataset)})
    done = two_hosts[0].run(deepspeed(tmp_path, there))
    assert done.returncode == 0, done.stdout + done.stderr
    compared = compare_steps(read_steps(tmp_path / "here"), read_steps(tmp_path / "there"), 0.0)
    assert compared == []
    assert final_files(tmp_path / "here") == final_files(tmp_path / "there") != {}
    beats = [json.loads(file.read_text()) for file in sorted((tmp_path / "there/heartbeats").glob("*.json"))]
    assert [beat["host"] for beat in beats] == ["node-a", "node-b"]


def test_a_supervisor_has_the_ranks_of_all_hosts_save_and_stop(two_hosts, dataset, write_config, tmp_path):
    """DeepSpeed starts ranks by ssh, where neither signals nor most variables of the supervisor's environment go."""
    seldom = {"data": {"dir": str(dataset)}, "steps": 10_000, "evaluation": {"every_steps": 1000}}
    config, run, output = write_config(**seldom), tmp_path / "run", tmp_path / "output"
    process = begin(
        two_hosts[0], supervised(deepspeed(tmp_path, config, "--checkpoint.every_steps=1000")), output
    )
    wait_for(lambda: steps_done(run) > 1, process, output)
    (supervisor,) = (number for number in two_hosts[0].processes("-m sutrain.supervise"))
    os.kill(supervisor, signal.SIGUSR1)
    wait_for(lambda: list(run.glob("checkpoints/step-*")), process, output)
    os.kill(supervisor, signal.SIGTERM)
    assert process.wait(120) == 0, output.read_text()
    stopped = events(run)[-1]
    assert (stopped["event"], stopped["status"], stopped["stopped"]) == ("end", 0, True)
    assert len(list(run.glob("checkpoints/step-*"))) == 2
    assert [host.processes("pretrain.py") for host in two_hosts] == [[], []]


def test_hosts_with_a_wrong_interface_end_in_time_with_one_message_each(
    two_hosts, dataset, write_config, tmp_path
):
    config = write_config(data={"dir": str(dataset)})
    for host in two_hosts:
        host.set_variables(GLOO_SOCKET_IFNAME="lo")
    try:
        done = two_hosts[0].run(deepspeed(tmp_path, config, "--start_timeout_seconds=60"), timeout=200)
    finally:
        for host in two_hosts:
            host.set_variables()
    assert done.returncode, done.stdout
    said = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line and "rank" in line]
    for host in two_hosts:
        assert any(f"on {host.name} (interface" in line and "could not connect" in line for line in said), (
            said
        )
    assert [host.processes("pretrain.py") for host in two_hosts] == [[], []]


@pytest.mark.slow
def test_killed_ranks_and_pulled_cables_end_with_the_bits_of_a_quiet_run(
    two_hosts, dataset, write_config, tmp_path, evidence
):
    """A rank of the other host is killed, then its cable is pulled in the middle of the training and put back while
    the supervisor starts again; both hosts are as they were at the end."""
    near, far = two_hosts
    changes = {"data": {"dir": str(dataset)}, "steps": 60, "checkpoint": {"every_steps": 10}}
    train(write_config("quiet", **changes), 2)
    config, run, output = write_config(**changes), tmp_path / "run", tmp_path / "output"
    command = deepspeed(tmp_path, config, "--start_timeout_seconds=30")
    process = begin(near, supervised(command, "--hang_seconds=25", "--restarts=20"), output)
    wait_for(lambda: steps_done(run) >= 12, process, output)
    (rank,) = far.processes("sutrain/pretrain.py --local_rank")
    os.kill(rank, signal.SIGKILL)
    wait_for(lambda: "resumed at step 10" in output.read_text(), process, output)
    wait_for(lambda: steps_done(run) >= 22, process, output)
    far.unplug()
    wait_for(lambda: any(event["event"] == "hang" for event in events(run)), process, output)
    wait_for(lambda: far.processes("pretrain.py") == [], process, output)
    starts = len([event for event in events(run) if event["event"] == "start"])
    wait_for(lambda: len([e for e in events(run) if e["event"] == "start"]) > starts, process, output)
    far.plug_in()
    assert process.wait(600) == 0, output.read_text()
    compared = compare_steps(read_steps(tmp_path / "quiet"), read_steps(run), 0.0)
    assert compared == []
    assert final_files(tmp_path / "quiet", 60) == final_files(run, 60) != {}
    evidence(events=events(run))
