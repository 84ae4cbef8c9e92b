"""metrics.jsonl: written line by line, cut on resume, read back, and clear about damage."""

import json
import math
import tracemalloc
from io import BytesIO

import numpy as np
import pytest

from sutrain.compare import read_steps as compared_steps
from sutrain.monitor import log, tables
from sutrain.monitor.log import (
    DamagedLogError,
    MetricsLog,
    _from_the_end,
    find_steps,
    last_steps,
    read_run,
    read_steps,
)
from tests.monitor.made_up import COLUMNS, groups_of, made_up_run, write_run


@pytest.fixture
def table():
    groups = groups_of(2)
    return groups.table(np.ones((len(groups.names), len(COLUMNS))), COLUMNS)


def strict(text: str):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path, table):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.run(0, {"world_size": 2})
    loss = 1 / 3
    log.step({"step": 1, "loss": np.float64(loss), "tokens_total": 10**12}, table)
    (run, step) = strict((tmp_path / "metrics.jsonl").read_text())
    assert run["kind"] == "run" and run["world_size"] == 2
    assert step["loss"] == loss and step["tokens_total"] == 10**12  # to the last bit
    assert step["update_norm"] == pytest.approx(math.sqrt(len(table.groups.names)))
    assert step["layers"]["layer"][:2] == ["", "0"] and len(step["layers"]["update_norm"]) == len(
        table.groups
    )
    log.close()


def test_numbers_that_are_not_finite_stay_strict_json_and_come_back(tmp_path, table):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.step({"step": 1, "loss": math.nan, "loss_scale": math.inf}, table)
    (step,) = strict((tmp_path / "metrics.jsonl").read_text())
    assert (step["loss"], step["loss_scale"]) == ("NaN", "Infinity")
    back = read_run(tmp_path).steps[0]
    assert math.isnan(back["loss"]) and back["loss_scale"] == math.inf


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    write_run(tmp_path, layers=2, steps=30, evaluate_every_steps=10)
    path = tmp_path / "metrics.jsonl"
    kept = [line for line in path.read_bytes().splitlines(True) if json.loads(line)["step"] <= 20]
    path.write_bytes(path.read_bytes() + b'{"kind": "step", "step": 20, "lo')
    with MetricsLog(path, resume_from_step=20):
        assert path.read_bytes() == b"".join(kept)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    run = read_run(path)
    assert run.steps[-1]["step"] == run.evaluations[-1]["step"] == 20 and not run.notes


def test_resume_drops_an_evaluation_that_will_be_made_again(tmp_path):
    """It was logged after the checkpoint that says that it is owed; that of another step stays."""
    write_run(tmp_path, layers=2, steps=20, evaluate_every_steps=10)
    for step, expected in ((20, [10]), (15, [10])):
        MetricsLog(tmp_path / "metrics.jsonl", resume_from_step=step, evaluated_again=True).close()
        run = read_run(tmp_path)
        assert [line["step"] for line in run.evaluations] == expected and run.steps[-1]["step"] == step


@pytest.mark.parametrize("block_bytes", [1, 7, 50, 10_000])
def test_lines_are_found_from_the_end(tmp_path, block_bytes):
    path = tmp_path / "lines"
    for content in (b"", b"\n", b"one\n\nthree", b"x" * 100 + b"\n" + b"y" * 30 + b"\n"):
        path.write_bytes(content)
        with open(path, "rb") as file:
            found = list(_from_the_end(file, block_bytes))
        assert [line for _, line in reversed(found)] == content.splitlines(True)
        assert all(content[offset:].startswith(line) for offset, line in found)


def test_resume_reads_the_end_of_a_long_log_alone(tmp_path, monkeypatch):
    """Rewritten, a log of weeks would hold up a start for minutes, and take its size of the disk once more."""
    write_run(tmp_path, layers=8, steps=2000)
    path = tmp_path / "metrics.jsonl"
    whole, before = path.read_bytes(), path.stat()
    read, real = [], log._from_the_end
    monkeypatch.setattr(log, "_from_the_end", lambda file: real(file, 10_000))
    monkeypatch.setattr(log.io, "BytesIO", lambda block: read.append(len(block)) or BytesIO(block))
    with MetricsLog(path, resume_from_step=1990):
        pass
    assert path.stat().st_ino == before.st_ino and whole.startswith(path.read_bytes())
    assert sum(read) < before.st_size / 10 and read_run(path).steps[-1]["step"] == 1990


def test_a_new_run_does_not_continue_the_log_of_another(tmp_path, table):
    write_run(tmp_path, layers=2, steps=20)
    with pytest.raises(DamagedLogError, match="holds another run already"):
        MetricsLog(tmp_path / "metrics.jsonl")


def test_tables_are_thinned_but_never_on_a_spike(tmp_path):
    verdicts = write_run(tmp_path / "all", layers=2, steps=100, spike_at=(77,))
    with MetricsLog(tmp_path / "metrics.jsonl", layers_every_steps=25) as log:
        for step, verdict in enumerate(verdicts, 1):
            groups = verdict.groups
            table = groups.table(np.ones((len(groups.names), 4)), COLUMNS)
            log.step({"step": step, "loss": 1.0}, table, verdict)
    assert read_run(tmp_path).tables.steps.tolist() == [1, 25, 50, 75, 77, 79, 100]


def test_read_back_as_series_and_heat_maps(tmp_path):
    write_run(tmp_path, layers=3, steps=40, evaluate_every_steps=10)
    run = read_run(tmp_path)
    steps, accuracy = run.series("validation_accuracy", "evaluations")
    assert steps.tolist() == [10, 20, 30, 40] and (np.diff(accuracy) > 0).all()
    at, layers, values = run.heat_map("update_ratio", "mixer")
    assert at.tolist() == list(range(1, 41)) and layers.tolist() == [0, 1, 2] and values.shape == (3, 40)
    row = find_steps(tmp_path / "metrics.jsonl", {7})[7]["layers"]
    (position,) = [
        i for i, k in enumerate(zip(row["layer"], row["part"], strict=True)) if k == ("1", "mixer")
    ]
    assert values[1, 6] == pytest.approx(row["update_ratio"][position], rel=1e-6)


def test_damage_is_named(tmp_path):
    with pytest.raises(DamagedLogError, match="no such file"):
        read_run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"")
    with pytest.raises(DamagedLogError, match="holds no training step yet"):
        read_run(tmp_path)
    path.unlink()
    write_run(tmp_path, layers=2, steps=20)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "step", "st')
    assert "torn" in read_run(tmp_path).notes[0] and len(read_run(tmp_path).steps) == 20
    lines = whole.splitlines(True)
    for damage in (b"\x00\x00\n", b"[1]\n", b'{"step": 3}\n', b'{"kind": "other", "step": 3}\n'):
        path.write_bytes(b"".join([*lines[:5], damage, *lines[5:]]))
        with pytest.raises(DamagedLogError, match="line 6"):
            read_run(tmp_path)


def test_tables_of_a_deep_model_are_sampled_and_those_of_spikes_come_first(tmp_path):
    record, table, _ = next(made_up_run(layers=1000))
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for step in range(1, 101):
            log.step({**record, "step": step}, table)
    log = read_run(tmp_path)
    steps, written = log.steps, log.tables.steps
    assert 10 < len(written) < 60 and written[0] == 1
    assert (tmp_path / "metrics.jsonl").stat().st_size / len(steps) < 50_000
    groups = list(range(len(table.groups)))
    assert log.tables.rows("grad_norm", groups)[:, 0] == pytest.approx(table.grad_norm, rel=1e-4)


def test_single_steps_are_found(tmp_path):
    write_run(tmp_path, layers=1, steps=50)
    path = tmp_path / "metrics.jsonl"
    found = find_steps(path, {3, 50, 51})
    assert set(found) == {3, 50} and found[3]["samples_consumed_total"] == 48
    assert find_steps(tmp_path / "none", {1}) == {}
    assert [line["step"] for line in last_steps(path, 2, read_bytes=6000)] == [49, 50]


@pytest.fixture(scope="module")
def long_log(tmp_path_factory):
    """1,500 updates and evaluations of a model of 100 layers, 38 MB; as Python numbers several times as much."""
    path = tmp_path_factory.mktemp("long") / "metrics.jsonl"
    record, table, evaluation = next(made_up_run(layers=100, evaluate_every_steps=1))
    with MetricsLog(path) as log:
        log.step({**record, "batch_fingerprint": "0123456789ab"}, table)
        log.evaluation(evaluation)
    (step, evaluation) = path.read_text().splitlines()
    with open(path, "w") as file:
        for number in range(1, 1501):
            file.write(step.replace('"step": 1', f'"step": {number}', 1) + "\n")
            file.write(evaluation.replace('"step": 1', f'"step": {number}', 1) + "\n")
    assert path.stat().st_size > 20_000_000
    return path


def most_held(read) -> float:
    """Megabytes at the worst moment of `read`."""
    tracemalloc.start()
    try:
        read()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def test_a_long_log_is_read_in_little_memory(long_log, monkeypatch):
    monkeypatch.setattr(tables, "MOST", 16)
    assert most_held(lambda: read_run(long_log)) < 8  # the report
    assert most_held(lambda: compared_steps(long_log)) < 4
    assert most_held(lambda: read_run(long_log, kinds=("evaluation",))) < 4  # the card of an export
    assert len(compared_steps(long_log)) == 1500
    some = read_run(long_log, kinds=("evaluation",))
    assert len(some.evaluations) == 1500 and not some.steps


def test_of_many_tables_neighbours_become_one(monkeypatch):
    """Geometric means, at most twice as many as wanted, in the order of the steps; the last ones as they are."""
    monkeypatch.setattr(tables, "MOST", 4)
    kept = tables.Tables()
    for step in range(1, 40):
        values = [float(step), 0.0 if step % 2 else 4.0]
        kept.add(step, {"layer": ["", "0"], "part": ["embedding", "mixer"], "update_norm": values})
        assert len(kept.steps) <= 8 + 3
    kept.add(40, {"layer": ["0"], "part": ["mixer"], "update_norm": [1.0]})  # another model
    assert kept.steps.tolist() == [4.5, 12.5, 20.5, 28.5, 34.5, 37.5, 39]
    norms = kept.rows("update_norm", [0, 1])
    expected = [math.prod(range(i, i + 8)) ** (1 / 8) for i in (1, 9, 17, 25)]
    assert norms[0, :4] == pytest.approx(expected, rel=1e-5)
    assert norms[1].tolist() == pytest.approx([4.0] * 6 + [0.0])
    steps, layers, values = kept.heat_map("update_norm", "mixer")
    assert layers.tolist() == [0] and values[0, -2] == 4 and len(steps) == 7
    assert np.isnan(kept.rows("trust_ratio", [0])).all()


def test_a_torn_line_is_none_also_where_its_table_is_not_read(tmp_path):
    write_run(tmp_path, layers=2, steps=20)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    kept = len(list(read_steps(path)))
    assert kept == len(read_run(path).steps) == 19
    path.write_bytes(b"")
    with pytest.raises(DamagedLogError, match="holds no training step yet"):
        list(read_steps(path))


def test_damage_within_a_line_is_named_also_where_single_steps_are_read(tmp_path):
    write_run(tmp_path, layers=1, steps=20)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(True)
    number = next(n for n, line in enumerate(lines, 1) if line.startswith(b'{"kind": "step", "step": 18'))
    lines[number - 1] = lines[number - 1].replace(b'"loss":', b'"loss" ')
    path.write_bytes(b"".join(lines))
    named = rf"metrics.jsonl, line {number}: not a record .*Delete the line, or restore the file"
    for read_bytes in (16_000_000, 6000):  # the second begins in the middle
        with pytest.raises(DamagedLogError, match=named):
            last_steps(path, 5, read_bytes)
    with pytest.raises(DamagedLogError, match=named):
        find_steps(path, {18})
    assert [line["step"] for line in last_steps(path, 2)] == [19, 20] and find_steps(path, {17}).keys() == {
        17
    }
    path.write_bytes(path.read_bytes() + b'{"kind": "step", "step": 21, "lo')
    assert [line["step"] for line in last_steps(path, 2)] == [19, 20], "one torn by a crash is none"
