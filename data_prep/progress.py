"""What a run says while it works: a live line on a terminal, a plain line now and then in a log, and two
files.

OUTPUT/progress.json tells the stage, its share done and the records so far; OUTPUT/metrics.prom has the
same counts for Prometheus (node exporter's textfile collector reads it).
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .errors import LostLeaseError
from .files import check_fence

_FILES_SECONDS = 60.0
"""Longest time between two writes of the files: an alarm is raised over files that are five minutes old."""


class RunProgress:
    """Shows the progress of the stages of a run, and records it in `folder` unless that is None."""

    def __init__(self, folder: Path | None, log_seconds: float, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, markup=False)
        self.stage_seconds: dict[str, float] = {}
        self.records: Counter[str] = Counter()
        self._reason = ""
        self._folder, self._log_seconds = folder, log_seconds
        self._stage, self._unit = "", "bytes"
        self._done = self._taken_over = self._total = self._tasks_done = self._tasks = 0.0
        self._started = time.monotonic()

    @contextmanager
    def stage(self, name: str, total: float, tasks: int, unit: str = "bytes") -> Iterator[None]:
        """A stage with `total` units of work in `tasks` tasks; ends with its line of summary."""
        self._stage, self._unit, self._total, self._tasks = name, unit, total, tasks
        self._done = self._taken_over = self._tasks_done = 0
        self._started = time.monotonic()
        ended = threading.Event()
        ticker = threading.Thread(target=self._tick, args=(ended,), daemon=True)
        live = _live(self.console) if self.console.is_terminal else None
        self._bar = live
        try:
            if live is not None:
                live.start()
                self._bar_task = live.add_task(name, total=total or None, note="")
            ticker.start()
            yield
        finally:
            ended.set()
            ticker.join()
            if live is not None:
                live.stop()
            self.stage_seconds[name] = self.stage_seconds.get(name, 0) + time.monotonic() - self._started
            self._write_files()
        self.console.print(
            f"{self._line()}, {time.monotonic() - self._started:.1f} s", highlight=False, soft_wrap=True
        )

    def advance(self, amount: float, records: dict[str, int] | None = None) -> None:
        """A task ended: `amount` units of work, and records by outcome, which may be corrected by less than none."""
        self._done += amount
        self._tasks_done += 1
        self.records.update(records or {})
        if self._bar is not None:
            self._bar.update(self._bar_task, completed=self._done, note=self._rate_and_note())

    def took_over(self) -> None:
        """What is done of the stage by now was done by an earlier run, and says nothing about the rate of this one."""
        self._taken_over = self._done
        if self._bar is not None:  # forgets how fast that went
            self._bar.reset(self._bar_task, completed=int(self._done))

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def _tick(self, ended: threading.Event) -> None:
        line_due = time.monotonic() + self._log_seconds
        while not ended.wait(max(0.0, min(line_due - time.monotonic(), _FILES_SECONDS))):
            if time.monotonic() >= line_due:
                line_due += self._log_seconds
                if not self.console.is_terminal:
                    self.console.print(self._line(), highlight=False, soft_wrap=True)
            self._write_files()

    def _line(self) -> str:
        rate = self._rate()
        parts = [f"{self._stage}: {int(self._tasks_done)}/{int(self._tasks)} tasks"]
        if self._total:
            parts.append(f"{self._share():.0%}")
        scale, unit = (1e6, "MB") if self._unit == "bytes" else (1e3, f"k {self._unit}")
        parts.append(f"{self._done / scale:,.1f} {unit} at {rate / scale:,.1f} {unit}/s")
        if rate and self._done < self._total and self._tasks_done < self._tasks:
            parts.append(f"{(self._total - self._done) / rate:,.0f} s left")
        return ", ".join(parts + ([self._note()] if self.records else []))

    def _note(self) -> str:
        lost = self.records["dropped"] + self.records["quarantined"]
        return f"{self.records['written']:,} records, {lost:,} dropped or quarantined" if self.records else ""

    def _rate(self) -> float:
        """Units of work a second of this run."""
        return (self._done - self._taken_over) / max(1e-9, time.monotonic() - self._started)

    def _share(self) -> float:
        """Share of the stage that is done. How much work there is may be unknown, or a guess; how many tasks is not."""
        if not self._total or self._tasks_done >= self._tasks > 0:
            return self._tasks_done / max(1, self._tasks)
        return min(1.0, self._done / self._total)

    def _rate_and_note(self) -> str:
        rate = self._rate()
        scale, unit = (1e6, "MB") if self._unit == "bytes" else (1e3, f"k {self._unit}")
        return ", ".join(filter(None, (f"{rate / scale:,.1f} {unit}/s", self._note())))

    def finish(self) -> None:
        """Leave word that the run has ended well."""
        self._stage, self._done, self._total = "finished", 1, 1
        self._write_files()

    @contextmanager
    def telling_failure(self) -> Iterator[None]:
        """Leave word why the run ended, if it does not end well: Ray makes 1 of every exit code, this tells more."""
        try:
            yield
        except Exception as error:
            self._reason = str(error) or type(error).__name__
            self._write_files()
            raise

    def _write_files(self) -> None:
        if self._folder is None:
            return
        try:
            check_fence()
        except LostLeaseError:
            return  # another run tells about this folder now; the next commit of this one ends it
        status: dict[str, Any] = {
            "stage": self._stage,
            "done": self._done,
            "total": self._total,
            "unit": self._unit,
            "tasks_done": self._tasks_done,
            "tasks": self._tasks,
            "stage_seconds": time.monotonic() - self._started,
            "records": dict(self.records),
            "time": time.time(),
            **({"failed": self._reason} if self._reason else {}),
        }
        share = self._share()
        lines = [
            "# HELP data_prep_records_total Records by outcome; what was written may yet be dropped as a duplicate.",
            "# TYPE data_prep_records_total gauge",
            *(
                f'data_prep_records_total{{outcome="{k}"}} {self.records[k]}'
                for k in ("written", "dropped", "quarantined")
            ),
            "# HELP data_prep_stage_share_ratio Share of the current stage that is done.",
            "# TYPE data_prep_stage_share_ratio gauge",
            f'data_prep_stage_share_ratio{{stage="{self._stage}"}} {share:.4f}',
            "# HELP data_prep_stage_work Work of the current stage that is done, in its unit.",
            "# TYPE data_prep_stage_work gauge",
            f'data_prep_stage_work{{stage="{self._stage}",unit="{self._unit}"}} {self._done:.0f}',
            "# HELP data_prep_stage_tasks Tasks of the current stage.",
            "# TYPE data_prep_stage_tasks gauge",
            f'data_prep_stage_tasks{{stage="{self._stage}",state="done"}} {self._tasks_done:.0f}',
            f'data_prep_stage_tasks{{stage="{self._stage}",state="all"}} {self._tasks:.0f}',
            "# HELP data_prep_heartbeat_timestamp_seconds Unix time at which this was written.",
            "# TYPE data_prep_heartbeat_timestamp_seconds gauge",
            f"data_prep_heartbeat_timestamp_seconds {status['time']:.0f}",
        ]
        for name, text in (
            ("progress.json", json.dumps(status) + "\n"),
            ("metrics.prom", "\n".join(lines) + "\n"),
        ):
            temporary = self._folder / f".{name}.new"
            try:
                temporary.write_text(text)
                temporary.replace(self._folder / name)
            except OSError:  # telling about the work must never stop it
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
                    _overwrite(self._folder / name, text)


def _overwrite(path: Path, text: str) -> None:
    """Change a file in the blocks it has: on a full disk there is no room for a second one."""
    with open(path, "r+") as file:
        file.write(text)
        file.truncate()


def _live(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
    )
