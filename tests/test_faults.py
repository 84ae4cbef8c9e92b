"""Kill -9 at random moments, over and over: the result is that of an undisturbed run. Long; `make test-slow`."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import yaml

from sutrain.compare import compare_checkpoints, compare_steps, read_steps
from tests.conftest import ROOT, RUN, chinese_texts, environment
from tests.test_pretrain import free_port, launch, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
KILLS = 6


def kill_group(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_training_killed_at_random_moments_ends_with_the_same_weights(dataset, tmp_path, evidence):
    """ZeRO-1, bf16, dropout on, two ranks; a checkpoint every 20 of 300 steps. The moments are drawn from a seed
    between the first step and the end, so some fall into saving and pruning."""
    tree = {
        **RUN,
        "run_dir": str(tmp_path / "straight"),
        "data": {"dir": str(dataset)},
        "steps": 300,
        "checkpoint": {"every_steps": 20},
        "evaluation": {"every_steps": 60, "sequences": 40},
    }
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree))
    train(config, 2)
    draw, stopped_at = random.Random(5), []
    killed = tmp_path / "killed"
    for _ in range(KILLS):
        process = launch(config, 2, f"--run_dir={killed}", start_new_session=True)
        for line in process.stdout:
            if line.startswith(("starting step", "resumed at step")):
                break
        time.sleep(draw.uniform(0.0, 2.5))
        kill_group(process)
        saved = sorted(path.name for path in (killed / "checkpoints").glob("step-*"))
        stopped_at.append(saved[-1] if saved else "none")
    train(config, 2, f"--run_dir={killed}")
    results = [
        {
            file.name: file.read_bytes()
            for file in (folder / "checkpoints/step-00000300").glob("*.safetensors")
        }
        for folder in (tmp_path / "straight", killed)
    ]
    evidence(kills=KILLS, newest_checkpoint_after_each=stopped_at, identical=results[0] == results[1])
    assert len(results[0]) == 3 and results[0] == results[1]
    losses = [
        {
            r["step"]: r["loss"]
            for r in map(json.loads, (folder / "metrics.jsonl").open())
            if r["kind"] == "step"
        }
        for folder in (tmp_path / "straight", killed)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 300


CHAOS_STEPS = 700


def chaos_config(tmp_path, dataset, name, **changes):
    tree = {
        **RUN,
        "run_dir": str(tmp_path / name),
        "data": {"dir": str(dataset), "workers": 2},
        "steps": CHAOS_STEPS,
        "checkpoint": {"every_steps": 2},
        "evaluation": {"every_steps": 4, "sequences": 8},
        "monitor": {"port": 0, "probe_every_steps": 0},
        **changes,
    }
    config = tmp_path / f"{name}.yaml"
    config.write_text(yaml.safe_dump(tree))
    return config


def supervised(config, run_dir, **variables):
    """A supervised run of tests/faulty.py on two ranks, as a user would start it; (exit status, output)."""
    command = [sys.executable, "-m", "sutrain.supervise", "--restarts=20", "--pause_seconds=0.1"]
    command += [
        "--hang_seconds=25",
        "--start_seconds=180",
        "--",
        f"{sys.prefix}/bin/deepspeed",
        "--num_gpus",
        "2",
    ]
    command += [
        "--master_port",
        str(free_port()),
        "tests/faulty.py",
        "--config",
        str(config),
        f"--run_dir={run_dir}",
    ]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(**variables),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return result.returncode, result.stdout


@pytest.mark.timeout(7200)
def test_a_hundred_faults_end_with_the_losses_and_weights_of_a_quiet_run(dataset, tmp_path, evidence):
    """Kills, hangs and errors in step, loader, save, publication, prune, evaluation and resume."""
    faults, seed = int(os.environ.get("SUTRAIN_FAULTS", 100)), 11
    quiet = chaos_config(tmp_path, dataset, "quiet")
    train(quiet, 2)
    started = time.monotonic()
    status, output = supervised(quiet, tmp_path / "chaos", FAULTS=str(faults), FAULTS_SEED=str(seed))
    assert status == 0, output[-4000:]
    met = [json.loads(line) for line in (tmp_path / "chaos/faults.jsonl").read_text().splitlines()]
    told = [json.loads(line) for line in (tmp_path / "chaos/supervise.jsonl").read_text().splitlines()]
    differences = [
        *compare_steps(read_steps(tmp_path / "quiet"), read_steps(tmp_path / "chaos"), tolerance=0),
        *compare_checkpoints(tmp_path / "quiet", tmp_path / "chaos"),
    ]
    phases = Counter(f"{fault['phase']}: {fault['kind']}" for fault in met)
    evidence(
        seed=seed, faults=len(met), phases=dict(phases), hangs=sum(line["event"] == "hang" for line in told),
        starts=sum(line["event"] == "start" for line in told), seconds=time.monotonic() - started,
        differences=differences,
    )  # fmt: skip
    assert not differences
    assert len(met) == faults, "the run ended before all faults were met"
    by_phase = Counter(fault["phase"] for fault in met)
    assert faults < 100 or (len(by_phase) == 8 and min(by_phase.values()) >= 3), by_phase


PHASES = ("training step", "loader", "file", "publish", "prune")


def test_killed_in_every_phase_at_least_three_times(dataset, tmp_path, evidence):
    """Twenty kills with SIGKILL, four in each phase, and in the build of the extension three more."""
    quiet = chaos_config(tmp_path, dataset, "quiet", steps=60)
    train(quiet, 2)
    killed = tmp_path / "killed"
    draw, met = random.Random(3), []
    for phase in PHASES * 4:
        rank = 0 if phase in ("publish", "prune") else draw.randrange(2)
        plan = f"{phase} {draw.randint(1, 4)} {rank} kill"
        run_faulty(quiet, killed, FAULT=plan)
        met.append(plan)
    extensions = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    for seconds in (0.5, 2, 4):
        process = launch(quiet, 2, f"--run_dir={killed}", start_new_session=True, variables=extensions)
        wait_for(tmp_path / "extensions/deepspeed_shm_comm/build.ninja")
        time.sleep(seconds)
        kill_group(process)
        met.append(f"extension {seconds} s")
    train(quiet, 2, f"--run_dir={killed}", variables=extensions)
    differences = [
        *compare_steps(read_steps(tmp_path / "quiet"), read_steps(killed), tolerance=0),
        *compare_checkpoints(tmp_path / "quiet", killed),
    ]
    logged = Counter(json.loads(line)["phase"] for line in (killed / "faults.jsonl").read_text().splitlines())
    evidence(seed=3, kills=met, logged=dict(logged), differences=differences)
    assert not differences
    assert all(logged[phase] >= 3 for phase in PHASES), logged


def run_faulty(config, run_dir, **variables):
    command = [
        f"{sys.prefix}/bin/deepspeed",
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
        "tests/faulty.py",
    ]
    command += ["--config", str(config), f"--run_dir={run_dir}"]
    subprocess.run(
        command, cwd=ROOT, env=environment(**variables), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def wait_for(path, seconds=120):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.05)


def test_preparation_killed_at_random_moments_gives_the_same_content(tmp_path, evidence):
    source = tmp_path / "raw"
    source.mkdir()
    for number in range(4):
        lines = (json.dumps({"text": text}) + "\n" for text in chinese_texts(20_000, seed=number))
        (source / f"part-{number}.jsonl").write_text("".join(lines), encoding="utf-8")
    config = {
        "seed": 3,
        "output_dir": str(tmp_path / "straight"),
        "corpora": [{"name": "made", "paths": [str(source)]}],
        "tokenizer": {"train": {"vocab_size": 400, "sample_bytes": 1_000_000}},
        "shards": {"row_tokens": 64, "validation_share": 0.05, "target_bytes": 400_000},
        "resources": {"workers": 2, "task_bytes": 1_000_000},
    }
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "data_prep", "run", "--config", str(tmp_path / "data.yaml")]
    started = time.monotonic()
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True)
    undisturbed = time.monotonic() - started
    draw, moments = random.Random(7), []
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command.append(f"--output_dir={tmp_path / 'killed'}")
    for _ in range(KILLS):
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True, **quiet)
        moments.append(draw.uniform(0.5, undisturbed))
        time.sleep(moments[-1])
        kill_group(process)
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True)
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("straight", "killed")]
    shards = [
        {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.glob("*/shard-*")}
        for folder in (tmp_path / "straight", tmp_path / "killed")
    ]
    evidence(
        kills=KILLS,
        undisturbed_seconds=undisturbed,
        killed_after_seconds=moments,
        identical=shards[0] == shards[1],
    )
    assert manifests[0] == manifests[1] and shards[0] == shards[1] and len(shards[0]) > 4
    shutil.rmtree(tmp_path)
