"""What happens between pass 1 and pass 2: duplicates are found, shards are counted, and short runs are merged."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .books import merge_books
from .dedup import dedup_tasks, find_duplicates, finished_dedup
from .errors import DataPrepError
from .estimate import needed_groups
from .executor import Executor
from .files import free_bytes, size_or_none
from .fingerprint import digest_of
from .memory import records_bytes
from .merge import MergeTask, SpillSet, finished_merge, merge
from .places import is_remote
from .plan import Plan, frame_bytes
from .progress import RunProgress
from .records import outcomes
from .shards import SPLITS, token_dtype

# With fewer documents than this to a shard, a shard could come out empty.
_MIN_SHARD_DOCUMENTS = 64


def run_dedup(
    plan: Plan, scattered: list[dict[str, Any]], executor: Executor, progress: RunProgress
) -> list[dict[str, Any]]:
    """Find the records that are there more than once; returns the manifests, which correct those of pass 1."""
    config, work = plan.config, plan.work_path
    if config.deduplication.method == "none":
        return []
    tasks = dedup_tasks(
        scattered,
        work / "scatter",
        work / "dedup",
        plan.run_hash,
        plan.file_stops,
        config.resources.worker_memory_bytes,
    )
    with progress.stage("dedup", sum(result["hash_entries"] for result in scattered), len(tasks), "records"):
        return run_missing(
            tasks,
            finished_dedup,
            find_duplicates,
            executor,
            progress,
            # The correction: duplicates are written no more, but dropped.
            lambda result: progress.advance(result["entries"], outcomes(result["books"].values())),
        )


def count_shards(plan: Plan, scattered: list[dict[str, Any]], vocab_size: int) -> dict[str, int]:
    """Shards of each split, from the totals of pass 1 alone. Raises DataPrepError when no document was
    left.
    """
    counts = {}
    for split in SPLITS:
        documents = sum(result["splits"][split]["documents"] for result in scattered)
        tokens = sum(result["splits"][split]["tokens"] for result in scattered)
        item_bytes = token_dtype(vocab_size).itemsize if vocab_size else 1
        wanted = -(-tokens * item_bytes // plan.config.shards.target_bytes)
        counts[split] = min(max(1, wanted), max(1, documents // _MIN_SHARD_DOCUMENTS)) if documents else 0
    if not counts["train"] and counts["validation"]:
        raise DataPrepError(
            f"no document is left for training: all {documents:,} are for validation; lower shards.validation_share"
        )
    if not counts["train"]:
        books = merge_books(plan, scattered)
        reasons: Counter[str] = Counter()
        for book in books:
            reasons.update(book["dropped"])
            reasons.update(book["quarantined"])
        raise DataPrepError(
            f"no document is left for training ({reasons_of(reasons)}); see cleaning, text_field"
        )
    return counts


def reasons_of(lost: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in lost.most_common()) or "no records"


def run_merges(
    plan: Plan,
    tokenizer: dict[str, Any],
    scattered: list[dict[str, Any]],
    shard_counts: dict[str, int],
    codec: str,
    executor: Executor,
    progress: RunProgress,
) -> tuple[SpillSet, list[dict[str, Any]]]:
    """As many passes between as pass 2 needs to read enough at a time; returns what it reads from, and the
    manifests of the merges.
    """
    resources, folder, level = plan.config.resources, plan.work_path / "scatter", 0
    vocab_size, has_words = tokenizer["vocab_size"], plan.config.words.segmenter != "none"
    dtype = token_dtype(vocab_size).str if vocab_size else "|u1"
    kind = (dtype, has_words and vocab_size > 0, vocab_size > 0)
    spill_bytes = sum(result["written_bytes"] for result in scattered)
    numbers, runs = range(len(scattered)), sum(result["runs"] for result in scattered)
    results: list[dict[str, Any]] = []
    latest = scattered
    fan_in = max(2, int(resources.worker_memory_bytes * 0.7) // resources.min_read_bytes)
    while (
        groups := needed_groups(spill_bytes, runs, sum(shard_counts.values()), resources.min_read_bytes)
    ) < runs:
        groups = max(groups, -(-len(numbers) // fan_in))
        if groups >= len(numbers) and level:
            break  # as far as the memory of a worker goes
        level, groups = level + 1, min(groups, len(numbers))
        target, upstream = plan.work_path / f"merge-{level}", digest_of(latest)
        tasks = [
            MergeTask(
                number=number,
                spills=SpillSet(str(folder), [int(n) for n in group], *kind),
                folder=str(target),
                run_hash=plan.run_hash,
                upstream=upstream,
                memory_bytes=records_bytes(
                    resources.worker_memory_bytes, plan.config.cleaning.max_record_bytes
                ),
                frame_bytes=frame_bytes(plan, groups),
                codec=codec,
            )
            for number, group in enumerate(np.array_split(np.arange(len(numbers)), groups))
        ]
        with progress.stage("merge", spill_bytes, len(tasks)):
            latest = run_missing(
                tasks, finished_merge, merge, executor, progress, lambda r: progress.advance(r["read_bytes"])
            )
        results += latest
        folder, numbers, runs = target, range(groups), groups
    return SpillSet(str(folder), numbers, *kind), results


def missing_bytes(plan: Plan) -> str:
    """How much more room the rest of the run takes, as far as can be told."""
    near_output = not is_remote(plan.config.output_dir)
    # The work folder may lie in the output, whose other files are small where the shards go to a URL.
    folders = [plan.work_path, plan.config.output_path] if near_output else [plan.work_path]
    sizes = {path: size_or_none(path) or 0 for folder in folders for path in _files_below(folder)}
    used, needed = sum(sizes.values()), plan.spill_bytes + near_output * plan.output_bytes
    task = needed // max(1, len(plan.tasks))
    missing = max(needed - used, task) - free_bytes(plan.work_path)
    return f"about {max(missing, task):,} bytes more are needed"


def _files_below(folder: Path) -> Iterator[Path]:
    """Files, while tasks that are still at work remove and rename some."""
    for name, _, files in os.walk(folder):
        yield from (Path(name, file) for file in files)


def run_missing(
    tasks: Sequence[Any],
    finished: Callable[[Any], dict[str, Any] | None],
    function: Callable[[Any], dict[str, Any]],
    executor: Executor,
    progress: RunProgress,
    account: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Results of all tasks, running those that `finished` finds no result of."""
    results = []
    done = [finished(task) for task in tasks]
    for result in done:
        if result is not None:
            result["taken_over"] = True  # from an earlier run
            results.append(result)
            account(result)
    progress.took_over()
    missing = [task for task, result in zip(tasks, done, strict=True) if result is None]
    for result in executor.run(function, missing, finished):
        results.append(result)
        account(result)
    return results
