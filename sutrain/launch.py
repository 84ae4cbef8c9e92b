"""What a process of a run needs before and around training: its device, its surroundings, and clear failures."""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import importlib.metadata
import os
import platform
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
import torch.distributed as dist

from data_prep.config_file import ConfigError, field_help, load_config, split_arguments
from data_prep.shards import Manifest, ShardError
from sutrain.build_extension import ExtensionError
from sutrain.checkpoint import AllDamagedError, CheckpointError
from sutrain.config import PretrainConfig
from sutrain.models.configuration import EncoderConfig
from sutrain.monitor.acting import TrainingStoppedError
from sutrain.optim.kernels import KernelError
from sutrain.optim.state import StateError

EXIT_FAILURE, EXIT_USER_ERROR, EXIT_STOPPED = 1, 2, 3
"""Started again, a run that failed may go on (see supervise.py); one that is wrong, or that stopped itself because it
was told to (acting.stop_after_broken_steps), would only do the same again."""
_PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "numpy",
    "safetensors",
    "sentencepiece",
    "ray",
    "webdataset",
)


def local_device(deterministic: bool = False) -> torch.device:
    """The device of this rank; on a CPU the cores are shared out among the ranks of this host.

    deterministic: have torch use kernels that add up in a fixed order, and fail where it has none. It must be said
    before cuBLAS is first used.
    Raises ConfigError when the launcher started more ranks than there are accelerators.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_ranks = ranks_of_this_host()
    if torch.accelerator.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        count = torch.accelerator.device_count()
        if local_ranks > count:
            raise ConfigError(
                f"{local_ranks} ranks on this host but {count} accelerators: start with --num_gpus {count}"
            )
        torch.accelerator.set_device_index(local_rank)
        accelerator = torch.accelerator.current_accelerator()
        assert accelerator is not None
        return torch.device(accelerator.type, local_rank)
    cores = len(os.sched_getaffinity(0))
    if local_ranks > 4 * cores:
        raise ConfigError(f"{local_ranks} ranks on {cores} CPU cores; start with --num_gpus {cores}")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores // local_ranks))
    return torch.device("cpu")


def ranks_of_this_host() -> int:
    """How many ranks the launcher says it starts here: torchrun in LOCAL_WORLD_SIZE, DeepSpeed's in LOCAL_SIZE."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def parse_arguments(
    arguments: list[str],
    program: str = "pretrain.py",
    description: str = "Pretrain a model on prepared shards. Started again, a run goes on from its last checkpoint.",
) -> PretrainConfig:
    """The configuration a command line asks for; exits with one line a mistake when it is wrong."""
    overrides, rest = split_arguments(arguments, "config", "local_rank")
    parser = argparse.ArgumentParser(
        prog=f"deepspeed --num_gpus N sutrain/{program}",
        description=description,
        epilog="every key of the configuration can be set with --section.key=value:\n"
        + field_help(PretrainConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", required=True, type=Path, help="YAML file, such as configs/pretrain/demo.yaml"
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher passes it
    options = parser.parse_args(rest)
    try:
        return load_config(PretrainConfig, options.config, overrides)
    except ConfigError as error:
        stop(str(error))


def join_alone() -> None:
    """Let a process that no launcher started (`python sutrain/pretrain.py …`) be a world of its own."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    os.environ.update({key: str(value) for key, value in alone.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def check_model_fits_data(model: EncoderConfig, manifest: Manifest, data_dir: Path) -> None:
    """Raises ConfigError, naming every difference, unless model and shards agree on vocabulary, rows and padding."""
    if manifest.config["shards"].get("content") == "text":
        raise ConfigError(
            f"data.dir: {data_dir} holds shuffled text, not rows of tokens; prepare it with shards.content: tokens"
        )
    expected = {
        "vocab_size": (manifest.vocab_size, "were made with a tokenizer of"),
        "max_row_tokens": (manifest.row_tokens, "have rows of"),
        "pad_token_id": (manifest.special_ids["[PAD]"], "use the padding id"),
    }
    problems = [
        f"model.{name}: {getattr(model, name)}, but the shards in {data_dir} {says} {value}; "
        f"set model.{name}={value}, or prepare other shards"
        for name, (value, says) in expected.items()
        if getattr(model, name) != value
    ]
    if problems:
        raise ConfigError("\n".join(problems))


@dataclass
class Requests:
    """What signals ask of this rank: to write a checkpoint and stop (SIGTERM, Ctrl-C), or to write one and go on
    (SIGUSR1). Signals only set these; the ranks act together (pretrain.py)."""

    stop: bool = False
    save: bool = False

    def listen(self) -> None:
        """Take the signals from now on; a second SIGINT (Ctrl-C) ends the process at once."""

        def interrupted(*_: Any) -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            self.stop = True

        signal.signal(signal.SIGINT, interrupted)
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stop", True))
        signal.signal(signal.SIGUSR1, lambda *_: setattr(self, "save", True))


def hold_run_folder(folder: Path) -> TextIO:
    """Take the run folder for this process; it is free again when the returned file is closed or the process ends.

    Raises ConfigError when another run holds it: two would overwrite each other's checkpoints.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ConfigError(
            f"{folder}: another run is writing there; stop it, or choose another run_dir"
        ) from None
    except OSError as error:
        lock.close()
        raise ConfigError(
            f"{folder}: its file system locks no files ({error.strerror}), by which two runs keep out of each other's "
            "way; mount it with locks (Lustre: -o flock), or choose another run_dir"
        ) from None
    return lock


def environment(world_size: int) -> dict[str, Any]:
    """Versions and machine, for environment.json."""
    accelerator = torch.accelerator.is_available()
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "accelerator": torch.cuda.get_device_name() if accelerator and torch.cuda.is_available() else None,
        "world_size": world_size,
        "command": sys.argv,
    }


_OF_ONE_RANK = (ShardError, CheckpointError, StateError, ExtensionError, KernelError)
"""Errors of reading this rank's part of data and state, and of building on this host."""


@contextlib.contextmanager
def clear_failures(training: Callable[[], bool]) -> Iterator[None]:
    """End this process with one clear line and the exit status that fits, for everything a user can mend. `training`:
    are the ranks past the checks at the start? Before that they find the same mistakes, and one line says them, except
    what only one may meet."""
    try:
        yield
    except TrainingStoppedError as error:
        stop(str(error), on_every_rank=True, status=EXIT_STOPPED)
    except (ValueError, ExtensionError, KernelError) as error:
        alone = training() or (isinstance(error, _OF_ONE_RANK) and not isinstance(error, AllDamagedError))
        stop(str(error), on_every_rank=alone, status=EXIT_FAILURE if training() else EXIT_USER_ERROR)
    except (MemoryError, OSError, RuntimeError) as error:
        advice = explain(error)
        if advice is None:
            raise
        stop(advice, on_every_rank=True, status=EXIT_FAILURE, at_once=isinstance(error, TimeoutError))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def explain(error: BaseException) -> str | None:
    """One line with a way out for failures of the machine that a user can mend; None for all others."""
    text = " ".join(str(error).split())
    if isinstance(error, TimeoutError) and not error.errno:  # our own: a message, not a number of the system
        return text
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in text:
        return f"out of memory: {text[:200]}; lower batch.micro_sequences (the global batch stays as it is)"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk of {error.filename or 'the run folder'}; make room and start again"
    if isinstance(error, BrokenPipeError):
        return "nobody reads the output any more (its pipe is closed); start again with the output in a file"
    if any(said in text for said in ("Connection closed by peer", "Connection reset", "Broken pipe")):
        return "another rank ended; its own message says why"
    if "EADDRINUSE" in text or "address already in use" in text:
        return "the launcher's port is in use by another run; start with: deepspeed --master_port PORT …"
    if isinstance(error, OSError):
        return f"{error.filename or 'file'}: {error.strerror or text}"
    return None


def stop(
    message: str, on_every_rank: bool = False, status: int = EXIT_USER_ERROR, at_once: bool = False
) -> NoReturn:
    """Print one error and exit. What every rank finds alike rank 0 says, and before the ranks have met the first rank
    of every host, whose files may differ. `at_once`: without waiting for a collective that does not end, which an
    ordinary exit does."""
    rank = int(os.environ.get("RANK", 0))
    first_of_host = os.environ.get("LOCAL_RANK", "0") == "0" and not dist.is_initialized()
    if rank == 0 or on_every_rank or first_of_host:
        where = f" (rank {rank} on {socket.gethostname()})" if rank else ""
        print(f"error{where}: {message}", file=sys.stderr, flush=True)
    if at_once:
        os._exit(status)
    sys.exit(status)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(
                (line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown"
            )
    except OSError:
        return platform.processor()
