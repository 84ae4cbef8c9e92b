"""Reading ahead: other processes read, verify and mask the next micro-batches while a step is computed.

Processes, because threads would hold Python's lock while the loop hands its kernels to the device. They need a moment
to come up; until then, and where one is killed or fails, the loop reads for itself, and where it would wait for them it
reads what is to come behind. Batches come out in order and are a function of their position, so neither the number of
processes nor their fate changes anything.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path

from sutrain.batch_plan import BatchPlan
from sutrain.data import Batch, LabelledSamples, MixedSamples, Samples
from sutrain.reader import MOST_GIVEN_BACK, READY, Job, Run, Stretch, read_runs, request, stretches
from sutrain.shared_memory import Receiver, Writer

PROGRAM = "from sutrain.reader import serve; serve({descriptor})"
_ROOT = str(Path(__file__).resolve().parents[1])
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # Memory that was freed is kept: a page fault for every 4 KiB of every block would cost a third of reading it.
    # Huge pages, where the system has them, make what goes through it a tenth faster.
    "GLIBC_TUNABLES": ":".join(
        [
            *filter(None, [os.environ.get("GLIBC_TUNABLES")]),
            f"glibc.malloc.mmap_threshold={1 << 28}:glibc.malloc.trim_threshold={1 << 28}:glibc.malloc.hugetlb=1",
        ]
    ),
}
_UP_SECONDS = 0.0
"""How long a loop waits for a process that is not up yet, before it reads for itself."""
_END_SECONDS = 1.0
_MOST_AHEAD = 128
"""Stretches asked for at once: a socket holds some 200 answers; with both ends full both sides would wait for ever."""
_MOST_OWN = 8
"""Stretches that the loop has read in the place of waiting."""


class Reader:
    """One process that reads ahead, as the loop sees it."""

    def __init__(self, samples: Samples | MixedSamples):
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
        self.ready = self.gone = self._failed = False
        self.waiting = 0
        """Stretches that were asked for and not fetched."""
        with suppress(ConnectionError):  # if it is gone again, `ask` finds out
            Writer(self._connection).send(samples)

    def ask(self, runs: list[Run]) -> bool:
        """Ask for those samples; False where the process is not up yet, or no more."""
        if self.gone or not (self.ready or self._poll.poll(1000 * _UP_SECONDS)):
            return False
        try:
            if not self.ready:
                self.ready = self._connection.recv(len(READY)) == READY
                self.gone = not self.ready
            if self.ready:
                done_with = self._receiver.done_with
                given_back = [done_with.popleft() for _ in range(min(len(done_with), MOST_GIVEN_BACK))]
                try:
                    self._connection.send(request(runs, given_back), socket.MSG_DONTWAIT)
                except BlockingIOError:  # so many requests lie there already
                    done_with.extend(given_back)
                    return False
                self.waiting += 1
        except ConnectionError:
            self.gone = True
        return not self.gone

    @property
    def has_answered(self) -> bool:
        """Whether `answer` would not wait."""
        return self.gone or bool(self._poll.poll(0))

    def answer(self) -> list[LabelledSamples]:
        """What could be read of what was asked for first."""
        self.waiting -= 1
        try:
            read, error = ([], None) if self.gone else self._receiver.receive()
        except (EOFError, ConnectionError):
            self.gone, read, error = True, [], None
        except OSError as refused:  # what it handed over is lost; another process hands over anew
            error = f"its rank cannot take what it read: {os.strerror(refused.errno or 0)}"
            self.gone, read = True, []
        if error is not None and not self._failed:
            self._failed = True
            told = f"data: process {self.process.pid}, which reads ahead, failed ({error}); the loop tries itself"
            print(told, file=sys.stderr, flush=True)
        return read

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

    def __init__(self, count: int, samples: Samples | MixedSamples):
        self._samples = samples
        self._readers: list[Reader] = []
        for _ in range(count):
            self._begin()

    @property
    def waiting(self) -> int:
        """Stretches that were asked for and not fetched."""
        return sum(reader.waiting for reader in self._readers)

    def ask(self, runs: list[Run]) -> Reader | None:
        """Which process reads it, the one with the least to do; None where the loop must."""
        for reader in [reader for reader in self._readers if reader.gone]:
            self._replace(reader)
        self._readers.sort(key=lambda reader: reader.waiting)
        return next((reader for reader in self._readers if reader.ask(runs)), None)

    def close(self) -> None:
        for reader in self._readers:
            reader.hang_up()
        for reader in self._readers:
            reader.wait()

    def _begin(self) -> None:
        try:
            self._readers.append(Reader(self._samples))
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
    planned, readers = stretches(samples, plan, samples_consumed, updates), Readers(workers, samples)
    ahead: deque[tuple[Stretch, Reader | list[LabelledSamples]]] = deque()
    done = 0

    def read_here(stretch: Stretch) -> None:
        ahead.append((stretch, read_runs(samples, stretch.runs(samples.manifest.row_tokens))[0]))

    def asked_for() -> Iterator[Stretch]:
        """What the processes shall read now."""
        while len(ahead) < _MOST_AHEAD and (
            readers.waiting <= 2 * workers or ahead[-1][0].last_update < done + depth
        ):
            if (stretch := next(planned, None)) is None:
                return
            yield stretch

    def filled() -> Iterator[tuple[Stretch, list[LabelledSamples]]]:
        """Every stretch with what could be read of it."""
        while True:
            for stretch in asked_for():
                if (reader := readers.ask(stretch.runs(samples.manifest.row_tokens))) is None:
                    read_here(stretch)
                    break
                ahead.append((stretch, reader))
            if not ahead:
                return
            stretch, read = ahead[0]
            if isinstance(read, Reader):
                own = sum(isinstance(other, list) for _, other in ahead)
                if own < _MOST_OWN and not read.has_answered and (another := next(planned, None)):
                    read_here(another)  # in the place of waiting
                    continue
                read = read.answer()
            ahead.popleft()
            yield stretch, read

    update: list[Batch] = []
    try:
        for stretch, read in filled():
            for job, labelled in _micro_batches(samples, stretch, read):
                update.append(_batch(labelled, job))
                if job.last:
                    yield update
                    update, done = [], done + 1
    finally:
        with suppress(Exception):  # what failed first is what is told
            readers.close()


def _micro_batches(
    samples: Samples | MixedSamples, stretch: Stretch, read: list[LabelledSamples]
) -> Iterator[tuple[Job, LabelledSamples]]:
    """Every micro-batch of a stretch with its rows. What could not be read is read again, and fails where it is due."""
    at = 0
    for job in stretch.jobs:
        while at < len(read) and not read[at].hold(*job.samples):
            at += 1
        yield job, read[at].part(*job.samples) if at < len(read) else samples.labelled(*job.samples)


def _batch(labelled: LabelledSamples, job: Job) -> Batch:
    """What the plan says of a micro-batch: without weight where it has no rows, in shorter rows if it is to be cut."""
    batch = labelled.batch()
    batch = batch if job.rows else batch.without_weight()
    return batch.cut(job.row_tokens) if job.row_tokens else batch
