"""What the person at the terminal sees: a live view on a TTY, else a plain line every few seconds.

Under the deepspeed launcher, Slurm or `> train.log` stdout is no terminal; a line that stands on its own and
is flushed is then worth more than a bar.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from .spikes import Spikes


class Progress:
    """Shows a run of `total_steps` from `start_step` on; use on the rank that logs.

    `stream` is stdout unless given; `plain_every_seconds` is the time between plain lines. The first and last
    step, evaluations and spikes of the loss are always shown.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        stream: TextIO | None = None,
        plain_every_seconds: float = 10.0,
    ) -> None:
        self._stream = stream or sys.stdout
        self._total, self._start = total_steps, start_step
        self._plain_every_seconds = plain_every_seconds
        self._pace = Pace()
        self._last_line = -math.inf
        self._evaluation: dict[str, Any] = {}
        self._evaluated = False
        self._live: Live | None = None
        if self._stream.isatty():
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(None),
                TextColumn("{task.fields[eta]}"),
            )
            self._bar = Bar(*columns, expand=True)
            self._task = self._bar.add_task("", total=total_steps, completed=start_step, eta="")
            self._live = Live(self._bar, console=Console(file=self._stream), refresh_per_second=4)
            self._live.start()

    def step(self, record: Mapping[str, Any], spikes: Spikes | None = None) -> None:
        """Show a finished training step; `record` as for MetricsLog.step."""
        now, step = time.monotonic(), int(record["step"])
        self._pace.step(now, self._evaluated)
        self._evaluated = False
        remaining = self._pace.remaining_seconds(self._total - step)
        spiked = spikes is not None and spikes.loss_factor is not None
        if self._live:
            self._bar.update(self._task, completed=step, eta=f"{duration(remaining)} left")
            self._live.update(Group(self._bar, self._numbers(record), self._conspicuous(spikes)))
            if spiked:
                self._live.console.print(self._plain(record, remaining, spikes))
            return
        due = now - self._last_line >= self._plain_every_seconds
        if due or spiked or step >= self._total:
            self._last_line = now
            print(self._plain(record, remaining, spikes), file=self._stream, flush=True)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Show an evaluation; `record` as for MetricsLog.evaluation."""
        self._evaluation, self._evaluated = dict(record), True
        line = f"step {int(record['step']):,} · validation: {self._validation()}"
        if self._live:
            self._live.console.print(line, highlight=False)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the terminal in order; further calls do nothing."""
        if self._live:
            self._live.stop()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _plain(self, record: Mapping[str, Any], remaining: float, spikes: Spikes | None) -> str:
        fields = [f"step {int(record['step']):,}/{self._total:,}", *(f"{k} {v}" for k, v in _fields(record))]
        if spikes is not None and spikes.loss_factor is not None:
            fields.append(f"LOSS SPIKE x{spikes.loss_factor:.3g}")
        if spikes is not None and len(spikes.updates):
            worst = ", ".join(f"{_place(*row[:2])} x{row[2]:.3g}" for row in spikes.conspicuous())
            fields.append(f"UPDATE SPIKE in {len(spikes.updates)} group(s): {worst}")
        return " · ".join([*fields, f"{duration(remaining)} left"])

    def _numbers(self, record: Mapping[str, Any]) -> Table:
        table = Table.grid(padding=(0, 3))
        fields = [*_fields(record), *([("validation", self._validation())] if self._evaluation else [])]
        for start in range(0, len(fields), 4):
            table.add_row(*(f"[dim]{name}[/] {value}" for name, value in fields[start : start + 4]))
        return table

    def _validation(self) -> str:
        known = self._evaluation
        texts = [f"loss {known['validation_loss']:.4f}"] if "validation_loss" in known else []
        if "validation_accuracy" in known:
            texts.append(f"accuracy {known['validation_accuracy']:.2%}")
        if "unigram_accuracy" in known:
            texts.append(f"(unigram {known['unigram_accuracy']:.2%})")
        return " ".join(texts)

    def _conspicuous(self, spikes: Spikes | None) -> str:
        rows = spikes.conspicuous() if spikes is not None else []
        if not rows:
            return "[dim]updates: still learning what is usual[/]"
        texts = (f"{_place(layer, part)} x{factor:.2f}" for layer, part, factor in rows)
        return "[dim]updates most above their own usual:[/] " + " · ".join(texts)


class Pace:
    """How long steps take, with the evaluations between them; a hang or a pause is not counted as if it came again."""

    _STALL_SECONDS, _STALL_FACTOR, _USUAL_OF = 60.0, 10.0, 50

    def __init__(self) -> None:
        self._last: float | None = None
        self._steps, self._seconds = 0, 0.0
        self._lately = {evaluated: deque[float](maxlen=self._USUAL_OF) for evaluated in (False, True)}

    def step(self, now: float, evaluated: bool) -> None:
        """A step ended at `now`, in seconds; `evaluated`: there was an evaluation since the one before."""
        if self._last is not None:  # the first step pays for warming up, so the clock starts after it
            took, lately = now - self._last, self._lately[evaluated]
            usual = statistics.median(lately) if lately else took
            if took > self._STALL_SECONDS and took > self._STALL_FACTOR * usual:
                took = usual
            lately.append(took)
            self._steps, self._seconds = self._steps + 1, self._seconds + took
        self._last = now

    def remaining_seconds(self, steps_left: int) -> float:
        """Time for `steps_left` at this pace; NaN before the second step."""
        return self._seconds / self._steps * steps_left if self._steps else math.nan


def duration(seconds: float) -> str:
    """`1d 02h`, `2h 03m`, `4m 05s` or `6s`; `?` if not known."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


def _fields(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and formatted value of the numbers worth a line, those that the record has."""
    shown = (
        ("loss", "loss", "{:.4f}"), ("lr", "learning_rate", "{:.2e}"),
        ("tokens/s", "tokens_per_second", "{:,.0f}"),
        ("MFU", "mfu_ratio", "{:.1%}"), ("grad norm", "grad_norm", "{:.3g}"),
        ("waiting for data", "data_wait_share", "{:.0%}"), ("skipped", "skipped_steps_total", "{:,}"),
        ("refused", "refused_steps_total", "{:,}"),
    )  # fmt: skip
    values = dict(record)
    if values.get("step_seconds") and "data_wait_seconds" in values:
        values["data_wait_share"] = values["data_wait_seconds"] / values["step_seconds"]
    hidden_when_zero = ("data_wait_share", "skipped_steps_total", "refused_steps_total")
    return [
        (name, form.format(values[key]))
        for name, key, form in shown
        if key in values and not (key in hidden_when_zero and values[key] < 0.01)
    ]


def _place(layer: str, part: str) -> str:
    return f"layer {layer} {part}" if layer else part
