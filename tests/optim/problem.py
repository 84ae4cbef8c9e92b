"""A training problem whose gradients are prescribed and exact in bf16, the same averaged over 1, 2 or 3
ranks.

The loss is linear in the parameters, so its gradient is the coefficient we choose. Coefficients are multiples
of 6 times a power of two: sums over ranks, divisions by 2 or 3 and bf16 storage are all exact, and a float64
reference sees the very gradients the engine sees.
"""

import numpy as np
import torch
from torch import nn

STEPS = 20
LEARNING_RATE = 0.03125
PER_TENSOR = {
    "cube": {"learning_rate_scale": 0.5},
    "wide": {"weight_decay": 0.5},
    "vector": {"weight_decay": 0.0, "adapt": False},
}

SHAPES = {  # in model order; without the frozen one and the second name of the tied one
    "embedding": (10, 6),
    "odd": (7, 13),
    "cube": (3, 5, 4),
    "wide": (40, 11),  # over three ranks of three
    "vector": (5,),
    "single": (1,),
}

OPTIMIZERS = {
    "adafactor": ("adafactor", {"weight_decay": 0.0625}),
    "adafactor_momentum": (
        "adafactor",
        {"momentum": 0.9, "weight_decay": 0.0625, "clip_global_norm": 4.0, "factored_dimensions": "largest",
         "relative_step": True, "min_dim_size_to_factor": 5},
    ),
    "lamb": ("lamb", {"weight_decay": 0.0625, "clip_global_norm": 8.0}),
    "adamw": ("adamw", {"weight_decay": 0.0625}),
}  # fmt: skip


ENGINES = {  # name: (ZeRO stage, bf16, grad_accum_dtype)
    "stage0_fp32": (0, False, "fp32"),
    "stage0_bf16": (0, True, "bf16"),
    "stage1_fp32": (1, False, "fp32"),
    "stage1_bf16": (1, True, "bf16"),
    "stage1_bf16_accumulate_fp32": (1, True, "fp32"),
    "stage2_fp32": (2, False, "fp32"),
    "stage2_bf16": (2, True, "bf16"),
    "stage2_bf16_accumulate_fp32": (2, True, "fp32"),
}


def cases(world_size: int) -> list[tuple[str, str]]:
    """(engine, optimizer): all pairs on two ranks; on one and three, AdaFactor on all and the others on
    two."""
    return [
        (engine, optimizer)
        for engine in ENGINES
        for optimizer in OPTIMIZERS
        if world_size == 2
        or optimizer == "adafactor"
        or engine in ("stage1_fp32", "stage1_bf16_accumulate_fp32")
    ]


class Toy(nn.Module):
    """Odd shapes, a tied and a frozen tensor; forward is Σ coefficient · parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(start("embedding"))
        self.odd = nn.Parameter(start("odd"))
        self.frozen = nn.Parameter(torch.ones(4, 4), requires_grad=False)
        self.cube = nn.Parameter(start("cube"))
        self.wide = nn.Parameter(start("wide"))
        self.vector = nn.Parameter(start("vector"))
        self.single = nn.Parameter(start("single"))
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embedding

    def forward(self, coefficients: dict[str, torch.Tensor]) -> torch.Tensor:
        total = 0.5 * (self.head.weight * coefficients["embedding"]).sum() + 0 * self.frozen.sum()
        for name, value in coefficients.items():
            share = 0.5 if name == "embedding" else 1.0
            total = total + (getattr(self, name) * (share * value)).sum()
        return total


def start(name: str) -> torch.Tensor:
    """First weights, exact in bf16; tensors differ in scale by powers of two."""
    index = list(SHAPES).index(name)
    values = np.random.default_rng(100 + index).integers(-64, 65, SHAPES[name])
    return torch.tensor(values * 2.0 ** (-7 - index), dtype=torch.float32)


def mean_gradient(step: int, name: str) -> np.ndarray:
    """The gradient averaged over all ranks, float64; sizes jump with the step so that clipping has work."""
    return _integers(step, name)[0] * _scale(step, name)


def rank_gradient(step: int, name: str, rank: int, world_size: int) -> np.ndarray:
    """What one rank contributes: differs between ranks, averages to mean_gradient exactly."""
    base, spread = _integers(step, name)
    return (base + spread * (2 * rank - (world_size - 1))) * _scale(step, name)


def _integers(step: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng([step, list(SHAPES).index(name)])
    return 6.0 * random.integers(-6, 7, SHAPES[name]), 6.0 * random.integers(0, 2, SHAPES[name])


def _scale(step: int, name: str) -> np.ndarray:
    rows = np.arange(SHAPES[name][0]).reshape(-1, *[1] * (len(SHAPES[name]) - 1))
    return 2.0 ** (-8 + step * 7 % 5 - rows % 4)
