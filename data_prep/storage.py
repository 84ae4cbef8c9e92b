"""Does every node of a cluster see the storage that the tasks will read and write, and has it the driver's tools?

The driver writes a token where output and intermediate files will go, and a task on every node must read it, find the
first input file of every corpus, and have the versions of what decides bytes. A folder that exists on each node but is
not shared would otherwise be noticed hours later, as results that are missing, and another version of a tool never. The
tokens stay as long as the run: of a node that joins later, every process is asked the same before its first task.
"""

from __future__ import annotations

import hashlib
import os
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

from .clean import function_identity
from .errors import DataPrepError
from .files import TEMPORARY_MARK, disk_errors
from .places import open_to_read
from .plan import Plan, tool_versions
from .words import segmenter_identity

TOKEN = ".seen"
_ADVICE = (
    "mount the data at the same path everywhere, or use a URL (s3://…), and install the same versions (the code comes "
    "with a Ray job that is sent with --working-dir)"
)


class Cluster(Protocol):
    """What is asked of executor.RayExecutor: to run a function on every node, and one `before` each task."""

    before: Callable[[], None] | None

    def on_every_node(
        self, function: Callable[[Any], dict[str, Any]], description: Any
    ) -> list[tuple[str, dict[str, Any] | str]]: ...


@dataclass(frozen=True)
class StorageTask:
    """Token files with the word that stands in them, input files that must be there, and the driver's `tools_of` these
    word segmenter and cleaning functions.
    """

    tokens: tuple[Any, ...]
    word: str
    inputs: tuple[str, ...]
    segmenter: str
    functions: tuple[str, ...]
    tools: tuple[tuple[str, str], ...]


@contextmanager
def seen_by_every_node(cluster: Cluster, plan: Plan) -> Iterator[None]:
    """Raises DataPrepError with a line for each node that does not see what the driver wrote, or the input, or has
    other tools; while the block runs, so does the first task of a process on a node that came later.
    """
    config = plan.config
    firsts = {file.corpus: file.path for file in reversed(plan.files)}
    word, tools = uuid.uuid4().hex, (config.words.segmenter, tuple(config.cleaning.functions))
    places = dict.fromkeys((config.output_path, plan.work_path))
    tokens = tuple(place / f"{TOKEN}{TEMPORARY_MARK}{word[:12]}" for place in places)
    task = StorageTask(tokens, word, tuple(firsts.values()), *tools, tools_of(*tools))
    try:
        for token in tokens:
            with disk_errors(token):
                token.parent.mkdir(parents=True, exist_ok=True)
                token.write_text(word)
        refuse_blind_nodes(cluster.on_every_node(look, task))
        cluster.before = partial(refuse_blind_process, task)
        yield
    finally:
        for token in tokens:
            with suppress(OSError):
                token.unlink()


def refuse_blind_nodes(found: Sequence[tuple[str, dict[str, Any] | str]]) -> None:
    """found: for each node its name, and what `look` found there, or why it could not look."""
    problems = [
        f"node {node}: {result if isinstance(result, str) else ', '.join(result['problems'])}"
        for node, result in found
        if isinstance(result, str) or result["problems"]
    ]
    if problems:
        lines = "\n".join(problems)
        raise DataPrepError(f"not every node of the cluster sees what the driver sees; {_ADVICE}:\n{lines}")


@lru_cache(maxsize=1)
def refuse_blind_process(task: StorageTask) -> None:
    """Raises DataPrepError where the node of this process, which may have joined when the run was at work, does not see
    what the driver sees. Asks once, unless it raises.
    """
    try:
        problems = ", ".join(look(task)["problems"])
    except Exception as error:  # whatever it is, it is the node's
        problems = f"{type(error).__name__}: {error}"
    if problems:
        raise DataPrepError(
            f"node {socket.gethostname()}, which got a task, does not see what the driver sees ({problems}); "
            f"{_ADVICE}, or take it from the cluster; then run the same command again: finished tasks are kept"
        )


def look(task: StorageTask) -> dict[str, Any]:
    """What this node does not see or has otherwise, a phrase for each."""
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
    here = dict(tools_of(task.segmenter, task.functions))
    problems += [
        f"has {here.get(name)} for {name}, the driver {version}"
        for name, version in task.tools
        if here.get(name) != version
    ]
    return {"problems": problems, "host": socket.gethostname(), "process": os.getpid()}


def tools_of(segmenter: str, functions: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """What decides bytes beside the input and the configuration, as this process has it: by name the version, or a
    hash.
    """
    code = {"the code of data_prep": _own_code()}  # a driver that is no job brings none
    words = {f"words.{name}": value for name, value in segmenter_identity(segmenter).items()}
    sources = {path: function_identity(path) for path in functions}
    return tuple((tool_versions() | words | sources | code).items())


@lru_cache(maxsize=1)
def _own_code() -> str:
    """A hash of the sources of this package."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
