"""The page of results says what the benchmarks' files say."""

from __future__ import annotations

import json

import pytest

from benchmarks import results
from benchmarks.results import (
    FOLDER,
    HELD,
    MISSED,
    NO_GOAL,
    NOT_MEASURED,
    PAGE,
    render,
    verdict,
    write_results,
)


def entry(value, goal, better="lower", **more):
    return {"name": "cost", "value": value, "unit": "ratio", "goal": goal, "better": better, **more}


def test_the_page_is_in_step_with_the_files():
    assert PAGE.read_text() == render(FOLDER), "run: python -m benchmarks.results"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (entry(0.9, 1.0), HELD),
        (entry(1.0, 1.0), HELD),
        (entry(1.1, 1.0), MISSED),
        (entry(1.1, 1.0, "higher"), HELD),
        (entry(0.9, 1.0, "higher"), MISSED),
        (entry(None, 1.0), NOT_MEASURED),
        (entry(0.9, None, None), NO_GOAL),
        (entry(0.9, 1.0, interval_95=[0.8, 0.95]), HELD),
        (entry(0.9, 1.0, interval_95=[0.8, 1.05]), f"{HELD}, spans the goal"),
        (entry(1.02, 1.0, interval_95=[0.8, 1.05]), f"{MISSED}, spans the goal"),
        (entry(1.02, 1.0, interval=[1.01, 1.05]), MISSED),
    ],
)
def test_verdicts(found, expected):
    assert verdict(found) == expected


def test_writing_results_renders_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(results, "PAGE", tmp_path / "RESULTS.md")
    machine = {"processor": "some", "cores": 2, "python": "3.11", "packages": {"torch": "2.13"}}
    content = {
        "commit": "0123456789abcdef",
        "machine": machine | {"load_average": [0.5, 1, 2]},
        "command": "python benchmarks/thing.py",
        "notes": {"warning": "the machine was busy"},
        "table": [{"model": "ours", "tokens/s": 12345.6}, {"model": "theirs", "tokens/s": 0.5}],
        "results": [
            entry(2345.6, None, None) | {"unit": "tokens/s"},
            entry(1.25, 1.0, note="a | b"),
            entry(None, 2),
        ],
    }
    write_results(tmp_path / "elsewhere" / "thing.json", content)
    assert not (tmp_path / "RESULTS.md").exists()
    write_results(tmp_path / "results" / "thing.json", content)
    assert json.loads((tmp_path / "results" / "thing.json").read_text()) == content
    page = (tmp_path / "RESULTS.md").read_text()
    for line in (
        "| [thing](#thing) | 0 of 2 | `cost` | `cost` |",
        "- command: `python benchmarks/thing.py`",
        "- commit: 0123456789ab",
        "- machine: some, 2 cores; Python 3.11, torch 2.13; load average 0.5, 1.0, 2.0",
        "- warning: the machine was busy",
        "| `cost` | 1.25 |  | ≤ 1 | **missed** | a \\| b |",
        "| `cost` | – |  | ≤ 2 | not measured |  |",
        "| `cost` | 2,346 tokens/s |  |  |  |  |",
        "| model | tokens/s |",
        "| ours | 12,346 |",
        "| theirs | 0.5 |",
    ):
        assert line in page.splitlines()
