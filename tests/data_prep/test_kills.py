"""Kill -9 of a worker, the driver, the job or a whole node of a real Ray at random times: submitted again, the run
gives the bytes of an undisturbed one, and what was finished is not done again.
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from ray.job_submission import JobStatus, JobSubmissionClient

from benchmarks.data_prep_runs import Watch
from tests.data_prep.made import ROOT, content_files, make_texts, prepare, settings, write_jsonl
from tests.data_prep.ray_here import RayHere, kill, processes, ray_here

_KINDS = ("worker", "driver", "job", "node")
_TASKS = 10


class Job:
    """The run as a Ray job, submitted again whenever it is not alive."""

    def __init__(self, ray: RayHere, folder: Path, command: list[str]) -> None:
        self.ray, self._client, self._folder = ray, JobSubmissionClient(ray.address), folder
        self._command, self._id, self.submissions = " ".join(command), "", 0

    def status(self) -> JobStatus:
        return self._client.get_job_status(self._id)

    def go_on(self) -> None:
        """Submit, unless the job is at work."""
        if not self._id or self.status().is_terminal() or not self.driver():
            self._id = self._client.submit_job(
                entrypoint=self._command, runtime_env={"working_dir": str(self._folder)}
            )
            self.submissions += 1
            deadline = time.monotonic() + 120
            while not self.driver() and not self.status().is_terminal():
                assert time.monotonic() < deadline, self.status()
                time.sleep(0.2)

    def driver(self) -> list[psutil.Process]:
        """The process that runs `python -m data_prep`, and the shell around it."""
        return self.ray.matching("data_prep run", "--executor=ray")

    def log(self) -> str:
        return self._client.get_job_logs(self._id)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", [1, 2])
def test_ten_kills_of_each_seed_on_ray_change_no_byte(prepared, tmp_path, monkeypatch, evidence, seed):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    code, output, raw = tmp_path / "code", tmp_path / "out", tmp_path / "raw"
    shutil.copytree(ROOT / "data_prep", code / "data_prep")
    shutil.copytree(ROOT / "tests" / "data_prep", code / "tests" / "data_prep")
    for number in range(_TASKS):
        write_jsonl(raw / f"{number}.jsonl", make_texts(200, seed=number))
    tree = settings(
        output,
        [raw],
        tokenizer={"load": str(prepared / "tokenizer/tokenizer.model")},
        cleaning={"functions": ["tests.data_prep.functions:slowly"]},
        resources={"task_bytes": 1, "workers": 2, "lease_seconds": 5},
    )
    prepare(tree | {"output_dir": str(tmp_path / "undisturbed")})
    expected = content_files(tmp_path / "undisturbed")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    command = [
        sys.executable,
        "-m",
        "data_prep run",
        "--config",
        str(tmp_path / "config.yaml"),
        "--executor=ray",
    ]
    draw, kills, whole_runs, executed = random.Random(seed), [], 0, 0
    kinds = draw.sample(_KINDS * 3, 10)  # at least one of each, and one is tried until it meets something
    with ray_here(tmp_path / "ray.log", cpus=0, RAY_AUTH_MODE="disabled") as ray:
        node = ray.add_node(2)
        job = Job(ray, code, command)
        while len(kills) < 10:
            with Watch(output) as watch:
                # Until the output is whole, nothing that was finished may be executed again.
                while len(kills) < 10 and not (output / "manifest.json").exists():
                    job.go_on()
                    wanted = draw.randint(0, 2 * _TASKS)
                    while len(watch.seen) < wanted and job.driver():
                        wait_until(lambda: len(watch.seen) >= wanted, 0.3)  # noqa: B023
                    time.sleep(draw.uniform(0, 0.5))
                    what = kinds[len(kills)]
                    finished, met = len(watch.seen), strike(what, job, node, draw)
                    if met:
                        kills.append({"what": what, "tasks_finished": finished, "processes": met})
                    if what == "node":
                        node = ray.add_node(2)
                if len(kills) == 10:
                    finish(job, output)
            executed += check_executions(watch)
            assert content_files(output) == expected
            whole_runs += 1
            wait_until(
                lambda: not job.driver(), 60
            )  # it removes its intermediate files when the output is whole
            shutil.rmtree(output)
        submissions = job.submissions
    assert any(kill["tasks_finished"] > 0 for kill in kills), kills
    evidence(kills=kills, submissions=submissions, whole_runs=whole_runs, tasks_executed=executed)


def wait_until(reached: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.01)


def strike(what: str, job: Job, node: str, draw: random.Random) -> int:
    """Kill -9; returns how many processes it met."""
    if what == "worker":
        wait_until(lambda: bool(job.ray.matching("ray::call")), 2)
        busy = job.ray.matching("ray::call")
        victims = [draw.choice(busy)] if busy else []
    elif what == "driver":
        victims = job.driver()
    elif what == "job":  # its supervisor, and all that this one has started
        supervisors = job.ray.matching("ray::JobSupervisor")
        victims = supervisors + [child for one in supervisors for child in one.children(recursive=True)]
        victims += job.driver()
    else:
        victims = processes(node)
    kill(victims)
    return len(victims)


def finish(job: Job, output: Path) -> None:
    deadline = time.monotonic() + 300
    while not (output / "manifest.json").exists() or job.driver():
        job.go_on()
        time.sleep(0.2)
        assert time.monotonic() < deadline, job.log()


def check_executions(watch: Watch) -> int:
    """Every task left one manifest, and so was finished once; returns how many there were."""
    names = [name for name, _, _ in watch.seen]
    assert len(names) == len(set(names)), "a finished task was done again"
    assert sum(name.startswith("scatter/") for name in names) == _TASKS
    return len(names)
