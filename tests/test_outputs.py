"""What a run writes: the log of a run that begins again without a checkpoint is kept."""

import json

import pytest
import torch

from data_prep.config_file import load_config
from sutrain.config import PretrainConfig
from sutrain.data import load_manifest
from sutrain.monitor.mfu import Peak
from sutrain.outputs import RunOutputs

RUN, STEP = '{"kind": "run", "step": 0}\n', '{"kind": "step", "step": 1, "loss": 5.0}\n'


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
