"""The same training at every ZeRO stage and precision: a real model on two processes, one launch for all runs."""

import json
import re

import pytest
import torch
import yaml

from sutrain.checkpoint import Checkpoint
from tests import warm
from tests.conftest import RUN
from tests.optim.problem import FP16_ON_CPU
from tests.stage_runs import FP16_RUNS, RUNS

SAME_NUMBERS = 1e-5
"""Relative difference of fp32 losses over 12 steps where only the order of sums differs."""
SIXTEEN_BIT = 0.02
"""… of losses in bf16 or fp16 against fp32; a step that is wrong by a factor shows as more."""


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    """All runs, trained; the folder they are in."""
    folder = tmp_path_factory.mktemp("stages")
    model = {**RUN["model"], "hidden_dropout": 0.0, "attention_dropout": 0.0}
    for name, (changes, _) in (RUNS | (FP16_RUNS if FP16_ON_CPU else {})).items():
        # 38 rows in passes of 2 x 2: in the last one the second rank has none, and must take part all the same.
        evaluation = {"every_steps": 6, "sequences": 38}
        tree = {**RUN, "data": {"dir": str(dataset)}, "model": model, "evaluation": evaluation, **changes}
        own = model | changes.get("model", {})
        tree["model"] = {key: value for key, value in own.items() if value is not None}
        tree["run_dir"] = str(folder / name)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    ports = [str(warm.free_port()) for _ in folder.glob("*.yaml")]
    finished = warm.run("tests/stage_runs.py", folder, *ports, ranks=2, seconds=900)
    assert finished.returncode == 0, finished.stdout[-6000:]
    (folder / "log").write_text(finished.stdout)
    return folder


def steps(runs, name):
    lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record for record in lines if record["kind"] == "step"}


def losses(runs, name):
    return [record["loss"] for _, record in sorted(steps(runs, name).items())]


def held_out(runs, name):
    lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    return [record["validation_loss"] for record in lines if record["kind"] == "evaluation"]


def checkpoint(runs, name, step=12):
    return Checkpoint(runs / name / f"checkpoints/step-{step:08d}")


@pytest.mark.parametrize(
    "name",
    [
        "stage0_fp32",
        "stage2_fp32_offload",
        "stage3_fp32",
        "stage3_fp32_recomputed",
        "stage3_fp32_compiled",
        "stage1_to_stage3",
    ],
)
def test_every_stage_computes_the_same_in_fp32(runs, name):
    """Training loss, held-out loss (whose weights ZeRO-3 brings together), norms by layer, and masters at the end."""
    assert losses(runs, name) == pytest.approx(losses(runs, "stage1_fp32"), rel=SAME_NUMBERS)
    assert held_out(runs, name) == pytest.approx(held_out(runs, "stage1_fp32"), rel=SAME_NUMBERS)
    ours, theirs = steps(runs, name)[11], steps(runs, "stage1_fp32")[11]
    for column in ("grad_norm", "weight_norm", "update_norm"):
        assert ours["layers"][column] == pytest.approx(theirs["layers"][column], rel=1e-4)
    expected = checkpoint(runs, "stage1_fp32").full_weights()
    for tensor, found in checkpoint(runs, name).full_weights().items():
        difference = (found - expected[tensor]).abs().max() / expected[tensor].abs().max()
        assert difference < 1e-4, (tensor, float(difference))


def test_gated_units_whose_output_map_is_entered_again_compute_the_same(runs):
    """Alone, with value and gate projected again, and within a layer that is computed again; ZeRO-3 has to bring the
    map's weights together each time."""
    for found in (losses, held_out):
        assert found(runs, "gated_stage3_recomputed") == pytest.approx(
            found(runs, "gated_stage1"), rel=SAME_NUMBERS
        )
    log = (runs / "log").read_text()
    assert "gated_stage1: projects again" in log and "gated_stage3_recomputed: keeps" in log


def test_layers_were_computed_again_and_compiled(runs):
    """stage3_fp32_recomputed brought their weights together once more in the backward pass, and so did _compiled."""
    log = (runs / "log").read_text()
    assert len(re.findall(r"[12] of 2 layers computed again", log)) == 3
    programs = dict(re.findall(r"^(\w+): (\d+) programs, ", log, re.MULTILINE))
    assert int(programs.pop("stage3_fp32_compiled")) >= 2  # to train and to evaluate
    assert set(programs.values()) == {"0"}
    # DeepSpeed's engine does not import torch's compiler for a run that compiles nothing.
    assert re.findall(r"^(\w+): \d+ programs, with compiler$", log, re.MULTILINE) == ["stage3_fp32_compiled"]


def test_probes_see_the_same_model_whatever_the_stage(runs):
    """Probes put the masters together from the slices of all ranks."""
    found = []
    for name in ("stage1_fp32", "stage3_fp32"):
        lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
        found.append([record for record in lines if record["kind"] == "probe"])
    for ours, theirs in zip(*found, strict=True):
        assert ours["model_update"] == pytest.approx(theirs["model_update"], rel=1e-3, abs=1e-6)
        assert ours["attention_entropy"] == pytest.approx(theirs["attention_entropy"], rel=1e-4)


def files(runs, name):
    return {path.name: path.read_bytes() for path in checkpoint(runs, name).folder.glob("*.safetensors")}


def assert_resumed_bit_for_bit(runs, name):
    assert losses(runs, f"{name}_resumed") == losses(runs, name)
    assert files(runs, f"{name}_resumed") == files(runs, name)
    before, after = checkpoint(runs, name), checkpoint(runs, f"{name}_resumed")
    assert before.counters["optimizer"] == after.counters["optimizer"]


def test_a_resumed_run_at_stage_3_is_the_uninterrupted_one(runs):
    assert_resumed_bit_for_bit(runs, "stage3_fp32")


@pytest.mark.parametrize("name", ["stage3_bf16", "stage3_bf16_offload"])
def test_bf16_at_stage_3_follows_stage_1(runs, name):
    """The same roundings of weights; sums of gradients in another order."""
    assert losses(runs, name) == pytest.approx(losses(runs, "stage1_bf16"), rel=2e-3)
    assert losses(runs, name) == pytest.approx(losses(runs, "stage1_fp32"), rel=SIXTEEN_BIT)
    assert held_out(runs, name) == pytest.approx(held_out(runs, "stage1_bf16"), rel=2e-3)


@pytest.mark.parametrize("name", ["stage0_fp16", "stage3_fp16"])
def test_fp16_drops_what_overflows_and_trains_on(runs, name):
    """The first scale, 2^20, is too large on purpose: updates are dropped, it halves, samples count."""
    if not FP16_ON_CPU:
        pytest.skip("DeepSpeed has no fp16 on this processor")
    records = steps(runs, name)
    dropped = records[12]["skipped_steps_total"]
    assert 1 <= dropped <= 8 and records[12]["loss_scale"] == 2.0 ** (20 - dropped)
    assert records[12]["samples_consumed_total"] == 144
    assert checkpoint(runs, name).counters["optimizer"]["updates"] == 12 - dropped
    weights = checkpoint(runs, name).full_weights()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    assert losses(runs, name)[-1] < losses(runs, name)[0]


def test_a_resumed_run_in_fp16_is_the_uninterrupted_one(runs):
    """With its loss scale, which is 2^20 only at the start."""
    if not FP16_ON_CPU:
        pytest.skip("DeepSpeed has no fp16 on this processor")
    assert_resumed_bit_for_bit(runs, "stage3_fp16")
    resumed = steps(runs, "stage3_fp16_resumed")
    assert [resumed[s]["loss_scale"] for s in resumed] == [
        steps(runs, "stage3_fp16")[s]["loss_scale"] for s in resumed
    ]


def test_the_map_of_a_run_can_be_printed(runs):
    result = warm.run(
        "sutrain/show_fragments.py", "--config", runs / "stage3_fp32.yaml", f"--run_dir={runs / 'shown'}"
    )
    assert result.returncode == 0, result.stdout
    assert "encoder.embeddings.token.weight                  320x32               0..10240" in result.stdout
    assert "26688 of 26688 elements in 14 tensors, 0 padding (rank 0 of 1)" in result.stdout
