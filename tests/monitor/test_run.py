"""Monitoring in real training: it changes nothing, sees the rank that hangs, refuses, stops, finds documents again."""

import contextlib
import json
import os
import signal
import time
import urllib.request

import psutil
import pytest

from sutrain import heartbeat
from sutrain.replay import main as replay
from tests.conftest import ROOT
from tests.test_pretrain import final_files, free_port, launch, records, train, write_run


@pytest.fixture(scope="module")
def watched(dataset, tmp_path_factory):
    """Twelve steps on two ranks with everything switched on."""
    folder = tmp_path_factory.mktemp("watched")
    monitor = {"port": free_port(), "probe_every_steps": 1, "layers_every_steps": 1}
    acting = {"skip_sigmas": 50.0, "stop_after_broken_steps": 5}
    train(write_run(folder, dataset, monitor=monitor, acting=acting), 2)
    return folder / "run"


def test_losses_and_weights_are_bit_identical_with_everything_off(watched, dataset, tmp_path):
    train(
        write_run(tmp_path, dataset, monitor={"port": 0, "probe_every_steps": 0, "layers_every_steps": 100}),
        2,
    )
    on, off = records(watched), records(tmp_path / "run")
    assert [on[step]["loss"] for step in on] == [off[step]["loss"] for step in off] and len(on) == 12
    assert final_files(watched) == final_files(tmp_path / "run")
    assert len(records(watched, "probe")) == 12 and records(tmp_path / "run", "probe") == {}


def test_every_number_of_the_run_is_written(watched):
    step, probe = records(watched)[12], records(watched, "probe")[12]
    layers = step["layers"]
    assert {"direction_rms", "clipped_share"} <= set(layers) and "trust_ratio" not in layers
    assert step["refused_steps_total"] == 0
    for key in ("activation_rms", "relative_change", "mixer_branch_share", "feed_forward_branch_share",
                "dead_units_share", "attention_entropy"):  # fmt: skip
        assert len(probe[key]) == 2, key
    evaluation = records(watched, "evaluation")[12]
    by_length, whole = evaluation["validation_loss_by_length"], evaluation["validation_loss"]
    assert set(by_length) == {"32"} and by_length["32"] == pytest.approx(whole, rel=1e-6)
    assert evaluation["validation_accuracy_by_source"]["made"] == pytest.approx(
        evaluation["validation_accuracy"]
    )


def test_the_documents_of_a_batch_are_found_again(watched, capsys):
    assert replay(["--run", str(watched), "--step", "3", "--json"]) == 0
    documents = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {d["sample"] for d in documents} == set(range(24, 36))
    source = [json.loads(line)["text"] for line in (watched_source(watched)).read_text().splitlines()]
    whole = [d for d in documents if d["piece"] == 0 and d["tokens"] < 20]
    assert whole and all(any(text.startswith(d["text"].rstrip("。")) for text in source) for d in whole)
    assert replay(["--run", str(watched), "--step", "0"]) == 2
    assert "steps count from 1" in capsys.readouterr().err
    assert replay(["--run", str(watched.parent), "--step", "1"]) == 2
    assert "wants the folder of a run" in capsys.readouterr().err


def watched_source(run_dir):
    """The raw file of the data set that the run was trained on."""
    config = (run_dir / "config.yaml").read_text()
    data = next(line.split("dir:")[1].strip() for line in config.splitlines() if line.startswith("  dir:"))
    return ROOT.__class__(data).parent / "raw.jsonl"


def test_data_that_changed_is_noticed(watched, tmp_path, capsys):
    for name in ("config.yaml", "metrics.jsonl"):
        text = (watched / name).read_text()
        (tmp_path / name).write_text(text.replace('"batch_fingerprint": "', '"batch_fingerprint": "x'))
    assert replay(["--run", str(tmp_path), "--step", "2"]) == 2
    assert "the data is not what the run was trained on" in capsys.readouterr().err


def test_a_rate_that_jumps_is_refused_and_the_run_goes_on(dataset, tmp_path):
    points = {0: 1.0, 40: 1.0, 41: 400.0, 42: 400.0, 43: 1.0, 60: 1.0}
    config = write_run(
        tmp_path, dataset, steps=55, acting={"skip_sigmas": 12.0},
        schedule={"shape": "piecewise_linear", "points": points},
        monitor={"port": 0, "probe_every_steps": 0}, evaluation={"every_steps": 100, "sequences": 8},
        optimizer={"name": "adafactor", "learning_rate": 0.01},
    )  # fmt: skip
    train(config, 0)
    steps = records(tmp_path / "run")
    refused = {step: record["refused"] for step, record in steps.items() if "refused" in record}
    assert refused and min(refused) > 40
    first = min(refused)
    assert refused[first]["first_sample"] == (first - 1) * 12 and refused[first]["samples"] == 12
    assert refused[first]["sigmas"] > 12
    assert steps[55]["refused_steps_total"] == len(refused) and steps[55]["skipped_steps_total"] == 0


def test_a_run_of_nothing_but_nan_stops_with_a_dump(dataset, tmp_path):
    points = {0: 1.0, 5: 1.0, 6: 1e38, 20: 1e38}
    config = write_run(
        tmp_path, dataset, steps=20, acting={"stop_after_broken_steps": 3},
        schedule={"shape": "piecewise_linear", "points": points}, monitor={"port": 0, "probe_every_steps": 0},
        checkpoint={"every_steps": 4},
    )  # fmt: skip
    process = launch(config, 0)
    output = process.communicate(timeout=240)[0]
    assert process.returncode not in (0, None)
    (line,) = (line for line in output.splitlines() if line.startswith("error"))
    assert "3 step(s) in a row without a finite loss" in line
    (dump,) = (tmp_path / "run").glob("dump-step-*.json")
    content = json.loads(dump.read_text())
    assert str(dump) in line and content["last_good_checkpoint"].endswith("step-00000006")
    assert content["step"] == content["last_step"]["step"] and len(content["layers"]["grad_norm"]) > 3


def scrape(port) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        lines = [line.rsplit(" ", 1) for line in reply.read().decode().splitlines() if line[0] != "#"]
    return {name: float(value) for name, value in lines}


def wait_for(process, port, condition) -> dict[str, float]:
    """The first scrape that fulfils the condition."""
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(OSError, KeyError):
            if condition(found := scrape(port)):
                return found
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)


def end(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)


def endless(tmp_path, dataset, port):
    return write_run(
        tmp_path, dataset, steps=100_000, monitor={"port": port, "probe_every_steps": 0},
        evaluation={"every_steps": 100_000, "sequences": 8}, checkpoint={"every_steps": 100_000},
    )  # fmt: skip


def test_the_rank_that_is_slow_is_named_at_once(dataset, tmp_path):
    """Forward passes of rank 1 take 0.75 s longer from update 80 on: all ranks' steps do, but only its forward time."""
    port = free_port()
    process = launch(
        endless(tmp_path, dataset, port), 2, program="tests/monitor/slow_rank.py", start_new_session=True,
        variables={"SLOW": "1 80 0.25"},  # three micro-batches an update
    )  # fmt: skip

    def seconds(found, what):
        return [found[f'sutrain_rank_{what}_seconds{{rank="{rank}"}}'] for rank in (0, 1)]

    try:
        wait_for(process, port, lambda found: found["sutrain_step"] > 10 and all(seconds(found, "forward")))
        found = wait_for(process, port, lambda found: seconds(found, "forward")[1] > 0.7)
        assert 80 <= found["sutrain_step"] <= 90
        found = wait_for(process, port, lambda found: min(seconds(found, "step")) > 0.7)
        assert seconds(found, "forward")[1] > 1.4 * seconds(found, "forward")[0]  # what SutrainRankSlow asks
    finally:
        end(process)


def test_the_rank_that_hangs_is_named(dataset, tmp_path):
    """Rank 1 is stopped from outside; rank 0 waits for it in a collective, and /metrics says so."""
    port = free_port()
    process = launch(endless(tmp_path, dataset, port), 2, start_new_session=True)
    try:
        wait_for(
            process,
            port,
            lambda found: found["sutrain_step"] > 5 and found['sutrain_rank_progress{rank="1"}'] > 5,
        )
        (pid,) = (beat.pid for beat in heartbeat.read_beats(tmp_path / "run") if beat.rank == 1)
        second = psutil.Process(pid)
        second.suspend()
        step = scrape(port)["sutrain_step"]
        time.sleep(2.5)
        found = scrape(port)
        assert found["sutrain_step"] <= step + 1
        beats = [found[f'sutrain_rank_heartbeat_timestamp_seconds{{rank="{rank}"}}'] for rank in (0, 1)]
        assert all(time.time() - beat > 1.5 for beat in beats)
        assert found['sutrain_rank_progress{rank="1"}'] <= found['sutrain_rank_progress{rank="0"}']
        second.resume()
        wait_for(process, port, lambda found: found["sutrain_step"] > step + 5)
    finally:
        end(process)
