"""Attention by plain matrix products, with a backward pass of its own that keeps little.

B batch, H heads, L sequence length, K size of a head's query and key, E of its value; P, N and W as in tiles.py.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .tiles import Group, Tiling, tiling

Mixes = tuple[Tensor | None, Tensor | None]
"""Maps between the heads of the scores and of A, or None."""


class Source(NamedTuple):
    """What query, key and value are made of, for a backward pass that makes them again: tensors that are kept in any
    case, and a function of them."""

    tensors: tuple[Tensor | None, ...]
    make: Callable[..., tuple[Tensor, Tensor, Tensor]]


def attend_by_products(
    query_BHLK: Tensor,
    key_BHLK: Tensor,
    value_BHLE: Tensor,
    lengths: Sequence[int],
    masks: Sequence[Tensor | None],
    squared: bool,
    keep: bool,
    silu: bool = False,
    source: Source | None = None,
) -> Tensor:
    """A v -> [B, H, L, E], document by document, with A = softmax(q k^T / sqrt(K) + mask) or its relu squared.

    A is formed in fp32 and held in the dtype of the query, in which it meets the value and, going back, the softmax's
    derivative.

    Args:
        lengths: of the documents, which lie one behind the other along L and do not see each other.
        masks: one a document, added to its scores, or None; of one length, for all rows together.
        squared: relu(.)^2 in place of the softmax; its divisor is in the query.
        keep: hold A for the backward pass instead of computing it again, a product of K features a pair.
        silu: v is silu of what is given, and is computed again too.
        source: of query, key and value, where they are to be computed again.
    """
    tiles = tiling(tuple(lengths), *query_BHLK.shape[:2], query_BHLK.device)
    shown = () if all(mask is None for mask in masks) else tuple(masks)
    # Under autocast a linear map's output is of 16 bits, and fp32 where a weight was multiplied on to it.
    query_BHLK, key_BHLK = query_BHLK.to(value_BHLE.dtype), key_BHLK.to(value_BHLE.dtype)
    tensors, make = ((), None) if source is None else source
    with torch.autocast(query_BHLK.device.type, enabled=False):  # all is of one dtype here and stays of it
        settings = tiles, shown, squared, keep, silu, make
        made_of = (None if x is None else x.detach() for x in tensors)
        return _Products.apply(query_BHLK, key_BHLK, value_BHLE, *settings, *made_of)


class _Products(torch.autograd.Function):
    """Autograd by itself would keep the scores three times, and their fp32 copies; every pass over them counts."""

    @staticmethod
    def forward(
        ctx: Any,
        query,
        key,
        value,
        tiles: Tiling,
        masks,
        squared: bool,
        keep: bool,
        silu: bool,
        make,
        *tensors,
    ) -> Tensor:
        query_PK, key_PK = tiles.take(query), tiles.take(key)
        value_PE = tiles.take(F.silu(value) if silu else value)
        mixed_PE = value_PE.new_empty(value_PE.shape)
        kept = []
        for group, q, k, v, out in _matrices(tiles, query_PK, key_PK, value_PE, mixed_PE):
            roots = _weights(q, k, group, masks, squared, tiles.heads)
            _product_into(out, roots.square() if squared else roots, v)
            if keep:
                kept.append(roots)
        if make is None:
            tensors = query_PK, key_PK, value if silu else value_PE
        ctx.save_for_backward(*tensors, *kept)
        ctx.settings = tiles, masks, squared, silu, make, len(tensors)
        return tiles.put_back(mixed_PE, len(query))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tiles, masks, squared, silu, make, count = ctx.settings
        saved = ctx.saved_tensors  # asked for once: a checkpoint computes them again, but not a second time
        tensors, kept = saved[:count], saved[count:]
        if make is None:
            query_PK, key_PK, given = tensors
        else:
            query, key, given = make(*tensors)
            query, key = query.to(given.dtype), key.to(given.dtype)
            query_PK, key_PK = tiles.take(query), tiles.take(key)
            given = given if silu else tiles.take(given)
        value_PE = tiles.take(F.silu(given)) if silu else given
        found = [x.new_empty(x.shape) for x in (query_PK, key_PK, value_PE)]
        inputs = (query_PK, key_PK, value_PE, tiles.take_gradient(gradients[0]), *found)
        for number, (group, q, k, v, d_out, *outs) in enumerate(_matrices(tiles, *inputs)):
            roots = kept[number] if kept else _weights(q, k, group, masks, squared, tiles.heads)
            weights = roots.square() if squared else roots
            d_weights = _product(d_out, v.transpose(1, 2))
            if squared:
                d_scores = d_weights.mul_(roots).mul_(2.0)
            else:
                d_scores = _softmax_backward(d_weights, weights)
            d_q, d_k, d_v = outs
            _product_into(d_q, d_scores, k, _scale(k))
            _product_into(d_k, d_scores.mT, q, _scale(q))
            _product_into(d_v, weights.mT, d_out)
            # They are as wide as the rows are long, and what follows needs the room.
            del roots, weights, d_weights, d_scores
        del value_PE, inputs
        d_query, d_key, d_value = (tiles.put_back(x, len(gradients[0])) for x in found)
        if silu:
            torch.ops.aten.silu_backward(d_value, given, grad_input=d_value)
        return d_query, d_key, d_value, *[None] * (6 + (count if make else 0))


def _softmax_backward(d_weights: Tensor, weights: Tensor) -> Tensor:
    """The scores' gradient; on a CPU, whose kernel goes over a row twice and writes only behind itself, in place."""
    settings = d_weights, weights, -1, weights.dtype
    if d_weights.device.type != "cpu":
        return torch._softmax_backward_data(*settings)
    return torch._softmax_backward_data(*settings, grad_input=d_weights)


def _matrices(tiles: Tiling, *tensors: Tensor) -> Any:
    """Group by group, the group and its batch of each [P, features]."""
    return zip(tiles.groups, *(tiles.batches(x) for x in tensors), strict=True)


def _scale(query: Tensor) -> float:
    return 1.0 / math.sqrt(query.shape[-1])


def _weights(
    query: Tensor, key: Tensor, group: Group, masks: Sequence[Tensor | None], squared: bool, heads: int
) -> Tensor:
    """A [N, W, W], or the root of A where A is a square."""
    scores = _product(query, key.transpose(1, 2), _scale(query))
    if group.hidden_N1S is not None:
        scores[..., -group.hidden_N1S.shape[-1] :] += group.hidden_N1S.to(scores.dtype)
    if len(masks) == 1:  # of the rows as they are
        scores.unflatten(0, (-1, heads)).add_(masks[0])  # type: ignore[arg-type]
    elif masks:
        for own, number in zip(scores.split(heads), group.documents, strict=True):
            if (mask := masks[number]) is not None:
                own[:, : mask.shape[-2], : mask.shape[-1]] += mask
    return F.relu_(scores) if squared else torch.softmax(scores, dim=-1)  # in fp32 inside


def _product(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    out = a.new_empty(*a.shape[:2], b.shape[2])
    _product_into(out, a, b, scale)
    return out


def _product_into(out: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """scale a b. One matrix is taken as such: it may be a slice or transposed, which a CPU's batched product copies."""
    if len(a) == 1:
        torch.addmm(out[0], a[0], b[0], beta=0.0, alpha=scale, out=out[0])
    elif scale == 1.0:
        torch.bmm(a, b, out=out)
    else:
        torch.baddbmm(out, a, b, beta=0.0, alpha=scale, out=out)


def plainly(
    query_BHLK: Tensor,
    key_BHLK: Tensor,
    value_BHLE: Tensor,
    mask: Tensor | None,
    dropout: float,
    squared: bool,
    mixes: Mixes,
) -> Tensor:
    """The same spelled out for autograd and compilers, with dropout and talking heads."""
    weights_BHLL = probabilities(query_BHLK, key_BHLK, mask, squared, mixes[0])
    weights_BHLL = F.dropout(weights_BHLL.to(value_BHLE.dtype), dropout)
    if mixes[1] is not None:
        weights_BHLL = _mix(weights_BHLL, mixes[1])
    return torch.matmul(weights_BHLL, value_BHLE)


def probabilities(
    query_BHLK: Tensor,
    key_BHLK: Tensor,
    mask: Tensor | None,
    squared: bool = False,
    score_mix: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(K) + mask), or relu(q k^T / sqrt(K) + mask)^2; fp32 [B, H, L, L]."""
    scale = 1.0 / math.sqrt(query_BHLK.shape[-1])
    scores_BHLL = torch.matmul(query_BHLK * scale, key_BHLK.transpose(-1, -2))
    if score_mix is not None:
        scores_BHLL = _mix(scores_BHLL, score_mix)
    if mask is not None:
        scores_BHLL = scores_BHLL + mask
    if squared:
        return F.relu(scores_BHLL.float()).square()
    return torch.softmax(scores_BHLL, dim=-1, dtype=torch.float32)


def _mix(x_BHLL: Tensor, mix_HH: Tensor) -> Tensor:
    return torch.einsum("gh,bhij->bgij", mix_HH.to(x_BHLL.dtype), x_BHLL)
