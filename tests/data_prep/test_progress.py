"""What a run says of its progress: rates of its own work, shares that end at the whole, paths as they are written."""

from __future__ import annotations

import json
from pathlib import Path

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
