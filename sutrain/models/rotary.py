"""Rotary positions (RoPE, kexue.fm/archives/8265), in the interleaved layout of RoFormer or the half-split one.

B batch, L sequence length, H heads, K rotary size (a head's size, or a GAU's key size). The pair (x_2i,
x_2i+1) at position p is turned by the angle p * base^(-2i/K), so that the product of a query at i and a key
at j depends on i - j only. Hence it does not matter that the positions of a packed row run on across
documents instead of starting again at each: inside a document only differences are seen, and across documents
nothing is.
"""

from functools import lru_cache

import torch
from torch import Tensor


def _table(length: int, size: int, base: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a cached inference tensor could never serve in training again
        exponent = torch.arange(0, size, 2, dtype=torch.float64, device="cpu") / -size
        angle = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), base**exponent)
        return torch.stack((angle.cos(), angle.sin()), dim=-1).to(device, torch.float32)


_cached_table = lru_cache(maxsize=16)(_table)


def rotary_table(length: int, size: int, base: float, device: torch.device) -> Tensor:
    """Cosine and sine of every position and pair, fp32 [length, size / 2, 2].

    A function of its arguments, cached outside the module on purpose: a buffer would be rounded by a cast of
    the model to bf16 and lost by construction on the meta device. Angles are formed in fp64, because the
    rounding of a large fp32 angle would make scores depend on the position itself.
    """
    whole = 1 << max(length - 1, 127).bit_length()  # a few sizes, not one per batch
    # A program that is being recorded (torch.export) has stand-ins for tensors, which nobody else must find.
    table = _table if torch.compiler.is_compiling() else _cached_table
    return table(whole, size, base, device)[:length]


def rotate(x_BLHK: Tensor, table: Tensor | None, half: bool = False) -> Tensor:
    """Turn the pairs of `x_BLHK` by the angles of `table` [L, K/2, 2], in fp32; the dtype comes back.

    Without a table nothing is turned. `half` pairs feature i with i + K/2, as most decoders outside the RoFormer
    family do: their weights are these with the rows of query and key in another order.
    """
    if table is None:
        return x_BLHK
    # The complex product is one pass, the other seven: four times as fast on a CPU, and on a GPU less than half of the
    # bytes. Compilers fuse the other.
    plain = x_BLHK.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling()
    turn = turn_complex if plain else turn_real
    pairs = (
        x_BLHK.float().unflatten(-1, (2, -1)).transpose(-1, -2)
        if half
        else x_BLHK.float().unflatten(-1, (-1, 2))
    )
    turned = turn(pairs, table.unsqueeze(-3))  # the same angles for all heads
    return (turned.transpose(-1, -2) if half else turned).flatten(-2).to(x_BLHK.dtype)


def turn_complex(pairs: Tensor, table: Tensor) -> Tensor:
    """Pairs [..., 2] times (cos, sin) [..., 2], as complex numbers."""
    return torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.view_as_complex(table))


def turn_real(pairs: Tensor, table: Tensor) -> Tensor:
    """The same in real arithmetic."""
    (even, odd), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
