"""Trained on 64 tokens and read at up to 1024: softmax against log n, on Chinese law, one character a token."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from data_prep.fetch import fetch_china_law
from experiments.common import ROOT, Finding, attention_model, draw
from sutrain.models.configuration import EncoderConfig
from sutrain.models.masked_lm import MaskedLanguageModel

TRAINED_AT, LENGTHS = 64, [64, 128, 256, 512, 1024]
PUBLISHED = {  # kexue.fm/archives/8823, MLM accuracy in %, RoFormer small trained on 64 tokens
    "softmax": (43.27, 36.53, 23.02, 15.12, 11.54),
    "softmax_plus": (43.11, 41.17, 34.04, 20.15, 13.58),
}
LAYERS, HIDDEN, STEPS, ROWS, READ_TOKENS = 2, 96, 1000, 24, 65_536
UNKNOWN, MASK, SPECIAL = 1, 2, 3  # 0 is padding
HIDDEN_SHARE = 0.15


def characters() -> tuple[Tensor, Tensor, int]:
    """Text to train on and text of other laws to read, as character ids, and how many characters there are.

    Articles follow each other as in their law; every tenth law is held out.
    """
    records = map(json.loads, fetch_china_law(ROOT / "runs/demo/raw").open(encoding="utf-8"))
    laws = ["".join(r["text"] for r in law) for _, law in groupby(records, lambda r: r["title"].split()[0])]
    train = "".join(law for number, law in enumerate(laws) if number % 10)
    kept = [c for c, count in Counter(train).most_common() if count >= 5]
    ids = {character: SPECIAL + number for number, character in enumerate(kept)}
    texts = train, "".join(laws[::10])
    first, second = (torch.tensor([ids.get(c, UNKNOWN) for c in text]) for text in texts)
    return first, second, SPECIAL + len(kept)


def hide(whole: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The rows with 15 % of their characters as [MASK], and which ones those are."""
    hidden = torch.rand(whole.shape, generator=generator) < HIDDEN_SHARE
    return whole.masked_fill(hidden, MASK), hidden


def model_config(normaliser: str, vocabulary: int) -> EncoderConfig:
    """A small DeepNorm encoder with rotary positions, which trains without warm-up."""
    sizes = {"hidden_size": HIDDEN, "head_size": HIDDEN // 4, "feed_forward_size": 4 * HIDDEN}
    return attention_model("deepnorm", LAYERS, vocab_size=vocabulary, score_normaliser=normaliser, **sizes)


def train(config: EncoderConfig, text: Tensor, steps: int = STEPS) -> MaskedLanguageModel:
    """Adam on rows of 64 characters from random places; the last third of the updates decays to nothing."""
    torch.manual_seed(0)
    model = MaskedLanguageModel(config).train()
    model.encoder.take_rows_apart = False
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, 3 * (1 - step / steps))
        starts = torch.randint(0, len(text) - TRAINED_AT, (ROWS, 1), generator=generator)
        whole = text[starts + torch.arange(TRAINED_AT)]
        shown, hidden = hide(whole, generator)
        loss = F.cross_entropy(model.logits(model(shown)[hidden]), whole[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def rows_of(text: Tensor, length: int) -> Iterator[Tensor]:
    """The same text whatever the length, cut into rows, 8192 characters at a time."""
    whole = text[: READ_TOKENS // max(LENGTHS) * max(LENGTHS)]
    yield from whole.unflatten(0, (-1, length)).split(max(1, 8192 // length))


@torch.no_grad()
def read(model: MaskedLanguageModel, text: Tensor, length: int) -> tuple[float, float]:
    """Accuracy at hidden characters, and mean entropy of an attention row over layers, heads and places, nats."""
    entropies: list[Tensor] = []

    def look(mixer, arguments, keywords) -> None:
        if len(entropies) < LAYERS:  # of the first 8192 characters
            attention = mixer.attention(arguments[0], keywords["visible"])
            entropies.append(-torch.special.xlogy(attention, attention).sum(-1).mean())

    watched = [
        layer.mixer.register_forward_pre_hook(look, with_kwargs=True) for layer in model.encoder.layers
    ]
    generator = torch.Generator().manual_seed(2)
    right = total = 0
    for whole in rows_of(text, length):
        shown, hidden = hide(whole, generator)
        found = model.logits(model(shown)[hidden]).argmax(-1)
        right, total = right + int((found == whole[hidden]).sum()), total + int(hidden.sum())
    for hook in watched:
        hook.remove()
    return right / total, float(torch.stack(entropies).mean())


def run() -> Finding:
    """Two trainings, each read at five lengths."""
    train_text, held_out, vocabulary = characters()
    found = {}
    for normaliser in PUBLISHED:
        model = train(model_config(normaliser, vocabulary), train_text)
        found[normaliser] = [read(model, held_out, length) for length in LENGTHS]
    accuracy = {name: [100 * a for a, _ in values] for name, values in found.items()}
    entropy = {name: [e for _, e in values] for name, values in found.items()}
    most_common = Counter(held_out.tolist()).most_common(1)[0][1] / len(held_out)
    rows = [
        [str(n)]
        + [f"{accuracy[name][i]:.1f} ({PUBLISHED[name][i]:.1f})" for name in PUBLISHED]
        + [f"{entropy[name][i]:.2f}" for name in PUBLISHED]
        + [f"{math.log(n):.2f}"]
        for i, n in enumerate(LENGTHS)
    ]
    plain, log_n = accuracy["softmax"], accuracy["softmax_plus"]
    growth = {name: values[-1] - values[0] for name, values in entropy.items()}
    gains = [b - a for a, b in zip(plain, log_n, strict=True)]
    checks = [
        (
            f"at the trained length both are level (within 1 point; here {gains[0]:+.1f}, published -0.2)",
            abs(gains[0]) < 1,
        ),
        (
            f"log n reads longer rows better, at every length (here {', '.join(f'{g:+.1f}' for g in gains[1:])} "
            "points; published +4.6, +11.0, +5.0, +2.0)",
            min(gains[1:]) > 0,
        ),
        (
            f"at 256 tokens, four times the trained length, log n is at least 5 points ahead (here {gains[2]:+.1f})",
            gains[2] >= 5,
        ),
        (
            f"plain softmax loses more than half of its accuracy by 1024 tokens (here {plain[0]:.1f} to "
            f"{plain[-1]:.1f}; published 43.3 to 11.5)",
            plain[-1] < plain[0] / 2,
        ),
        (
            f"attention spreads with the length under softmax (64 to 1024: {growth['softmax']:+.2f} nats) and less "
            f"under log n ({growth['softmax_plus']:+.2f})",
            growth["softmax"] > 0 and growth["softmax_plus"] < growth["softmax"],
        ),
        (
            "log n keeps the entropy as it is (growth below a tenth of ln 16 = 2.77)",
            growth["softmax_plus"] < 0.277,
        ),
    ]
    picture = draw(
        "length_transfer",
        [float(n) for n in LENGTHS],
        {**accuracy, **{f"{name}, published": list(values) for name, values in PUBLISHED.items()}},
        "tokens a row",
        "accuracy, %",
        log="x",
    )
    return Finding(
        "Trained on 64 tokens, read at 1024: attention with and without log n",
        f"{LAYERS} layers of width {HIDDEN}, DeepNorm, rotary positions, {STEPS} Adam updates of {ROWS} rows of 64 "
        f"characters of Chinese law; accuracy in % at hidden characters (15 %, all as [MASK]) of laws that were held "
        f"out, the same {READ_TOKENS:,} characters cut into rows of each length; in brackets what was published. Then "
        "the mean entropy of an attention row.",
        "kexue.fm/archives/8823: RoFormer small trained on 64 tokens, table in brackets. Other text, tokens (words), "
        "size and far longer training, so that its levels are no anchor for ours; its differences are.",
        ["tokens", "softmax, %", "log n, %", "softmax, nats", "log n, nats", "ln tokens"],
        rows,
        checks,
        f"Always guessing the commonest character would be right in {100 * most_common:.1f} %.",
        picture,
    )
