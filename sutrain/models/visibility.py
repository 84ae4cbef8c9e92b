"""What a token may see, worked out once per batch and used by every layer.

B batch, L sequence length. A row holds one document or several; a token sees exactly its own document.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .configuration import EncoderConfig
from .rotary import rotary_table

ENTROPY_BASE_TOKENS = 512  # softmax_plus equals softmax at this length, whatever length a model is trained at
ENTROPY_FLOOR_TOKENS = 16  # shorter documents are treated as this long (bert4keras since 2023)


class Visibility(NamedTuple):
    """Positions, permissions and score scale of a batch."""

    rotary: Tensor  # [L, K/2, 2] fp32, see rotary.py
    mask: Tensor  # [B, 1, L, L] in the compute dtype, added to scores: 0 where query sees key, else -inf
    score_scale: Tensor | None  # [B, L, 1, 1] fp32, factor on a query's scores; None for plain softmax


def build_visibility(document_BL: Tensor, config: EncoderConfig, dtype: torch.dtype) -> Visibility:
    """Block-diagonal visibility of packed rows.

    Args:
        document_BL: integer document number of each position; 0 is padding, equal numbers see each other.
        dtype: the dtype in which scores are computed.
    """
    # Padding sees padding (0 == 0), so every query has a key and softmax never divides 0 by 0; nothing else
    # sees it.
    same_BLL = document_BL.unsqueeze(2) == document_BL.unsqueeze(1)
    mask_BLL = torch.zeros(same_BLL.shape, dtype=dtype, device=document_BL.device)
    mask_BLL.masked_fill_(~same_BLL, -math.inf)
    scale = None
    if config.score_normaliser == "softmax_plus":
        scale = entropy_scale(same_BLL.sum(-1))[..., None, None]
    table = rotary_table(document_BL.shape[1], config.rotary_size, config.rotary_base, document_BL.device)
    return Visibility(table, mask_BLL.unsqueeze(1), scale)


def entropy_scale(visible_tokens: Tensor) -> Tensor:
    """log_512(max(n, 16)), fp32: attention stays as sharp in long documents (kexue.fm/archives/8823)."""
    floored = visible_tokens.clamp(min=ENTROPY_FLOOR_TOKENS).float()
    return floored.log() / math.log(ENTROPY_BASE_TOKENS)
