"""The encoder with a head that predicts tokens.

B batch, L sequence length, N positions, D hidden size, V vocabulary.
"""

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from .configuration import EncoderConfig
from .encoder import Encoder
from .init import Linear, initialise


class MaskedLanguageModel(nn.Module):
    """Encoder and head. RoFormerV2's head is dropout and the token embedding, no more."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.head = (
            None if config.tied_head else Linear("head", config.hidden_size, config.vocab_size, bias=False)
        )
        if self.head is not None:
            self.head.apply(partial(initialise, config=config))

    def forward(
        self, tokens_BL: Tensor, document_BL: Tensor | None = None, token_types_BL: Tensor | None = None
    ) -> Tensor:
        """Hidden vectors [B, L, D]; choose positions from them and ask `logits` for those alone."""
        return self.encoder(tokens_BL, document_BL, token_types_BL)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Scores of every token, [N, V]; for masked positions only, since L x V logits dwarf all else."""
        weight_VD = self.encoder.embeddings.token.weight if self.head is None else self.head.weight
        return F.linear(self.dropout(hidden_ND), weight_VD)
