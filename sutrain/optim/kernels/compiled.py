"""The passes over weights and gradients as one C++ call each, for tensors on the CPU: cpu.cpp, compiled once per source
and processor by the system's g++ (a second), without torch's headers.

A pass runs over all tensors in one call, whatever their number, reads memory once and writes no temporaries. Pointers
are handed over as integers, so this file checks what C++ cannot: fp32, contiguous, of the right length.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..fragments import Fragment
from .layout import Factors, Layout, State

SOURCE = Path(__file__).with_name("cpu.cpp")
HEADER = Path(__file__).with_name("lines.h")
FLAGS = (
    *(
        "-O3",
        "-march=native",
        "-fopenmp",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-std=c++17",
        "-shared",
        "-fPIC",
    ),
    # Left alone, gcc halves the vectors of processors whose clock may drop; these loops wait for memory anyway.
    *(("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()),
)
CHUNK = 65536
"""Elements of a piece of work, 256 KiB of each array: enough to keep a thread busy, few enough to share out evenly."""
WHOLE, ROW_CONSTANT, ROW_VARIES = range(3)


class KernelError(RuntimeError):
    """The compiled kernels cannot be built or loaded; the message says why."""


class CompiledKernels:
    """The methods of EagerKernels; the gradients keep their values."""

    def __init__(self, layout: Layout, first: State, second: State):
        """Raises KernelError without a C++ compiler, or where compiling fails."""
        self._library = library()
        self._layout = layout
        self._buffer_of = np.array(layout.buffer_of, dtype=np.int64)
        self._bytes_before = np.array([4 * fragment.start for fragment in layout.fragments], dtype=np.int64)
        table, chunks, groups, partials = tables(layout)
        self._table, self._chunks, self._groups = table, chunks, groups
        self._partials = torch.empty(partials)
        self._chunk_sums = torch.empty(len(chunks), 6, dtype=torch.float64)
        self._state_alive = (first, second)  # their memory must outlive the addresses
        self._state = [None if state is None else self._addresses(state) for state in (first, second)]

    def begin(self, gradients: list[Tensor]) -> None:
        self._gradients_alive = gradients
        self._gradients = self._in_buffers(gradients)
        self._weights = self._in_buffers(self._layout.buffers)

    def end(self) -> None:
        self._gradients_alive = []

    def square_sums(self, row_sums: Tensor, column_sums: Tensor) -> Tensor:
        result = self._result(1)
        self._library.square_sums(
            *self._work(), _at(self._groups), _int(len(self._groups)), _at(self._gradients),
            _at(row_sums), _at(column_sums), _at(self._partials), _at(self._chunk_sums), _at(result),
        )  # fmt: skip
        return result.float().view(-1)

    def factors(self, row_mean: Tensor, column_mean: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        row_factor, column_factor = torch.zeros_like(row_mean), torch.zeros_like(column_mean)
        self._library.factors(
            _int(torch.get_num_threads()), _at(self._table), _int(len(self._table)),
            _at(row_mean), _at(column_mean), _f32(floor), _at(row_factor), _at(column_factor),
        )  # fmt: skip
        return row_factor, column_factor

    def adafactor_sums(
        self,
        factors: tuple[Tensor, Tensor],
        clip: float,
        new_share: float,
        epsilon: float,
        limit: float,
        weighted: bool,
    ) -> Tensor:
        result = self._result(6)
        self._library.adafactor_sums(
            *self._work(), _at(self._gradients), _at(self._weights), *map(_at, self._state), *map(_at, factors),
            _f32(clip), _f32(new_share), _f32(epsilon), _f32(limit), _at(self._chunk_sums), _at(result),
        )  # fmt: skip
        return result.float()

    def adafactor_apply(
        self, factors: tuple[Tensor, Tensor], clip: float, limit: float, keep: float, numbers: Tensor
    ) -> None:
        self._library.adafactor_apply(
            *self._work(), _at(self._gradients), _at(self._weights), *map(_at, self._state), *map(_at, factors),
            _f32(clip), _f32(limit), _f32(keep), *map(_at, numbers),
        )  # fmt: skip

    def moment_sums(
        self,
        clip: float,
        betas: tuple[float, float],
        scales: tuple[float, float],
        epsilon: float,
        decays: Tensor,
        weighted: bool,
    ) -> Tensor:
        result = self._result(3)
        self._library.moment_sums(
            *self._work(), _at(self._gradients), _at(self._weights), *map(_at, self._state), _f32(clip),
            _f32(1.0 - betas[0]), _f32(betas[1]), _f32(1.0 - betas[1]), *map(_f32, scales), _f32(epsilon),
            _at(decays), _at(self._chunk_sums), _at(result),
        )  # fmt: skip
        return result.float()

    def moment_apply(
        self, scales: tuple[float, float], epsilon: float, decays: Tensor, numbers: Tensor
    ) -> None:
        self._library.moment_apply(
            *self._work(), _at(self._weights), *map(_at, self._state), *map(_f32, scales), _f32(epsilon),
            _at(decays), *map(_at, numbers),
        )  # fmt: skip

    def _work(self) -> tuple[Any, ...]:
        return (
            _int(torch.get_num_threads()),
            _at(self._table),
            _at(self._chunks),
            _int(len(self._chunks)),
        )

    def _result(self, columns: int) -> Tensor:
        return torch.zeros(len(self._layout.fragments), columns, dtype=torch.float64)

    def _in_buffers(self, buffers: list[Tensor]) -> np.ndarray:
        """Where every fragment begins in buffers like those of the layout. Raises ValueError for another type."""
        starts = []
        for buffer, own in zip(buffers, self._layout.buffers, strict=True):
            if buffer.dtype != torch.float32 or not buffer.is_contiguous() or buffer.numel() != own.numel():
                raise ValueError(
                    f"expected {own.numel()} contiguous fp32 values on the CPU, found {buffer.numel()} of "
                    f"{buffer.dtype}, strides {buffer.stride()}"
                )
            starts.append(buffer.data_ptr())
        return np.array(starts, dtype=np.int64)[self._buffer_of] + self._bytes_before

    def _addresses(self, state: list[Tensor] | list[Tensor | None]) -> np.ndarray:
        """Where the state of every fragment is; 0 for None."""
        assert all(t is None or (t.dtype == torch.float32 and t.is_contiguous()) for t in state)
        return np.array([0 if tensor is None else tensor.data_ptr() for tensor in state], dtype=np.int64)


# ---- tables ------------------------------------------------------------------------------------------------


def tables(layout: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Fragments, chunks and groups as cpu.cpp has them (int64, one a line), and how many partial sums to hold."""
    fragments = [_fragment_line(f, layout.factors[f.tensor]) for f in layout.fragments]
    chunks: list[tuple[int, int, int, int]] = []
    groups: list[tuple[int, int, int, int]] = []
    partials = 0
    for index, fragment in enumerate(layout.fragments):
        factors = layout.factors[fragment.tensor]
        if factors is None:
            ends = [*range(CHUNK, fragment.length, CHUNK), fragment.length]
            chunks += [(index, begin, end, -1) for begin, end in zip([0, *ends], ends, strict=False)]
            continue
        # A slab holds all elements behind one set of column sums; two chunks of a slab would race for them.
        slab = prod(factors.shape[factors.row :])
        columns = slab // factors.shape[factors.row]
        first, last = fragment.offset, fragment.offset + fragment.length
        if slab <= CHUNK or fragments[index][0] == ROW_VARIES:
            step = max(1, CHUNK // slab) * slab
            cuts = [first, *range((first // slab) * slab + step, last, step), last]
            chunks += [(index, a - first, b - first, -1) for a, b in pairwise(cuts) if a < b]
            continue
        line = factors.shape[-1]
        step = max(CHUNK, 64 * columns) // line * line
        for start in range(first // slab * slab, last, slab):
            low, high = max(first, start), min(last, start + slab)
            cuts = [low, *(at for at in range(start + step, start + slab, step) if low < at < high), high]
            if len(cuts) == 2:
                chunks.append((index, low - first, high - first, -1))
                continue
            outer = start // slab
            groups.append(
                (len(chunks), len(chunks) + len(cuts) - 1, factors.column_start + outer * columns, columns)
            )
            for low, high in pairwise(cuts):
                chunks.append((index, low - first, high - first, partials))
                partials += columns
    return _table(fragments, 15), _table(chunks, 4), _table(groups, 4), partials


def _fragment_line(fragment: Fragment, factors: Factors | None) -> tuple[int, ...]:
    head = (fragment.tensor, fragment.offset, fragment.length)
    if factors is None:
        return (WHOLE, *head, 1, *[1] * 4, *[0] * 6)
    shape, row, column = factors.shape, factors.row, factors.column
    last = len(shape) - 1
    kind = ROW_CONSTANT if column == last else ROW_VARIES
    return (
        kind,
        *head,
        shape[last],
        shape[row],
        prod(shape[row + 1 : last]),
        shape[column],
        prod(shape[column + 1 : last]),
        factors.row_start,
        factors.column_start,
        prod(factors.row_shape),
        prod(factors.column_shape),
        shape[row],
        prod(factors.row_shape[row + 1 :]),
    )


def _table(lines: list[Any], width: int) -> np.ndarray:
    return np.array(lines, dtype=np.int64).reshape(len(lines), width)


# ---- compiling and calling ---------------------------------------------------------------------------------


@functools.cache
def library() -> ctypes.CDLL:
    """cpu.cpp, compiled for this processor, from the extension folder or anew. Raises KernelError."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise KernelError("no C++ compiler: sudo apt-get install g++, or set the optimizer's kernels: eager")
    flags = ""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    parts = (SOURCE.read_text(), HEADER.read_text(), *FLAGS, flags, platform.machine(), version)
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path(sys.prefix) / "torch_extensions"))
    built = folder / "sutrain_optimizers" / f"cpu-{key}.so"
    try:
        if not built.is_file():
            built.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=built.parent) as scratch:  # several ranks may be at it
                target = Path(scratch) / built.name
                command = [compiler, *FLAGS, str(SOURCE), "-o", str(target)]
                made = subprocess.run(command, capture_output=True, text=True, timeout=300)
                if made.returncode:
                    reason = " ".join(made.stderr.split())[:400]
                    raise KernelError(f"{SOURCE.name} does not compile: {reason}")
                target.replace(built)
        return ctypes.CDLL(str(built))
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"the optimizers' kernels cannot be built or loaded: {error}") from error


_f32 = ctypes.c_float
_int = ctypes.c_int64


def _at(values: Tensor | np.ndarray | None) -> ctypes.c_void_p:
    """Address of the first value. Whoever calls keeps `values` alive until the call is over."""
    if values is None:
        return ctypes.c_void_p(None)
    if isinstance(values, np.ndarray):
        return ctypes.c_void_p(values.ctypes.data)
    return ctypes.c_void_p(values.data_ptr())
