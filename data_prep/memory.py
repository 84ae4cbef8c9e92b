"""How the memory of a worker is shared out: what a batch takes while it is worked on, and what is left for records."""

from __future__ import annotations

_BATCH_BYTES, _RECORD_COPIES = 112 * 1024**2, 8


def least_worker_bytes(max_record_bytes: int) -> int:
    """What it takes to read, clean, encode, sort, pack and compress a batch (measured), and the largest record (as
    bytes, as text, its ids and its words).
    """
    return _BATCH_BYTES + _RECORD_COPIES * max_record_bytes


def records_bytes(worker_memory_bytes: int, max_record_bytes: int) -> int:
    """What a worker may fill with records: its memory without that."""
    return max(worker_memory_bytes - least_worker_bytes(max_record_bytes), worker_memory_bytes // 8)
