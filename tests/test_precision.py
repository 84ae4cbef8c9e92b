"""A precision left open becomes the fast one of this machine and is written down as such; a slow one is remarked on."""

import time

import pytest
import torch

from data_prep.config_file import load_config, to_yaml
from sutrain import precision
from sutrain.config import PretrainConfig

MACHINES = {
    "x86 with AVX2": ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, "fp32"),
    "x86 with AVX-512, without bf16": ({"avx512_f": True}, "fp32"),
    "x86 with AVX512-bf16": ({"avx512_f": True, "avx512_bf16": True}, "bf16"),
    "x86 with AMX": ({"amx_bf16": True, "amx_tile": True}, "bf16"),
    "ARM with bf16": ({"neon": True, "bf16": True}, "bf16"),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_open_precision_follows_the_processor(monkeypatch, write_config, machine):
    capabilities, expected = MACHINES[machine]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    config = load_config(PretrainConfig, write_config(precision="auto"), [])
    assert config.precision == expected and f"precision: {expected}\n" in to_yaml(config)
    assert load_config(PretrainConfig, write_config(precision="bf16"), []).precision == "bf16"
    assert bool(precision.remark("bf16")) == (expected == "fp32")
    assert not precision.remark("fp32") and not precision.remark(expected)


def test_open_precision_is_the_faster_one_of_this_machine(monkeypatch):
    """By the clock, so that a wrong idea of what a processor can do is seen."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def seconds(dtype: torch.dtype) -> float:
        a, b = (torch.ones(512, 512, dtype=dtype) for _ in range(2))
        best = float("inf")
        for _ in range(8):
            started = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - started)
        return best

    bf16, fp32 = seconds(torch.bfloat16), seconds(torch.float32)
    chosen, other = (bf16, fp32) if precision.resolve("auto") == "bf16" else (fp32, bf16)
    assert chosen < 1.5 * other, (precision.resolve("auto"), f"bf16 {bf16:.2e} s, fp32 {fp32:.2e} s")
