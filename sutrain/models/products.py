"""Attention by plain matrix products, with a backward pass of its own that keeps little.

B batch, H heads, L sequence length, K size of a head's query and key, E of its value.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def attend_by_products(
    query_BHLK: Tensor,
    key_BHLK: Tensor,
    value_BHLE: Tensor,
    lengths: Sequence[int],
    masks: Sequence[Tensor | None],
    squared: bool,
    keep: bool,
    silu: bool = False,
) -> Tensor:
    """A v -> [B, H, L, E], document by document, with A = softmax(q k^T / sqrt(K) + mask) or its relu squared.

    A is formed in fp32 and held in the dtype of the query, in which it meets the value and, going back, the softmax's
    derivative.

    Args:
        lengths: of the documents, which lie one behind the other along L and do not see each other.
        masks: one a document, added to its scores, or None.
        squared: relu(.)^2 in place of the softmax; its divisor is in the query.
        keep: hold A for the backward pass instead of computing it again, a product of K features a pair.
        silu: v is silu of what is given, and is computed again too.
    """
    documents = tuple(lengths), tuple(masks)
    return _Products.apply(query_BHLK, key_BHLK, value_BHLE, *documents, squared, keep, silu)


class _Products(torch.autograd.Function):
    """Autograd by itself would keep the scores three times, and their fp32 copies; every pass over them counts."""

    @staticmethod
    def forward(ctx: Any, query, key, value, lengths, masks, squared: bool, keep: bool, silu: bool) -> Tensor:
        query = query * _scale(query)
        # The memory of [B, L, H, E], in which the output map reads it without a copy.
        mixed = value.new_empty(*_turned(value)).transpose(1, 2)
        kept = []
        parts = (x.split(lengths, dim=2) for x in (query, key, F.silu(value) if silu else value, mixed))
        for q, k, v, out, mask in zip(*parts, masks, strict=True):
            roots = _weights(q, k, mask, squared)
            _matmul_into(out, roots.square() if squared else roots, v)
            if keep:
                kept.append(roots)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.settings = lengths, masks, squared, silu
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (query, key, given, *kept), (lengths, masks, squared, silu) = ctx.saved_tensors, ctx.settings
        value = F.silu(given) if silu else given
        found = [x.new_empty(*_turned(x)).transpose(1, 2) for x in (query, key, value)]
        parts = (x.split(lengths, dim=2) for x in (query, key, value, gradients[0], *found))
        nothing = [None] * len(lengths)
        for q, k, v, d_out, d_query, d_key, d_value, mask, roots in zip(
            *parts, masks, kept or nothing, strict=True
        ):
            if roots is None:
                roots = _weights(q, k, mask, squared)
            weights = roots.square() if squared else roots
            d_weights = _matmul(d_out, v.transpose(-1, -2))
            if squared:
                d_scores = d_weights.mul_(roots).mul_(2.0)
            else:
                d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            _matmul_into(d_query, d_scores, k)
            _matmul_into(d_key, d_scores.transpose(-1, -2), q)
            _matmul_into(d_value, weights.transpose(-1, -2), d_out)
        found[0].mul_(_scale(query))
        if silu:
            found[2] = torch.ops.aten.silu_backward(found[2], given)
        return *found, None, None, None, None, None


def _scale(query_BHLK: Tensor) -> float:
    return 1.0 / math.sqrt(query_BHLK.shape[-1])


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, squared: bool) -> Tensor:
    """A of a query that was scaled, or the root of A where A is a square."""
    scores = _matmul(query, key.transpose(-1, -2))
    if mask is not None:
        scores += mask
    return F.relu_(scores) if squared else torch.softmax(scores, dim=-1)  # in fp32 inside


def _matmul(a_BHMK: Tensor, b_BHKN: Tensor) -> Tensor:
    """Of one head of one row as of plain matrices: a CPU's batched product copies what is transposed or a slice."""
    if a_BHMK.shape[:2] == (1, 1):
        return torch.mm(a_BHMK[0, 0], b_BHKN[0, 0])[None, None]
    return torch.matmul(a_BHMK, b_BHKN)


def _matmul_into(out_BHMN: Tensor, a_BHMK: Tensor, b_BHKN: Tensor) -> None:
    if a_BHMK.shape[:2] == (1, 1):
        torch.mm(a_BHMK[0, 0], b_BHKN[0, 0], out=out_BHMN[0, 0])
    else:
        out_BHMN.copy_(torch.matmul(a_BHMK, b_BHKN))


def _turned(x_BHLE: Tensor) -> tuple[int, ...]:
    batch, heads, length, size = x_BHLE.shape
    return batch, length, heads, size
