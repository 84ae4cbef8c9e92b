"""The run from plan to manifest: sample, train the tokenizer, scatter (pass 1), gather (pass 2), close the
books.

Every stage skips what an earlier run of the same plan finished, so a killed run is resumed by starting it
again.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .account import account, compared
from .books import close_books, describe_run, merge_books, write_quarantine
from .config import PrepareConfig
from .dedup import dedup_tasks, find_duplicates, finished_dedup
from .errors import DataPrepError, DiskFullError
from .estimate import estimate, needed_groups, refuse_too_little_memory
from .executor import Executor, RayExecutor, make_executor
from .files import disk_errors, free_bytes, read_json, write_bytes, write_json
from .gather import GatherTask, finished_gather, gather
from .lease import owned
from .merge import MergeTask, SpillSet, finished_merge, merge
from .owned import adopt_plan, finished, remove_leftovers, remove_work
from .plan import Plan, frame_bytes, make_plan
from .progress import RunProgress
from .quarantine import check_losses
from .sample import SampleTask, TrainTask, collect_sample, finished_sample, sample_share, train_tokenizer
from .scatter import ScatterTask, finished_scatter, scatter
from .shards import SPECIAL_IDS, SPLITS, Manifest, token_dtype
from .storage import check_storage
from .text import leaves_text_alone
from .tokenizer import Tokenizer, load_tokenizer, read_model

# With fewer documents than this to a shard, a shard could come out empty.
_MIN_SHARD_DOCUMENTS = 64


def run(
    config: PrepareConfig, executor_name: str, fresh: bool, progress: RunProgress | None = None
) -> Manifest:
    """Prepare the data of a configuration; returns the manifest, at once when the output is already complete.

    Raises DataPrepError for input, settings and disks that a user can mend, AuditError when the books do
    not balance.
    """
    plan = make_plan(config)
    output = config.output_path
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    progress = progress or RunProgress(output, config.resources.log_seconds)
    if plan.ignored:
        progress.say(f"{len(plan.ignored)} file(s) in the input folders are not taken; `plan` lists them")
    with owned(output, config.resources.lease_seconds, progress.say) as fence:
        plan = adopt_plan(plan, fresh)
        if (output / "manifest.json").exists():
            manifest = finished(config)
            remove_work(plan)
            progress.say(f"{output} is complete and neither the configuration nor the input has changed")
            return manifest
        remove_leftovers(output)
        with disk_errors(plan.work_path):
            plan.work_path.mkdir(parents=True, exist_ok=True)
        warn_of_a_small_disk(plan, progress)
        started, begun = time.time(), time.monotonic()
        executor = make_executor(executor_name, config.resources.workers, fence)
        try:
            if isinstance(executor, RayExecutor):
                firsts = {file.corpus: file.path for file in reversed(plan.files)}
                places = [output, plan.work_path]
                check_storage(executor.on_every_node, places, list(firsts.values()))
            tokenizer = prepare_tokenizer(plan, executor, progress)
            planned = estimate(plan, _loaded(plan, tokenizer), executor.workers)
            refuse_too_little_memory(plan, planned)
            scattered = run_scatter(plan, tokenizer, planned.codec, executor, progress)
            duplicates = run_dedup(plan, scattered, executor, progress)
            shard_counts = count_shards(plan, scattered + duplicates, tokenizer["vocab_size"])
            spills, merged = run_merges(
                plan, tokenizer, scattered, shard_counts, planned.codec, executor, progress
            )
            gathered = run_gather(plan, tokenizer, spills, shard_counts, len(duplicates), executor, progress)
        except DiskFullError as error:
            raise DiskFullError(f"{error}; {_missing(plan)}") from None
        finally:
            executor.close()
        manifest = close_books(plan, tokenizer, scattered + duplicates, gathered)
        stages = {"scatter": scattered, "dedup": duplicates, "merge": merged, "gather": gathered}
        seconds = time.monotonic() - begun
        accounts = account(planned, stages, plan.input_bytes, executor.workers, seconds)
        write_json(output / "run.json", describe_run(plan, executor, progress, accounts, started))
        for line in compared(accounts, sum(result["written_bytes"] for result in gathered)):
            progress.say(line)
        write_json(output / "manifest.json", manifest.to_json())
        remove_work(plan)
        progress.finish()
    return Manifest.load(output)


def warn_of_a_small_disk(plan: Plan, progress: RunProgress) -> None:
    """Say so when the estimate does not fit; it is rough, and a full disk loses no finished task."""
    needs = {plan.config.output_path: plan.output_bytes, plan.work_path: plan.spill_bytes}
    devices: Counter[int] = Counter()
    for path, size_bytes in needs.items():
        devices[path.stat().st_dev] += size_bytes
    for path in needs:
        needed, free = devices[path.stat().st_dev], free_bytes(path)
        if needed > free:
            progress.say(
                f"warning: {path} has {free / 1e6:,.0f} MB free, about {needed / 1e6:,.0f} MB are needed"
            )


def prepare_tokenizer(plan: Plan, executor: Executor, progress: RunProgress) -> dict[str, Any]:
    """Load, train, or take up the tokenizer; returns what tokenizer/tokenizer.json says. Never trains
    twice.
    """
    config = plan.config
    if config.shards.content == "text":
        return {"file": "", "sha256": "", "vocab_size": 0}
    folder = config.output_path / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        if config.tokenizer.load:
            model = read_model(Path(config.tokenizer.load).expanduser())
            tokenizer = Tokenizer(model, config.tokenizer.load)
            write_bytes(folder / "tokenizer.model", model)
            description = {
                "file": "tokenizer/tokenizer.model",
                "sha256": tokenizer.sha256,
                "vocab_size": tokenizer.vocab_size,
                "special_ids": SPECIAL_IDS,
            }
            write_json(folder / "tokenizer.json", description)
        else:
            _train(plan, folder, executor, progress)
    result: dict[str, Any] = read_json(folder / "tokenizer.json")
    return result


def _train(plan: Plan, folder: Path, executor: Executor, progress: RunProgress) -> None:
    config, work = plan.config, plan.work_path / "sample"
    share = sample_share(plan.files, config.tokenizer.train.sample_bytes)
    tasks = [
        SampleTask(number, segments, str(work), plan.run_hash, config.seed, share, config.cleaning)
        for number, segments in enumerate(plan.tasks)
    ]
    with progress.stage("sample", plan.input_bytes, len(tasks)):
        done = [finished_sample(task) for task in tasks]
        results = _run_missing(
            tasks, done, collect_sample, executor, lambda r: progress.advance(r["input_bytes"])
        )
    lost: Counter[str] = Counter()
    for result in results:
        lost.update(result["lost"])
    if not sum(result["texts"] for result in results):
        raise DataPrepError(f"no text to train the tokenizer on ({_reasons(lost)}); is text_field right?")
    with progress.stage("train tokenizer", 0, 1):
        task = TrainTask(str(work), len(tasks), config.tokenizer.train, str(folder))
        for result in executor.run(train_tokenizer, [task]):
            progress.advance(result["input_bytes"])
    shutil.rmtree(work)


def run_scatter(
    plan: Plan, tokenizer: dict[str, Any], codec: str, executor: Executor, progress: RunProgress
) -> list[dict[str, Any]]:
    """Pass 1; returns the manifests of all tasks in order."""
    config = plan.config
    as_it_is = (
        leaves_text_alone(config.cleaning)
        and not config.shards.validation_share
        and config.deduplication.method == "none"
        and all(corpus.weight == 1 for corpus in config.corpora)
    )
    tasks = [
        ScatterTask(
            number=number,
            segments=segments,
            folder=str(plan.work_path / "scatter"),
            run_hash=plan.run_hash,
            seed=config.seed,
            cleaning=config.cleaning,
            tokenizer_path=str(config.output_path / tokenizer["file"]) if tokenizer["file"] else "",
            tokenizer_sha256=tokenizer["sha256"],
            segmenter=config.words.segmenter,
            validation_share=config.shards.validation_share,
            memory_bytes=config.resources.worker_memory_bytes,
            frame_bytes=frame_bytes(plan),
            codec=codec,
            as_it_is=as_it_is,
            deduplicate=config.deduplication.method == "exact",
            algorithm=config.shuffle.algorithm,
            sync=executor.name != "local",  # one machine: after a power cut the task is simply done again
        )
        for number, segments in enumerate(plan.tasks)
    ]

    def account(result: dict[str, Any]) -> None:
        outcomes: Counter[str] = Counter()
        for book in result["books"].values():
            outcomes["written"] += book["written"]
            outcomes["dropped"] += sum(book["dropped"].values())
            outcomes["quarantined"] += sum(book["quarantined"].values())
        progress.advance(result["input_bytes"], outcomes)

    with progress.stage("scatter", plan.text_bytes, len(tasks)):
        done = [finished_scatter(task) for task in tasks]
        results = _run_missing(tasks, done, scatter, executor, account)
    books = merge_books(plan, results)
    write_quarantine(plan)
    check_losses(config, len(plan.files), books)
    return sorted(results, key=lambda result: result["task"])


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
        [file.corpus for file in plan.files],
        config.resources.worker_memory_bytes,
    )
    with progress.stage("dedup", sum(result["hash_entries"] for result in scattered), len(tasks), "records"):
        done = [finished_dedup(task) for task in tasks]
        return _run_missing(
            tasks, done, find_duplicates, executor, lambda result: progress.advance(result["entries"])
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
    if not counts["train"]:
        books = merge_books(plan, scattered)
        reasons: Counter[str] = Counter()
        for book in books:
            reasons.update(book["dropped"])
            reasons.update(book["quarantined"])
        raise DataPrepError(
            f"no document is left for training ({_reasons(reasons)}); see cleaning, text_field"
        )
    return counts


def _reasons(lost: Counter[str]) -> str:
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
    fan_in = max(2, int(resources.worker_memory_bytes * 0.7) // resources.min_read_bytes)
    while (
        groups := needed_groups(spill_bytes, runs, sum(shard_counts.values()), resources.min_read_bytes)
    ) < runs:
        groups = max(groups, -(-len(numbers) // fan_in))
        if groups >= len(numbers) and level:
            break  # as far as the memory of a worker goes
        level, groups = level + 1, min(groups, len(numbers))
        target = plan.work_path / f"merge-{level}"
        tasks = [
            MergeTask(
                number=number,
                spills=SpillSet(str(folder), [int(n) for n in group], *kind),
                folder=str(target),
                run_hash=plan.run_hash,
                memory_bytes=resources.worker_memory_bytes,
                frame_bytes=frame_bytes(plan),
                codec=codec,
            )
            for number, group in enumerate(np.array_split(np.arange(len(numbers)), groups))
        ]
        with progress.stage("merge", spill_bytes, len(tasks)):
            done = [finished_merge(task) for task in tasks]
            results += _run_missing(tasks, done, merge, executor, lambda r: progress.advance(r["read_bytes"]))
        folder, numbers, runs = target, range(groups), groups
    return SpillSet(str(folder), numbers, *kind), results


def _loaded(plan: Plan, tokenizer: dict[str, Any]) -> Tokenizer | None:
    if not tokenizer["file"]:
        return None
    return load_tokenizer(str(plan.config.output_path / tokenizer["file"]), tokenizer["sha256"])


def _missing(plan: Plan) -> str:
    """How much more room the rest of the run takes, as far as can be told."""
    used = sum(
        path.stat().st_size
        for folder in (plan.work_path, plan.config.output_path)
        for path in folder.rglob("*")
        if path.is_file()
    )
    needed = plan.spill_bytes + plan.output_bytes
    task = needed // max(1, len(plan.tasks))
    missing = max(needed - used, task) - free_bytes(plan.work_path)
    return f"about {max(missing, task):,} bytes more are needed"


def run_gather(
    plan: Plan,
    tokenizer: dict[str, Any],
    spills: SpillSet,
    shard_counts: dict[str, int],
    drops: int,
    executor: Executor,
    progress: RunProgress,
) -> list[dict[str, Any]]:
    """Pass 2; returns the manifests of all shards."""
    config = plan.config
    vocab_size = tokenizer["vocab_size"]
    row_bytes = config.shards.row_tokens * token_dtype(vocab_size).itemsize
    tasks = [
        GatherTask(
            split=split,
            shard=shard,
            shards=shards,
            run_hash=plan.run_hash,
            tokenizer_sha256=tokenizer["sha256"],
            spill_folder=spills.folder,
            spills=spills.numbers,
            output_folder=str(config.output_path),
            work_folder=str(plan.work_path / "gather"),
            source_of_file=[file.corpus for file in plan.files],
            row_tokens=config.shards.row_tokens,
            block_rows=max(1, config.shards.block_bytes // row_bytes),
            vocab_size=vocab_size,
            has_words=config.words.segmenter != "none" and vocab_size > 0,
            zstd_level=config.shards.zstd_level if vocab_size or config.shards.compress_text else 0,
            memory_bytes=config.resources.worker_memory_bytes,
            drops=drops,
            drops_folder=str(plan.work_path / "dedup"),
        )
        for split, shards in shard_counts.items()
        for shard in range(shards)
    ]
    with progress.stage("gather", 0, len(tasks), "tokens"):
        done = [finished_gather(task) for task in tasks]
        return _run_missing(tasks, done, gather, executor, lambda r: progress.advance(r["shard"]["tokens"]))


def _run_missing(
    tasks: Sequence[Any],
    done: list[dict[str, Any] | None],
    function: Callable[[Any], dict[str, Any]],
    executor: Executor,
    account: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Results of all tasks, running those that are not done yet."""
    results = []
    for result in done:
        if result is not None:
            results.append(result)
            account(result)
    for result in executor.run(
        function, [task for task, result in zip(tasks, done, strict=True) if result is None]
    ):
        results.append(result)
        account(result)
    return results
