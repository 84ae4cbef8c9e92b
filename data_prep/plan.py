"""What a run will do, decided before it starts: the input files, the tasks, and what the output depends on.

The plan is written to OUTPUT/plan.json and kept. A later run with the same plan goes on where the first
stopped, and a run with another one is refused with the difference: changed settings, files, or versions of
the tools.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from .clean import function_identity
from .config import DEFAULT_WORK, PrepareConfig
from .errors import DataPrepError
from .executor import usable_cores
from .inputs import list_corpus, search_root
from .memory import records_bytes
from .places import full_url, is_remote, local_path, place
from .records import Segment, segment_bytes
from .shards import FORMAT_VERSION
from .sources import BLOCK_BYTES, InputFile
from .tokenizer import read_model, training_bytes
from .words import segmenter_identity

WORK_PREFIX = ".sutrain-"
_WORK_VERSION = 4  # of the intermediate files; another program must not take up what it cannot read
_MIN_TASK_BYTES, _MAX_TASK_BYTES = BLOCK_BYTES, 1024**3
_TASKS_PER_RUN = 64
# Rough sizes per byte of text, for the estimate only (16-bit ids, Chinese statutes).
_SPILL_SHARE, _OUTPUT_SHARE = 0.35, 0.3
_LEAST_FRAME_BYTES, _MIN_FRAME_BYTES, _MAX_FRAME_BYTES = 4 * 1024, 16 * 1024, 512 * 1024
_TEXT_RATIO, _ZSTD_SECONDS_PER_BYTE = 0.45, 1 / 330e6 + 1 / 1000e6  # zstd-1, measured
PROGRAM_BYTES = 256 * 1024**2  # of a worker before it has read anything
_RECORD_BYTES_PER_TEXT_BYTE = 8  # at most: ids, words, places and what sorting them takes
# Of the estimated text, which counts other fields, what cleaning drops, and a guess at compression.
_LEAST_TEXT_SHARE = 1 / 8


@dataclass(frozen=True)
class Plan:
    """Files in the order that ties are broken by, the tasks of pass 1, and what decides the content."""

    config: PrepareConfig
    files: list[InputFile]
    ignored: list[str]
    tasks: list[list[Segment]]

    @property
    def input_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def text_bytes(self) -> int:
        """Estimate of the decompressed size."""
        return sum(file.estimated_text_bytes for file in self.files)

    @property
    def spill_bytes(self) -> int:
        return int(self.text_bytes * _SPILL_SHARE)

    @property
    def output_bytes(self) -> int:
        return int(self.text_bytes * _OUTPUT_SHARE)

    @property
    def file_stops(self) -> list[int]:
        """For each corpus, the number of the file after its last one: the files of a corpus lie together, so this tells
        the corpus of every file, and is small enough to travel with every task.
        """
        return np.cumsum(
            np.bincount([file.corpus for file in self.files], minlength=len(self.config.corpora))
        ).tolist()

    def worker_bytes(self) -> int:
        """Peak memory of one worker: the program, and what the configuration allows, or less where so little text
        cannot fill it.
        """
        allowed = self.config.resources.worker_memory_bytes
        records = records_bytes(allowed, self.config.cleaning.max_record_bytes)
        return PROGRAM_BYTES + allowed - max(0, records - _RECORD_BYTES_PER_TEXT_BYTE * self.text_bytes)

    def trains_tokenizer(self, fresh: bool = False) -> bool:
        """Will a tokenizer be trained: is none given, and none left by an earlier run that this one goes on with?"""
        if self.config.shards.content == "text" or self.config.tokenizer.load:
            return False
        return fresh or not (self.config.output_path / "tokenizer" / "tokenizer.json").exists()

    @property
    def sample_bytes(self) -> int:
        """Text that a tokenizer is trained on, at most."""
        return min(self.config.tokenizer.train.sample_bytes, self.text_bytes)

    @property
    def least_sample_bytes(self) -> int:
        """What of it there will be for certain, before anything has been read."""
        return min(self.sample_bytes, int(self.text_bytes * _LEAST_TEXT_SHARE))

    def training_bytes(self) -> int:
        """Peak memory of the worker that trains a tokenizer, at most."""
        return PROGRAM_BYTES + training_bytes(self.config.tokenizer.train, self.sample_bytes)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that the content of the output, and finished parts of it, depend on."""
        content = self.config.content()
        if self.config.tokenizer.load:
            model = read_model(place(self.config.tokenizer.load))
            content["tokenizer"]["sha256"] = hashlib.sha256(model).hexdigest()
        if self.config.cleaning.functions:
            sources = {path: function_identity(path) for path in self.config.cleaning.functions}
            content["cleaning"]["function_sources"] = sources
        content["words"] = segmenter_identity(self.config.words.segmenter)
        names = [corpus.name for corpus in self.config.corpora]
        return {
            "format_version": FORMAT_VERSION,
            "config": content,
            "files": {
                f"{names[file.corpus]}:{file.relative}": [file.size_bytes, file.stamp] for file in self.files
            },
            "tools": tool_versions(),
        }

    @cached_property
    def run_hash(self) -> str:
        """Names this run: the content, where it goes, and the tasks. Every intermediate file belongs to one."""
        facts = [_WORK_VERSION, self.identity, str(self.config.output_path), self._cuts()]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def work_path(self) -> Path:
        """The folder for intermediate files, which belongs to this run alone."""
        return self.config.work_base / f"{WORK_PREFIX}{self.run_hash}"

    def with_tasks(self, cuts: list[Any]) -> Plan:
        """The same plan with the tasks of an earlier run, as they stand in plan.json."""
        return replace(self, tasks=_segments(self.config, self.files, cuts))

    def to_json(self) -> dict[str, Any]:
        return {
            "identity": self.identity,
            "work": str(self.work_path),
            **({"url": self.config.output_dir} if is_remote(self.config.output_dir) else {}),
            "files": [asdict(file) for file in self.files],
            "tasks": self._cuts(),
        }

    def _cuts(self) -> list[list[list[int | None]]]:
        return [
            [[segment.file, segment.first_block, segment.stop_block] for segment in segments]
            for segments in self.tasks
        ]


def frame_bytes(plan: Plan, runs: int = 0) -> int:
    """Size of a frame of spill files that hold so many sorted runs in all (0: those of pass 1), in bytes as it is
    loaded, word starts left out.

    Frames that lie across the border of two shards are read twice, so a run has eight of them for each shard, as long
    as they stay worth a read. And whoever puts the runs together holds a frame of each that reaches over the keys at
    hand: these may fill half of what a worker holds.
    """
    config = plan.config
    held_bytes = records_bytes(config.resources.worker_memory_bytes, config.cleaning.max_record_bytes)
    # A record takes about as much memory as its text.
    runs = runs or max(1, len(plan.tasks), plan.text_bytes // held_bytes)
    shards = max(1, plan.output_bytes // config.shards.target_bytes)
    wanted = min(max(plan.spill_bytes // runs // (8 * shards), _MIN_FRAME_BYTES), _MAX_FRAME_BYTES)
    return min(wanted, max(held_bytes // (4 * runs), _LEAST_FRAME_BYTES))


def choose_codec(plan: Plan, disk_bytes_per_second: float) -> str:
    """Compression of the spill files: what was asked for, or by the speed of the disk they go to.

    Ids cost so much to make that zstd-1 is lost in it, and it keeps the disk free; only a disk that takes more
    than two gigabytes a second makes it pointless. Text is moved in a fraction of that time, so zstd pays only
    where what it spares the disk is more than what it costs the cores. Of a disk whose speed cannot be told (NaN), as
    it is full, room is spared.
    """
    resources = plan.config.resources
    if resources.spill != "auto":
        return resources.spill
    if plan.config.shards.content == "tokens":
        return "none" if disk_bytes_per_second >= 2e9 else "zstd"
    saved_seconds = 2 * (1 - _TEXT_RATIO) / disk_bytes_per_second
    return (
        "none" if saved_seconds <= _ZSTD_SECONDS_PER_BYTE / (resources.workers or usable_cores()) else "zstd"
    )


def tool_versions() -> dict[str, str]:
    """Versions of what decides bytes; Python's Unicode tables decide normalisation, spaces and letters."""
    return {name: version(name) for name in ("sentencepiece", "zstandard")} | {
        "unicode": unicodedata.unidata_version
    }


def make_plan(config: PrepareConfig, say: Callable[[str], None] = lambda text: None) -> Plan:
    """List the input and cut it into tasks; `say` hears how far it is.

    Raises DataPrepError with every path that matches nothing or cannot be read, when there is no text at all,
    and when input, output and intermediate files would lie in one another.
    """
    files: list[InputFile] = []
    problems, ignored = [], []
    for number, corpus in enumerate(config.corpora):
        found, unknown, corpus_problems = list_corpus(number, corpus, say)
        files += found
        ignored += unknown
        problems += corpus_problems
    if not problems and not any(file.size_bytes for file in files):
        problems.append(f"the input is empty: {len(files)} file(s) with 0 bytes")
    problems += _overlaps(config, files)
    if problems:
        raise DataPrepError("\n".join(problems))
    cuts = list(_cut_tasks(files, _task_bytes(config, files)))
    return Plan(config, files, ignored, _segments(config, files, cuts))


def _segments(config: PrepareConfig, files: list[InputFile], cuts: Sequence[Any]) -> list[list[Segment]]:
    names = [corpus.name for corpus in config.corpora]
    weights = [corpus.weight for corpus in config.corpora]
    return [
        [
            Segment(file, files[file], names[files[file].corpus], first, stop, weights[files[file].corpus])
            for file, first, stop in cut
        ]
        for cut in cuts
    ]


def _overlaps(config: PrepareConfig, files: list[InputFile]) -> list[str]:
    """One line for each of output_dir and work_dir that is, holds, or lies in an input or the other."""
    output, work = config.output_path, config.work_base
    inputs = [file.path for file in files]
    inputs += filter(None, (_searched(pattern) for corpus in config.corpora for pattern in corpus.paths))
    if load := config.tokenizer.load:
        inputs.append(load if is_remote(load) else str(Path(local_path(load)).expanduser()))
    near = not is_remote(config.output_dir)
    places = {"output_dir": str(output)} if near else {"output_dir": full_url(config.output_dir)}
    places |= {"work_dir": str(work)} if config.work_dir else {}
    problems = []
    for key, folder in places.items():
        hit = next((path for path in inputs if _touch(folder, path)), None)
        if hit:
            problems.append(f"{key}: {folder} and the input {hit} lie in one another; take a folder apart")
    if near and _touch(str(output), str(work)) and work != output / DEFAULT_WORK:
        problems.append(f"work_dir: {work} and output_dir {output} lie in one another; take a folder apart")
    return problems


def _searched(pattern: str) -> str | None:
    """The folder of which everything below may be input, also what is not there yet."""
    if is_remote(pattern):
        with suppress(DataPrepError):  # of a storage that cannot be used, as listing it has told
            before, wildcards, _ = full_url(pattern).partition("**")
            return before.rpartition("/")[0] if wildcards else before
        return None
    path = Path(local_path(pattern)).expanduser()
    return str(search_root(path)) if path.is_dir() or "**" in path.parts else None


def _touch(place: str, path: str) -> bool:
    """Is one of the two inside the other, or the same? The path as it is written, and where its links lead."""
    if is_remote(place) or is_remote(path):
        return f"{place}/".startswith(f"{path}/") or f"{path}/".startswith(f"{place}/")
    others = (Path(os.path.abspath(path)), Path(os.path.realpath(path)))
    return any(Path(place).is_relative_to(other) or other.is_relative_to(place) for other in others)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two identities, one line each, at most a dozen."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    lines = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            shown = [repr(side[key]) if key in side else "absent" for side in (before, after)]
            lines.append(f"  {key}: was {shown[0]}, is now {shown[1]}")
    return lines if len(lines) <= 12 else [*lines[:12], f"  … and {len(lines) - 12} more"]


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        for number, value in enumerate(tree):
            yield from _flatten(value, f"{prefix}.{number}")
    else:
        yield prefix, tree


def _task_bytes(config: PrepareConfig, files: list[InputFile]) -> int:
    if config.resources.task_bytes:
        return config.resources.task_bytes
    total = sum(file.size_bytes for file in files)
    return min(max(total // _TASKS_PER_RUN, _MIN_TASK_BYTES), _MAX_TASK_BYTES)


def _cut_tasks(files: list[InputFile], task_bytes: int) -> Iterator[list[tuple[int, int, int | None]]]:
    """Group blocks of files, in order, into tasks of about `task_bytes` of text; files that cannot be split stay
    whole.
    """
    task: list[tuple[int, int, int | None]] = []
    filled = 0
    for number, file in enumerate(files):
        blocks = file.blocks
        block_bytes = BLOCK_BYTES if file.format != "parquet" else file.estimated_text_bytes // (blocks or 1)
        step = max(1, task_bytes // max(1, block_bytes))
        parts = (
            [(0, None)] if blocks is None else [(i, min(i + step, blocks)) for i in range(0, blocks, step)]
        )
        for first, stop in parts:
            disk_bytes = segment_bytes(Segment(number, file, "", first, stop))
            size = disk_bytes * file.estimated_text_bytes // max(1, file.size_bytes)
            if task and filled + size > task_bytes:
                yield task
                task, filled = [], 0
            task.append((number, first, stop))
            filled += size
    if task:
        yield task
