"""Which samples an update reads, and which of them a rank and a micro-batch: arithmetic on the position of the run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class BatchPlan:
    """How global batches are spread: rank r, micro-batch m reads a contiguous range of the batch's samples.

    `size_warmup` and `length_warmup` are {samples consumed: rows an update, tokens a row} as sorted pairs, valid from
    that position on; after the last comes the full size. A row is cut into shorter ones, so that position, documents
    and masks are the same with and without warm-up.
    """

    global_sequences: int
    micro_sequences: int
    world_size: int
    rank: int
    size_warmup: tuple[tuple[int, int], ...] = ()
    length_warmup: tuple[tuple[int, int], ...] = ()

    @property
    def accumulation(self) -> int:
        """Micro-batches each rank computes for one update of full size."""
        return self._passes(self.global_sequences)

    def _passes(self, sequences: int) -> int:
        return -(-sequences // (self.micro_sequences * self.world_size))

    def sequences_at(self, samples_consumed: int) -> int:
        """Rows of the update that starts at `samples_consumed`, over all ranks."""
        return _stage_at(self.size_warmup, samples_consumed) or self.global_sequences

    def samples_after(self, updates: int) -> int:
        """Rows that the first `updates` updates of a run read, over all ranks."""
        samples, stages = 0, self.size_warmup or ((0, 0),)
        for number, (_, size) in enumerate(stages):
            sequences, made = size or self.global_sequences, updates
            if number + 1 < len(stages):  # the last one has no end
                to_go = stages[number + 1][0] - samples
                made = min(updates, max(0, -(-to_go // sequences)))
            samples, updates = samples + made * sequences, updates - made
        return samples

    def tokens_at(self, samples_consumed: int) -> int | None:
        """Tokens that rows are cut to in that update; None: whole rows."""
        return _stage_at(self.length_warmup, samples_consumed)

    def ranges(self, samples_consumed: int) -> list[tuple[int, int]]:
        """(first sample, count) of this rank's micro-batches of the update that starts at `samples_consumed`.

        As many on every rank, since they compute in step. Rows that do not divide are spread evenly, over ranks and
        over micro-batches, so that their sizes differ by one; a count of 0 is a micro-batch of a row without weight.
        """
        shares = self.shares(self.sequences_at(samples_consumed))
        return [(samples_consumed + start, count) for start, count in shares]

    def shares(self, sequences: int) -> tuple[tuple[int, int], ...]:
        """(first, count) of this rank's micro-batches inside an update of so many rows, see `ranges`."""
        return _shares(sequences, self.world_size, self.rank, self._passes(sequences))


@lru_cache(maxsize=256)  # the same for update after update
def _shares(sequences: int, world_size: int, rank: int, passes: int) -> tuple[tuple[int, int], ...]:
    """(first, count) of a rank's micro-batches inside an update."""
    before, mine = _share(sequences, world_size, rank)
    return tuple(
        (before + start, count) for start, count in (_share(mine, passes, number) for number in range(passes))
    )


def _share(rows: int, parts: int, number: int) -> tuple[int, int]:
    """(first, count) of one of `parts` parts of `rows` that differ by one at most, the larger ones first."""
    size, larger = divmod(rows, parts)
    return number * size + min(number, larger), size + (number < larger)


def _stage_at(stages: tuple[tuple[int, int], ...], samples_consumed: int) -> int | None:
    """The value of the last stage that has begun; the final one, 0, stands for the full value."""
    if not stages:
        return None
    values = [value for start, value in stages if start <= samples_consumed]
    return values[-1] or None if values else None
