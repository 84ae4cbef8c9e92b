"""Closing the books: what went in is accounted for, and the manifest says what came out."""

from __future__ import annotations

import platform
import socket
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np
import xxhash

from .errors import AuditError
from .executor import Executor
from .files import atomic_file, write_bytes
from .gather import counts_path
from .plan import Plan
from .progress import RunProgress
from .quarantine import Quarantine
from .records import new_book
from .scatter import quarantine_path
from .shards import SPECIAL_IDS, SPLITS, Manifest, ShardEntry, SplitEntry, token_dtype


def merge_books(plan: Plan, scattered: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One account for each corpus."""
    books = [new_book() for _ in plan.config.corpora]
    for result in scattered:
        for corpus, book in result["books"].items():
            for key, value in book.items():
                if isinstance(value, dict):
                    books[int(corpus)][key].update(value)
                else:
                    books[int(corpus)][key] += value
    return [
        book
        | {
            key: {reason: n for reason, n in sorted(book[key].items()) if n}
            for key in ("dropped", "quarantined")
        }
        for book in books
    ]


def files_cut_short(scattered: list[dict[str, Any]]) -> int:
    """How many files could not be read to their end, or not without a gap, whatever the number of gaps and tasks."""
    return len({file for result in scattered for file in result["cut_short"]})


def close_books(
    plan: Plan, tokenizer: dict[str, Any], scattered: list[dict[str, Any]], gathered: list[dict[str, Any]]
) -> Manifest:
    """The manifest. Raises AuditError when a record is unaccounted for between input, pass 1 and pass 2."""
    config = plan.config
    output = config.output_path
    problems, splits = [], {}
    counts = np.zeros(tokenizer["vocab_size"], dtype="<u8")
    for split in SPLITS:
        results = sorted((r for r in gathered if r["split"] == split), key=lambda r: r["shard"]["name"])
        shards = [ShardEntry(**result["shard"]) for result in results]
        expected = {key: sum(r["splits"][split][key] for r in scattered) for key in ("documents", "tokens")}
        for key, value in expected.items():
            found = sum(getattr(shard, key) for shard in shards)
            if found != value:
                problems.append(f"{split}: pass 1 wrote {value} {key}, pass 2 {found}")
        total = sum(result["splits"][split]["document_sum"] for result in scattered)
        total = (total - sum(result.get("dropped_sum", 0) for result in results)) % (1 << 64)
        rows = sum(shard.rows for shard in shards)
        splits[split] = SplitEntry(rows, expected["documents"], expected["tokens"], f"{total:016x}", shards)
        if split == "train" and tokenizer["vocab_size"]:
            for number in range(len(shards)):
                counts += np.fromfile(counts_path(plan.work_path / "gather", split, number), dtype="<u8")
    books = merge_books(plan, scattered)
    records: dict[str, Any] = {**balance(books, sum(split.documents for split in splits.values()), problems)}
    if problems:
        raise AuditError("\n".join(problems))
    data = counts.tobytes()
    write_bytes(output / "token_counts.bin", data)
    content = plan.identity["config"]
    records["quarantine_xxh3"] = write_quarantine(plan)
    row_bytes = config.shards.row_tokens * token_dtype(tokenizer["vocab_size"]).itemsize
    return Manifest(
        seed=config.seed,
        row_tokens=config.shards.row_tokens,
        block_rows=max(1, config.shards.block_bytes // row_bytes),
        vocab_size=tokenizer["vocab_size"],
        special_ids=tokenizer.get("special_ids", SPECIAL_IDS),
        has_words=config.words.segmenter != "none" and tokenizer["vocab_size"] > 0,
        tokenizer={"file": tokenizer["file"], "sha256": tokenizer["sha256"]},
        token_counts={"file": "token_counts.bin", "xxh3": xxhash.xxh3_128_hexdigest(data)},
        splits=splits,
        sources=[{"name": corpus.name, **book} for corpus, book in zip(config.corpora, books, strict=True)],
        files=[{"source": f.corpus, "path": f.relative, "bytes": f.size_bytes} for f in plan.files],
        records=records,
        config=content,
        tools=plan.identity["tools"],
    )


def write_quarantine(plan: Plan, numbers: Iterable[int] | None = None) -> str:
    """Join what the tasks (of these numbers; all where None) put aside to OUTPUT/quarantine.jsonl; returns its
    xxh3-128.
    """
    digest = xxhash.xxh3_128()
    with atomic_file(plan.config.output_path / "quarantine.jsonl") as file:

        def write(line: bytes) -> None:
            digest.update(line)
            file.write(line)

        quarantine = Quarantine(write)
        for number in range(len(plan.tasks)) if numbers is None else sorted(numbers):
            with quarantine_path(plan.work_path / "scatter", number).open("rb") as part:
                quarantine.join(part)
        quarantine.finish()
    return digest.hexdigest()


def balance(books: list[dict[str, Any]], documents: int, problems: list[str]) -> dict[str, int]:
    """Totals over all corpora; what does not add up goes to `problems`."""
    totals = {
        "read": sum(book["read"] for book in books),
        "written": sum(book["written"] for book in books),
        "dropped": sum(sum(book["dropped"].values()) for book in books),
        "quarantined": sum(sum(book["quarantined"].values()) for book in books),
    }
    if repeated := sum(book.get("repeated", 0) for book in books):
        totals["repeated"] = repeated  # written once more, by weight
    accounted = totals["written"] - repeated + totals["dropped"] + totals["quarantined"]
    if totals["read"] != accounted:
        problems.append(f"records: {totals['read']} read, but {accounted} written, dropped or quarantined")
    if totals["written"] != documents:
        problems.append(
            f"records: {totals['written']} written by pass 1, {documents} documents in the shards"
        )
    return totals


def describe_run(
    plan: Plan, executor: Executor, progress: RunProgress, accounts: dict[str, Any], started: float
) -> dict[str, Any]:
    """run.json: how, where and how fast. Nothing here decides content."""
    libraries = ("numpy", "pyarrow", "sentencepiece", "rjieba", "zstandard", "xxhash", "ray")
    return {
        **accounts,
        "config": plan.config.model_dump(mode="json"),
        "executor": executor.name,
        "workers": executor.workers,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in libraries},
        "started": started,
        "stage_seconds": progress.stage_seconds,
        "input_files": [asdict(file) for file in plan.files],
    }
