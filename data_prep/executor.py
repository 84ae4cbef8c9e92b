"""Running tasks: a pool of local processes, or Ray tasks on a cluster. The task functions are the same.

A task gets a small description, reads and writes files itself, and returns a small dict: bulk data never
passes through Ray's object store. Only a window of tasks is in flight. Tasks may be repeated at any time
without harm.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import islice
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from typing import Any, Protocol

from .errors import DataPrepError
from .files import set_fence

_NODE_SECONDS = 120  # for a node to start a worker and look at its storage
_JOIN_SECONDS = 60  # for a node to join on which a task fits
_ASK_SECONDS = 70  # without a word from a task's process: it is asked for a sign of life
_ANSWER_SECONDS = 20  # that it has to answer
_LOOK_SECONDS = 5.0  # between two looks at which nodes there are
_TASK_BYTES = 512 * 1024**2  # memory of a task for which nobody says more
Task = Callable[[Any], dict[str, Any]]
Finished = Callable[[Any], dict[str, Any] | None]  # the result of a task that somebody has finished already


class Executor(Protocol):
    """Runs a function over descriptions and yields the results as they finish, in any order."""

    name: str
    workers: int

    def run(
        self,
        function: Task,
        descriptions: Sequence[Any],
        finished: Finished | None = None,
        memory_bytes: int | None = None,
        apart: bool = False,
    ) -> Iterator[dict[str, Any]]: ...

    def close(self) -> None: ...


def usable_cores() -> int:
    """Cores this process may use (affinity, and the quota of a container where there is one)."""
    cores = len(os.sched_getaffinity(0))
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def make_executor(
    name: str,
    workers: int | None,
    fence: Any = None,
    memory_bytes: int = _TASK_BYTES,
    say: Callable[[str], None] = print,
) -> Executor:
    """`local` or `ray`, whose tasks write by the right of `fence` (lease.Fence) and take `memory_bytes` each, so that
    Ray places only what fits. Raises DataPrepError when no Ray cluster can be reached, or no task fits its nodes.
    """
    if name == "ray":
        return RayExecutor(workers, fence, memory_bytes, say)
    return LocalExecutor(workers or usable_cores(), fence)


def call(
    fence: Any,
    function: Task,
    description: Any,
    finished: Finished | None = None,
    before: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Run a task in a worker by the right of its run, unless it is finished: Ray runs a task again whose worker died
    after it had done all but tell.
    """
    if before is not None:
        before()
    set_fence(fence)
    found = finished(description) if finished is not None else None
    return function(description) if found is None else found


class LocalExecutor:
    """Spawned processes on this machine; with one worker, this process itself, but for tasks that go `apart`."""

    name = "local"

    def __init__(self, workers: int, fence: Any = None) -> None:
        self.workers, self._fence = workers, fence
        self._pool: ProcessPoolExecutor | None = None
        self._leash: Connection | None = None  # workers end when it is closed
        # A server process imports once and then forks; it has no threads, so that is safe. It begins at once, and
        # imports while this process looks at the tokenizer and the disk.
        forkserver.set_forkserver_preload(["data_prep.gather", "data_prep.scatter"])
        if workers > 1:
            _start_server()

    def run(
        self,
        function: Task,
        descriptions: Sequence[Any],
        finished: Finished | None = None,
        memory_bytes: int | None = None,
        apart: bool = False,
    ) -> Iterator[dict[str, Any]]:
        """Raises what a task raises, DataPrepError when a worker process dies. Asks nobody what is `finished`, and
        leaves memory to whoever chose the workers. `apart`: never in this process, which could not be interrupted
        while a library is at work for minutes.
        """
        if not apart and (self.workers == 1 or len(descriptions) == 1):
            yield from map(function, descriptions)
            return
        if self._pool is None:
            _start_server()
            context = multiprocessing.get_context("forkserver")
            end, self._leash = context.Pipe(duplex=False)
            self._pool = ProcessPoolExecutor(
                self.workers, context, initializer=_begin_worker, initargs=(end,)
            )
        waiting = iter(descriptions)
        try:
            running = {
                self._pool.submit(call, self._fence, function, task)
                for task in islice(waiting, 2 * self.workers)
            }
            while running:
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    yield future.result()
                    running |= {
                        self._pool.submit(call, self._fence, function, task) for task in islice(waiting, 1)
                    }
        except BrokenProcessPool:
            raise DataPrepError(
                "a worker process was killed, most often for want of memory: lower resources.workers or "
                "resources.worker_memory_bytes, then run the same command again; finished tasks are kept"
            ) from None
        except KeyboardInterrupt:
            if self._leash is not None:
                self._leash.close()  # a task may take minutes, and may be given up at any time
            raise

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = self._leash = None


class RayExecutor:
    """Plain Ray tasks with one CPU and their memory each on the cluster that this process belongs to (RAY_ADDRESS, or
    the one here). Nodes may come and go: `workers` is how many tasks run at a time now.
    """

    name = "ray"

    def __init__(
        self,
        workers: int | None,
        fence: Any = None,
        memory_bytes: int = _TASK_BYTES,
        say: Callable[[str], None] = print,
    ) -> None:
        _choose_authentication()
        # A host that is cut off or without power ends no connection: the tasks on it would be waited for until Ray
        # asks whether it is there, after 300 s, and then 120 s for the answer, although its node is known to be dead
        # within a minute. Ray's servers take a question a minute, and hang up on who asks more often.
        os.environ.setdefault("RAY_grpc_client_keepalive_time_ms", str(_ASK_SECONDS * 1000))
        os.environ.setdefault("RAY_grpc_client_keepalive_timeout_ms", str(_ANSWER_SECONDS * 1000))
        import ray

        self._ray, self._fence = ray, fence
        self.before: Callable[[], None] | None = None  # what a process does before each task
        self._wanted, self._memory_bytes, self._say = workers, memory_bytes, say
        if not ray.is_initialized():
            address = os.environ.get("RAY_ADDRESS", "auto")
            try:
                _knock(address)
                ray.init(address=address, log_to_driver=False)
            except (OSError, ValueError, RuntimeError) as error:
                raise DataPrepError(
                    f"no Ray cluster can be reached at {address} ({' '.join(str(error).split())}): start one "
                    "with `ray start --head`, set RAY_ADDRESS, or use --executor=local"
                ) from None
        self._told = ""
        self.await_room(memory_bytes)
        self.workers = self._room(memory_bytes)

    def run(
        self,
        function: Task,
        descriptions: Sequence[Any],
        finished: Finished | None = None,
        memory_bytes: int | None = None,
        apart: bool = False,
    ) -> Iterator[dict[str, Any]]:
        """Raises what a task raises. A task that is repeated because its worker died is asked for with `finished`. All
        tasks run apart.
        """
        ray, memory = self._ray, memory_bytes or self._memory_bytes
        # By the name of the function, as Ray's dashboard and `ray summary tasks` show it.
        remote = ray.remote(num_cpus=1, memory=memory, max_retries=3)(call).options(name=function.__name__)
        waiting, looked = iter(descriptions), -math.inf
        running: list[Any] = []
        if descriptions:
            self.await_room(memory)
        while True:
            if time.monotonic() - looked > _LOOK_SECONDS:
                window, looked = self._room(memory) + 2, time.monotonic()
            free = max(0, window - len(running))
            running += [
                remote.remote(self._fence, function, task, finished, self.before)
                for task in islice(waiting, free)
            ]
            if not running:
                return
            ended, running = ray.wait(running, num_returns=1, timeout=_LOOK_SECONDS)
            yield from [self._result(reference, running) for reference in ended]

    def _result(self, reference: Any, others: list[Any]) -> dict[str, Any]:
        ray = self._ray
        try:
            result: dict[str, Any] = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            for other in others:
                ray.cancel(other)
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except ray.exceptions.RayError as error:
            raise DataPrepError(
                f"a Ray task died ({_in_short(error)}); run the same command again to go on"
            ) from None
        return result

    def _nodes(self) -> list[dict[str, Any]]:
        """The nodes that run tasks."""
        return [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]

    def _room(self, memory_bytes: int) -> int:
        """How many tasks the cluster can run at a time by now; says so where it is news."""
        places = [
            min(int(node["Resources"]["CPU"]), int(node["Resources"].get("memory", 0) // memory_bytes))
            for node in self._nodes()
        ]
        room = max(1, min(self._wanted or sum(places), sum(places)))
        if memory_bytes == self._memory_bytes and any(places):
            self.workers = room
            self._tell(f"{room} worker(s) on {sum(map(bool, places))} node(s) of the Ray cluster")
        return room

    def await_room(self, memory_bytes: int) -> None:
        """Raises DataPrepError when there are nodes, but a task fits none of them, and none comes on which it does.
        Where there is none at all, tasks wait for the first.
        """
        deadline = time.monotonic() + _JOIN_SECONDS
        while True:
            most = max((node["Resources"].get("memory", 0) for node in self._nodes()), default=memory_bytes)
            if most >= memory_bytes:
                return
            told = (
                f"a task takes {memory_bytes:,} bytes of memory, and no node of the Ray cluster has more than "
                f"{most:,.0f}"
            )
            if time.monotonic() > deadline:
                raise DataPrepError(
                    f"{told}: lower resources.worker_memory_bytes (or, to train a tokenizer, its sample_bytes), or "
                    "start nodes with more (`ray start --memory=BYTES`)"
                )
            self._tell(f"{told}; waiting {_JOIN_SECONDS:.0f} s for a larger one")
            time.sleep(min(1.0, _JOIN_SECONDS))

    def _tell(self, news: str) -> None:
        if news != self._told:
            self._told = news
            self._say(news)

    def on_every_node(self, function: Task, description: Any) -> list[tuple[str, dict[str, Any] | str]]:
        """Run a function once on every node that runs tasks; (its name, the result or what went wrong)."""
        ray = self._ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        waiting = []
        for node in self._nodes():
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            remote = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(call)
            name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:8]})"
            waiting.append((name, remote.remote(None, function, description)))
        results: list[tuple[str, dict[str, Any] | str]] = []
        for name, reference in waiting:
            try:
                results.append((name, ray.get(reference, timeout=_NODE_SECONDS)))
            except Exception as error:  # whatever keeps a node from running a task is what there is to tell
                results.append((name, _in_short(error)))
        return results

    def close(self) -> None:
        """The cluster belongs to whoever started it; only the connection of this process ends with the
        process.
        """


def _in_short(error: Exception) -> str:
    """What an exception says, in one line: of a long one, such as a trace, how it begins and how it ends."""
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else f"{text[:100]} … {text[-300:]}"


def _choose_authentication() -> None:
    """Ray's default has changed between versions, so both sides say what they mean: RAY_AUTH_MODE where it is set,
    else token where this process has one, else disabled. `ray start` must be given the same (docs/data_prep.md).
    """
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")
    has_token = bool(os.environ.get("RAY_AUTH_TOKEN")) or os.path.exists(path)
    os.environ.setdefault("RAY_AUTH_MODE", "token" if has_token else "disabled")


def _knock(address: str) -> None:
    """Raises OSError when nobody listens at host:port; `ray.init` itself would try for many minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        with socket.create_connection((host, int(port)), timeout=10):
            pass


def _start_server() -> None:
    """Start the process that workers are forked from, unless it runs. An interrupt from the keyboard reaches the whole
    group, and is for this process alone to act on: the others inherit that it is blocked.
    """
    resource_tracker.ensure_running()  # which the server needs, and whose own start would lift the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    except OSError as error:
        if "path too long" not in str(error):
            raise
        raise DataPrepError(
            f"TMPDIR: {tempfile.gettempdir()} is too long a path for the sockets of worker processes, which may have "
            "about a hundred characters; set TMPDIR to a shorter one"
        ) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(end: Connection) -> None:
    """A worker ends when its parent lets go of the other end of a pipe, also by being killed; it would wait for tasks
    for ever.
    """

    def watch() -> None:
        with suppress(EOFError, OSError):
            end.recv_bytes()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
