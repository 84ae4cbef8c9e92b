"""The encoder: embeddings, then layers of mixer and feed-forward branches, each joined by a residual rule.

B batch, L sequence length, D hidden size, M positions that are asked for. RoFormerV2, GAU-alpha, FLASH, DeepNet and
BERT are values of `EncoderConfig`; there are no subclasses.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import MultiHeadAttention, varlen_exists
from .configuration import EncoderConfig
from .documents import Documents, costs, find_documents, worthwhile
from .feed_forward import FeedForward
from .flash import MixedChunkAttention
from .gau import GatedAttentionUnit
from .init import Embedding, initialise
from .norms import build_branch_norm, build_norm
from .positions import LearnedPositions, positions_in_documents
from .residual import Residual
from .visibility import Visibility, build_visibility, build_visibility_of_documents, choose

_MIXERS = {"attention": MultiHeadAttention, "gau": GatedAttentionUnit, "flash": MixedChunkAttention}


class Embeddings(nn.Module):
    """norm(dropout(token + token type + learned position)): dropout before the norm as in RoFormerV2, or after it."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.token = Embedding(config.vocab_size, config.hidden_size)
        self.token_type = Embedding(config.token_types, config.hidden_size) if config.token_types else None
        self.position = LearnedPositions(config) if config.positions == "learned" else None
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.dropout_first = config.embedding_dropout == "before_norm"
        self.norm = build_norm(config)

    def forward(
        self,
        tokens_BL: Tensor,
        token_types_BL: Tensor | None = None,
        positions_BL: Tensor | None = None,
        row_tokens: int = 0,
    ) -> Tensor:
        x_BLD = self.token(tokens_BL)
        if self.token_type is not None:  # no types given means type 0, which is how the models are pretrained
            types = self.token_type.weight[0] if token_types_BL is None else self.token_type(token_types_BL)
            x_BLD = x_BLD + types
        if self.position is not None:
            x_BLD = x_BLD + self.position(positions_BL, row_tokens)
        return self.norm(self.dropout(x_BLD)) if self.dropout_first else self.dropout(self.norm(x_BLD))


class Layer(nn.Module):
    """One mixer branch and, unless the mixer is a gated unit, one feed-forward branch."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.residual = Residual(config)
        self.mixer = _MIXERS[config.mixer](config)
        self.mixer_norm = build_branch_norm(config)
        self.feed_forward = None if config.gated else FeedForward(config)
        self.feed_forward_norm = None if config.gated else build_branch_norm(config)
        rezero = config.residual == "rezero"
        self.mixer_scale = nn.Parameter(torch.zeros(1)) if rezero else None
        self.feed_forward_scale = nn.Parameter(torch.zeros(1)) if rezero and not config.gated else None

    def reset_parameters(self) -> None:
        """The factors of rezero start at 0."""
        for scale in (self.mixer_scale, self.feed_forward_scale):
            if scale is not None:
                nn.init.zeros_(scale)

    def forward(self, x_BLD: Tensor, visible: Visibility, chosen_M: Tensor | None = None) -> Tensor:
        """The stream after this layer, [B, L, D]; or [1, M, D], all that follows attention at these tokens alone,
        numbered as in [B·L]."""
        residual, dtype, ramp = self.residual, visible.dtype, visible.ramp
        mixer: Any = self.mixer
        entered_BLD = residual.enter(x_BLD, self.mixer_norm, dtype)
        mixed = mixer(entered_BLD, visible=visible, chosen_M=chosen_M)
        change_BLD, x_BLD = mixer.finish(mixed, chosen_M), choose(x_BLD, chosen_M)
        x_BLD = residual(x_BLD, change_BLD, self.mixer_norm, ramp, self.mixer_scale)
        if self.feed_forward is not None and self.feed_forward_norm is not None:
            change_BLD = self.feed_forward(residual.enter(x_BLD, self.feed_forward_norm, dtype))
            x_BLD = residual(x_BLD, change_BLD, self.feed_forward_norm, ramp, self.feed_forward_scale)
        return x_BLD


class Encoder(nn.Module):
    """Tokens to hidden vectors."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # compute all layers again in the backward pass, to save memory
        self.recompute_layers = 0  # or only that many, the lowest ...
        self.recompute_together = 1  # ... so many at a time, of which only the first keeps its input
        self.take_rows_apart = True  # skip padding and other documents where that saves work
        self.ramp = 1.0  # residual ramp: how much of a branch counts; grows from 0 to 1 while training
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        for layer in self.layers[: config.num_layers // 3]:
            if isinstance(layer.mixer, GatedAttentionUnit):
                layer.mixer.low = True
        self.final_norm = build_norm(config) if config.residual == "pre" else nn.Identity()
        self.apply(partial(initialise, config=config))

    def forward(
        self,
        tokens_BL: Tensor,
        document_BL: Tensor | None = None,
        token_types_BL: Tensor | None = None,
        layer_outputs: list[Tensor] | None = None,
        positions_M: Tensor | None = None,
    ) -> Tensor:
        """Hidden vectors [B, L, D] in the dtype of the weights, or those [M, D] of some positions.

        At padding they are of no meaning.

        Args:
            tokens_BL: token ids.
            document_BL: 0 for padding; positions with equal numbers see each other and nothing else. None means
                one document a row: every token that is not `pad_token_id`.
            token_types_BL: None means type 0 everywhere. In context unilm, type 1 marks what follows the prefix.
            layer_outputs: if given, the embeddings' output and every layer's is appended to it.
            positions_M: positions of tokens, no padding, numbered as in [B·L]. Where they are half of all or fewer,
                the last layer computes nothing else behind its attention, for no one would read it.
        """
        if document_BL is None:
            document_BL = (tokens_BL != self.config.pad_token_id).long()
        positions_BL = positions_in_documents(document_BL) if self.config.positions == "learned" else None
        documents = self._documents(document_BL)
        dtype = self.embeddings.token.weight.dtype
        if documents is None:
            visible = build_visibility(document_BL, self.config, dtype, token_types_BL)
        else:
            visible = build_visibility_of_documents(documents, self.config, dtype, token_types_BL)
            tokens_BL = documents.take(tokens_BL)
            token_types_BL = None if token_types_BL is None else documents.take(token_types_BL)
            positions_BL = None if positions_BL is None else documents.take(positions_BL)
        if self.config.residual == "ramp":
            # Made on the device: for a copy the host would wait.
            visible = visible._replace(ramp=torch.full((), self.ramp, device=document_BL.device))

        types_BL = token_types_BL if self.embeddings.token_type is not None else None
        x_BLD = self.embeddings(tokens_BL, types_BL, positions_BL, row_tokens=document_BL.shape[1])
        if self.config.fp32_residual:
            x_BLD = x_BLD.float()
        chosen_M = None
        if (
            positions_M is not None
            and layer_outputs is None
            and 0 < 2 * len(positions_M) <= tokens_BL.numel()
        ):
            chosen_M = positions_M if documents is None else documents.find(positions_M)
        again = len(self.layers) if self.gradient_checkpointing else self.recompute_layers
        together = self.recompute_together if layer_outputs is None else 1
        start = 0
        while start < len(self.layers):
            if layer_outputs is not None:
                layer_outputs.append(_in_rows(x_BLD, documents, len(document_BL)).to(dtype))
            if start < again and torch.is_grad_enabled():
                end = min(start + together, again)
                x_BLD = checkpoint(self._run, x_BLD, visible, start, end, chosen_M, use_reentrant=False)
            else:
                end = start + 1
                x_BLD = self._run(x_BLD, visible, start, end, chosen_M)
            start = end
        x_BLD = self.final_norm(x_BLD).to(dtype)
        if chosen_M is not None:
            return x_BLD.squeeze(0)
        x_BLD = _in_rows(x_BLD, documents, len(document_BL))
        if layer_outputs is not None:
            layer_outputs.append(x_BLD)
        return x_BLD if positions_M is None else choose(x_BLD, positions_M).squeeze(0)

    def _run(
        self, x_BLD: Tensor, visible: Visibility, start: int, end: int, chosen_M: Tensor | None
    ) -> Tensor:
        """The layers from `start` up to `end`; the last of all at the chosen tokens, if there are any."""
        for number in range(start, end):
            last = number == len(self.layers) - 1
            x_BLD = self.layers[number](x_BLD, visible, chosen_M if last else None)
        return x_BLD

    def _documents(self, document_BL: Tensor) -> Documents | None:
        """The documents of the batch if it is to be computed without padding, else None."""
        if not self.take_rows_apart or self.config.mixer == "flash" or torch.compiler.is_compiling():
            return None
        if document_BL.device.type == "cuda":
            if not self._varlen_serves(document_BL.device):
                return None
            return find_documents(document_BL)
        if document_BL.device.type != "cpu":
            return None
        documents = find_documents(document_BL)
        if documents is None or not worthwhile(
            documents, len(document_BL), self.config, costs(self.embeddings.token.weight.dtype)
        ):
            return None
        return documents

    def _varlen_serves(self, device: torch.device) -> bool:
        """Would every layer take torch's varlen attention, which a GPU needs to gain anything by documents?"""
        config, dtype = self.config, self.embeddings.token.weight.dtype
        softmax = config.score_normaliser in ("softmax", "softmax_plus") and config.talking_heads == "none"
        plain = config.mixer == "attention" and softmax and config.context == "bidirectional"
        undropped = config.attention_dropout == 0.0 or not self.training
        return plain and undropped and varlen_exists(device, dtype, config.head_size, config.value_size)


def _in_rows(x_BLD: Tensor, documents: Documents | None, rows: int) -> Tensor:
    return x_BLD if documents is None else documents.put_back(x_BLD, rows)
