"""Writes what a benchmark found, and benchmarks/RESULTS.md from what all of them have.

`python -m benchmarks.results` renders again; a benchmark that ends with `write_results` has done it already. The JSON
of a benchmark has `commit`, `machine`, `command` and `results`, a list of {name, value, unit, goal, better}, where
there is one with `interval_95` and `note`; value null: it could not be measured; goal null: it has none. Rows of
further figures may be in `table`.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
PAGE = Path(__file__).parent / "RESULTS.md"
HELD, MISSED, NOT_MEASURED, NO_GOAL = "held", "**missed**", "not measured", ""
SIGNS = {"lower": "≤", "higher": "≥"}

INTRODUCTION = """# Results

What the benchmarks found, each against its goal, as the last run left it; `python -m benchmarks.results` writes this
page from `benchmarks/results/*.json`, and [LOG.md](../LOG.md) says what to make of it. A value is a ratio within one
run wherever it can be; intervals hold 95 %. "Spans the goal" marks a verdict that the interval does not settle.
"""


def describe_run(command: str) -> dict[str, Any]:
    """Commit, machine and command of a run, the load of the machine as it is now."""
    from sutrain.launch import environment

    root = Path(__file__).resolve().parents[1]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    facts = environment(1)
    machine = {key: facts[key] for key in ("processor", "cores", "accelerator", "python", "packages")}
    machine["load_average"] = [round(load, 2) for load in os.getloadavg()]
    return {"commit": commit.stdout.strip(), "machine": machine, "command": command}


def write_results(path: Path, content: dict[str, Any]) -> None:
    """The file of one benchmark, and the page again if the file is one of those it shows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    if path.resolve().parent == FOLDER.resolve():
        PAGE.write_text(render(FOLDER))


def verdict(entry: dict[str, Any]) -> str:
    """Was the goal reached? One that has none gets no verdict."""
    value, goal = entry["value"], entry["goal"]
    if goal is None:
        return NO_GOAL if value is not None else NOT_MEASURED
    if value is None:
        return NOT_MEASURED
    lower = entry["better"] == "lower"
    found = HELD if (value <= goal if lower else value >= goal) else MISSED
    bounds = interval_of(entry)
    spans = bounds is not None and bounds[0] < goal < bounds[1]
    return f"{found}, spans the goal" if spans else found


def interval_of(entry: dict[str, Any]) -> tuple[float, float] | None:
    bounds = entry.get("interval_95", entry.get("interval"))
    return None if bounds is None else (bounds[0], bounds[1])


def render(folder: Path) -> str:
    """The page, from all results in a folder."""
    contents = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    lines = [INTRODUCTION, *_summary(contents)]
    for name, content in contents.items():
        lines += ["", f"## {name}", "", *_facts(content), ""]
        lines += ["| result | value | 95 % interval | goal | | note |", "|---|---|---|---|---|---|"]
        entries = content["results"]
        for entry in [e for e in entries if e["goal"] is not None] + [
            e for e in entries if e["goal"] is None
        ]:
            lines.append("| " + " | ".join(_cells(entry)) + " |")
        lines += _table(content.get("table", []))
    return "\n".join(lines) + "\n"


def _summary(contents: dict[str, Any]) -> list[str]:
    lines = ["| benchmark | goals held | missed | not measured |", "|---|---|---|---|"]
    for name, content in contents.items():
        found = [(entry["name"], verdict(entry)) for entry in content["results"] if entry["goal"] is not None]
        held = sum(judged.startswith(HELD) for _, judged in found)
        missed, unknown = (
            ", ".join(f"`{one}`" for one, judged in found if judged.startswith(kind))
            for kind in (MISSED, NOT_MEASURED)
        )
        lines.append(f"| [{name}](#{name}) | {held} of {len(found)} | {missed} | {unknown} |")
    return lines


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """What a benchmark has besides results: the same columns in every row."""
    if not rows:
        return []
    lines = ["", "| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    for row in rows:
        lines.append("| " + " | ".join(map(_cell, row.values())) + " |")
    return lines


def _facts(content: dict[str, Any]) -> list[str]:
    machine = content["machine"]
    device = f", {machine['accelerator']}" if machine.get("accelerator") else ""
    versions = ", ".join(
        f"{name} {machine['packages'][name]}"
        for name in ("torch", "deepspeed")
        if name in machine.get("packages", {})
    )
    load = ", ".join(f"{value:.1f}" for value in machine.get("load_average", ()))
    lines = [
        f"- command: `{content['command']}`",
        f"- commit: {content['commit'][:12] or 'not noted'}",
        f"- machine: {machine['processor']}, {machine['cores']} cores{device}; Python {machine['python']}"
        + (f", {versions}" if versions else "")
        + (f"; load average {load}" if load else ""),
    ]
    warning = content.get("notes", {}).get("warning")
    return lines + ([f"- warning: {warning}"] if warning else [])


def _cells(entry: dict[str, Any]) -> list[str]:
    value, bounds, goal = entry["value"], interval_of(entry), entry["goal"]
    unit = "" if entry["unit"] == "ratio" else f" {entry['unit']}"
    return [
        f"`{entry['name']}`",
        "–" if value is None else f"{_number(value)}{unit}",
        "" if bounds is None else f"{_number(bounds[0])} .. {_number(bounds[1])}",
        "" if goal is None else f"{SIGNS[entry['better']]} {goal:g}",
        verdict(entry),
        entry.get("note", "").replace("|", "\\|"),
    ]


def _cell(value: str | float | None) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else _number(value)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def main() -> None:
    PAGE.write_text(render(FOLDER))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
