"""Training for real: two processes over gloo under the deepspeed launcher, resumed, stopped, moved to another world."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import yaml

from sutrain import heartbeat, precision, pretrain
from sutrain.compare import compare_steps, read_steps
from tests import warm
from tests.conftest import ROOT, RUN, environment
from tests.warm import free_port

TOLERANCE_GOLDEN = 1e-4
TOLERANCE_OTHER_WORLD = 1e-5
"""Relative difference of fp32 losses over a few steps when sums are only re-ordered."""
WALL_CLOCK = ("time_seconds", "step_seconds", "data_wait_seconds", "tokens_per_second", "mfu_ratio")
"""What two lines of the same step may differ in."""


def launch(
    config,
    ranks,
    *overrides,
    before=(),
    launcher=False,
    variables=None,
    program="sutrain/pretrain.py",
    **popen,
):
    """A run of that many ranks (0: no launcher at all), by warm.py or by the slower launcher of a user."""
    words = [program, "--config", str(config), *overrides]
    if launcher:
        start = [f"{sys.prefix}/bin/deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port())]
    elif "DS_ACCELERATOR" in (variables or {}):  # a process that has looked for a device cannot be forked
        start = [sys.executable, "tests/start_ranks.py", str(ranks), str(free_port())]
    else:
        return warm.start(*words, ranks=ranks, variables=variables, **popen)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [*before, *start, *words]
    return subprocess.Popen(command, cwd=ROOT, env=environment(**variables or {}), **streams, **popen)


def train(config, ranks, *overrides, launcher=False, variables=None):
    process = launch(config, ranks, *overrides, launcher=launcher, variables=variables)
    output = process.communicate(timeout=580)[0]
    assert process.returncode == 0, output
    return output


def write_run(folder, dataset, **changes):
    tree = {**RUN, "run_dir": str(folder / "run"), "data": {"dir": str(dataset)}, **changes}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder / "run.yaml"


def records(run_dir, kind="step"):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record for record in lines if record["kind"] == kind}


def final_files(run_dir, step=12):
    folder = run_dir / f"checkpoints/step-{step:08d}"
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def straight(dataset, tmp_path_factory):
    """One uninterrupted run of 12 steps on two ranks, with dropout; (config path, run folder, output)."""
    folder = tmp_path_factory.mktemp("straight")
    config = write_run(folder, dataset)
    output = train(config, 2, launcher=True)
    return config, folder / "run", output


def test_the_loss_falls_and_the_run_folder_is_complete(straight):
    _, run_dir, output = straight
    steps = records(run_dir)
    assert sorted(steps) == list(range(1, 13))
    assert steps[12]["loss"] < steps[1]["loss"] - 0.5, output
    assert ("no instructions for bf16" in output) == bool(precision.remark("bf16")), output
    evaluations = records(run_dir, "evaluation")
    assert sorted(evaluations) == [0, 6, 12]
    assert evaluations[12]["validation_loss"] < evaluations[0]["validation_loss"]
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "checkpoints/best.json"):
        assert (run_dir / name).is_file(), name
    assert steps[12]["samples_consumed_total"] == 144
    assert 0.9 * 144 * 32 < steps[12]["tokens_total"] <= 144 * 32
    probes = records(run_dir, "probe")
    assert sorted(probes) == [1, 4, 8, 12]
    assert 0 < probes[4]["model_update"] < 1 and probes[12]["model_update"] == 0, (
        "the last learning rate is 0"
    )
    assert all(0 < entropy < 3.5 for entropy in probes[8]["attention_entropy"])
    layers = steps[11]["layers"]  # at the last step the learning rate is 0
    assert all(len(layers[key]) == len(layers["part"]) for key in layers)
    assert all(norm > 0 for norm in layers["update_norm"])


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(straight, tmp_path):
    config, run_dir, _ = straight
    copied = tmp_path / "resumed"
    shutil.copytree(run_dir, copied)
    shutil.rmtree(copied / "checkpoints/step-00000012")
    (copied / "checkpoints/best.json").unlink()
    # Probes were on in the one and are off in the other: they touch nothing of the training.
    output = train(config, 2, f"--run_dir={copied}", "--monitor.probe_every_steps=0")
    assert "resumed at step 6 of 12" in output
    before = records(copied, "run")[6]["totals_before"]
    assert (
        before == {key: records(copied)[6][key] for key in before} and before["samples_consumed_total"] == 72
    )
    before, after = records(run_dir), records(copied)
    assert sorted(after) == list(range(1, 13))
    for step in range(7, 13):
        for key in ("loss", "batch_fingerprint", "samples_consumed_total", "tokens_total", "grad_norm"):
            assert before[step][key] == after[step][key], (step, key)
    assert final_files(run_dir) == final_files(copied)


PERTURB = """
from sutrain import data, pretrain
read = data.Samples.read

def changed(self, first, count):
    tokens, words, documents = read(self, first, count)
    if first <= {sample} < first + count:
        row = {sample} - first
        {what}
    return tokens, words, documents

data.Samples.read = changed
pretrain.main()
"""


@pytest.mark.parametrize(
    "what",
    [
        "tokens[row, 5] = 17",
        "words[row] = False",
        "tokens[row] = tokens[row - 1]",
        "pass",
    ],
)
def test_one_token_one_mask_or_one_sample_changed_by_hand_is_seen(straight, tmp_path, what):
    """In what is read on resume; and with nothing changed nothing is."""
    config, run_dir, _ = straight
    copied = tmp_path / "perturbed"
    shutil.copytree(run_dir, copied)
    shutil.rmtree(copied / "checkpoints/step-00000012")
    (copied / "checkpoints/best.json").unlink()
    script = tmp_path / "perturbed.py"
    script.write_text(PERTURB.format(sample=8 * 12 + 7, what=what))
    process = launch(
        config, 2, f"--run_dir={copied}", "--data.workers=0", program=str(script)
    )  # the loop reads
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "resumed at step 6" in output, output
    found = compare_steps(read_steps(run_dir), read_steps(copied), 0)
    if what == "pass":
        assert found == []
    else:
        assert found[0].startswith("step 9: documents or masks differ"), found


@pytest.mark.slow
def test_a_request_to_stop_does_not_wait_for_an_evaluation_which_is_made_after_the_resume(straight, tmp_path):
    """One rank is asked within the evaluation after step 6, and again within the last one: neither is finished before
    the run stops, and the run is the uninterrupted one all the same."""
    config, run_dir, _ = straight
    for step in (6, 12):
        fault = {"FAULT": "evaluation 13 1 ask"}
        process = launch(config, 2, f"--run_dir={tmp_path}", program="tests/faulty.py", variables=fault)
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0 and f"stopped after step {step} with a checkpoint" in output, output
        assert max(records(tmp_path, "evaluation")) == step - 6 and max(records(tmp_path)) == step
    train(config, 2, f"--run_dir={tmp_path}")
    assert final_files(run_dir) == final_files(tmp_path)
    for kind in ("step", "evaluation"):
        before, after = records(run_dir, kind), records(tmp_path, kind)
        names = {name for name in before[12] if name not in WALL_CLOCK}
        assert before.keys() == after.keys() and "loss" in " ".join(names)
        assert all(before[step][name] == after[step][name] for step in before for name in names)
    best = [json.loads((folder / "checkpoints/best.json").read_text()) for folder in (run_dir, tmp_path)]
    assert best[0] == best[1]
    assert "all 12 steps are done already" in train(config, 0, f"--run_dir={tmp_path}")


def test_the_best_checkpoint_outlives_another_way_of_evaluation(straight, tmp_path):
    """Losses over other rows do not compare: what was loaded is evaluated anew, and what is worse stays behind it."""
    config, run_dir, _ = straight
    copied = tmp_path / "worse"
    shutil.copytree(run_dir, copied)
    settings = ["--evaluation.sequences=20", "--checkpoint.keep_last=1", f"--run_dir={copied}"]
    settings += ["--schedule={shape: constant}"]
    train(config, 2, *settings, "--steps=18", "--optimizer.learning_rate=3")
    losses = {step: line["validation_loss"] for step, line in records(copied, "evaluation").items()}
    assert losses[18] > losses[12]
    # Started again, what was to be bettered is that number still, and not the loss of the worse weights.
    train(config, 2, *settings, "--steps=24")
    losses = {step: line["validation_loss"] for step, line in records(copied, "evaluation").items()}
    assert losses[12] < losses[24] < losses[18]
    assert json.loads((copied / "checkpoints/best.json").read_text())["step"] == 12
    assert sorted(path.name[-2:] for path in (copied / "checkpoints").glob("step-*")) == ["12", "24"]


def test_a_new_run_begins_where_the_weights_of_another_ended(straight, tmp_path):
    """From the run's folder, whose best checkpoint is its last, with another optimizer: one step, counted from 0."""
    config, run_dir, _ = straight
    settings = ["--optimizer.name=adamw", "--optimizer.learning_rate=0.001", "--steps=1"]
    output = train(config, 2, f"--run_dir={tmp_path / 'new'}", f"--init_from={run_dir}", *settings)
    assert f"a new run with the weights of {run_dir}" in output and "starting step 0 of 1" in output
    began, ended = records(tmp_path / "new", "evaluation")[0], records(run_dir, "evaluation")[12]
    assert began["validation_loss"] == ended["validation_loss"]
    assert records(tmp_path / "new")[1]["samples_consumed_total"] == 12


@pytest.fixture(scope="module")
def exact(dataset, tmp_path_factory):
    """8 steps on two ranks in fp32 without dropout, where only the order of sums may differ from other worlds."""
    config = write_run(
        tmp_path_factory.mktemp("exact"),
        dataset,
        precision="fp32",
        model={**RUN["model"], "hidden_dropout": 0.0, "attention_dropout": 0.0},
        steps=8,
        checkpoint={"every_steps": 4},
        evaluation={"every_steps": 4, "sequences": 40},
    )
    train(config, 2)
    return config


def test_losses_are_the_golden_ones(exact):
    """Documents and masks to the last bit on any machine; losses to what another processor's order of sums costs.

    After a wanted change: python -m sutrain.compare RUN --write-golden tests/golden/adafactor_fp32.txt, and say why.
    """
    golden, run = read_steps(ROOT / "tests/golden/adafactor_fp32.txt"), read_steps(exact.parent / "run")
    assert golden.keys() == run.keys()
    assert compare_steps(golden, run, TOLERANCE_GOLDEN) == []


@pytest.mark.parametrize(("ranks", "micro"), [(0, 5), (5, 1)])
def test_another_world_size_goes_on_with_the_same_documents_and_masks(exact, ranks, micro, tmp_path):
    """Neither divides the 12 rows: one rank makes micro-batches of four, and of five ranks three have a last one that
    counts for nothing."""
    run_dir, moved = exact.parent / "run", tmp_path / "moved"
    shutil.copytree(run_dir, moved)
    shutil.rmtree(moved / "checkpoints/step-00000008")
    (moved / "checkpoints/best.json").unlink()
    train(exact, ranks, f"--run_dir={moved}", f"--batch.micro_sequences={micro}")
    before, after = records(run_dir), records(moved)
    for step in range(5, 9):
        assert before[step]["batch_fingerprint"] == after[step]["batch_fingerprint"]
        assert before[step]["tokens_total"] == after[step]["tokens_total"]
        assert before[step]["loss"] == pytest.approx(after[step]["loss"], rel=TOLERANCE_OTHER_WORLD)
    # The gradient is normalised by the global count of predicted tokens, however ranks and micro-batches cut it.
    assert after[5]["grad_norm"] == pytest.approx(before[5]["grad_norm"], rel=1e-5)


def test_metrics_are_served_while_training_and_signals_to_the_supervisor_leave_checkpoints(
    dataset, write_config
):
    port = free_port()
    rarely = {"every_steps": 100_000}
    config = write_config(
        "served", data={"dir": str(dataset)}, steps=100_000, monitor={"port": port},
        checkpoint=rarely, evaluation=rarely,
    )  # fmt: skip
    supervisor = [sys.executable, "-m", "sutrain.supervise", "--"]
    process = launch(config, 2, before=supervisor, launcher=True, start_new_session=True)
    checkpoint_folder = config.with_suffix("") / "checkpoints"
    try:
        wait_for(
            f"http://127.0.0.1:{port}/metrics",
            "sutrain_loss ", "sutrain_learning_rate ", "sutrain_tokens_total ", "sutrain_tokens_per_second ",
            "sutrain_mfu_ratio ", "sutrain_step_seconds ", "sutrain_loss_scale ", "sutrain_skipped_steps_total ",
            'sutrain_grad_norm{layer="0",part="mixer"} ', 'sutrain_weight_norm{layer="1",part="feed_forward"} ',
            'sutrain_update_norm{layer="0",part="mixer"} ', 'sutrain_update_ratio{layer="",part="embedding"} ',
            "sutrain_model_update ", 'sutrain_attention_entropy{layer="1"} ',
            'sutrain_update_spikes_total{layer="0",part="mixer"} ', "sutrain_loss_spikes_total ",
        )  # fmt: skip
        process.send_signal(signal.SIGUSR1)
        while not list(checkpoint_folder.glob("step-*")):
            assert process.poll() is None, "the run goes on after SIGUSR1"
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=150)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        heartbeat.request(config.with_suffix(""), "KILL")  # the ranks are in groups of their own
    assert "stopped after step" in output and process.returncode == 0, output
    stopped = max(records(config.with_suffix("")))
    assert (config.with_suffix("") / f"checkpoints/step-{stopped:08d}/manifest.json").is_file()


def test_ctrl_c_leaves_a_checkpoint(dataset, write_config):
    rarely = {"every_steps": 100_000}
    config = write_config(
        data={"dir": str(dataset)}, steps=100_000, checkpoint=rarely, evaluation={**rarely, "sequences": 8}
    )
    run_dir = config.with_suffix("")
    process = launch(config, 0)
    try:
        while not any(beat.phase == "training step" for beat in heartbeat.read_beats(run_dir)):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in output, output
    assert f"stopped after step {max(records(run_dir))} with a checkpoint" in output
    assert (run_dir / f"checkpoints/step-{max(records(run_dir)):08d}/manifest.json").is_file()


def wait_for(url, *series, seconds=120):
    """All of them on one page: the first step is served before the first probe is."""
    end, missing = time.monotonic() + seconds, list(series)
    while missing and time.monotonic() < end:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as page:
            content = page.read().decode()
            missing = [text for text in series if text not in content]
        time.sleep(0.3)
    assert not missing, f"did not appear at {url}: {missing}"


def only_error_line(config, *overrides):
    process = launch(config, 0, *overrides)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 2, output
    assert "Traceback" not in output
    lines = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, output
    return lines[0]


def test_a_finished_run_says_so_at_once(straight):
    config, *_ = straight
    assert "all 12 steps are done already" in train(config, 0)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--data.dir=/nowhere", "no manifest.json"),
        ("--model.vocab_size=400", "set model.vocab_size=320"),
        ("--batch.global_tokens=100", "give exactly one of global_sequences and global_tokens"),
        ("--stesp.x=5", "did you mean 'steps'"),
        ("--masking.predict_share=2", "masking.predict_share: input should be less than 1, found 2"),
    ],
)
def test_mistakes_of_newcomers_give_one_clear_line(exact, override, expected, capsys, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    with pytest.raises(SystemExit) as ended:
        pretrain.main(["--config", str(exact), override])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and expected in lines[0], lines


def test_a_port_in_use_gives_one_clear_line(exact, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = only_error_line(exact, f"--monitor.port={port}", f"--run_dir={tmp_path}/new")
    assert f"monitor.port: {port}" in line


def test_going_on_with_another_model_is_refused(straight):
    assert "model.num_layers: 2 in the checkpoint, 3 now" in only_error_line(
        straight[0], "--model.num_layers=3"
    )


def test_damaged_checkpoints_are_named(straight, tmp_path):
    config, run_dir, _ = straight
    copied = tmp_path / "damaged"
    shutil.copytree(run_dir, copied)
    for file in copied.glob("checkpoints/step-*/rank-00000.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    assert "no intact checkpoint left" in only_error_line(config, f"--run_dir={copied}")
