"""What a run predicts: the context of its model decides."""

from __future__ import annotations

from typing import Any

from data_prep.shards import Manifest
from sutrain.continuation import Continuation
from sutrain.masking import Spans, WordMasking

Labelling = WordMasking | Continuation
"""Makes inputs and labels of rows: masked words, or what follows."""


def labelling_of(config: Any, manifest: Manifest, stream: str) -> Labelling:
    """What a run predicts in one stream of samples, as the context of its model has it; `config` is the whole one."""
    context: str = config.model.context
    if context == "bidirectional":
        return word_masking(manifest, config.masking, config.seed, stream)
    return Continuation(config.seed, context == "unilm", stream)


def word_masking(manifest: Manifest, settings: Any, seed: int, stream: str) -> WordMasking:
    """The masking of one stream of samples; `settings` has the shares (see sutrain.config.Masking)."""
    special = manifest.special_ids
    return WordMasking(
        seed=seed,
        vocab_size=manifest.vocab_size,
        special_ids=tuple(sorted(special.values())),
        mask_id=special["[MASK]"],
        predict_share=settings.predict_share,
        mask_share=settings.mask_share,
        keep_share=settings.keep_share,
        whole_words=settings.whole_words,
        stream=stream,
        spans=Spans(settings.span_stop, settings.span_longest) if settings.style == "spans" else None,
    )


def predicted_share(config: Any) -> float:
    """Share of a row's tokens that are predicted, for counts of operations."""
    # A piece of a document is split at any place, so half of it is prefix on the average.
    shares: dict[str, float] = {"bidirectional": config.masking.predict_share, "causal": 1.0, "unilm": 0.5}
    return shares[config.model.context]
