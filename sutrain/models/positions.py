"""Learned absolute positions, and how few of them can serve many (kexue.fm/archives/7947).

B batch, L sequence length, D hidden size, P learned vectors.
"""

import torch
from torch import Tensor, nn

from .configuration import EncoderConfig
from .init import Embedding


class LearnedPositions(nn.Module):
    """One learned vector a position; a document's first token has position 0 wherever it stands in its row.

    With `hierarchical_alpha` a, the P vectors p serve P^2 positions: u_i = (p_i - a p_0) / (1 - a), and position
    i P + j gets a u_i + (1 - a) u_j, which is p_j for the first P. Nothing is stored, so it holds while p is trained.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.alpha = config.hierarchical_alpha
        self.table = Embedding(config.max_row_tokens, config.hidden_size)

    def forward(self, positions_BL: Tensor, row_tokens: int) -> Tensor:
        """Vectors [B, L, D] of positions below `row_tokens`.

        Raises:
            ValueError: when a row is longer than the positions there are.
        """
        learned = self.table.weight.shape[0]
        limit = learned**2 if self.alpha else learned
        if row_tokens > limit:
            raise ValueError(
                f"row of {row_tokens} tokens: expected at most {limit}, the model's learned positions"
                + ("" if self.alpha else "; hierarchical_alpha 0.4 makes them the square of that")
            )
        if not self.alpha or row_tokens <= learned:
            return self.table(positions_BL)
        p = self.table.weight
        u = (p - self.alpha * p[:1]) / (1 - self.alpha)
        high, low = positions_BL // learned, positions_BL % learned
        return self.alpha * u[high] + (1 - self.alpha) * u[low]


def positions_in_documents(document_BL: Tensor) -> Tensor:
    """How many places each token stands behind the first of its document, [B, L]."""
    same_BLL = document_BL.unsqueeze(2) == document_BL.unsqueeze(1)
    first_BL = same_BLL.to(torch.uint8).argmax(-1)
    return torch.arange(document_BL.shape[1], device=document_BL.device) - first_BL
