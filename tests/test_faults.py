"""Kill -9 at random moments, over and over: the result is that of an undisturbed run. Long; `make test-slow`."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.conftest import ROOT, RUN, chinese_texts, environment
from tests.test_pretrain import launch, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
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
