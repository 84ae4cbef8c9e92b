"""Before a run on a cluster: does every node see the storage that the tasks will read and write?

The driver writes a token where output and intermediate files will go, and a task on every node must read it and find
the first input file of every corpus. A folder that exists on each node but is not shared would otherwise be noticed
hours later, as results that are missing.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DataPrepError
from .files import TEMPORARY_MARK, disk_errors
from .places import open_to_read


@dataclass(frozen=True)
class StorageTask:
    """Token files with the word that stands in them, and input files that must be there."""

    tokens: tuple[Any, ...]
    word: str
    inputs: tuple[str, ...]


def check_storage(
    on_every_node: Callable[[Callable[[Any], dict[str, Any]], Any], list[tuple[str, dict[str, Any] | str]]],
    places: Sequence[Path],
    inputs: Sequence[str],
) -> None:
    """Raises DataPrepError with a line for each node that does not see what the driver wrote or the input."""
    word = uuid.uuid4().hex
    tokens = tuple(place / f".seen{TEMPORARY_MARK}{word[:12]}" for place in dict.fromkeys(places))
    try:
        for token in tokens:
            with disk_errors(token):
                token.parent.mkdir(parents=True, exist_ok=True)
                token.write_text(word)
        found = on_every_node(look, StorageTask(tokens, word, tuple(inputs)))
    finally:
        for token in tokens:
            with suppress(OSError):
                token.unlink()
    problems = [
        f"node {node}: {result if isinstance(result, str) else ', '.join(result['problems'])}"
        for node, result in found
        if isinstance(result, str) or result["problems"]
    ]
    if problems:
        raise DataPrepError(
            "not every node of the cluster sees the data; mount it at the same path everywhere, or use a URL "
            "(s3://…):\n" + "\n".join(problems)
        )


def look(task: StorageTask) -> dict[str, Any]:
    """What this node does not see, a phrase for each."""
    problems = []
    for token in task.tokens:
        try:
            if token.read_text() != task.word:
                problems.append(f"{token.parent} is another folder than the driver's")
        except OSError:
            problems.append(f"does not see what the driver wrote to {token.parent}")
    for path in task.inputs:
        try:
            with open_to_read(path):
                pass
        except (OSError, ValueError):
            problems.append(f"cannot read {path}")
    return {"problems": problems, "host": socket.gethostname(), "process": os.getpid()}
