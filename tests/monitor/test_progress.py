"""What the terminal shows, with and without a terminal."""

import io
import math
from itertools import accumulate

import pytest

from sutrain.monitor.progress import Pace, Progress, duration
from sutrain.monitor.spikes import SpikeWatch
from tests.monitor.made_up import made_up_run


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(stream, **settings) -> str:
    watch = None
    with Progress(settings.get("steps", 400), stream=stream, plain_every_seconds=1e9) as progress:
        for record, table, evaluation in made_up_run(**settings):
            watch = watch or SpikeWatch(table.groups)
            progress.step(record, watch.judge(record["loss"], record["learning_rate"], table))
            if evaluation:
                progress.evaluation(evaluation)
    return stream.getvalue()


def test_a_log_gets_first_and_last_step_evaluations_and_spikes_one_line_each():
    lines = show(io.StringIO(), layers=4, steps=120, evaluate_every_steps=60, spike_at=(90,)).splitlines()
    starts = ["step 1/120", "step 60 · validation", "step 92/120", "step 120/120", "step 120 · validation"]
    assert [line.startswith(start) for line, start in zip(lines, starts, strict=True)] == [True] * 5
    for words in ("loss ", "lr ", "tokens/s ", "MFU "):
        assert words in lines[0]
    assert "accuracy" in lines[1] and "(unigram 6.20%)" in lines[1]
    assert "LOSS SPIKE x1.4" in lines[2]
    assert "0s left" in lines[3]
    assert not any("\x1b" in line for line in lines)


def test_a_terminal_gets_a_bar_with_the_most_conspicuous_layers(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")  # a dumb one gets lines
    shown = show(Terminal(), layers=4, steps=60, evaluate_every_steps=30)
    assert "\x1b[" in shown and "60/60" in shown
    assert "updates most above their own usual" in shown and "layer" in shown
    assert "validation" in shown


def test_updates_that_were_not_made_are_said_and_none_is_not():
    stream = io.StringIO()
    record = {"step": 9, "loss": 2.0, "skipped_steps_total": 0, "refused_steps_total": 3}
    with Progress(9, stream=stream) as progress:
        progress.step(record, None)
    assert "refused 3" in stream.getvalue() and "skipped" not in stream.getvalue()


def pace_of(*seconds: float) -> Pace:
    """After a first step and others that took so long; those above 400 s with an evaluation."""
    pace = Pace()
    for now, took in zip(accumulate((0, *seconds)), (0, *seconds), strict=True):
        pace.step(now, evaluated=400 < took < 500)
    return pace


def test_remaining_time_counts_evaluations_and_slow_steps_and_no_hang():
    assert math.isnan(pace_of().remaining_seconds(10))
    usual = [*[2.0] * 9, 402.0] * 10
    assert pace_of(*usual).remaining_seconds(100) == pytest.approx(4200)
    assert pace_of(*usual, 8000, 2).remaining_seconds(100) == pytest.approx(4200, rel=0.03)
    assert pace_of(*[300.0] * 20).remaining_seconds(2) == 600


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(6.4, "6s"), (245, "4m 05s"), (7380, "2h 03m"), (93600, "1d 02h"), (math.nan, "?"), (59.7, "1m 00s")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
