"""What a GPU would run, without one: on which device tensors are, what the host waits for, how many bytes move."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, environment
from tests.fake_cuda import LONG, SETTINGS, STEPS, TRAFFIC


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Of every case, by its name. A process of its own, which takes this machine for one with a GPU."""
    command = [sys.executable, "-m", "tests.fake_cuda"]
    if torch.version.cuda is None:
        command.append(str(compiled(tmp_path_factory.mktemp("fake_cuda"))))
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def compiled(folder: Path) -> Path:
    torch_folder = Path(torch.__file__).parent
    library, compiler = folder / "fake_cuda.so", shutil.which("g++")
    assert compiler is not None, "sudo apt-get install g++"
    command = [
        compiler,
        "-std=c++20",
        "-shared",
        "-fPIC",
        f"-I{torch_folder}/include",
        f"-L{torch_folder}/lib",
    ]
    sources = [str(ROOT / "tests/fake_cuda.cpp"), "-o", str(library), "-lc10", "-ltorch_cpu"]
    result = subprocess.run([*command, *sources], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return library


@pytest.mark.parametrize("case", [*STEPS, *LONG], ids=str)
def test_a_step_is_on_the_device_and_waits_for_nothing_but_its_batch(seen, case):
    """How many tokens are predicted, and where documents lie if they are taken apart; nothing within a layer."""
    found = seen[str(case)]
    assert "error" not in found, found["error"]
    assert found["wrong"] == []  # gradients of another device or dtype
    assert set(found["copies"]) <= {"rotary.py:_table"}  # which is made once
    waits = {"masked_lm.py:predicted_positions": 1}
    flash, gated = "flash" in case.config, "gau" in case.config
    if flash or not (gated or (case.dropout and case.training)):
        waits["documents.py:find_documents"] = 4
    if flash:
        waits["chunks.py:build_chunks"] = 1
    assert found["waits"] == waits


@pytest.mark.parametrize(("dropout", "most"), [(0.0, 166_000), (0.1, 181_000)])
def test_a_layer_of_the_base_model_moves_few_bytes(seen, dropout, most):
    """Beside products and attention, in bf16 without a compiler: each copy in fp32 would add 6 to 8 bytes a feature, of
    which a layer's stream has 768."""
    one, two = (seen[str(case)] for case in TRAFFIC[dropout])
    assert "error" not in one and "error" not in two
    assert (two["moved"] - one["moved"]) / one["tokens"] < most
    assert two["kernels"] - one["kernels"] <= 56


KERNELS = {"adafactor": 168, "lamb": 99, "adamw": 108, "egd": 101}
"""Of an update of three tensors, most of them whatever their number."""


@pytest.mark.parametrize("name", SETTINGS)
def test_an_update_waits_for_the_norm_and_the_steps_of_all_tensors(seen, name):
    found = seen[name]
    assert "error" not in found, found["error"]
    assert found["wrong"] == [] and found["copies"] == {}
    assert found["kernels"] <= KERNELS[name]
    passes = "adafactor_apply" if name == "adafactor" else "add_directions"
    assert found["waits"] == {"base.py:global_grad_norm": 1, f"eager.py:{passes}": 1}
