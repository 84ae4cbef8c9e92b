"""Held-out evaluation: the same validation rows with the same masks every time, shared out among the ranks.

Accuracy is counted only where the input shows [MASK], since a kept or a random token would flatter the model; and of
next tokens everywhere. The unigram baseline guesses the most frequent training token at those very positions. Loss and
accuracy are also told apart by the length of the document's piece in the row and by source corpus. M predicted
positions, K kinds (lengths, then sources).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from data_prep.shards import Manifest
from sutrain.config import PretrainConfig
from sutrain.data import Batch, Samples
from sutrain.heartbeat import beat
from sutrain.labelling import labelling_of
from sutrain.masking import IGNORED
from sutrain.objectives.training_model import TrainingModel
from sutrain.pieces import PieceReader

SHORTEST = 32
"""Tokens of the first class of lengths; each of the others reaches twice as far as the one before."""


class Evaluator:
    """Evaluates one split of one data set; every rank gets the same numbers."""

    def __init__(
        self, config: PretrainConfig, manifest: Manifest, device: torch.device, rank: int, world_size: int
    ):
        """Raises DataError when the data set has no validation rows."""
        labelling = labelling_of(config, manifest, stream="validation masks")
        self.samples = Samples(config.data.dir, "validation", config.seed, labelling)
        asked, there = config.evaluation.sequences, self.samples.rows_per_epoch
        self.sequences = min(asked, there)
        self.remark = f"evaluation: on all {there} held-out rows; evaluation.sequences asks for {asked}"
        self.remark = self.remark if there < asked else ""
        self.micro_sequences = config.batch.micro_sequences
        self.device, self.rank, self.world_size = device, rank, world_size
        classes = range(max(0, (manifest.row_tokens - 1).bit_length() - (SHORTEST - 1).bit_length()) + 1)
        self.lengths = [str(SHORTEST << number) for number in classes]
        self.sources = [source["name"] for source in manifest.sources]
        self._pieces = PieceReader(config.data.dir, "validation") if len(self.sources) > 1 else None
        self._kinds: dict[
            int, torch.Tensor
        ] = {}  # first sample -> what _kinds_of found, for the rows never change
        self.most_frequent = most_frequent_token(manifest)
        self.basis = f"{self.sequences} rows of {manifest.content_hash}, masking {config.masking!r}, seed {config.seed}"
        """What a held-out loss was measured on; losses on another basis are not comparable."""

    @torch.no_grad()
    def __call__(
        self, model: TrainingModel, step: int, broken_off: Callable[[], bool] = lambda: False
    ) -> dict[str, Any] | None:
        """{step, validation_loss, validation_accuracy, unigram_accuracy, validation_tokens} of `model` as it is, and
        {class: value} as validation_loss_by_length, validation_loss_by_source and the same of accuracy.

        broken_off: asked before every micro-batch, on every rank, with one answer for all; the result is None then."""
        was_training = model.training
        model.eval()
        kinds = len(self.lengths) + len(self.sources)
        totals = torch.zeros(5 + 4 * kinds, dtype=torch.float64, device=self.device)
        by_kind_4K = totals[5:].view(4, kinds)  # loss, predicted, right, hidden

        for first in range(0, self.sequences, self.world_size * self.micro_sequences):
            beat("evaluation", step)
            if broken_off():
                model.train(was_training)
                return None
            start = first + self.rank * self.micro_sequences
            idle = start >= self.sequences  # yet takes part: under ZeRO-3 a pass needs every rank
            count = 1 if idle else min(self.micro_sequences, self.sequences - start)
            batch = self.samples.batch(0 if idle else start, count)
            see = None if idle else self._adder_by_kind(by_kind_4K, batch)
            result = model(**batch.on(self.device), see=see)
            if idle:
                continue
            by_unigram = int(((batch.labels_NL == self.most_frequent) & batch.hidden_NL).sum())
            seen = (int(result.correct_hidden), int(result.hidden_tokens))
            counts = (batch.predicted_tokens, *seen, by_unigram)
            totals[:5] += torch.tensor(
                [float(result.loss_sum), *counts], dtype=torch.float64, device=self.device
            )
        if self.world_size > 1:
            dist.all_reduce(totals)
        model.train(was_training)
        loss_sum, predicted, correct, hidden, by_unigram_total = totals[:5].tolist()
        return {
            "step": step,
            "validation_loss": loss_sum / max(predicted, 1),
            "validation_accuracy": correct / max(hidden, 1),
            "unigram_accuracy": by_unigram_total / max(hidden, 1),
            "validation_tokens": int(hidden),
            **self._by_kind(by_kind_4K.tolist()),
        }

    def _adder_by_kind(self, by_kind_4K: torch.Tensor, batch: Batch) -> Callable[[torch.Tensor], None]:
        """What is given the scores [M, V] of the predicted tokens, in pieces and in order, and adds each token to the
        sums of its length and of its source."""
        labels_NL = batch.labels_NL.to(self.device)
        predicted_NL = labels_NL != IGNORED
        labels_M = labels_NL[predicted_NL]
        hidden_M = batch.hidden_NL.to(self.device)[predicted_NL].double()
        kinds_2M = [kind_NL.to(self.device)[predicted_NL].long() for kind_NL in self._kinds_of(batch)]
        done = 0

        def add(logits_MV: torch.Tensor) -> None:
            nonlocal done
            here = slice(done, done + len(logits_MV))
            done = here.stop
            loss_M = F.cross_entropy(logits_MV.float(), labels_M[here], reduction="none").double()
            right_M = (logits_MV.argmax(-1) == labels_M[here]).double() * hidden_M[here]
            values_4M = torch.stack([loss_M, torch.ones_like(loss_M), right_M, hidden_M[here]])
            for kind_M in kinds_2M:
                by_kind_4K.index_add_(1, kind_M[here], values_4M)

        return add

    def _kinds_of(self, batch: Batch) -> torch.Tensor:
        """int16 [2, N, L]: the class of length and the source of every token's document, as columns of the sums."""
        if batch.first_sample not in self._kinds:
            document_NL = batch.document_NL
            found = torch.full((2, *document_NL.shape), len(self.lengths), dtype=torch.int16)
            for n in range(len(document_NL)):
                lengths = torch.bincount(document_NL[n])
                kinds = [max(0, (int(k) - 1).bit_length() - (SHORTEST - 1).bit_length()) for k in lengths]
                found[0, n] = torch.tensor(kinds, dtype=torch.int16)[document_NL[n]]
            if self._pieces is not None:
                numbers = self.samples.row_numbers(batch.first_sample, len(document_NL))
                for n, row in enumerate(numbers):
                    for piece in self._pieces.row(int(row))[1]:
                        found[1, n, piece.start : piece.start + piece.length] += piece.source
            self._kinds[batch.first_sample] = found
        return self._kinds[batch.first_sample]

    def _by_kind(self, sums_4K: list[list[float]]) -> dict[str, dict[str, float]]:
        loss, predicted, right, hidden = sums_4K
        found: dict[str, dict[str, float]] = {}
        for number, name in enumerate([*self.lengths, *self.sources]):
            of = "length" if number < len(self.lengths) else "source"
            if predicted[number]:
                found.setdefault(f"validation_loss_by_{of}", {})[name] = loss[number] / predicted[number]
            if hidden[number]:
                found.setdefault(f"validation_accuracy_by_{of}", {})[name] = right[number] / hidden[number]
        return found


def most_frequent_token(manifest: Manifest) -> int:
    """The most frequent token of the training split that is no special token."""
    counts = manifest.load_token_counts().copy()
    counts[list(manifest.special_ids.values())] = 0
    return int(counts.argmax())
