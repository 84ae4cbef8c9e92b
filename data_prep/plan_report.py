"""What `python -m data_prep plan` prints: the input, how it is cut, and what the run will take, from a probe."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .adopt import load
from .estimate import NOTHING_LEFT, Estimate, estimate
from .executor import RayExecutor, usable_cores
from .files import free_bytes
from .mistakes import refuse_mistakes, refuse_too_small_a_cluster
from .plan import Plan
from .tokenizer import training_bytes

# What pyarrow writes to a page where it is not told otherwise, and from what size on a page is worth a word.
_PAGE_ROWS, _LARGE_PAGE_BYTES = 1024, 64 * 1024**2


def report(plan: Plan, console: Console, executor_name: str = "local") -> None:
    """Print the plan, for the cores of this machine or those of a Ray cluster. Raises DataPrepError with every mistake
    for which a run would be refused.
    """
    config = plan.config
    workers = config.resources.workers or usable_cores()
    whose = "" if config.resources.workers else ", as this machine has cores"
    refuse_mistakes(plan, workers if executor_name == "local" else None)
    if executor_name == "ray":
        executor = RayExecutor(config.resources.workers, None, plan.worker_bytes(), console.print)
        refuse_too_small_a_cluster(plan, executor)
        workers, whose = executor.workers, ", as the cluster has room"
    tokenizer = None
    if config.tokenizer.load and config.shards.content == "tokens":
        _, tokenizer, _ = load(config.tokenizer)
    found = estimate(plan, tokenizer, workers)
    console.print(_input_table(plan))
    facts = Table("what", "estimate", show_header=False, box=None)
    for what, value in (*_work(plan, found, whose), *_room(plan, found), *_time(plan, found)):
        facts.add_row(what, value)
    console.print(facts)
    for path in plan.ignored[:5]:
        console.print(f"ignored: {path} (not a text file of the format)", highlight=False)
    if len(plan.ignored) > 5:
        console.print(f"ignored: {len(plan.ignored) - 5} more files")
    if not found.kept_share:
        console.print(NOTHING_LEFT, highlight=False)


def _work(plan: Plan, found: Estimate, whose: str) -> list[tuple[str, str]]:
    config = plan.config
    train = config.tokenizer.train
    rows = [
        ("tasks of pass 1", f"{len(plan.tasks)} for {found.workers} worker(s){whose}"),
        ("files that cannot be split", _whole(plan)),
        (
            "passes",
            f"{found.passes}, in pass {found.passes} reads of {size(found.run_bytes)} for each of {found.shards} shards"
            + (
                ""
                if found.passes == 2
                else f" would be under {size(config.resources.min_read_bytes)}, so runs are merged"
            ),
        ),
        (
            "intermediate files",
            f"{found.codec if found.codec != 'none' else 'plain'}, by the disk's speed and the load",
        ),
    ]
    if config.shards.content == "text":
        return [*rows, ("output", f"lines of text, {'zstd' if config.shards.compress_text else 'plain'}")]
    trained = (
        f"train {train.model}, {train.vocab_size:,} pieces, on {size(plan.sample_bytes)} "
        f"(about {size(training_bytes(train, plan.sample_bytes))} of memory)"
    )
    row = (
        f"{config.shards.row_tokens} tokens, [CLS] document [SEP] one behind the other; shards of "
        f"{size(config.shards.target_bytes)} before compression, {config.shards.validation_share:.2%} for validation"
    )
    given = config.tokenizer.load
    return [*rows, ("tokenizer", f"load {given}" if given else trained), ("rows", row)]


def _whole(plan: Plan) -> str:
    """Files that one task has to read from beginning to end; the largest bounds the time of pass 1 from below."""
    whole = [file for file in plan.files if file.blocks is None]
    if not whole:
        return "none"
    largest = max(whole, key=lambda file: file.size_bytes)
    share = largest.size_bytes / max(1, plan.input_bytes)
    return (
        f"{len(whole)}; the largest, {largest.relative} of {size(largest.size_bytes)}, is {share:.0%} of the input and "
        "bounds the time: cut it, or write it as zst with frames"
    )


def _room(plan: Plan, found: Estimate) -> list[tuple[str, str]]:
    config = plan.config
    spill = found.peak_disk_bytes - found.output_bytes
    free = f"{size(free_bytes(config.work_base))} free"
    return [
        (
            "memory",
            f"{size(found.worker_bytes)} a worker ({size(found.idle_worker_bytes)} idle, "
            f"{size(config.resources.worker_memory_bytes)} for records), "
            f"{size(found.worker_bytes * found.workers)} in all",
        ),
        *_pages(plan),
        ("intermediate disk", f"{size(spill)} in {config.work_base}, {free}"),
        ("output disk", f"{size(found.output_bytes)} in {config.output_dir}"),
        ("open files", f"{found.open_files} at a time"),
    ]


def _pages(plan: Plan) -> list[tuple[str, str]]:
    """What large pages of parquet take, as far as a footer tells: it has the sizes of row groups, and not of pages."""
    means = [
        (file.text_bytes // max(1, sum(file.groups)) * min(_PAGE_ROWS, max(file.groups)), file.relative)
        for file in plan.files
        if file.groups
    ]
    page_bytes, name = max(means, default=(0, ""))
    if page_bytes < _LARGE_PAGE_BYTES:
        return []
    told = f"{size(page_bytes)} unpacked and twice its packed size come on top for a page of 1,024 rows of {name}"
    return [("parquet", f"{told}; write it with a smaller write_batch_size, or take fewer workers")]


def _time(plan: Plan, found: Estimate) -> list[tuple[str, str]]:
    trains = plan.config.shards.content == "tokens" and plan.config.tokenizer.load is None
    training = ", and what training the tokenizer takes" if trains else ""
    disk = f"{size(found.disk_bytes_per_second)}/s" if found.disk_bytes_per_second > 0 else "unknown"
    cores = found.clean_seconds + found.encode_seconds + found.compress_seconds
    return [
        ("bytes moved", f"{size(found.moved_bytes)}, disk {disk} (measured just now)"),
        (
            "core time",
            f"{duration(cores)} (clean {duration(found.clean_seconds)}, encode {duration(found.encode_seconds)}, "
            f"compress {duration(found.compress_seconds)})",
        ),
        ("time", f"about {duration(found.seconds)} with {found.workers} worker(s){training}"),
        ("floor", f"{duration(found.floor_seconds)}: what the disk, or encoding alone, would take"),
    ]


def _input_table(plan: Plan) -> Table:
    table = Table("corpus", "files", "size on disk", "text, about", "tasks can begin at", title="input")
    for number, corpus in enumerate(plan.config.corpora):
        files = [file for file in plan.files if file.corpus == number]
        blocks = sum(file.blocks or 1 for file in files)
        on_disk = sum(file.size_bytes for file in files)
        text = sum(file.estimated_text_bytes for file in files)
        table.add_row(
            corpus.name,
            f"{len(files):,}",
            size(on_disk),
            size(text),
            f"{blocks:,} place{'' if blocks == 1 else 's'}",
        )
    return table


def size(number: float) -> str:
    """Bytes for people: 1,234 B, 1.2 kB, … TB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            return f"{number:,.0f} {unit}" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds for people: 12 s, 3.4 min, 5.6 h."""
    if seconds < 100:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.1f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"
