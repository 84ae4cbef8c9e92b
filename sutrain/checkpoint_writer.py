"""Writing checkpoints while training goes on (format: checkpoint.py).

`save` copies this rank's state into buffers that are kept, which takes as long as one memory copy, and a thread
writes them:
file, fsync, checksum, and on rank 0, once every rank's files are there, the manifest and the rename that makes the
checkpoint visible. The thread uses no collectives: the ranks find each other's files. There is one checkpoint in the
making at a time; a second waits for the first.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from sutrain import checkpoint as checkpoints
from sutrain import heartbeat
from sutrain.checkpoint import Slice, step_name

WAIT_SECONDS = 1800.0
"""For the next rank's file of a checkpoint: longer than any disk that works takes for it."""

_CHUNK_BYTES = 1 << 23
_TYPES = {
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the last `last` ones, one every `hours` hours of the run, the best one, and the newest
    one from outside a streak of broken steps."""

    last: int = 2
    hours: float | None = None


class CheckpointWriter:
    """Writes the checkpoints of one run into `directory`; one on every rank, called by all at the same steps.

    Attributes:
        copy_seconds: how long the last `save` held up training; write_seconds: how long its thread then took.
        buffer_bytes: host memory kept for the copy, as much as this rank's part of a checkpoint.
        on_complete: told the step, from the thread that writes, when a checkpoint is on disk (rank 0 alone).
    """

    def __init__(self, directory: Path, keep: Keep, rank: int = 0, world_size: int = 1):
        self.directory, self.keep = directory, keep
        self.rank, self.world_size = rank, world_size
        self.copy_seconds = self.write_seconds = 0.0
        self.last_step: int | None = None
        self.on_complete: Callable[[int], None] = lambda step: None
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def buffer_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def save(
        self,
        step: int,
        slices: Iterable[Slice],
        replicated: dict[str, torch.Tensor],
        shapes: dict[str, list[int]],
        counters: dict[str, Any],
        best: tuple[float, str] | None = None,
    ) -> None:
        """Take a copy of this moment and begin to write `directory`/step-XXXXXXXX.

        slices: what this rank owns; replicated: the same on every rank, written by rank 0; shapes: of every tensor of
        the model; counters: what the manifest carries; best: (held-out loss, what it was measured on) of a new best.
        Raises OSError when the one before could not be written.
        """
        self.wait()
        started = time.perf_counter()
        tensors = {f"{key}|{name}|{offset}": values for key, name, offset, values in slices}
        files = {f"rank-{self.rank:05d}": self._copies("slice ", tensors)}
        if self.rank == 0:
            files["replicated"] = self._copies("replicated ", replicated)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.copy_seconds = time.perf_counter() - started
        self.last_step = step
        manifest = {"format": checkpoints.FORMAT, "step": step, "counters": counters, "shapes": shapes}
        if best is not None:
            manifest["best"] = {"validation_loss": best[0], "basis": best[1]}
        self._thread = threading.Thread(
            target=self._write, args=(step, files, manifest, best), name="checkpoint-writer", daemon=True
        )
        self._thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until nothing is being written any more; False when `seconds` were not enough.

        Gives signs of life for as long as a disk that works may take: a run that waits for it does not hang.
        Raises OSError, as `check` does, when writing failed.
        """
        if self._thread is not None:
            began, limit = time.monotonic(), math.inf if seconds is None else seconds
            while self._thread.is_alive() and (waited := time.monotonic() - began) < limit:
                if waited < WAIT_SECONDS:
                    heartbeat.beat("writing a checkpoint", self.last_step or 0)
                self._thread.join(min(1.0, limit - waited))
            if self._thread.is_alive():
                return False
            self._thread = None
        self.check()
        return True

    def check(self) -> None:
        """Raises the OSError with which writing failed on this rank, once; training should end then."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _copies(self, kind: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies in buffers that are used again: the first touch of fresh memory costs more than the copy itself."""
        copies = {}
        for name, values in tensors.items():
            buffer = self._buffers.get(kind + name)
            if buffer is None or buffer.shape != values.shape or buffer.dtype != values.dtype:
                buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
                self._buffers[kind + name] = buffer
            buffer.copy_(values.detach(), non_blocking=True)
            copies[name] = buffer
        return copies

    def _write(
        self, step: int, files: dict[str, dict[str, torch.Tensor]], manifest: dict[str, Any],
        best: tuple[float, str] | None,
    ) -> None:  # fmt: skip
        started = time.perf_counter()
        temporary = self.directory / f".writing-{step_name(step)}"
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            for name, tensors in files.items():
                write_tensors(temporary / f"{name}.safetensors", tensors)
            if self.rank == 0:
                names = ["replicated", *(f"rank-{rank:05d}" for rank in range(self.world_size))]
                self._wait_for_ranks(temporary, names)
                publish(self.directory, step, manifest, names)
                if best is not None:  # marked before pruning, which keeps it
                    checkpoints.mark_best(self.directory, step, *best)
                self.on_complete(step)
                prune(self.directory, self.keep.last, self.keep.hours)
        except BaseException as error:  # raised again by the training loop
            self._failure = error
            if self.rank != 0:
                _say_failed(temporary / f"rank-{self.rank:05d}.failed", error)
        finally:
            self.write_seconds = time.perf_counter() - started

    def _wait_for_ranks(self, temporary: Path, names: list[str]) -> None:
        """Until the files of all ranks are there. A rank that dies takes the run, and this thread, with it.

        Raises OSError when a rank could not write its file, or when no further one appeared for WAIT_SECONDS.
        """
        missing, since = names, time.monotonic()
        while left := [name for name in missing if not (temporary / f"{name}.json").is_file()]:
            if failed := sorted(temporary.glob("*.failed")):
                number, _, text = failed[0].read_text().partition(" ")
                if not text:  # a full disk takes the name of a file and not the line in it
                    number, text = str(errno.EIO), "could not write its files; its own message says why"
                raise OSError(int(number), f"{failed[0].stem}: {text}", str(temporary))
            if len(left) < len(missing):
                missing, since = left, time.monotonic()
            elif time.monotonic() - since > WAIT_SECONDS:
                whose = f"nothing from {', '.join(left[:8])} for {WAIT_SECONDS:.0f} s: does its host see this folder?"
                raise OSError(errno.ETIMEDOUT, whose, str(temporary))
            time.sleep(0.02)


def save_checkpoint(
    directory: Path,
    step: int,
    slices: Iterable[Slice],
    replicated: dict[str, torch.Tensor],
    shapes: dict[str, list[int]],
    counters: dict[str, Any],
) -> Path:
    """Write one checkpoint as the only rank, wait for it, and prune nothing; returns its path."""
    writer = CheckpointWriter(directory, Keep(last=10**9))
    writer.save(step, slices, replicated, shapes, counters)
    writer.wait()
    return directory / step_name(step)


def write_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A safetensors file and FILE.json with its size and checksum, which appears when the file is on disk.

    Written here, chunk by chunk, and not by the library, which first makes a second copy of all tensors in memory and
    would be read again for the checksum. Raises OSError, with the file's name, when the disk does not take it.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name, values in tensors.items():
        header[name] = {
            "dtype": _TYPES[values.dtype], "shape": list(values.shape), 
            "data_offsets": [offset, offset + values.nbytes],
        }  # fmt: skip
        offset += values.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    digest, size = xxhash.xxh3_128(), 0
    parts = [
        memoryview(len(text).to_bytes(8, "little") + text),
        *(_bytes(values) for values in tensors.values()),
    ]
    try:
        with file.open("wb") as handle:
            for part in parts:
                for start in range(0, len(part), _CHUNK_BYTES):
                    chunk = part[start : start + _CHUNK_BYTES]
                    handle.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
            handle.flush()
            os.fsync(handle.fileno())
        sidecar = file.with_suffix(".part")
        _write_json(sidecar, {"bytes": size, "xxh3_128": digest.hexdigest()})
        sidecar.rename(file.with_suffix(".json"))
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror, str(file)) from None


def publish(directory: Path, step: int, manifest: dict[str, Any], names: list[str]) -> None:
    """Write the manifest over the files of all ranks and give the folder its name, in one rename."""
    final = directory / step_name(step)
    temporary = directory / f".writing-{final.name}"
    files = {f"{name}.safetensors": json.loads((temporary / f"{name}.json").read_text()) for name in names}
    manifest = manifest | {"written_unix_seconds": int(time.time()), "files": files}
    _write_json(temporary / "manifest.json", manifest | {"xxh3_128": checkpoints.json_checksum(manifest)})
    _sync_directory(temporary)
    replaced = directory / f".replaced-{final.name}"
    if final.exists():  # the same step written again after a resume: never without one of the two on disk
        final.rename(replaced)
    temporary.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    _sync_directory(directory)


_SWEPT = (".writing-*", ".pruned-*")


def sweep(directory: Path) -> None:
    """Delete what interrupted saves and prunings left behind. Call it before the first save, on one rank."""
    for replaced in directory.glob(".replaced-*"):  # killed between the two renames of `publish`
        final = directory / replaced.name.removeprefix(".replaced-")
        if not final.exists():
            replaced.rename(final)
    for pattern in (*_SWEPT, ".replaced-*"):
        for leftover in directory.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def leftover_bytes(directory: Path) -> int:
    """Disk space that `sweep` frees at the next start."""
    found = 0
    for file in (file for pattern in _SWEPT for file in directory.glob(f"{pattern}/*")):
        with contextlib.suppress(FileNotFoundError):
            found += file.stat().st_size
    return found


def prune(directory: Path, keep_last: int, keep_every_hours: float | None = None) -> None:
    """Delete all checkpoints but the best one, the last `keep_last` besides it, one for every `keep_every_hours`
    hours, and the newest that was written while steps were not broken: of a long streak of broken ones (acting.py)
    the last `keep_last` are all from inside it.

    A folder loses its name before its files, so a kill in between leaves no half checkpoint.
    """
    marked = checkpoints.best(directory)
    kept = {step_name(marked["step"])} if marked else set()
    newest_first = checkpoints.by_age(directory)
    besides = [folder.name for folder in newest_first if folder.name not in kept]
    kept |= set(besides[:keep_last])
    kept |= _from_before_the_streak(newest_first)
    if keep_every_hours is not None:
        last_kept = None
        for folder in reversed(newest_first):
            if (written := _written_at(folder)) is None:
                continue
            # Either way: a clock that was set back must not have all be deleted until it is where it was.
            if last_kept is None or abs(written - last_kept) >= keep_every_hours * 3600:
                last_kept = written
                kept.add(folder.name)
    for folder in newest_first:
        if folder.name not in kept:
            unnamed = directory / f".pruned-{folder.name}"
            try:
                folder.rename(unnamed)
            except OSError:
                continue
            shutil.rmtree(unnamed, ignore_errors=True)


def _written_at(folder: Path) -> float | None:
    try:
        return float(_manifest(folder)["written_unix_seconds"])
    except (ValueError, KeyError, TypeError):
        return None


def _from_before_the_streak(newest_first: list[Path]) -> set[str]:
    """Where the newest checkpoint is from inside a streak of broken steps: the name of the newest from before it, and,
    where one is left, from before the update that began it. Checkpoints that say nothing count as good."""
    manifests = {folder.name: _manifest(folder) for folder in newest_first}
    counters = {name: manifest["counters"] for name, manifest in manifests.items() if "counters" in manifest}
    good = [name for name in counters if not counters[name].get("broken_steps", 0)]
    newest: dict[str, Any] = next(iter(counters.values()), {})
    if newest.get("broken_steps", 0) and (last_good := newest.get("good_step")) is not None:
        good = [name for name in good if name <= checkpoints.step_name(last_good)] or good
    return set(good[:1])


def _manifest(folder: Path) -> dict[str, Any]:
    """As it lies there, unchecked; {} where it cannot be read."""
    try:
        found = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _bytes(values: torch.Tensor) -> memoryview:
    if not values.nbytes:
        return memoryview(b"")
    return values.contiguous().view(-1).view(torch.uint8).numpy().data


def _say_failed(file: Path, error: BaseException) -> None:
    """Tell rank 0, as far as the disk still takes a line."""
    number, line = getattr(error, "errno", None) or errno.EIO, file.with_suffix(".line")
    try:
        line.write_text(f"{number} {getattr(error, 'strerror', None) or error}")
        line.replace(file)  # whole, or rank 0 might read the file before there is a line in it
    except OSError:
        with contextlib.suppress(OSError):
            file.touch()


def _write_json(file: Path, content: dict[str, Any]) -> None:
    with file.open("w", encoding="utf-8") as handle:
        json.dump(content, handle, indent=1)
        handle.flush()
        os.fsync(handle.fileno())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
