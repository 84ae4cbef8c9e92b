"""Language modelling: cross entropy at the predicted positions only, summed, never averaged here.

B batch, L sequence length, D hidden size, V vocabulary, M predicted positions of the micro-batch.
The mean over a global batch is the sum over all ranks and micro-batches divided by the global count of predicted
tokens: a mean of per-rank means would weigh a token more where few were masked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from sutrain.masking import IGNORED

CHUNK_POSITIONS = 2048
"""Predicted positions whose scores are held at a time: [2048, V] in fp32 are 98 MB at V = 12,000."""


class MaskedLoss(NamedTuple):
    """Sums over one micro-batch; divide by the counts of the whole global batch."""

    loss_sum: torch.Tensor  # scalar, in the graph, nats
    correct_hidden: torch.Tensor  # scalar int64: right guesses of tokens that the input did not show
    hidden_tokens: torch.Tensor  # scalar int64: predicted tokens that the input did not show


def masked_lm_loss(
    model: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    logits: Callable[[torch.Tensor], torch.Tensor],
    inputs_BL: torch.Tensor,
    labels_BL: torch.Tensor,
    hidden_BL: torch.Tensor,
    document_BL: torch.Tensor,
) -> MaskedLoss:
    """Sum of -log p(label) over the positions that have a label.

    `model` maps tokens and document numbers [B, L] to hidden vectors [B, L, D]; `logits` maps hidden vectors [M, D]
    to scores [M, V]: only those of predicted positions are ever computed. More than `CHUNK_POSITIONS` of them are
    taken in chunks, whose scores are dropped at once and computed again in the backward pass. A micro-batch with
    nothing to predict gives a zero that still is in the graph, so that every rank takes part in the gradient reduction.
    """
    positions_M = torch.nonzero((labels_BL != IGNORED).flatten()).squeeze(1)
    hidden_MD = model(inputs_BL, document_BL).flatten(0, 1)[positions_M]
    labels_M = labels_BL.flatten()[positions_M]

    def score(chunk_MD: torch.Tensor, expected_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits_MV = logits(chunk_MD)
        loss_sum = F.cross_entropy(logits_MV.float(), expected_M, reduction="sum")
        return loss_sum, logits_MV.argmax(-1) == expected_M

    if len(positions_M) <= CHUNK_POSITIONS:
        loss_sum, right_M = score(hidden_MD, labels_M)
    else:
        chunks = list(zip(hidden_MD.split(CHUNK_POSITIONS), labels_M.split(CHUNK_POSITIONS), strict=True))
        if torch.is_grad_enabled():
            scored = [checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks]
        else:
            scored = [score(*chunk) for chunk in chunks]
        loss_sum = torch.stack([loss for loss, _ in scored]).sum()
        right_M = torch.cat([right for _, right in scored])
    right_M = right_M & hidden_BL.flatten()[positions_M]
    return MaskedLoss(loss_sum, right_M.sum(), hidden_BL.sum())
