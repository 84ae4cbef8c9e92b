"""Size of a gated attention unit's output at initialisation, against the estimate of kexue.fm/archives/8990."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from experiments.common import Finding, draw, rms
from sutrain.models.configuration import EncoderConfig
from sutrain.models.gau import GatedAttentionUnit
from sutrain.models.init import initialise
from sutrain.models.visibility import build_visibility

LENGTHS = [64, 128, 256, 512, 1024]
ANCHORS = {64: 0.128, 128: 0.088, 512: 0.056, 1024: 0.055}  # relu_squared, measured before
KEY = 128


def silu_moments(points: int = 2_000_001) -> tuple[float, float]:
    """Mean and mean square of silu of a standard normal number, by the trapezoidal rule."""
    x = torch.linspace(-12, 12, points, dtype=torch.float64)
    weight = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    y = F.silu(x)
    return float(torch.trapezoid(y * weight, x)), float(torch.trapezoid(y * y * weight, x))


def output_size(
    normaliser: str, length: int, positions: str = "none", hidden: int = 512, seeds: int = 2
) -> float:
    """RMS of the unit's output for normal inputs, LeCun weights, scales 1, mean over `seeds`."""
    config = EncoderConfig(
        vocab_size=64,
        hidden_size=hidden,
        num_layers=1,
        mixer="gau",
        gau_expansion_size=2 * hidden,
        gau_key_size=KEY,
        score_normaliser=normaliser,
        positions=positions,
        initialisation="plain",
        attention_dropout=0.0,
    )
    sizes = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        unit = GatedAttentionUnit(config)
        for module in (unit, unit.input, unit.output):
            initialise(module, config)
        visible = build_visibility(torch.ones(1, length, dtype=torch.long), config, torch.float32)
        with torch.no_grad():
            sizes.append(rms(unit.finish(unit(torch.randn(1, length, hidden), visible))))
    return sum(sizes) / seeds


KINDS = {  # column -> (score normaliser, positions)
    "1/(ns)": ("relu_squared", "none"),
    "1/(ns), rotary": ("relu_squared", "rotary"),
    "1/n²": ("relu_squared_n2", "none"),
    "softmax": ("softmax", "none"),
    "softmax_plus, rotary": ("softmax_plus", "rotary"),
}


def run() -> Finding:
    """Measured sizes beside s v^6 / n."""
    mean, square = silu_moments()
    measured = {kind: [output_size(*KINDS[kind][:1], n, KINDS[kind][1]) for n in LENGTHS] for kind in KINDS}
    theory = [KEY * square**3 / n for n in LENGTHS]
    rows = [
        [str(n), f"{theory[i]:.4f}", *(f"{measured[kind][i]:.4f}" for kind in KINDS), f"{ANCHORS.get(n, '')}"]
        for i, n in enumerate(LENGTHS)
    ]
    at_512 = LENGTHS.index(512)
    squared = measured["1/(ns)"]
    checks = [
        ("the constants are 0.2066 and 0.3558", abs(mean - 0.20662) < 1e-4 and abs(square - 0.35578) < 1e-4),
        (
            "a unit with 1/(ns) starts two orders of magnitude below its input (below 0.02)",
            squared[at_512] < 0.02,
        ),
        (
            "without positions the sizes are those measured before, within a tenth",
            all(abs(squared[LENGTHS.index(n)] / value - 1) < 0.1 for n, value in ANCHORS.items()),
        ),
        (
            "so are those of 1/n² and softmax at 512 tokens (before 0.0135 and 0.129)",
            abs(measured["1/n²"][at_512] / 0.0135 - 1) < 0.1
            and abs(measured["softmax"][at_512] / 0.129 - 1) < 0.1,
        ),
        ("1/n² gives two orders of magnitude at 512 tokens (below 0.02)", measured["1/n²"][at_512] < 0.02),
        (
            "softmax gives two orders of magnitude at 512 tokens (below 0.02)",
            measured["softmax"][at_512] < 0.02,
        ),
    ]
    picture = draw(
        "gau_output",
        [float(n) for n in LENGTHS],
        {**measured, "theory s ν⁶ / n": theory},
        "tokens",
        "RMS of the output",
    )
    return Finding(
        "Output of a gated attention unit at the start",
        "RMS of GAU(x) for normal x and LeCun weights (width 512, expansion 1024, key size 128).",
        "kexue.fm/archives/8990 estimates s ν⁶ / n with ν² = E[silu²] = 0.3558, about 0.011 at 512 tokens, hence no "
        "warm-up. Measured before: 0.128, 0.088, 0.056, 0.055 at 64, 128, 512, 1024 tokens.",
        ["tokens", "s ν⁶ / n", *KINDS, "1/(ns), before"],
        rows,
        checks,
        "The estimate leaves out that values and keys have a positive mean (0.2066): what all keys share does not "
        "average out, and the size levels off instead of falling as 1/n. Rotary positions turn most of that "
        "away.",
        picture,
    )
