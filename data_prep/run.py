"""The run from plan to manifest: sample, train the tokenizer, scatter (pass 1), gather (pass 2), close the
books.

Every stage skips what an earlier run of the same plan finished, so a killed run is resumed by starting it
again.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from .account import account, compared
from .adopt import load
from .between import count_shards, missing_bytes, reasons_of, run_dedup, run_merges, run_missing
from .books import close_books, describe_run, files_cut_short, merge_books, write_quarantine
from .config import PrepareConfig
from .errors import DataPrepError, DiskFullError
from .estimate import NOTHING_LEFT, estimate
from .executor import Executor, RayExecutor, make_executor, usable_cores
from .files import disk_errors, free_bytes, read_json, write_bytes, write_json
from .fingerprint import digest_of
from .gather import GatherTask, finished_gather, gather
from .lease import Fence, owned
from .memory import records_bytes
from .merge import SpillSet
from .mistakes import refuse_mistakes, refuse_too_small_a_cluster
from .owned import adopt_plan, finished, remove_leftovers, remove_work
from .places import is_remote
from .plan import PROGRAM_BYTES, Plan, frame_bytes, make_plan
from .progress import RunProgress
from .publish import publish
from .quarantine import check_losses, is_hopeless, lost_records
from .records import outcomes
from .sample import SampleTask, TrainTask, collect_sample, finished_sample, sample_shares, train_tokenizer
from .scatter import ScatterTask, finished_scatter, scatter
from .shards import SPLITS, Manifest, token_dtype
from .storage import seen_by_every_node
from .text import leaves_text_alone
from .tokenizer import AnyTokenizer, load_tokenizer
from .wordpiece import WordPieceTokenizer


def run(
    config: PrepareConfig, executor_name: str, fresh: bool, progress: RunProgress | None = None
) -> Manifest:
    """Prepare the data of a configuration; returns the manifest, at once when the output is already complete.

    Raises DataPrepError for input, settings and disks that a user can mend, AuditError when the books do
    not balance.
    """
    output = config.output_path
    progress = progress or RunProgress(output, config.resources.log_seconds)
    plan = make_plan(config, progress.say)
    if fresh or not (output / "manifest.json").exists():
        near_workers = config.resources.workers or usable_cores()
        refuse_mistakes(plan, near_workers if executor_name == "local" else None, fresh)
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    if plan.ignored:
        progress.say(f"{len(plan.ignored)} file(s) in the input folders are not taken; `plan` lists them")
    with owned(output, config.resources.lease_seconds, progress.say) as fence:
        plan = adopt_plan(plan, fresh, progress.say)
        with progress.telling_failure():  # in a folder that is this run's own by now
            _carry_out(plan, executor_name, fence, progress)
    return Manifest.load(config.output_dir if is_remote(config.output_dir) else output)


def _carry_out(plan: Plan, executor_name: str, fence: Fence, progress: RunProgress) -> None:
    """Do what the plan of an adopted OUTPUT has left to do; nothing when it is complete."""
    config, output = plan.config, plan.config.output_path
    if (output / "manifest.json").exists():
        publish(output, config.output_dir)
        finished(config)
        remove_work(plan)
        progress.say(f"{output} is complete and neither the configuration nor the input has changed")
        return
    remove_leftovers(output, plan.work_path)
    with disk_errors(plan.work_path):
        plan.work_path.mkdir(parents=True, exist_ok=True)
    warn_of_a_small_disk(plan, progress)
    started, begun = time.time(), time.monotonic()
    with _workers(plan, executor_name, fence, progress) as executor:
        if isinstance(executor, RayExecutor):
            refuse_too_small_a_cluster(plan, executor)
        tokenizer = prepare_tokenizer(plan, executor, progress)
        planned = estimate(plan, _loaded(plan, tokenizer), executor.workers)
        if not planned.kept_share:
            progress.say(NOTHING_LEFT)
        scattered = run_scatter(plan, tokenizer, planned.codec, executor, progress)
        duplicates = run_dedup(plan, scattered, executor, progress)
        shard_counts = count_shards(plan, scattered + duplicates, tokenizer["vocab_size"])
        spills, merged = run_merges(
            plan, tokenizer, scattered, shard_counts, planned.codec, executor, progress
        )
        gathered = run_gather(
            plan, tokenizer, scattered, duplicates, spills, shard_counts, executor, progress
        )
    remove_leftovers(output)  # of workers that were killed while the run went on
    manifest = close_books(plan, tokenizer, scattered + duplicates, gathered)
    stages = {"scatter": scattered, "dedup": duplicates, "merge": merged, "gather": gathered}
    seconds = time.monotonic() - begun
    accounts = account(planned, stages, plan.input_bytes, executor.workers, seconds)
    write_json(output / "run.json", describe_run(plan, executor, progress, accounts, started))
    for line in compared(accounts, sum(result["written_bytes"] for result in gathered)):
        progress.say(line)
    write_json(output / "manifest.json", manifest.to_json())
    publish(output, config.output_dir)
    remove_work(plan)
    progress.finish()


@contextmanager
def _workers(plan: Plan, name: str, fence: Fence, progress: RunProgress) -> Iterator[Executor]:
    """The executor of a run, whose nodes see what the driver sees; a full disk is told with what it lacks."""
    executor = make_executor(name, plan.config.resources.workers, fence, plan.worker_bytes(), progress.say)
    try:
        with seen_by_every_node(executor, plan) if isinstance(executor, RayExecutor) else nullcontext():
            yield executor
    except DiskFullError as error:
        raise DiskFullError(f"{error}; {missing_bytes(plan)}") from None
    finally:
        executor.close()


def warn_of_a_small_disk(plan: Plan, progress: RunProgress) -> None:
    """Say so when the estimate does not fit; it is rough, and a full disk loses no finished task."""
    near_output = not is_remote(plan.config.output_dir)  # of another, only small files lie here
    needs = {plan.config.output_path: near_output * plan.output_bytes, plan.work_path: plan.spill_bytes}
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
            model, tokenizer, notes = load(config.tokenizer)
            name = "vocab.txt" if isinstance(tokenizer, WordPieceTokenizer) else "tokenizer.model"
            write_bytes(folder / name, model)
            description = {
                "file": f"tokenizer/{name}",
                "sha256": tokenizer.sha256,
                "vocab_size": tokenizer.vocab_size,
                "special_ids": tokenizer.special_ids,
                **notes,
            }
            write_json(folder / "tokenizer.json", description)
        else:
            _train(plan, folder, executor, progress)
    result: dict[str, Any] = read_json(folder / "tokenizer.json")
    return result


def _train(plan: Plan, folder: Path, executor: Executor, progress: RunProgress) -> None:
    config, work = plan.config, plan.work_path / "sample"
    weights = [corpus.weight for corpus in config.corpora]
    shares = sample_shares(plan.files, weights, config.tokenizer.train.sample_bytes)
    tasks = [
        SampleTask(number, segments, str(work), plan.run_hash, config.seed, shares, config.cleaning)
        for number, segments in enumerate(plan.tasks)
    ]
    with progress.stage("sample", plan.input_bytes, len(tasks)):
        results = run_missing(
            tasks,
            finished_sample,
            collect_sample,
            executor,
            progress,
            lambda r: progress.advance(r["input_bytes"]),
        )
    lost: Counter[str] = Counter()
    for result in results:
        lost.update(result["lost"])
    if not sum(result["texts"] for result in results):
        raise DataPrepError(f"no text to train the tokenizer on ({reasons_of(lost)}); is text_field right?")
    section, needed = config.tokenizer.train, plan.training_bytes()
    told = (needed - PROGRAM_BYTES) / 1e6
    progress.say(f"training takes about {told:,.0f} MB of memory on one worker, {section.threads} thread(s)")
    with progress.stage("train tokenizer", 0, 1):
        task = TrainTask(str(work), len(tasks), section, str(folder))
        for result in executor.run(train_tokenizer, [task], memory_bytes=needed, apart=True):
            progress.advance(result["input_bytes"])
            if skipped := result["trained_on"]["skipped_sentences"]:
                progress.say(f"{skipped:,} sentence(s) with a reserved character were left out of training")
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

    seen: list[dict[str, Any]] = []
    sums: Counter[str] = Counter()

    def account(result: dict[str, Any]) -> None:
        for book in result["books"].values():
            sums.update(read=book["read"], lost=lost_records(book))
        progress.advance(result["input_bytes"], outcomes(result["books"].values()))
        seen.append(result)
        sums["input"] += result["read_bytes"]
        if is_hopeless(config, sums["read"], sums["lost"], sums["input"] / plan.input_bytes):
            write_quarantine(plan, [one["task"] for one in seen])
            check_losses(config, len(plan.files), files_cut_short(seen), merge_books(plan, seen))

    with progress.stage("scatter", plan.text_bytes, len(tasks)):
        results = run_missing(tasks, finished_scatter, scatter, executor, progress, account)
    write_quarantine(plan)
    check_losses(config, len(plan.files), files_cut_short(results), merge_books(plan, results))
    return sorted(results, key=lambda result: result["task"])


def _loaded(plan: Plan, tokenizer: dict[str, Any]) -> AnyTokenizer | None:
    if not tokenizer["file"]:
        return None
    return load_tokenizer(str(plan.config.output_path / tokenizer["file"]), tokenizer["sha256"])


def run_gather(
    plan: Plan,
    tokenizer: dict[str, Any],
    scattered: list[dict[str, Any]],
    duplicates: list[dict[str, Any]],
    spills: SpillSet,
    shard_counts: dict[str, int],
    executor: Executor,
    progress: RunProgress,
) -> list[dict[str, Any]]:
    """Pass 2; returns the manifests of all shards."""
    config = plan.config
    vocab_size = tokenizer["vocab_size"]
    row_bytes = config.shards.row_tokens * token_dtype(vocab_size).itemsize
    upstream, file_stops = digest_of(scattered), plan.file_stops
    tasks = [
        GatherTask(
            split=split,
            shard=shard,
            shards=shards,
            run_hash=plan.run_hash,
            upstream=upstream,
            tokenizer_sha256=tokenizer["sha256"],
            spill_folder=spills.folder,
            spills=spills.numbers,
            output_folder=config.output_dir if is_remote(config.output_dir) else str(config.output_path),
            work_folder=str(plan.work_path / "gather"),
            file_stops=file_stops,
            row_tokens=config.shards.row_tokens,
            block_rows=max(1, config.shards.block_bytes // row_bytes),
            vocab_size=vocab_size,
            has_words=config.words.segmenter != "none" and vocab_size > 0,
            zstd_level=config.shards.zstd_level if vocab_size or config.shards.compress_text else 0,
            memory_bytes=records_bytes(
                config.resources.worker_memory_bytes, config.cleaning.max_record_bytes
            ),
            drops=len(duplicates),
            drops_folder=str(plan.work_path / "dedup"),
        )
        for split, shards in shard_counts.items()
        for shard in range(shards)
    ]
    # Duplicates are read, but what counts is what will stand in the shards.
    tokens = sum(result["splits"][split]["tokens"] for result in scattered + duplicates for split in SPLITS)
    with progress.stage("gather", tokens, len(tasks), "tokens" if vocab_size else "bytes"):
        return run_missing(
            tasks,
            finished_gather,
            gather,
            executor,
            progress,
            lambda r: progress.advance(r["shard"]["tokens"]),
        )
