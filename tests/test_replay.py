"""What replay says of an update: as logged and checked, with a warning where the log has a gap, nothing beyond it."""

import json

import pytest

from data_prep.config_file import load_config
from sutrain.config import PretrainConfig
from sutrain.data import open_manifest, open_samples
from sutrain.labelling import word_masking
from sutrain.replay import main


@pytest.fixture
def run_dir(dataset, write_config, tmp_path):
    """A run that logged updates 1, 2 and 4, of 12 rows each."""
    path = write_config(data={"dir": str(dataset)})
    config = load_config(PretrainConfig, path)
    masking = word_masking(open_manifest(config.data), config.masking, config.seed, stream="masks")
    samples = open_samples(config.data, config.seed, masking)
    with (tmp_path / "metrics.jsonl").open("w") as log:
        for step in (1, 2, 4):
            fingerprint = f"{samples.batch(12 * (step - 1), 12).fingerprint:012x}"
            line = {"kind": "step", "step": step, "samples_consumed_total": 12 * step}
            log.write(json.dumps(line | {"batch_fingerprint": fingerprint}) + "\n")
    path.rename(tmp_path / "config.yaml")
    return tmp_path


def test_an_update_that_was_never_made_has_no_documents(run_dir, capsys):
    assert main(["--run", str(run_dir), "--step", "5"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err == "error: --step 5: the last update that the run logged is 4\n"
    (run_dir / "metrics.jsonl").unlink()
    assert main(["--run", str(run_dir), "--step", "1"]) == 2
    assert "--step 1: the run has logged no update yet" in capsys.readouterr().err


def test_an_update_that_the_log_lacks_is_found_by_arithmetic_with_a_warning(run_dir, capsys):
    assert main(["--run", str(run_dir), "--step", "3", "--json"]) == 0
    said = capsys.readouterr()
    assert {json.loads(line)["sample"] for line in said.out.splitlines()} == set(range(24, 36))
    assert said.err.startswith("warning: ") and "does not have step 3" in said.err
    assert main(["--run", str(run_dir), "--step", "4"]) == 0
    assert capsys.readouterr().err == ""


def test_a_damaged_log_is_one_line(run_dir, capsys):
    log = run_dir / "metrics.jsonl"
    log.write_text(log.read_text().replace('"samples_consumed_total": 24', '"samples_consumed_total" 24'))
    assert main(["--run", str(run_dir), "--step", "2"]) == 2
    assert f"error: {log}, line 2: not a record" in capsys.readouterr().err
