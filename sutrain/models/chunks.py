"""Documents cut into chunks for FLASH (arXiv 2202.10447; kexue.fm/archives/8934).

B batch, L row length, G chunks a row, C tokens a chunk. Chunks are counted from the start of every document, so that
a document gives the same numbers wherever it stands in a row; the price is a last chunk that is not full.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .documents import find_documents


class Chunks(NamedTuple):
    """Where tokens lie in chunks, and which chunks' sums a chunk reads."""

    size: int  # C
    source_BN: Tensor  # [B, G C] the token of each place, in [B L]; any where the place is empty
    filled_BN: Tensor  # [B, G C] bool
    place_BL: Tensor  # [B, L] the place of each token, in [B G C]; any for padding
    real_BL: Tensor  # [B, L] bool, False for padding
    reads_BGG: Tensor  # [B, G, G] bool: the linear part of chunk i reads the sum over chunk j
    tokens_BG: Tensor  # [B, G] fp32, over how many tokens the sums run that a chunk reads; at least 1
    causal: bool

    def arrange(self, x_BLE: Tensor) -> Tensor:
        """Tokens into chunks, [B, L, E] -> [B, G, C, E], zero in empty places."""
        places_BNE = _Moved.apply(x_BLE, self.source_BN, self.filled_BN, self.place_BL, self.real_BL)
        return places_BNE.unflatten(1, (-1, self.size))

    def put_back(self, x_BGCE: Tensor) -> Tensor:
        """Chunks into tokens, [B, G, C, E] -> [B, L, E], zero at padding."""
        places_BNE = x_BGCE.flatten(1, 2)
        return _Moved.apply(places_BNE, self.place_BL, self.real_BL, self.source_BN, self.filled_BN)


class _Moved(torch.autograd.Function):
    """Tokens fetched from where they are. Gradients are fetched as well, from the one place that each went to: autograd
    by itself would add them up where they came from, which takes a CPU several times as long, and a GPU atomic sums."""

    @staticmethod
    def forward(ctx: Any, x, index, used, index_back, used_back) -> Tensor:
        ctx.save_for_backward(index_back, used_back)
        return _fetch(x, index, used)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _fetch(gradients[0], *ctx.saved_tensors), None, None, None, None


def _fetch(x_BME: Tensor, index_BN: Tensor, used_BN: Tensor) -> Tensor:
    """[B, N, E]: the rows of x that the index names, in [B M], or zero."""
    rows = x_BME.flatten(0, 1).index_select(0, index_BN.flatten())
    return rows.unflatten(0, index_BN.shape).where(used_BN.unsqueeze(-1), 0.0)


def build_chunks(document_BL: Tensor, size: int, causal: bool) -> Chunks:
    """Lay every document of every row out in chunks of `size` tokens.

    Raises:
        ValueError: when the tokens of a document do not stand together in its row.
    """
    rows, length = document_BL.shape
    device = document_BL.device
    real_BL = document_BL > 0
    place = torch.zeros(rows * length, dtype=torch.long, device=device)
    documents = find_documents(document_BL)
    if documents is None:
        if bool(real_BL.any()):
            raise ValueError(
                "documents: found one interrupted by another; mixer flash needs each in one piece"
            )
        owner_BG = torch.zeros(rows, 1, dtype=torch.long, device=device)
        ordinal_BG, tokens_BG = owner_BG, torch.ones(rows, 1, device=device)
        groups = 1
    else:
        sizes = documents.sizes()
        starts = sizes.cumsum(0) - sizes
        total = len(documents.index_T)
        run_T = torch.arange(len(sizes), device=device).repeat_interleave(sizes, output_size=total)
        rank_T = torch.arange(total, device=device) - starts[run_T]
        row_of_run = documents.index_T[starts] // length
        chunks_of_run = (sizes + size - 1) // size
        before = chunks_of_run.cumsum(0) - chunks_of_run  # chunks of the whole batch ahead of a document
        per_row = torch.zeros(rows, dtype=torch.long, device=device).index_add_(0, row_of_run, chunks_of_run)
        first = before - (per_row.cumsum(0) - per_row)[row_of_run]  # a document's first chunk within its row
        groups = int(per_row.max())
        flat_T = row_of_run[run_T] * groups + first[run_T] + rank_T // size  # each token's chunk

        owner = torch.zeros(rows * groups, dtype=torch.long, device=device)
        owner[flat_T] = run_T + 1  # 0: an empty chunk
        ordinal = torch.zeros_like(owner)
        ordinal[flat_T] = rank_T // size
        tokens = torch.ones(rows * groups, device=device)
        tokens[flat_T] = sizes[run_T].float()
        owner_BG, ordinal_BG, tokens_BG = (x.view(rows, groups) for x in (owner, ordinal, tokens))

    source = torch.zeros(rows * groups * size, dtype=torch.long, device=device)
    filled = torch.zeros(rows * groups * size, dtype=torch.bool, device=device)
    if documents is not None:
        place_T = flat_T * size + rank_T % size
        place[documents.index_T], source[place_T], filled[place_T] = place_T, documents.index_T, True
    source_BN, filled_BN = (x.view(rows, groups * size) for x in (source, filled))

    reads_BGG = owner_BG.unsqueeze(2) == owner_BG.unsqueeze(1)
    if causal:  # complete chunks before one's own
        reads_BGG = reads_BGG & (ordinal_BG.unsqueeze(1) < ordinal_BG.unsqueeze(2))
        tokens_BG = (ordinal_BG * size).float()
    return Chunks(
        size,
        source_BN,
        filled_BN,
        place.view(rows, length),
        real_BL,
        reads_BGG,
        tokens_BG.clamp(min=1),
        causal,
    )
