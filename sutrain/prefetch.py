"""Reading ahead: threads read, verify and mask the next micro-batches while a step is computed.

A thread takes a *stretch* at a time, consecutive micro-batches that lie in one block of the shards or have half as many
rows, so that a block is decoded by one thread, and once. Batches come out in order, so the number of threads changes
nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event

from sutrain.data import Batch, BatchPlan, MixedSamples, Samples, micro_batch


class Stretch:
    """Micro-batches that one thread reads in a row; `ready` has what is done, an exception where one failed."""

    def __init__(self, block: int):
        self.block = block
        # (first sample, rows, tokens that rows are cut to, whether it is the last of its update)
        self.jobs: list[tuple[int, int, int | None, bool]] = []
        self.rows = self.last_update = 0
        self.ready: SimpleQueue[Batch | BaseException] = SimpleQueue()

    def fill(self, samples: Samples | MixedSamples, stopped: Event) -> None:
        """Read what was asked for, until `stopped`."""
        for first, count, row_tokens, _ in self.jobs:
            if stopped.is_set():
                return
            try:
                self.ready.put(micro_batch(samples, first, count, row_tokens))
            except BaseException as error:  # raised again where the batch is asked for
                self.ready.put(error)
                return

    def batches(self) -> Iterator[tuple[Batch, bool]]:
        """Each with whether it is the last of its update."""
        for *_, last in self.jobs:
            item = self.ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item, last


def stretches(
    samples: Samples | MixedSamples, plan: BatchPlan, samples_consumed: int, updates: int
) -> Iterator[Stretch]:
    """This rank's micro-batches of the next `updates`, in order."""
    rows_per_epoch, block_rows = samples.rows_per_epoch, samples.manifest.block_rows
    position = samples_consumed
    stretch: Stretch | None = None
    for update in range(updates):
        ranges, row_tokens = plan.ranges(position), plan.tokens_at(position)
        for number, (first, count) in enumerate(ranges, 1):
            block = first % rows_per_epoch // block_rows
            if stretch is not None and (
                stretch.rows >= block_rows or (block != stretch.block and 2 * stretch.rows >= block_rows)
            ):
                yield stretch
                stretch = None
            stretch = stretch or Stretch(block)
            stretch.jobs.append((first, count, row_tokens, number == len(ranges)))
            stretch.rows += count
            stretch.last_update = update
        position += plan.sequences_at(position)
    if stretch is not None:
        yield stretch


def prefetch(
    samples: Samples | MixedSamples,
    plan: BatchPlan,
    samples_consumed: int,
    updates: int,
    depth: int = 2,
    workers: int = 1,
) -> Generator[list[Batch], None, None]:
    """Yield this rank's micro-batches for each of the next `updates`, read by `workers` threads at least `depth`
    updates and two stretches a thread ahead; with 0 everything is read when it is asked for.

    Only what is yielded counts as read: position is advanced by the caller after the optimizer step.
    """
    planned, stopped = stretches(samples, plan, samples_consumed, updates), Event()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="batch-reader") if workers else None
    ahead: deque[Stretch] = deque()
    done = 0

    def in_order(pool: ThreadPoolExecutor) -> Iterator[tuple[Batch, bool]]:
        while True:
            while len(ahead) <= 2 * workers or ahead[-1].last_update < done + depth:
                if (stretch := next(planned, None)) is None:
                    break
                ahead.append(stretch)
                pool.submit(stretch.fill, samples, stopped)
            if not ahead:
                return
            yield from ahead.popleft().batches()

    def at_once() -> Iterator[tuple[Batch, bool]]:
        for stretch in planned:
            for first, count, row_tokens, last in stretch.jobs:
                yield micro_batch(samples, first, count, row_tokens), last

    update: list[Batch] = []
    try:
        for batch, last in in_order(pool) if pool else at_once():
            update.append(batch)
            if last:
                yield update
                update, done = [], done + 1
    finally:
        stopped.set()
        if pool:
            pool.shutdown(wait=True, cancel_futures=True)
