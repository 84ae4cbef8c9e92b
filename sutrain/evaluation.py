"""Held-out evaluation: the same validation rows with the same masks every time, shared out among the ranks.

Accuracy is counted only where the input shows [MASK]: a kept or a random token would flatter the model. The unigram
baseline guesses the most frequent training token at those very positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from data_prep.shards import Manifest
from sutrain.config import PretrainConfig
from sutrain.data import Samples, word_masking
from sutrain.models.masked_lm import MaskedLanguageModel
from sutrain.objectives.masked_lm import masked_lm_loss


class Evaluator:
    """Evaluates one split of one data set; every rank gets the same numbers."""

    def __init__(
        self, config: PretrainConfig, manifest: Manifest, device: torch.device, rank: int, world_size: int
    ):
        """Raises DataError when the data set has no validation rows."""
        masking = word_masking(manifest, config.masking, config.seed, stream="validation masks")
        self.samples = Samples(config.data.dir, "validation", config.seed, masking)
        self.sequences = min(config.evaluation.sequences, self.samples.rows_per_epoch)
        self.micro_sequences = config.batch.micro_sequences
        self.device, self.rank, self.world_size = device, rank, world_size
        self.most_frequent = most_frequent_token(manifest)
        self.basis = f"{self.sequences} rows of {manifest.content_hash}, masking {config.masking!r}, seed {config.seed}"
        """What a held-out loss was measured on; losses on another basis are not comparable."""

    @torch.no_grad()
    def __call__(self, model: MaskedLanguageModel, step: int) -> dict[str, Any]:
        """{step, validation_loss, validation_accuracy, unigram_accuracy, validation_tokens} of `model` as it is."""
        was_training = model.training
        model.eval()
        totals = torch.zeros(5, dtype=torch.float64, device=self.device)
        for start in range(
            self.rank * self.micro_sequences, self.sequences, self.world_size * self.micro_sequences
        ):
            batch = self.samples.batch(start, min(self.micro_sequences, self.sequences - start))
            tensors = (batch.inputs_NL, batch.labels_NL, batch.hidden_NL, batch.document_NL)
            result = masked_lm_loss(model, model.logits, *(t.to(self.device) for t in tensors))
            by_unigram = int(((batch.labels_NL == self.most_frequent) & batch.hidden_NL).sum())
            counts = (batch.predicted_tokens, int(result.correct_hidden), result.hidden_tokens, by_unigram)
            totals += torch.tensor([float(result.loss_sum), *counts], dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(totals)
        model.train(was_training)
        loss_sum, predicted, correct, hidden, by_unigram_total = totals.tolist()
        return {
            "step": step,
            "validation_loss": loss_sum / max(predicted, 1),
            "validation_accuracy": correct / max(hidden, 1),
            "unigram_accuracy": by_unigram_total / max(hidden, 1),
            "validation_tokens": int(hidden),
        }


def most_frequent_token(manifest: Manifest) -> int:
    """The most frequent token of the training split that is no special token."""
    counts = manifest.load_token_counts().copy()
    counts[list(manifest.special_ids.values())] = 0
    return int(counts.argmax())
