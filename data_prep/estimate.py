"""What a run will take: time, disk, memory and bytes moved, from a probe of the corpus and of the disk.

The probe reads the first records of a few files spread over the input, cleans, encodes and compresses them as pass 1
would, and writes and removes a file where the intermediate files will lie. After the run the same figures stand
beside the measured ones in run.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import zstandard

from .clean import make_cleaner
from .errors import DataPrepError
from .executor import usable_cores
from .files import write_speed
from .measure import memory_bytes
from .memory import records_bytes
from .plan import PROGRAM_BYTES, Plan, choose_codec
from .records import Segment, clean_texts, new_book
from .shards import token_dtype
from .sources import read_batches
from .tokenizer import AnyTokenizer, training_bytes

_PROBED_FILES, _PROBED_BYTES = 8, 256 * 1024
_UNTRAINED_BYTES_PER_SECOND, _UNTRAINED_TOKEN_SHARE = (
    25e6,
    0.55,
)  # of a unigram model that is still to be trained
_LZ4_RATIO = 0.95  # of ids; text shrinks more
_START_SECONDS = 3.0
_FEW_READS = 2048
_ORIGIN_BYTES, _PIECE_BYTES = 18, 14  # of a record in a spill file and of a piece in a shard, compressed
# What writing frames, putting in order, packing and hashing cost beside the probe, in seconds a byte of text.
_MOVING_SECONDS_PER_BYTE = 4e-9
NOTHING_LEFT = "warning: cleaning leaves nothing of the records that were probed; see cleaning and text_field"
_LEAST_WORKER_BYTES = 120 * 1024**2


@dataclass(frozen=True)
class Estimate:
    """Bytes, seconds and counts of a run that has not begun; moved_bytes counts every read and write once."""

    text_bytes: int
    kept_share: float
    payload_bytes: int  # ids or lines, before compression
    codec: str
    spill_bytes: int
    output_bytes: int
    passes: int
    run_bytes: int  # of one shard in one sorted run: the size of a read in pass 2
    shards: int
    moved_bytes: int
    disk_bytes_per_second: float
    clean_seconds: float  # core seconds
    encode_seconds: float
    compress_seconds: float
    workers: int
    idle_worker_bytes: int
    worker_bytes: int
    peak_disk_bytes: int
    open_files: int
    seconds: float
    floor_seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def estimate(plan: Plan, tokenizer: AnyTokenizer | None, workers: int | None = None) -> Estimate:
    """Probe the corpus and the disk. `tokenizer` is None where it is still to be trained, or text is moved."""
    config = plan.config
    workers = workers or config.resources.workers or usable_cores()
    text = config.shards.content == "text"
    probe = _probe(plan, tokenizer, text)
    row_bytes = config.shards.row_tokens * 2
    disk = write_speed(config.work_base)
    codec = choose_codec(plan, disk)
    kept = probe["kept_bytes"] / max(1, probe["bytes"])
    payload = int(plan.text_bytes * probe["payload_bytes"] / max(1, probe["bytes"]))
    ratios = {"none": 1.0, "lz4": _LZ4_RATIO, "zstd": probe["fast_ratio"]}
    documents = plan.text_bytes * probe["documents"] / max(1, probe["bytes"])
    spill = int(payload * ratios[codec] + documents * (12 if text else _ORIGIN_BYTES))
    output = int(payload * (probe["final_ratio"] if not text or config.shards.compress_text else 1))
    output += 0 if text else int((documents + payload / row_bytes) * _PIECE_BYTES)
    shards = max(1, -(-payload // config.shards.target_bytes))
    runs = max(
        len(plan.tasks),
        -(-payload // records_bytes(config.resources.worker_memory_bytes, config.cleaning.max_record_bytes)),
    )
    passes = 2 + (needed_groups(spill, runs, shards, config.resources.min_read_bytes) < runs)
    moved = plan.input_bytes + 2 * spill * (passes - 1) + output
    compress = (probe["fast_seconds"] if codec == "zstd" else 0.0) + probe["final_seconds"]
    scale = plan.text_bytes / max(1, probe["bytes"])
    core_seconds = scale * (probe["clean_seconds"] + probe["encode_seconds"] + compress)
    core_seconds += plan.text_bytes * _MOVING_SECONDS_PER_BYTE * (passes - 1)
    disk_seconds = moved / disk if disk == disk else 0.0
    idle = memory_bytes("VmRSS")
    return Estimate(
        text_bytes=plan.text_bytes,
        kept_share=kept,
        payload_bytes=payload,
        codec=codec,
        spill_bytes=spill,
        output_bytes=output,
        passes=passes,
        run_bytes=spill // max(1, runs * shards),
        shards=shards,
        moved_bytes=moved,
        disk_bytes_per_second=disk,
        clean_seconds=scale * probe["clean_seconds"],
        encode_seconds=scale * probe["encode_seconds"],
        compress_seconds=scale * compress,
        workers=workers,
        idle_worker_bytes=idle,
        worker_bytes=idle + config.resources.worker_memory_bytes,
        peak_disk_bytes=spill * (passes - 1) + output,
        open_files=3 * workers,
        seconds=max(core_seconds / workers, disk_seconds) + _START_SECONDS,
        floor_seconds=max(scale * probe["encode_seconds"] / workers, disk_seconds),
    )


def needed_groups(spill_bytes: int, runs: int, shards: int, min_read_bytes: int) -> int:
    """How many sorted runs pass 2 may read from, at most, so that each shard is at least `min_read_bytes` in
    each of them; `runs` where there are few enough already, or so few reads that their size does not matter.
    """
    if runs * shards <= _FEW_READS:
        return runs
    return min(runs, max(1, spill_bytes // (shards * min_read_bytes)))


def refuse_too_little_memory(
    plan: Plan, workers: int, trains: bool, machine_bytes: int | None = None
) -> None:
    """Raises DataPrepError when resources.memory_bytes, or a machine that has less, does not suffice for the workers,
    or for the one that trains a tokenizer.
    """
    config, total = plan.config, plan.config.resources.memory_bytes
    if total is None:
        return
    given, problems = f"{total:,} bytes", []
    if machine_bytes is not None and machine_bytes < total:
        given, total = f"{given}, of which this machine has {machine_bytes:,},", machine_bytes
    idle, records = memory_bytes("VmRSS"), config.resources.worker_memory_bytes
    least, needed = workers * (idle + _LEAST_WORKER_BYTES), workers * (idle + records)
    if total < max(least, needed):
        problems.append(
            f"resources.memory_bytes: {given} for {workers} workers, but each takes {idle:,} when idle and "
            f"resources.worker_memory_bytes={records:,} for records; {needed:,} are needed (the least is {least:,}): "
            "take fewer workers, a smaller worker_memory_bytes, or give more"
        )
    needed = PROGRAM_BYTES + training_bytes(config.tokenizer.train, plan.least_sample_bytes)
    if trains and total < needed:
        problems.append(
            f"resources.memory_bytes: {given} but training the tokenizer takes about {needed:,}: take a smaller "
            "tokenizer.train.sample_bytes, or give more"
        )
    if problems:
        raise DataPrepError("\n".join(problems))


def _probe(plan: Plan, tokenizer: AnyTokenizer | None, text: bool) -> dict[str, float]:
    """Bytes and seconds of the first records of some files, through everything that pass 1 does with them."""
    found = dict.fromkeys(("bytes", "documents", "kept_bytes", "clean_seconds", "encode_seconds"), 0.0)
    clean = make_cleaner(plan.config.cleaning)
    payloads: list[bytes] = []
    files = [number for number, file in enumerate(plan.files) if file.size_bytes]
    chosen = files[:: max(1, len(files) // _PROBED_FILES)][:_PROBED_FILES]
    names = [corpus.name for corpus in plan.config.corpora]
    for number in chosen:
        file = plan.files[number]
        segment = Segment(number, file, names[file.corpus], 0, 1)
        for batch in read_batches(file, 0, 1, plan.config.cleaning.max_record_bytes):
            sizes = np.cumsum([len(line) + 1 for line in batch.lines])
            count = max(1, int(np.searchsorted(sizes, _PROBED_BYTES)))
            found["bytes"] += float(sizes[min(count, len(sizes)) - 1])
            texts, seconds = _timed(
                clean_texts, segment, batch, np.arange(min(count, len(sizes))), clean, new_book()
            )
            found["clean_seconds"] += seconds
            found["documents"] += len(texts[0])
            found["kept_bytes"] += sum(map(len, texts[0]))
            if text:
                payloads.append(b"\n".join(texts[0]))
            elif tokenizer is not None and texts[0]:
                ids, seconds = _timed(tokenizer.ids, texts[0])
                found["encode_seconds"] += seconds
                payloads.append(np.concatenate(ids).astype(token_dtype(tokenizer.vocab_size)).tobytes())
            break
    payload = b"".join(payloads)
    if not payload:  # nothing to measure: a tokenizer that is still to be trained
        found["encode_seconds"] = found["kept_bytes"] / _UNTRAINED_BYTES_PER_SECOND
        return found | {
            "payload_bytes": found["kept_bytes"] * _UNTRAINED_TOKEN_SHARE,
            "fast_ratio": 0.65,
            "final_ratio": 0.5,
            "fast_seconds": found["kept_bytes"] * 1.5e-9,
            "final_seconds": found["kept_bytes"] * 3e-9,
        }
    fast, fast_seconds = _timed(zstandard.ZstdCompressor(level=1).compress, payload)
    final, final_seconds = _timed(
        zstandard.ZstdCompressor(level=plan.config.shards.zstd_level).compress, payload
    )
    return found | {
        "payload_bytes": float(len(payload)),
        "fast_ratio": len(fast) / len(payload),
        "final_ratio": len(final) / len(payload),
        "fast_seconds": fast_seconds,
        "final_seconds": final_seconds,
    }


def _timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    started = time.process_time()
    return function(*arguments), time.process_time() - started
