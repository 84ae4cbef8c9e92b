"""Peak rates and utilisation: numbers that people quote, so each is held to its source."""

import itertools
import time

import pytest
import torch

from sutrain.monitor import mfu
from sutrain.monitor.mfu import PEAK_TFLOPS, Peak, device_peak, measured_peak, mfu_ratio, vendor_peak


@pytest.mark.parametrize(
    ("device_name", "tflops"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H800", 989.4),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla V100-PCIE-32GB", 112),
        ("Tesla V100-SXM2-32GB", 125),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_peak_by_the_name_that_torch_reports(device_name, tflops):
    assert vendor_peak(device_name).flops_per_second == pytest.approx(tflops * 1e12)


def test_an_unknown_device_has_no_vendor_peak():
    assert vendor_peak("NVIDIA H1000") is None
    assert vendor_peak("cpu") is None


def test_a_slice_of_a_chip_is_measured_and_not_taken_for_the_whole():
    for name in ("NVIDIA H200 MIG 1g.18gb", "NVIDIA A100-SXM4-40GB MIG 3g.20gb", "NVIDIA A100-MIG-1g.5gb"):
        assert vendor_peak(name) is None


def test_dense_rates_are_half_of_the_sparse_ones_that_their_sources_quote():
    halves = [(t, s) for model, t, s in PEAK_TFLOPS if "with sparsity" in s and "for 8" not in s]
    assert len(halves) >= 8
    for tflops, source in halves:
        assert float(source.split(", ")[1].split()[0]) / 2 == pytest.approx(tflops, rel=0.02)


def test_measured_rate_is_that_of_a_matrix_product(monkeypatch):
    peak = measured_peak("cpu", torch.float32, size=256, seconds=0.05)
    assert "float32 matrix product measured on this cpu" in peak.source
    assert 1e8 < peak.flops_per_second < 1e14
    assert device_peak("cpu", torch.float32).source.startswith("float32 matrix product")
    # With a clock that ticks 2 ms a look, a product of 256 x 256 matrices takes 2 ms.
    ticks = itertools.count(step=0.002)
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    peak = measured_peak("cpu", torch.float32, size=256, seconds=0.05)
    assert peak.flops_per_second == pytest.approx(2 * 256**3 / 0.002)


def test_a_slow_precision_is_measured_by_small_products_alone(monkeypatch):
    """At 6 GFLOP/s a product of 1024 takes 0.36 s, which every start would pay for."""
    measured = []

    def rate(device, dtype, size, seconds):
        measured.append((size, seconds))
        return Peak(rates[size], str(size))

    monkeypatch.setattr(mfu, "measured_peak", rate)
    rates = {512: 6e9, 1024: 7e9}
    assert device_peak("cpu", torch.bfloat16).source == "512"
    assert measured == [(512, 0.15)]
    rates = {512: 60e9, 1024: 70e9}
    assert device_peak("cpu", torch.bfloat16).source == "1024"


def test_mfu_by_hand():
    # 1e9 FLOPs a token, 200,000 tokens/s on two devices of 1e15: 2e14 of 2e15.
    assert mfu_ratio(1e9, 200_000, 2 * 1e15) == pytest.approx(0.1)
