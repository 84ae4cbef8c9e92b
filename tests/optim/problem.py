"""A training problem whose gradients are prescribed and exact in 16 bit, the same averaged over 1, 2, 3 or 4
ranks.

The loss is linear in the parameters, so its gradient is the coefficient we choose. Coefficients are multiples
of 6 times a power of two: sums over ranks, divisions by 2, 3 or 4 and 16-bit storage are all exact, and a
float64 reference sees the very gradients the engine sees.
"""

from dataclasses import dataclass
from functools import cache
from math import prod

import numpy as np
import torch
from torch import nn

STEPS = 20
LEARNING_RATE = 0.03125
PER_TENSOR = {
    "cube": {"learning_rate_scale": 0.5},
    "wide": {"weight_decay": 0.5},
    "vector": {"weight_decay": 0.0, "adapt": False},
    "fused#1": {"learning_rate_scale": 0.25},
}

PARAMETERS = {  # in model order; without the frozen one and the second name of the tied one
    "embedding": (10, 6),
    "odd": (7, 13),
    "cube": (3, 5, 4),
    "wide": (40, 11),  # over three ranks of three and more
    "vector": (5,),  # of ZeRO-3's slices over four ranks the last is empty
    "single": (1,),
    "fused": (12, 4),  # three tensors in one parameter
}
UNUSED = {7: ("odd", "vector", "single"), 15: ("fused",)}
"""Parameters that take no part in the loss of some updates: their gradient is zero, not that of the update before."""
LOGICAL = {"fused": 3}
SHAPES = {name: shape for name, shape in PARAMETERS.items() if name not in LOGICAL} | {
    f"fused#{part}": (4, 4) for part in range(3)
}
"""The logical tensors, of which statistics are."""

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


@dataclass(frozen=True)
class Engine:
    """stage of ZeRO, type of the weights, type in which gradients accumulate, whether the CPU keeps the state, and
    whether ZeRO-3 cuts everything (else small tensors stay whole and there is one sub-group)."""

    stage: int
    precision: str
    accumulate: str
    offload: bool = False
    cut: bool = True


ENGINES = {
    "stage0_fp32": Engine(0, "fp32", "fp32"),
    "stage0_bf16": Engine(0, "bf16", "bf16"),
    "stage0_fp16": Engine(0, "fp16", "fp16"),
    "stage1_fp32": Engine(1, "fp32", "fp32"),
    "stage1_bf16": Engine(1, "bf16", "bf16"),
    "stage1_bf16_accumulate_fp32": Engine(1, "bf16", "fp32"),
    "stage1_fp16": Engine(1, "fp16", "fp32"),
    "stage1_bf16_offload": Engine(1, "bf16", "fp32", offload=True),
    "stage2_fp32": Engine(2, "fp32", "fp32"),
    "stage2_bf16": Engine(2, "bf16", "bf16"),
    "stage2_bf16_accumulate_fp32": Engine(2, "bf16", "fp32"),
    "stage2_fp16": Engine(2, "fp16", "fp32"),
    "stage2_fp16_offload": Engine(2, "fp16", "fp16", offload=True),
    "stage3_fp32": Engine(3, "fp32", "fp32"),
    "stage3_bf16": Engine(3, "bf16", "bf16"),
    "stage3_bf16_accumulate_fp32": Engine(3, "bf16", "fp32"),
    "stage3_bf16_uncut": Engine(3, "bf16", "fp32", cut=False),
    "stage3_fp16": Engine(3, "fp16", "fp32"),
    "stage3_bf16_offload": Engine(3, "bf16", "fp32", offload=True),
}
WITH_ALL_OPTIMIZERS = ("stage1_fp32", "stage1_bf16_accumulate_fp32", "stage3_fp32")
ALSO_ON_TWO_RANKS = ("stage0_bf16", "stage2_bf16", "stage3_fp16")  # fp16 with clipping
FP16_ON_CPU = bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())  # DeepSpeed refuses fp16 on other processors


def cases(world_size: int) -> list[tuple[str, str]]:
    """(engine, optimizer): AdaFactor on all engines, the other optimizers on some."""
    with_all = WITH_ALL_OPTIMIZERS + (ALSO_ON_TWO_RANKS if world_size == 2 else ())
    return [
        (engine, optimizer)
        for engine in engines()
        for optimizer in OPTIMIZERS
        if optimizer == "adafactor" or engine in with_all
    ]


def engines() -> list[str]:
    """Names of the ENGINES that run on this processor."""
    return [name for name, engine in ENGINES.items() if engine.precision != "fp16" or FP16_ON_CPU]


MOVES = {  # name: (world and engine that save, world and engine that go on, optimizer)
    "four_ranks_stage1_to_two_stage3": (4, "stage1_fp32", 2, "stage3_fp32", "adafactor_momentum"),
    "four_ranks_stage1_to_two_stage3_bf16": (4, "stage1_bf16_accumulate_fp32", 2, "stage3_bf16", "adafactor"),
    "three_ranks_stage3_to_two_stage0": (3, "stage3_fp32", 2, "stage0_bf16", "lamb"),
} | (
    {"four_ranks_stage1_to_two_stage3_fp16": (4, "stage1_fp16", 2, "stage3_fp16", "adafactor")}
    if FP16_ON_CPU
    else {}
)


class Toy(nn.Module):
    """Odd shapes, a tied and a frozen tensor; forward is Σ coefficient · parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(first_weight("embedding"))
        self.odd = nn.Parameter(first_weight("odd"))
        self.frozen = nn.Parameter(torch.ones(4, 4), requires_grad=False)
        for name in list(PARAMETERS)[2:]:
            self.register_parameter(name, nn.Parameter(first_weight(name)))
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embedding

    def forward(self, coefficients: dict[str, torch.Tensor]) -> torch.Tensor:
        total = 0.5 * (self.head.weight * coefficients["embedding"]).sum() + 0 * self.frozen.sum()
        for name, value in coefficients.items():
            share = 0.5 if name == "embedding" else 1.0
            total = total + (getattr(self, name) * (share * value)).sum()
        return total


def tensors_of(parameter: str) -> list[str]:
    """Logical tensors of a parameter, end to end."""
    parts = LOGICAL.get(parameter)
    return [f"{parameter}#{part}" for part in range(parts)] if parts else [parameter]


def whole(parameter: str, by_tensor: dict[str, np.ndarray]) -> np.ndarray:
    """A parameter put together from its logical tensors."""
    values = [by_tensor[name] for name in tensors_of(parameter)]
    return values[0] if len(values) == 1 else np.concatenate(values)


def first_weight(parameter: str) -> torch.Tensor:
    values = whole(parameter, {name: start(name) for name in tensors_of(parameter)})
    return torch.tensor(values, dtype=torch.float32)


def start(name: str) -> np.ndarray:
    """First weights, exact in 16 bit; tensors differ in scale by powers of two."""
    index = list(SHAPES).index(name)
    return np.random.default_rng(100 + index).integers(-64, 65, SHAPES[name]) * 2.0 ** (-7 - index)


def mean_gradient(step: int, name: str) -> np.ndarray:
    """The gradient averaged over all ranks, float64; sizes jump with the step so that clipping has work."""
    return _integers(step, name)[0] * _scale(step, name)


def rank_gradient(
    step: int, parameter: str, rank: int, world_size: int, micro: int = 0, micros: int = 1
) -> np.ndarray:
    """What one micro-batch of a rank contributes: differs between them, averages to mean_gradient exactly."""
    position, count = rank * micros + micro, world_size * micros
    values = {}
    for name in tensors_of(parameter):
        base, spread = _integers(step, name)
        values[name] = (base + spread * (2 * position - (count - 1))) * _scale(step, name)
    return whole(parameter, values)


@cache
def _integers(step: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    if name.split("#")[0] in UNUSED.get(step, ()):
        return np.zeros(SHAPES[name]), np.zeros(SHAPES[name])
    random = np.random.default_rng([step, list(SHAPES).index(name)])
    return 6.0 * random.integers(-6, 7, SHAPES[name]), 6.0 * random.integers(0, 2, SHAPES[name])


def _scale(step: int, name: str) -> np.ndarray:
    rows = np.arange(SHAPES[name][0]).reshape(-1, *[1] * (len(SHAPES[name]) - 1))
    return 2.0 ** (-8 + step * 7 % 5 - rows % 4)


TOTAL = sum(prod(shape) for shape in PARAMETERS.values())
