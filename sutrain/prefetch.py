"""Reading ahead: other processes read, verify and mask the next micro-batches while a step is computed.

Processes, because threads would hold Python's lock while the loop hands its kernels to the device. They need a moment
to come up; until then, and where one is killed, the loop reads for itself. Batches come out in order and are a function
of their position, so neither the number of processes nor their fate changes anything.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from sutrain.batch_plan import BatchPlan
from sutrain.data import Batch, LabelledSamples, MixedSamples, Samples
from sutrain.reader import MOST_NUMBERS, READY, Filled, Job, Stretch, read_job, stretches
from sutrain.shared_memory import Receiver, Writer

PROGRAM = "from sutrain.reader import serve; serve({descriptor})"
_ROOT = str(Path(__file__).resolve().parents[1])
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # Memory that was freed is kept: a page fault for every 4 KiB of every block would cost a third of reading it.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 28),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 28),
}
_UP_SECONDS = 0.0
"""How long a loop waits for a process that is not up yet, before it reads for itself."""
_END_SECONDS = 1.0
_MOST_AHEAD = 128
"""Stretches asked for at once: a socket holds some 200 messages; with both ends full both sides would wait for ever."""


class Reader:
    """One process that reads ahead, as the loop sees it."""

    def __init__(self, task: tuple[Any, ...]):
        path = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", PROGRAM.format(descriptor=theirs.fileno())],
                env=os.environ | _ENVIRONMENT | {"PYTHONPATH": path}, pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        self._poll = select.poll()
        self._poll.register(self._connection, select.POLLIN)
        self._receiver = Receiver(self._connection)
        self.ready = self.gone = False
        self.waiting = 0
        """Stretches that were asked for and not fetched."""
        with suppress(ConnectionError):  # if it is gone again, `ask` finds out
            Writer(self._connection).send(task)

    def ask(self, stretch: Stretch) -> bool:
        """Ask for a stretch; False where the process is not up yet, or no more."""
        if self.gone or not (self.ready or self._poll.poll(1000 * _UP_SECONDS)):
            return False
        try:
            if not self.ready:
                self.ready = self._connection.recv(len(READY)) == READY
                self.gone = not self.ready
            if self.ready:
                self._connection.send(self._request(stretch))
                self.waiting += 1
        except ConnectionError:
            self.gone = True
        return not self.gone

    def _request(self, stretch: Stretch) -> bytes:
        numbers, done_with = [stretch.number], self._receiver.done_with
        while done_with and len(numbers) < MOST_NUMBERS:
            numbers.append(done_with.popleft())
        return struct.pack(f"<{len(numbers)}Q", *numbers)

    def answer(self) -> Filled | None:
        """The stretch that was asked for first; None where the process is gone."""
        self.waiting -= 1
        try:
            return None if self.gone else self._receiver.receive()
        except (EOFError, ConnectionError):
            self.gone = True
            return None

    def hang_up(self) -> None:
        """Let the process end."""
        if not self.ready:  # it would see that only when it is up
            self.process.kill()
        self._connection.close()

    def wait(self) -> None:
        """Until the process has ended, by force if it takes long."""
        try:
            self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:  # in the middle of a file that is far away
            self.process.kill()
            self.process.wait()


class Readers:
    """The processes of one loop."""

    def __init__(self, count: int, task: tuple[Any, ...]):
        self._task = task
        self._readers: list[Reader] = []
        for _ in range(count):
            self._begin()

    def ask(self, stretch: Stretch) -> Reader | None:
        """Which process reads it, the one with the least to do; None where the loop must."""
        for reader in [reader for reader in self._readers if reader.gone]:
            self._replace(reader)
        self._readers.sort(key=lambda reader: reader.waiting)
        return next((reader for reader in self._readers if reader.ask(stretch)), None)

    def close(self) -> None:
        for reader in self._readers:
            reader.hang_up()
        for reader in self._readers:
            reader.wait()

    def _begin(self) -> None:
        try:
            self._readers.append(Reader(self._task))
        except OSError as error:  # too many processes, or no memory for one
            print(f"data: no further process to read ahead ({error})", file=sys.stderr, flush=True)

    def _replace(self, reader: Reader) -> None:
        reader.hang_up()
        reader.wait()
        self._readers.remove(reader)
        status = reader.process.returncode
        how = f"exit status {status}" if status >= 0 else f"signal {-status}, most often for want of memory"
        if reader.ready:
            self._begin()
            what = "another one takes its place"
        else:  # the next one would not come up either
            what = f"it never came up; {len(self._readers)} are left, and what they do not read the loop reads itself"
        told = f"data: process {reader.process.pid}, which read ahead, is gone ({how}); {what}"
        print(told, file=sys.stderr, flush=True)


def prefetch(
    samples: Samples | MixedSamples,
    plan: BatchPlan,
    samples_consumed: int,
    updates: int,
    depth: int = 2,
    workers: int = 1,
) -> Generator[list[Batch], None, None]:
    """Yield this rank's micro-batches for each of the next `updates`, read by `workers` processes at least `depth`
    updates (of `_MOST_AHEAD` stretches at most) and two stretches a process ahead; with 0 everything is read when it is
    asked for.

    Only what is yielded counts as read: position is advanced by the caller after the optimizer step.
    """
    task = (samples, plan, samples_consumed, updates)
    planned, readers = stretches(*task), Readers(workers, task)
    ahead: deque[tuple[Stretch, Reader | None]] = deque()
    done = 0

    def filled() -> Iterator[tuple[Stretch, Filled | None]]:
        """Every stretch with what a process read of it, or None."""
        while True:
            while len(ahead) <= 2 * workers or (
                len(ahead) < _MOST_AHEAD and ahead[-1][0].last_update < done + depth
            ):
                if (stretch := next(planned, None)) is None:
                    break
                ahead.append((stretch, readers.ask(stretch)))
                if ahead[-1][1] is None:  # the loop reads it, and has no time for more
                    break
            if not ahead:
                return
            stretch, reader = ahead.popleft()
            yield stretch, None if reader is None else reader.answer()

    update: list[Batch] = []
    try:
        for stretch, given in filled():
            for number, job in enumerate(stretch.jobs):
                if given is None:
                    labelled = read_job(samples, job)
                elif number < len(given.read):
                    labelled = given.read[number]
                else:
                    assert given.error is not None
                    raise given.error
                update.append(_batch(labelled, job))
                if job.last:
                    yield update
                    update, done = [], done + 1
    finally:
        with suppress(Exception):  # what failed first is what is told
            readers.close()


def _batch(labelled: LabelledSamples, job: Job) -> Batch:
    """What the plan says of a micro-batch: without weight where it has no rows, in shorter rows if it is to be cut."""
    batch = labelled.batch()
    batch = batch if job.rows else batch.without_weight()
    return batch.cut(job.row_tokens) if job.row_tokens else batch
