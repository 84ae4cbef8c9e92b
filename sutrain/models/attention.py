"""Multi-head attention.

B batch, L sequence length, D hidden size, H heads, K size of a head's query and key, E of its value.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .configuration import EncoderConfig
from .documents import Documents
from .init import Linear
from .processor import bf16_units
from .products import Mixes, Source, attend_by_products, plainly, probabilities
from .rotary import rotate
from .visibility import Visibility, choose


class MultiHeadAttention(nn.Module):
    """softmax(q k^T / sqrt(K)) v, heads side by side, then an output map (kexue.fm/archives/8998).

    Query, key and value stay separate matrices: optimizers that normalise per tensor (LAMB, AdaFactor) must
    see three tensors here, not one.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        keys, values = config.num_heads * config.head_size, config.num_heads * config.value_size
        self.heads, self.dropout = config.num_heads, config.attention_dropout
        self.half_split = config.positions == "rotary_half"
        self.squared = config.score_normaliser.startswith("relu_squared")
        self.query = Linear("query", config.hidden_size, keys, config.biases)
        self.key = Linear("key", config.hidden_size, keys, config.biases)
        self.value = Linear("value", config.hidden_size, values, config.biases)
        self.output = Linear("output", values, config.hidden_size, config.biases)
        mixes = ("none", "scores", "both").index(config.talking_heads)
        self.score_mix = nn.Parameter(torch.eye(config.num_heads)) if mixes > 0 else None
        self.probability_mix = nn.Parameter(torch.eye(config.num_heads)) if mixes > 1 else None

    def reset_parameters(self) -> None:
        """Talking heads start by talking to themselves."""
        for mix in (self.score_mix, self.probability_mix):
            if mix is not None:
                nn.init.eye_(mix)

    def forward(self, x_BLD: Tensor, visible: Visibility, chosen_M: Tensor | None = None) -> Tensor:
        """Mix the tokens of each document; [B, L, D] to [B, H, L, E], which is to go to `finish`.

        What is behind attention stands there, since a compiler that leaves a layer for attention makes one program of
        all that is left to do in a function; in one place with what the layer does next, that is one program fewer.
        The choice of tokens is for gated units, whose gate needs no others; here it is made in `finish` alone.
        """
        query_BHLK, key_BHLK = self.query_key(x_BLD, visible)
        value_BHLE = self._heads(self.value(x_BLD)).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        mixes = (self.score_mix, self.probability_mix)
        return attend(query_BHLK, key_BHLK, value_BHLE, visible, dropout, self.squared, mixes)

    def finish(self, mixed_BHLE: Tensor, chosen_M: Tensor | None = None) -> Tensor:
        """[B, L, D], or at some tokens as `choose` has it."""
        return self.output(choose(mixed_BHLE.transpose(1, 2).flatten(2), chosen_M))

    def query_key(self, x_BLD: Tensor, visible: Visibility) -> tuple[Tensor, Tensor]:
        """Query and key as the scores see them, [B, H, L, K]: rotated, any scale of the scores in the query."""
        query, key = (
            rotate(self._heads(project(x_BLD)), visible.rotary, self.half_split)
            for project in (self.query, self.key)
        )
        if visible.score_scale is not None:  # folded into the query, so that any attention kernel can follow
            query = (query * visible.score_scale).to(key.dtype)
        return query.transpose(1, 2), key.transpose(1, 2)

    def attention(self, x_BLD: Tensor, visible: Visibility) -> Tensor | None:
        """How attention spreads, fp32 [B, H, L, L] with rows that sum to 1; None if it is no distribution."""
        if self.squared or visible.mask is None:
            return None
        query_BHLK, key_BHLK = self.query_key(x_BLD, visible)
        return probabilities(query_BHLK, key_BHLK, visible.mask, score_mix=self.score_mix)

    def _heads(self, x_BLI: Tensor) -> Tensor:
        return x_BLI.unflatten(-1, (self.heads, -1))


FUSED_FROM_TOKENS = 256
"""Row length from which the fused kernel is preferred on a CPU in compiled code also in bf16, and from which heads do
without the scores of the forward pass in the backward pass: at 512 tokens they are as much memory as a layer keeps."""

PRODUCTS_BELOW_TOKENS = 1024 if bf16_units() == "vectors" else FUSED_FROM_TOKENS
"""Row length below which products are faster in bf16 than the fused kernel, which has no use for instructions of
AVX512-BF16."""

SCORES_AGAIN_FROM_TOKENS = 512
"""Row length from which the scores of wide values (a gated unit's) are computed again in the backward pass: at 2048
tokens they are as much memory as all else that a layer keeps, and a twelfth of its attention's arithmetic."""

NO_MIX: Mixes = (None, None)


def attend(
    query_BHLK: Tensor,
    key_BHLK: Tensor,
    value_BHLE: Tensor,
    visible: Visibility,
    dropout: float = 0.0,
    squared: bool = False,
    mixes: Mixes = NO_MIX,
) -> Tensor:
    """A v -> [B, H, L, E] with A = softmax(q k^T / sqrt(K)), or relu(q k^T / sqrt(K))^2, of what is visible.

    Rows are computed as they are under a mask, or document by document where they were taken apart.

    Args:
        dropout: share of A that is dropped.
        squared: relu(.)^2 in place of the softmax; its divisor is in the query.
        mixes: [H, H] maps between the heads of the scores and of A, or None.
    """
    if visible.documents is None:
        return _attend(query_BHLK, key_BHLK, value_BHLE, visible.mask, dropout, squared, mixes)
    if varlen_serves(query_BHLK, visible.documents, dropout, squared, mixes):
        return _attend_varlen(query_BHLK, key_BHLK, value_BHLE, visible.documents)
    return _attend_each(query_BHLK, key_BHLK, value_BHLE, visible.documents, dropout, squared, mixes)


def attend_silu(
    query_BHLK: Tensor,
    key_BHLK: Tensor,
    value_BHLE: Tensor,
    visible: Visibility,
    dropout: float = 0.0,
    squared: bool = False,
    source: Source | None = None,
) -> Tensor:
    """`attend` to silu(v), which is not kept beside v where that can be helped: it is the widest of a gated unit.

    source: of all three, which are not kept either where the scores are not.
    """
    if visible.documents is not None:
        return _attend_silu_each(
            query_BHLK, key_BHLK, value_BHLE, visible.documents, dropout, squared, source
        )
    if not _products_serve(dropout, NO_MIX):
        return attend(query_BHLK, key_BHLK, F.silu(value_BHLE), visible, dropout, squared)
    length = query_BHLK.shape[2]
    return _products(
        query_BHLK, key_BHLK, value_BHLE, [length], [visible.mask], squared, silu=True, source=source
    )


@torch.compiler.disable  # as below
def _attend_silu_each(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, dropout: float, squared: bool, source
) -> Tensor:
    if not _products_serve(dropout, NO_MIX):
        return _attend_each(query, key, F.silu(value), documents, dropout, squared, NO_MIX)
    lengths, masks = documents.lengths, documents.mask_of_each()
    return _products(query, key, value, lengths, masks, squared, silu=True, source=source)


@torch.compiler.disable  # lengths change with every batch; compiled, each would be a program of its own
def _attend_each(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, dropout: float, squared: bool, mixes
) -> Tensor:
    lengths, masks = documents.lengths, documents.mask_of_each()
    small = []  # documents of which products at once are faster than the fused kernel one by one
    if _products_serve(dropout, mixes):
        small = [
            i for i, n in enumerate(lengths) if not _fused_serves(query, value, n, dropout, squared, mixes)
        ]
    if len(small) == len(lengths):
        return _products(query, key, value, lengths, masks, squared)
    # split, not slices: going back, every slice would fill a tensor of the whole row with zeros.
    parts = [x.split(lengths, dim=2) for x in (query, key, value)]
    pieces: dict[int, Tensor] = {}
    if len(small) > 1:
        q, k, v = (_joined([part[i] for i in small]) for part in parts)
        sizes = [lengths[i] for i in small]
        mixed = _products(q, k, v, sizes, [masks[i] for i in small], squared)
        pieces = dict(zip(small, mixed.split(sizes, dim=2), strict=True))
    for i, mask in enumerate(masks):
        if i not in pieces:
            q, k, v = (part[i] for part in parts)
            pieces[i] = _attend(q, k, v, mask, dropout, squared, mixes)
    return _joined([pieces[i] for i in range(len(lengths))])


def _joined(parts: list[Tensor]) -> Tensor:
    """Along L, in the memory of [B, L, H, K], where the next map reads it: else it would be copied once more."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)


def varlen_serves(query: Tensor, documents: Documents, dropout: float, squared: bool, mixes) -> bool:
    """Can torch's varlen attention compute this? It has no dropout, no masks and no other normaliser. (On a GPU the
    encoder takes rows apart only where `varlen_exists`.)"""
    plain = dropout == 0.0 and not squared and mixes == NO_MIX
    return query.device.type == "cuda" and plain and not documents.masks


def varlen_exists(device: torch.device, dtype: torch.dtype, head_size: int, value_size: int) -> bool:
    """Does torch's varlen attention run here, and on heads of this size? It is flash attention, so a GPU from compute
    capability 8.0 on, 16 bits and sizes in eights up to 256."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    sizes_fit = value_size == head_size <= 256 and head_size % 8 == 0
    return sizes_fit and varlen_attention() is not None and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def varlen_attention() -> Callable[..., Any] | None:
    """torch's varlen attention, or None: not every torch that can load an exported model has it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


@torch.compiler.disable  # as above: the number of documents and the longest change with every batch
def _attend_varlen(query_1HTK: Tensor, key_1HTK: Tensor, value_1HTE: Tensor, documents: Documents) -> Tensor:
    boundaries, longest = documents.boundaries.to(query_1HTK.device), max(documents.lengths)
    # squeeze, not an index: going back, that would fill a tensor with zeros and copy into it.
    q, k, v = (x.squeeze(0).transpose(0, 1).contiguous() for x in (query_1HTK, key_1HTK, value_1HTE))
    kernel = varlen_attention()
    assert kernel is not None  # else the encoder would have left the rows together
    mixed_THE = kernel(q, k, v, boundaries, boundaries, longest, longest)
    return mixed_THE.transpose(0, 1).unsqueeze(0)


def _attend(
    query_BHLK: Tensor,
    key_BHLK: Tensor,
    value_BHLE: Tensor,
    mask: Tensor | None,
    dropout: float,
    squared: bool,
    mixes: Mixes,
) -> Tensor:
    """Three ways to the same numbers.

    The fused kernel is the best wherever it exists in full. Else plain products with a backward pass of their own; and
    under dropout, talking heads or a compiler, which fuses for itself, the same spelled out for autograd.
    """
    length = query_BHLK.shape[2]
    if _fused_serves(query_BHLK, value_BHLE, length, dropout, squared, mixes):
        return F.scaled_dot_product_attention(
            query_BHLK, key_BHLK, value_BHLE, attn_mask=mask, dropout_p=dropout
        )
    if _products_serve(dropout, mixes):
        return _products(query_BHLK, key_BHLK, value_BHLE, [length], [mask], squared)
    inputs = (query_BHLK, key_BHLK, value_BHLE, mask, dropout, squared, mixes)
    if _scores_again(query_BHLK, value_BHLE, length) and torch.is_grad_enabled():
        return checkpoint(plainly, *inputs, use_reentrant=False, preserve_rng_state=dropout > 0.0)
    return plainly(*inputs)


def _fused_serves(
    query: Tensor, value: Tensor, length: int, dropout: float, squared: bool, mixes: Mixes
) -> bool:
    """Is torch's fused kernel there and the fastest? It wants E = K and knows one normaliser and nothing of talking
    heads; on a CPU it has no dropout, and takes up to three times as long as products for short rows in bf16
    (benchmarks/attention_cpu.py)."""
    if squared or mixes != NO_MIX or value.shape[-1] != query.shape[-1]:
        return False
    short = length < (FUSED_FROM_TOKENS if torch.compiler.is_compiling() else PRODUCTS_BELOW_TOKENS)
    short_bf16 = query.dtype != torch.float32 and short
    return query.device.type != "cpu" or not (dropout > 0.0 or short_bf16)


def _products_serve(dropout: float, mixes: Mixes) -> bool:
    return dropout == 0.0 and mixes == NO_MIX and not torch.compiler.is_compiling()


def _products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    masks: Sequence[Tensor | None],
    squared: bool,
    silu: bool = False,
    source: Source | None = None,
) -> Tensor:
    longest = max(lengths)
    keep = not _scores_again(query, value, longest) and (squared or longest < FUSED_FROM_TOKENS)
    source = None if keep else source
    return attend_by_products(query, key, value, lengths, masks, squared, keep, silu, source)


def _scores_again(query: Tensor, value: Tensor, length: int) -> bool:
    return value.shape[-1] >= 4 * query.shape[-1] and length >= SCORES_AGAIN_FROM_TOKENS
