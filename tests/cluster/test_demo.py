"""The demo and the commands of the README: the whole road through real parts; in full when slow tests run."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time

import psutil
import pytest

from cluster.demo import DemoError, ray_cluster
from tests.conftest import FEW_STEPS, environment, run_demo
from tests.test_readme import commands


def test_every_stage_runs_and_the_table_tells_what_came_out(short_demo):
    workspace, output = short_demo
    assert "ray job submit" in output and "deepspeed" in output
    for expected in ("MLM accuracy", "unigram baseline", "at step 4", "tokens/s (median)", "→"):
        assert expected in output, output
    demo = workspace / "runs/demo"
    for name in (
        "data/manifest.json",
        "roformer_v2_tiny/report.html",
        "roformer_v2_tiny/metrics.jsonl",
        "model/model.safetensors",
    ):
        assert (demo / name).is_file(), name
    assert json.loads((demo / "data/run.json").read_text())["executor"] == "ray"


def test_a_second_demo_finishes_at_once(short_demo):
    workspace, _ = short_demo
    before = (workspace / "runs/demo/model/model.safetensors").stat().st_mtime_ns
    started = time.monotonic()
    process = run_demo(workspace, *FEW_STEPS, "--monitor.port=0", "--ranks=1")
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    assert "all 8 steps are done already" in output and "exported already" in output
    assert "ray job submit" not in output
    assert (workspace / "runs/demo/model/model.safetensors").stat().st_mtime_ns == before
    assert time.monotonic() - started < 90


def alive_in_session(leader):
    found = []
    for process in psutil.process_iter(["status", "cmdline", "environ"]):
        marked = (process.info["environ"] or {}).get("SUTRAIN_TEST_MARK") == leader
        if marked and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(" ".join(process.info["cmdline"] or []))
    return found


@pytest.mark.parametrize("stage", ["preparation", "training"])
def test_ctrl_c_leaves_nothing_running_and_nothing_half_written(short_demo, tmp_path, stage):
    workspace, _ = short_demo
    demo = tmp_path / "demo"
    if stage == "training":  # the data set is there already
        shutil.copytree(workspace / "runs/demo/raw", demo / "raw")
        shutil.copytree(workspace / "runs/demo/data", demo / "data")
    arguments = ["--output", str(demo), "--monitor.port=0"]
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    process = run_demo(workspace, *arguments, SUTRAIN_TEST_MARK=mark)
    moment = "Running entrypoint" if stage == "preparation" else "step 1/"
    try:
        seen = ""
        for line in process.stdout:
            seen += line
            if moment in line:
                break
        assert moment in seen, seen
        assert alive_in_session(mark)
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode not in (0, None)
    assert "goes on from here" in rest and "Traceback" not in rest, rest
    assert not alive_in_session(mark)
    if stage == "training":  # it left a checkpoint that the next start finds
        assert list((demo / "roformer_v2_tiny/checkpoints").glob("step-*/manifest.json")), rest
    else:
        assert not (demo / "data/manifest.json").exists()


def test_a_ray_that_does_not_start_leaves_no_folder_behind(tmp_path, monkeypatch):
    (tmp_path / "ray").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "ray").chmod(0o755)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("cluster.demo.BINARIES", tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    with pytest.raises(DemoError, match="Ray did not start"), ray_cluster(tmp_path / "log"):
        pass
    assert not list((tmp_path / "temporary").iterdir())


LONGER = ["--steps=100000", "--evaluation.every_steps=100000", "--checkpoint.every_steps=20"]
"""So that the short demo's run goes on and is still training when its metrics are asked for."""


def test_every_command_runs_in_the_order_given(short_demo):
    """In the workspace of a short demo, so that nothing takes long: what is done says so, training is cut short."""
    workspace, _ = short_demo
    training = None
    try:
        for line in commands("README.md"):
            words = shlex.split(line)
            if words[0] in ("make", "source"):
                continue
            if words[0] == "deepspeed":
                training = subprocess.Popen(
                    words + LONGER, cwd=workspace, env=environment(), start_new_session=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                )  # fmt: skip
                continue
            if words[0] == "curl":
                assert "sutrain_update_norm{" in until_it_answers(words)
                os.killpg(training.pid, signal.SIGTERM)
                assert "stopped after step" in training.communicate(timeout=120)[0]
                continue
            result = subprocess.run(
                words, cwd=workspace, env=environment(), capture_output=True, text=True, timeout=300
            )
            assert result.returncode == 0, f"{line}\n{result.stdout}{result.stderr}"
    finally:
        if training is not None and training.poll() is None:
            os.killpg(training.pid, signal.SIGKILL)


def until_it_answers(words, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        result = subprocess.run([*words, "--silent", "--fail"], capture_output=True, text=True)
        if "sutrain_update_norm{" in result.stdout:
            return result.stdout
        time.sleep(0.5)
    raise AssertionError(f"no answer to {words}: {result.stderr}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_make_demo_from_nothing(workspace, evidence):
    """`make demo` in a copy without an environment: under 12 minutes, and the model has learned."""
    shell = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "OMP_NUM_THREADS")}
    started = time.monotonic()
    result = subprocess.run(
        ["make", "demo"], cwd=workspace, env=shell, capture_output=True, text=True, timeout=1700
    )
    seconds = time.monotonic() - started
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    lines = (workspace / "runs/demo/roformer_v2_tiny/metrics.jsonl").read_text().splitlines()
    evaluations = {r["step"]: r for r in map(json.loads, lines) if r["kind"] == "evaluation"}
    last, tenth = evaluations[400], evaluations[40]
    numbers = {
        "seconds": round(seconds),
        "accuracy": last["validation_accuracy"],
        "vs_unigram": last["validation_accuracy"] / last["unigram_accuracy"],
        "vs_tenth": last["validation_accuracy"] / tenth["validation_accuracy"],
        "table": re.sub(r"\x1b\[[0-9;]*m", "", result.stdout[-3000:]).splitlines(),
    }
    evidence(**numbers)
    assert numbers["vs_unigram"] >= 2.5 and numbers["vs_tenth"] >= 1.3
    assert seconds < 12 * 60
