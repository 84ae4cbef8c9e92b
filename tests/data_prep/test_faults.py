"""Memory, kills and full disks, on real processes: bounds hold, nothing is lost, nothing finished is done again."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from benchmarks.data_prep_runs import Watch
from tests.data_prep.made import ROOT, command_line, content_files, make_texts, settings

_MEBIBYTE = 1024**2


def write_lines(path: Path, kind: str, size_bytes: int) -> int:
    """A txt file of one kind of lines; returns the largest record."""
    words = " ".join(make_texts(400))
    longest = {"letters": 2, "short lines": 75, "documents": 100_000, "giant line": size_bytes // 2}[kind]
    text = words * (longest // len(words.encode()) + 1)
    with path.open("w") as file:
        written = 0
        while written < size_bytes:
            turn = written % 5000
            line = text[turn : turn + longest].encode()[: longest - 1].decode(errors="ignore")
            written += file.write(line + "\n") and len(line.encode()) + 1
    return longest


@pytest.mark.parametrize("kind", ["letters", "short lines", "documents", "giant line"])
@pytest.mark.parametrize("content", ["tokens", pytest.param("text", marks=pytest.mark.slow)])
def test_a_worker_stays_within_its_memory(prepared, tmp_path, kind, content, evidence):
    """Peak resident memory of every worker above its idle size; one record of each kind is above the limit."""
    limit = {"documents": 200_000, "giant line": 3 * _MEBIBYTE}.get(kind, 4096)
    budget = 112 * _MEBIBYTE + 8 * limit
    (tmp_path / "raw").mkdir()
    for number in range(2):
        write_lines(tmp_path / "raw" / f"{number}.txt", kind, 600_000 if kind == "letters" else 4_000_000)
        with (tmp_path / "raw" / f"{number}.txt").open("a") as file:
            file.write("法" * (2 * limit) + "\n")
    tree = settings(
        tmp_path / "out",
        [tmp_path / "raw"],
        tokenizer={"load": str(prepared / "tokenizer" / "tokenizer.model")},
        cleaning={"max_record_bytes": limit},
        shards={"content": content, "target_bytes": 4_000_000, "validation_share": 0.01},
        resources={"workers": 2, "worker_memory_bytes": budget, "task_bytes": 1},
        quarantine={"max_record_share": 0.5},
    )
    result = command_line(tree, tmp_path, "run")
    assert result.returncode == 0, result.stderr
    records = json.loads((tmp_path / "out" / "manifest.json").read_bytes())["records"]
    assert records["quarantined"] == 2 and records["written"] >= 2
    stages = json.loads((tmp_path / "out" / "run.json").read_bytes())["stages"]
    peaks = {name: stage["peak_bytes"] for name, stage in stages.items()}
    assert 0 < max(peaks.values()) <= budget, peaks
    evidence(kind=kind, content=content, worker_memory_bytes=budget, peak_bytes=peaks)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".txt.gz"])
def test_lines_of_hundreds_of_megabytes_are_held_in_bounds(prepared, tmp_path, ending, evidence):
    """A line of 700 MB beyond the limit costs nothing and nobody; one of 60 MB within it is written whole, in parts."""
    limit = 64 * _MEBIBYTE
    budget = 112 * _MEBIBYTE + 8 * limit
    words = "  caf\u00e9\t".join(make_texts(8000)).encode()  # a megabyte, with white space to collapse
    path = tmp_path / f"a{ending}"
    begin, end = (b'{"text": "', b'"}\n') if ending == ".jsonl" else (b"", b"\n")
    words = words.replace(b"\t", b"\\t") if ending == ".jsonl" else words
    with gzip.open(path, "wb", compresslevel=1) if ending.endswith(".gz") else path.open("wb") as file:
        for size in (50, 60_000_000, 700_000_000, 40):
            file.write(begin)
            for first in range(0, size, len(words)):
                file.write(words[: size - first] if size < 1000 else words)
            file.write(end)
    tree = settings(
        tmp_path / "out",
        [path],
        tokenizer={"load": str(prepared / "tokenizer" / "tokenizer.model")},
        cleaning={"max_record_bytes": limit},
        shards={"target_bytes": 100_000_000, "block_bytes": 2**20, "validation_share": 0, "row_tokens": 512},
        resources={"workers": 1, "worker_memory_bytes": budget},
    )
    result = command_line(tree, tmp_path, "run")
    assert result.returncode == 0, result.stderr
    records = json.loads((tmp_path / "out" / "manifest.json").read_bytes())["records"]
    assert (records["read"], records["written"], records["quarantined"]) == (4, 3, 1)
    stages = json.loads((tmp_path / "out" / "run.json").read_bytes())["stages"]
    peaks = {name: stage["peak_bytes"] for name, stage in stages.items()}
    assert limit < max(peaks.values()) <= budget, peaks
    assert command_line(tree, tmp_path, "verify").returncode == 0
    evidence(
        ending=ending, worker_memory_bytes=budget, peak_bytes=peaks, line_bytes=[60_000_000, 700_000_000]
    )


def test_memory_below_the_least_is_refused(prepared, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(make_texts(100)))
    model = {"load": str(prepared / "tokenizer" / "tokenizer.model")}
    for resources, message in (
        ({"worker_memory_bytes": 113 * _MEBIBYTE}, "is too little for records of cleaning.max_record_bytes="),
        ({"memory_bytes": 200_000_000, "workers": 2}, "take fewer workers, a smaller worker_memory_bytes"),
    ):
        tree = settings(tmp_path / "out", [tmp_path / "a.txt"], tokenizer=model, resources=resources)
        result = command_line(tree, tmp_path, "run")
        assert result.returncode == 2 and message in result.stderr, result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize("size", ["200k", "600k"])
def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_room(
    corpus, prepared, tmp_path, small_disk, size
):
    folder, resize = small_disk
    resize(size)
    tree = settings(folder / "out", [corpus], resources={"task_bytes": 1})
    result = command_line(tree, tmp_path, "run")
    assert result.returncode == 3, result.stderr
    assert "no space left for" in result.stderr and "bytes more are needed" in result.stderr
    assert "Traceback" not in result.stderr and not list(folder.rglob("*.tmp-*"))
    assert (
        size == "200k"
        or "no space left" in json.loads((folder / "out" / "progress.json").read_bytes())["failed"]
    )
    done = {path: path.stat().st_mtime_ns for path in folder.rglob("task-*.json")}
    resize("64m")
    result = command_line(tree, tmp_path, "run")
    assert result.returncode == 0, result.stderr
    assert content_files(folder / "out") == content_files(prepared)
    assert size == "200k" or done, "with some room, some tasks were finished before the disk was full"


def kill_at_random(command: list[str], draw: random.Random, longest: float, what: str) -> tuple[str, int]:
    """Start a run and kill -9 the driver, a worker or all of it after a random time; (what it met, its exit code)."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    time.sleep(draw.uniform(0.3, longest))
    try:
        workers = psutil.Process(process.pid).children(recursive=True)
        if what == "all":
            os.killpg(process.pid, signal.SIGKILL)
        elif what == "worker" and workers:
            draw.choice(workers).kill()
        else:
            what = "driver"
            process.kill()
    except (psutil.NoSuchProcess, ProcessLookupError):
        pass
    code = process.wait(timeout=200)
    psutil.wait_procs([w for w in workers if w.is_running()], timeout=30)
    return what, code


@pytest.mark.slow
def test_twenty_kills_at_random_times_change_no_byte(corpus, prepared, tmp_path, evidence):
    output = tmp_path / "out"
    config = tmp_path / "config.yaml"
    resources = {"workers": 2, "task_bytes": 1, "lease_seconds": 5}
    config.write_text(yaml.safe_dump(settings(output, [corpus], resources=resources)))
    command = [sys.executable, "-m", "data_prep", "run", "--config", str(config)]
    started = time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    whole = time.monotonic() - started
    subprocess.run(["rm", "-rf", str(output)], check=True)
    draw, kills, whole_runs, executed = random.Random(7), [], 0, 0
    kinds = draw.sample(["driver", "worker", "worker", "all"] * 5, 20)  # a worker may not have begun yet
    while len(kills) < 20:
        with Watch(
            output
        ) as watch:  # of one output, from its first run until it is whole, however often killed
            while len(kills) < 20 and not (output / "manifest.json").exists():
                kills.append(kill_at_random(command, draw, 1.1 * whole, kinds[len(kills)]))
            if not (output / "manifest.json").exists():
                subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        names = [name for name, _, _ in watch.seen]
        assert len(names) == len(set(names)), "a finished task was done again"
        assert content_files(output) == content_files(prepared)
        subprocess.run(["rm", "-rf", str(output)], check=True)
        whole_runs, executed = whole_runs + 1, executed + len(names)
    assert sum(code != 0 for _, code in kills) >= 10, "too few of the kills hit a run at work"
    assert {what for what, _ in kills} == {"driver", "worker", "all"}, kills
    evidence(kills=kills, whole_runs=whole_runs, tasks_executed=executed, seconds_of_a_run=whole)
