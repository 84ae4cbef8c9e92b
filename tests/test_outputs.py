"""What rank 0 makes of a step's record."""

import json

import pytest
import torch

from data_prep.config_file import load_config
from sutrain.config import PretrainConfig
from sutrain.data import open_manifest
from sutrain.models.configuration import flops_per_token
from sutrain.monitor.mfu import Peak
from sutrain.optim import STATISTICS
from sutrain.outputs import RunOutputs


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
