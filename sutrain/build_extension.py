"""DeepSpeed's shared-memory communication extension, built once per environment: `python -m sutrain.build_extension`.

On a CPU DeepSpeed compiles it when the first process group starts (about a minute). A process killed while compiling
leaves a lock file for which every later start waits for ever. So it is built here under a lock of the operating
system, which dies with its owner: whoever holds it knows that a lock file found is stale.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from pathlib import Path

import torch


class ExtensionError(RuntimeError):
    """The extension cannot be built; the message says what is missing."""


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


def build_extension() -> None:
    """Build (or find built) and load the extension where DeepSpeed runs on the CPU; elsewhere do nothing.

    Raises ExtensionError without a compiler or where compiling fails.
    """
    folder = prepare_environment()
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu":
        return
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".building").open("w") as handle:
        fcntl.flock(
            handle, fcntl.LOCK_EX
        )  # waits while another process builds, and is freed if that one dies
        (folder / builder.name / "lock").unlink(missing_ok=True)
        if not any((folder / builder.name).glob("*.so")) and not shutil.which("g++"):
            raise ExtensionError("no C++ compiler: DeepSpeed needs g++ on a CPU; sudo apt-get install g++")
        try:
            builder.load(verbose=False)
        except (RuntimeError, OSError, ImportError) as error:
            reason = " ".join(str(error).split())[:400]
            raise ExtensionError(f"DeepSpeed's communication extension cannot be built: {reason}") from error


if __name__ == "__main__":
    try:
        build_extension()
    except ExtensionError as error:
        sys.exit(f"error: {error}")
