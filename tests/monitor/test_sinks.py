"""The optional libraries: really written where they are there, one clear line where they are not."""

import sys
from types import SimpleNamespace

import pytest

from sutrain.monitor.sinks import SinkError, _flat, open_sinks
from tests.monitor.made_up import made_up_run, probe_of


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_library_that_is_missing_is_one_clear_line(name, monkeypatch, tmp_path):
    for module in ("tensorboard", "torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SinkError, match=f"monitor.also: {name} is not installed; pip install {name}"):
        open_sinks([name], tmp_path)


def test_numbers_get_flat_names():
    found = dict(_flat({"loss": 2.0, "run": "a", "by": {"32": 1.0}, "entropy": [3.0, 4.0], "noise": True}))
    assert found == {"loss": 2.0, "by/32": 1.0, "entropy/0": 3.0, "entropy/1": 4.0, "noise": 1.0}


def test_tensorboard_reads_back_what_was_written(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    (sink,) = open_sinks(["tensorboard", "tensorboard"], tmp_path)
    for record, table, _ in made_up_run(layers=2, steps=20):
        sink.step(record, table)
    sink.values(20, probe_of(2))
    sink.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == list(range(1, 21)) and losses[-1].value == pytest.approx(
        record["loss"]
    )
    assert events.Scalars("update_ratio/mixer/max")[-1].value > 0
    assert events.Scalars("attention_entropy/1")[0].value == 2.0


def test_tensorboard_shows_a_step_that_is_done_again_once(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    for resumed_from, steps in ((None, range(1, 9)), (5, range(6, 11))):
        (sink,) = open_sinks(["tensorboard"], tmp_path, resumed_from)
        for step in steps:
            sink.values(step, {"loss": float(step if resumed_from else -step)})
        sink.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    expected = [(step, step if step > 5 else -step) for step in range(1, 11)]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == expected


def test_a_run_that_goes_on_is_the_same_one_at_weights_and_biases(tmp_path, monkeypatch):
    """Its library is not among the dependencies; what it is asked for is looked at."""
    asked = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **settings: asked.append(settings)))
    for resumed_from in (None, 5, 7, None):
        open_sinks(["wandb"], tmp_path, resumed_from)
    first, second, third, anew = (settings["id"] for settings in asked)
    assert first == second == third != anew
    assert {settings["resume"] for settings in asked} == {"allow"}
