"""What a token may see, worked out once per batch and used by every layer.

B batch, L sequence length, T tokens of the batch that are not padding. A row holds one document or several; a token
sees its own document alone, and of that what `EncoderConfig.context` says.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .chunks import Chunks, build_chunks
from .configuration import EncoderConfig
from .documents import Documents
from .rotary import Turns, rotary_table

ENTROPY_BASE_TOKENS = 512  # softmax_plus equals softmax at this length, whatever length a model is trained at
ENTROPY_FLOOR_TOKENS = 16  # shorter documents are treated as this long (bert4keras since 2023)


class Visibility(NamedTuple):
    """Positions, permissions and score scale of a batch; exactly one of mask, documents and chunks is given."""

    dtype: torch.dtype  # of weights and branches
    rotary: Turns | None  # of the row's L positions, see rotary.py; None without rotary positions
    score_scale: Tensor | None  # [B, L, 1, 1] fp32, factor on a query's scores; None for plain softmax
    mask: Tensor | None = None  # [B, 1, L, L] in `dtype`, added to scores: 0 where query sees key, else -inf
    documents: Documents | None = None  # where each document lies in the one row of a batch without padding
    chunks: Chunks | None = None  # mixer flash: where each token lies in chunks
    ramp: Tensor | None = None  # scalar fp32, see `Encoder.ramp`

    def storages(self) -> set[int]:
        """Addresses of its tensors, which all layers share."""
        documents = self.documents
        laid_out = () if documents is None else (documents.index_T, documents.boundaries, *documents.masks)
        tensors = [*self, *(self.rotary or ()), *(self.chunks or ()), *laid_out]
        return {t.untyped_storage().data_ptr() for t in tensors if isinstance(t, Tensor)}


def build_visibility(
    document_BL: Tensor, config: EncoderConfig, dtype: torch.dtype, segments_BL: Tensor | None = None
) -> Visibility:
    """Visibility of padded or packed rows.

    Args:
        document_BL: integer document number of each position; 0 is padding, equal numbers see each other.
        dtype: the dtype in which scores are computed.
        segments_BL: context unilm: 1 where a token follows its document's prefix; None: all is prefix.
    """
    length, device = document_BL.shape[1], document_BL.device
    table = rotary_table(length, config.key_size, config.rotary_base, device) if config.rotary else None
    if config.mixer == "flash":
        chunks = build_chunks(document_BL, config.flash_chunk_size, config.context == "causal")
        return Visibility(dtype, table, None, chunks=chunks)
    # Padding sees padding (0 == 0), so every query has a key and softmax never divides 0 by 0; nothing else
    # sees it.
    seen_BLL = document_BL.unsqueeze(2) == document_BL.unsqueeze(1)
    seen_BLL = _only_context(seen_BLL, config, unilm_order(segments_BL))
    mask_BLL = torch.zeros(seen_BLL.shape, dtype=dtype, device=device)
    mask_BLL.masked_fill_(~seen_BLL, -math.inf)
    scale = score_scale(seen_BLL.sum(-1), config)
    return Visibility(dtype, table, scale, mask=mask_BLL.unsqueeze(1))


def build_visibility_of_documents(
    documents: Documents, config: EncoderConfig, dtype: torch.dtype, segments_BL: Tensor | None = None
) -> Visibility:
    """The same for a batch whose tokens stand in one row [1, T] without padding; see documents.py."""
    device, length = documents.index_T.device, documents.row_tokens
    table = rotary_table(length, config.key_size, config.rotary_base, device) if config.rotary else None
    if table is not None:  # every token keeps the angle of its place in its row
        table = table.at(documents.index_T % length)
    masks: list[Tensor] = []
    if config.context == "bidirectional":
        sizes = documents.sizes()
        counts_T = sizes.repeat_interleave(sizes, output_size=len(documents.index_T))
    else:
        order = unilm_order(segments_BL)
        order_T = None if order is None else order.flatten()[documents.index_T]
        counts = []
        for start, end in documents.spans():
            everything = torch.ones(1, end - start, end - start, dtype=torch.bool, device=device)
            seen = _only_context(everything, config, None if order_T is None else order_T[None, start:end])
            masks.append(torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -math.inf))
            counts.append(seen[0].sum(-1))
        counts_T = torch.cat(counts)
    scale = score_scale(counts_T[None], config)
    return Visibility(dtype, table, scale, documents=documents.with_masks(masks))


def choose(x_BLF: Tensor, chosen_M: Tensor | None) -> Tensor:
    """[1, M, F] of the tokens of these numbers in [B·L]; all if None."""
    return x_BLF if chosen_M is None else x_BLF.flatten(0, 1).index_select(0, chosen_M).unsqueeze(0)


def unilm_order(segments_BL: Tensor | None) -> Tensor | None:
    """Running count of tokens behind a prefix: a token sees what has no larger count (kexue.fm/archives/7427)."""
    return None if segments_BL is None else (segments_BL > 0).cumsum(-1)


def _only_context(seen_BLL: Tensor, config: EncoderConfig, order_BL: Tensor | None) -> Tensor:
    if config.context == "causal":
        return seen_BLL.tril()
    if config.context == "unilm" and order_BL is not None:
        return seen_BLL & (order_BL.unsqueeze(1) <= order_BL.unsqueeze(2))
    return seen_BLL


def score_scale(visible_tokens_BL: Tensor, config: EncoderConfig) -> Tensor | None:
    """Factor on q k / sqrt(K) of each query that sees n tokens, fp32 [B, L, 1, 1]; None when it is 1.

    Squared scores are divided by n, or by n^2 without the 1 / K of the square, through the factor alone: it is
    positive, and relu(c x)^2 = c^2 relu(x)^2.
    """
    if config.score_normaliser == "softmax":
        return None
    count = visible_tokens_BL[..., None, None].float()
    if config.score_normaliser == "softmax_plus":
        return entropy_scale(count)
    if config.score_normaliser == "relu_squared":
        return count.rsqrt()
    return math.sqrt(config.key_size) / count


def entropy_scale(visible_tokens: Tensor) -> Tensor:
    """log_512(max(n, 16)), fp32: attention stays as sharp in long documents (kexue.fm/archives/8823)."""
    floored = visible_tokens.clamp(min=ENTROPY_FLOOR_TOKENS).float()
    return floored.log() / math.log(ENTROPY_BASE_TOKENS)
