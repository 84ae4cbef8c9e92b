"""Checkpoints of our own: plain tensors by name and offset, so that world size, ZeRO stage and batch layout may change.

    checkpoints/step-00000400/
        rank-00000.safetensors   this rank's slices: "master|NAME|OFFSET", "STATE KEY|NAME|OFFSET" (flat, fp32)
        rank-00000.json          checksum of that file
        replicated.safetensors   small optimizer state that is the same on every rank (rank 0 writes it)
        manifest.json            counters, tensor shapes, time, and size and checksum of every file; of a new best one
                                 its held-out loss too; written last
    checkpoints/best.json        {"step", "validation_loss", "basis"}: that step is never pruned; "to_better" has what a
                                 loss on another basis must be below to take its place, {basis: loss}

A checkpoint appears under its name only when it is complete: files are written and synced in a temporary folder,
which is then renamed (checkpoint_writer.py). Nothing is pickled.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import xxhash
from safetensors import safe_open

from sutrain import heartbeat

FORMAT = "sutrain-checkpoint-1"
MASTER = "master"
"""Key of the fp32 master weights; other keys are the optimizer's."""

Slice = tuple[str, str, int, torch.Tensor]
"""(key, tensor name, offset of the first element in the flattened tensor, flat values)."""


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete or damaged; the message names the file and what was expected."""


class AllDamagedError(CheckpointError):
    """There are checkpoints and none is intact; raised on every rank alike."""


def step_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def mark_best(directory: Path, step: int, validation_loss: float, basis: str) -> None:
    """Remember which checkpoint has the lowest held-out loss; `prune` keeps it. `basis` says what it was measured on:
    losses over other rows or masks are not compared."""
    _write_best(directory, {"step": step, "validation_loss": validation_loss, "basis": basis})


def mark_to_better(directory: Path, validation_loss: float, basis: str) -> None:
    """Remember, as long as the best checkpoint stays the best, what a loss on another basis must be below to take its
    place: measured anew at every start, it would follow a run that gets worse."""
    if marked := best(directory):
        _write_best(directory, marked | {"to_better": marked.get("to_better", {}) | {basis: validation_loss}})


def _write_best(directory: Path, content: dict[str, Any]) -> None:
    temporary = directory / ".best.json"
    with temporary.open("w", encoding="utf-8") as handle:
        json.dump(content, handle, indent=1)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.rename(directory / "best.json")


def best(directory: Path) -> dict[str, Any] | None:
    """What best.json says of the best checkpoint, or None when there is none (any more)."""
    try:
        marked = json.loads((directory / "best.json").read_text())
        return marked if (directory / step_name(marked["step"])).is_dir() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def set_aside(directory: Path, after_step: int) -> None:
    """Rename the damaged checkpoints of later steps, so that they are neither counted nor found again."""
    for folder in by_age(directory):
        if int(folder.name.removeprefix("step-")) > after_step:
            target = directory / f".damaged-{folder.name}"
            shutil.rmtree(target, ignore_errors=True)
            folder.rename(target)


def find_latest(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest intact checkpoint, and one line for each newer one that is damaged and passed over."""
    damaged: list[str] = []
    for folder in by_age(directory):
        try:
            checkpoint = Checkpoint(folder)
            checkpoint.verify()
            if folder.name != (name := step_name(checkpoint.step)):
                raise CheckpointError(f"{folder}: holds step {checkpoint.step}; its name was {name}")
            return checkpoint, damaged
        except CheckpointError as error:
            damaged.append(str(error))
    return None, damaged


class Agreed(NamedTuple):
    """What all ranks resume from, as rank 0 finds it."""

    checkpoint: Checkpoint | None  # the newest intact one
    best_loss: (
        float  # what a held-out loss on this basis must be below to be the best, infinite if nothing is known
    )
    other_basis: bool  # there is a best checkpoint, and on this basis nothing is known to compare it by
    damaged: list[str]  # one line for each that was passed over; empty but on rank 0


def agree_on_latest(directory: Path, basis: str, device: torch.device) -> Agreed:
    """Rank 0 looks and tells, so that ranks cannot disagree about what the disk holds.

    Raises AllDamagedError on all ranks when there are checkpoints but all are damaged, FileNotFoundError on a rank
    whose host does not see the one chosen.
    """
    decision = torch.tensor([_NOTHING, float("inf"), 0], dtype=torch.float64, device=device)
    damaged: list[str] = []
    if _rank() == 0:
        found, damaged = find_latest(directory)
        decision[0] = found.step if found else _ALL_DAMAGED if damaged else _NOTHING
        if found:
            decision[1], decision[2] = _to_better(directory, found, basis)
    dist.broadcast(decision, 0)
    step, best_loss, other_basis = int(decision[0]), float(decision[1]), bool(decision[2])
    if step == _ALL_DAMAGED:
        found_there = f" ({'; '.join(damaged)})" if damaged else ""
        raise AllDamagedError(
            f"{directory}: no intact checkpoint left{found_there}; move the damaged ones away to start over"
        )
    if step == _NOTHING:
        return Agreed(None, best_loss, other_basis, damaged)
    folder = directory / step_name(step)
    if not folder.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, "rank 0 sees it, this host does not; share run_dir", str(folder)
        )
    return Agreed(Checkpoint(folder), best_loss, other_basis, damaged)


_NOTHING, _ALL_DAMAGED = -1, -2


def _to_better(directory: Path, found: Checkpoint, basis: str) -> tuple[float, bool]:
    """best_loss and other_basis of a run that goes on from `found`."""
    marked, own = best(directory), found.manifest.get("best")
    if own and not (marked and marked["step"] == found.step):
        mark_best(directory, found.step, **own)  # killed between the rename that published it and the mark
        marked = best(directory)
    if marked is None or marked["step"] > found.step:
        return float("inf"), False
    known = {**marked.get("to_better", {}), marked.get("basis"): marked["validation_loss"]}
    return known.get(basis, float("inf")), basis not in known


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk; reading any range of any tensor touches only the files that hold it."""

    folder: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Counters, shapes and file checksums. Raises CheckpointError when it is missing or unreadable."""
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.folder}/manifest.json: unreadable ({error}): not a checkpoint"
            ) from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise CheckpointError(f"{self.folder}/manifest.json: not in the format {FORMAT!r}")
        if manifest.pop("xxh3_128", None) != json_checksum(manifest):
            raise CheckpointError(f"{self.folder}/manifest.json: content does not match its checksum")
        return manifest

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def counters(self) -> dict[str, Any]:
        return self.manifest["counters"]

    @property
    def shapes(self) -> dict[str, list[int]]:
        return self.manifest["shapes"]

    def verify(self) -> None:
        """Raises CheckpointError naming the first file that is missing, cut short, altered or cannot be read."""
        for name, expected in self.manifest["files"].items():
            file = self.folder / name
            size = file.stat().st_size if file.is_file() else None
            if size != expected["bytes"]:
                found = "missing" if size is None else f"{size} bytes"
                raise CheckpointError(f"{file}: {found}, expected {expected['bytes']} bytes")
            if _checksum(file) != expected["xxh3_128"]:
                raise CheckpointError(f"{file}: content does not match its checksum")

    def replicated(self) -> dict[str, torch.Tensor]:
        """The state that every rank holds in full."""
        with safe_open(self.folder / "replicated.safetensors", framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def contents(self) -> dict[tuple[str, str], int]:
        """(key, tensor name) -> elements, of everything that `read` finds."""
        return {
            of: max(piece[0] + piece[1] for piece in pieces) for of, pieces in sorted(self._pieces.items())
        }

    def read(self, key: str, name: str, offset: int, length: int) -> torch.Tensor:
        """Elements [offset, offset + length) of one flattened tensor, put together from whichever ranks wrote them.

        Raises CheckpointError when the checkpoint does not hold all of them.
        """
        values, filled = torch.empty(length), 0
        for start, size, file_name, tensor_name in self._pieces.get((key, name), []):
            low, high = max(start, offset), min(start + size, offset + length)
            if low < high:
                piece = self._file(file_name).get_slice(tensor_name)
                values[low - offset : high - offset] = piece[low - start : high - start]
                filled += high - low
        if filled != length:
            raise CheckpointError(
                f"{self.folder}: holds {filled} of the elements {offset}..{offset + length} of {key} of {name}"
            )
        return values

    def full_weights(self) -> dict[str, torch.Tensor]:
        """The fp32 master weights, whole, by name."""
        weights = {}
        for name, shape in self.shapes.items():
            size = int(torch.Size(shape).numel())
            weights[name] = self.read(MASTER, name, 0, size).reshape(shape)
        return weights

    @cached_property
    def _pieces(self) -> dict[tuple[str, str], list[tuple[int, int, str, str]]]:
        """(key, tensor) -> pieces (offset, length, file, name in the file)."""
        pieces: dict[tuple[str, str], list[tuple[int, int, str, str]]] = {}
        for file_name in self.manifest["files"]:
            if not file_name.startswith("rank-"):
                continue
            file = self._file(file_name)
            for stored in file.keys():  # noqa: SIM118
                key, name, offset = stored.split("|")
                size = file.get_slice(stored).get_shape()[0]
                pieces.setdefault((key, name), []).append((int(offset), size, file_name, stored))
        return pieces

    def _file(self, name: str) -> Any:
        """An open file, kept: opening one parses its whole header, 60 ms where a thousand layers are in it."""
        if name not in self._open_files:
            self._open_files[name] = safe_open(self.folder / name, framework="pt")
        return self._open_files[name]

    @cached_property
    def _open_files(self) -> dict[str, Any]:
        return {}


def load_full_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """fp32 weights by name of one verified checkpoint folder. Raises CheckpointError when it is not intact."""
    checkpoint = Checkpoint(Path(folder))
    checkpoint.verify()
    return checkpoint.full_weights()


def by_age(directory: Path) -> list[Path]:
    """Complete checkpoint folders, newest first; what a user keeps beside them under another name is left alone."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if _STEP.fullmatch(path.name)), reverse=True)


_STEP = re.compile(r"step-\d+")


def json_checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


_READ_ATTEMPTS = 3


def _checksum(file: Path) -> str:
    """Raises CheckpointError when the file cannot be read, also not a moment later."""
    for attempt in range(1, _READ_ATTEMPTS + 1):
        digest = xxhash.xxh3_128()
        try:
            for chunk in _chunks(file):
                digest.update(chunk)
                heartbeat.beat("checking a checkpoint", 0)
            return digest.hexdigest()
        except OSError as error:
            if attempt == _READ_ATTEMPTS:
                raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from None
            time.sleep(0.5 * attempt)
    raise AssertionError("unreachable")


def _chunks(file: Path, size: int = 1 << 22) -> Iterator[bytes]:
    with file.open("rb") as handle:
        while chunk := handle.read(size):
            yield chunk


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
