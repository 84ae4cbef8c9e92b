"""What the experiments share: small models, one optimizer step by hand, tables, pictures, and the page they write.

An experiment is a function that returns a `Finding`; `python -m experiments` runs them and writes docs/experiments.md.
D hidden size, N layers, L tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot
from torch import Tensor

from sutrain.models.configuration import EncoderConfig

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs/pictures/experiments"


@dataclass
class Finding:
    """What one experiment has to say; `checks` are the claims as (claim, does it hold here)."""

    title: str
    question: str
    anchor: str
    columns: list[str]
    rows: list[list[str]]
    checks: list[tuple[str, bool]]
    remarks: str = ""
    picture: str | None = None
    seconds: float = field(default=0.0)

    def markdown(self) -> str:
        """The finding as a section of the page."""
        lines = [
            f"## {self.title}",
            "",
            self.question,
            "",
            f"*Published or measured before.* {self.anchor}",
            "",
        ]
        lines += ["| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        lines += [""] + [
            f"- {'holds' if holds else '**does not hold here**'}: {claim}" for claim, holds in self.checks
        ]
        if self.remarks:
            lines += ["", self.remarks]
        if self.picture:
            lines += ["", f"![{self.title}](pictures/experiments/{self.picture})"]
        return "\n".join(lines) + "\n"


def attention_model(kind: str, layers: int, **settings) -> EncoderConfig:
    """The small transformers of the measured anchors: D 64, 4 heads, feed-forward 256, no dropout."""
    rules = {
        "post": {"residual": "post", "initialisation": "plain", "fan_average": "arithmetic"},
        "pre": {"residual": "pre", "initialisation": "plain", "fan_average": "arithmetic"},
        "deepnorm": {"residual": "deepnorm", "initialisation": "deepnorm"},
        "su_adam": {"residual": "deepnorm", "initialisation": "su_adam", "fan_average": "arithmetic"},
        "su_lamb": {"residual": "post", "initialisation": "su_lamb", "fan_average": "arithmetic"},
        "roformer_v2": {"residual": "post", "initialisation": "roformer_v2"},
    }[kind]
    norm = "rms" if kind == "roformer_v2" else "layer_norm"
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_heads": 4, "head_size": 16, "feed_forward_size": 256}
    return EncoderConfig(
        **{
            **sizes,
            "num_layers": layers,
            "norm": norm,
            "norm_epsilon": 1e-5,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "token_types": 0,
            **rules,
            **settings,
        }
    )


def slope(depths: list[int], values: list[float]) -> float:
    """Exponent b of values ~ depth^b, least squares in logarithms."""
    x = torch.tensor(depths, dtype=torch.float64).log()
    y = torch.tensor(values, dtype=torch.float64).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def rms(x: Tensor) -> float:
    """Root mean square of all elements."""
    return math.sqrt(float(x.double().square().mean()))


def draw(
    name: str, x: list[float], series: dict[str, list[float]], xlabel: str, ylabel: str, log: str = "xy"
) -> str:
    """One plot of several lines; returns its file name."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(6, 3.6))
    for label, values in series.items():
        axes.plot(x[: len(values)], values, marker="o", markersize=3, linewidth=1.2, label=label)
    if "x" in log:
        axes.set_xscale("log")
    if "y" in log:
        axes.set_yscale("log")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(PICTURES / f"{name}.png", dpi=110)
    pyplot.close(figure)
    return f"{name}.png"
