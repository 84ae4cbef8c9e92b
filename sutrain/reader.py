"""What a process that reads ahead does.

The loop and the process are given the same plan and derive the same *stretches* from it, so that a request is a number.
A stretch are consecutive micro-batches up to the end of a block of the shards, and at least half as many rows: a block
is decoded by one process, and once. At first it is one update, so that the loop, which reads for itself until a process
is up, reads no more than it must.
"""

from __future__ import annotations

import contextlib
import ctypes
import pickle
import signal
import socket
import struct
import traceback
from collections.abc import Iterator
from typing import NamedTuple

from sutrain.batch_plan import BatchPlan
from sutrain.data import LabelledSamples, MixedSamples, Samples
from sutrain.shared_memory import Receiver, Writer

READY = b"ready"
"""Said once, when all is imported and opened."""
MOST_NUMBERS = 64
"""In one request: the stretch that is wanted, and segments of memory that the loop has done with."""
FIRST_UPDATES = 16
_PR_SET_PDEATHSIG = 1


class Job(NamedTuple):
    """One micro-batch."""

    first_sample: int
    rows: int
    row_tokens: int | None  # that they are cut to
    last: bool  # of its update


class Stretch:
    """Micro-batches that are read in a row and handed over together: every time a loop is woken costs."""

    def __init__(self, number: int):
        self.number = number
        self.jobs: list[Job] = []
        self.rows = self.last_update = 0

    def fill(self, samples: Samples | MixedSamples) -> Filled:
        """What could be read until an error."""
        read: list[LabelledSamples] = []
        try:
            for job in self.jobs:
                read.append(read_job(samples, job).narrowed())
        except Exception as error:  # raised again where the micro-batch is asked for
            error.add_note(f"in a process that reads ahead:\n{traceback.format_exc()}")
            return Filled(read, _that_travels(error))
        return Filled(read)


class Filled(NamedTuple):
    """The micro-batches of a stretch, and why not all of them."""

    read: list[LabelledSamples]
    error: Exception | None = None


def stretches(
    samples: Samples | MixedSamples, plan: BatchPlan, samples_consumed: int, updates: int
) -> Iterator[Stretch]:
    """This rank's micro-batches of the next `updates`, in order."""
    rows_per_epoch, block_rows = samples.rows_per_epoch, samples.manifest.block_rows
    position, made, last_block = samples_consumed, 0, -1
    stretch: Stretch | None = None
    for update in range(updates):
        ranges, row_tokens = plan.ranges(position), plan.tokens_at(position)
        for number, (first, count) in enumerate(ranges, 1):
            block = first % rows_per_epoch // block_rows
            if stretch is not None and (
                (block != last_block and 2 * stretch.rows >= block_rows)
                or (number == 1 and update < FIRST_UPDATES)
            ):
                yield stretch
                stretch, made = None, made + 1
            stretch, last_block = stretch or Stretch(made), block
            stretch.jobs.append(Job(first, count, row_tokens, number == len(ranges)))
            stretch.rows += count or 1  # see read_job
            stretch.last_update = update
        position += plan.sequences_at(position)
    if stretch is not None:
        yield stretch


def read_job(samples: Samples | MixedSamples, job: Job) -> LabelledSamples:
    """The rows of a micro-batch; where it has none, the one that stands in without weight."""
    return samples.labelled(job.first_sample, job.rows or 1)


def serve(descriptor: int) -> None:
    """What the process does: answer one request after the other, until the loop closes its end of the socket."""
    # Signals are the loop's affair, and reach the whole group. Where the loop is killed, this goes too, even stopped.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with socket.socket(fileno=descriptor) as connection, contextlib.suppress(ConnectionError, EOFError):
        samples, *position = Receiver(connection).receive()
        planned, writer = stretches(samples, *position), Writer(connection)
        connection.send(READY)
        while request := connection.recv(8 * MOST_NUMBERS):
            wanted, *done_with = (number for (number,) in struct.iter_unpack("<Q", request))
            for segment in done_with:
                writer.give_back(segment)
            writer.send(next(stretch for stretch in planned if stretch.number == wanted).fill(samples))


def _that_travels(error: Exception) -> Exception:
    """The error itself, if it can be made again from its pickle."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")
