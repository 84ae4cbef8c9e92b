"""The encoder: embeddings, then layers of mixer and feed-forward branches, each joined by a residual rule.

B batch, L sequence length, D hidden size. RoFormerV2, GAU-alpha and DeepNet are values of `EncoderConfig`;
there are no subclasses.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import MultiHeadAttention
from .configuration import EncoderConfig
from .feed_forward import FeedForward
from .gau import GatedAttentionUnit
from .init import Embedding, initialise
from .norms import build_norm
from .residual import Residual
from .visibility import Visibility, build_visibility


class Embeddings(nn.Module):
    """norm(dropout(token + token type)): dropout before the norm, as in RoFormerV2; positions are rotary."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.token = Embedding(config.vocab_size, config.hidden_size)
        self.token_type = Embedding(config.token_types, config.hidden_size) if config.token_types else None
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.norm = build_norm(config)

    def forward(self, tokens_BL: Tensor, token_types_BL: Tensor | None) -> Tensor:
        x_BLD = self.token(tokens_BL)
        if self.token_type is not None:  # no types given means type 0, which is how the models are pretrained
            types = self.token_type.weight[0] if token_types_BL is None else self.token_type(token_types_BL)
            x_BLD = x_BLD + types
        return self.norm(self.dropout(x_BLD))


class Layer(nn.Module):
    """One mixer branch and, unless the mixer is a GAU, one feed-forward branch."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.residual = Residual(config)
        self.mixer = GatedAttentionUnit(config) if config.mixer == "gau" else MultiHeadAttention(config)
        self.mixer_norm = build_norm(config)
        self.feed_forward = None if config.mixer == "gau" else FeedForward(config)
        self.feed_forward_norm = None if config.mixer == "gau" else build_norm(config)

    def forward(self, x_BLD: Tensor, visible: Visibility) -> Tensor:
        dtype = visible.mask.dtype
        x_BLD = self.residual(x_BLD, self.mixer_norm, partial(self.mixer, visible=visible), dtype)
        if self.feed_forward is not None:
            x_BLD = self.residual(x_BLD, self.feed_forward_norm, self.feed_forward, dtype)
        return x_BLD


class Encoder(nn.Module):
    """Tokens to hidden vectors."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # recompute each layer in the backward pass to save memory
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.final_norm = build_norm(config) if config.residual == "pre" else nn.Identity()
        self.apply(partial(initialise, config=config))

    def forward(
        self,
        tokens_BL: Tensor,
        document_BL: Tensor | None = None,
        token_types_BL: Tensor | None = None,
        layer_outputs: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden vectors [B, L, D] in the dtype of the weights.

        Args:
            tokens_BL: token ids.
            document_BL: 0 for padding; positions with equal numbers see each other and nothing else. None means
                one document a row: every token that is not `pad_token_id`.
            token_types_BL: None means type 0 everywhere.
            layer_outputs: if given, the embeddings' output and every layer's is appended to it.
        """
        if document_BL is None:
            document_BL = (tokens_BL != self.config.pad_token_id).long()
        x_BLD = self.embeddings(tokens_BL, token_types_BL)
        dtype = x_BLD.dtype
        visible = build_visibility(document_BL, self.config, dtype)
        if self.config.fp32_residual:
            x_BLD = x_BLD.float()
        for layer in self.layers:
            if layer_outputs is not None:
                layer_outputs.append(x_BLD.to(dtype))
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_BLD = checkpoint(layer, x_BLD, visible, use_reentrant=False)
            else:
                x_BLD = layer(x_BLD, visible)
        x_BLD = self.final_norm(x_BLD).to(dtype)
        if layer_outputs is not None:
            layer_outputs.append(x_BLD)
        return x_BLD
