"""Straight 60 steps against every way of interrupting them, on real DeepSpeed. Long; `make test-slow`.

Each comparison is that of sutrain.compare; the last tests show that it fails when one mask, one sample or one element
of the state is changed by hand.
"""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import yaml
from safetensors.torch import load_file

from sutrain import checkpoint as checkpoints
from sutrain import checkpoint_writer
from sutrain.compare import compare_checkpoints, compare_steps, read_steps, whole_state
from tests.conftest import ROOT, RUN, environment
from tests.test_pretrain import free_port, launch, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
STEPS = 60
NO_DROPOUT = {**RUN["model"], "hidden_dropout": 0.0, "attention_dropout": 0.0}
ENGINES = [
    *((stage, optimizer, "bf16") for stage in (1, 2, 3) for optimizer in ("adafactor", "lamb", "adamw")),
    (0, "adafactor", "fp32"), (1, "adafactor", "fp32"),
]  # fmt: skip


def write(folder, dataset, **changes):
    tree = {
        **RUN, "run_dir": str(folder / "straight"), "data": {"dir": str(dataset)}, "steps": STEPS,
        # 120 rows a step of 2,595: the epoch ends inside of step 22, and again inside of step 44
        "batch": {"global_sequences": 120, "micro_sequences": 20}, "checkpoint": {"every_steps": 1, "keep_last": 100},
        "schedule": {"shape": "constant"}, "evaluation": {"every_steps": 30, "sequences": 40},
        "monitor": {"port": 0, "probe_every_steps": 0}, **changes,
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder / "run.yaml"


def cut(run_dir, target, step):
    """A copy of a run as it was after `step`: later checkpoints are gone, as after a kill between two of them."""
    shutil.copytree(run_dir, target)
    for folder in (target / "checkpoints").glob("step-*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    (target / "checkpoints/best.json").unlink(missing_ok=True)
    return target


def differences(one, other, exact=True, tolerance=0.0):
    found = compare_steps(read_steps(one), read_steps(other), 0 if exact else tolerance)
    return found + (compare_checkpoints(one, other) if exact else [])


@pytest.fixture(scope="module")
def bf16(dataset, tmp_path_factory):
    """60 steps on two ranks in bf16 with dropout, with a checkpoint after each; (config, run folder)."""
    config = write(tmp_path_factory.mktemp("bf16"), dataset)
    train(config, 2)
    losses = [step.loss for step in read_steps(config.parent / "straight").values()]
    assert losses[-1] < losses[0] - 0.5, "the loss falls"
    return config, config.parent / "straight"


@pytest.fixture(scope="module")
def fp32(dataset, tmp_path_factory):
    """The same in fp32 without dropout, where only the order of sums may differ between worlds; and with a smooth
    activation, for a unit at the edge of ReLU that flips makes two runs differ by more than all sums (LOG.md)."""
    model = {**NO_DROPOUT, "activation": "gelu"}
    config = write(tmp_path_factory.mktemp("fp32"), dataset, precision="fp32", model=model)
    train(config, 2)
    return config, config.parent / "straight"


@pytest.mark.parametrize(("stage", "optimizer", "precision"), ENGINES)
def test_thirty_and_thirty_are_sixty_for_every_engine(dataset, tmp_path, stage, optimizer, precision):
    rate = {"adafactor": 0.05, "lamb": 0.02, "adamw": 0.002}[optimizer]
    zero = {"stage": stage} | ({"whole_below_parameters": 0} if stage == 3 else {})
    changes = {"optimizer": {"name": optimizer, "learning_rate": rate}, "zero": zero, "precision": precision}
    config = write(tmp_path, dataset, **changes, checkpoint={"every_steps": 30})
    train(config, 2)
    resumed = cut(tmp_path / "straight", tmp_path / "resumed", 30)
    assert "resumed at step 30" in train(config, 2, f"--run_dir={resumed}")
    assert differences(tmp_path / "straight", resumed) == []
    losses = [step.loss for step in read_steps(resumed).values()]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("step", [21, 22, 43])
def test_at_an_epoch_boundary_and_twice_in_a_row(bf16, tmp_path, step):
    config, straight = bf16
    resumed = cut(straight, tmp_path / "resumed", step)
    train(config, 2, f"--run_dir={resumed}", f"--steps={STEPS}")
    assert differences(straight, resumed) == []
    again = cut(resumed, tmp_path / "again", step + 3)
    train(config, 2, f"--run_dir={again}")
    assert differences(straight, again) == []


@pytest.mark.parametrize("workers", [0, 4])
def test_another_number_of_loader_workers_gives_the_same_bits(bf16, tmp_path, workers):
    config, straight = bf16
    resumed = cut(straight, tmp_path / "resumed", 40)
    train(config, 2, f"--run_dir={resumed}", f"--data.workers={workers}", "--data.prefetch_updates=5")
    assert differences(straight, resumed) == []


def test_sigterm_and_sigusr1_leave_checkpoints_from_which_the_bits_are_the_same(bf16, tmp_path):
    config, straight = bf16
    stopped = tmp_path / "stopped"
    rare = [f"--run_dir={stopped}", "--checkpoint.every_steps=1000", "--evaluation.every_steps=1000"]
    for number in (signal.SIGUSR1, signal.SIGTERM):
        process = launch(config, 2, *rare, start_new_session=True)
        for line in process.stdout:
            if line.startswith(("starting step", "resumed at step")):
                break
        kept = set((stopped / "checkpoints").glob("step-*"))
        os.killpg(process.pid, number) if number == signal.SIGTERM else [
            os.kill(json.loads(file.read_text())["pid"], number)
            for file in stopped.glob("heartbeats/rank-*.json")
        ]
        if number == signal.SIGUSR1:
            while not set((stopped / "checkpoints").glob("step-*")) - kept:
                assert process.poll() is None, "it goes on after SIGUSR1"
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=580)
    train(config, 2, f"--run_dir={stopped}")
    assert differences(straight, stopped) == []


@pytest.mark.parametrize("worlds", [(1, 2), (3, 2), (2, 2)])
def test_other_worlds_read_the_same_and_lose_nothing_of_the_state(fp32, tmp_path, worlds, evidence):
    """2 -> 1 -> 2, 2 -> 3 -> 2, 2 all along; in other micro-batches: state loaded is state saved, losses agree."""
    config, straight = fp32
    moved = cut(straight, tmp_path / "moved", 30)
    saved = whole_state(moved / "checkpoints/step-00000030")
    for ranks, steps in zip(worlds, (40, STEPS), strict=True):
        if ranks != 2:  # no step: what is loaded is written again
            copy = cut(straight, tmp_path / "copy", 30)
            train_zero_steps(config, ranks, copy)
            again = whole_state(copy / "checkpoints/step-00000030")
            assert saved.keys() == again.keys()
            assert all((saved[key] == again[key]).all() for key in saved), "load and save reproduce the state"
        train(config, ranks, f"--run_dir={moved}", f"--steps={steps}", "--batch.micro_sequences=10")
    a, b = read_steps(straight), read_steps(moved)
    ten = {step: a[step] for step in range(31, 41)}
    off = {step: abs(a[step].loss - b[step].loss) / a[step].loss for step in a}
    evidence(worlds=worlds, largest_in_ten=max(off[step] for step in ten), at_sixty=off[STEPS])
    assert compare_steps(a, b, 1e-5) == [] and compare_steps(ten, b, 1e-6) == []


SAVE_AT_ONCE = """
import sys
from sutrain.pretrain import Run, parse_arguments
run = Run(parse_arguments(sys.argv[1:]))
assert run.resume()
run.outputs = type("Nothing", (), {"checkpoint": lambda *_: None})()
run.save()
run.writer.wait()
"""


def train_zero_steps(config, ranks, run_dir):
    script = run_dir.parent / f"save_{ranks}.py"
    script.write_text(f"import sys\nsys.path[0] = {str(ROOT)!r}\n" + SAVE_AT_ONCE)
    command = [
        f"{sys.prefix}/bin/deepspeed",
        "--num_gpus",
        str(ranks),
        f"--master_port={free_port()}",
        str(script),
    ]
    command += ["--config", str(config), f"--run_dir={run_dir}"]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("file_name", "prefix"), [("rank-00000.safetensors", "master|"), ("replicated.safetensors", "row_mean|")]
)
def test_one_element_of_the_state_changed_by_hand_is_seen(bf16, tmp_path, file_name, prefix):
    """Of the master weights, and of what AdaFactor remembers."""
    config, straight = bf16
    perturbed = cut(straight, tmp_path / "perturbed", 50)
    folder = perturbed / "checkpoints/step-00000050"
    file = folder / file_name
    tensors = {name: values.clone() for name, values in load_file(file).items()}  # not mapped to the file
    key = max((key for key in tensors if key.startswith(prefix)), key=lambda key: tensors[key].numel())
    tensors[key].view(-1)[7] = tensors[key].view(-1)[7] * 1.5 + 1e-3
    checkpoint_writer.write_tensors(file, tensors)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("xxh3_128")
    manifest["files"][file.name] = json.loads(file.with_suffix(".json").read_text())
    checkpoint_writer._write_json(
        folder / "manifest.json", manifest | {"xxh3_128": checkpoints.json_checksum(manifest)}
    )
    train(config, 2, f"--run_dir={perturbed}")
    found = differences(straight, perturbed)
    assert any("loss" in line for line in found) and any("master of" in line for line in found), found
    assert not any("documents or masks" in line for line in found)
