"""Processes that read ahead: what they hand over is what the loop would read, whatever becomes of them."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from sutrain import prefetch as prefetching
from sutrain import reader
from sutrain.batch_plan import BatchPlan
from sutrain.config import Masking
from sutrain.data import MixedSamples, Samples, load_manifest
from sutrain.labelling import word_masking
from sutrain.prefetch import prefetch
from sutrain.reader import FIRST_UPDATES, Job, Stretch, read_runs, stretches
from tests.conftest import ROOT, environment
from tests.test_supervise import wait_until

PLAN = BatchPlan(8, 2, 1, 0)
FIELDS = ("inputs_NL", "labels_NL", "hidden_NL", "document_NL")


def open_samples(folder, split="train"):
    return Samples(folder, split, 5, word_masking(load_manifest(folder), Masking(), 5, "masks"))


@pytest.fixture(scope="module")
def samples(dataset):
    return open_samples(dataset)


@pytest.fixture(autouse=True)
def read_by_processes(monkeypatch):
    """In a test a loop waits for the processes, which take longer to come up than it takes to read everything."""
    monkeypatch.setattr(prefetching, "_UP_SECONDS", 60)
    monkeypatch.setattr(prefetching, "_MOST_OWN", 0)


def children() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.ZombieProcess):
            found += [child] if "sutrain.reader" in " ".join(child.cmdline()) else []
    return found


def same(batch, other) -> bool:
    device = torch.device("cpu")
    equal = [
        batch.on(device)[name].equal(values)
        for name, values in other.on(device).items()
        if values is not None
    ]
    return all(equal) and (batch.first_sample, batch.fingerprint) == (other.first_sample, other.fingerprint)


def expected(samples, first: int, count: int = 2):
    return samples.batch(first, count)


@pytest.mark.parametrize("mixed", [False, True])
def test_processes_hand_over_what_the_loop_reads_itself(samples, dataset, mixed, monkeypatch, capfd):
    source = samples
    if mixed:
        source = MixedSamples([samples, open_samples(dataset, "validation")], [3, 1], 5, samples.labelling)
    plan = BatchPlan(9, 2, 2, 1, length_warmup=((0, 8), (40, 0)))
    own = list(prefetch(source, plan, 0, 30, workers=0))
    read_here = []
    monkeypatch.setattr(prefetching, "read_runs", lambda *of: read_here.append(of) or ([], None))
    handed = list(prefetch(source, plan, 0, 30, workers=2))
    assert not read_here and not capfd.readouterr().err, "the processes read everything"
    assert [[batch.idle for batch in batches] for batches in own] == [
        [batch.idle for batch in batches] for batches in handed
    ]
    assert all(
        same(a, b)
        for ours, theirs in zip(own, handed, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("start", [0, 40, 8000])
def test_a_stretch_is_an_update_at_first_and_then_ends_with_a_block(samples, start):
    found = list(islice(stretches(samples, PLAN, start, 400), 36))
    assert {stretch.rows for stretch in found[: FIRST_UPDATES - 1]} == {8}
    jobs = [job for stretch in found for job in stretch.jobs]
    assert [job.first_sample for job in jobs] == list(range(start, start + 2 * len(jobs), 2))
    block_rows, ends = samples.manifest.block_rows, samples.rows_per_epoch
    for stretch in found[FIRST_UPDATES:]:
        place = stretch.jobs[0].first_sample % ends
        assert place % block_rows < 2, "it begins with the first micro-batch of a block"
        assert block_rows // 2 <= stretch.rows <= 2 * block_rows


def test_micro_batches_that_follow_each_other_are_read_together():
    def runs(row_tokens, *jobs):
        stretch = Stretch()
        stretch.jobs = [Job(first, rows, None, False) for first, rows in jobs]
        return stretch.runs(row_tokens)

    assert runs(512, (0, 8), (8, 8), (16, 3)) == [(0, 19)]
    assert runs(512, (0, 8), (16, 8), (24, 8)) == [(0, 8), (16, 16)], "between them are those of another rank"
    assert runs(512, (0, 200), (200, 56), (256, 1)) == [(0, 256), (256, 1)], "so many tokens at once"
    assert runs(512, (0, 300), (300, 2)) == [(0, 300), (300, 2)], "a micro-batch is not divided"
    assert runs(512, (5, 2), (7, 0), (7, 0), (7, 2)) == [(5, 3), (7, 1), (7, 2)], "a row stands in for none"


def test_a_request_stays_short_enough_for_a_message(samples, monkeypatch):
    monkeypatch.setattr(reader, "_MOST_JOBS", 10)
    found = list(stretches(samples, BatchPlan(90, 1, 3, 1), 0, 20))
    assert max(len(stretch.jobs) for stretch in found) == 10
    assert [job.first_sample % 90 for stretch in found for job in stretch.jobs] == [*range(30, 60)] * 20


def test_a_loop_that_would_wait_reads_what_comes_behind(samples, monkeypatch):
    """However slow the processes are, every batch comes once, in order, and no more is held than allowed."""
    monkeypatch.setattr(prefetching, "_MOST_OWN", 3)
    monkeypatch.setattr(prefetching, "PROGRAM", SLOW)
    read_here, held = [], []

    def here(source, runs):
        read_here.append(runs[0][0])
        return read_runs(source, runs)

    monkeypatch.setattr(prefetching, "read_runs", here)
    seen = []
    for update in prefetch(samples, PLAN, 0, 300, workers=2):
        seen += update
        held.append(sum(first > update[-1].first_sample for first in read_here))
    assert [batch.first_sample for batch in seen] == list(range(0, 2400, 2))
    assert all(same(batch, expected(samples, batch.first_sample)) for batch in seen[::7])
    assert 3 <= len(read_here) < 40 and max(held) <= 3


def test_what_a_process_could_not_read_is_read_again(samples, monkeypatch, capfd):
    """It may have been short of memory or of open files; an error that stays is the loop's own."""
    failing = "from sutrain import data, reader; read = data.Samples.read; calls = []\n"
    failing += "def once(*of):\n    calls.append(of)\n"
    failing += "    if len(calls) == 20: raise MemoryError('none left')\n    return read(*of)\n"
    failing += "data.Samples.read = once; reader.serve({descriptor})"
    monkeypatch.setattr(prefetching, "PROGRAM", failing)
    seen = [batch for update in prefetch(samples, PLAN, 0, 1200) for batch in update]
    assert [batch.first_sample for batch in seen] == list(range(0, 9600, 2))
    assert all(same(batch, expected(samples, batch.first_sample)) for batch in seen[::31])
    told = capfd.readouterr().err
    assert told.count("which reads ahead, failed (MemoryError: none left); the loop tries itself") == 1


def test_what_the_loop_cannot_take_is_read_again(samples, monkeypatch, capfd):
    """For want of memory or descriptors."""
    receive, calls = prefetching.Receiver.receive, []

    def once(receiver):
        calls.append(receiver)
        if len(calls) == 3:
            raise OSError(errno.ENOMEM, "told as the system calls it")
        return receive(receiver)

    monkeypatch.setattr(prefetching.Receiver, "receive", once)
    seen = [batch for update in prefetch(samples, PLAN, 0, 200) for batch in update]
    assert [batch.first_sample for batch in seen] == list(range(0, 1600, 2))
    assert all(same(batch, expected(samples, batch.first_sample)) for batch in seen[::7])
    told = capfd.readouterr().err
    assert "(its rank cannot take what it read: Cannot allocate memory)" in told and "takes its place" in told


def test_a_process_that_takes_nothing_does_not_hold_up_who_asks(samples, monkeypatch):
    deaf = "import socket, time; end = socket.socket(fileno={descriptor}); end.send(b'ready'); time.sleep(60)"
    monkeypatch.setattr(prefetching, "PROGRAM", deaf)
    asked = prefetching.Reader(samples)
    assert asked.ask([(0, 8)] * 1000)
    assert sum(asked.ask([(0, 8)] * 1000) for _ in range(100)) < 99
    asked.process.kill()
    asked.hang_up()
    asked.wait()


def test_what_is_held_is_not_written_over_and_what_is_not_is_used_again(samples):
    """Memory that a process filled is lent: it comes back when the last array in it is gone."""
    batches = prefetch(samples, PLAN, 0, 10_000)
    held = [batch for _ in range(300) for batch in next(batches)]
    mapped = lambda: Path("/proc/self/maps").read_text().count("memfd:read-ahead")  # noqa: E731
    while_held = mapped()
    for _ in range(300):
        next(batches)
    assert all(same(batch, expected(samples, batch.first_sample)) for batch in held[:: len(held) // 40])
    assert while_held > 15
    held.clear()
    for _ in range(600):
        next(batches)
    assert mapped() <= while_held + 5, "nothing new was asked of the system since"
    batches.close()


def test_integers_travel_narrow_and_reach_the_model_wide(samples):
    (batch,) = next(prefetch(samples, BatchPlan(4, 4, 1, 0), 0, 1))
    assert [getattr(batch, name).dtype for name in FIELDS] == [
        torch.int16,
        torch.int16,
        torch.bool,
        torch.int16,
    ]
    given = batch.on(torch.device("cpu"))
    assert {name: values.dtype for name, values in given.items() if values is not None} == {
        "tokens_BL": torch.int64, "document_BL": torch.int64, "labels_BL": torch.int64, "hidden_BL": torch.bool
    }  # fmt: skip
    labelled = samples.labelled(0, 4)
    labelled.rows.inputs_NL[0, 3] = 2**15
    assert labelled.narrowed().rows.inputs_NL.dtype == np.int32
    assert (labelled.narrowed().rows.inputs_NL == labelled.rows.inputs_NL).all()


SLOW = "import time; from sutrain import reader; read = reader.read_runs; "
SLOW += "reader.read_runs = lambda *of: (time.sleep(0.05), read(*of))[1]; reader.serve({descriptor})"


@pytest.mark.parametrize(("workers", "own"), [(0, 0), (1, 0), (2, 0), (1, 8)])
def test_a_damaged_block_is_told_where_its_rows_are_asked_for(dataset, tmp_path, workers, own, monkeypatch):
    """Also where the loop meets it early, in the place of waiting."""
    monkeypatch.setattr(prefetching, "_MOST_OWN", own)
    if own:
        monkeypatch.setattr(prefetching, "PROGRAM", SLOW)
    folder = shutil.copytree(dataset, tmp_path / "data")
    reader = open_samples(folder).reader
    entry, block_rows = reader._reader(0).blocks[1], reader.manifest.block_rows
    with (folder / "train" / reader._entries[0].name).open("r+b") as file:
        file.seek(entry["tokens"][0] + 9)
        file.write(bytes(4))
    first = (block_rows - 20) // 2 * 2
    batches = prefetch(open_samples(folder), BatchPlan(4, 2, 1, 0), first, 1000, workers=workers)
    read = []
    with pytest.raises(Exception, match="block 1 is damaged") as raised:
        for update in batches:
            read += [batch.first_sample for batch in update]
    assert type(raised.value).__name__ == "ShardError"
    assert read and read[-1] + 2 <= block_rows < read[-1] + 2 + 4, "all updates before it, and none behind"
    assert not children()


def test_a_process_that_is_killed_is_told_of_and_replaced(samples, capfd):
    batches, seen = prefetch(samples, PLAN, 0, 200, workers=2), []
    for number, update in enumerate(batches):
        seen += update
        if number in (5, 90):
            (victim, *_), before = children(), len(children())
            victim.kill()
            while len(children()) == before:
                time.sleep(0.01)
    assert [batch.first_sample for batch in seen] == list(range(0, 1600, 2))
    assert all(same(batch, expected(samples, batch.first_sample)) for batch in seen[::7])
    told = capfd.readouterr().err
    assert told.count("is gone (signal 9, most often for want of memory); another one takes its place") == 2
    assert not children()


def test_where_no_process_comes_up_the_loop_reads_for_itself(samples, capfd, monkeypatch):
    monkeypatch.setattr(prefetching, "PROGRAM", "raise SystemExit(3)")
    seen = [batch.first_sample for update in prefetch(samples, PLAN, 0, 20, workers=2) for batch in update]
    assert seen == list(range(0, 160, 2))
    told = capfd.readouterr().err
    assert told.count("is gone (exit status 3); it never came up") == 2 and "the loop reads itself" in told

    def refused(*arguments, **settings):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refused)
    assert len(list(prefetch(samples, PLAN, 0, 3))) == 3
    assert "no further process to read ahead" in capfd.readouterr().err


def test_a_loop_does_not_wait_for_its_processes(samples, monkeypatch):
    monkeypatch.setattr(prefetching, "_UP_SECONDS", 0)
    monkeypatch.setattr(prefetching, "PROGRAM", "import time; time.sleep(60)")
    started = time.monotonic()
    batches = prefetch(samples, PLAN, 0, 20)
    assert len(list(batches)) == 20
    assert time.monotonic() - started < 5


def test_signals_for_the_run_do_not_end_the_processes(samples):
    batches = prefetch(samples, PLAN, 0, 400)
    next(batches)
    (reader,) = children()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        reader.send_signal(number)
    assert len(list(batches)) == 399 and not children()


@pytest.mark.parametrize("stopped", [False, True])
def test_processes_end_with_a_loop_that_is_killed(dataset, stopped):
    """Also one that is stopped and cannot see that its socket is closed."""
    program = (
        "import sys, time; from sutrain import prefetch; from tests.test_prefetch import open_samples, PLAN\n"
        "prefetch._UP_SECONDS = 60; batches = prefetch.prefetch(open_samples(sys.argv[1]), PLAN, 0, 10**6)\n"
        "next(batches); print('up', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(dataset)]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE) as loop:
        assert loop.stdout.readline() == b"up\n"
        (reader,) = psutil.Process(loop.pid).children()
        if stopped:
            reader.suspend()
        loop.kill()
    assert not psutil.wait_procs([reader], timeout=10)[1]


def test_a_data_set_that_took_the_place_of_another_is_refused(samples, tmp_path, capfd):
    folder = shutil.copytree(samples.manifest.directory, tmp_path / "data")
    opened = open_samples(folder)
    opened.manifest = replace(opened.manifest, content_hash="0" * 32)  # what the run began with
    batches = prefetch(opened, PLAN, 0, 1)
    assert len(next(batches)) == 4  # the loop goes on with the index that it has opened
    wait_until(lambda: not children())  # the process may be slower, and goes with the loop
    assert "another data set than the run began with" in capfd.readouterr().err


def test_a_process_that_reads_ahead_does_without_torch():
    program = (
        "import sys, sutrain.reader; print(sorted({'torch', 'fsspec', 'pydantic', 'ray'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ, capture_output=True, text=True
    )
    assert result.stdout == "[]\n", result.stderr


@pytest.mark.timeout(60)
def test_an_update_of_more_blocks_than_sockets_hold_messages_is_read(samples):
    """Requests and answers that nobody takes fill both ends; only so many stretches are asked for at once."""
    (update,) = prefetch(samples, BatchPlan(80_000, 1000, 1, 0), 0, 1)
    assert sum(len(batch.inputs_NL) for batch in update) == 80_000
    batches = prefetch(samples, BatchPlan(30_000, 50, 1, 0), 0, 3)
    assert [sum(len(batch.inputs_NL) for batch in update) for update in batches] == [30_000] * 3
