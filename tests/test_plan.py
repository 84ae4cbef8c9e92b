"""`python -m sutrain.plan`: the learning rate as it will be, in words and pictures."""

import json
import math
import shutil
from xml.etree import ElementTree

import pytest

from data_prep.config_file import load_config
from sutrain.config import PretrainConfig, batch_plan
from sutrain.data import open_manifest
from sutrain.models.configuration import flops_per_token, parameter_count
from sutrain.optim import build_schedule
from sutrain.plan import (
    arithmetic_in_words,
    check_settings_of_tensors,
    draw_picture,
    drawn,
    learning_rate_by_update,
    learning_rate_in_words,
    main,
    samples_by_length,
    state_bytes,
)


def load(path):
    return load_config(PretrainConfig, path, [])


def test_the_picture_in_the_terminal():
    schedule = build_schedule("linear", 100, warmup_steps=10)
    lines = drawn(lambda update: 0.02 * schedule(update), 100, width=50, height=4).splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("    0.02 ┤")
    assert lines[3].startswith("       0 ┤")
    assert lines[4].split() == ["update", "└1", "100"]
    columns = [line.split("┤")[1] for line in lines[:4]]
    assert {len(column) for column in columns} == {50}
    heights = [sum(" ▁▂▃▄▅▆▇█".index(column[i]) for column in columns) for i in range(50)]
    peak = heights.index(max(heights))
    assert heights[peak] == 32
    assert peak in (4, 5)  # update 10 of 100
    assert heights[:peak] == sorted(heights[:peak])
    assert heights[peak:] == sorted(heights[peak:], reverse=True)
    assert heights[-1] <= 1
    assert heights[25] == pytest.approx(32 * 0.55, abs=1.5)


def test_a_run_of_one_update_can_be_drawn():
    assert "█" in drawn(lambda update: 1.0, 1, width=50)


def test_what_adafactor_makes_of_the_learning_rate_is_in_it(write_config):
    optimizer = {"name": "adafactor", "learning_rate": 1.0, "settings": {"preset": "paper"}}
    config = load(write_config(optimizer=optimizer, schedule={"shape": "constant"}, steps=40_000))
    rate = learning_rate_by_update(config)
    assert [rate(0), rate(9_999), rate(39_999)] == pytest.approx([0.01, 0.01, 0.005])
    assert "times AdaFactor's relative step, times the size of each tensor" in learning_rate_in_words(config)
    optimizer["settings"] = {"preset": "torch"}
    capped = learning_rate_by_update(load(write_config(optimizer=optimizer, schedule={"shape": "constant"})))
    assert capped(3) == pytest.approx(0.5)


def test_without_adafactor_the_schedule_is_all(write_config):
    optimizer = {"name": "adamw", "learning_rate": 1e-3}
    schedule = {"shape": "piecewise_linear", "points": {4: 1, 8: 0.5}}
    config = load(write_config(optimizer=optimizer, schedule=schedule, steps=10))
    rate = learning_rate_by_update(config)
    assert [rate(update) for update in (0, 4, 6, 9)] == pytest.approx([0, 1e-3, 0.75e-3, 0.5e-3])
    assert "size of each tensor" not in learning_rate_in_words(config)


@pytest.mark.parametrize(("least", "share"), [(0, 0.0), (32, 0.0), (33, 1.0)])
def test_what_adafactor_does_not_factor_is_counted(write_config, least, share):
    """Of the tiny model, whose matrices are 32 wide at their narrower side, all or next to nothing but vectors."""
    config = load(write_config(optimizer={"settings": {"min_dim_size_to_factor": least}}))
    parameters = parameter_count(config.model)
    counted = state_bytes(config, parameters, stage=1, world_size=2).optimizer / (2 * parameters)
    assert counted == pytest.approx(share, abs=0.05) and (least in (0, 33)) == (counted in (0.0, 1.0))


def test_globs_over_tensors_are_held_against_the_model(write_config):
    settings = {"per_tensor": {"*nrom*": {"adapt": False}}, "logical_tensors": {"*query*": 7}}
    with pytest.raises(ValueError, match="'\\*query\\*': 7 does not divide"):
        check_settings_of_tensors(load(write_config(optimizer={"settings": settings})))
    del settings["logical_tensors"]
    with pytest.raises(
        ValueError, match=r"settings: adafactor: per_tensor pattern '\*nrom\*' matches no tensor"
    ):
        check_settings_of_tensors(load(write_config(optimizer={"settings": settings})))
    settings["per_tensor"] = {"*query*": {"adapt": False}}
    check_settings_of_tensors(load(write_config(optimizer={"settings": settings})))


def test_picture_files(tmp_path):
    draw_picture(lambda update: math.exp(-update), 20, "a title", tmp_path / "rate.svg")
    root = ElementTree.parse(tmp_path / "rate.svg").getroot()
    assert root.tag.endswith("svg")
    with pytest.raises(ValueError, match=r"neither \.png nor \.svg"):
        draw_picture(lambda update: 1.0, 20, "a title", tmp_path / "rate.pdf")


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_curve_fits_the_terminal_and_a_picture_that_cannot_be_written_is_one_line(
    dataset, write_config, tmp_path, monkeypatch, capsys, columns
):
    path = write_config(data={"dir": str(dataset)}, steps=1000, schedule={"warmup_steps": 100})
    picture = tmp_path / "no folder" / "rate.svg"
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("sys.argv", ["plan", f"--config={path}", f"--picture={picture}"])
    with pytest.raises(SystemExit, match="error: .*no folder"):
        main()
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if "┤" in line)
    assert all("┤" in line for line in lines[first : first + 6]) and "└1" in lines[first + 6]
    assert lines[first + 6].rstrip(" │").endswith("1,000")


@pytest.mark.parametrize("steps", [1, 3, 7, 100])
@pytest.mark.parametrize(
    ("sizes", "lengths"),
    [({}, {}), ({}, {50: 8}), ({10: 3, 40: 5}, {9: 4, 11: 8, 41: 16}), ({100: 7}, {3: 8, 4: 16, 90: 8})],
)
def test_the_rows_of_each_length_are_those_that_the_updates_read(write_config, sizes, lengths, steps):
    batch = {"global_sequences": 12, "micro_sequences": 4, "size_warmup": sizes, "length_warmup": lengths}
    plan = batch_plan(load(write_config(batch=batch)), 32, 2, 0)
    expected, position = {}, 0
    for _ in range(steps):
        tokens, sequences = plan.tokens_at(position) or 32, plan.sequences_at(position)
        expected[tokens] = expected.get(tokens, 0) + sequences
        position += sequences
    assert samples_by_length(plan, position, 32) == expected


def test_arithmetic_counts_rows_that_a_length_warm_up_cuts_as_long_as_they_are(write_config):
    whole = load(write_config(steps=10, batch={"global_sequences": 10, "micro_sequences": 5}))
    cut = load(
        write_config(steps=10, batch={"global_sequences": 10, "micro_sequences": 5, "length_warmup": {75: 8}})
    )
    short, full = (flops_per_token(whole.model, tokens, 0.15) for tokens in (8, 32))
    plan = batch_plan(whole, 32, 2, 0)
    assert (
        arithmetic_in_words(whole, plan, 32)
        == f"{full / 1e6:,.1f} MFLOP a token, {full * 3200 / 1e15:,.3g} PFLOP in all"
    )
    expected = (80 * short + 20 * full) * 32 / 1e15
    words = arithmetic_in_words(cut, batch_plan(cut, 32, 2, 0), 32)
    assert words.startswith(f"MFLOP a token: {short / 1e6:,.1f} in rows of 8, ")
    assert words.endswith(f" in rows of 32; {expected:,.3g} PFLOP in all") and short < full


def test_of_a_mixture_each_data_set_is_seen_as_often_as_its_weight_has_it(
    dataset, write_config, tmp_path, monkeypatch, capsys
):
    other = shutil.copytree(dataset, tmp_path / "other")
    data = {"dir": str(dataset), "weight": 3.0, "others": [{"dir": str(other), "weight": 1.0}]}
    path = write_config(
        data=data, steps=1024, batch={"global_sequences": 2, "micro_sequences": 1}, monitor={"port": 0}
    )
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("sys.argv", ["plan", f"--config={path}"])
    main()
    said, rows = capsys.readouterr().out, open_manifest(load(path).data).splits["train"].rows
    assert f"{dataset}: {rows:,} rows, 75.0% of the samples; seen {1536 / rows:.2f} times" in said
    assert f"{other}: {rows:,} rows, 25.0% of the samples; seen {512 / rows:.2f} times" in said
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"row_tokens": 16}))
    with pytest.raises(SystemExit, match="error: .*other"):
        main()
