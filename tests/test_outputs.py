"""What rank 0 writes: utilisation of a step, and the log of a run that begins again without a checkpoint."""

import json

import pytest
import torch

from data_prep.config_file import load_config
from sutrain.config import PretrainConfig
from sutrain.data import load_manifest, open_manifest
from sutrain.models.configuration import flops_per_token
from sutrain.monitor.mfu import Peak
from sutrain.optim import STATISTICS
from sutrain.outputs import RunOutputs

RUN, STEP = '{"kind": "run", "step": 0}\n', '{"kind": "step", "step": 1, "loss": 5.0}\n'


def test_utilisation_is_that_of_the_rows_that_the_step_had(dataset, write_config):
    """Attention over rows cut by a length warm-up is less arithmetic."""
    config = load_config(PretrainConfig, write_config(data={"dir": str(dataset)}))
    shapes = {"encoder.embeddings.token.weight": torch.Size((3, 4))}
    facts = {"world_size": 1}
    outputs = RunOutputs(config, open_manifest(config.data), shapes, Peak(1e9, "made up"), None, facts)
    for step, row_tokens in ((1, 8), (2, 32)):
        record = {
            "step": step,
            "loss": 1.0,
            "learning_rate": 0.1,
            "step_tokens": 100,
            "row_tokens": row_tokens,
        }
        outputs.step(record, torch.ones(1, len(STATISTICS)), 2.0, 0.0)
    outputs.close()
    lines = map(json.loads, (config.run_dir / "metrics.jsonl").read_text().splitlines())
    found = [line["mfu_ratio"] for line in lines if line["kind"] == "step"]
    expected = [flops_per_token(config.model, row_tokens, 0.15) * 50 / 1e9 for row_tokens in (8, 32)]
    assert found == pytest.approx(expected, rel=1e-3) and found[0] < found[1]


@pytest.fixture
def start(dataset, write_config):
    """start(resumed_from): open the outputs of a run and close them again; returns its folder."""
    path = write_config(data={"dir": str(dataset)})
    config = load_config(PretrainConfig, path)
    peak, facts = Peak(1e12, "made up"), {"world_size": 1}

    def open_and_close(resumed_from):
        shapes = {"encoder.layers.0.mixer.query.weight": torch.Size([4, 4])}
        RunOutputs(config, load_manifest(dataset), shapes, peak, resumed_from, facts).close()

    config.run_dir.mkdir()
    return config.run_dir, open_and_close


def test_a_start_without_a_checkpoint_keeps_the_log_and_says_so(start, capsys):
    folder, open_and_close = start
    (folder / "metrics.jsonl").write_text(RUN + STEP)
    open_and_close(None)
    (kept,) = folder.glob("metrics.jsonl.before-*")
    assert kept.read_text() == RUN + STEP and str(kept) in capsys.readouterr().out
    (line,) = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["parameters"] == 16


@pytest.mark.parametrize(("log", "resumed_from"), [(RUN, None), (RUN + STEP, 1), (None, None)])
def test_a_log_without_a_step_and_that_of_a_run_that_goes_on_are_not_put_aside(
    start, log, resumed_from, capsys
):
    folder, open_and_close = start
    if log:
        (folder / "metrics.jsonl").write_text(log)
    open_and_close(resumed_from)
    assert not list(folder.glob("metrics.jsonl.before-*")) and "before" not in capsys.readouterr().out
    kept = [line for line in (log or "").splitlines(True) if resumed_from]
    assert (folder / "metrics.jsonl").read_text().splitlines(True)[:-1] == kept


def test_lines_with_a_damaged_beginning_that_are_cut_off_are_told(start, capsys):
    folder, open_and_close = start
    log = folder / "metrics.jsonl"
    later, torn = STEP.replace('"step": 1', '"step": 2'), '{"kind": "step", "st'
    log.write_text(RUN + STEP + "\0" + STEP + STEP[5:] + later + torn)
    open_and_close(1)
    assert log.read_text().splitlines(True)[:-1] == [RUN, STEP]
    assert f"{log}: 2 line(s) with a damaged beginning were cut off its end\n" in capsys.readouterr().out
    open_and_close(1)
    assert "damaged" not in capsys.readouterr().out, (
        "what ends a log torn or lies after the checkpoint is no damage"
    )
