"""The model as an engine trains it: one forward() goes from tokens to the loss.

ZeRO-3 brings a weight together when forward() of a module that uses it begins and lets go of it when that ends. The
head's weights, and the token embedding as the head of a tied model, are therefore used inside of the outermost one.
B batch, L sequence length, M predicted positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sutrain.models.configuration import EncoderConfig
from sutrain.models.masked_lm import MaskedLanguageModel
from sutrain.objectives.masked_lm import masked_lm_loss


class TrainingModel(MaskedLanguageModel):
    """The same parameters under the same names; without labels the same function too."""

    @classmethod
    def on(cls, device: torch.device, config: EncoderConfig) -> TrainingModel:
        """The model made where it is to train, its initial weights drawn there: none pass through the host's memory."""
        with device:
            return cls(config)

    def forward(
        self,
        tokens_BL: Tensor,
        document_BL: Tensor | None = None,
        token_types_BL: Tensor | None = None,
        labels_BL: Tensor | None = None,
        hidden_BL: Tensor | None = None,
        see: Callable[[Tensor], None] | None = None,
    ) -> Any:
        """The MaskedLoss of a micro-batch, or without labels the hidden vectors [B, L, D].

        see: shown the scores [M, V] at the predicted positions, in as many pieces as they are computed in.
        """
        if labels_BL is None or hidden_BL is None or document_BL is None:
            return super().forward(tokens_BL, document_BL, token_types_BL)
        encode = partial(super().forward, token_types_BL=token_types_BL)
        return masked_lm_loss(encode, self.logits, tokens_BL, labels_BL, hidden_BL, document_BL, see)
