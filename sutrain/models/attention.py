"""Multi-head attention with rotary positions.

B batch, L sequence length, D hidden size, H heads, K head size, E value size.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration import EncoderConfig
from .init import Linear
from .rotary import rotate
from .visibility import Visibility


class MultiHeadAttention(nn.Module):
    """softmax(q k^T / sqrt(K)) v, heads side by side, then an output map (kexue.fm/archives/8998).

    Query, key and value stay separate matrices: optimizers that normalise per tensor (LAMB, AdaFactor) must
    see three tensors here, not one.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        inner = config.num_heads * config.head_size
        self.head_size, self.dropout = config.head_size, config.attention_dropout
        self.query = Linear("query", config.hidden_size, inner, config.biases)
        self.key = Linear("key", config.hidden_size, inner, config.biases)
        self.value = Linear("value", config.hidden_size, inner, config.biases)
        self.output = Linear("output", inner, config.hidden_size, config.biases)

    def forward(self, x_BLD: Tensor, visible: Visibility) -> Tensor:
        """Mix the tokens of each document; [B, L, D] in and out."""
        query_BHLK, key_BHLK = self.query_key(x_BLD, visible)
        value_BHLK = self._heads(self.value(x_BLD)).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        mixed_BHLK = attend(query_BHLK, key_BHLK, value_BHLK, visible.mask, dropout)
        return self.output(mixed_BHLK.transpose(1, 2).flatten(2))

    def query_key(self, x_BLD: Tensor, visible: Visibility) -> tuple[Tensor, Tensor]:
        """Query and key as the scores see them, [B, H, L, K]: rotated, any scale of the scores in the query."""
        query, key = (
            rotate(self._heads(project(x_BLD)), visible.rotary) for project in (self.query, self.key)
        )
        if visible.score_scale is not None:  # folded into the query, so that any attention kernel can follow
            query = (query * visible.score_scale).to(key.dtype)
        return query.transpose(1, 2), key.transpose(1, 2)

    def _heads(self, x_BLI: Tensor) -> Tensor:
        return x_BLI.unflatten(-1, (-1, self.head_size))


FUSED_FROM_TOKENS = 256
"""Row length from which the fused kernel is the faster one on a CPU also in bf16."""


def attend(
    query_BHLK: Tensor, key_BHLK: Tensor, value_BHLE: Tensor, mask_B1LL: Tensor, dropout: float
) -> Tensor:
    """softmax(q k^T / sqrt(K) + mask) v -> [B, H, L, E], with `dropout` on the probabilities.

    Two ways to the same numbers. The fused kernel is the best wherever it exists in full; on a CPU it takes up
    to three times as long as plain products for short rows in bf16 (benchmarks/attention_cpu.py), it has no
    dropout, and it wants E = K.
    """
    on_cpu = query_BHLK.device.type == "cpu"
    same_size = value_BHLE.shape[-1] == query_BHLK.shape[-1]
    short_bf16 = query_BHLK.dtype != torch.float32 and query_BHLK.shape[2] < FUSED_FROM_TOKENS
    if same_size and not (on_cpu and (dropout > 0.0 or short_bf16)):
        return F.scaled_dot_product_attention(
            query_BHLK, key_BHLK, value_BHLE, attn_mask=mask_B1LL, dropout_p=dropout
        )
    probabilities_BHLL = probabilities(query_BHLK, key_BHLK, mask_B1LL).to(value_BHLE.dtype)
    return torch.matmul(F.dropout(probabilities_BHLL, dropout), value_BHLE)


def probabilities(query_BHLK: Tensor, key_BHLK: Tensor, mask_B1LL: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K) + mask), fp32 [B, H, L, L]."""
    scale = 1.0 / math.sqrt(query_BHLK.shape[-1])
    scores_BHLL = torch.matmul(query_BHLK * scale, key_BHLK.transpose(-1, -2)) + mask_B1LL
    return torch.softmax(scores_BHLL, dim=-1, dtype=torch.float32)
