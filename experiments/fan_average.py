"""Which average of the two dimensions keeps a vector's size through a map up and one down (kexue.fm/archives/8725)."""

from __future__ import annotations

import torch

from experiments.common import Finding
from sutrain.models.init import average_fan, truncated_normal_

SMALL, LARGE = 256, 1024
ANCHORS = {"arithmetic": 0.644, "geometric": 0.997, "quadratic": 0.352}


def second_moment(average: str, rows: int = 2000) -> float:
    """Mean square of x W1 W2 for normal x, W1 from 256 to 1024 features and W2 back, without an activation."""
    torch.manual_seed(0)
    deviation = average_fan(SMALL, LARGE, average) ** -0.5
    up, down = torch.empty(LARGE, SMALL), torch.empty(SMALL, LARGE)
    truncated_normal_(up, deviation)
    truncated_normal_(down, deviation)
    return float((torch.randn(rows, SMALL) @ up.T @ down.T).square().mean())


def run() -> Finding:
    """Theory is m n / avg²."""
    found = {average: second_moment(average) for average in ANCHORS}
    theory = {average: SMALL * LARGE / average_fan(SMALL, LARGE, average) ** 2 for average in ANCHORS}
    rows = [[a, f"{theory[a]:.3f}", f"{found[a]:.3f}", f"{ANCHORS[a]}"] for a in ANCHORS]
    checks = [
        ("the geometric mean keeps the size", abs(found["geometric"] - 1) < 0.03),
        (
            "all three are what the theory says, within 3 %",
            all(abs(found[a] / theory[a] - 1) < 0.03 for a in ANCHORS),
        ),
    ]
    return Finding(
        "Averaging the dimensions of a matrix that is not square",
        "Second moment after 256 → 1024 → 256 features, both matrices with variance 1 / average.",
        "kexue.fm/archives/8725 has no experiments; theory m n / average². Measured before: 0.644, 0.997, 0.352.",
        ["average", "theory", "here", "before"],
        rows,
        checks,
    )
