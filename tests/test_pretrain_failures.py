"""Training that meets what it cannot use: damaged data, on one rank or all, and updates that are not finite."""

import contextlib
import json
import os
import pty
import shutil
import socket
import subprocess
import sys

import pytest

from sutrain.launch import EXIT_FAILURE, EXIT_STOPPED
from tests import warm
from tests.conftest import ROOT, environment
from tests.test_pretrain import launch, records, write_run


def damaged_copy(dataset, damaged):
    """The data set with a wrong bit in the third block of 64 rows, first read in the eleventh update of 12 rows."""
    shutil.copytree(dataset, damaged)
    shard = damaged / "train/shard-000000.tar"
    block = json.loads(shard.with_name("shard-000000.index.json").read_text())["blocks"][2]
    assert block["first_row"] == 128
    content = bytearray(shard.read_bytes())
    content[block["tokens"][0] + block["tokens"][1] // 2] ^= 1
    shard.write_bytes(content)
    return damaged


def test_what_only_one_rank_meets_is_said_and_ends_the_run(dataset, tmp_path):
    """That update's second half is rank 1's."""
    damaged = damaged_copy(dataset, tmp_path / "data")
    process = launch(write_run(tmp_path, damaged), 2, launcher=True)
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert f"error (rank 1 on {socket.gethostname()}):" in output and "block 2 is damaged" in output, output
    assert "Traceback" not in output, output
    assert max(records(tmp_path / "run")) == 10


def test_a_failure_leaves_terminal_and_log_in_order(dataset, tmp_path):
    config = write_run(tmp_path, damaged_copy(dataset, tmp_path / "data"))
    terminal, its_end = pty.openpty()
    command = [sys.executable, "sutrain/pretrain.py", "--config", str(config)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(TERM="xterm"), stdout=its_end, stderr=its_end
    )
    os.close(its_end)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal without a process says that it is at its end
        while piece := os.read(terminal, 65536):
            shown += piece
    os.close(terminal)
    assert process.wait(timeout=60) == EXIT_FAILURE, shown.decode()
    hidden, visible, error = (
        shown.rfind(text) for text in (b"\x1b[?25l", b"\x1b[?25h", b"block 2 is damaged")
    )
    assert 0 <= hidden < visible < error, shown.decode()
    assert max(records(tmp_path / "run")) == 10


POISON = """
import sys
from sutrain.pretrain import Run, parse_arguments

run = Run(parse_arguments(sys.argv[1:]))
gradient_of = next(run.engine.module.parameters()).register_hook

def poison(gradient):
    return gradient * float("inf") if run.steps_done == 3 else gradient

gradient_of(poison)
step = run.step
seen = []

def watched(batches):
    before = [piece.values().clone() for piece in run.fragments.fragments]
    record = step(batches)
    after = [piece.values() for piece in run.fragments.fragments]
    seen.append(all(bool((a == b).all()) for a, b in zip(before, after)))
    return record

run.step = watched
run.train()
print("unchanged:", [i + 1 for i, same in enumerate(seen) if same], "skipped:", run.skipped)
"""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_update_that_is_not_finite_is_dropped_counted_and_trained_over(dataset, tmp_path, precision):
    config = write_run(
        tmp_path, dataset, precision=precision, steps=6, schedule={"shape": "constant"},
        evaluation={"every_steps": 6, "sequences": 8},
    )  # fmt: skip
    command = ["-c", POISON, "--config", config]
    output = warm.run(*command).stdout
    assert "unchanged: [4] skipped: 1" in output, output
    steps = records(tmp_path / "run")
    assert [steps[step]["skipped_steps_total"] for step in range(1, 7)] == [0, 0, 0, 1, 1, 1]
    assert steps[6]["samples_consumed_total"] == 72
    assert steps[4]["layers"]["update_norm"][0] == "NaN" and steps[5]["layers"]["update_norm"][0] > 0
    # A run that goes on does not take what was skipped before its checkpoint for a broken step of its own.
    output = warm.run(*command, "--steps=8", "--acting.stop_after_broken_steps=1").stdout
    assert "unchanged: [] skipped: 1" in output, output


def test_a_streak_of_broken_steps_goes_on_where_the_run_does(dataset, tmp_path):
    """Begun anew at every start, it would never be long enough for a run that is started again: the steps of a run
    without a finite loss would push its good checkpoints out. And a rest of the split is told."""
    config = write_run(
        tmp_path, dataset, steps=20, acting={"stop_after_broken_steps": 4},
        checkpoint={"every_steps": 1, "keep_last": 20},
        schedule={"shape": "piecewise_linear", "points": {0: 1.0, 3: 1.0, 4: 1e38, 20: 1e38}},
        evaluation={"every_steps": 100, "sequences": 100_000}, monitor={"port": 0, "probe_every_steps": 0},
    )  # fmt: skip
    dumps = []
    for start in ("starting step 0", "resumed at step"):
        process = launch(config, 0)
        output = process.communicate(timeout=120)[0]
        assert process.returncode == EXIT_STOPPED and "Traceback" not in output, output
        assert start in output and "held-out rows; evaluation.sequences asks for 100000" in output
        (dump,) = (tmp_path / "run").glob("dump-step-*.json")
        dumps.append(json.loads(dump.read_text()))
    assert dumps[0]["step"] == dumps[1]["step"] and dumps[0]["last_good_checkpoint"] is not None
    assert dumps[0]["last_good_checkpoint"] == dumps[1]["last_good_checkpoint"]
