"""cluster/slurm/pretrain.sbatch under a real Slurm on two hosts."""

import sys
import time

import pytest

from sutrain.compare import read_steps
from tests.cluster.test_hosts import steps_done
from tests.hosts import cluster
from tests.hosts import missing as hosts_missing
from tests.slurm import missing, slurm

pytestmark = [
    pytest.mark.skipif(
        hosts_missing() or missing(),
        reason="hosts with Slurm cannot be made here (it takes root, openssh-server, pdsh and slurm-wlm)",
    ),
    pytest.mark.slow,
    pytest.mark.timeout(2400),
]


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    with cluster(folder, "node-a", "node-b") as hosts, slurm(folder / "slurm", hosts) as found:
        yield found


@pytest.fixture(scope="module")
def checkout(workspace):
    """The repository as a user has it on the cluster, with its environment."""
    link = workspace / ".venv"
    link.symlink_to(sys.prefix)
    yield workspace
    link.unlink()  # others that use this folder make one there


def wait_for(condition, folder, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        log = "".join(file.read_text() for file in folder.glob("sutrain-*.log"))
        assert time.monotonic() < end, log[-8000:]
        time.sleep(0.5)


def submit(scheduler, folder, config, *options, **variables):
    command = ["sbatch", "--parsable", *options, "cluster/slurm/pretrain.sbatch", str(config)]
    return scheduler.run(folder, *command, PYTHONPATH=str(folder), OMP_NUM_THREADS="1", **variables).strip()


def test_a_job_on_two_nodes_stops_when_told_and_goes_on_on_one(
    scheduler, checkout, dataset, write_config, tmp_path
):
    config, run = write_config(data={"dir": str(dataset)}, steps=100_000), tmp_path / "run"
    job = submit(scheduler, checkout, config, "--nodes=2", "--time=60", RANKS_PER_NODE="2")
    wait_for(lambda: steps_done(run) > 3, checkout)
    scheduler.run(checkout, "scancel", "--signal=TERM", job)
    wait_for(lambda: scheduler.state(job) not in ("RUNNING", "COMPLETING"), checkout)
    assert scheduler.state(job) == "COMPLETED"
    log = (checkout / f"sutrain-{job}.log").read_text()
    assert "with a checkpoint; start again to go on" in log and "Traceback" not in log
    assert len(list((run / "heartbeats").glob("rank-*.json"))) == 4
    stopped_at = steps_done(run)
    config = write_config(data={"dir": str(dataset)}, steps=stopped_at + 4)
    job = submit(scheduler, checkout, config, "--nodes=1", "--time=60")
    wait_for(lambda: scheduler.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), checkout)
    assert scheduler.state(job) == "COMPLETED"
    assert f"resumed at step {stopped_at}" in (checkout / f"sutrain-{job}.log").read_text()
    assert steps_done(run) == stopped_at + 4


def test_a_job_whose_time_is_up_saves_and_queues_itself_again(
    scheduler, checkout, dataset, write_config, tmp_path
):
    config, run = (
        write_config(data={"dir": str(dataset)}, steps=100_000),
        tmp_path / "run",
    )
    job = submit(scheduler, checkout, config, "--nodes=2", "--time=60")
    wait_for(lambda: steps_done(run) > 3, checkout)
    scheduler.run(checkout, "scontrol", "update", f"JobId={job}", "TimeLimit=2")
    wait_for(lambda: scheduler.state(job) == "PENDING", checkout)
    stopped_at = steps_done(run)
    assert max(int(path.name[5:]) for path in run.glob("checkpoints/step-*")) == stopped_at
    # It begins two minutes later, when the nodes have forgotten that it ended.
    scheduler.run(checkout, "scontrol", "update", f"JobId={job}", "TimeLimit=60")
    wait_for(lambda: steps_done(run) > stopped_at + 2, checkout)
    assert f"resumed at step {stopped_at}" in (checkout / f"sutrain-{job}.log").read_text()
    # Cancelled is cancelled, although the shell gets a signal then, too.
    scheduler.run(checkout, "scancel", job)
    wait_for(lambda: scheduler.state(job) == "CANCELLED", checkout)
    wait_for(lambda: scheduler.run(checkout, "squeue", "-h").strip() == "", checkout)
    assert steps_done(run) == max(int(path.name[5:]) for path in run.glob("checkpoints/step-*")) > stopped_at
    assert sorted(read_steps(run)) == list(range(1, steps_done(run) + 1))
