"""The tokens of a batch in one row without padding, and where each document lies in it.

B batch, L row length, T tokens that are not padding. Linear maps, norms and feed-forward blocks then compute T
tokens instead of B x L, and attention the square of each document instead of that of the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .configuration import GATED_ACTIVATIONS, EncoderConfig
from .processor import Bf16Units, bf16_units


class Costs(NamedTuple):
    """What counts beside the products of linear maps, in products that a CPU core makes in the same time."""

    pair: float  # a product of a pair of tokens, in attention by heads; those of a gated unit are wide enough for 1
    call: float  # of attention by heads, forward and backward: one a document and layer
    unit: float  # of attention in a gated unit, which computes every document by itself


# Measured as said in LOG.md. Without `call` rows of short documents would be taken apart at a loss; and where linear
# maps have instructions of 16 bits, attention is left behind.
COSTS: dict[Bf16Units, Costs] = {
    "none": Costs(pair=1.0, call=10e6, unit=10e6),
    "vectors": Costs(pair=4.5, call=10e6, unit=30e6),
    "tiles": Costs(pair=4.5, call=100e6, unit=100e6),
}


def costs(dtype: torch.dtype) -> Costs:
    """Those of this machine's CPU."""
    return COSTS[bf16_units() if dtype == torch.bfloat16 else "none"]


@dataclass(eq=False)
class Documents:
    """Documents one behind the other in one row [1, T].

    No tuple: of a tuple torch.compile makes every element part of a layer's program, and with the number of documents
    every batch would get a program of its own.
    """

    index_T: Tensor  # place of every token in the batch of rows, flat
    lengths: tuple[int, ...]
    boundaries: Tensor  # first token of every document and the end of the last, int32 on the tokens' device
    row_tokens: int  # L
    masks: Sequence[
        Tensor
    ] = ()  # one a document, [1, len, len] added to scores; none: each sees all of itself

    def spans(self) -> list[tuple[int, int]]:
        """First token and the one behind the last, of every document."""
        return list(pairwise(accumulate(self.lengths, initial=0)))

    def sizes(self) -> Tensor:
        """The lengths as a tensor on the tokens' device, int64."""
        return self.boundaries.diff().long()

    def with_masks(self, masks: Sequence[Tensor]) -> Documents:
        """The same documents, seen in this way."""
        return replace(self, masks=masks)

    def mask_of_each(self) -> Sequence[Tensor | None]:
        """One a document, None where it sees all of itself."""
        return self.masks or [None] * len(self.lengths)

    def take(self, x_BL: Tensor) -> Tensor:
        """Rows [B, L] to the one row [1, T]."""
        return x_BL.flatten()[self.index_T].unsqueeze(0)

    def find(self, places_M: Tensor) -> Tensor:
        """Where tokens stand in the one row, [M], that are at these places of the batch of rows, flat."""
        return torch.searchsorted(self.index_T, places_M.contiguous())

    def put_back(self, x_1TD: Tensor, rows: int) -> Tensor:
        """The one row to rows [B, L, D], with zeros at padding."""
        spread = x_1TD.new_zeros(rows * self.row_tokens, x_1TD.shape[-1])
        spread = spread.index_copy(0, self.index_T.to(x_1TD.device), x_1TD.squeeze(0))
        return spread.unflatten(0, (rows, self.row_tokens))


def find_documents(document_BL: Tensor) -> Documents | None:
    """The documents of a batch; None if there are none, or if one is interrupted by another.

    A hole of padding does not interrupt a document. Waits for the device: lengths are needed on the host.
    """
    row_tokens = document_BL.shape[1]
    numbers = document_BL.flatten()
    index_T = torch.nonzero(numbers).squeeze(1)
    # One number for row and document, so that a document ends with its row.
    keys_T = numbers[index_T] + (numbers.max() + 1) * (index_T // row_tokens)
    runs, lengths = torch.unique_consecutive(keys_T, return_counts=True)
    if runs.numel() == 0 or torch.unique(runs).numel() != runs.numel():
        return None
    # Made here once: a tensor from a list in every layer would make the host wait for the device as often.
    boundaries = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return Documents(index_T, tuple(lengths.tolist()), boundaries, row_tokens)


def worthwhile(documents: Documents, rows: int, config: EncoderConfig, costs: Costs) -> bool:
    """Does it save at least a tenth of a layer's time to take the rows apart?"""
    if len(documents.lengths) == rows == 1:
        return True  # nothing is computed twice, and there is no mask to add
    return share_of_rows(documents, rows, config, costs) < 0.9


def share_of_rows(documents: Documents, rows: int, config: EncoderConfig, costs: Costs) -> float:
    """The time of a layer for documents one by one, as a share of its time for the rows that they are in."""
    hidden, pair_cost, call = config.hidden_size, costs.pair, costs.call
    if config.gated:
        pair, pair_cost, call = config.gau_key_size + config.gau_expansion_size, 1.0, costs.unit
        token = hidden * (3 * config.gau_expansion_size + config.gau_key_size)
    else:
        pair = config.num_heads * (config.head_size + config.value_size)
        matrices = 3 if config.activation in GATED_ACTIVATIONS else 2
        token = 2 * hidden * pair + matrices * hidden * config.feed_forward_size
    length = documents.row_tokens
    in_rows = rows * length * (token + length * pair * pair_cost)
    apart = sum(size * (token + size * pair * pair_cost) + call for size in documents.lengths)
    return apart / in_rows
