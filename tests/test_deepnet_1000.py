"""A thousand layers on two ranks under DeepSpeed: text is learned where the control stays at the unigram. Very long."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * 3600)]
CONTROL = ["--model.residual=post", "--model.initialisation=plain"]


def run(command, folder):
    result = subprocess.run(
        command,
        cwd=folder,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=2 * 3600,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the demo's data lies, prepared as `make demo` does."""
    folder = tmp_path_factory.mktemp("deepnet")
    run([sys.executable, "-m", "data_prep.fetch", "china-law", "--output", "runs/demo/raw"], folder)
    run([sys.executable, "-m", "data_prep", "--config", str(ROOT / "configs/data/demo.yaml"), "run"], folder)
    return folder


def trained(folder, name, *changes):
    """Losses by update and the last evaluation."""
    command = ["deepspeed", "--num_gpus", "2", str(ROOT / "sutrain/pretrain.py"), f"--run_dir=runs/{name}"]
    command += ["--config", str(ROOT / "configs/pretrain/deepnet_1000_tiny.yaml"), *changes]
    run(command, folder)
    records = map(json.loads, (folder / f"runs/{name}/metrics.jsonl").read_text().splitlines())
    records = [r for r in records if r["kind"] in ("step", "evaluation")]
    losses = [r["loss"] for r in records if r["kind"] == "step"]
    return losses, [r for r in records if r["kind"] == "evaluation"][-1]


def unigram_entropy(folder):
    """Of the training text, without special tokens, nats: the loss of guessing by frequency alone."""
    counts = np.fromfile(folder / "runs/demo/data/token_counts.bin", dtype="<u8")[5:].astype(float)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def test_a_thousand_layers_learn_within_a_hundred_updates_and_the_control_does_not(folder, evidence):
    entropy = unigram_entropy(folder)
    losses, last = trained(folder, "deepnet")
    control_losses, control = trained(folder, "control", *CONTROL)
    evidence(
        unigram_entropy=entropy, losses=losses, last=last, control_losses=control_losses, control=control
    )
    assert len(losses) == len(control_losses) <= 100
    assert last["validation_loss"] < entropy and sum(losses[-10:]) / 10 < entropy
    assert last["validation_loss"] < control["validation_loss"] - 0.1
    assert last["validation_accuracy"] > 1.2 * last["unigram_accuracy"]
    assert control["validation_loss"] > entropy - 0.05
