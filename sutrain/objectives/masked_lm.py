"""Masked language modelling: cross entropy at the predicted positions only, summed, never averaged here.

B batch, L sequence length, D hidden size, V vocabulary, M predicted positions of the micro-batch.
The mean over a global batch is the sum over all ranks and micro-batches divided by the global count of predicted
tokens: a mean of per-rank means would weigh a token more where few were masked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sutrain.masking import IGNORED


@dataclass
class MaskedLoss:
    """Sums over one micro-batch; divide by the counts of the whole global batch."""

    loss_sum: torch.Tensor  # scalar, in the graph, nats
    correct_hidden: torch.Tensor  # scalar int64: right guesses where the input showed [MASK]
    hidden_tokens: int  # positions where the input showed [MASK]


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
    to scores [M, V]: only those of predicted positions are ever computed. A micro-batch with nothing to predict
    gives a zero that still is in the graph, so that every rank takes part in the gradient reduction.
    """
    positions_M = torch.nonzero((labels_BL != IGNORED).flatten()).squeeze(1)
    logits_MV = logits(model(inputs_BL, document_BL).flatten(0, 1)[positions_M])
    labels_M = labels_BL.flatten()[positions_M]
    loss_sum = F.cross_entropy(logits_MV.float(), labels_M, reduction="sum")
    right_M = (logits_MV.argmax(-1) == labels_M) & hidden_BL.flatten()[positions_M]
    return MaskedLoss(loss_sum, right_M.sum(), int(hidden_BL.sum()))
