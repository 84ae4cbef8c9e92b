"""What a run says of its progress: rates of its own work, shares that end at the whole, paths as they are; files for
alarms in time, lines in a log as often as asked for."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

from rich.console import Console

from data_prep import progress as module
from data_prep.between import run_missing
from data_prep.executor import LocalExecutor
from data_prep.progress import RunProgress
from tests.data_prep.made import command_line, make_texts, settings


def test_what_an_earlier_run_did_says_nothing_about_the_rate(capsys):
    progress = RunProgress(None, 60)
    begun = []

    def work(number: int) -> dict:
        progress._started -= 10
        begun.append(progress._line())
        return {"bytes": 3_000_000}

    with progress.stage("scatter", 20_000_000, 4):
        done = run_missing(
            range(4),
            lambda number: {"bytes": 5_000_000} if number < 3 else None,
            work,
            LocalExecutor(1),
            progress,
            lambda result: progress.advance(result["bytes"]),
        )
    assert sum("taken_over" in result for result in done) == 3
    assert begun == ["scatter: 3/4 tasks, 75%, 15.0 MB at 0.0 MB/s"]
    # The size of compressed input is a guess; what all tasks have read was all of it.
    assert capsys.readouterr().err == "scatter: 4/4 tasks, 100%, 18.0 MB at 0.3 MB/s, 10.0 s\n"


def test_the_live_line_promises_no_end_by_the_speed_of_what_is_taken_over():
    progress, seen = RunProgress(None, 60, Console(file=io.StringIO(), force_terminal=True)), []

    def work(number: int) -> dict:
        (task,) = progress._bar.tasks
        seen.append((task.completed, task.total, task.time_remaining))
        return {}

    with progress.stage("scatter", 20, 20):
        run_missing(
            range(20),
            lambda number: {} if number < 15 else None,
            work,
            LocalExecutor(1),
            progress,
            lambda result: progress.advance(1),
        )
    assert seen[0] == (15, 20, None)


def told_share(folder: Path) -> str:
    lines = (folder / "metrics.prom").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("data_prep_stage_share_ratio{")]
    return line.rpartition(" ")[2]


def test_the_share_of_a_stage_whose_work_is_unknown_is_that_of_its_tasks(tmp_path):
    progress = RunProgress(tmp_path, 60)
    shares: list[str] = []
    progress._write_files()
    with progress.stage("train tokenizer", 0, 2):
        for _ in range(2):
            shares.append(told_share(tmp_path))
            progress.advance(500)
            progress._write_files()
        shares.append(told_share(tmp_path))
    assert shares == ["0.0000", "0.5000", "1.0000"]
    progress.finish()
    assert json.loads((tmp_path / "progress.json").read_bytes())["stage"] == "finished"
    assert told_share(tmp_path) == "1.0000"


def test_names_with_brackets_are_told_as_they_are(prepared, tmp_path):
    raw = tmp_path / "news [bold]" / "of [" / "today]"
    raw.mkdir(parents=True)
    (raw / "a.txt").write_text("\n".join(make_texts(100)))
    (raw / "README").write_text("not taken")
    model = str(prepared / "tokenizer" / "tokenizer.model")
    tree = settings(tmp_path / "out [red]", [tmp_path / "news [bold]"], tokenizer={"load": model})
    planned = command_line(tree, tmp_path, "plan")
    assert planned.returncode == 0, planned.stderr
    assert f"ignored: {raw}/README" in planned.stdout and "[red]" in planned.stdout
    for _ in range(2):
        done = command_line(tree, tmp_path, "run")
        assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/out [red] is complete" in done.stderr


def stage(folder, log_seconds, seconds):
    """(progress.json as it was within the stage, lines in the log within the stage)."""
    said = io.StringIO()
    progress = RunProgress(folder, log_seconds, Console(file=said))
    with progress.stage("scatter", total=10, tasks=2):
        progress.advance(4)
        time.sleep(seconds)
        file = folder / "progress.json"
        seen, lines = json.loads(file.read_text()) if file.exists() else None, said.getvalue().splitlines()
    return seen, lines


def test_files_are_written_in_time_for_the_alarm_however_seldom_a_line_is_wanted(tmp_path, monkeypatch):
    """DataPrepStalled is raised over files that are 300 s old."""
    assert module._FILES_SECONDS < 150
    monkeypatch.setattr(module, "_FILES_SECONDS", 0.05)
    seen, lines = stage(tmp_path, 3600, 0.5)
    assert seen["done"] == 4 and not lines


def test_lines_come_as_often_as_asked_for(tmp_path):
    seen, lines = stage(tmp_path, 0.1, 0.55)
    assert seen["done"] == 4 and 2 <= len(lines) <= 5
