"""One owner of an output at a time: refused while alive, followed when dead, and fenced when it was only paused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from data_prep import lease
from data_prep.errors import DataPrepError, DiskFullError, LostLeaseError
from data_prep.files import write_bytes
from data_prep.lease import owned
from tests.data_prep.made import ROOT, content_files, make_texts, prepare, settings, write_jsonl

_OWNER = """
import sys, time
from pathlib import Path
from data_prep.lease import owned
with owned(Path(sys.argv[1]), float(sys.argv[2])):
    print("owns", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def owner(tmp_path):
    """Starts processes that own tmp_path/out; ends them."""
    processes = []

    def start(lease_seconds: float = 1) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _OWNER, str(tmp_path / "out"), str(lease_seconds)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None and process.stdout.readline() == "owns\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_second_run_is_refused_and_the_owner_named(tmp_path, owner):
    process = owner()
    with pytest.raises(
        DataPrepError, match=rf"another run is at work there \(host .*process {process.pid}, since"
    ):
        with owned(tmp_path / "out", 5):
            pass


def test_the_work_of_a_dead_owner_is_taken_over_at_once(tmp_path, owner):
    process = owner()
    process.kill()
    process.wait()
    started = time.monotonic()
    with owned(tmp_path / "out", 30) as fence:
        assert fence.number == 2
    assert time.monotonic() - started < 5
    with owned(tmp_path / "out", 30) as fence:
        assert fence.number == 3, "numbers are never given out twice"


def test_an_owner_of_another_machine_is_followed_after_its_lease(tmp_path, owner, monkeypatch):
    process = owner()
    monkeypatch.setattr(
        lease, "_me", lambda: {"host": "elsewhere", "boot": "x", "process_space": "y", "process": 1}
    )
    with pytest.raises(DataPrepError, match="another run is at work"), owned(tmp_path / "out", 5):
        pass
    process.kill()
    process.wait()
    started = time.monotonic()
    with owned(tmp_path / "out", 1.5) as fence:
        assert fence.number == 2
    assert time.monotonic() - started > 1.4


def test_of_many_that_come_at_once_one_owns(tmp_path):
    inside, refused, most = [], [], []
    start, done = threading.Barrier(6), threading.Event()

    def come() -> None:
        start.wait()
        try:
            with owned(tmp_path / "out", 5):
                inside.append(1)
                most.append(len(inside))
                done.wait(20)
        except DataPrepError:
            refused.append(1)
            if len(refused) == 5:
                done.set()

    threads = [threading.Thread(target=come) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert (len(inside), len(refused)) == (1, 5)


def test_a_number_that_somebody_else_took_meanwhile_is_told_as_another_run(tmp_path, monkeypatch):
    (tmp_path / "out/.owner").mkdir(parents=True)
    (tmp_path / "out/.owner/000001.json").write_text('{"host": "other", "process": 7}')
    monkeypatch.setattr(lease, "_numbers", lambda folder: [])  # as it was a moment before
    with pytest.raises(DataPrepError, match=r"another run is at work there \(host other, process 7"):
        with owned(tmp_path / "out", 5):
            pass


def test_a_disk_that_is_full_at_the_start_is_told_as_such(small_disk):
    folder, _ = small_disk
    with pytest.raises(OSError):
        (folder / "filled").write_bytes(bytes(300_000))
    with pytest.raises(DiskFullError, match=rf"no space left for {folder}/out/.owner .*make room") as told:
        with owned(folder / "out", 5):
            pass
    assert told.value.exit_code == 3


def test_a_disk_that_takes_nothing_at_the_end_does_not_hide_what_ended_the_run(small_disk):
    folder, remount = small_disk
    with pytest.raises(KeyError, match="the reason"), owned(folder / "out", 5):
        remount("200k,ro")
        raise KeyError("the reason")


def test_a_writer_that_was_followed_cannot_commit(tmp_path):
    with owned(tmp_path / "out", 5) as fence:
        write_bytes(tmp_path / "out" / "a", b"first")
        (tmp_path / "out/.owner" / f"{fence.number + 1:06d}.json").write_text(
            '{"host": "other", "process": 7}'
        )
        with pytest.raises(LostLeaseError, match="taken over by host other, process 7"):
            write_bytes(tmp_path / "out" / "a", b"late")
    assert (tmp_path / "out" / "a").read_bytes() == b"first"
    assert not list((tmp_path / "out").glob("a.tmp-*"))


def test_a_paused_run_is_followed_and_writes_nothing_when_it_wakes(tmp_path, corpus, prepared):
    """Real runs: the first is stopped between its passes, the second finishes, the first wakes and must end."""
    output = tmp_path / "out"
    tree = settings(output, [corpus], resources={"workers": 2, "task_bytes": 1, "lease_seconds": 1.5})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "data_prep", "run", "--config", str(tmp_path / "config.yaml")]
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while first.poll() is None and not list(output.glob(".work/*/scatter/task-000000.json")):
            time.sleep(0.001)
        os.killpg(first.pid, signal.SIGSTOP)
        assert not (output / "manifest.json").exists()
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert second.returncode == 0, second.stderr
        assert "looking for up to" in second.stderr
        made = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
        os.killpg(first.pid, signal.SIGCONT)
        said = first.communicate(timeout=120)[1]
        assert first.returncode == 5, said
        assert "was taken over by" in said and "owner number 2" in said
        now = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
        assert now == made
        assert content_files(output) == content_files(prepared)
    finally:
        os.killpg(first.pid, signal.SIGKILL) if first.poll() is None else None


def test_the_fence_reaches_the_workers(tmp_path, monkeypatch):
    """A run that was followed while its workers were at work gets none of their results committed."""
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(300))
    tree = settings(tmp_path / "out", [source], resources={"workers": 2, "task_bytes": 1})
    from data_prep import run as run_module

    original = run_module.run_scatter

    def followed(*arguments):
        (tmp_path / "out/.owner/000099.json").write_text(json.dumps({"host": "other", "process": 7}))
        return original(*arguments)

    monkeypatch.setattr(run_module, "run_scatter", followed)
    with pytest.raises(LostLeaseError, match="taken over by host other"):
        prepare(tree)
    assert not list(Path(tmp_path / "out").glob(".work/*/scatter/*.json"))
