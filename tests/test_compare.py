"""The comparison of runs agrees where it must, and one sample, mask, loss or element is enough for it to differ."""

import dataclasses
import json

import pytest
import torch

from sutrain import checkpoint as checkpoints
from sutrain.checkpoint_writer import save_checkpoint
from sutrain.compare import Step, compare_checkpoints, compare_steps, golden_text, main, read_steps

STEPS = {n: Step(f"{n:012x}", 12 * n, 5.0 / n, 1.0 + n) for n in range(1, 6)}


def a_run(folder, steps=STEPS, weight=(1.0, 2.0, 3.0), moment=(0.1, 0.2, 0.3), skipped=0, updates=5):
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as file:
        for number, step in steps.items():
            line = {"kind": "step", "step": number, "batch_fingerprint": step.fingerprint, "loss": step.loss}
            line |= {"samples_consumed_total": step.samples_consumed, "grad_norm": step.grad_norm}
            file.write(json.dumps(line) + "\n")
    slices = [
        (checkpoints.MASTER, "a", 0, torch.tensor(weight[:2])), (checkpoints.MASTER, "a", 2, torch.tensor(weight[2:])),
        ("moment", "a", 0, torch.tensor(moment)),
    ]  # fmt: skip
    counters = {"steps": 5, "samples_consumed": 60, "tokens": 100, "skipped": skipped}
    counters["optimizer"] = {"updates": updates}
    save_checkpoint(folder / "checkpoints", 5, slices, {"row|a": torch.ones(2)}, {"a": [3]}, counters)
    return folder


def test_a_run_agrees_with_itself_and_with_its_golden_file(tmp_path, capsys):
    run = a_run(tmp_path / "a")
    golden = tmp_path / "golden.txt"
    assert main([str(run), "--write-golden", str(golden)]) == 0
    assert read_steps(golden) == read_steps(run) == STEPS
    assert main([str(golden), str(run), "--exact"]) == 0
    assert main([str(run), str(a_run(tmp_path / "b")), "--exact"]) == 0
    assert "5 steps compared: they agree" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fingerprint": "0" * 11 + "f"}, "step 3: documents or masks differ"),
        ({"samples_consumed": 37}, "step 3: samples_consumed differ: 36 and 37"),
        ({"loss": 5.0 / 3 * (1 + 1e-15)}, "step 3: loss"),
        ({"grad_norm": 4.0 * (1 + 1e-15)}, "step 3: grad_norm"),
        ({"loss": float("nan")}, "step 3: loss"),
    ],
)
def test_one_number_of_one_step_is_enough(change, said):
    other = STEPS | {3: dataclasses.replace(STEPS[3], **change)}
    differences = compare_steps(STEPS, other, tolerance=0)
    assert len(differences) == 1 and differences[0].startswith(said)
    within = [line for line in compare_steps(STEPS, other, tolerance=1e-3) if "nan" not in line]
    assert bool(within) == ("fingerprint" in change or "samples_consumed" in change)


def test_a_step_that_one_run_lacks_in_the_middle_is_a_difference_and_a_shorter_run_is_not():
    assert compare_steps(STEPS, {n: STEPS[n] for n in (1, 2, 3)}, 0) == []
    assert "step 2: only one" in compare_steps(STEPS, {n: STEPS[n] for n in (1, 3)}, 0)[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight": (1.0, 2.0, 3.0000002)}, "master of a differs"),
        ({"moment": (0.1, 0.2, 0.30000004)}, "moment of a differs"),
        ({"skipped": 1}, "counter skipped differs"),
        ({"updates": 4}, "counter updates differs"),
        ({"weight": (1.0, 2.0, 3.0, 4.0)}, "master of a differs"),
        ({"weight": (1.0, 2.0, -0.0)}, "master of a differs"),
    ],
)
def test_one_element_of_the_state_is_enough(tmp_path, change, said):
    one, other = a_run(tmp_path / "a"), a_run(tmp_path / "b", **change)
    assert [line.partition(": ")[2] for line in compare_checkpoints(one, other)] == [said]
    assert main([str(one), str(other), "--exact"]) == 1
    assert main([str(one), str(other)]) == 0, "without --exact only what is logged is compared"


def test_what_cannot_be_compared_is_said(tmp_path, capsys):
    (tmp_path / "golden.txt").write_text("# header\n1 abc\n")
    assert main([str(tmp_path / "golden.txt"), str(a_run(tmp_path / "a"))]) == 2
    assert "golden.txt, line 2: expected step fingerprint" in capsys.readouterr().err
    (tmp_path / "other.txt").write_text(golden_text({9: STEPS[1]}))
    assert main([str(tmp_path / "other.txt"), str(tmp_path / "a")]) == 2
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "a")]) == 2
    assert main([str(tmp_path / "a"), "--write-golden", str(tmp_path / "nodir/golden.txt")]) == 2
    assert "nodir/golden.txt" in capsys.readouterr().err
