"""Files that are either whole or absent: write to a temporary name, fsync, rename, fsync the folder.

Two attempts of one task may race. Both write the same bytes, and the later rename wins, which is harmless.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np

from .errors import DataPrepError, DiskFullError
from .places import is_remote

TEMPORARY_MARK = ".tmp-"
_fence: Any = None  # the right of this process to write (lease.Fence); None outside of a run


def set_fence(fence: Any) -> None:
    """From now on, `fence.check()` decides before every commit of this process whether it may happen."""
    global _fence
    _fence = fence


def check_fence() -> None:
    """Raises LostLeaseError when this process writes for a run that another one has followed."""
    if _fence is not None:
        _fence.check()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk (or quota) and an unwritable place into one clear line each."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"no space left for {path} ({free_bytes(path) / 1e6:,.0f} MB free on that disk): make room, then "
                "run the same command again; finished tasks are kept"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST):
            raise DataPrepError(f"{path}: cannot be written ({os.strerror(error.errno)})") from None
        raise


@contextmanager
def atomic_file(path: Path, sync: bool = True) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under `path` only when the block ends without an exception.

    Raises DiskFullError when the disk is full, LostLeaseError when another run has taken over; the temporary file
    is removed then. Without `sync` the file may be torn after a power cut (not after a kill).
    """
    if is_remote(path):
        with _far_file(path) as far:
            yield far
        return
    temporary = path.with_name(f"{path.name}{TEMPORARY_MARK}{uuid.uuid4().hex[:12]}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            check_fence()
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


@contextmanager
def _far_file(path: Any) -> Iterator[BinaryIO]:
    """The same at a URL: an object appears there when its upload is committed, and not before."""
    file = path.fs.open(path.path, "wb", autocommit=False)
    try:
        yield file
        check_fence()
        file.close()
        file.commit()
    except BaseException:
        file.close()
        file.discard()
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file atomically."""
    with atomic_file(path) as file:
        file.write(data)


def write_array(file: BinaryIO, array: np.ndarray) -> None:
    """Write an array in numpy's format. `np.save` alone writes to a real file behind its back, by a stream of C whose
    last bytes are lost without a word where the disk is full.
    """
    np.save(SimpleNamespace(write=file.write), array, allow_pickle=False)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, readable and with a final newline."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises DataPrepError when it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataPrepError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise DataPrepError(f"{path}: cannot be read as JSON ({error})") from None


def free_bytes(path: Path) -> int:
    """Free space on the disk that holds `path`, or will hold it."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def write_speed(folder: Path, size_bytes: int = 24 * 1024**2) -> float:
    """Bytes a second that the disk of a folder takes, NaN where it takes none, measured with a file that is written and
    synced, and that is gone with this process, however it ends.
    """
    while not folder.is_dir():
        folder = folder.parent
    data = os.urandom(1024**2)
    started = time.monotonic()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for _ in range(size_bytes // len(data)):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return size_bytes / (time.monotonic() - started)
    except OSError:
        return math.nan


def size_or_none(path: Path) -> int | None:
    """Size of a file in bytes, or None where there is none."""
    if is_remote(path):
        path.fs.invalidate_cache()  # type: ignore[attr-defined]
    try:
        return path.stat().st_size
    except OSError:
        return None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
