"""FLASH, the gated attention unit with mixed chunk attention (arXiv 2202.10447; kexue.fm/archives/8934).

B batch, L sequence length, D hidden size, E expansion size, S key size, G chunks a row, C tokens a chunk.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration import EncoderConfig
from .gates import Promise, gated_output, project
from .init import Linear
from .rotary import rotate
from .visibility import Visibility, choose

_NAMES = ("quadratic_query", "quadratic_key", "linear_query", "linear_key")


class MixedChunkAttention(nn.Module):
    """(U * (A V + M)) W_o: attention A within a chunk, linear attention M over the chunks of the document.

        A = relu(q k^T)^2 / (C S)              within a chunk of C tokens, or relu(q k^T / C)^2
        M = q' sum_chunks(k'^T V) / n          over all n tokens of the document
        M = q' sum_chunks before(k'^T V) / t   causal: over the t tokens of complete chunks before, 0 in the first

    Cost and memory grow linearly with a document's length. (The post prints (g - 1) n / C for t; the tokens
    before chunk g are (g - 1) C.)
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        expansion, key = config.gau_expansion_size, config.gau_key_size
        self.parts, self.dropout = (expansion, expansion, key), config.attention_dropout
        self.half_split = config.positions == "rotary_half"
        chunk = config.flash_chunk_size
        self.scale = 1 / math.sqrt(chunk * key) if config.score_normaliser == "relu_squared" else 1 / chunk
        self.input = Linear("gau_input", config.hidden_size, sum(self.parts), config.biases, parts=self.parts)
        for name in _NAMES:
            self.register_parameter(f"{name}_scale", nn.Parameter(torch.ones(key)))
            offset = nn.Parameter(torch.zeros(key)) if config.biases else None
            self.register_parameter(f"{name}_offset", offset)
        self.output = Linear("output", expansion, config.hidden_size, config.biases)

    def reset_parameters(self) -> None:
        """Queries and keys start out equal: scale 1, offset 0."""
        for name in _NAMES:
            nn.init.ones_(getattr(self, f"{name}_scale"))
            if (offset := getattr(self, f"{name}_offset")) is not None:
                nn.init.zeros_(offset)

    def attention(self, x_BLD: Tensor, visible: Visibility) -> None:
        """None: neither part is a distribution over tokens."""
        return None

    def forward(
        self, x_BLD: Tensor, visible: Visibility, chosen_M: Tensor | None = None
    ) -> tuple[Tensor, Promise]:
        """Mix the tokens of each document; [B, L, D] to [B, L, E] and the gate, which are to go to `finish` (as in
        `MultiHeadAttention`)."""
        chunks = visible.chunks
        if chunks is None:
            raise ValueError("visible: found no chunks; build it with the model's own configuration")
        gate, value, shared = project(self.input, x_BLD, self.parts, 1, chosen_M)
        value_BLE, shared_BLS = F.silu(value.kept()), F.silu(shared.kept())
        query, key, linear_query, linear_key = (
            chunks.arrange(self._rescaled(name, shared_BLS, visible)) for name in _NAMES
        )
        value_BGCE = chunks.arrange(value_BLE)  # zero in empty places, which keeps them out of both parts

        scores_BGCC = F.relu(torch.matmul(query * self.scale, key.transpose(-1, -2)).float())
        if chunks.causal:
            scores_BGCC = scores_BGCC.tril()
        weights_BGCC = F.dropout(scores_BGCC.square().to(value_BGCE.dtype), self.dropout, self.training)
        quadratic_BGCE = torch.matmul(weights_BGCC, value_BGCE)

        sums_BGSE = torch.matmul(linear_key.transpose(-1, -2), value_BGCE)
        reads_BGG = chunks.reads_BGG.to(sums_BGSE.dtype)
        read_BGSE = torch.matmul(reads_BGG, sums_BGSE.flatten(2)).view_as(sums_BGSE)
        # Divided on the side of the query, in fp32: sums over thousands of tokens stay of their own size.
        share_BGCS = (linear_query.float() / chunks.tokens_BG[..., None, None]).to(linear_query.dtype)
        linear_BGCE = torch.matmul(share_BGCS, read_BGSE)
        return chunks.put_back(quadratic_BGCE + linear_BGCE), gate

    def finish(self, mixed: tuple[Tensor, Promise], chosen_M: Tensor | None = None) -> Tensor:
        """Transform each token; [B, L, D], or at some tokens as `choose` has it."""
        mixed_BLE, gate = mixed
        return gated_output(self.output, F.silu, choose(mixed_BLE, chosen_M), gate)

    def _rescaled(self, name: str, shared_BLS: Tensor, visible: Visibility) -> Tensor:
        x_BLS = shared_BLS * getattr(self, f"{name}_scale")
        if (offset := getattr(self, f"{name}_offset")) is not None:
            x_BLS = x_BLS + offset
        return rotate(x_BLS.unsqueeze(2), visible.rotary, self.half_split).squeeze(2)
