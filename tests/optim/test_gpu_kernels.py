"""The Triton passes against the eager ones, in Triton's interpreter: torch's CPU build comes without Triton."""

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PROGRAM = """
import tests.optim.test_kernels as tests
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


def test_triton_passes_equal_the_eager_ones_in_the_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (it comes with torch's CUDA build)")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
