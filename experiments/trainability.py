"""Which deep models train without warm-up at all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from experiments.common import Finding, attention_model, draw
from sutrain.models.configuration import EncoderConfig
from sutrain.models.masked_lm import MaskedLanguageModel

TASK = (
    "Of the task measured before only the numbers and places are known. Steps of 1 to 3 and rotary positions bring 6 "
    "layers of DeepNorm to the loss of then; with steps of 1 to 19 the order is the same and the losses higher."
)

CLOSE = 0.1
"""How near a loss must come to the one measured before to count as the same."""

KINDS = ["post", "pre", "deepnorm", "su_adam"]
ANCHORS = {  # mean loss of steps 231-250, measured before
    6: (3.01, 0.24, 0.08, 0.32),
    24: (3.01, 1.38, 0.02, 0.06),
    60: (3.01, 2.78, 0.02, 0.03),
}


def sequences(rows: int, tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Arithmetic sequences modulo 20 by steps of 1 to 3, and which quarter of their places is hidden (token 20)."""
    start = torch.randint(0, 20, (rows, 1), generator=generator)
    step = torch.randint(1, 4, (rows, 1), generator=generator)
    whole = (start + step * torch.arange(tokens)) % 20
    hidden = torch.rand(whole.shape, generator=generator) < 0.25
    return whole, hidden


def train(
    config: EncoderConfig,
    steps: int,
    tokens: int = 16,
    rows: int = 32,
    warm_up: int = 0,
    gain: float = 1.0,
    vector_scale: float = 1.0,
) -> list[float]:
    """Losses of Adam at 1e-3, from the first update on or after `warm_up` linear ones.

    gain: what the matrices of the layers are multiplied by ahead of it all; vector_scale: share of the learning rate
    that the layers' gains, shifts and biases take.
    """
    torch.manual_seed(0)
    model = MaskedLanguageModel(config).train()
    with torch.no_grad():
        for parameter in model.encoder.layers.parameters():
            parameter.mul_(gain if parameter.dim() == 2 else 1.0)
    groups: dict[bool, list[torch.nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        groups[name.startswith("encoder.layers.") and parameter.dim() < 2].append(parameter)
    optimizer = torch.optim.Adam([{"params": parameters} for parameters in groups.values()])
    generator = torch.Generator().manual_seed(1)
    documents = torch.ones(rows, tokens, dtype=torch.long)
    losses = []
    for step in range(steps):
        for group, scale in zip(optimizer.param_groups, (1.0, vector_scale), strict=True):
            group["lr"] = scale * 1e-3 * min(1.0, (step + 1) / (warm_up + 1))
        whole, hidden = sequences(rows, tokens, generator)
        states = model(whole.masked_fill(hidden, 20), documents)
        loss = F.cross_entropy(model.logits(states[hidden]), whole[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def transformer(kind: str, depth: int) -> EncoderConfig:
    """Width 64 as in the other experiments, with 21 tokens, rotary positions and a head of its own."""
    return attention_model(kind, depth, vocab_size=21, tied_head=False)


class Gated(NamedTuple):
    """A kind of gated unit, the task's places, and what was measured before by depth."""

    label: str
    normaliser: str
    initialisation: str
    tokens: int
    key_size: int
    anchors: dict[int, float]

    def config(self, depth: int) -> EncoderConfig:
        """Post-RMS gated units of width 64."""
        return EncoderConfig(
            vocab_size=21,
            hidden_size=64,
            num_layers=depth,
            mixer="gau",
            gau_expansion_size=128,
            gau_key_size=self.key_size,
            score_normaliser=self.normaliser,
            initialisation=self.initialisation,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            token_types=0,
            tied_head=False,
        )


def mean_tail(losses: list[float], count: int = 20) -> float:
    """Mean of the last losses."""
    return sum(losses[-count:]) / count


def run() -> Finding:
    """Transformers at 6, 24 and 60 layers."""
    rows, curves, found = [], {}, {}
    for depth, anchor in ANCHORS.items():
        row = [str(depth)]
        for kind, before in zip(KINDS, anchor, strict=True):
            losses = train(transformer(kind, depth), 250)
            found[kind, depth] = mean_tail(losses)
            curves[f"{kind} {depth}"] = losses
            row.append(f"{found[kind, depth]:.2f} ({before})")
        rows.append(row)
    checks = [
        (
            "post-norm does not learn at 24 and 60 layers (above 2.9)",
            min(found["post", 24], found["post", 60]) > 2.9,
        ),
        ("DeepNorm learns at every depth (below 0.3)", max(found["deepnorm", d] for d in ANCHORS) < 0.3),
        ("pre-norm gets worse with depth", found["pre", 60] > found["pre", 6]),
        (
            "Su's Adam row learns at 24 and 60 layers (below 0.3)",
            max(found["su_adam", d] for d in (24, 60)) < 0.3,
        ),
    ]
    far = [
        f"{kind} at {depth} {found[kind, depth] - before:+.2f}"
        for depth, anchor in ANCHORS.items()
        for kind, before in zip(KINDS, anchor, strict=True)
        if abs(found[kind, depth] - before) > CLOSE
    ]
    checks.append(
        (
            f"every loss is within {CLOSE} of the one before" + (f": not {', '.join(far)}" if far else ""),
            not far,
        )
    )
    shown = {name: curve for name, curve in curves.items() if name.endswith("60")}
    picture = draw(
        "trainability", [float(i + 1) for i in range(250)], shown, "update", "loss, 60 layers", log=""
    )
    return Finding(
        "Training without warm-up, by depth",
        "Masked arithmetic sequences (20 numbers, 16 places, steps of 1 to 3, 32 rows, chance 3.00), Adam 1e-3 from "
        "the first update; mean loss of the last 20 of 250 updates, in brackets what was measured before.",
        "arXiv 2203.00555: DeepNorm trains at 1000 layers where post-norm diverges (with warm-up there).",
        ["layers", *KINDS],
        rows,
        checks,
        TASK,
        picture,
    )


GATED = [
    Gated("1/(ns)", "relu_squared", "plain", 16, 32, {12: 0.24, 48: 0.73, 120: 3.00}),
    Gated("softmax", "softmax", "plain", 16, 32, {12: 0.18, 48: 0.15, 120: 3.02}),
    Gated("softmax, order 3", "softmax", "gau_alpha", 16, 32, {12: 0.18, 48: 0.16, 120: 0.22}),
    Gated("softmax_plus, order 3", "softmax_plus", "gau_alpha", 16, 32, {120: 0.53}),
    Gated("1/(ns), 64 places", "relu_squared", "plain", 64, 16, {120: 1.91}),
    Gated("1/n², 64 places", "relu_squared_n2", "plain", 64, 16, {120: 0.05}),
]


def run_gau() -> Finding:
    """Gated units at 12, 48 and 120 layers."""
    rows, found, curves = [], {}, {}
    for depth in (12, 48, 120):
        row = [str(depth)]
        for kind in GATED:
            if depth not in kind.anchors:
                row.append("")
                continue
            losses = train(kind.config(depth), 200, kind.tokens, rows=512 // kind.tokens)
            found[kind.label, depth] = mean_tail(losses)
            if depth == 120:
                curves[kind.label] = losses
            row.append(f"{found[kind.label, depth]:.2f} ({kind.anchors[depth]:.2f})")
        rows.append(row)
    at_48 = {label: value for (label, depth), value in found.items() if depth == 48}
    scaled = found["softmax, order 3", 120]
    plain = {label: found[label, 120] for label in ("1/(ns)", "softmax")}
    off = {
        f"{kind.label} at {depth}": found[kind.label, depth] - before
        for kind in GATED
        for depth, before in kind.anchors.items()
    }
    far = [f"{name} {difference:+.2f}" for name, difference in off.items() if abs(difference) > CLOSE]
    checks = [
        (
            f"at 48 layers every one learns (below 1.0; here up to {max(at_48.values()):.2f}, before up to 0.73)",
            max(at_48.values()) < 1.0,
        ),
        (
            f"at 120 layers GAU-alpha's initialisation learns (below 0.6; here {scaled:.2f}, before 0.22)",
            scaled < 0.6,
        ),
        (
            f"at 120 layers 16 places unscaled are stuck (above 2.5; here {plain['1/(ns)']:.2f} and "
            f"{plain['softmax']:.2f}, before 3.00 and 3.02)",
            min(plain.values()) > 2.5,
        ),
        (
            'so "hundreds of layers without any adjustment" is the paper\'s 1/n² alone (below 0.3 at 120 layers; here '
            f"{found['1/n², 64 places', 120]:.2f}, before 0.05)",
            found["1/n², 64 places", 120] < 0.3,
        ),
        (
            f"every loss is within {CLOSE} of the one before" + (f": not {', '.join(far)}" if far else ""),
            not far,
        ),
    ]
    picture = draw(
        "trainability_gau", [float(i + 1) for i in range(200)], curves, "update", "loss, 120 layers", log=""
    )
    return Finding(
        "Gated units without warm-up, by depth",
        "The same sequences, post-RMS gated units of width 64, key size 32 (16 where there are 8 rows of 64 places "
        "instead of 32 of 16); mean loss of the last 20 of 200 updates, in brackets what was measured before.",
        "kexue.fm/archives/8990: no warm-up, hundreds of layers.",
        ["layers", *(kind.label for kind in GATED)],
        rows,
        checks,
        TASK,
        picture,
    )


DEEPEST, DEEP_STEPS = 1000, 100
SMALL_VECTORS = 1 / (2 * DEEPEST)
DEEPEST_KINDS = {  # label: (residual and initialisation, vector_scale)
    "post-norm, small vectors": ("post", SMALL_VECTORS),
    "DeepNorm": ("deepnorm", 1.0),
    "Su's row, small vectors": ("su_adam", SMALL_VECTORS),
}
DEEPEST_REMARK = (
    "DeepNorm's constants do not bound Adam's updates (first section), and gains, shifts and biases of 2,000 branches "
    "in a row add up their steps at one learning rate; small vectors: they take 1/(2N) of it. The same on real text: "
    "docs/models.md, configs/pretrain/deepnet_1000_tiny.yaml."
)


def run_deepest() -> Finding:
    """A thousand layers: what trains them, and the controls that fail."""
    curves = {
        label: train(transformer(kind, DEEPEST), DEEP_STEPS, rows=8, vector_scale=scale)
        for label, (kind, scale) in DEEPEST_KINDS.items()
    }
    shown = [1, *range(20, DEEP_STEPS + 1, 20)]
    rows = [[label, *(f"{losses[n - 1]:.2f}" for n in shown)] for label, losses in curves.items()]
    ends = {label: mean_tail(losses, 10) for label, losses in curves.items()}
    checks = [
        (
            f"post-norm does not learn (mean of the last ten above 2.9; here {ends['post-norm, small vectors']:.2f})",
            ends["post-norm, small vectors"] > 2.9,
        )
    ] + [
        (f"{label} learns (mean of the last ten below 2.7; here {ends[label]:.2f})", ends[label] < 2.7)
        for label in ("DeepNorm", "Su's row, small vectors")
    ]
    picture = draw(
        "trainability_deepest",
        [float(i + 1) for i in range(DEEP_STEPS)],
        curves,
        "update",
        "loss, 1000 layers",
        log="",
    )
    return Finding(
        "A thousand layers without warm-up",
        f"The same sequences (8 rows) and width, 1000 layers (2000 branches), Adam 1e-3 from the first update, "
        f"{DEEP_STEPS} updates; loss by update, chance 3.00.",
        "arXiv 2203.00555 trains 1000 layers with DeepNorm (and warm-up); nothing was measured before without.",
        ["kind", *(f"update {n}" for n in shown)],
        rows,
        checks,
        DEEPEST_REMARK,
        picture,
    )
