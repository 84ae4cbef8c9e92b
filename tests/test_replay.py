"""What replay says of an update: as logged and checked, with a warning where the log has a gap, nothing beyond it."""

import json

import pytest

from data_prep.config_file import load_config
from sutrain.config import PretrainConfig
from sutrain.data import open_manifest, open_samples
from sutrain.labelling import word_masking
from sutrain.replay import main

READS = {"seed", "masking", "batch"}
CHANGE = "masking.predict_share: 0.15 in the checkpoint, 0.3 now (accepted)"


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


@pytest.fixture
def changed(dataset, write_config, tmp_path):
    """changed(reads, changes): a run of batches of 4 rows, until 20 samples, and then of 12, that went on after step 6
    with other masks and logged steps 1, 2, 6 and 8. `reads`: what the first start read was logged too."""

    def make(reads, changes=(CHANGE,)):
        path = write_config(
            data={"dir": str(dataset)}, masking={"predict_share": 0.3}, batch={"size_warmup": {20: 4}}
        )
        now = load_config(PretrainConfig, path)
        then = load_config(PretrainConfig, path, ["--masking.predict_share=0.15"])
        starts = {1: ({"reads": then.model_dump(mode="json", include=READS)} if reads else {})}
        starts[7] = {"reads": now.model_dump(mode="json", include=READS), "changes": list(changes)}
        with (tmp_path / "metrics.jsonl").open("w") as log:
            first = 0
            for step, rows in enumerate((4, 4, 4, 4, 4, 12, 12, 12), 1):
                config = then if step < 7 else now
                masking = word_masking(
                    open_manifest(config.data), config.masking, config.seed, stream="masks"
                )
                samples = open_samples(config.data, config.seed, masking)
                line = {"samples_consumed_total": first + rows}
                line["batch_fingerprint"] = f"{samples.batch(first, rows).fingerprint:012x}"
                first += rows
                if step in starts:
                    log.write(json.dumps({"kind": "run", "step": step - 1} | starts[step]) + "\n")
                if step in (1, 2, 6, 8):
                    log.write(json.dumps({"kind": "step", "step": step} | line) + "\n")
        path.rename(tmp_path / "config.yaml")
        return tmp_path

    return make


def samples_of(capsys, run_dir, step):
    assert main(["--run", str(run_dir), "--step", str(step), "--json"]) == 0
    return sorted({json.loads(line)["sample"] for line in capsys.readouterr().out.splitlines()})


def test_behind_a_gap_and_before_other_masks_the_batch_is_that_of_then(changed, capsys):
    run_dir = changed(reads=True)
    assert samples_of(capsys, run_dir, 2) == [4, 5, 6, 7]
    assert samples_of(capsys, run_dir, 4) == [12, 13, 14, 15]  # not logged
    assert samples_of(capsys, run_dir, 6) == list(range(20, 32))
    assert samples_of(capsys, run_dir, 8) == list(range(44, 56))


def test_what_the_run_went_on_with_is_named_where_the_batch_is_another(changed, capsys):
    run_dir = changed(reads=False)
    assert main(["--run", str(run_dir), "--step", "2"]) == 2
    said = capsys.readouterr().err
    assert f"after step 6 the run went on with another {CHANGE}" in said and "data is not" not in said
    changed(reads=True, changes=[])
    log = run_dir / "metrics.jsonl"
    log.write_text(log.read_text().replace('"samples_consumed_total": 32', '"samples_consumed_total": 31'))
    assert main(["--run", str(run_dir), "--step", "6"]) == 2
    said = capsys.readouterr().err
    assert (
        "steps 3 to 5 are not in the log, and the settings of batch are not those of then, or the data"
        in said
    )


def test_a_damaged_log_is_one_line(run_dir, capsys):
    log = run_dir / "metrics.jsonl"
    log.write_text(log.read_text().replace('"samples_consumed_total": 24', '"samples_consumed_total" 24'))
    assert main(["--run", str(run_dir), "--step", "2"]) == 2
    assert f"error: {log}, line 2: not a record" in capsys.readouterr().err
