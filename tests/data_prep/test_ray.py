"""A real Ray cluster of two cores gives the bytes that local processes give."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import pytest
import yaml

from data_prep.errors import DataPrepError
from data_prep.executor import LocalExecutor, _in_short, make_executor, usable_cores
from tests.data_prep.made import ROOT, command_line, content_files, settings
from tests.data_prep.ray_here import ray_here

_SCRIPT = """
import sys
import ray
from data_prep.__main__ import main
ray.init(num_cpus=2, object_store_memory=80_000_000, _temp_dir=sys.argv[1], include_dashboard=False,
         log_to_driver=False)
@ray.remote
def imported():
    import data_prep.gather, data_prep.scatter, data_prep.sample
    return sorted({'torch', 'sutrain', 'transformers'} & set(sys.modules))
try:
    assert ray.get(imported.remote()) == []
    code = main(['run', *sys.argv[2:]]) or main(['verify', *sys.argv[2:]])
finally:
    ray.shutdown()
sys.exit(code)
"""


def test_ray_and_local_give_the_same_bytes(corpus, prepared, tmp_path):
    output = tmp_path / "out"
    config = tmp_path / "config.yaml"
    resources = {"workers": 2, "task_bytes": 1, "log_seconds": 60}
    config.write_text(yaml.safe_dump(settings(output, [corpus], resources=resources)))
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # short: Ray puts sockets below it
        result = subprocess.run(
            [sys.executable, "-c", _SCRIPT, folder, "--config", str(config), "--executor=ray"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
    assert result.returncode == 0, result.stderr
    assert "verified" in result.stdout
    assert content_files(output) == content_files(prepared)


# Arguments: memory of a task. Tells what the executor says, and of every task that it ended.
_DRIVER = """
import sys, time
from data_prep import executor
from data_prep.errors import DataPrepError
executor._LOOK_SECONDS, executor._JOIN_SECONDS = 0.3, 1.0
def nap(number):
    time.sleep(0.2)
    return {}
try:
    ray = executor.RayExecutor(None, None, int(sys.argv[1]), lambda text: print(text, flush=True))
    for number, _ in enumerate(ray.run(nap, range(10**6))):
        print("ended", number, flush=True)
except DataPrepError as error:
    sys.exit(f"error: {error}")
"""


def _drive(ray, memory_bytes: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", _DRIVER, str(memory_bytes)],
        cwd=ROOT,
        env=ray.environment | {"RAY_ADDRESS": ray.gcs_address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_nodes_that_join_later_get_tasks_and_only_what_fits_their_memory(tmp_path):
    with ray_here(tmp_path / "ray.log", cpus=0, RAY_AUTH_MODE="disabled") as ray:
        driver = _drive(ray, 600_000_000)
        ray.add_node(2, "--memory", 1_000_000_000)
        line = driver.stdout.readline()
        assert line == "1 worker(s) on 1 node(s) of the Ray cluster\n", line + driver.stderr.read()
        assert driver.stdout.readline() == "ended 0\n"
        ray.add_node(2, "--memory", 1_300_000_000)
        news = next(line for line in driver.stdout if not line.startswith("ended"))
        assert news == "3 worker(s) on 2 node(s) of the Ray cluster\n"
        driver.kill()
        driver.wait()
        refused = _drive(ray, 10**12)
        output, errors = refused.communicate(timeout=60)
    assert refused.returncode == 1 and "Traceback" not in errors, errors
    told = "a task takes 1,000,000,000,000 bytes of memory, and no node of the Ray cluster has more than 1,300,000,000"
    assert f"error: {told}: lower resources.worker_memory_bytes" in errors
    assert output == f"{told}; waiting 1 s for a larger one\n"


def _fail_on_three(number: int) -> dict:
    if number == 3:
        raise DataPrepError("three is broken")
    return {"number": number}


def _end_process(number: int) -> dict:
    os._exit(9)


def test_local_pool_runs_every_task_once_and_passes_errors_on():
    executor = LocalExecutor(2)
    try:
        assert sorted(r["number"] for r in executor.run(_fail_on_three, range(10, 40))) == list(range(10, 40))
        with pytest.raises(DataPrepError, match="three is broken"):
            list(executor.run(_fail_on_three, range(6)))
        with pytest.raises(DataPrepError, match="a worker process was killed"):
            list(executor.run(_end_process, range(3)))
    finally:
        executor.close()


def test_without_a_cluster_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    # What this process says to Ray is put back; a sign of life is asked for as often as Ray's servers allow.
    asked_for = "RAY_grpc_client_keepalive_time_ms"
    monkeypatch.setenv(asked_for, "")
    monkeypatch.delenv(asked_for)
    with pytest.raises(DataPrepError, match="no Ray cluster can be reached"):
        make_executor("ray", None)
    assert 60_000 < int(os.environ[asked_for]) < 90_000


def test_a_long_error_of_a_node_is_told_with_its_end():
    """A trace of a worker has its reason at the end."""
    error = ValueError("begins here " + "at a line\n" * 100 + "no module named data_prep")
    told = _in_short(error)
    assert told.startswith("begins here at a line at") and told.endswith("no module named data_prep")
    assert len(told) < 410 and "\n" not in told and _in_short(ValueError("a\n b")) == "a b"


def test_a_long_tmpdir_is_told(corpus, prepared, tmp_path, monkeypatch):
    folder = tmp_path / ("x" * 90)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    tree = settings(tmp_path / "out", [corpus], resources={"workers": 2, "task_bytes": 1})
    tree["tokenizer"] = {"load": str(prepared / "tokenizer" / "tokenizer.model")}
    result = command_line(tree, tmp_path, "run")
    assert result.returncode == 2 and f"error: TMPDIR: {folder} is too long a path" in result.stderr, (
        result.stderr
    )


def test_usable_cores():
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
