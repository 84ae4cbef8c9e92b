"""Programs that find torch, DeepSpeed and the trainer imported: forked from a process that imported them once.

To import takes five seconds of a core, which is longer than what most programs of the tests then do.
    python tests/warm.py RANKS PORT PROGRAM [ARGUMENT …]      PROGRAM: a file, or -c CODE
is a program's ranks on this host as the deepspeed launcher starts them: when one fails the others are ended and its
exit status becomes this program's; SIGTERM, SIGINT and the like are handed on. RANKS 0 is the program alone, without
the variables of a launcher. The ranks have this process's environment, folder and streams, and are killed when it is
gone. What is read when torch and DeepSpeed are imported (OMP_NUM_THREADS, DS_ACCELERATOR) is that of `environment()`.

The launcher itself, and python itself, are used where a test is about more than what the ranks compute: the demo, the
README's commands, and a few runs of tests/test_pretrain.py and test_pretrain_failures.py.
"""

import contextlib
import functools
import gc
import importlib
import io
import json
import os
import runpy
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, cast

GRACE_SECONDS = 10.0
HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SERVER = "SUTRAIN_TESTS_WARM"
"""Variable with the name of the server's socket (an abstract one, which leaves no file)."""


# ----------------------------------------------------------------------------------------------- for the tests


TRAINER = ("deepspeed", "sutrain.pretrain")


def start(
    *program: object,
    ranks: int = 0,
    variables: dict[str, str] | None = None,
    imported: tuple[str, ...] = TRAINER,
    **popen: Any,
) -> subprocess.Popen[str]:
    """The program in so many ranks (0: alone), its folder the repository's, its two streams one pipe."""
    from tests.conftest import ROOT, environment

    words = [sys.executable, "-S", __file__, str(ranks), str(free_port()), *map(str, program)]  # -S: no .venv
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    own = environment(**{SERVER: _server(imported), **(variables or {})})
    return subprocess.Popen(words, **{"cwd": ROOT, "env": own, **streams, **popen})


def run(*program: object, seconds: float = 200, **settings: Any) -> subprocess.CompletedProcess[str]:
    """The same, until it ends; what it said is `stdout`."""
    with start(*program, **settings) as process:
        try:
            output = process.communicate(timeout=seconds)[0]
        finally:
            process.kill()
    return subprocess.CompletedProcess(program, process.returncode, output)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@functools.cache
def _server(imported: tuple[str, ...]) -> str:
    from tests.conftest import ROOT, environment

    name = f"sutrain-tests-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        program = [sys.executable, "-u", "-m", "tests.warm", str(listener.fileno()), *imported]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        # It lives as long as its standard input is open, which is as long as this process lives.
        process = subprocess.Popen(
            program, cwd=ROOT, env=environment(PYTHONPATH=path), stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
        )  # fmt: skip
    _servers.append(process)
    return name


_servers: list[subprocess.Popen[bytes]] = []


# ------------------------------------------------------------------------------------ what stands for the ranks


def ask_for_ranks(ranks: int, port: str, program: list[str]) -> int:
    """Have the server fork them and wait until they end; the exit status."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDED_ON)  # until it is known to whom
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.connect(f"\0{os.environ[SERVER]}")
    for rank in range(max(ranks, 1)):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
        own |= {"CROSS_RANK": "0", "CROSS_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = dict(os.environ) | (own if ranks else {})
        wanted = json.dumps({"program": program, "environment": variables, "folder": os.getcwd()}).encode()
        socket.send_fds(server, [len(wanted).to_bytes(4, "big")], [0, 1, 2])
        server.sendall(wanted)
    running: set[int] = set()

    def hand_on(number: int, _: object = None) -> None:
        for pid in list(running):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    for number in HANDED_ON:
        signal.signal(number, hand_on)
    signal.signal(signal.SIGALRM, lambda *_: hand_on(signal.SIGKILL))
    begun = failed = 0
    for line in server.makefile():  # a process that begins, and "process status" when it ends
        pid, *status = map(int, line.split())
        if not status:
            begun += 1
            running.add(pid)
        else:
            running.discard(pid)
            failed = failed or status[0]
        if begun < max(ranks, 1):
            continue
        if (status and status[0]) or (not status and failed):
            hand_on(signal.SIGTERM)
            signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDED_ON)
        if not running:
            return failed if failed >= 0 else 128 - failed
    hand_on(signal.SIGKILL)
    sys.exit("the process that forks the ranks is gone")


# --------------------------------------------------------------------------------------------------- the server


class Server:
    """Forks what is asked for, says how it ended, and kills what nobody waits for any more."""

    def __init__(self, listener: socket.socket):
        self.listener = listener
        self.selector = selectors.DefaultSelector()
        self.selector.register(listener, selectors.EVENT_READ, self.accept)
        self.selector.register(0, selectors.EVENT_READ, self.end)
        self.ranks: dict[int, tuple[int, socket.socket]] = {}  # pid: its file descriptor, who asked for it
        self.forked: list[str] | None = None

    def serve(self) -> list[str]:
        """Return only in a forked process, the program that it shall be."""
        while self.forked is None:
            for key, _ in self.selector.select():
                key.data()
                if self.forked is not None:
                    break
        return self.forked

    def accept(self) -> None:
        connection, _ = self.listener.accept()
        self.selector.register(connection, selectors.EVENT_READ, functools.partial(self.answer, connection))

    def answer(self, connection: socket.socket) -> None:
        size, streams = b"", []
        with contextlib.suppress(ConnectionError):  # it was killed before it read an answer
            size, streams, _, _ = socket.recv_fds(connection, 4, 3)
        if not size:  # whoever asked is gone
            self.kill(connection)
            self.selector.unregister(connection)
            connection.close()
            return
        wanted = json.loads(connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
        pid = os.fork()
        if pid == 0:
            self.become(streams, **wanted)
            return
        for stream in streams:
            os.close(stream)
        handle = os.pidfd_open(pid)
        self.ranks[pid] = handle, connection
        self.selector.register(handle, selectors.EVENT_READ, functools.partial(self.bury, pid))
        self.say(connection, f"{pid}\n")

    def become(
        self, streams: list[int], program: list[str], environment: dict[str, str], folder: str
    ) -> None:
        self.selector.close()
        self.listener.close()
        for handle, connection in self.ranks.values():
            os.close(handle)
            connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.forked = program

    def bury(self, pid: int) -> None:
        handle, connection = self.ranks.pop(pid)
        self.selector.unregister(handle)
        os.close(handle)
        self.say(connection, f"{pid} {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")

    def say(self, connection: socket.socket, line: str) -> None:
        with contextlib.suppress(OSError):
            connection.sendall(line.encode())

    def kill(self, connection: socket.socket | None = None) -> None:
        for pid, (_, asked) in self.ranks.items():
            if connection in (None, asked):
                os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        self.kill()
        os._exit(0)


def be(program: list[str]) -> None:
    """As `python PROGRAM …` does it; what it raises ends this process as python would."""
    for stream in (sys.stdout, sys.stderr):  # the ranks share a pipe, and unbuffered a line is several writes
        cast(io.TextIOWrapper, stream).reconfigure(line_buffering=True, write_through=False)
    if program[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *program[2:]], ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(program[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv, sys.path[0] = program, str(Path(program[0]).resolve().parent)
        runpy.run_path(program[0], run_name="__main__")


def serve(listener: int, imported: list[str]) -> None:
    for name in imported:
        importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C of the terminal is for the tests
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, "a fork takes no thread with it"
    gc.collect()
    gc.freeze()  # or each fork's first collection would copy the pages of all that was imported
    be(Server(socket.socket(fileno=listener)).serve())


if __name__ == "__main__":
    if SERVER not in os.environ:
        serve(int(sys.argv[1]), sys.argv[2:])
    else:
        sys.exit(ask_for_ranks(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
