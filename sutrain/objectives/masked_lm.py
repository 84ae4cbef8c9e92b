"""Language modelling: cross entropy at the predicted positions only, summed, never averaged here.

B batch, L sequence length, D hidden size, V vocabulary, M predicted positions of the micro-batch, P those and a few
more, see `filled_up`.
The mean over a global batch is the sum over all ranks and micro-batches divided by the global count of predicted
tokens: a mean of per-rank means would weigh a token more where few were masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from sutrain.masking import IGNORED

CHUNK_POSITIONS = 2048
"""Predicted positions whose scores are held at a time: [2048, V] in bf16 are 49 MB at V = 12,000, and on a GPU 98 MB
more in fp32 while they are scored."""

POSITION_STEP = 16
"""Rows of a matrix of which a CPU's products are fastest. `CHUNK_POSITIONS` is a multiple of it."""

BLOCK_SCORES = 2**20
"""Scores of which a CPU makes probabilities at a time: 4 MB in fp32."""


class MaskedLoss(NamedTuple):
    """Sums over one micro-batch; divide by the counts of the whole global batch."""

    loss_sum: torch.Tensor  # scalar, in the graph, nats
    correct_hidden: torch.Tensor  # scalar int64: right guesses of tokens that the input did not show
    hidden_tokens: torch.Tensor  # scalar int64: predicted tokens that the input did not show


def masked_lm_loss(
    model: Callable[..., torch.Tensor],
    logits: Callable[[torch.Tensor], torch.Tensor],
    inputs_BL: torch.Tensor,
    labels_BL: torch.Tensor,
    hidden_BL: torch.Tensor,
    document_BL: torch.Tensor,
    see: Callable[[torch.Tensor], None] | None = None,
) -> MaskedLoss:
    """Sum of -log p(label) over the positions that have a label.

    `model` maps tokens and document numbers [B, L] and `positions_M`, P positions numbered as in [B·L], to hidden
    vectors [P, D]; `logits` maps these to scores [P, V]: only those of predicted positions are ever computed. More than
    `CHUNK_POSITIONS` of them are taken in chunks, whose scores are dropped at once and computed again in the backward
    pass. A micro-batch with nothing to predict gives a zero that still is in the graph, so that every rank takes part
    in the gradient reduction.

    see: shown the scores [M, V] at the predicted positions, in as many pieces as they are computed in.
    """
    positions_M = predicted_positions(labels_BL)
    hidden_PD = model(inputs_BL, document_BL, positions_M=filled_up(positions_M))
    labels_M = labels_BL.flatten()[positions_M]

    def score(chunk_PD: torch.Tensor, expected_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores_PV = logits(chunk_PD)
        if see is not None:
            see(scores_PV[: len(expected_M)])
        return _Score.apply(scores_PV, expected_M)

    if len(positions_M) <= CHUNK_POSITIONS:
        loss_sum, right_M = score(hidden_PD, labels_M)
    else:
        chunks = list(zip(hidden_PD.split(CHUNK_POSITIONS), labels_M.split(CHUNK_POSITIONS), strict=True))
        if torch.is_grad_enabled():
            scored = [checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks]
        else:
            scored = [score(*chunk) for chunk in chunks]
        loss_sum = torch.stack([loss for loss, _ in scored]).sum()
        right_M = torch.cat([right for _, right in scored])
    right_M = right_M & hidden_BL.flatten()[positions_M]
    return MaskedLoss(loss_sum, right_M.sum(), hidden_BL.sum())


def predicted_positions(labels_BL: torch.Tensor) -> torch.Tensor:
    """Those that have a label [M], numbered as in [B·L]."""
    return torch.nonzero((labels_BL != IGNORED).flatten()).squeeze(1)


def filled_up(positions_M: torch.Tensor) -> torch.Tensor:
    """The first position a few times more behind them, [P]: as many as make a multiple of `POSITION_STEP`. Products of
    305 rows take a third longer than those of 320."""
    missing = -len(positions_M) % POSITION_STEP
    return torch.cat([positions_M, positions_M[:1].expand(missing)]) if missing else positions_M


class _Score(torch.autograd.Function):
    """Sum of -log p(label) in fp32 over the positions that have one, and where the best guess is the label [M].

    By itself autograd would keep log p in fp32, twice the scores, and go over that width four times on the way back,
    one of them to fill it with zeros.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_PV: torch.Tensor, labels_M: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(logits_PV, labels_M)
        log_p, right = [], []
        for block_MV, expected_M in _blocks(labels_M, logits_PV):
            if block_MV.device.type == "cpu":
                # Log-softmax makes fp32 of it in any case, and argmax takes six times as long on bf16.
                block_MV = block_MV.float()
            block_log_p_MV = torch.log_softmax(block_MV, -1, dtype=torch.float32)
            log_p.append(block_log_p_MV.gather(1, expected_M.unsqueeze(1)))
            right.append(block_MV.argmax(-1) == expected_M)
        right_M = torch.cat(right)
        ctx.mark_non_differentiable(right_M)
        return -torch.cat(log_p).sum(), right_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """(p - 1 at the label) g."""
        logits_PV, labels_M = ctx.saved_tensors
        found_PV = torch.empty_like(logits_PV)
        found_PV[len(labels_M) :] = 0.0
        for block_MV, out_MV, expected_M in _blocks(labels_M, logits_PV, found_PV):
            p_MV = torch.softmax(block_MV, -1, dtype=torch.float32)
            p_MV[torch.arange(len(expected_M), device=p_MV.device), expected_M] -= 1.0
            out_MV.copy_(p_MV.mul_(gradients[0]))
        return found_PV, None


def _blocks(labels_M: torch.Tensor, *scores: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Parts of tensors [P, V] with their labels, of which fp32 stays in a CPU's cache; elsewhere all at once."""
    count, width = len(labels_M), scores[0].shape[1]
    size = max(BLOCK_SCORES // width, 1) if labels_M.device.type == "cpu" else max(count, 1)
    return zip(*(x_MV[:count].split(size) for x_MV in scores), labels_M.split(size), strict=True)
