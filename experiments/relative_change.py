"""How much each layer changes what runs through the model, pre-norm against post-norm (kexue.fm/archives/9009)."""

from __future__ import annotations

from itertools import pairwise

import torch

from experiments.common import Finding, attention_model, draw, rms
from sutrain.models.encoder import Encoder

DEPTH, SEEDS = 48, 8
SHOWN = [1, 12, 24, 48]
ANCHORS = {"pre": (0.64, 0.36, 0.22, 0.145), "post": (0.77,) * 4, "deepnorm": (0.010,) * 4}


def relative_changes(kind: str, seed: int = 0) -> tuple[list[float], float]:
    """‖x_{l+1} - x_l‖ / ‖x_l‖ of every layer, and the RMS of what leaves the last one ahead of a final norm."""
    torch.manual_seed(seed)
    encoder = Encoder(attention_model(kind, DEPTH)).eval()
    stream: list[torch.Tensor] = []
    for layer in encoder.layers:
        layer.register_forward_hook(lambda module, arguments, output: stream.append(output))
    encoder.layers[0].register_forward_pre_hook(lambda module, arguments: stream.append(arguments[0]))
    with torch.no_grad():
        encoder(torch.randint(5, 64, (8, 32)))
    changes = [rms(b - a) / rms(a) for a, b in pairwise(stream)]
    return changes, rms(stream[-1])


def averaged(kind: str) -> tuple[list[float], float]:
    """The same as means over seeds: at width 64 one draw of a layer's weights moves its number by a fifth."""
    changes, sizes = zip(*(relative_changes(kind, seed) for seed in range(SEEDS)), strict=True)
    return [sum(layer) / SEEDS for layer in zip(*changes, strict=True)], sum(sizes) / SEEDS


def run() -> Finding:
    """The table by layer."""
    found = {kind: averaged(kind) for kind in ANCHORS}
    rows = [
        [kind]
        + [f"{found[kind][0][n - 1]:.3f} ({before})" for n, before in zip(SHOWN, anchor, strict=True)]
        + [f"{found[kind][1]:.2f}"]
        for kind, anchor in ANCHORS.items()
    ]
    pre, post = found["pre"][0], found["post"][0]
    lower, upper = sum(post[: DEPTH // 2]), sum(post[DEPTH // 2 :])
    checks = [
        (
            "pre-norm: later layers change less and less (last below a third of the first)",
            pre[-1] < pre[0] / 3,
        ),
        (
            "post-norm: the upper half changes as much as the lower (within a quarter)",
            abs(upper / lower - 1) < 0.25,
        ),
        (
            "pre-norm: the stream grows about as the root of the depth (5 to 12 here)",
            5 < found["pre"][1] < 12,
        ),
        ("DeepNorm: a layer changes about one percent", 0.003 < found["deepnorm"][0][-1] < 0.03),
    ]
    for kind, anchor in ANCHORS.items():
        here = [found[kind][0][n - 1] for n in SHOWN]
        far = max(abs(value / before - 1) for value, before in zip(here, anchor, strict=True))
        checks.append(
            (
                f"{kind}: all four are what was measured before, within a fifth (off by up to {100 * far:.0f} %)",
                far < 0.2,
            )
        )
    picture = draw(
        "relative_change",
        [float(n + 1) for n in range(DEPTH)],
        {kind: found[kind][0] for kind in ANCHORS},
        "layer",
        "relative change",
    )
    return Finding(
        "What a layer changes: pre-norm, post-norm, DeepNorm",
        "‖x(l+1) - x(l)‖ / ‖x(l)‖ at initialisation, 48 layers of width 64; in brackets what was measured before.",
        "kexue.fm/archives/9009: with pre-norm depth is watered down, later layers act like one wider layer.",
        ["residual", *(f"layer {n}" for n in SHOWN), "RMS at the end"],
        rows,
        checks,
        "0.77 is √(2 - √2), what one branch as large as the stream does to it. A layer here has two: "
        "attention's is 0.30 of the stream in the first layer, where it averages over tokens that differ, and "
        "about 1 from layer 12 on, where the tokens of a row have become alike (cosine 1.00); the feed-forward one "
        "is 0.5 to 0.6 throughout (seed 0).",
        picture,
    )
