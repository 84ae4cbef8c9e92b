"""BERT's 0.02 and warm-up: what each does for a deep post-norm model (kexue.fm/archives/8747)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from experiments.common import Finding, draw, rms
from experiments.trainability import mean_tail, train, transformer
from sutrain.models.init import truncated_normal_

WIDTH = 768
BRANCHES = {"feed-forward": (0.27, 0.65), "value and output": (0.24, 1.0)}  # 0.02 and LeCun, measured before
DEPTHS, STEPS, WARM_UP = [6, 24], 250, 100
SMALL = 0.0176 / WIDTH**-0.5
"""What 0.02, cut, is of LeCun's deviation at BERT's width: 0.49. At width 64 the number 0.02 itself is 0.14 of it."""


def cut_deviation() -> float:
    """Deviation that a normal with deviation 1, cut at two of them, is left with, sampled."""
    torch.manual_seed(0)
    weight = torch.empty(2000, 2000)
    torch.nn.init.trunc_normal_(weight, std=1.0, a=-2.0, b=2.0)
    return weight.std().item()


def branch_sizes(deviation: float | None) -> dict[str, float]:
    """RMS of a feed-forward block with GELU, and of value and output maps, for normal input of width 768.

    deviation: ahead of the cut, of every matrix; None for 1 / sqrt(fan_in) behind it.
    """
    torch.manual_seed(0)
    x = torch.randn(512, WIDTH)

    def through(x: torch.Tensor, features: int) -> torch.Tensor:
        weight = torch.empty(features, x.shape[-1])
        if deviation is None:
            truncated_normal_(weight, x.shape[-1] ** -0.5)
        else:
            torch.nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)
        return x @ weight.T

    return {
        "feed-forward": rms(through(F.gelu(through(x, 4 * WIDTH)), WIDTH)),
        "value and output": rms(through(through(x, WIDTH), WIDTH)),
    }


STARTS = {  # what the layers' matrices are multiplied by at the start
    "Xavier": 1.0,
    "as 0.02 at width 768": SMALL,
    "0.02 itself": 0.0176 / 64**-0.5,
}


def run() -> Finding:
    """Branch sizes at BERT's width, then post-norm at two depths from three starts, with and without warm-up."""
    deviation = cut_deviation()
    sizes = {"0.02": branch_sizes(0.02), "LeCun": branch_sizes(None)}
    found, curves = {}, {}
    for depth in DEPTHS:
        for start, gain in STARTS.items():
            for warm_up in (0, WARM_UP):
                losses = train(transformer("post", depth), STEPS, warm_up=warm_up, gain=gain)
                found[start, depth, warm_up] = mean_tail(losses)
                if depth == DEPTHS[-1]:
                    curves[f"{start}, warm-up {warm_up}"] = losses
    rows = [[start, *(f"{found[start, d, w]:.2f}" for d in DEPTHS for w in (0, WARM_UP))] for start in STARTS]
    deep = DEPTHS[-1]
    scaled = "as 0.02 at width 768"
    near = all(
        abs(sizes[start][branch] / before - 1) < 0.1
        for branch, both in BRANCHES.items()
        for start, before in zip(sizes, both, strict=True)
    )
    measured = "; ".join(
        f"{branch} {sizes['0.02'][branch]:.2f} and {sizes['LeCun'][branch]:.2f}, before {both[0]} and {both[1]}"
        for branch, both in BRANCHES.items()
    )
    checks = [
        (
            f"a normal cut at two deviations keeps 0.8796 of its deviation (here {deviation:.4f}): BERT's 0.02 is "
            "0.0176",
            abs(deviation - 0.8796) < 0.002,
        ),
        (f"branches of width 768 start at sizes measured before, within a tenth ({measured})", near),
    ]
    for depth in DEPTHS:
        values = [found["Xavier", depth, w] for w in (0, WARM_UP)]
        small = found[scaled, depth, 0]
        checks += [
            (
                f"{depth} layers from Xavier's weights without warm-up stay at chance (above 2.9; here "
                f"{values[0]:.2f}, before 3.01)",
                values[0] > 2.9,
            ),
            (f"{depth} layers: warm-up alone mends it (below 1.0; here {values[1]:.2f})", values[1] < 1.0),
            (f"{depth} layers: the smaller start alone mends it (below 1.0; here {small:.2f})", small < 1.0),
        ]
    both_small, with_both = found["0.02 itself", deep, 0], found[scaled, deep, WARM_UP]
    checks.append(
        (
            f"{deep} layers: the smaller start and warm-up together mend it (below 1.0; here {with_both:.2f})",
            with_both < 1.0,
        )
    )
    picture = draw(
        "warm_up", [float(i + 1) for i in range(STEPS)], curves, "update", f"loss, {deep} layers", log=""
    )
    return Finding(
        "BERT's 0.02 and warm-up",
        f"Post-norm transformers of width 64 on masked arithmetic sequences (chance 3.00), Adam 1e-3; mean loss of the "
        f"last 20 of {STEPS} updates at {DEPTHS[0]} and {DEPTHS[1]} layers, from Xavier's weights, from weights as "
        f"much smaller as BERT's are at its width (0.49 of LeCun's), and from 0.02 itself; without warm-up and with "
        f"{WARM_UP} linear updates of it.",
        "kexue.fm/archives/8747 has no numbers: post-norm needs warm-up, and 0.02 brings it nearer to the identity. "
        "Measured before, from Xavier without warm-up: 3.01 at 6, 24 and 60 layers.",
        ["start", *(f"{d} layers, {w} warm-up" for d in DEPTHS for w in (0, WARM_UP))],
        rows,
        checks,
        f"0.02 itself is 0.14 of LeCun's deviation at width 64 ({both_small:.2f} at {deep} layers without "
        "warm-up): the constant does not know the width.",
        picture,
    )
