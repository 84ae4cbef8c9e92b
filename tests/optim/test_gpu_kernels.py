"""The Triton passes against the eager ones, in Triton's interpreter, and compiled for a GPU that need not be there:
torch's CPU build comes without Triton."""

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PROGRAM = """
import tests.optim.test_kernels as tests
from sutrain.optim.kernels import gpu
gpu.VECTOR = 64  # several chunks of the vector
tests.SHAPES.clear()
tests.SHAPES.update({"scalar": (), "vector": (9000,), "odd": (7, 13), "rows": (70, 300), "batched": (2, 20, 40),
                     "zero": (6, 5)})
for case, (_, settings) in tests.CASES.items():
    settings.pop("factored_dimensions", None)
    fast, slow = tests.trained(case, "triton", steps=3), tests.trained(case, "eager", steps=3)
    assert type(fast._passes).__name__ == "TritonKernels"
    difference, where = tests.largest_difference(tests.everything(fast), tests.everything(slow))
    assert difference < 2e-6, (case, where, difference)
"""

COMPILE = """
import itertools, pathlib, subprocess
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sutrain.optim.kernels import gpu, gpu_programs as programs
numbers = {"clip", "new_share", "epsilon", "limit", "keep", "floor", "new1", "beta2", "new2", "mean_scale",
           "root_scale"}
places = {"chunks", "groups", "slabs", "ranges", "gradients", "weights", "moments", "momenta", "means", "squares"}
chosen = {"LINES": gpu.LINES, "BLOCK": gpu.BLOCK, "COLUMNS": 6, "CHUNKS": gpu.CHUNKS, "ROWS": gpu.ROWS}
for kernel in (programs.square_sums, programs.add_columns, programs.add_up, programs.row_factors,
               programs.adafactor_sums, programs.adafactor_apply, programs.moment_sums, programs.moment_apply):
    names = kernel.arg_names
    for momentum, factored in itertools.product(*((False, True) if name in names else (False,)
                                                  for name in ("MOMENTUM", "FACTORED"))):
        options = {**chosen, "MOMENTUM": momentum, "FACTORED": factored}
        constants = {(at,): options[name] for at, name in enumerate(names) if name.isupper()}
        types = {name: "constexpr" if name.isupper() else "fp32" if name in numbers else
                 "i32" if name == "first_chunk" else "*i64" if name in places else "*fp32" for name in names}
        source = ASTSource(kernel, signature=types, constexprs=constants)
        cubin = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
        pathlib.Path("kernel.cubin").write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "kernel.cubin"]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "STACK:0 " in usage, (kernel, options, usage)  # registers suffice
"""

WITHOUT_A_GPU = """
import tests.optim.test_kernels as tests
tests.trained("lamb", "triton", steps=1)
"""


def run(program, folder, **changes):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(folder), **changes}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def skip_without_triton():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (it comes with torch's CUDA build)")


def test_triton_passes_equal_the_eager_ones_in_the_interpreter(tmp_path):
    skip_without_triton()
    done = run(PROGRAM, tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-2000:]


def test_triton_passes_compile_for_a_gpu(tmp_path):
    """Its interpreter takes programs that its compiler refuses; and none runs out of registers."""
    skip_without_triton()
    done = run(COMPILE, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_triton_passes_are_refused_for_masters_on_the_cpu(tmp_path):
    """With offload, say; Triton's own words come with the first update."""
    skip_without_triton()
    done = run(WITHOUT_A_GPU, tmp_path)
    assert "KernelError: kernels triton is for masters on a GPU" in done.stderr, done.stderr[-2000:]
