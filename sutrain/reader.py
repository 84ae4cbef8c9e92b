"""What is read ahead in one go, and the process that does it.

Reading is divided into *stretches*: consecutive micro-batches up to the end of a block of the shards, and at least half
as many rows, so that a block is decoded by one process, and once. At first a stretch is one update, so that the loop,
which reads for itself until a process is up, reads no more than it must.
"""

from __future__ import annotations

import ctypes
import signal
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from sutrain.batch_plan import BatchPlan
from sutrain.data import LabelledSamples, MixedSamples, Samples
from sutrain.shared_memory import Receiver, Writer

READY = b"ready"
"""Said once, when all is imported and opened."""
MOST_GIVEN_BACK = 64
"""Segments of memory in one request that the loop has done with."""
_MOST_JOBS = 1024
FIRST_UPDATES = 16
_TOKENS_AT_ONCE = 1 << 17
"""That are masked together: fewer cost more of Python, more do not stay near the processor."""
_PR_SET_PDEATHSIG = 1

Run = tuple[int, int]
"""Consecutive samples: the first and how many."""


class Job(NamedTuple):
    """One micro-batch."""

    first_sample: int
    rows: int
    row_tokens: int | None  # that they are cut to
    last: bool  # of its update

    @property
    def samples(self) -> Run:
        """What is read for it; where it has no rows, the one that stands in without weight."""
        return self.first_sample, self.rows or 1


class Stretch:
    """Micro-batches that are read in a row and handed over together: every time a loop is woken costs."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.rows = self.last_update = 0

    def runs(self, row_tokens: int) -> list[Run]:
        """Its samples; micro-batches that follow each other are read together, up to so many tokens."""
        most_rows, found = _TOKENS_AT_ONCE // row_tokens, []
        first = stop = -1
        for job in self.jobs:
            start, rows = job.samples
            if start != stop or start + rows - first > most_rows:
                if stop >= 0:
                    found.append((first, stop - first))
                first = start
            stop = start + rows
        return [*found, (first, stop - first)]


def stretches(
    samples: Samples | MixedSamples, plan: BatchPlan, samples_consumed: int, updates: int
) -> Iterator[Stretch]:
    """This rank's micro-batches of the next `updates`, in order."""
    rows_per_epoch, block_rows = samples.rows_per_epoch, samples.manifest.block_rows
    position, last_block, stretch = samples_consumed, -1, Stretch()
    for update in range(updates):
        sequences, row_tokens = plan.sequences_at(position), plan.tokens_at(position)
        if stretch.jobs and update < FIRST_UPDATES:
            yield stretch
            stretch = Stretch()
        shares = plan.shares(sequences)
        for number, (start, count) in enumerate(shares, 1):
            first = position + start
            block = first % rows_per_epoch // block_rows
            if (block != last_block and 2 * stretch.rows >= block_rows) or len(stretch.jobs) == _MOST_JOBS:
                yield stretch
                stretch = Stretch()
            last_block = block
            stretch.jobs.append(Job(first, count, row_tokens, number == len(shares)))
            stretch.rows += count or 1
            stretch.last_update = update
        position += sequences
    if stretch.jobs:
        yield stretch


Read = tuple[list[LabelledSamples], str | None]
"""Runs of samples, narrow, up to an error, and the error."""


def read_runs(samples: Samples | MixedSamples, runs: Sequence[Run]) -> Read:
    """Those samples."""
    read: list[LabelledSamples] = []
    try:
        for first_sample, rows in runs:
            read.append(samples.labelled(first_sample, rows).narrowed())
    except Exception as error:
        return read, f"{type(error).__name__}: {error}"
    return read, None


def request(runs: Sequence[Run], given_back: Sequence[int]) -> bytes:
    """What the loop asks of a process: to read those runs, and to take back segments of memory."""
    numbers = [len(given_back), *given_back, *(number for run in runs for number in run)]
    return struct.pack(f"<{len(numbers)}Q", *numbers)


def serve(descriptor: int) -> None:
    """What the process does: answer one request after the other, until the loop closes its end of the socket."""
    # Signals are the loop's affair, and reach the whole group. Where the loop is killed, this goes too, even stopped.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with socket.socket(fileno=descriptor) as connection, suppress(ConnectionError, EOFError):
        samples, writer = Receiver(connection).receive(), Writer(connection)
        connection.send(READY)
        longest = len(request([(0, 0)] * _MOST_JOBS, range(MOST_GIVEN_BACK)))
        while received := connection.recv(longest):
            count, *numbers = struct.unpack(f"<{len(received) // 8}Q", received)
            for segment in numbers[:count]:
                writer.give_back(segment)
            runs = list(zip(numbers[count::2], numbers[count + 1 :: 2], strict=True))
            writer.send(read_runs(samples, runs))
