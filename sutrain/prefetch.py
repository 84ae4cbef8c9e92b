"""Reading ahead: threads read, verify and mask the next micro-batches while a step is computed.

A thread takes a *stretch* at a time, consecutive micro-batches that lie in one block of the shards or have half as many
rows, so that a block is decoded by one thread, and once. Batches come out in order, so the number of threads changes
nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import NamedTuple

from sutrain.data import Batch, BatchPlan, MixedSamples, Samples, micro_batch


class Stretch:
    """Micro-batches that one thread reads in a row and hands over together: every time a loop is woken costs."""

    def __init__(self, block: int):
        self.block = block
        # (first sample, rows, tokens that rows are cut to, whether it is the last of its update)
        self.jobs: list[tuple[int, int, int | None, bool]] = []
        self.rows = self.last_update = 0

    def read(self, samples: Samples | MixedSamples) -> Iterator[tuple[Batch, bool]]:
        """Each micro-batch with whether it is the last of its update."""
        for first, count, row_tokens, last in self.jobs:
            yield micro_batch(samples, first, count, row_tokens), last

    def fill(self, samples: Samples | MixedSamples, stopped: Event) -> Filled:
        """What could be read until `stopped` or an error."""
        filled = Filled([])
        try:
            for item in self.read(samples):
                filled.batches.append(item)
                if stopped.is_set():
                    break
        except Exception as error:  # raised again where the micro-batch is asked for
            filled = filled._replace(error=error)
        return filled


class Filled(NamedTuple):
    """A stretch that was read, and why not to its end."""

    batches: list[tuple[Batch, bool]]
    error: Exception | None = None


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
    ahead: deque[tuple[Stretch, Future[Filled]]] = deque()
    done = 0

    def in_order(pool: ThreadPoolExecutor) -> Iterator[tuple[Batch, bool]]:
        while True:
            while len(ahead) <= 2 * workers or ahead[-1][0].last_update < done + depth:
                if (stretch := next(planned, None)) is None:
                    break
                ahead.append((stretch, pool.submit(stretch.fill, samples, stopped)))
            if not ahead:
                return
            filled = ahead.popleft()[1].result()
            yield from filled.batches
            if filled.error is not None:
                raise filled.error

    def at_once() -> Iterator[tuple[Batch, bool]]:
        for stretch in planned:
            yield from stretch.read(samples)

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
