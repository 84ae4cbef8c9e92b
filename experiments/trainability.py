"""Which deep models train without warm-up at all."""

from __future__ import annotations

import time

import torch
from torch.nn import functional as F

from experiments.common import Finding, attention_model, draw
from sutrain.models.configuration import EncoderConfig
from sutrain.models.masked_lm import MaskedLanguageModel

CHANCE = 3.0  # ln 20
KINDS = ["post", "pre", "deepnorm", "su_adam"]
ANCHORS = {  # mean loss of steps 231-250, measured before
    6: (3.01, 0.24, 0.08, 0.32),
    24: (3.01, 1.38, 0.02, 0.06),
    60: (3.01, 2.78, 0.02, 0.03),
}
GAU_ANCHORS = {12: (0.24, 0.18, 0.18), 48: (0.73, 0.15, 0.16), 120: (3.00, 3.02, 0.22)}


def sequences(rows: int, tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Arithmetic sequences modulo 20, and the same with a quarter of the places hidden (token 20)."""
    start = torch.randint(0, 20, (rows, 1), generator=generator)
    step = torch.randint(1, 20, (rows, 1), generator=generator)
    whole = (start + step * torch.arange(tokens)) % 20
    hidden = torch.rand(whole.shape, generator=generator) < 0.25
    return whole, hidden


def train(config: EncoderConfig, steps: int, tokens: int = 16, rows: int = 32, tail: int = 20) -> list[float]:
    """Losses of Adam at 1e-3 from the first step on; the last `tail` are what is reported."""
    torch.manual_seed(0)
    model = MaskedLanguageModel(config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    documents = torch.ones(rows, tokens, dtype=torch.long)
    losses = []
    for _ in range(steps):
        whole, hidden = sequences(rows, tokens, generator)
        states = model(whole.masked_fill(hidden, 20), documents)
        loss = F.cross_entropy(model.logits(states[hidden]), whole[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def transformer(kind: str, depth: int) -> EncoderConfig:
    """Width 64 as in the other experiments, with 21 tokens and a head of its own."""
    return attention_model(kind, depth, vocab_size=21, tied_head=False)


def gau(kind: str, depth: int) -> EncoderConfig:
    """Post-RMS gated units, key size 32: squared scores, softmax, or softmax with GAU-alpha's initialisation."""
    return EncoderConfig(
        vocab_size=21,
        hidden_size=64,
        num_layers=depth,
        mixer="gau",
        gau_expansion_size=128,
        gau_key_size=32,
        score_normaliser="relu_squared" if kind == "relu_squared" else "softmax",
        initialisation="gau_alpha" if kind == "gau_alpha" else "plain",
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
    started, rows, curves = time.perf_counter(), [], {}
    found = {}
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
    shown = {name: curve for name, curve in curves.items() if name.endswith("60")}
    picture = draw(
        "trainability", [float(i + 1) for i in range(250)], shown, "update", "loss, 60 layers", log=""
    )
    return Finding(
        "Training without warm-up, by depth",
        "Masked arithmetic sequences (20 numbers, 16 places, chance 3.00), Adam 1e-3 from the first update; mean loss "
        "of the last 20 of 250 updates, in brackets what was measured before.",
        "arXiv 2203.00555: DeepNorm trains at 1000 layers where post-norm diverges (with warm-up there).",
        ["layers", *KINDS],
        rows,
        checks,
        f"{time.perf_counter() - started:.0f} s in all.",
        picture,
    )


def run_gau() -> Finding:
    """Gated units at 12, 48 and 120 layers."""
    kinds = ("relu_squared", "softmax", "gau_alpha")
    rows, found, curves = [], {}, {}
    for depth, anchor in GAU_ANCHORS.items():
        row = [str(depth)]
        for kind, before in zip(kinds, anchor, strict=True):
            losses = train(gau(kind, depth), 200)
            found[kind, depth] = mean_tail(losses)
            curves[f"{kind} {depth}"] = losses
            row.append(f"{found[kind, depth]:.2f} ({before})")
        rows.append(row)
    checks = [
        ("at 48 layers every one learns (below 1.0)", max(found[kind, 48] for kind in kinds) < 1.0),
        ("at 120 layers GAU-alpha's initialisation learns (below 0.6)", found["gau_alpha", 120] < 0.6),
        (
            "hundreds of layers train without any adjustment (softmax at 120 below 1.0)",
            found["softmax", 120] < 1.0,
        ),
    ]
    shown = {name: curve for name, curve in curves.items() if name.endswith("120")}
    picture = draw(
        "trainability_gau", [float(i + 1) for i in range(200)], shown, "update", "loss, 120 layers", log=""
    )
    return Finding(
        "Gated units without warm-up, by depth",
        "The same sequences, post-RMS gated units of key size 32; mean loss of the last 20 of 200 updates, in brackets "
        "what was measured before.",
        "kexue.fm/archives/8990: no warm-up, hundreds of layers.",
        ["layers", "1/(ns)", "softmax", "softmax, GAU-alpha's initialisation"],
        rows,
        checks,
        picture=picture,
    )
