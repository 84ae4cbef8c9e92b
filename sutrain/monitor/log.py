"""metrics.jsonl: one JSON object a line, appended while the run goes on; writer and reader side by side.

Every line begins with `kind` and `step` (steps done, also those whose update was skipped or refused), then what
belongs to the kind:

    run         what is running: written at every start (`step` 0, or the step resumed from)
    step        the numbers of one step; `layers` holds the table of norms per layer and part, by columns;
                `loss_spike`, `update_spikes` are there only on steps that spiked
    evaluation  validation numbers after `step`; `…_by_length` and `…_by_source` are objects
    probe       `model_update` of the update that made `step`, and after it one number a layer of `attention_entropy` …

Every line is strict JSON: a number that is not finite is the string "NaN", "Infinity" or "-Infinity". Scalars
are kept to the last bit, so that two runs can be compared exactly; the norms of layers keep five digits.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .spikes import Spikes
from .statistics import GroupTable
from .tables import Tables

FILE_NAME = "metrics.jsonl"
KINDS = ("run", "step", "evaluation", "probe")
TABLE_BYTES_PER_STEP = 40_000
TABLE_BYTES_AHEAD = 200_000
"""What may be written at once, when nothing has been for a while: a spike should find room for its table."""
_START = re.compile(rb'\{"kind": "(run|step|evaluation|probe)", "step": (\d+)[,}]')
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class DamagedLogError(ValueError):
    """metrics.jsonl is missing, empty or not what the writer writes; the message says which and where."""


class MetricsLog:
    """The writer: appends a line, flushed, per call; open it on one rank only.

    With `resume_from_step` = k the lines of later steps, written by a run that was then lost, are cut off
    first, with `evaluated_again` the evaluation after k too, and so is a line torn by a crash: all are at the
    end, and a log of weeks is not read for it. Lines
    among them whose beginning is damaged cannot be placed: `damaged` says how many. The table per layer is
    written every `layers_every_steps` steps and on every step that spiked, but on average no more than
    TABLE_BYTES_PER_STEP: at 1000 layers it is 120 kB, so it is written on every third step or so. Raises
    DamagedLogError if a new run (no `resume_from_step`) would be appended to the log of another.
    """

    def __init__(
        self,
        path: Path | str,
        resume_from_step: int | None = None,
        layers_every_steps: int = 1,
        evaluated_again: bool = False,
    ) -> None:
        self.path = Path(path)
        self._layers_every_steps = max(1, layers_every_steps)
        self._table_budget_bytes = float(TABLE_BYTES_AHEAD)
        self.damaged = 0
        if resume_from_step is not None and self.path.exists():
            self.damaged = _drop_after(self.path, resume_from_step, evaluated_again)
        elif self.path.exists() and self.path.stat().st_size:
            raise DamagedLogError(
                f"{self.path}: holds another run already; resume that run or choose a new run folder"
            )
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def run(self, step: int, record: Mapping[str, Any]) -> None:
        """What is running, e.g. `world_size`, `mfu_reference`, `flops_per_token`, `total_steps`."""
        self._write("run", step, {"time_seconds": time.time(), **record})

    def step(self, record: Mapping[str, Any], table: GroupTable, spikes: Spikes | None = None) -> None:
        """One training step; `record` holds `step` and scalars, keys as in series.STEP."""
        content = {"time_seconds": time.time(), **record, **table.global_norms}
        content |= spikes.as_record() if spikes else {}
        step = content.pop("step")
        spiked = "loss_spike" in content or "update_spikes" in content
        wanted = step % self._layers_every_steps == 0 or step == 1 or spiked
        self._table_budget_bytes = min(self._table_budget_bytes + TABLE_BYTES_PER_STEP, TABLE_BYTES_AHEAD)
        layers = table_text(table) if wanted and self._table_budget_bytes > 0 else ""
        self._table_budget_bytes -= len(layers)
        self._write("step", step, content, f', "layers": {layers}' if layers else "")

    def probe(self, record: Mapping[str, Any]) -> None:
        """One probe of the update that made `step`, as Probe.after returns it."""
        content = {"time_seconds": time.time(), **record}
        self._write("probe", content.pop("step"), content)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """One evaluation; `record` holds `step` and scalars, keys as in series.EVALUATION."""
        content = {"time_seconds": time.time(), **record}
        self._write("evaluation", content.pop("step"), content)

    def _write(self, kind: str, step: int, content: Mapping[str, Any], more: str = "") -> None:
        line = {"kind": kind, "step": int(step), **{key: _plain(value) for key, value in content.items()}}
        text = json.dumps(line, ensure_ascii=False, allow_nan=False)
        self._file.write(text.removesuffix("}") + more + "}\n")
        self._file.flush()

    def close(self) -> None:
        """Sync and close the file; further calls do nothing."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def table_text(table: GroupTable) -> str:
    """The table by columns as JSON, numbers to five digits."""
    return f"{{{', '.join(f'{json.dumps(k)}: {_column(v)}' for k, v in table.as_columns().items())}}}"


def _column(values: list) -> str:
    """A list as JSON. One format call for all of it: at 3,000 groups, json.dumps of rounded numbers takes 5 ms."""
    if not all(isinstance(value, float) for value in values):
        return json.dumps(values)
    if all(map(math.isfinite, values)):
        return f"[{', '.join(['%.5g'] * len(values)) % tuple(values)}]"
    return json.dumps([_rounded(value, 5) for value in values])


def _plain(value: Any) -> Any:
    """A value as strict JSON: numpy and torch scalars become numbers, non-finite numbers strings."""
    if isinstance(value, float):
        return value if math.isfinite(value) else _rounded(value, 1)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        return _plain(value.item())
    return value


def _rounded(value: float, digits: int) -> float | str:
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return float(f"{value:.{digits}g}")


def set_aside(path: Path) -> Path | None:
    """Make room for a run that begins anew; returns where the log is kept.

    One with a training step is renamed to NAME.before-TIME; one without is of a start that came to nothing: it goes.
    """
    if not path.exists():
        return None
    with open(path, "rb") as file:
        trained = any((start := _START.match(line)) and start.group(1) == b"step" for line in file)
    if not trained:
        path.unlink()
        return None
    return path.rename(f"{path}.before-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")


def _drop_after(path: Path, step: int, and_evaluation: bool) -> int:
    """Cut off the lines of steps after `step`, the evaluation of its weights if wanted, and a torn last line; lines are
    in the order of steps. Returns how many whole lines without a step were among them."""
    damaged = 0
    with open(path, "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        for offset, line in _from_the_end(file):
            start = _START.match(line)
            again = (
                and_evaluation and start and start.group(1) == b"evaluation" and int(start.group(2)) == step
            )
            if line.endswith(b"\n") and start and int(start.group(2)) <= step and not again:
                break
            damaged += start is None and line.endswith(b"\n")
            end = offset
        file.truncate(end)
        os.fsync(file.fileno())
    return damaged


def _from_the_end(file: BinaryIO, block_bytes: int = 1 << 20) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of each line of a file, the last one first."""
    position, rest = file.seek(0, os.SEEK_END), b""
    while position:
        size = min(position, block_bytes)
        position -= size
        file.seek(position)
        lines = io.BytesIO(file.read(size) + rest).readlines()
        offset = position + size + len(rest)
        rest = lines.pop(0) if position else b""  # begins before this block
        for line in reversed(lines):
            offset -= len(line)
            yield offset, line


@dataclass
class RunLog:
    """A run read back: the lines by kind, in order, their tables apart (`tables`), and notes on what was wrong with the
    file."""

    path: Path
    runs: list[dict] = field(default_factory=list)
    steps: list[dict] = field(default_factory=list)
    evaluations: list[dict] = field(default_factory=list)
    probes: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: Tables = field(default_factory=Tables)

    @property
    def updates_applied(self) -> int:
        """Of the steps done, those that changed the weights: neither skipped nor refused."""
        last = self.steps[-1]
        return last["step"] - last.get("skipped_steps_total", 0) - last.get("refused_steps_total", 0)

    def series(self, key: str, kind: str = "steps") -> tuple[np.ndarray, np.ndarray]:
        """(step, value) of one scalar over all lines of a kind that hold it."""
        rows = [
            (line["step"], line[key])
            for line in getattr(self, kind)
            if isinstance(line.get(key), int | float)
        ]
        pairs = np.array(rows, dtype=np.float64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    def heat_map(self, column: str, part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(step [X], layer [Y], value [Y, X]) of one column of the tables, for one part of the layers."""
        return self.tables.heat_map(column, part)


def read_run(path: Path | str, kinds: Collection[str] = KINDS) -> RunLog:
    """Read metrics.jsonl (or the run folder that holds it), of other kinds than `kinds` not more than how lines begin.

    A last line torn by a crash is left out and noted. Raises DamagedLogError, naming file and line, for a
    missing or empty file, for any other line that is not a record, and for a log without a single step.
    """
    log = RunLog(_file_of(path))
    found = {"run": log.runs, "step": log.steps, "evaluation": log.evaluations, "probe": log.probes}
    for record in _records(log.path, kinds, log.notes):
        if (table := record.pop("layers", None)) is not None:
            log.tables.add(record["step"], table)
        found[record["kind"]].append(record)
    if "step" in kinds and not log.steps:
        raise _no_step(log.path)
    return log


def read_steps(path: Path | str) -> Iterator[dict]:
    """The step records of a run one by one, without their tables. Raises DamagedLogError as read_run does."""
    path, step = _file_of(path), None
    for step in _records(path, ("step",), [], tables=False):
        yield step
    if step is None:
        raise _no_step(path)


def _file_of(path: Path | str) -> Path:
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise DamagedLogError(f"{path}: no such file; expected the folder of a run that has begun to train")
    return path


def _no_step(path: Path) -> DamagedLogError:
    return DamagedLogError(f"{path}: holds no training step yet ({path.stat().st_size} bytes)")


def _no_record(path: Path, number: int, line: bytes, error: Exception) -> DamagedLogError:
    return DamagedLogError(
        f"{path}, line {number}: not a record of kind run, step, evaluation or probe ({error}); "
        f"starts with {line[:60]!r}. Delete the line, or restore the file"
    )


def _records(path: Path, kinds: Collection[str], notes: list[str], tables: bool = True) -> Iterator[dict]:
    """The records of some kinds. What is not wanted is thrown away unread: tables are nearly all of a log."""
    for number, line, is_last in _lines(path):
        start = _START.match(line)
        if start and start.group(1).decode() not in kinds:
            continue
        if not tables and line.endswith(b"}\n"):
            content, table, _ = line.partition(b', "layers": {')
            line = content + b"}" if table else line
        try:
            record = json.loads(line)
            if record["kind"] not in KINDS:
                raise ValueError(f"kind {record['kind']!r}")
            record["step"] = int(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            if is_last and not line.endswith(b"\n"):
                notes.append(f"the last line ({number}) is torn, as a crash leaves it; it was left out")
                break
            raise _no_record(path, number, line, error) from None
        if record["kind"] in kinds:
            yield {sys.intern(key): _numbers(value) for key, value in record.items()}


def _lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """(line number, line, is it the last) of a file, one line ahead."""
    with open(path, "rb") as file:
        previous = None
        for number, line in enumerate(file, 1):
            if previous:
                yield *previous, False
            previous = number, line
        if previous:
            yield *previous, True


def _numbers(value: Any) -> Any:
    """Turn the strings of non-finite numbers back into floats."""
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    return value


def last_steps(path: Path, count: int, read_bytes: int = 16_000_000) -> list[dict]:
    """The last `count` step records of a log, read from its end; fewer if they do not lie in `read_bytes`.

    Raises DamagedLogError, naming file and line.
    """
    if not path.exists():
        return []
    with open(path, "rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - read_bytes)
        file.seek(start)
        lines = file.readlines()[1 if start else 0 :]
    found: list[dict] = []
    for after, line in enumerate(reversed(lines)):
        if len(found) == count:
            break
        if line.startswith(b'{"kind": "step"') and line.endswith(b"\n"):  # else torn by a crash
            try:
                found.append(_numbers(json.loads(line)))
            except ValueError as error:
                with open(path, "rb") as file:
                    raise _no_record(path, sum(1 for _ in file) - after, line, error) from None
    return found[::-1]


def find_steps(path: Path, wanted: Collection[int]) -> dict[int, dict]:
    """The records of a few steps by step; those that the log does not have are left out.

    Raises DamagedLogError, naming file and line.
    """
    lines = ((at, number, line) for kind, at, number, line in _beginnings(path) if kind == "step")
    return {at: _parsed(path, number, line) for at, number, line in lines if at in wanted}


def find_origin(path: Path, step: int) -> tuple[dict | None, dict | None, list[dict]]:
    """Where a step came from: (the record of `step`, the last one of a step before it, the records of all starts).

    Raises DamagedLogError, naming file and line.
    """
    of_step = before = None
    starts = []
    for kind, at, number, line in _beginnings(path):
        if kind == "run":
            starts.append(_parsed(path, number, line))
        elif kind == "step" and at == step:
            of_step = number, line
        elif kind == "step" and at < step:
            before = number, line
    return of_step and _parsed(path, *of_step), before and _parsed(path, *before), starts


def _beginnings(path: Path) -> Iterator[tuple[str, int, int, bytes]]:
    """(kind, step, line number, line) of the whole lines of a log that begin as they should; nothing without a log."""
    if path.exists():
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if (start := _START.match(line)) and line.endswith(b"\n"):
                    yield start.group(1).decode(), int(start.group(2)), number, line


def _parsed(path: Path, number: int, line: bytes) -> dict:
    try:
        return _numbers(json.loads(line))
    except ValueError as error:
        raise _no_record(path, number, line, error) from None
