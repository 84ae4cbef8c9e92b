"""The encoder with a head that predicts tokens: masked ones, or with a causal context the next.

B batch, L sequence length, N positions, D hidden size, V vocabulary.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration import EncoderConfig
from .encoder import Encoder
from .init import Linear, initialise
from .norms import build_norm


class HeadTransform(nn.Module):
    """norm(gelu(linear(x))) ahead of BERT's prediction, which takes the scale of the logits off the last norm."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.linear = Linear("transform", config.hidden_size, config.hidden_size, config.biases)
        self.norm = build_norm(config)

    def forward(self, hidden_ND: Tensor) -> Tensor:
        return self.norm(F.gelu(self.linear(hidden_ND)))


class MaskedLanguageModel(nn.Module):
    """Encoder and head. RoFormerV2's head is dropout and the token embedding, no more."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.dropout = nn.Dropout(config.hidden_dropout if config.head == "plain" else 0.0)
        self.transform = HeadTransform(config) if config.head == "bert" else None
        self.head = (
            None if config.tied_head else Linear("head", config.hidden_size, config.vocab_size, bias=False)
        )
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.head == "bert" else None
        for part in (self.transform, self.head):
            if part is not None:
                part.apply(partial(initialise, config=config))

    def reset_parameters(self) -> None:
        """The bias of BERT's head starts at 0."""
        if self.head_bias is not None:
            nn.init.zeros_(self.head_bias)

    def forward(
        self,
        tokens_BL: Tensor,
        document_BL: Tensor | None = None,
        token_types_BL: Tensor | None = None,
        positions_M: Tensor | None = None,
    ) -> Tensor:
        """Hidden vectors, [B, L, D] or those [M, D] of some positions; see `Encoder.forward`. `logits` scores them."""
        return self.encoder(tokens_BL, document_BL, token_types_BL, positions_M=positions_M)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Scores of every token, [N, V]; for predicted positions only, since L x V logits dwarf all else."""
        if self.transform is not None:
            hidden_ND = self.transform(hidden_ND)
        weight_VD = self.encoder.embeddings.token.weight if self.head is None else self.head.weight
        # Of layers that are spread over several devices, the last are elsewhere than the embedding.
        device = weight_VD.device
        bias_V = None if self.head_bias is None else self.head_bias.to(device)
        return F.linear(self.dropout(hidden_ND).to(device), weight_VD, bias_V)

    def set_ramp(self, updates: int) -> None:
        """Say how many updates have been made; matters to residual ramp alone (kexue.fm/archives/8998)."""
        if self.config.ramp_steps:
            self.encoder.ramp = min(1.0, updates / self.config.ramp_steps)
