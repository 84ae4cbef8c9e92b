"""One self-contained HTML page about one run or several: no script, no network, no second file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from . import pictures, probe_pictures
from .log import RunLog, read_run
from .progress import duration
from .verdicts import headline, verdicts

_MARK = {"good": "✓", "note": "•", "bad": "✗"}
_EXPLAIN = {
    "update_ratio": "How far each layer moves in a step, relative to its own size. A bright row is a "
    "layer that is rewritten, a dark one a layer that stands still; a bright column is a step on "
    "which everything jumped.",
    "relative": "The same, divided by the median layer of the same step: the schedule drops out and what "
    "is left is who moves more (red) or less (blue) than the others.",
    "grad_norm": "What the loss asks of each layer, before the optimizer rescales it. Useful for finding "
    "vanishing or exploding gradients; it follows after trouble rather than announcing it.",
    "update_norm": "What was truly added to the weights. Trouble starts here, before the loss shows it.",
}
_STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #e3e7ed; --blue: #2563eb; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 28px 64px; background: #fff; min-height: 100vh;
  box-shadow: 0 0 0 1px var(--line); }
h1 { font-size: 27px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -.01em; } h2 { font-size: 18px;
margin: 44px 0 10px; padding-top: 18px; border-top: 1px solid var(--line); } h3 { font-size: 15px; margin:
26px 0 2px; } p { margin: 4px 0 10px; max-width: 78ch; } .soft { color: var(--soft); } .facts { display: grid;
grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 22px 0 6px; } .fact { border:
1px solid var(--line); border-radius: 10px; padding: 12px 14px; } .fact b { display: block; font-size: 22px;
letter-spacing: -.01em; font-variant-numeric: tabular-nums; } .fact span { color: var(--soft); font-size:
13px; } ul.verdicts { list-style: none; padding: 0; margin: 12px 0; } ul.verdicts li { padding: 5px 0 5px
28px; position: relative; max-width: 95ch; } ul.verdicts li i { position: absolute; left: 2px; font-style:
normal; font-weight: 700; width: 18px; text-align: center; } .good i { color: #0f8a6a; } .note i { color:
#a16207; } .bad i { color: #b91c1c; } .bad { font-weight: 600; } img { width: 100%; height: auto; display:
block; margin: 6px 0; } table { border-collapse: collapse; margin: 8px 0; font-variant-numeric: tabular-nums;
font-size: 14px; } th, td { text-align: right; padding: 5px 16px 5px 0; border-bottom: 1px solid var(--line);
} th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; } .dot {
display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 7px; } pre { background:
#f6f7f9; border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; overflow-x: auto;
  font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; }
details { margin: 10px 0; } summary { cursor: pointer; font-weight: 600; }
footer { margin-top: 48px; color: var(--soft); font-size: 13px; }
@media print { body { background: #fff; } main { box-shadow: none; padding: 0; }
  h2, img { break-inside: avoid; } }
"""


def read_runs(directories: Iterable[Path | str]) -> dict[str, RunLog]:
    """The runs by name (the folder's; with its parent's where two are alike).

    Raises DamagedLogError (log.py) at the first run that cannot be read.
    """
    logs = [read_run(directory) for directory in directories]
    folders = [log.path.parent.resolve() for log in logs]
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [f"{folder.parent.name}/{folder.name}" for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return dict(zip(names, logs, strict=True))


def page(runs: Mapping[str, RunLog]) -> str:
    """The whole page as text; the first run is the one that the headline speaks of."""
    title = " · ".join(runs)
    parts = [f"<h1>{escape(title)}</h1>"]
    first = next(iter(runs.values()))
    if len(runs) == 1:
        parts += [f'<p class="soft">{escape(headline(first))}</p>', _facts(first)]
    for number, (name, run) in enumerate(runs.items()):
        parts += [f"<h3>{_dot(number)}{escape(name)}</h3>" if len(runs) > 1 else "", _verdicts(run)]
    parts += [
        "<h2>Curves</h2>",
        _picture(pictures.curves(runs), "Curves of loss, accuracy, rate, speed and norms"),
    ]
    parts.append(
        '<p class="soft">Faint: every step; strong: running median. Marks at the foot of the norms: steps on '
        "which an update (short, orange) or the loss (long, red) stood out of its own history.</p>"
    )
    parts += ["<h2>Layers over time</h2>"]
    parts.append(_heat_maps(runs))
    parts += _probes(runs)
    parts += ["<h2>Final numbers</h2>", _final_numbers(runs), _data(runs), _spike_table(runs)]
    for name, run in runs.items():
        parts.append(_files(name if len(runs) > 1 else "", run.path.parent))
    parts.append(f"<footer>{_colophon(runs)}</footer>")
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        '<link rel="icon" href="data:,"/>\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n"
        "</html>\n"
    )


def _picture(figure: Any, description: str) -> str:
    return f'<img src="{pictures.data_uri(figure)}" alt="{escape(description)}"/>'


def _dot(number: int) -> str:
    return f'<span class="dot" style="background:{pictures.colour_of(number)}"></span>'


def _last(run: RunLog, key: str, kind: str = "steps", edge: bool = False) -> float:
    """The last value of a scalar (with `edge` the median of the last twentieth); NaN if the run has none."""
    _, values = run.series(key, kind)
    if not len(values):
        return math.nan
    return float(np.median(values[-max(1, len(values) // 20) :])) if edge else float(values[-1])


# What the table of final numbers shows: label, value of a run, format.
_NUMBERS = (
    ("steps", lambda run: run.steps[-1]["step"], "{:,.0f}"),
    ("updates applied", lambda run: run.updates_applied, "{:,.0f}"),
    ("tokens", lambda run: _last(run, "tokens_total"), "{:,.0f}"),
    ("training loss, end (nats/token)", lambda run: _last(run, "loss", edge=True), "{:.4f}"),
    ("validation loss (nats/token)", lambda run: _last(run, "validation_loss", "evaluations"), "{:.4f}"),
    ("validation accuracy", lambda run: _last(run, "validation_accuracy", "evaluations"), "{:.2%}"),
    ("unigram baseline", lambda run: _last(run, "unigram_accuracy", "evaluations"), "{:.2%}"),
    ("tokens/s, median", lambda run: _median(run, "tokens_per_second"), "{:,.0f}"),
    ("MFU, median", lambda run: _median(run, "mfu_ratio"), "{:.1%}"),
    ("seconds per update, median", lambda run: _median(run, "step_seconds"), "{:.3f}"),
    ("waiting for data, share", lambda run: _share(run, "data_wait_seconds", "step_seconds"), "{:.1%}"),
    ("gradient norm, end", lambda run: _last(run, "grad_norm", edge=True), "{:.4g}"),
    ("update ÷ weight, end", lambda run: _last(run, "update_ratio", edge=True), "{:.3g}"),
    ("weight norm", lambda run: _last(run, "weight_norm"), "{:.4g}"),
    ("skipped updates", lambda run: _last(run, "skipped_steps_total"), "{:,.0f}"),
    ("refused updates", lambda run: _last(run, "refused_steps_total"), "{:,.0f}"),
    ("loss spikes", lambda run: sum("loss_spike" in line for line in run.steps), "{:,.0f}"),
    ("steps with update spikes", lambda run: sum("update_spikes" in line for line in run.steps), "{:,.0f}"),
)


def _median(run: RunLog, key: str) -> float:
    _, values = run.series(key)
    return float(np.median(values)) if len(values) else math.nan


def _share(run: RunLog, part: str, whole: str) -> float:
    total = run.series(whole)[1].sum()
    return float(run.series(part)[1].sum() / total) if total else math.nan


def _facts(run: RunLog) -> str:
    seconds = float(run.series("step_seconds")[1].sum())
    accuracy = _last(run, "validation_accuracy", "evaluations")
    shown = [
        (f"{accuracy:.1%}", "validation accuracy") if math.isfinite(accuracy) else None,
        (f"{_last(run, 'loss', edge=True):.3f}", "training loss, nats/token"),
        (f"{_median(run, 'tokens_per_second'):,.0f}", "tokens/s"),
        (_short(_last(run, "tokens_total")), "tokens seen"),
        (duration(seconds), "in training steps"),
    ]
    tiles = (
        f'<div class="fact"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for v, k in filter(None, shown)
    )
    return f'<div class="facts">{"".join(tiles)}</div>'


def _short(count: float) -> str:
    """12,345,678 as 12.3 M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return f"{count:.0f}"


def _verdicts(run: RunLog) -> str:
    lines = (f'<li class="{v.level}"><i>{_MARK[v.level]}</i>{escape(v.text)}</li>' for v in verdicts(run))
    return f'<ul class="verdicts">{"".join(lines)}</ul>'


def _heat_maps(runs: Mapping[str, RunLog]) -> str:
    """All maps by quantity, the runs of one quantity under one another on one colour scale."""
    parts = []
    for column, title in pictures.TITLES.items():
        scale = pictures.colour_scale(runs.values(), column)
        figures = (
            {name: pictures.heat_maps(run, column, scale) for name, run in runs.items()} if scale else {}
        )
        if any(figures.values()):
            parts.append(
                f'<h3>{escape(title[0].upper() + title[1:])}</h3><p class="soft">{_EXPLAIN[column]}</p>'
            )
            parts += _labelled(runs, figures, title)
    outside = {name: pictures.outside_layers(run) for name, run in runs.items()}
    if any(outside.values()):
        parts += ["<h3>Outside the layers</h3>", *_labelled(runs, outside, "tensors outside the layers")]
    return "\n".join(parts) or '<p class="soft">No tables of layers have been written yet.</p>'


def _probes(runs: Mapping[str, RunLog]) -> list[str]:
    """What the layers do: probes on a fixed batch."""
    whole = probe_pictures.probe_curves(runs)
    if whole is None:
        return []
    text = (
        "Measured on the same held-out rows every time, in fp32. The change of the function should not grow; below "
        "three times the dashed line it is rounding. Entropy near 0 is attention that has collapsed onto single tokens."
    )
    maps = {name: probe_pictures.probe_maps(run) for name, run in runs.items()}
    return [
        f'<h2>What the layers do</h2><p class="soft">{text}</p>',
        _picture(whole, "Model update and logits over time"),
        *_labelled(runs, maps, "entropy, activations and dead units by layer"),
    ]


def _labelled(runs: Mapping[str, RunLog], figures: Mapping[str, Any], description: str) -> Iterator[str]:
    for number, name in enumerate(runs):
        if figures.get(name) is not None:
            if len(runs) > 1:
                yield f"<p>{_dot(number)}{escape(name)}</p>"
            yield _picture(figures[name], f"{description} of {name} over time")


def _final_numbers(runs: Mapping[str, RunLog]) -> str:
    names = "".join(
        f"<th>{_dot(i) if len(runs) > 1 else ''}{escape(name)}</th>" for i, name in enumerate(runs)
    )
    rows = []
    for label, value_of, form in _NUMBERS:
        values = [float(value_of(run)) for run in runs.values()]
        if any(math.isfinite(value) for value in values):
            cells = "".join(f"<td>{form.format(v) if math.isfinite(v) else '–'}</td>" for v in values)
            rows.append(f"<tr><td>{escape(label)}</td>{cells}</tr>")
    return f"<table><thead><tr><th></th>{names}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _spike_table(runs: Mapping[str, RunLog], limit: int = 20) -> str:
    """The steps that stood out, first `limit` of each run."""
    rows = []
    for name, run in runs.items():
        spiked = [line for line in run.steps if "loss_spike" in line or "update_spikes" in line]
        for line in spiked[:limit]:
            groups = sorted(line.get("update_spikes", []), key=lambda row: -row[2])
            worst = ", ".join(
                f"{f'layer {y} ' if y else ''}{part} ×{factor:.3g}" for y, part, factor in groups[:3]
            )
            more = f" and {len(groups) - 3} more" if len(groups) > 3 else ""
            loss = f"{line['loss']:.4g}" + (f" (×{line['loss_spike']:.3g})" if "loss_spike" in line else "")
            cells = (f"{line['step']:,}", loss, worst + more or "–")
            run_cell = f"<td>{escape(name)}</td>" if len(runs) > 1 else ""
            rows.append(f"<tr>{run_cell}{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
        if len(spiked) > limit:
            rows.append(f"<tr><td>… and {len(spiked) - limit} more in metrics.jsonl</td></tr>")
    if not rows:
        return ""
    heads = (*(("run",) if len(runs) > 1 else ()), "step", "loss", "updates above their own level")
    head = "".join(f"<th>{text}</th>" for text in heads)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<h3>Steps that stood out</h3>{table}"


def _data(runs: Mapping[str, RunLog]) -> str:
    """Rows, documents and tokens of the data by split, as the run found them."""
    rows = []
    for name, run in runs.items():
        data = next((header["data"] for header in reversed(run.runs) if "data" in header), None)
        for split, counts in (data or {}).get("splits", {}).items():
            numbers = "".join(f"<td>{counts[key]:,}</td>" for key in ("documents", "rows", "tokens"))
            label = f"{name}: {split}" if len(runs) > 1 else split
            rows.append(f"<tr><td>{escape(label)}</td>{numbers}</tr>")
    if not rows:
        return ""
    head = "<th></th><th>documents</th><th>rows</th><th>tokens</th>"
    return f"<h3>Data</h3><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _files(name: str, folder: Path) -> str:
    """Configuration, environment and data statistics, as they lie in the run's folder."""
    parts = []
    for file, title in (
        ("config.yaml", "Configuration"), ("environment.json", "Environment"),
        ("data.json", "Data"), ("manifest.json", "Data"),
    ):  # fmt: skip
        path = folder / file
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            if file.endswith(".json"):
                try:
                    text = json.dumps(json.loads(text), indent=2, ensure_ascii=False)
                except ValueError:
                    text = f"({file} is not valid JSON; shown as it is)\n{text}"
            label = f"{title}: {name}" if name else title
            content = escape("".join(c for c in text if c >= " " or c in "\n\t"))
            parts.append(
                f"<details><summary>{escape(label)} ({file})</summary><pre>{content}</pre></details>"
            )
    return ("<h2>Setting</h2>" if not name and parts else "") + "\n".join(parts)


def _colophon(runs: Mapping[str, RunLog]) -> str:
    count = sum(len(run.steps) for run in runs.values())
    return f"Made from {count:,} step records by <code>python -m sutrain.report</code>."
