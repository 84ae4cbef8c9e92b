"""Gated attention unit (arXiv 2202.10447) in the form of GAU-alpha (kexue.fm/archives/9052).

B batch, L sequence length, D hidden size, E expansion size, S key size.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import gates
from .attention import attend_silu
from .configuration import EncoderConfig
from .gates import Promise, gated_output
from .init import Linear
from .products import Source, probabilities
from .rotary import rotate
from .visibility import Visibility, choose


class GatedAttentionUnit(nn.Module):
    """(U * A V) W_o with U, V, Z = silu(x W_i) and A one head's attention, query and key rescaled Z.

    It replaces attention and feed-forward block together; two of them weigh as much as one such pair. W_i
    stays one matrix, as in the published model: its trust ratio under LAMB is that of the whole.
    """

    low = False
    """Is it of a stack's lowest third, which save memory on shorter rows already (gates.py)?"""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        expansion, key = config.gau_expansion_size, config.gau_key_size
        self.parts, self.dropout = (expansion, expansion, key), config.attention_dropout
        self.half_split = config.positions == "rotary_half"
        self.squared = config.score_normaliser.startswith("relu_squared")
        self.input = Linear("gau_input", config.hidden_size, sum(self.parts), config.biases, parts=self.parts)
        self.query_scale = nn.Parameter(torch.ones(key))
        self.key_scale = nn.Parameter(torch.ones(key))
        self.query_offset = nn.Parameter(torch.zeros(key)) if config.biases else None
        self.key_offset = nn.Parameter(torch.zeros(key)) if config.biases else None
        self.output = Linear("output", expansion, config.hidden_size, config.biases)

    def reset_parameters(self) -> None:
        """Query and key start out equal: scale 1, offset 0."""
        nn.init.ones_(self.query_scale)
        nn.init.ones_(self.key_scale)
        for offset in (self.query_offset, self.key_offset):
            if offset is not None:
                nn.init.zeros_(offset)

    def forward(
        self, x_BLD: Tensor, visible: Visibility, chosen_M: Tensor | None = None
    ) -> tuple[Tensor, Promise]:
        """Mix the tokens of each document; [B, L, D] to [B, 1, L, E] and the gate, which are to go to `finish` (as in
        `MultiHeadAttention`)."""
        value_again = self.low or x_BLD.shape[1] >= gates.VALUES_AGAIN_FROM_TOKENS
        gate, value, shared = gates.project(self.input, x_BLD, self.parts, 1 + value_again, chosen_M)
        shared_BLS = shared.kept()  # as the others before silu
        query_B1LS, key_B1LS = self._query_key(shared_BLS, visible)
        value_BLE = value.kept()
        # The value is not kept beside what it is promised of. Detached, or compiled layers would be asked for the
        # gradients of these as well, and given zeros as wide as the value.
        kept = (value_BLE,) if value.x_BLD is None else value
        made_of = tuple(None if x is None else x.detach() for x in (shared_BLS, *kept))
        source = Source(made_of, partial(self._query_key_value, visible))
        dropout = self.dropout if self.training else 0.0
        mixed_B1LE = attend_silu(
            query_B1LS, key_B1LS, _one_head(value_BLE), visible, dropout, self.squared, source
        )
        return mixed_B1LE, gate

    def finish(self, mixed: tuple[Tensor, Promise], chosen_M: Tensor | None = None) -> Tensor:
        """Transform each token; [B, L, D], or at some tokens as `choose` has it."""
        mixed_B1LE, gate = mixed
        return gated_output(self.output, F.silu, choose(mixed_B1LE.squeeze(1), chosen_M), gate)

    def _query_key_value(
        self, visible: Visibility, shared_BLS: Tensor, *value: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        return *self._query_key(shared_BLS, visible), _one_head(Promise(*value).kept())

    def query_key(self, x_BLD: Tensor, visible: Visibility) -> tuple[Tensor, Tensor]:
        """Query and key as the scores see them, [B, 1, L, S]: rotated, any scale of the scores in the query."""
        return self._query_key(self.input(x_BLD).split(self.parts, dim=-1)[2], visible)

    def attention(self, x_BLD: Tensor, visible: Visibility) -> Tensor | None:
        """How attention spreads, fp32 [B, 1, L, L] with rows that sum to 1; None if it is no distribution."""
        if self.squared or visible.mask is None:
            return None
        query_B1LS, key_B1LS = self.query_key(x_BLD, visible)
        return probabilities(query_B1LS, key_B1LS, visible.mask)

    def _query_key(self, shared_BLS: Tensor, visible: Visibility) -> tuple[Tensor, Tensor]:
        shared_BLS = F.silu(shared_BLS)
        query, key = shared_BLS * self.query_scale, shared_BLS * self.key_scale
        if self.query_offset is not None and self.key_offset is not None:
            query, key = query + self.query_offset, key + self.key_offset
        query = rotate(query.unsqueeze(2), visible.rotary, self.half_split)  # the axis of its only head
        key = rotate(key.unsqueeze(2), visible.rotary, self.half_split)
        if visible.score_scale is not None:
            query = (query * visible.score_scale).to(key.dtype)
        return query.transpose(1, 2), key.transpose(1, 2)


def _one_head(x_BLE: Tensor) -> Tensor:
    """[B, 1, L, E] in the memory of [B, L, 1, E], as attention's gradients are: in another one, were it only the stride
    of the one head, compiled layers would copy them."""
    return x_BLE.unsqueeze(2).transpose(1, 2)
