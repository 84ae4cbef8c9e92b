"""DeepSpeed's shared-memory communication extension, built once per environment: `python -m sutrain.build_extension`.

On a CPU DeepSpeed compiles it when the first process group starts (about a minute), and again asks the compiler's
files at every later start. A process killed while compiling leaves a lock file for which every later start waits for
ever. So it is built here, in a process of its own with a time limit, under a lock of the operating system that dies
with its owners, this process and the building one: whoever holds it knows that a lock file found is stale, and that
nobody else writes these files. The building process ends, compilers and all, when the one that started it is gone.
What was built is loaded directly, without compiler, lock or child process. Where building hangs, training goes on with
gloo alone, and says so.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

NAME = "deepspeed_shm_comm"
STAMP = "built.json"
TIMED_OUT = "timed_out.json"
# 40 seconds on two idle cores; eight times that is a hang, not a slow machine.
TIME_LIMIT_SECONDS = 320


class ExtensionError(RuntimeError):
    """The extension cannot be built; the message says what is missing."""


class ExtensionTimeoutError(ExtensionError):
    """Building did not end within the limit, and was stopped."""


def prepare_environment() -> Path:
    """Point torch at the environment's own extension folder and at its ninja, and DeepSpeed at the CPU where there is
    no accelerator; call before importing DeepSpeed. Returns the extension folder."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    binaries = str(Path(sys.executable).parent)
    if binaries not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([binaries, os.environ.get("PATH", "")])
    return Path(os.environ["TORCH_EXTENSIONS_DIR"])


def build_extension(time_limit_seconds: float = TIME_LIMIT_SECONDS, *, try_again: bool = False) -> None:
    """Build (or find built) the extension where DeepSpeed runs on the CPU, and have DeepSpeed use it; elsewhere do
    nothing. Where building did not end within the limit, warn and have DeepSpeed do without, now and at later starts,
    until `try_again` is asked for.

    Raises ExtensionError without a compiler or where compiling fails.
    """
    folder = prepare_environment() / NAME
    from deepspeed.accelerator import get_accelerator

    if (
        get_accelerator().device_name() != "cpu"
        or get_accelerator().create_op_builder("ShareMemCommBuilder") is None
    ):
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _only_one(folder.parent / ".building", time_limit_seconds) as lock:
            if not _stamped(folder / STAMP):
                if _stamped(folder / TIMED_OUT) and not try_again:
                    raise ExtensionTimeoutError(
                        "building DeepSpeed's communication extension timed out before"
                    )
                (folder / "lock").unlink(missing_ok=True)
                _build_in_a_child(folder, time_limit_seconds, lock)
    except ExtensionTimeoutError as error:
        print(
            f"warning: {error}; going on without it: reductions use gloo alone", file=sys.stderr, flush=True
        )
        _do_without()
        return
    _use(folder)


@contextlib.contextmanager
def _only_one(path: Path, time_limit_seconds: float) -> Iterator[int]:
    """Hold the lock `path`, which the system frees when all processes with the descriptor that is yielded are dead.

    Raises ExtensionTimeoutError where another process holds it for longer than a build may take.
    """
    deadline = time.monotonic() + time_limit_seconds + 10
    with path.open("w") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ExtensionTimeoutError(f"another process holds {path} and does not end") from None
                time.sleep(0.2)
        yield handle.fileno()


def _stamped(path: Path) -> bool:
    """Whether `path` was written for this torch, this DeepSpeed and this processor."""
    try:
        return bool(json.loads(path.read_text()) == _built_for())
    except (OSError, ValueError):
        return False


def _built_for() -> dict[str, str]:
    """What the compiled code depends on: it is compiled with -march=native."""
    import deepspeed

    flags = ""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return {
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor_flags_sha256": hashlib.sha256(flags.encode()).hexdigest(),
    }


def _build_in_a_child(folder: Path, time_limit_seconds: float, lock: int) -> None:
    """Compile in a process group of its own, so that all of it can be stopped; leave the stamp when it went well.
    The child holds `lock` too: no other build begins before it has ended, even when this process is killed.

    Raises ExtensionError without a compiler or where compiling fails, ExtensionTimeoutError past the limit.
    """
    if not shutil.which("g++"):
        raise ExtensionError("no C++ compiler: DeepSpeed needs g++ on a CPU; sudo apt-get install g++")
    # The child prints where it stands shortly before it is stopped: a hang that nobody can see is never mended.
    program = (
        "import faulthandler, os, signal, threading, time\n"
        f"faulthandler.dump_traceback_later({max(time_limit_seconds - 2, 0.5)})\n"
        "def end_with_parent():\n"
        f"    while os.getppid() == {os.getpid()}:\n"
        "        time.sleep(0.2)\n"
        "    os.killpg(0, signal.SIGKILL)\n"
        "threading.Thread(target=end_with_parent, daemon=True).start()\n"
        "from deepspeed.accelerator import get_accelerator\n"
        "get_accelerator().create_op_builder('ShareMemCommBuilder').load(verbose=False)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        pass_fds=(lock,),
    )
    try:
        output, _ = child.communicate(timeout=time_limit_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        output, _ = child.communicate()
        print(output, file=sys.stderr, flush=True)
        (folder / TIMED_OUT).write_text(json.dumps(_built_for()))
        raise ExtensionTimeoutError(
            f"building DeepSpeed's communication extension did not end within {time_limit_seconds:.0f} s"
            f" (above: where it stood)"
        ) from None
    except BaseException:  # Ctrl-C: the child is in another group and would go on
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        raise
    if child.returncode < 0:
        raise ExtensionError(
            f"building DeepSpeed's communication extension was ended by signal {-child.returncode} "
            "(9: often too little memory); start again"
        )
    if child.returncode:
        lines = [line for line in output.splitlines() if "error" in line.lower()] or output.splitlines()[-1:]
        reason = " ".join(" ".join(lines).split())[:400]
        raise ExtensionError(f"DeepSpeed's communication extension cannot be built: {reason}")
    (folder / STAMP).write_text(json.dumps(_built_for()))


def _use(folder: Path) -> None:
    """Load what was built and hand it to DeepSpeed, whose own loading would ask compiler and processor once more."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    if NAME in OpBuilder._loaded_ops:
        return
    spec = importlib.util.spec_from_file_location(NAME, folder / f"{NAME}.so")
    if spec is None or spec.loader is None:
        raise ExtensionError(
            f"{folder / f'{NAME}.so'} is no Python extension; remove the folder to build it anew"
        )
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ExtensionError(f"{error}; remove {folder} to build it anew") from error
    OpBuilder._loaded_ops[NAME] = module


def start_communication(backend: str | None) -> None:
    """deepspeed.init_distributed, after which the extension's shared memory (66 MiB a rank) has no name any more:
    it is freed with the last process that maps it, however that ends. DeepSpeed removes it never.

    Call it after `prepare_environment`, which DeepSpeed reads while it is imported."""
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    # DeepSpeed calls functions that torch renames; once a step and rank is too often to hear of it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with contextlib.redirect_stdout(None):  # what it prints has no switch
        deepspeed.init_distributed(dist_backend=backend)
    if backend != "gloo":
        return
    torch.distributed.barrier()  # every rank has opened what the others made
    name = "_".join(os.environ.get(key, "") for key in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{name}").unlink(missing_ok=True)


def _do_without() -> None:
    """DeepSpeed asks this table before it loads the extension."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__[NAME] = False


if __name__ == "__main__":
    # Should anything hang all the same, the place is shown.
    faulthandler.dump_traceback_later(TIME_LIMIT_SECONDS + 30, repeat=True)
    try:
        build_extension(try_again=True)
    except ExtensionError as error:
        sys.exit(f"error: {error}")
